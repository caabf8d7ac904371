"""Worklist: the server's studies, sorted and filtered; which one to open."""

from __future__ import annotations

from typing import Callable, List, Sequence

from slicer.i18n import tr as _

from PulmonaryEmbolismLib.answers import Row, Server
from PulmonaryEmbolismLib.jobs import Job
from PulmonaryEmbolismLib.panel.worklist_table import WorklistTable

STATES = ("", "not_started", "labelled", "in_progress", "complete")
WORK = ("slices", "labels")
"""What the reader sits down to, as the server names it."""


class Worklist:
    def __init__(self, panel) -> None:
        self.panel = panel
        self.ui = ui = panel.ui
        self.rows: Sequence[Row] = ()
        self._ahead = ""
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
        panel.connect(ui.workBox, "currentIndexChanged(int)", lambda index: self._work_changed())
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

    @property
    def work(self) -> str:
        return WORK[max(self.ui.workBox.currentIndex, 0)]

    def next_study(self) -> None:
        client, runner = self.panel.client, self.panel.runner
        if client is None:
            return
        if self._ahead:
            study, self._ahead = self._ahead, ""
            self.panel.study.open(study)
            return
        strategy, work, skip = self._strategy(), self.work, self._unsent()
        runner.drop("study")
        text = _("Asking for the next study")
        ask: Callable = lambda job: client.next_study(strategy, work, skip)  # noqa: E731
        runner.submit("study", text, ask, self._next, self.panel.say)

    def advance(self) -> None:
        """The study is labelled: the next one, which is loaded already if there was time."""
        self.next_study()

    def fetch_ahead(self) -> None:
        """While the reader looks at a study to label, its successor is held and its CT fetched."""
        panel = self.panel
        if self.work != "labels" or self._ahead or panel.runner.jobs("ahead"):
            return
        client, cache, strategy = panel.client, panel.cache, self._strategy()
        skip = [panel.session.study, *self._unsent()]

        def work(job: Job) -> str:
            study = client.next_study(strategy, "labels", skip, ahead=True)
            if study:
                client.download_image(study, client.study(study).sha256, cache, job.report)
            return study

        panel.runner.submit("ahead", _("Fetching the next study"), work, self._fetched)

    def forget_ahead(self) -> None:
        """Nobody will open what was fetched ahead: let others have it."""
        self.panel.runner.drop("ahead")
        if self._ahead and self.panel.client is not None:
            client, study = self.panel.client, self._ahead
            self.panel.runner.submit("release", _("Closing"), lambda job: client.release(study))
        self._ahead = ""

    def _fetched(self, study: str) -> None:
        self._ahead = study

    def _strategy(self) -> str:
        return self.ui.strategyBox.currentText.replace(" ", "_")

    def _unsent(self) -> List[str]:
        """Studies that are labelled here and not yet there: the server would offer them again."""
        session = self.panel.session
        return [*self.panel.saving.under_way, *([session.study] if session is not None and session.label else [])]

    def _work_changed(self) -> None:
        """For labels nothing is outlined: those sections fold away."""
        self.forget_ahead()
        self.panel.study.show_sections()

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
        labelled = sum(bool(row.label) for row in self.rows)
        text = _("Worklist: {n} studies, {m} labelled, {c} complete")
        text = text.format(n=len(self.rows), m=labelled, c=complete)
        self.ui.worklistSection.text = text
        self.panel.enable()

    def _filter(self) -> None:
        self.table.filter(self.ui.filterEdit.text, STATES[max(self.ui.stateBox.currentIndex, 0)])
        self.enable()

    def _words(self, row: Row) -> List[str]:
        words = {"complete": _("complete"), "not_started": "—", "labelled": _("labelled")}
        reviewed = words.get(row.state, f"{row.reviewed}/{row.scheduled}")
        probability = "" if row.probability is None else f"{row.probability:.2f}"
        model = _("model {version}").format(version=row.model) if row.model else ""
        if row.not_clinical and row.probability is not None:
            model = _("not a clinical result: {model} has seen no real embolism").format(model=model)
        other = row.held_by if row.held_by != self.panel.client.reader else ""
        note = row.reason if not row.usable else _("read by {who}").format(who=other) if other else model
        return [row.study, reviewed, row.label, probability, note]
