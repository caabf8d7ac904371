"""The module's keys: what each does, and under which name. The table in the README is made from here. No Slicer, no Qt.

None of them is taken by Slicer: its views use arrows, B, F, V, R, G, T and brackets, its Segment Editor digits, Q, W,
Z, Y, I, Escape, Space, plus, minus, and A, X and Enter while drawing.
"""

from __future__ import annotations

from typing import NamedTuple, Tuple


class Key(NamedTuple):
    """One action of the panel; ``sequences`` as Qt writes them."""

    action: str
    sequences: Tuple[str, ...]
    words: str


KEYS = (
    Key("next_slice", ("N",), "next slice of the list"),
    Key("previous_slice", ("P",), "previous slice of the list"),
    Key("none", ("E",), "no embolism on this slice, on to the next open one"),
    Key("not_outlined", ("H",), "embolism on this slice, not outlined, on to the next open one"),
    Key("unsure", ("U",), "uncertain, on to the next open slice"),
    Key("grow", ("S",), "paint the connected region in the clot range under the mouse pointer"),
    Key("propose", ("Shift+D",), "propose outlines between painted slices"),
    Key("positive", ("K",), "this study is positive"),
    Key("negative", ("J",), "this study is negative"),
    Key("uncertain", ("L",), "this study is uncertain"),
    Key("submit", ("Ctrl+Return", "Ctrl+Enter"), "submit"),
    Key("next_study", ("Shift+N",), "next study"),
    Key("former_study", ("Shift+B",), "back to the study before"),
    Key("detect", ("D",), "detect"),
    Key("next_candidate", ("C",), "next candidate, centred in all views"),
    Key("previous_candidate", ("Shift+C",), "previous candidate"),
    Key("accept", ("Shift+A",), "accept the candidate"),
    Key("reject", ("Shift+R",), "reject the candidate"),
    Key("overlay", ("O",), "attention overlay on and off"),
    Key("slab", ("M",), "thin slices, 10 mm maximum, 5 mm mean"),
    Key("pe_window", ("Shift+P",), "PE window"),
    Key("lung_window", ("Shift+L",), "lung window"),
    Key("mediastinum_window", ("Shift+M",), "mediastinal window"),
)


def table() -> str:
    """The keys as a table in Markdown."""
    rows = [f"| **{key.sequences[0].replace('Return', 'Enter')}** | {key.words} |" for key in KEYS]
    return "\n".join(["| key | does |", "|---|---|", *rows])
