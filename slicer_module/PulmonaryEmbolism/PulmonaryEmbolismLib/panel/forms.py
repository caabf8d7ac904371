"""What the sections of the panel share: a question, a table of texts."""

from __future__ import annotations

from typing import Sequence

import qt
import slicer
from slicer.i18n import tr as _


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


def set_up(table, widths: Sequence[int], stretch: int) -> None:
    """Narrow rows without numbers, columns of fixed widths (pixels), and one that takes the rest.

    Widths that follow the contents are measured anew at every change of a cell: quadratic work.
    """
    table.verticalHeader().setVisible(False)
    table.verticalHeader().setDefaultSectionSize(20)
    header = table.horizontalHeader()
    for column, width in enumerate(widths):
        header.resizeSection(column, width)
    header.setSectionResizeMode(stretch, qt.QHeaderView.Stretch)


def fill(table, rows: Sequence[Sequence[str]], right: Sequence[int] = (), colours: tuple = (-1, ())) -> None:
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
