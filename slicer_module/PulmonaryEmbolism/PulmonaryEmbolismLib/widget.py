"""The panel: binds the .ui to the session (review), the nodes (scene) and the server (client, in jobs).

Handlers are short and run on the main thread; whatever asks the server or writes a file goes through ``Runner``.
"""

from __future__ import annotations

import dataclasses
import functools
import getpass
import time
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Set

import qt
import slicer
from slicer.i18n import tr as _

from PulmonaryEmbolismLib import images, plots, review, scene
from PulmonaryEmbolismLib.client import Candidate, Client, Conflict, Detection, Row, Saved, Server, ServerError, Study
from PulmonaryEmbolismLib.jobs import Cancelled, Job, Runner

POLL_MILLISECONDS = 25
SETTLE_SECONDS = 0.15
"""Paint is read back when it has rested this long."""
RETRY_SECONDS = 20.0
REFRESH_SECONDS = 60.0
LEASE_SECONDS = 300.0
TRAINING_SECONDS = 2.0
CACHED_STUDIES = 20

SETTINGS = "PulmonaryEmbolism/"
STATES = ("", "not_started", "in_progress", "complete")
STATE_WORDS = {"embolism": "embolism", "none": "no embolism", "uncertain": "uncertain", "": "—"}
WHY_WORDS = {"schedule": "", "suspicious": "suspicious", "extra": "added"}
HIDDEN_IN_EDITOR = (
    "segmentationNodeSelectorVisible",
    "sourceVolumeNodeSelectorVisible",
    "switchToSegmentationsButtonVisible",
    "addRemoveSegmentButtonsVisible",
    "maskingSectionVisible",
    "unorderedEffectsVisible",
)
COLUMNS = ("study", "state", "label", "probability")


def ask(text: str, choices: Sequence[str]) -> str:
    """One question to the reader; closing the box is the last choice, which must be the harmless one."""
    box = qt.QMessageBox(slicer.util.mainWindow())
    box.setWindowTitle(_("Pulmonary Embolism"))
    box.setText(text)
    buttons = [box.addButton(choice, qt.QMessageBox.AcceptRole) for choice in choices]
    box.setEscapeButton(buttons[-1])
    box.exec_()
    clicked = box.clickedButton().text.replace("&", "")
    return next((choice for choice in choices if choice == clicked), choices[-1])


class Panel:
    """What the module shows.

    Args:
        ui: the named widgets of the .ui.
        data: a folder that lasts, for drafts.
        cache: a folder that may be emptied, for CTs and attention volumes.
        question: how the reader is asked; takes a text and choices, returns a choice.
    """

    def __init__(self, ui, data: Path, cache: Path, question: Callable[[str, Sequence[str]], str] = ask) -> None:
        self.ui = ui
        self.cache = cache
        self.ask = question
        self.runner = Runner()
        self.drafts = review.Drafts(data / "drafts")
        self.client: Optional[Client] = None
        self.server: Optional[Server] = None
        self.rows: Sequence[Row] = ()
        self.session: Optional[review.ReviewSession] = None
        self.nodes: Optional[scene.StudyScene] = None
        self.detection: Optional[Detection] = None
        self.attention: Optional[images.Image] = None
        self._sort = ("state", False)
        self._shown: List[Row] = []
        self._sending: Set[str] = set()
        self._again: Set[str] = set()
        self._blocked: Set[str] = set()
        self._painted_at: Optional[float] = None
        self._observed: List[tuple] = []
        self._shortcuts: list = []
        self._due = {"retry": 0.0, "refresh": 0.0, "lease": 0.0, "training": 0.0}
        self._training = False
        self._laid_out = False
        self._k = -1
        self.editor_node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentEditorNode", "PE editor")
        self._build()
        self._connect_signals()
        self._restore_settings()
        self._enable()
        self.timer = qt.QTimer()
        self.timer.setInterval(POLL_MILLISECONDS)
        self.timer.connect("timeout()", self.tick)
        self.timer.start()

    # --- life of the panel

    def _build(self) -> None:
        ui = self.ui
        self.strip = plots.SliceStrip()
        self.curve = plots.EvidenceCurve()
        self.curves = plots.TrainingCurves()
        for frame, drawn in ((ui.stripFrame, self.strip), (ui.curveFrame, self.curve), (ui.trainingFrame, self.curves)):
            frame.layout().addWidget(drawn)
        self.strip.jump = self.curve.jump = self.jump
        editor = ui.editor
        editor.setMRMLScene(slicer.mrmlScene)
        editor.setMRMLSegmentEditorNode(self.editor_node)
        for name in HIDDEN_IN_EDITOR:
            editor.setProperty(name, False)
        editor.setEffectNameOrder(["Paint", "Draw", "Erase", "Threshold", "Islands"])
        editor.setMaximumNumberOfUndoStates(20)
        for table, stretch in ((ui.worklistTable, 0), (ui.scheduleTable, 3), (ui.candidatesTable, 5)):
            table.verticalHeader().setVisible(False)
            table.verticalHeader().setDefaultSectionSize(20)
            header = table.horizontalHeader()
            header.setSectionResizeMode(qt.QHeaderView.ResizeToContents)
            header.setSectionResizeMode(stretch, qt.QHeaderView.Stretch)
        for section in (ui.worklistSection, ui.studySection, ui.annotateSection, ui.detectSection, ui.trainSection):
            section.collapsed = True

    def _connect_signals(self) -> None:
        ui = self.ui
        for button, handler in (
            (ui.connectButton, self.connect),
            (ui.refreshButton, self.refresh),
            (ui.openButton, self.open_selected),
            (ui.nextButton, self.next_study),
            (ui.followingButton, self.next_study),
            (ui.positiveButton, functools.partial(self.label_study, "positive")),
            (ui.negativeButton, functools.partial(self.label_study, "negative")),
            (ui.uncertainButton, functools.partial(self.label_study, "uncertain")),
            (ui.saveButton, self.save),
            (ui.submitButton, self.submit),
            (ui.previousButton, functools.partial(self.step, -1)),
            (ui.forwardButton, functools.partial(self.step, 1)),
            (ui.noneButton, functools.partial(self.mark, review.NONE)),
            (ui.unsureButton, functools.partial(self.mark, review.UNCERTAIN)),
            (ui.undoButton, self.undo),
            (ui.clearButton, self.clear_slice),
            (ui.addButton, self.add_slice),
            (ui.peWindowButton, functools.partial(self.set_window, "PE")),
            (ui.lungWindowButton, functools.partial(self.set_window, "Lung")),
            (ui.mediastinumWindowButton, functools.partial(self.set_window, "Mediastinum")),
            (ui.clotButton, self.set_clot_range),
            (ui.fillButton, self.propose),
            (ui.takeButton, self.take_proposal),
            (ui.discardButton, self.discard_proposal),
            (ui.detectButton, self.detect),
            (ui.acceptButton, self.accept),
            (ui.rejectButton, self.reject),
            (ui.overlayButton, self.show_overlay),
            (ui.trainButton, self.train),
            (ui.stopButton, self.stop_training),
            (ui.cancelButton, self.cancel),
        ):
            button.connect("clicked()", handler)
        ui.addressBox.lineEdit().connect("returnPressed()", self.connect)
        ui.tokenEdit.connect("returnPressed()", self.connect)
        ui.filterEdit.connect("textChanged(QString)", lambda text: self._show_worklist())
        ui.stateBox.connect("currentIndexChanged(int)", lambda index: self._show_worklist())
        ui.worklistTable.connect("cellDoubleClicked(int,int)", lambda row, column: self.open_selected())
        ui.worklistTable.connect("itemSelectionChanged()", self._enable)
        ui.worklistTable.horizontalHeader().connect("sectionClicked(int)", self.sort)
        ui.scheduleTable.connect("cellClicked(int,int)", lambda row, column: self._go_to_line(row))
        ui.candidatesTable.connect("cellClicked(int,int)", lambda row, column: self._go_to_candidate())
        ui.opacitySlider.connect("valueChanged(double)", lambda value: self.show_overlay())
        ui.thresholdSlider.connect("valueChanged(double)", lambda value: self.show_overlay())

    def enter(self) -> None:
        """The module is shown: its keys work."""
        if self._shortcuts:
            return
        self.ui.editor.setupViewObservations()
        window = slicer.util.mainWindow()
        for key, handler in (
            ("N", functools.partial(self.step, 1)),
            ("P", functools.partial(self.step, -1)),
            ("E", functools.partial(self.mark, review.NONE)),
            ("U", functools.partial(self.mark, review.UNCERTAIN)),
            ("O", self.toggle_overlay),
            ("Ctrl+Return", self.submit),
            ("Ctrl+Enter", self.submit),
        ):
            shortcut = qt.QShortcut(qt.QKeySequence(key), window)
            shortcut.connect("activated()", functools.partial(self._key, handler))
            self._shortcuts.append(shortcut)
        self._observe(self._red_node(), "ModifiedEvent", self._slice_moved)
        self._slice_moved()

    def exit(self) -> None:
        """The module is left: its keys and its brush do not stay behind."""
        self._sync_paint()
        self.ui.editor.setActiveEffect(None)
        self.ui.editor.removeViewObservations()
        self._remove_keys()
        self._unobserve(self._red_node())

    def _remove_keys(self) -> None:
        for shortcut in self._shortcuts:
            shortcut.setEnabled(False)
            shortcut.setParent(None)
            shortcut.deleteLater()
        self._shortcuts = []

    def cleanup(self) -> None:
        """Slicer closes, or the module is reloaded: what is not sent stays in the drafts."""
        self.timer.stop()
        self._sync_paint()
        if self.session is not None and self.session.unsent:
            self.drafts.write(self.session.snapshot())
        self.close_study()
        self._remove_keys()
        for node, tag in self._observed:
            node.RemoveObserver(tag)
        self._observed = []
        self.ui.editor.setMRMLSegmentEditorNode(None)
        slicer.mrmlScene.RemoveNode(self.editor_node)

    def scene_closed(self) -> None:
        """Somebody closed Slicer's scene: the nodes are gone, the review is not."""
        if self.session is not None:
            self._keep()
        self.nodes = None
        self._observed = [pair for pair in self._observed if pair[0] is self._red_node()]
        self.close_study()
        self.editor_node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentEditorNode", "PE editor")
        self.ui.editor.setMRMLSegmentEditorNode(self.editor_node)

    def tick(self) -> None:
        """A few milliseconds, forty times a second: answers, progress, paint that rested, what is due."""
        self.runner.poll()
        self._show_activity()
        now = time.monotonic()
        if self._painted_at is not None and now - self._painted_at > SETTLE_SECONDS:
            self._sync_paint()
        if self.server is not None:
            for name, seconds, act in (
                ("retry", RETRY_SECONDS, self._retry),
                ("refresh", REFRESH_SECONDS, self.refresh),
                ("lease", LEASE_SECONDS, self._renew_lease),
                ("training", TRAINING_SECONDS, self._watch_training),
            ):
                if now >= self._due[name] + seconds:
                    self._due[name] = now
                    act()

    def _key(self, handler: Callable[[], None]) -> None:
        """A key works unless somebody is typing."""
        focus = qt.QApplication.focusWidget()
        if not isinstance(focus, (qt.QLineEdit, qt.QTextEdit, qt.QPlainTextEdit, qt.QAbstractSpinBox)):
            handler()

    def _show_activity(self) -> None:
        quiet = ("autosave", "refresh", "training", "release")
        jobs = [job for job in self.runner.jobs() if job.group not in quiet]
        job = jobs[-1] if jobs else None
        label, bar = self.ui.activityLabel, self.ui.activityBar
        text = f"{job.text} …" if job else ""
        if label.text != text:
            label.text = text
        self.ui.cancelButton.visible = bar.visible = job is not None
        if job:
            bar.setRange(0, job.total)
            bar.setValue(job.done)

    def cancel(self) -> None:
        """Stop waiting for what the footer shows."""
        for job in reversed(self.runner.jobs()):
            if job.group not in ("autosave", "refresh", "training", "release"):
                self.runner.cancel(job)
                return

    # --- server

    def connect(self) -> None:
        ui = self.ui
        try:
            client = Client(ui.addressBox.currentText, ui.tokenEdit.text, ui.readerEdit.text.strip())
        except ServerError as error:
            self._not_connected(error)
            return
        self.runner.drop("connect")
        ui.serverLabel.text = _("Connecting to {address} …").format(address=client.address)
        done = functools.partial(self._connected, client)
        self.runner.submit("connect", _("Connecting"), lambda job: client.connect(), done, self._not_connected)

    def _connected(self, client: Client, server: Server) -> None:
        if self.server is not None and self.server.address != server.address:
            self.close_study()
        self.client, self.server = client, server
        self._blocked.clear()
        self._save_settings()
        ui = self.ui
        ui.serverLabel.text = _("Connected. Model: {model}").format(model=server.model)
        ui.strategyBox.clear()
        ui.strategyBox.addItems([name.replace("_", " ") for name in server.strategies])
        ui.serverSection.collapsed = True
        ui.serverSection.text = _("Server: {address}").format(address=server.address.split("//")[1])
        ui.worklistSection.collapsed = False
        now = time.monotonic()
        self._due.update(refresh=now, lease=now, retry=now - RETRY_SECONDS, training=now - TRAINING_SECONDS)
        self._enable()
        self.refresh()

    def _not_connected(self, error: Exception) -> None:
        self.ui.serverLabel.text = _("Cancelled.") if isinstance(error, Cancelled) else str(error)
        self.ui.serverSection.collapsed = False
        self._enable()

    def _restore_settings(self) -> None:
        settings, ui = qt.QSettings(), self.ui
        addresses = str(settings.value(SETTINGS + "addresses") or "http://127.0.0.1:8000").split()
        ui.addressBox.clear()
        ui.addressBox.addItems(addresses)
        ui.tokenEdit.text = str(settings.value(SETTINGS + "token") or "")
        ui.readerEdit.text = str(settings.value(SETTINGS + "reader") or getpass.getuser())

    def _save_settings(self) -> None:
        settings, box = qt.QSettings(), self.ui.addressBox
        known = [box.itemText(i) for i in range(box.count)]
        addresses = [self.client.address, *(a for a in known if a != self.client.address)][:8]
        settings.setValue(SETTINGS + "addresses", " ".join(addresses))
        settings.setValue(SETTINGS + "token", self.client.token)
        settings.setValue(SETTINGS + "reader", self.client.reader)
        box.clear()
        box.addItems(addresses)

    # --- worklist

    def refresh(self) -> None:
        """Ask for the worklist, quietly."""
        client = self.client
        self.runner.drop("refresh")
        self.runner.submit("refresh", _("Worklist"), lambda job: client.worklist(), self._worklist, self._not_refreshed)

    def _worklist(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.ui.serverLabel.text = _("Connected. Model: {model}").format(model=self.server.model)
        self._show_worklist()

    def _not_refreshed(self, error: Exception) -> None:
        self.ui.serverLabel.text = str(error)
        self.ui.serverSection.collapsed = False

    def sort(self, column: int) -> None:
        """By a column's heading; again, the other way round."""
        if column < len(COLUMNS):
            name = COLUMNS[column]
            self._sort = (name, not self._sort[1] if self._sort[0] == name else name == "probability")
            self._show_worklist()

    def _show_worklist(self) -> None:
        ui, chosen = self.ui, self._selected_study()
        state = STATES[max(ui.stateBox.currentIndex, 0)]
        self._shown = review.arrange(self.rows, ui.filterEdit.text, state, *self._sort)
        table = ui.worklistTable
        table.blockSignals(True)
        _fill(table, [self._row_words(row) for row in self._shown], right=(1, 3))
        for index, row in enumerate(self._shown):
            if row.study == chosen:
                table.selectRow(index)
        table.blockSignals(False)
        complete = sum(row.state == "complete" for row in self.rows)
        ui.worklistSection.text = _("Worklist: {n} studies, {c} complete").format(n=len(self.rows), c=complete)
        self._enable()

    def _row_words(self, row: Row) -> List[str]:
        reviewed = {"complete": _("complete"), "not_started": "—"}.get(row.state, f"{row.reviewed}/{row.scheduled}")
        probability = "" if row.probability is None else f"{row.probability:.2f}"
        model = _("model {version}").format(version=row.model) if row.model else ""
        other = row.held_by if row.held_by != self.client.reader else ""
        note = row.reason if not row.usable else _("read by {who}").format(who=other) if other else model
        return [row.study, reviewed, row.label, probability, note]

    def _selected_study(self) -> str:
        index = self.ui.worklistTable.currentRow()
        return self._shown[index].study if 0 <= index < len(self._shown) else ""

    # --- opening a study

    def open_selected(self) -> None:
        if self._selected_study():
            self.open_study(self._selected_study())

    def next_study(self) -> None:
        client, strategy = self.client, self.ui.strategyBox.currentText.replace(" ", "_")
        self.runner.drop("study")
        text = _("Asking for the next study")
        self.runner.submit("study", text, lambda job: client.next_study(strategy), self._next, self._say)

    def _next(self, study: str) -> None:
        if study:
            self.open_study(study)
        else:
            self._say(_("The server has no further study for you."))

    def open_study(self, study: str) -> None:
        """Hold the study, then load it. What is open now is kept and sent."""
        if self.session is not None and self.session.study == study:
            self._say_saved(_("{study} is open; nothing else comes before it.").format(study=study))
            return
        if self.session is not None and self.session.unsent:
            self.save()
        client = self.client
        self.runner.drop("study")
        load = functools.partial(self._load, study)
        text = _("Opening {study}").format(study=study)
        held = functools.partial(self._held, load)
        self.runner.submit("study", text, lambda job: client.lease(study), lambda answer: load(), held)

    def _held(self, load: Callable[[], None], error: Exception) -> None:
        if not isinstance(error, ServerError) or error.status != 409:
            self._say(error)
        elif self.ask(_("{sentence}\nOpen it all the same?").format(sentence=error), ["Open", "Cancel"]) == "Open":
            load()

    def _load(self, study: str) -> None:
        client, cache, drafts, address = self.client, self.cache, self.drafts, self.server.address

        def work(job: Job):
            known = client.study(study)
            _trim(cache, CACHED_STUDIES)
            path = client.download_image(study, known.sha256, cache, job.report)
            job.report(_("Reading {study}").format(study=study))
            image = images.read_image(path).canonical()
            if known.size and image.voxels.shape != known.size:
                raise images.ImageError(f"The image of {study} is not the one that the server describes.")
            masks = _server_masks(client, study, known.tag, known.annotation, cache, job)
            return known, image, masks, drafts.read(address, study)

        text = _("Loading {study}").format(study=study)
        self.runner.submit("study", text, work, lambda loaded: self._loaded(*loaded), self._say)

    def _loaded(self, study: Study, image: images.Image, masks: review.Masks, draft: Optional[review.Draft]) -> None:
        self.close_study()
        session = review.ReviewSession(self.server.address, study, image, self.client.reader)
        session.adopt(study.annotation, masks, study.revision)
        if draft is not None and draft.image.get("sha256") == study.sha256:
            self._offer(session, study, masks, draft)
        self.session = session
        self.nodes = scene.StudyScene(slicer.mrmlScene, image, session.study, self.editor_node)
        self.nodes.paint(session.masks)
        self._show_views()
        segmentation = self.nodes.segmentation.GetSegmentation()
        self._observe(segmentation, slicer.vtkSegmentation.SourceRepresentationModified, self._painted)
        self.ui.worklistSection.collapsed = True
        for section in (self.ui.studySection, self.ui.annotateSection, self.ui.detectSection):
            section.collapsed = False
        self.ui.clotButton.checked = False
        self.set_clot_range()
        self._show_detection(study.detection, None)
        self._show_review()
        first = session.next_open(-1)
        self.jump(len(image.voxels) // 2 if first is None else first)
        self._slice_moved()
        self._blocked.discard(session.study)
        if session.unsent:
            self._keep()

    def _offer(self, session: review.ReviewSession, study: Study, masks: review.Masks, draft: review.Draft) -> None:
        """Work of an earlier day that the server does not have: the reader decides what becomes of it."""
        if not draft.unsent:
            session.decisions, session.model = dict(draft.decisions), draft.model
            return
        found = _("Work on {study} of {time} has not reached the server ({n} slices reviewed).").format(
            study=draft.study, time=draft.time.replace("T", " ").rstrip("Z"), n=len(draft.marks)
        )
        if draft.based_on == study.revision:
            if self.ask(found, ["Restore it", "Set it aside"]) == "Restore it":
                session.restore(draft)
                return
        else:
            found += "\n" + _("Meanwhile another version was saved there.")
            if self.ask(found, ["Combine both", "Use the server's version"]) == "Combine both":
                session.restore(draft)
                session.merge(study.annotation, masks, study.revision)
                return
        self.drafts.set_aside(draft)

    def close_study(self) -> None:
        """Put the open study away and let others have it."""
        self.runner.drop("detect")
        self.runner.drop("propose")
        if self.session is None:
            return
        client, study = self.client, self.session.study
        self.runner.submit("release", _("Closing"), lambda job: client.release(study))
        if self.nodes is not None:
            self._unobserve(self.nodes.segmentation.GetSegmentation())
            self.nodes.close()
        self.session = self.nodes = self.detection = self.attention = None
        self._painted_at = None
        self._show_review()
        self._enable()

    def _show_views(self) -> None:
        """A large axial view, once; afterwards the reader's own layout is left alone."""
        manager = slicer.app.layoutManager()
        if not self._laid_out:
            manager.setLayout(slicer.vtkMRMLLayoutNode.SlicerLayoutOneUpRedSliceView)
            self._laid_out = True
        names = list(manager.sliceViewNames())
        self.nodes.show([manager.sliceWidget(name).mrmlSliceNode() for name in names])
        for name in names:
            manager.sliceWidget(name).sliceLogic().FitSliceToAll()

    def _renew_lease(self) -> None:
        if self.session is not None:
            client, study = self.client, self.session.study
            self.runner.submit("release", _("Holding"), lambda job: client.lease(study))

    # --- slices

    def jump(self, k: int) -> None:
        if self.nodes is not None:
            self.nodes.jump(self._red_node(), k)

    def step(self, direction: int) -> None:
        if self.session is None:
            return
        self._sync_paint()
        k = self.session.step(self._current(), direction)
        if k is None:
            end = _("last") if direction > 0 else _("first")
            self._say(_("This is the {end} slice of the list.").format(end=end))
        else:
            self.jump(k)

    def mark(self, state: str) -> None:
        """Say "none" or "uncertain" of this slice and go on to the next open one."""
        if self.session is None:
            return
        self._sync_paint()
        k = self._current()
        question = _("Remove it and mark the slice as {state}?").format(state=STATE_WORDS[state])
        if k in self.session.masks and not self._may_remove(k, question):
            return
        self.session.mark(k, state)
        self._repaint(k)
        following = self.session.next_open(k)
        if following is not None:
            self.jump(following)
        else:
            self._say(_("All slices of the schedule are reviewed. Submit with Ctrl+Enter."))

    def undo(self) -> None:
        k = self.session.undo()
        if k is not None:
            self._repaint(k)
            self.jump(k)

    def clear_slice(self) -> None:
        """Take back what was said of this slice; with paint on it, ask."""
        self._sync_paint()
        k = self._current()
        if k not in self.session.masks or self._may_remove(k, _("Remove it?")):
            self.session.clear(k)
            self._repaint(k)

    def _may_remove(self, k: int, question: str) -> bool:
        """Paint goes only when the reader says so."""
        text = _("Slice {n} has paint.").format(n=k + 1) + " " + question
        return self.ask(text, ["Remove the paint", "Keep the paint"]) == "Remove the paint"

    def add_slice(self) -> None:
        """Review a slice that is not on the list."""
        self.session.add(self._current())
        self._show_review()
        self._slice_moved()

    def set_window(self, name: str) -> None:
        self.nodes.set_window(name)

    def set_clot_range(self) -> None:
        self.nodes.set_clot_range(self.ui.clotButton.checked, *review.CLOT_HU)

    def _go_to_line(self, row: int) -> None:
        if self.session is not None:
            self.jump(self.session.lines()[row].slice_index)

    def _current(self) -> int:
        return self.nodes.current_slice(self._red_node())

    def _slice_moved(self, *_event) -> None:
        """The view shows another slice: paint may go there if it is on the list."""
        if self.nodes is None:
            return
        k = self._current()
        self.nodes.guard(k if self.session.is_listed(k) else None)
        self.strip.show_current(k)
        self.curve.show_current(k)
        self._k = k
        self._show_slice()

    def _painted(self, *_event) -> None:
        self._painted_at = time.monotonic()

    def _sync_paint(self) -> None:
        """Bring what was painted into the session; a slice with paint is "embolism" by itself."""
        if self._painted_at is None or self.nodes is None:
            return
        self._painted_at = None
        if self.session.set_masks(self.nodes.masks()):
            self._changed()
        k = self._current()
        self.nodes.guard(k if self.session.is_listed(k) else None)

    def _repaint(self, k: int) -> None:
        """Bring a decision of the session to the scene."""
        self.nodes.paint_slice(k, self.session.masks.get(k))
        self._painted_at = None
        self._changed()

    def _changed(self) -> None:
        self._keep()
        self._show_review()

    # --- proposals

    def propose(self) -> None:
        """Outlines between painted slices, as a segment of their own."""
        self._sync_paint()
        masks = dict(self.session.masks)
        reviewed = [line.slice_index for line in self.session.lines() if line.state]
        text = _("Outlining between slices")
        self.runner.submit("propose", text, lambda job: review.fill_between(masks, reviewed), self._proposed, self._say)

    def _proposed(self, masks: review.Masks) -> None:
        self.nodes.show_proposal(masks)
        if masks:
            self._say(_("A proposal is outlined on {n} slices; look at each and take it or not.").format(n=len(masks)))
        else:
            self._say(_("There are no two neighbouring painted slices to go by."))
        self._enable()

    def take_proposal(self) -> None:
        """Make this slice's proposal the reader's own paint."""
        k, proposal = self._current(), self.nodes.proposal()
        if k in proposal:
            self._sync_paint()
            self.session.paint(k, proposal.pop(k))
            self._repaint(k)
            self.nodes.show_proposal(proposal)
            self._slice_moved()

    def discard_proposal(self) -> None:
        self.nodes.show_proposal({})
        self._enable()

    # --- saving

    def label_study(self, label: str) -> None:
        """With one click, with or without slices."""
        self.session.set_label(label)
        self._changed()
        self.save()

    def _keep(self) -> None:
        """Write the draft at every change, so that a crash of Slicer takes nothing."""
        self._write(self.session.snapshot())

    def _write(self, draft: review.Draft) -> None:
        drafts = self.drafts
        self.runner.submit("autosave", _("Keeping a draft"), lambda job: drafts.write(draft), None, self._say)

    def save(self) -> None:
        """Send what there is."""
        self._sync_paint()
        if self.session.unsent:
            self._send(self.session.queue())
        else:
            self._say_saved(_("Everything is on the server."))

    def submit(self) -> None:
        """Send as complete; whether it is complete, the server says."""
        if self.session is None:
            return
        self._sync_paint()
        if self.session.unsent:
            self._send(self.session.queue(), submitted=True)
        else:
            self._submitted(self.session.open_slices)

    def _send(self, draft: review.Draft, submitted: bool = False) -> None:
        if draft.study in self._sending:
            self._again.add(draft.study)
            return
        self._sending.add(draft.study)
        self._write(draft)
        client, folder = self.client, self.cache / "outgoing"
        self._say_saved(_("Sending …"))
        self.runner.submit(
            "upload",
            _("Saving {study}").format(study=draft.study),
            lambda job: review.send(client, draft, folder, job.report),
            functools.partial(self._sent, draft, submitted),
            functools.partial(self._not_sent, draft, submitted),
        )

    def _sent(self, draft: review.Draft, submitted: bool, saved: Optional[Saved]) -> None:
        self._sending.discard(draft.study)
        if not self._is_open(draft):
            self._write(draft.acknowledged(saved))
            self.refresh()
            return
        self.session.acknowledge(draft, saved)
        self._keep()
        if draft.study in self._again or (submitted and self.session.unsent):
            self._again.discard(draft.study)
            self.save()
        elif submitted:
            self._submitted(saved.open_slices if saved else self.session.open_slices)
        else:
            tag = f" ({saved.tag})" if saved else ""
            self._say_saved(_("Saved on the server{tag} at {time}.").format(tag=tag, time=time.strftime("%H:%M")))
        self.refresh()

    def _submitted(self, still_open: Sequence[int]) -> None:
        if still_open:
            self._say_saved(
                _("Saved as a draft: {n} slices of the schedule are open, the first is slice {k}.").format(
                    n=len(still_open), k=still_open[0] + 1
                )
            )
            self.jump(still_open[0])
        else:
            now = time.strftime("%H:%M")
            self._say_saved(_("Submitted as complete at {time}. Next study opens another.").format(time=now))

    def _not_sent(self, draft: review.Draft, submitted: bool, error: Exception) -> None:
        self._sending.discard(draft.study)
        self._again.discard(draft.study)
        if isinstance(error, Conflict):
            self._conflict(draft, submitted, error)
            return
        if isinstance(error, ServerError) and not error.worth_retrying:
            self._blocked.add(draft.study)
        what = _("Sending was cancelled") if isinstance(error, Cancelled) else str(error).rstrip(".")
        self._due["retry"] = time.monotonic()
        self._say_saved(_("{what}. Your work is kept on this computer and will be sent again.").format(what=what))

    def _conflict(self, draft: review.Draft, submitted: bool, error: Conflict) -> None:
        """Another version is on the server: ours that was thought lost, or another reader's."""
        theirs = (error.annotation or {}).get("slices") or []
        ours = draft.annotation()["slices"]
        if all(entry in ours for entry in theirs):
            if self._is_open(draft):
                self.session.revision = error.revision
            self._send(dataclasses.replace(draft, based_on=error.revision), submitted)
        elif self._is_open(draft):
            self._compare(submitted)
        else:
            self._blocked.add(draft.study)
            self._say(_("Another version of {study} was saved; open it to decide.").format(study=draft.study))

    def _compare(self, submitted: bool) -> None:
        """Load the server's version and ask."""
        client, study, cache = self.client, self.session.study, self.cache

        def work(job: Job):
            known = client.study(study)
            return known, _server_masks(client, study, known.tag, known.annotation, cache, job)

        text = _("Loading the other version")
        self.runner.submit("study", text, work, lambda found: self._decide(submitted, *found), self._say)

    def _decide(self, submitted: bool, known: Study, masks: review.Masks) -> None:
        self._sync_paint()
        readers = sorted({str(s.get("reader") or "?") for s in (known.annotation or {}).get("slices") or ()})
        text = _("Another version of this study was saved meanwhile ({n} slices by {who}). Slices that both reviewed "
                 "stay yours if you combine them; the server keeps every version.")  # fmt: skip
        n = len((known.annotation or {}).get("slices") or ())
        choices = ["Combine both", "Use the server's version", "Decide later"]
        choice = self.ask(text.format(n=n, who=", ".join(readers)), choices)
        if choice == choices[2]:
            self._blocked.add(known.row.study)
            self._say_saved(_("Not sent: another version is on the server. Your work is kept on this computer."))
            return
        if choice == choices[0]:
            self.session.merge(known.annotation, masks, known.revision)
        else:
            self.drafts.set_aside(self.session.snapshot())
            self.session.adopt(known.annotation, masks, known.revision)
        self.nodes.paint(self.session.masks)
        self._painted_at = None
        self._changed()
        if self.session.unsent:
            self._send(self.session.queue(), submitted)

    def _retry(self) -> None:
        """Send what could not be sent, of this and earlier days."""
        drafts, address = self.drafts, self.server.address
        self.runner.submit("refresh", _("Looking for unsent work"), lambda job: drafts.pending(address), self._resend)

    def _resend(self, pending: Sequence[review.Draft]) -> None:
        for draft in pending:
            if draft.study in self._blocked or draft.study in self._sending:
                continue
            if not self._is_open(draft):
                self._send(draft)
            elif self.session.queued:
                self.save()

    def _is_open(self, draft: review.Draft) -> bool:
        return self.session is not None and self.session.study == draft.study and self.session.server == draft.server

    # --- detection

    def detect(self) -> None:
        client, study, cache = self.client, self.session.study, self.cache
        self.runner.drop("detect")

        def work(job: Job):
            detection, path = client.detect(study, cache / "attention", job.report)
            attention = None
            if path is not None:
                attention = images.read_image(path)
                path.unlink()
            return detection, attention

        self.runner.submit("detect", _("Detecting"), work, lambda found: self._detected(*found), self._not_detected)
        self._enable()

    def _detected(self, detection: Detection, attention: Optional[images.Image]) -> None:
        self._show_detection(detection, attention)
        self.refresh()

    def _not_detected(self, error: Exception) -> None:
        self._say(_("The detection was cancelled.") if isinstance(error, Cancelled) else error)
        self._enable()

    def _show_detection(self, detection: Optional[Detection], attention: Optional[images.Image]) -> None:
        ui = self.ui
        self.detection, self.attention = detection, attention
        ui.overlayButton.checked = False
        if attention is not None and detection is not None and not detection.refused:
            self.nodes.show_attention(attention)
            self.nodes.show_candidates(detection.candidates)
        self.show_overlay()
        ui.probabilityLabel.text = _probability_words(detection)
        ui.modelLabel.text = _("Model: {model}").format(model=self._dated(detection)) if detection else ""
        ui.reasonsLabel.text = "\n".join(f"• {reason}" for reason in detection.reasons) if detection else ""
        ui.modelLabel.visible = detection is not None
        ui.reasonsLabel.visible = bool(detection and detection.reasons)
        self._show_new_model()
        self._show_candidates()
        self._enable()

    def _dated(self, detection: Detection):
        """The model that spoke; its date from the server where it is the one still served."""
        model, served = detection.model, self.server.model
        return served if not model.date and model.sha256 == served.sha256 else model

    def _show_new_model(self) -> None:
        old = self.detection is not None and self.detection.model.sha256 != self.server.model.sha256
        text = _("A new model is served: {model}. Detect again to hear what it says.")
        self.ui.newModelLabel.text = text.format(model=self.server.model) if old else ""
        self.ui.newModelLabel.visible = old

    def _show_candidates(self) -> None:
        candidates = self.detection.candidates if self.detection else ()
        table, chosen = self.ui.candidatesTable, self.ui.candidatesTable.currentRow()
        words = [
            [str(c.rank), str(c.slice_index + 1), f"{c.z_mm:.0f}", f"{c.peak:.2f}",
             "" if c.slab_probability is None else f"{c.slab_probability:.2f}", self._decision(c)]
            for c in candidates
        ]  # fmt: skip
        _fill(table, words, right=(0, 1, 2, 3, 4))
        if 0 <= chosen < len(words):
            table.selectRow(chosen)
        self.curve.show_evidence(self.detection.evidence if self.detection else (), candidates, self._decision)

    def _decision(self, candidate: Candidate) -> str:
        return self.session.decision(candidate, self.detection.model.sha256) if self.session else ""

    def _candidate(self) -> Optional[Candidate]:
        index = self.ui.candidatesTable.currentRow()
        candidates = self.detection.candidates if self.detection else ()
        return candidates[index] if 0 <= index < len(candidates) else None

    def _go_to_candidate(self) -> None:
        if self._candidate() is not None:
            self.jump(self._candidate().slice_index)
        self._enable()

    def accept(self) -> None:
        """Begin a region on the candidate's slice, added to what is painted there; the reader corrects it."""
        candidate = self._candidate()
        if candidate is None or self.attention is None:
            return
        self._sync_paint()
        self.jump(candidate.slice_index)
        k = self._current()
        hu = self.nodes.hounsfield(k) if self.ui.clotButton.checked else None
        region = review.candidate_region(candidate, self.attention, self.session.shape, self.session.affine, hu)
        painted = self.session.masks.get(k)
        self.session.decide(candidate, "accepted", self.detection.model.sha256)
        self.session.paint(k, region if painted is None else region | painted)
        self._repaint(k)
        self._slice_moved()
        self._show_candidates()
        self._say(_("Correct the region on slice {n}, then go on with N.").format(n=k + 1))

    def reject(self) -> None:
        candidate = self._candidate()
        if candidate is not None:
            self.session.decide(candidate, "rejected", self.detection.model.sha256)
            self._keep()
            self._show_candidates()

    def toggle_overlay(self) -> None:
        if self.ui.overlayButton.enabled:
            self.ui.overlayButton.checked = not self.ui.overlayButton.checked
            self.show_overlay()

    def show_overlay(self) -> None:
        if self.nodes is not None:
            ui = self.ui
            self.nodes.set_overlay(ui.overlayButton.checked, ui.opacitySlider.value, ui.thresholdSlider.value)

    # --- training

    def train(self) -> None:
        client, stage = self.client, self.ui.stageBox.currentText
        text = _("Starting the training")
        self.runner.submit(
            "train", text, lambda job: client.start_training(stage), lambda answer: self._training_asked(), self._say
        )

    def stop_training(self) -> None:
        client = self.client
        text = _("Stopping the training")
        self.runner.submit(
            "train", text, lambda job: client.stop_training(), lambda answer: self._training_asked(), self._say
        )

    def _training_asked(self) -> None:
        self._due["training"] = 0.0
        self._training = True

    def _watch_training(self) -> None:
        """Ask while a training runs or the section is open; learn of a new model on the way."""
        if (self._training or not self.ui.trainSection.collapsed) and not self.runner.jobs("training"):
            client = self.client
            self.runner.submit(
                "training",
                _("Training"),
                lambda job: (client.training(), client.connect()),
                lambda found: self._show_training(*found),
            )

    def _show_training(self, status: dict, server: Server) -> None:
        self._training = bool(status.get("running"))
        self.server = server
        stages = [status.get(stage) for stage in ("encoder", "classifier")]
        known = [stage for stage in stages if isinstance(stage, dict)]
        latest = known[-1] if known else {}
        history = latest.get("history") or []
        text = _("Running") if self._training else _("Not running")
        if latest:
            text += _(": {task}, epoch {epoch} of {epochs}. {text}").format(
                task=latest.get("task", ""), epoch=latest.get("epoch", len(history)),
                epochs=latest.get("epochs", "?"), text=latest.get("text", ""),
            )  # fmt: skip
        self.ui.trainingLabel.text = text
        self.curves.show_history(history)
        self._show_new_model()
        self._enable()

    # --- what is shown

    def _show_review(self) -> None:
        """List, strip and texts after any change."""
        session, ui = self.session, self.ui
        lines = session.lines() if session else []
        words = [
            [str(line.slice_index + 1), f"{line.z_mm:.0f}", STATE_WORDS[line.state], WHY_WORDS.get(line.why, line.why)]
            for line in lines
        ]
        colours = [plots.STATE_COLOURS[line.state] if line.state else None for line in lines]
        _fill(ui.scheduleTable, words, right=(0, 1), colours=(2, colours))
        slices = session.shape[0] if session else 0
        self.strip.show_slices(slices, lines)
        self.curve.show_slices(slices, lines)
        self._k = self._current() if self.nodes else -1
        if session:
            done, total = session.progress
            ui.studyLabel.text = session.study
            ui.annotateSection.text = _("Annotate: {done} of {total} slices reviewed").format(done=done, total=total)
            for button, label in self._label_buttons():
                button.checked = session.label == label
            if session.unsent:
                self._say_saved(_("Changes are kept on this computer, not yet on the server."))
        else:
            ui.studyLabel.text = _("No study open.")
            ui.savedLabel.text = ""
        self._show_slice()
        self._enable()

    def _show_slice(self) -> None:
        if self.session is None:
            self.ui.sliceLabel.text = ""
            return
        lines, k = self.session.lines(), self._k
        index = next((i for i, line in enumerate(lines) if line.slice_index == k), None)
        if index is None:
            state = _("not on the list")
            self.ui.scheduleTable.clearSelection()
        else:
            state = STATE_WORDS[lines[index].state] if lines[index].state else _("not reviewed")
            self.ui.scheduleTable.selectRow(index)
        z = self.session.z_mm(k)
        self.ui.sliceLabel.text = _("Slice {n} of {of}, z {z:.1f} mm: {state}").format(
            n=k + 1, of=self.session.shape[0], z=z, state=state
        )
        self.ui.addButton.enabled = index is None
        self.ui.takeButton.enabled = bool(self.nodes) and k in self.nodes.proposal()

    def _say_saved(self, text: str) -> None:
        self.ui.savedLabel.text = text

    def _say(self, what) -> None:
        """A sentence in the status bar; an error also where it stays to be read."""
        if isinstance(what, Cancelled):
            return
        slicer.util.showStatusMessage(str(what), 6000)
        if isinstance(what, Exception):
            self.ui.serverLabel.text = str(what)
            self.ui.serverSection.collapsed = False
        self._enable()

    def _label_buttons(self) -> list:
        ui = self.ui
        return [(ui.positiveButton, "positive"), (ui.negativeButton, "negative"), (ui.uncertainButton, "uncertain")]

    def _enable(self) -> None:
        """Controls work when there is something to work on."""
        ui, connected, is_open = self.ui, self.server is not None, self.session is not None
        for section in (ui.worklistSection, ui.studySection, ui.annotateSection, ui.detectSection, ui.trainSection):
            section.enabled = connected and (is_open or section in (ui.worklistSection, ui.trainSection))
        ui.openButton.enabled = connected and bool(self._selected_study())
        ui.nextButton.enabled = connected and ui.strategyBox.count > 0
        ui.detectButton.enabled = is_open and not self.runner.jobs("detect")
        ui.overlayButton.enabled = ui.opacitySlider.enabled = ui.thresholdSlider.enabled = self.attention is not None
        chosen = is_open and self._candidate() is not None
        ui.acceptButton.enabled = chosen and self.attention is not None
        begin = _("Begin a region from the attention here, and correct it")
        ui.acceptButton.toolTip = begin if self.attention is not None else _("Detect first: the region begins from it")
        ui.rejectButton.enabled = chosen
        ui.discardButton.enabled = self.nodes is not None and bool(self.nodes.proposal())
        ui.stopButton.enabled = self._training
        ui.trainButton.enabled = not self._training

    # --- Slicer

    def _red_node(self):
        return slicer.app.layoutManager().sliceWidget("Red").mrmlSliceNode()

    def _observe(self, node, event, handler: Callable) -> None:
        self._observed.append((node, node.AddObserver(event, handler)))

    def _unobserve(self, node) -> None:
        for held, tag in self._observed:
            if held is node:
                held.RemoveObserver(tag)
        self._observed = [pair for pair in self._observed if pair[0] is not node]


def _probability_words(detection: Optional[Detection]) -> str:
    if detection is None:
        return ""
    if detection.refused or detection.probability is None:
        return _("Not analysed")
    text = _("P(PE) {p:.2f}").format(p=detection.probability)
    if detection.threshold is None:
        return text
    above = detection.probability >= detection.threshold
    words = _("above the threshold {t:.2f}") if above else _("below the threshold {t:.2f}")
    colour = plots.STATE_COLOURS["embolism" if above else "none"]
    return f'<span style="color: {colour}">●</span> {text}, {words.format(t=detection.threshold)}'


def _server_masks(client: Client, study: str, tag: str, annotation, cache: Path, job: Job) -> review.Masks:
    """The paint of the server's version."""
    if not annotation or not tag or not any(s.get("state") == review.EMBOLISM for s in annotation.get("slices") or ()):
        return {}
    path = client.download_label(study, tag, cache / "labels", job.report)
    try:
        return review.read_masks(path, annotation)
    finally:
        path.unlink()


def _trim(cache: Path, keep: int) -> None:
    """Keep the CTs used last; patients' images do not pile up."""
    held = [path for path in cache.glob("*") if path.name.endswith(images.SUFFIXES)]
    for path in sorted(held, key=lambda path: path.stat().st_mtime)[: max(len(held) - keep, 0)]:
        path.unlink()


def _fill(table, rows: Sequence[Sequence[str]], right: Sequence[int] = (), colours: tuple = (-1, ())) -> None:
    """Show rows of texts, changing only what differs; ``colours`` is a column and a colour or None for each row."""
    coloured, colour_of = colours
    table.setRowCount(len(rows))
    for r, words in enumerate(rows):
        for c, word in enumerate(words):
            item = table.item(r, c)
            if item is None:
                item = qt.QTableWidgetItem()
                if c in right:
                    item.setTextAlignment(qt.Qt.AlignRight | qt.Qt.AlignVCenter)
                table.setItem(r, c, item)
            if item.text() != word:
                item.setText(word)
                item.setToolTip(word)
                if c == coloured:
                    item.setForeground(qt.QBrush(qt.QColor(colour_of[r])) if colour_of[r] else qt.QBrush())
