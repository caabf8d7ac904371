"""What the panel draws itself: the strip of slices, the evidence curve and the training curves.

Strip and curve share their axis, so that they line up: slice 0, at the feet, on the left.
"""

from __future__ import annotations

from typing import Callable, Dict, List, Mapping, Optional, Sequence

import qt

MARGIN = 30
"""Pixels left and right of an axis."""

STATE_COLOURS = {
    "embolism": "#e0483e", "not_outlined": "#e0483e", "none": "#3d9a50", "uncertain": "#e6a117", "": "#9aa3ad"
}  # fmt: skip
_CURRENT = "#2f7de1"
_SERIES = ("#2f7de1", "#e0483e", "#3d9a50", "#e6a117", "#8e5bd0", "#5b6770")


class _Axis(qt.QWidget):
    """A widget over the slices of a study: a click, or a drag, jumps there."""

    def __init__(self, height: int, parent=None) -> None:
        qt.QWidget.__init__(self, parent)
        self.setMinimumHeight(height)
        self.setMaximumHeight(height)
        self.slices = 0
        self.current = 0
        self.lines: List = []
        self.jump: Optional[Callable[[int], None]] = None

    def show_slices(self, slices: int, lines: Sequence) -> None:
        """How many slices there are and which of them are listed (``review.Line``)."""
        self.slices, self.lines = slices, list(lines)
        self.update()

    def show_current(self, k: int) -> None:
        if k != self.current:
            self.current = k
            self.update()

    def place(self, k: float) -> int:
        """Pixel of a slice."""
        return round(MARGIN + (self.width - 2 * MARGIN) * k / max(self.slices - 1, 1))

    def mousePressEvent(self, event) -> None:
        self._go(event)

    def mouseMoveEvent(self, event) -> None:
        self._go(event)

    def _go(self, event) -> None:
        x = event.position().x() if hasattr(event, "position") else event.x()
        k = round((x - MARGIN) / max(self.width - 2 * MARGIN, 1) * (self.slices - 1))
        if self.jump is not None and self.slices:
            self.jump(int(min(max(k, 0), self.slices - 1)))

    def begin(self) -> "qt.QPainter":
        painter = qt.QPainter(self)
        painter.fillRect(0, 0, self.width, self.height, self.palette.color(qt.QPalette.Base))
        return painter

    def ink(self, share: int = 255):
        """The colour of text, or a fainter one."""
        colour = qt.QColor(self.palette.color(qt.QPalette.Text))
        colour.setAlpha(share)
        return colour

    def ends(self, painter, y: int, caption: str) -> None:
        """Which end is which, and what is drawn."""
        painter.setPen(self.ink(170))
        for flag, words in ((qt.Qt.AlignLeft, "feet"), (qt.Qt.AlignHCenter, caption), (qt.Qt.AlignRight, "head")):
            painter.drawText(2, y - 12, self.width - 4, 18, flag, words)


class SliceStrip(_Axis):
    """The slices to review: tall red is embolism (hollow: not outlined), green none, amber uncertain, grey open."""

    def __init__(self, parent=None) -> None:
        _Axis.__init__(self, 54, parent)

    def paintEvent(self, event) -> None:
        painter = self.begin()
        bottom = 34
        painter.setPen(self.ink(70))
        painter.drawLine(MARGIN, bottom, self.width - MARGIN, bottom)
        if self.slices:
            painter.setPen(qt.QColor(_CURRENT))
            x = self.place(self.current)
            painter.fillRect(x - 1, 2, 3, bottom, qt.QColor(_CURRENT))
        for line in self.lines:
            x, colour = self.place(line.slice_index), qt.QColor(STATE_COLOURS[line.state])
            tall = {"embolism": 18, "not_outlined": 18, "uncertain": 13, "none": 9, "": 8}[line.state]
            if line.state not in ("", "not_outlined"):
                painter.fillRect(x - 2, bottom - tall, 5, tall, colour)
            else:
                painter.setPen(colour)
                painter.drawRect(x - 2, bottom - tall, 4, tall)
            if line.why == "suspicious":
                painter.setPen(qt.QColor(STATE_COLOURS["embolism"]))
                painter.drawText(x - 3, bottom - tall - 3, "!")
        self.ends(painter, 48, "click or drag to scroll")
        painter.end()


class EvidenceCurve(_Axis):
    """Probability of each slab from the feet to the head, with candidates, reviewed slices and the current one."""

    def __init__(self, parent=None) -> None:
        _Axis.__init__(self, 134, parent)
        self.evidence: List = []
        self.candidates: List = []
        self.decision: Callable = lambda candidate: ""

    def show_evidence(self, evidence: Sequence, candidates: Sequence, decision: Callable) -> None:
        self.evidence, self.candidates, self.decision = list(evidence), list(candidates), decision
        self.update()

    def level(self, probability: float) -> int:
        """Pixel of a probability."""
        return round(104 - 86 * min(max(probability, 0.0), 1.0))

    def paintEvent(self, event) -> None:
        painter = self.begin()
        for level in (0.0, 0.5, 1.0):
            y = self.level(level)
            painter.setPen(self.ink(45))
            painter.drawLine(MARGIN, y, self.width - MARGIN, y)
            painter.setPen(self.ink(170))
            painter.drawText(4, y + 4, f"{level:.1f}")
        if not self.evidence:
            painter.drawText(MARGIN + 8, self.level(0.5) - 6, "No evidence to show")
        else:
            painter.fillRect(self.place(self.current) - 1, self.level(1.0), 3, 96, qt.QColor(_CURRENT))
            for line in self.lines:
                if line.state:
                    x, colour = self.place(line.slice_index), qt.QColor(STATE_COLOURS[line.state])
                    painter.fillRect(x - 2, self.level(0.0) + 2, 5, 8, colour)
            painter.setRenderHint(qt.QPainter.Antialiasing, True)
            path = qt.QPainterPath()
            for i, slab in enumerate(self.evidence):
                x, y = self.place(slab.slice_index), self.level(slab.probability)
                path.moveTo(x, y) if i == 0 else path.lineTo(x, y)
            painter.setPen(_pen(self.ink(230)))
            painter.drawPath(path)
            painter.setRenderHint(qt.QPainter.Antialiasing, False)
            for candidate in self.candidates:
                decision = self.decision(candidate)
                colour = STATE_COLOURS["embolism"] if decision != "rejected" else STATE_COLOURS[""]
                x, y = self.place(candidate.slice_index), self._height(candidate.slice_index)
                painter.setPen(qt.QColor(colour))
                painter.drawText(x + 4, max(y - 2, 14), str(candidate.rank))
        self.ends(painter, 128, "embolism probability by slab")
        painter.end()

    def _height(self, k: int) -> int:
        """Pixel of the curve at a slice."""
        nearest = min(self.evidence, key=lambda slab: abs(slab.slice_index - k))
        return self.level(nearest.probability)


def _pen(colour):
    """A line that is easy to follow."""
    pen = qt.QPen(colour)
    pen.setWidthF(1.6)
    return pen


class TrainingCurves(qt.QWidget):
    """The metrics of a training by epoch, each scaled to its own range, with its last value in the legend."""

    def __init__(self, parent=None) -> None:
        qt.QWidget.__init__(self, parent)
        self.setMinimumHeight(110)
        self.setMaximumHeight(110)
        self.series: Dict[str, List[tuple]] = {}

    def show_history(self, history: Sequence[Mapping]) -> None:
        """One entry an epoch: ``{"epoch": n, metric: value, ...}``."""
        self.series = {}
        for entry in history:
            for name, value in entry.items():
                if name != "epoch" and isinstance(value, (int, float)) and value == value:
                    self.series.setdefault(name, []).append((entry.get("epoch", 0), value))
        self.update()

    def paintEvent(self, event) -> None:
        painter = qt.QPainter(self)
        painter.fillRect(0, 0, self.width, self.height, self.palette.color(qt.QPalette.Base))
        painter.setRenderHint(qt.QPainter.Antialiasing, True)
        names = sorted(self.series)[: len(_SERIES)]
        left, right = 8, max(self.width - 190, 40)
        last = max((points[-1][0] for points in self.series.values()), default=1) or 1
        for row, name in enumerate(names):
            points, colour = self.series[name], qt.QColor(_SERIES[row])
            values = [value for _, value in points]
            low, high = min(values), max(values)
            path = qt.QPainterPath()
            for i, (epoch, value) in enumerate(points):
                x = left + (right - left) * epoch / last
                y = 100 - 88 * ((value - low) / (high - low) if high > low else 0.5)
                path.moveTo(x, y) if i == 0 else path.lineTo(x, y)
            painter.setPen(_pen(colour))
            painter.drawPath(path)
            painter.drawText(right + 12, 16 + 16 * row, f"{name.replace('_', ' ')}  {values[-1]:.3f}")
        if names:
            painter.setPen(self.palette.color(qt.QPalette.Text))
            painter.drawText(right + 12, 104, f"epoch {last}")
        painter.end()
