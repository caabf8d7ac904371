"""What to read next: the study, and its slices, by which a reader's next minutes teach the model most.

Pure decisions over what is known of each study; nothing is read or stored here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.model.detection import Detection
from pe_app.studies import Label

Strategy = Literal["next_unreviewed", "most_uncertain", "disagreement", "random"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

Why = Literal["schedule", "suspicious"]

Work = Literal["slices", "labels"]
"""What a reader sits down to: reviewing the slices of a schedule, or giving a label to studies that have none."""


@dataclass(frozen=True)
class StudyState:
    """What is known of a study when the next one is chosen.

    Attributes:
        study: its id.
        label: of the study list.
        reviewed: how many slices of its schedule are reviewed.
        scheduled: how many slices its schedule has; 0 while that is unknown.
        embolism: whether a reader marked embolism on any slice.
        probability: stage II's, of the served model; None where it has not seen the study.
        strongest_slab: the largest of stage I's slab probabilities; None likewise.
        held_by: the reader who has it open; "" for nobody.
        usable: whether the method is made for it (``check_study``).
    """

    study: str
    label: Label = ""
    reviewed: int = 0
    scheduled: int = 0
    embolism: bool = False
    probability: float | None = None
    strongest_slab: float | None = None
    held_by: str = ""
    usable: bool = True

    @property
    def complete(self) -> bool:
        """Whether its whole schedule is reviewed; one reviewed slice does not make a study read."""
        return 0 < self.scheduled <= self.reviewed


@dataclass(frozen=True)
class SliceToReview:
    """One slice to look at, and whether the schedule asks for it or the model."""

    slice_index: int
    why: Why


def rank_studies(
    strategy: Strategy,
    states: Sequence[StudyState],
    rng: np.random.Generator,
    reader: str = "",
    threshold: float = 0.5,
    *,
    work: Work = "slices",
) -> tuple[StudyState, ...]:
    """The studies that a reader can go on with, the best next one first.

    Complete and unusable studies are left out, and those that another reader holds. Studies that the model has not
    seen follow those that it has. Ties are broken by study id.

    - ``next_unreviewed``: those begun first, so that they get complete; then by id.
    - ``most_uncertain``: probability nearest the threshold first.
    - ``disagreement``: the largest ``disagreement`` first.
    - ``random``: a permutation drawn from ``rng``, the baseline for the others.

    Args:
        strategy: one of the four.
        states: all studies, in any order.
        rng: drawn from by ``random`` only.
        reader: who asks; the studies that this reader holds stay in.
        threshold: the probability from which a study counts as positive.
        work: for ``labels``, studies that have a label already are left out, too.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; the strategies are {', '.join(STRATEGIES)}")
    pool = [state for state in states if state.usable and not state.complete and state.held_by in ("", reader)]
    if work == "labels":
        pool = [state for state in pool if not state.label]
    pool.sort(key=lambda state: state.study)
    if strategy == "random":
        return tuple(pool[place] for place in rng.permutation(len(pool)))
    if strategy == "next_unreviewed":
        return tuple(sorted(pool, key=lambda state: state.reviewed == 0))
    if strategy == "most_uncertain":
        return tuple(sorted(pool, key=lambda state: _distance(state.probability, threshold)))
    return tuple(sorted(pool, key=lambda state: -disagreement(state)))


def disagreement(state: StudyState) -> float:
    """How far what is known of a study contradicts itself, from 0 to 1; -1 where the model has not seen it.

    The largest of: stage I's strongest slab against stage II's probability, and stage II's probability against what
    is known, 1 where a reader marked embolism, else the label. Slices marked "none" contradict nothing while others
    are not reviewed.
    """
    if state.probability is None:
        return -1.0
    known = {"positive": 1.0, "negative": 0.0}.get("positive" if state.embolism else state.label)
    others = [value for value in (state.strongest_slab, known) if value is not None]
    return max((abs(state.probability - value) for value in others), default=0.0)


def slices_to_review(
    schedule: Sequence[int],
    detection: Detection | None,
    annotation: SparseAnnotation | None,
    extra: int = 3,
) -> tuple[SliceToReview, ...]:
    """The slices of a study still to look at, from the feet to the head.

    All open slices of the schedule, and beyond it the ``extra`` slices of the strongest slabs that nobody reviewed.
    The schedule alone decides whether a study is complete.
    """
    reviewed = {entry.slice_index for entry in annotation.slices} if annotation else set[int]()
    known = reviewed.union(schedule)
    evidence = detection.evidence if detection else ()
    strongest = sorted(evidence, key=lambda slab: (-slab.probability, slab.slice_index))
    offered = dict.fromkeys(slab.slice_index for slab in strongest if slab.slice_index not in known)
    chosen: dict[int, Why] = dict.fromkeys(list(offered)[: max(extra, 0)], "suspicious")
    chosen.update(dict.fromkeys(set(schedule) - reviewed, "schedule"))
    return tuple(SliceToReview(index, chosen[index]) for index in sorted(chosen))


def _distance(probability: float | None, threshold: float) -> float:
    return 2.0 if probability is None else abs(probability - threshold)
