"""Agreement between readers: kappa of study labels and of reviewed slices, overlap of outlines; as numbers and page."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.model.detection import NOTICE
from pe_app.studies import Label

COLUMNS = (
    *("readers", "studies", "of them blind", "same label", "kappa"),
    *("slices", "same state", "kappa", "outlined", "Dice"),
)
"""Of the page and of the command's table."""


@dataclass(frozen=True, eq=False)
class Read:
    """One reader's word on one study.

    Attributes:
        study: its id.
        reader: who.
        label: of the study; "" if this reader gave none.
        annotation: the slices that this reader reviewed; None if there are none.
        blind: whether it was made before the reader was shown any result.
    """

    study: str
    reader: str
    label: Label = ""
    annotation: SparseAnnotation | None = None
    blind: bool = False


@dataclass(frozen=True)
class PairAgreement:
    """How two readers agree on what both have read; None where there is nothing to compare.

    Attributes:
        readers: the two.
        studies: labelled by both.
        blind: of them, labelled blind by both.
        label_agreement: share with the same label.
        label_kappa: Cohen's kappa of the labels; None also where both gave one and the same label to all.
        slices: reviewed by both.
        slice_agreement: share with the same state.
        slice_kappa: Cohen's kappa of the states.
        outlined: slices that both outlined.
        dice: mean over them of ``2 |A and B| / (|A| + |B|)``.
    """

    readers: tuple[str, str]
    studies: int
    blind: int
    label_agreement: float | None
    label_kappa: float | None
    slices: int
    slice_agreement: float | None
    slice_kappa: float | None
    outlined: int
    dice: float | None


def compare_readers(reads: Iterable[Read]) -> tuple[PairAgreement, ...]:
    """Every pair of readers that have a study in common, by name.

    Source: Cohen 1960, Educational and Psychological Measurement 20:37.
    """
    by_reader: dict[str, dict[str, Read]] = {}
    for read in reads:
        by_reader.setdefault(read.reader, {})[read.study] = read
    pairs = itertools.combinations(sorted(by_reader), 2)
    compared = (_compare((one, other), by_reader[one], by_reader[other]) for one, other in pairs)
    return tuple(pair for pair in compared if pair.studies or pair.slices)


def _compare(readers: tuple[str, str], ones: dict[str, Read], others: dict[str, Read]) -> PairAgreement:
    both = [(ones[study], others[study]) for study in sorted(ones.keys() & others.keys())]
    labelled = [(one, other) for one, other in both if one.label and other.label]
    labels = [(one.label, other.label) for one, other in labelled]
    states: list[tuple[str, str]] = []
    overlaps: list[float] = []
    for one, other in both:
        if one.annotation is None or other.annotation is None:
            continue
        theirs = {reviewed.slice_index: reviewed.state for reviewed in other.annotation.slices}
        for reviewed in one.annotation.slices:
            if reviewed.slice_index in theirs:
                states.append((reviewed.state, theirs[reviewed.slice_index]))
        for index in one.annotation.masks.keys() & other.annotation.masks.keys():
            overlaps.append(_dice(one.annotation.masks[index], other.annotation.masks[index]))
    return PairAgreement(
        readers,
        len(labels),
        sum(one.blind and other.blind for one, other in labelled),
        _share(labels),
        _kappa(labels),
        len(states),
        _share(states),
        _kappa(states),
        len(overlaps),
        float(np.mean(overlaps)) if overlaps else None,
    )


def agreement_page(pairs: Sequence[PairAgreement]) -> str:
    """The same as a page of HTML that needs nothing else."""
    rows = "".join(f"<tr>{_cells('td', agreement_cells(pair))}</tr>" for pair in pairs)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Agreement between readers</title>'
        "<style>body{font:15px system-ui,sans-serif;margin:2em}table{border-collapse:collapse}"
        "td,th{padding:.4em .8em;border-bottom:1px solid #ccc;text-align:right}"
        "td:first-child,th:first-child{text-align:left}</style>"
        f"<h1>Agreement between readers</h1><p>{html.escape(NOTICE)}</p>"
        f"<table><tr>{_cells('th', COLUMNS)}</tr>{rows}</table>"
        "<p>Kappa is Cohen's: agreement beyond chance, 1 at best, 0 for chance alone. Slices and outlines are compared "
        "where both readers reviewed or outlined the same slice. Blind: labelled before any result was shown.</p>"
        "</html>\n"
    )


def agreement_cells(pair: PairAgreement) -> tuple[str, ...]:
    """One pair as words, in the order of the page's columns."""
    return (
        " and ".join(pair.readers),
        *(str(pair.studies), str(pair.blind), _word(pair.label_agreement), _word(pair.label_kappa)),
        *(str(pair.slices), _word(pair.slice_agreement), _word(pair.slice_kappa)),
        *(str(pair.outlined), _word(pair.dice)),
    )


def _cells(kind: str, words: Iterable[str]) -> str:
    return "".join(f"<{kind}>{html.escape(word)}</{kind}>" for word in words)


def _word(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _share(pairs: Sequence[tuple[str, str]]) -> float | None:
    return sum(one == other for one, other in pairs) / len(pairs) if pairs else None


def _kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """None where chance alone would make both agree on everything."""
    if len({word for pair in pairs for word in pair}) < 2:
        return None
    return float(cohen_kappa_score([one for one, _ in pairs], [other for _, other in pairs]))


def _dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))
