"""Worklist: the server's studies, sorted and filtered; which one to open."""

from __future__ import annotations

from typing import Callable, List, Sequence

from slicer.i18n import tr as _

from PulmonaryEmbolismLib import review
from PulmonaryEmbolismLib.answers import Row, Server
from PulmonaryEmbolismLib.panel import forms

STATES = ("", "not_started", "in_progress", "complete")
COLUMNS = ("study", "state", "label", "probability")


class Worklist:
    def __init__(self, panel) -> None:
        self.panel = panel
        self.ui = ui = panel.ui
        self.rows: Sequence[Row] = ()
        self._sort = ("state", False)
        self._shown: List[Row] = []
        forms.set_up(ui.worklistTable, 0)
        forms.on_click(
            [
                (ui.refreshButton, self.refresh),
                (ui.openButton, self.open_selected),
                (ui.nextButton, self.next_study),
                (ui.followingButton, self.next_study),
            ]
        )
        ui.filterEdit.connect("textChanged(QString)", lambda text: self._show())
        ui.stateBox.connect("currentIndexChanged(int)", lambda index: self._show())
        ui.worklistTable.connect("cellDoubleClicked(int,int)", lambda row, column: self.open_selected())
        ui.worklistTable.connect("itemSelectionChanged()", panel.enable)
        ui.worklistTable.horizontalHeader().connect("sectionClicked(int)", self.sort)

    def show_strategies(self, server: Server) -> None:
        self.ui.strategyBox.clear()
        self.ui.strategyBox.addItems([name.replace("_", " ") for name in server.strategies])

    def refresh(self) -> None:
        """Ask for the worklist and for the model that is served, quietly."""
        client, runner = self.panel.client, self.panel.runner
        runner.drop("refresh")
        failed = self.panel.connection.show_error
        work: Callable = lambda job: (client.worklist(), client.connect())  # noqa: E731
        runner.submit("refresh", _("Worklist"), work, lambda found: self._refreshed(*found), failed)

    def sort(self, column: int) -> None:
        """By a column's heading; again, the other way round."""
        if column < len(COLUMNS):
            name = COLUMNS[column]
            self._sort = (name, not self._sort[1] if self._sort[0] == name else name == "probability")
            self._show()

    def open_selected(self) -> None:
        if self._selected_study():
            self.panel.study.open(self._selected_study())

    def next_study(self) -> None:
        client, runner = self.panel.client, self.panel.runner
        strategy = self.ui.strategyBox.currentText.replace(" ", "_")
        runner.drop("study")
        text = _("Asking for the next study")
        runner.submit("study", text, lambda job: client.next_study(strategy), self._next, self.panel.say)

    def enable(self) -> None:
        connected = self.panel.server is not None
        self.ui.openButton.enabled = connected and bool(self._selected_study())
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
        ui, chosen = self.ui, self._selected_study()
        state = STATES[max(ui.stateBox.currentIndex, 0)]
        self._shown = review.arrange(self.rows, ui.filterEdit.text, state, *self._sort)
        table = ui.worklistTable
        table.blockSignals(True)
        forms.fill(table, [self._words(row) for row in self._shown], right=(1, 3))
        for index, row in enumerate(self._shown):
            if row.study == chosen:
                table.selectRow(index)
        table.blockSignals(False)
        complete = sum(row.state == "complete" for row in self.rows)
        ui.worklistSection.text = _("Worklist: {n} studies, {c} complete").format(n=len(self.rows), c=complete)
        self.panel.enable()

    def _words(self, row: Row) -> List[str]:
        reviewed = {"complete": _("complete"), "not_started": "—"}.get(row.state, f"{row.reviewed}/{row.scheduled}")
        probability = "" if row.probability is None else f"{row.probability:.2f}"
        model = _("model {version}").format(version=row.model) if row.model else ""
        if row.not_clinical and row.probability is not None:
            model = _("not a clinical result: {model} has seen no real embolism").format(model=model)
        other = row.held_by if row.held_by != self.panel.client.reader else ""
        note = row.reason if not row.usable else _("read by {who}").format(who=other) if other else model
        return [row.study, reviewed, row.label, probability, note]

    def _selected_study(self) -> str:
        index = self.ui.worklistTable.currentRow()
        return self._shown[index].study if 0 <= index < len(self._shown) else ""
