"""The panel: what its sections share, and its life in Slicer.

Handlers are short and run on the main thread; whatever asks the server or writes a file goes through ``Runner``.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Callable, List, Optional, Sequence

import qt
import slicer

from PulmonaryEmbolismLib import review, scene
from PulmonaryEmbolismLib.answers import Server
from PulmonaryEmbolismLib.client import Client
from PulmonaryEmbolismLib.drafts import NONE, UNCERTAIN, Drafts
from PulmonaryEmbolismLib.jobs import Cancelled, Job, Runner
from PulmonaryEmbolismLib.panel import forms
from PulmonaryEmbolismLib.panel.annotate import Annotate
from PulmonaryEmbolismLib.panel.connection import Connection
from PulmonaryEmbolismLib.panel.detecting import Detecting
from PulmonaryEmbolismLib.panel.saving import Saving
from PulmonaryEmbolismLib.panel.study import OpenStudy
from PulmonaryEmbolismLib.panel.training import Training
from PulmonaryEmbolismLib.panel.worklist import Worklist

POLL_MILLISECONDS = 25
RETRY_SECONDS = 20.0
REFRESH_SECONDS = 60.0
LEASE_SECONDS = 300.0
TRAINING_SECONDS = 2.0

QUIET = ("autosave", "retry", "refresh", "training", "release")
"""Groups of jobs that nobody waits for."""


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
        self.runner = Runner()
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
        self.annotate = Annotate(self)
        self.saving = Saving(self)
        self.detecting = Detecting(self)
        self.training = Training(self)
        for section in self._sections():
            section.collapsed = True
        ui.cancelButton.connect("clicked()", self.cancel)
        self._give_editor_its_node()
        self.enable()
        self.timer = qt.QTimer()
        self.timer.setInterval(POLL_MILLISECONDS)
        self.timer.connect("timeout()", self.tick)
        self.timer.start()

    # --- life of the panel

    def enter(self) -> None:
        """The module is shown: its keys work."""
        if self._shortcuts:
            return
        self.ui.editor.setupViewObservations()
        self.ui.editor.installKeyboardShortcuts()
        annotate = self.annotate
        for key, handler in (
            ("N", functools.partial(annotate.step, 1)),
            ("P", functools.partial(annotate.step, -1)),
            ("E", functools.partial(annotate.mark, NONE)),
            ("U", functools.partial(annotate.mark, UNCERTAIN)),
            ("O", self.detecting.toggle_overlay),
            ("Ctrl+Return", self.saving.submit),
            ("Ctrl+Enter", self.saving.submit),
        ):
            shortcut = qt.QShortcut(qt.QKeySequence(key), slicer.util.mainWindow())
            shortcut.connect("activated()", functools.partial(_unless_typing, handler))
            self._shortcuts.append(shortcut)
        self.observe(self.red_node(), "ModifiedEvent", annotate.slice_moved)
        annotate.slice_moved()

    def exit(self) -> None:
        """The module is left: its keys and its brush do not stay behind."""
        self.annotate.sync_paint()
        self.ui.editor.setActiveEffect(None)
        self.ui.editor.uninstallKeyboardShortcuts()
        self.ui.editor.removeViewObservations()
        self._remove_keys()
        self.unobserve(self.red_node())

    def cleanup(self) -> None:
        """Slicer closes, or the module is reloaded: what is not sent stays in the drafts."""
        self.timer.stop()
        self.annotate.sync_paint()
        if self.session is not None and self.session.unsent:
            self.drafts.write(self.session.snapshot())
        self.study.close()
        self._remove_keys()
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
        self._observed = [pair for pair in self._observed if pair[0] is self.red_node()]
        self.study.close()
        self._give_editor_its_node()

    def tick(self) -> None:
        """A few milliseconds, forty times a second: answers, progress, paint that rested, what is due."""
        self.runner.poll()
        self._show_activity()
        self.annotate.settle()
        if self.nodes is not None:
            self.nodes.select_paint()
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
        self.ui.editor.setMRMLSegmentEditorNode(self.editor_node)

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
        self.study.close()
        for group in ("study", "upload", "retry", "refresh", "train", "training"):
            self.runner.drop(group)
        self.saving.forget()

    def say(self, what) -> None:
        """A sentence in the status bar; an error also where it stays to be read."""
        if isinstance(what, Cancelled):
            return
        slicer.util.showStatusMessage(str(what), 6000)
        if isinstance(what, Exception):
            self.connection.show_error(what)
        self.enable()

    def enable(self) -> None:
        """Controls work when there is something to work on."""
        ui, connected, is_open = self.ui, self.server is not None, self.session is not None
        for section in self._sections():
            section.enabled = connected and (is_open or section in (ui.worklistSection, ui.trainSection))
        for part in (self.worklist, self.annotate, self.detecting, self.training):
            part.enable()

    def red_node(self):
        """The slice node of the axial view."""
        return slicer.app.layoutManager().sliceWidget("Red").mrmlSliceNode()

    def observe(self, node, event, handler: Callable) -> None:
        self._observed.append((node, node.AddObserver(event, handler)))

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
