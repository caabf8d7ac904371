"""Worklist: the server's studies, sorted and filtered; which one to open."""

from __future__ import annotations

from typing import Callable, List, Sequence

from slicer.i18n import tr as _

from PulmonaryEmbolismLib.answers import Row, Server
from PulmonaryEmbolismLib.panel.worklist_table import WorklistTable

STATES = ("", "not_started", "in_progress", "complete")


class Worklist:
    def __init__(self, panel) -> None:
        self.panel = panel
        self.ui = ui = panel.ui
        self.rows: Sequence[Row] = ()
        self.table = WorklistTable(ui.worklistTable, self._words)
        panel.on_click(
            [
                (ui.refreshButton, self.refresh),
                (ui.openButton, self.open_selected),
                (ui.nextButton, self.next_study),
                (ui.followingButton, self.next_study),
            ]
        )
        panel.connect(ui.filterEdit, "textChanged(QString)", lambda text: self._filter())
        panel.connect(ui.stateBox, "currentIndexChanged(int)", lambda index: self._filter())
        panel.connect(ui.worklistTable, "activated(QModelIndex)", lambda index: self.open_selected())
        panel.connect(ui.worklistTable, "clicked(QModelIndex)", lambda index: self.enable())
        panel.connect(ui.worklistTable.horizontalHeader(), "sectionClicked(int)", self.table.sort)

    def show_strategies(self, server: Server) -> None:
        self.ui.strategyBox.clear()
        self.ui.strategyBox.addItems([name.replace("_", " ") for name in server.strategies])

    def refresh(self) -> None:
        """Ask for the worklist and for the model that is served, quietly."""
        client, runner = self.panel.client, self.panel.runner
        runner.drop("refresh")
        work: Callable = lambda job: (client.worklist(), client.connect())  # noqa: E731
        runner.submit("refresh", _("Worklist"), work, lambda found: self._refreshed(*found), self.panel.say)

    def open_selected(self) -> None:
        if self.table.selected:
            self.panel.study.open(self.table.selected)

    def next_study(self) -> None:
        client, runner = self.panel.client, self.panel.runner
        if client is None:
            return
        strategy = self.ui.strategyBox.currentText.replace(" ", "_")
        runner.drop("study")
        text = _("Asking for the next study")
        runner.submit("study", text, lambda job: client.next_study(strategy), self._next, self.panel.say)

    def enable(self) -> None:
        connected = self.panel.server is not None
        self.ui.openButton.enabled = connected and bool(self.table.selected)
        self.ui.nextButton.enabled = connected and self.ui.strategyBox.count > 0

    def _refreshed(self, rows: Sequence[Row], server: Server) -> None:
        self.rows = rows
        self.panel.server = server
        self.panel.connection.show_model()
        self.panel.detecting.show_new_model()
        self._show()

    def _next(self, study: str) -> None:
        if study:
            self.panel.study.open(study)
        else:
            self.panel.say(_("The server has no further study for you."))

    def _show(self) -> None:
        self.table.show(self.rows)
        complete = sum(row.state == "complete" for row in self.rows)
        text = _("Worklist: {n} studies, {c} complete").format(n=len(self.rows), c=complete)
        self.ui.worklistSection.text = text
        self.panel.enable()

    def _filter(self) -> None:
        self.table.filter(self.ui.filterEdit.text, STATES[max(self.ui.stateBox.currentIndex, 0)])
        self.enable()

    def _words(self, row: Row) -> List[str]:
        reviewed = {"complete": _("complete"), "not_started": "—"}.get(row.state, f"{row.reviewed}/{row.scheduled}")
        probability = "" if row.probability is None else f"{row.probability:.2f}"
        model = _("model {version}").format(version=row.model) if row.model else ""
        if row.not_clinical and row.probability is not None:
            model = _("not a clinical result: {model} has seen no real embolism").format(model=model)
        other = row.held_by if row.held_by != self.panel.client.reader else ""
        note = row.reason if not row.usable else _("read by {who}").format(who=other) if other else model
        return [row.study, reviewed, row.label, probability, note]
