"""Training: started, watched and stopped on the server; a new model is noticed on the way."""

from __future__ import annotations

from typing import Callable

from slicer.i18n import tr as _

from PulmonaryEmbolismLib import plots
from PulmonaryEmbolismLib.answers import Server
from PulmonaryEmbolismLib.jobs import Job


class Training:
    def __init__(self, panel) -> None:
        self.panel = panel
        self.ui = ui = panel.ui
        self.curves = plots.TrainingCurves()
        self._running = False
        ui.trainingFrame.layout().addWidget(self.curves)
        panel.on_click([(ui.trainButton, self.start), (ui.stopButton, self.stop)])

    def start(self) -> None:
        client, stage = self.panel.client, self.ui.stageBox.currentText
        self._ask(_("Starting the training"), lambda job: client.start_training(stage))

    def stop(self) -> None:
        client = self.panel.client
        self._ask(_("Stopping the training"), lambda job: client.stop_training())

    def watch(self) -> None:
        """Ask while a training runs or the section is open; learn of a new model on the way."""
        client, runner = self.panel.client, self.panel.runner
        if (self._running or not self.ui.trainSection.collapsed) and not runner.jobs("training"):
            work: Callable = lambda job: (client.training(), client.connect())  # noqa: E731
            runner.submit("training", _("Training"), work, lambda found: self._show(*found))

    def enable(self) -> None:
        self.ui.stopButton.enabled = self._running
        self.ui.trainButton.enabled = not self._running

    def _ask(self, text: str, work: Callable[[Job], None]) -> None:
        self.panel.runner.submit("train", text, work, lambda answer: self._asked(), self.panel.say)

    def _asked(self) -> None:
        self.panel.due["training"] = 0.0
        self._running = True

    def _show(self, status: dict, server: Server) -> None:
        self._running = bool(status.get("running"))
        self.panel.server = server
        stages = [status.get(stage) for stage in ("encoder", "classifier")]
        known = [stage for stage in stages if isinstance(stage, dict)]
        running = [stage for stage in known if stage.get("state") == "running"]
        latest = (running or known or [{}])[-1]
        history = latest.get("history") or []
        text = _("Running") if self._running else _("Not running")
        if latest:
            text += _(": {task}, epoch {epoch} of {epochs}. {text}").format(
                task=latest.get("task", ""), epoch=latest.get("epoch", len(history)),
                epochs=latest.get("epochs", "?"), text=latest.get("text", ""),
            )  # fmt: skip
        self.ui.trainingLabel.text = text
        self.curves.show_history(history)
        self.panel.detecting.show_new_model()
        self.panel.enable()
