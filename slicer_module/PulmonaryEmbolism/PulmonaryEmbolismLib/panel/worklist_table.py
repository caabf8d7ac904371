"""The worklist as a table: Qt sorts and filters it, and a refresh touches only the rows that changed.

Cells are written with ``setData``, so that no item of Python's can be lost to its collector.
"""

from __future__ import annotations

import re
from typing import Any, Callable, Dict, List, Sequence, Tuple

import qt
from slicer.i18n import tr as _

from PulmonaryEmbolismLib.answers import Row
from PulmonaryEmbolismLib.panel import forms

COLUMNS = ("study", "state", "label", "probability", "note")
WIDTHS = (130, 84, 66, 52, 110)
NOTE = 4

_ORDER = {"in_progress": 0, "not_started": 1, "labelled": 2, "complete": 3}


class WorklistTable:
    """A view of the .ui, filled and read by study.

    Args:
        view: the QTableView.
        words: the texts of a row, one for each column.
    """

    def __init__(self, view, words: Callable[[Row], List[str]]) -> None:
        self.view = view
        self.written = 0  # cells, since the start: what a refresh costs
        self._words = words
        self._headings = [_("Study"), _("Reviewed"), _("Label"), _("P(PE)"), _("Note")]
        self._rising, self._falling, self._haystack = (int(qt.Qt.UserRole) + n for n in range(3))
        self._cells: Dict[Tuple[int, int, int], Any] = {}
        self._studies: List[str] = []
        self._model = None
        self._sorted = qt.QSortFilterProxyModel()
        self._sorted.setDynamicSortFilter(False)
        self._sorted.setFilterRole(self._haystack)
        self._sorted.setFilterKeyColumn(0)
        self._sort = ("state", False)
        view.setModel(self._sorted)
        self._new_model(())
        forms.set_up(view, WIDTHS, NOTE)

    def show(self, rows: Sequence[Row]) -> None:
        """All studies; rows that are as before are not touched."""
        if [row.study for row in rows] != self._studies:
            self._new_model(rows)
        else:
            for index, row in enumerate(rows):
                self._write(self._model, index, row)
        self._sort_again()

    def filter(self, text: str, state: str) -> None:
        """Only rows that contain all words and are in a state; "" is every state."""
        words = [*text.lower().split(), *([f"state={state}"] if state else [])]
        self._sorted.setFilterRegularExpression("".join(f"(?=.*{re.escape(word)})" for word in words))

    def sort(self, column: int) -> None:
        """By a column's heading; again, the other way round. Unknown probabilities stay last."""
        if COLUMNS[column] == "note":
            return
        name = COLUMNS[column]
        self._sort = (name, not self._sort[1] if self._sort[0] == name else name == "probability")
        self._sort_again()

    @property
    def selected(self) -> str:
        """The study of the chosen row, "" if none is."""
        index = self.view.currentIndex()
        return str(self._sorted.data(self._sorted.index(index.row(), 0))) if index.isValid() else ""

    def select(self, study: str) -> None:
        """Choose a study's row, if it is shown."""
        if study in self._studies:
            source = self._model.index(self._studies.index(study), 0)
            self.view.setCurrentIndex(self._sorted.mapFromSource(source))

    def texts(self) -> List[List[str]]:
        """What is shown, row by row."""
        rows, columns = self._sorted.rowCount(), range(len(COLUMNS))
        return [[str(self._sorted.data(self._sorted.index(r, c)) or "") for c in columns] for r in range(rows)]

    def _new_model(self, rows: Sequence[Row]) -> None:
        """Another list of studies: filled before anything looks at it."""
        chosen = self.selected
        model = qt.QStandardItemModel(len(rows), len(COLUMNS))
        model.setHorizontalHeaderLabels(self._headings)
        self._cells.clear()
        self._studies = [row.study for row in rows]
        for index, row in enumerate(rows):
            self._write(model, index, row)
        former, self._model = self._model, model
        self._sorted.setSourceModel(model)
        if former is not None:
            former.deleteLater()
        self.select(chosen)

    def _write(self, model, index: int, row: Row) -> None:
        shown, unknown = self._words(row), row.probability is None
        for column, word in enumerate(shown):
            self._set(model, index, column, int(qt.Qt.DisplayRole), word)
        self._set(model, index, 3, int(qt.Qt.TextAlignmentRole), int(qt.Qt.AlignRight | qt.Qt.AlignVCenter))
        self._set(model, index, NOTE, int(qt.Qt.ToolTipRole), shown[NOTE])
        progress = row.reviewed / max(row.scheduled, 1)
        sorting = (row.study.lower(), _ORDER.get(row.state, 9) + progress / 2, row.label, row.probability)
        for column, value in enumerate(sorting[:3]):
            self._set(model, index, column, self._rising, value)
        self._set(model, index, 3, self._rising, 2.0 if unknown else float(row.probability))
        self._set(model, index, 3, self._falling, -1.0 if unknown else float(row.probability))
        haystack = f"{' '.join(shown)} {row.held_by} state={row.state}".lower()
        self._set(model, index, 0, self._haystack, haystack)

    def _set(self, model, row: int, column: int, role: int, value: Any) -> None:
        if self._cells.get((row, column, role)) != value:
            self._cells[row, column, role] = value
            self.written += 1
            model.setData(model.index(row, column), value, role)

    def _sort_again(self) -> None:
        name, down = self._sort
        column = COLUMNS.index(name)
        self._sorted.setSortRole(self._falling if down and name == "probability" else self._rising)
        order = qt.Qt.DescendingOrder if down else qt.Qt.AscendingOrder
        self._sorted.sort(column, order)
        header = self.view.horizontalHeader()
        header.setSortIndicatorShown(True)
        header.setSortIndicator(column, order)
