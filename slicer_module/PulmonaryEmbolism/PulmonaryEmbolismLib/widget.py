"""The panel: what its sections share, and its life in Slicer.

Handlers are short and run on the main thread; whatever asks the server or writes a file goes through ``Runner``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import qt
import slicer
from slicer.i18n import tr as _

from PulmonaryEmbolismLib import review, scene
from PulmonaryEmbolismLib.answers import Server
from PulmonaryEmbolismLib.client import Client
from PulmonaryEmbolismLib.drafts import NONE, NOT_OUTLINED, UNCERTAIN, Drafts
from PulmonaryEmbolismLib.jobs import Cancelled, Job, Runner
from PulmonaryEmbolismLib.keys import KEYS
from PulmonaryEmbolismLib.panel import forms
from PulmonaryEmbolismLib.panel.annotate import Annotate
from PulmonaryEmbolismLib.panel.connection import Connection
from PulmonaryEmbolismLib.panel.detecting import Detecting
from PulmonaryEmbolismLib.panel.painting import Painting
from PulmonaryEmbolismLib.panel.saving import Saving
from PulmonaryEmbolismLib.panel.study import OpenStudy
from PulmonaryEmbolismLib.panel.training import Training
from PulmonaryEmbolismLib.panel.worklist import Worklist
from PulmonaryEmbolismLib.views import Views

POLL_MILLISECONDS = 25
RETRY_SECONDS = 20.0
REFRESH_SECONDS = 60.0
LEASE_SECONDS = 300.0
TRAINING_SECONDS = 2.0

QUIET = ("autosave", "retry", "refresh", "training", "release", "ahead")
"""Groups of jobs that nobody waits for."""

log = logging.getLogger(__name__)


class Panel:
    """What the module shows: the state that its sections share, and the sections, which reach each other through it.

    Args:
        ui: the named widgets of the .ui.
        data: a folder that lasts, for drafts.
        cache: a folder that may be emptied, for CTs and attention volumes.
        question: how the reader is asked; takes a text and choices, returns a choice.
    """

    def __init__(self, ui, data: Path, cache: Path, question: Callable[[str, Sequence[str]], str] = forms.ask) -> None:
        self.ui = ui
        self.cache = cache
        self.ask = question
        self.runner = Runner(self._delivered, self.failed)
        self.views = Views(self.safely)
        self.drafts = Drafts(data / "drafts")
        self.client: Optional[Client] = None
        self.server: Optional[Server] = None
        self.session: Optional[review.ReviewSession] = None
        self.nodes: Optional[scene.StudyScene] = None
        self.due = {"retry": 0.0, "refresh": 0.0, "lease": 0.0, "training": 0.0}
        self._observed: List[tuple] = []
        self._shortcuts: list = []
        self.connection = Connection(self)
        self.worklist = Worklist(self)
        self.study = OpenStudy(self)
        self.painting = Painting(self)
        self.annotate = Annotate(self)
        self.saving = Saving(self)
        self.detecting = Detecting(self)
        self.training = Training(self)
        for section in self._sections():
            section.collapsed = True
        ui.errorLabel.visible = False
        self.on_click([(ui.cancelButton, self.cancel)])
        self._give_editor_its_node()
        self.enable()
        self.timer = qt.QTimer()
        self.timer.setInterval(POLL_MILLISECONDS)
        self.connect(self.timer, "timeout()", self.tick)
        self.timer.start()

    # --- life of the panel

    def enter(self) -> None:
        """The module is shown: its keys work."""
        if self._shortcuts:
            return
        self.ui.editor.setupViewObservations()
        self.ui.editor.installKeyboardShortcuts()
        actions = self._actions()
        for key in KEYS:
            for sequence in key.sequences:
                shortcut = qt.QShortcut(qt.QKeySequence(sequence), slicer.util.mainWindow())
                shortcut.setAutoRepeat(False)  # a key that is held down reads no slices
                self.connect(shortcut, "activated()", functools.partial(_unless_typing, actions[key.action]))
                self._shortcuts.append(shortcut)
        self.observe(self.views.red(), "ModifiedEvent", self.annotate.slice_moved)
        if self.nodes is not None:
            self.views.watch()
        self.annotate.slice_moved()

    def _actions(self) -> Dict[str, Callable[[], None]]:
        """What the keys do, by the names in ``keys``."""
        annotate, painting, saving, detecting = self.annotate, self.painting, self.saving, self.detecting
        partial = functools.partial
        return {
            "next_slice": partial(annotate.step, 1),
            "previous_slice": partial(annotate.step, -1),
            "none": partial(annotate.mark, NONE),
            "not_outlined": partial(annotate.mark, NOT_OUTLINED),
            "unsure": partial(annotate.mark, UNCERTAIN),
            "grow": painting.grow_at_pointer,
            "propose": painting.propose,
            "positive": partial(saving.label, "positive"),
            "negative": partial(saving.label, "negative"),
            "uncertain": partial(saving.label, "uncertain"),
            "submit": saving.submit,
            "next_study": self.worklist.next_study,
            "former_study": self.study.open_former,
            "detect": detecting.detect,
            "next_candidate": partial(detecting.step_candidate, 1),
            "previous_candidate": partial(detecting.step_candidate, -1),
            "accept": detecting.accept,
            "reject": detecting.reject,
            "overlay": detecting.toggle_overlay,
            "slab": painting.next_slab,
            "pe_window": partial(painting.set_window, "PE"),
            "lung_window": partial(painting.set_window, "Lung"),
            "mediastinum_window": partial(painting.set_window, "Mediastinum"),
        }

    def exit(self) -> None:
        """The module is left: its keys and its brush do not stay behind."""
        self.annotate.sync_paint()
        self.ui.editor.setActiveEffect(None)
        self.ui.editor.uninstallKeyboardShortcuts()
        self.ui.editor.removeViewObservations()
        self._remove_keys()
        self.views.unwatch()
        self.unobserve(self.views.red())

    def cleanup(self) -> None:
        """Slicer closes, or the module is reloaded: what is not sent stays in the drafts."""
        self.timer.stop()
        self.annotate.sync_paint()
        if self.session is not None and self.session.unsent:
            self.drafts.write(self.session.snapshot())
        self.worklist.forget_ahead()
        self.study.close()
        self._remove_keys()
        self.views.unwatch()
        for node, tag in self._observed:
            node.RemoveObserver(tag)
        self._observed = []
        self.ui.editor.setMRMLSegmentEditorNode(None)
        slicer.mrmlScene.RemoveNode(self.editor_node)

    def scene_closed(self) -> None:
        """Somebody closed Slicer's scene: the nodes are gone, the review is not."""
        if self.session is not None:
            self.saving.keep()
        self.nodes = None
        self._observed = [pair for pair in self._observed if pair[0] is self.views.red()]
        self.study.close()
        self._give_editor_its_node()

    def tick(self) -> None:
        """A few milliseconds, forty times a second: answers, progress, paint that rested, what is due."""
        self.runner.poll()
        self._show_activity()
        self.annotate.settle()
        if self.server is None:
            return
        now = time.monotonic()
        for name, seconds, act in (
            ("retry", RETRY_SECONDS, self.saving.retry),
            ("refresh", REFRESH_SECONDS, self.worklist.refresh),
            ("lease", LEASE_SECONDS, self.study.renew_lease),
            ("training", TRAINING_SECONDS, self.training.watch),
        ):
            if now >= self.due[name] + seconds:
                self.due[name] = now
                act()

    def _give_editor_its_node(self) -> None:
        self.editor_node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentEditorNode", "PE editor")
        self.editor_node.SetSaveWithScene(False)
        self.ui.editor.setMRMLSegmentEditorNode(self.editor_node)
        self.observe(self.editor_node, "ModifiedEvent", self.painting.editor_changed)

    def _remove_keys(self) -> None:
        for shortcut in self._shortcuts:
            shortcut.setEnabled(False)
            shortcut.setParent(None)
            shortcut.deleteLater()
        self._shortcuts = []

    # --- what the sections share

    def use(self, client: Client, server: Server) -> None:
        """Work with this server from now on."""
        if self.server is not None and self.server.address != server.address:
            self._leave_server()
        self.client, self.server = client, server
        if self.session is not None:
            self.session.reader = client.reader
        self.saving.unblock()
        self.worklist.show_strategies(server)
        self.ui.worklistSection.collapsed = False
        now = time.monotonic()
        self.due.update(refresh=now, lease=now, retry=now - RETRY_SECONDS, training=now - TRAINING_SECONDS)
        self.enable()
        self.worklist.refresh()

    def _leave_server(self) -> None:
        """What it still answers belongs to it alone; what it has not acknowledged waits in the drafts."""
        self.worklist.forget_ahead()
        self.study.close()
        for group in ("study", "upload", "retry", "refresh", "train", "training"):
            self.runner.drop(group)
        self.saving.forget()

    def say(self, what) -> None:
        """A sentence in the status bar; an error also where it stays until something succeeds."""
        if isinstance(what, Cancelled):
            return
        slicer.util.showStatusMessage(str(what), 6000)
        if isinstance(what, Exception):
            self.ui.errorLabel.text = str(what)
            self.ui.errorLabel.visible = True
        self.enable()

    def failed(self, error: Exception) -> None:
        """Something that should not happen: shown, logged with its place, and the controls work again."""
        log.error("The Pulmonary Embolism module failed", exc_info=error)
        text = _("The module failed: {error}. What you reviewed is kept; Slicer's error log has the details.")
        with contextlib.suppress(Exception):  # what failed may be what enables
            self.say(RuntimeError(text.format(error=str(error) or type(error).__name__)))

    def safely(self, handler: Callable) -> Callable:
        """The handler for Qt and VTK, which drop an exception without a word."""

        def safe(*values):
            try:
                return handler(*values)
            except Exception as error:
                self.failed(error)

        return safe

    def connect(self, sender, signal: str, handler: Callable) -> None:
        """A signal to a handler that takes what the signal brings."""
        sender.connect(signal, self.safely(handler))

    def on_click(self, handlers: Iterable[Tuple[object, Callable[[], None]]]) -> None:
        """Buttons and what they do."""
        for button, handler in handlers:
            self.connect(button, "clicked()", handler)

    def _delivered(self, job: Job) -> None:
        """Work that the reader waited for has succeeded: an earlier error is history."""
        if job.group not in QUIET or job.group == "refresh":
            self.ui.errorLabel.visible = False

    def enable(self) -> None:
        """Controls work when there is something to work on."""
        ui, connected, is_open = self.ui, self.server is not None, self.session is not None
        for section in self._sections():
            section.enabled = connected and (is_open or section in (ui.worklistSection, ui.trainSection))
        for part in (self.worklist, self.painting, self.detecting, self.training):
            part.enable()

    def observe(self, node, event, handler: Callable) -> None:
        self._observed.append((node, node.AddObserver(event, self.safely(handler))))

    def unobserve(self, node) -> None:
        for held, tag in self._observed:
            if held is node:
                held.RemoveObserver(tag)
        self._observed = [pair for pair in self._observed if pair[0] is not node]

    def _sections(self) -> tuple:
        ui = self.ui
        return ui.worklistSection, ui.studySection, ui.annotateSection, ui.detectSection, ui.trainSection

    # --- what is waited for

    def cancel(self) -> None:
        """Stop waiting for what the footer shows."""
        job = self._awaited()
        if job is not None:
            self.runner.cancel(job)

    def _show_activity(self) -> None:
        job = self._awaited()
        label, bar = self.ui.activityLabel, self.ui.activityBar
        text = f"{job.text} …" if job else ""
        if label.text != text:
            label.text = text
        self.ui.cancelButton.visible = bar.visible = job is not None
        if job:
            bar.setRange(0, job.total)
            bar.setValue(job.done)

    def _awaited(self) -> Optional[Job]:
        """The newest job that the reader waits for."""
        return next((job for job in reversed(self.runner.jobs()) if job.group not in QUIET), None)


def _unless_typing(handler: Callable[[], None]) -> None:
    """A key works unless somebody is typing."""
    focus = qt.QApplication.focusWidget()
    if not isinstance(focus, (qt.QLineEdit, qt.QTextEdit, qt.QPlainTextEdit, qt.QAbstractSpinBox)):
        handler()
