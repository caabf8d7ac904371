"""The open study: held, loaded, shown, restored from a draft, and put away again."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Callable, Optional

import slicer
from slicer.i18n import tr as _

from PulmonaryEmbolismLib import images, review, scene
from PulmonaryEmbolismLib.answers import Study
from PulmonaryEmbolismLib.drafts import Draft, Masks, fetch_masks
from PulmonaryEmbolismLib.jobs import Job
from PulmonaryEmbolismLib.transport import ServerError

CACHED_STUDIES = 20


class OpenStudy:
    def __init__(self, panel) -> None:
        self.panel = panel
        self.ui = panel.ui
        self._former = ""

    def open(self, study: str) -> None:
        """Hold the study, then load it. What is open now is kept and sent."""
        panel = self.panel
        if panel.session is not None and panel.session.study == study:
            panel.saving.say(_("{study} is open; nothing else comes before it.").format(study=study))
            return
        if panel.session is not None and panel.session.unsent:
            panel.saving.save()
        client = panel.client
        panel.runner.drop("study")
        load = functools.partial(self._load, study)
        text = _("Opening {study}").format(study=study)
        held = functools.partial(self._held, load)
        panel.runner.submit("study", text, lambda job: client.lease(study), lambda answer: load(), held)

    def open_former(self) -> None:
        """Back to the study that was open before this one."""
        if self._former:
            self.open(self._former)
        elif self.panel.client is not None:
            self.panel.say(_("No study was open before this one."))

    def close(self) -> None:
        """Put the open study away and let others have it."""
        panel = self.panel
        panel.runner.drop("detect")
        panel.runner.drop("propose")
        panel.runner.drop("compare")
        panel.runner.drop("reveal")
        if panel.session is None:
            return
        client, study = panel.client, panel.session.study
        self._former = study
        panel.runner.submit("release", _("Closing"), lambda job: client.release(study))
        if panel.nodes is not None:
            panel.annotate.sync_paint()
            panel.unobserve(panel.nodes.segmentation.GetSegmentation())
            panel.ui.editor.setActiveEffect(None)
            panel.nodes.close()
        panel.session = panel.nodes = None
        panel.detecting.forget()
        panel.annotate.forget()
        panel.enable()

    def renew_lease(self) -> None:
        if self.panel.session is not None:
            client, study = self.panel.client, self.panel.session.study
            self.panel.runner.submit("release", _("Holding"), lambda job: client.lease(study))

    def _held(self, load: Callable[[], None], error: Exception) -> None:
        question = _("{sentence}\nOpen it all the same?").format(sentence=error)
        if not isinstance(error, ServerError) or error.status != 409:
            self.panel.say(error)
        elif self.panel.ask(question, ["Open", "Cancel"]) == "Open":
            load()

    def _load(self, study: str) -> None:
        panel = self.panel
        client, cache, drafts, address = panel.client, panel.cache, panel.drafts, panel.server.address

        reading = _("Reading {study}").format(study=study)  # words are made on the main thread

        def work(job: Job):
            known = client.study(study)
            _trim(cache, CACHED_STUDIES)
            path = client.download_image(study, known.sha256, cache, job.report)
            job.report(reading)
            image = images.read_image(path).canonical()
            if known.size and image.voxels.shape != known.size:
                raise images.ImageError(f"The image of {study} is not the one that the server describes.")
            masks = fetch_masks(client, known, cache / "labels", job.report)
            return known, image, masks, drafts.read(address, study)

        text = _("Loading {study}").format(study=study)
        panel.runner.submit("study", text, work, lambda loaded: self._loaded(*loaded), panel.say)

    def _loaded(self, study: Study, image: images.Image, masks: Masks, draft: Optional[Draft]) -> None:
        panel = self.panel
        if panel.session is not None:
            panel.annotate.sync_paint()
            if panel.session.unsent:
                panel.saving.save()
        self.close()
        session = review.ReviewSession(panel.server.address, study, image, panel.client.reader)
        session.adopt(study.annotation, masks, study.revision)
        if draft is not None and draft.image.get("sha256") == study.sha256:
            self._offer(session, study, masks, draft)
        nodes = scene.StudyScene(slicer.mrmlScene, image, session.study, panel.editor_node)
        panel.session, panel.nodes = session, nodes
        nodes.paint(session.masks)
        nodes.show(self._show_views())
        segmentation = nodes.segmentation.GetSegmentation()
        for event in ("SourceRepresentationModified", "SegmentModified"):  # strokes fire the first, undo the second
            panel.observe(segmentation, getattr(slicer.vtkSegmentation, event), panel.annotate.painted)
        self.show_sections()
        panel.detecting.show(study.detection, None)
        panel.painting.begin()
        panel.annotate.begin()
        panel.saving.unblock(session.study)
        if not study.row.usable:
            reason = _("This study is left out of detection and training: {reason}.").format(reason=study.row.reason)
            panel.saving.say(reason)
            panel.say(reason)
        if session.unsent:
            panel.saving.keep()
        panel.worklist.fetch_ahead()

    def reveal(self) -> None:
        """On a server that reads blinded: the reader has submitted, so results may be shown."""
        panel = self.panel
        if not panel.server.blinded or panel.detecting.detection is not None or panel.worklist.work == "labels":
            return
        client, study = panel.client, panel.session.study
        panel.runner.drop("reveal")
        panel.runner.submit("reveal", _("Loading the results"), lambda job: client.study(study), self._revealed)

    def _revealed(self, known: Study) -> None:
        session = self.panel.session
        if session is not None and session.study == known.row.study and known.detection is not None:
            self.panel.detecting.show(known.detection, None)

    def show_sections(self) -> None:
        """What the reader works with is unfolded: for labels the study alone."""
        if self.panel.session is None:
            return
        ui, slices = self.ui, self.panel.worklist.work == "slices"
        ui.worklistSection.collapsed = True
        ui.studySection.collapsed = False
        ui.annotateSection.collapsed = ui.detectSection.collapsed = not slices

    def _offer(self, session: review.ReviewSession, study: Study, masks: Masks, draft: Draft) -> None:
        """Work of an earlier day that the server does not have: the reader decides what becomes of it."""
        if not draft.unsent:
            return
        found = _("Work on {study} of {time} has not reached the server ({n} slices reviewed).").format(
            study=draft.study, time=draft.time.replace("T", " ").rstrip("Z"), n=len(draft.marks)
        )
        if draft.based_on == study.revision:
            if self.panel.ask(found, ["Restore it", "Set it aside"]) == "Restore it":
                session.restore(draft)
                return
        else:
            found += "\n" + _("Meanwhile another version was saved there.")
            if self.panel.ask(found, ["Combine both", "Use the server's version"]) == "Combine both":
                session.restore(draft)
                session.merge(study.annotation, masks, study.revision)
                return
        self.panel.drafts.set_aside(draft)

    def _show_views(self) -> list:
        """The slice views, laid out and linked; their nodes."""
        views = self.panel.views
        views.lay_out()
        views.link()
        views.watch()
        views.fit()
        return views.all()


def _trim(cache: Path, keep: int) -> None:
    """Keep the CTs used last; patients' images do not pile up."""
    held = [path for path in cache.glob("*") if path.name.endswith(images.SUFFIXES)]
    for path in sorted(held, key=lambda path: path.stat().st_mtime)[: max(len(held) - keep, 0)]:
        path.unlink()
