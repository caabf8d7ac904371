"""Study: its label, the draft on disk at every change, the way to the server, and what to do when it does not go."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Dict, List, Optional, Sequence, Set, Tuple

from slicer.i18n import tr as _

from PulmonaryEmbolismLib.answers import Sent, Study
from PulmonaryEmbolismLib.drafts import Draft, Masks, fetch_masks, send
from PulmonaryEmbolismLib.jobs import Cancelled, Job
from PulmonaryEmbolismLib.transport import Conflict, LabelConflict, ServerError


class Saving:
    def __init__(self, panel) -> None:
        self.panel = panel
        self.ui = ui = panel.ui
        self._sending: Set[str] = set()
        self._again: Dict[str, Tuple[Draft, bool]] = {}
        self._blocked: Set[str] = set()
        panel.on_click([(ui.saveButton, self.save), (ui.submitButton, self.submit)])
        panel.on_click((button, functools.partial(self.click_label, label)) for button, label in self._labels())
        panel.connect(ui.studyNoteEdit, "editingFinished()", self.write_note)

    def label(self, label: str) -> None:
        """Of the study, with one click or key, with or without slices."""
        session = self.panel.session
        if session is None:
            return
        self.panel.annotate.sync_paint()
        if not self._agrees(label, done=False):
            self.show()
            return
        session.set_label(label)
        self.panel.annotate.changed()
        if session.unsent:
            self.save()
        if label and self.panel.worklist.work == "labels":
            self.panel.worklist.advance()

    def click_label(self, label: str) -> None:
        """A label's button: a click on the one that is down takes the label back."""
        session = self.panel.session
        self.label("" if session is not None and session.label == label else label)

    def write_note(self) -> None:
        """The reader's remark on the study."""
        session, text = self.panel.session, self.ui.studyNoteEdit.text.strip()
        if session is not None and text != session.note:
            self.panel.annotate.edit(lambda session: session.write_note(text))

    def _agrees(self, label: str, done: bool) -> bool:
        """Whether label and slices fit together, or the reader wants them as they are."""
        session = self.panel.session
        emboli = session.emboli
        if label == "negative" and emboli:
            slices = ", ".join(str(k + 1) for k in emboli[:5]) + (" …" if len(emboli) > 5 else "")
            text = _("Embolism is marked on slice {slices}. Is the study negative all the same?").format(slices=slices)
        elif label == "positive" and done and not emboli and session.progress[0]:
            text = _("No slice of this study is marked as embolism. Is it positive all the same?")
        else:
            return True
        return self.panel.ask(text, ["Keep the label", "Go back"]) == "Keep the label"

    def keep(self) -> None:
        """Write the draft at every change, so that a crash of Slicer takes nothing."""
        self._write(self.panel.session.snapshot())

    def save(self) -> None:
        """Send what there is."""
        self.panel.annotate.sync_paint()
        if self.panel.session.unsent:
            self._send(self.panel.session.queue())
        else:
            self.say(_("Everything is on the server."))

    def submit(self) -> None:
        """Send as complete; whether it is complete, the server decides."""
        session = self.panel.session
        if session is None:
            return
        self.panel.annotate.sync_paint()
        if not self._agrees(session.label, done=not session.open_slices):
            return
        detecting = self.panel.detecting
        if detecting.detection is not None and not session.open_slices:
            session.leave_open(detecting.detection.candidates, detecting.detection.model.sha256)
        if session.unsent:
            self._send(session.queue(), submitted=True)
        else:
            self._submitted(session.open_slices)

    def retry(self) -> None:
        """Send what could not be sent, of this and earlier days."""
        drafts, address = self.panel.drafts, self.panel.server.address
        text = _("Looking for unsent work")
        self.panel.runner.submit("retry", text, lambda job: drafts.pending(address), self._resend)

    def unblock(self, study: Optional[str] = None) -> None:
        """Sending may be tried again: of one study, or of all."""
        self._blocked = self._blocked - {study} if study else set()

    @property
    def under_way(self) -> List[str]:
        """The studies that are being sent."""
        return sorted(self._sending)

    def forget(self) -> None:
        """Another server was connected: nothing is under way."""
        self._sending.clear()
        self._again.clear()

    def say(self, text: str) -> None:
        self.ui.savedLabel.text = text

    def show(self) -> None:
        """Which study is open, its label, and whether the server has it all."""
        session = self.panel.session
        self.ui.studyLabel.text = session.study if session else _("No study open.")
        self.ui.studyNoteEdit.text = session.note if session else ""
        for button, label in self._labels():
            button.checked = session is not None and session.label == label
        if session is None:
            self.say("")
        elif session.unsent:
            self.say(_("Changes are kept on this computer, not yet on the server."))

    def _labels(self) -> list:
        ui = self.ui
        return [(ui.positiveButton, "positive"), (ui.negativeButton, "negative"), (ui.uncertainButton, "uncertain")]

    def _is_open(self, draft: Draft) -> bool:
        session = self.panel.session
        return session is not None and session.study == draft.study and session.server == draft.server

    def _write(self, draft: Draft) -> None:
        drafts, panel = self.panel.drafts, self.panel
        panel.runner.submit("autosave", _("Keeping a draft"), lambda job: drafts.write(draft), None, panel.say)

    # --- to the server

    def _send(self, draft: Draft, submitted: bool = False) -> None:
        self._write(draft)
        if draft.study in self._sending:
            self._again[draft.study] = (draft, submitted)
            return
        self._sending.add(draft.study)
        client, folder = self.panel.client, self.panel.cache / "outgoing"
        self.say(_("Sending …"))
        self.panel.runner.submit(
            "upload",
            _("Saving {study}").format(study=draft.study),
            lambda job: send(client, draft, folder, job.report),
            functools.partial(self._sent, draft, submitted),
            functools.partial(self._not_sent, draft, submitted),
        )

    def _sent(self, draft: Draft, submitted: bool, sent: Sent) -> None:
        saved = sent.saved
        self._sending.discard(draft.study)
        self._blocked.discard(draft.study)
        later, submitted_later = self._again.pop(draft.study, (None, False))
        self.panel.worklist.refresh()
        if not self._is_open(draft):
            known = draft.acknowledged(sent)
            later = later.after(known) if later is not None else None
            if later is None or not later.unsent:
                self._write(known)
            else:
                self._send(later)
            return
        session = self.panel.session
        session.acknowledge(draft, sent)
        if (sent.label_revision and draft.label) or (saved and not saved.open_slices):
            self.panel.study.reveal()
        self.keep()
        if submitted_later or (submitted and session.unsent):
            self.submit()
        elif later is not None:
            self.save()
        elif submitted:
            self._submitted(saved.open_slices if saved else session.open_slices)
        else:
            tag = f" ({saved.tag})" if saved else _(" (study label)")
            self.say(_("Saved on the server{tag} at {time}.").format(tag=tag, time=time.strftime("%H:%M")))

    def _submitted(self, still_open: Sequence[int]) -> None:
        if not still_open:
            now = time.strftime("%H:%M")
            self.say(_("Submitted as complete at {time}. Next study opens another.").format(time=now))
            return
        text = _("Saved as a draft: {n} slices of the schedule are open, the first is slice {k}.")
        self.say(text.format(n=len(still_open), k=still_open[0] + 1))
        self.panel.annotate.jump(still_open[0])

    def _not_sent(self, draft: Draft, submitted: bool, error: Exception) -> None:
        self._sending.discard(draft.study)
        self._again.pop(draft.study, None)
        if isinstance(error, Conflict):
            self._conflict(draft, submitted, error)
            return
        if isinstance(error, LabelConflict):
            self._label_conflict(draft, submitted, error)
            return
        what = _("Sending was cancelled") if isinstance(error, Cancelled) else str(error).rstrip(".")
        self.panel.due["retry"] = time.monotonic()
        if isinstance(error, ServerError) and not error.worth_retrying:
            self._blocked.add(draft.study)
            self.say(_("{what}. Your work is kept on this computer; Save sends it again.").format(what=what))
        else:
            self.say(_("{what}. Your work is kept on this computer and will be sent again.").format(what=what))

    def _resend(self, pending: Sequence[Draft]) -> None:
        for draft in pending:
            if draft.study in self._blocked or draft.study in self._sending:
                continue
            if not self._is_open(draft):
                self._send(draft)
            elif self.panel.session.queued:
                self.save()

    # --- another version is there

    def _conflict(self, draft: Draft, submitted: bool, error: Conflict) -> None:
        """Another version is on the server: ours that was thought lost, or another reader's."""
        theirs = (error.annotation or {}).get("slices") or []
        ours = draft.annotation()["slices"]
        if all(entry in ours for entry in theirs):
            if self._is_open(draft):
                self.panel.session.revision = error.revision
            self._send(dataclasses.replace(draft, based_on=error.revision), submitted)
        elif self._is_open(draft):
            self._blocked.add(draft.study)  # not sent again while the reader is asked
            self._compare(submitted)
        else:
            self._blocked.add(draft.study)
            self.panel.say(_("Another version of {study} was saved; open it to decide.").format(study=draft.study))

    def _label_conflict(self, draft: Draft, submitted: bool, error: LabelConflict) -> None:
        """Another reader labelled the study otherwise: the reader decides, and never finds out by chance."""
        self._blocked.add(draft.study)
        if not self._is_open(draft):
            text = _("{reader} labelled {study} {theirs}, you {mine}; open it to decide.")
            words = {"reader": error.reader, "study": draft.study, "theirs": error.label, "mine": draft.label}
            self.panel.say(ServerError(text.format(**words)))
            return
        session = self.panel.session
        text = _("{reader} labelled this study {theirs} meanwhile; your label is {mine}.").format(
            reader=error.reader or "?", theirs=error.label or _("without a label"), mine=session.label or "—"
        )
        choices = ["Keep mine", "Take theirs", "Decide later"]
        choice = self.panel.ask(text, choices)
        if choice == choices[2]:
            self.say(_("Not sent: another label is on the server. Your work is kept on this computer."))
            return
        session.meet_label(error.label, error.revision, take=choice == choices[1])
        self._blocked.discard(session.study)
        self.panel.annotate.changed()
        if session.unsent:
            self._send(session.queue(), submitted)
        else:
            self.say(_("The label on the server is yours now: {label}.").format(label=session.label))

    def _compare(self, submitted: bool) -> None:
        """Load the server's version and ask."""
        panel = self.panel
        client, study, folder = panel.client, panel.session.study, panel.cache / "labels"

        def work(job: Job):
            known = client.study(study)
            return known, fetch_masks(client, known, folder, job.report)

        text = _("Loading the other version")
        panel.runner.drop("compare")
        done, failed = lambda found: self._decide(submitted, *found), functools.partial(self._not_compared, study)
        panel.runner.submit("compare", text, work, done, failed)

    def _not_compared(self, study: str, error: Exception) -> None:
        self._blocked.discard(study)
        self.panel.say(error)

    def _decide(self, submitted: bool, known: Study, masks: Masks) -> None:
        panel, session = self.panel, self.panel.session
        panel.annotate.sync_paint()
        slices = (known.annotation or {}).get("slices") or ()
        readers = sorted({str(s.get("reader") or "?") for s in slices})
        text = _("Another version of this study was saved meanwhile ({n} slices by {who}). Slices that both reviewed "
                 "stay yours if you combine them; the server keeps every version.")  # fmt: skip
        choices = ["Combine both", "Use the server's version", "Decide later"]
        choice = panel.ask(text.format(n=len(slices), who=", ".join(readers)), choices)
        if choice == choices[2]:
            self.say(_("Not sent: another version is on the server. Your work is kept on this computer."))
            return
        if choice == choices[0]:
            panel.annotate.edit(lambda session: session.merge(known.annotation, masks, known.revision))
        else:
            panel.drafts.set_aside(session.snapshot())
            panel.annotate.edit(lambda session: session.adopt(known.annotation, masks, known.revision))
        session.follow_label(known.row)
        self.show()
        self._blocked.discard(session.study)
        if session.unsent:
            self._send(session.queue(), submitted)
