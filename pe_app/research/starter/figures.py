"""What a detector makes of held-out pairs, each figure beside what luck alone gives: the same asked of the twin.

Large clots are near everything, so a place that the twin without clots names, too, counts for nothing. Intervals are
by patients: the studies of one patient are drawn together (bootstrap).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pe_app.ct.volume import Volume
from pe_app.model.detection import CANDIDATE_THRESHOLD, find_candidates
from pe_app.model.slab_encoder import SlabEncoder

HIT_MM = 12.0
"""A place counts as right within this distance of a clot: about a cell of the map."""

SIZES_ML = {"under 0.3 ml": (0.0, 0.3), "0.3 to 3 ml": (0.3, 3.0), "over 3 ml": (3.0, np.inf)}
SLAB_SIZES_ML = {
    "under 0.3 ml": (0.02, 0.3),
    "0.3 to 1 ml": (0.3, 1.0),
    "1 to 3 ml": (1.0, 3.0),
    "over 3 ml": (3.0, np.inf),
}
"""Clot within a slab."""

SLAB_MM = 12.5
DRAWS = 500

Points = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Clot:
    """A clot of the truth: its volume and some of its voxels in LPS mm, ``(n, 3)``, evenly chosen."""

    ml: float
    points_mm: Points


@dataclass(frozen=True, eq=False)
class Seen:
    """What stage I makes of a study: the logit of every cell ``(slabs, grid, grid)``, and where the cells lie."""

    cells: NDArray[np.float32]
    grid_affine: Points

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """Of the cells."""
        return np.asarray(1 / (1 + np.exp(-self.cells)), np.float32)

    @property
    def candidates_mm(self) -> Points:
        """Where the product has candidates, ``(n, 3)``."""
        cells = self.probabilities
        slabs = cells.max((1, 2))
        maps = cells / slabs[:, None, None]
        grid = Volume(maps, self.grid_affine, "cells")
        found = find_candidates(maps, slabs, grid, [0] * len(slabs), CANDIDATE_THRESHOLD)
        return np.array([one.centre_lps_mm for one in found]).reshape(-1, 3)

    @property
    def peak_mm(self) -> Points:
        """The strongest cell."""
        return self.place_mm(np.unravel_index(int(self.cells.argmax()), self.cells.shape))

    @property
    def z_mm(self) -> Points:
        """Of the slabs."""
        return np.array([self.place_mm((slab, 0, 0))[2] for slab in range(len(self.cells))])

    def place_mm(self, cell: Sequence[np.intp | int]) -> Points:
        """LPS mm of a cell's centre."""
        place: Points = self.grid_affine[:3, :3] @ np.array(cell, float) + self.grid_affine[:3, 3]
        return place

    def shifted(self, by: float) -> Seen:
        """With another offset of all logits."""
        return Seen(self.cells + np.float32(by), self.grid_affine)


@dataclass(frozen=True, eq=False)
class SeenPair:
    """A study with clots, its twin, and the truth."""

    patient: str
    with_clots: Seen
    without: Seen
    clots: tuple[Clot, ...]

    def shifted(self, by: float) -> SeenPair:
        """With another offset of all logits."""
        return SeenPair(self.patient, self.with_clots.shifted(by), self.without.shifted(by), self.clots)


@torch.inference_mode()
def look(encoder: SlabEncoder, pixels: NDArray[np.generic], grid_affine: Points) -> Seen:
    """Stage I on the slabs of a study ``(slabs, 5, crop, crop)``."""
    cells = []
    for start in range(0, len(pixels), 10):
        batch = torch.from_numpy(pixels[start : start + 10].astype(np.float32))
        with torch.autocast("cpu", torch.bfloat16):
            features = encoder(batch.contiguous(memory_format=torch.channels_last)).features
        cells.append(encoder.cell_logits(features.half().float()))
    return Seen(torch.cat(cells).numpy(), grid_affine)


def figures(
    pairs: Sequence[SeenPair], judged: Callable[[Seen], float], threshold: float
) -> dict[str, tuple[float, float, float]]:
    """Every figure with its interval (5th and 95th percentile) by patients.

    Args:
        pairs: held out.
        judged: probability of a study.
        threshold: a study is positive from it on.
    """
    rows = [_row(pair, judged, threshold) for pair in pairs]
    patients = sorted({pair.patient for pair in pairs})
    of_patient = {patient: [row for row, pair in zip(rows, pairs, strict=True) if pair.patient == patient]
                  for patient in patients}  # fmt: skip
    values = _summary(rows)
    rng = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(DRAWS):
        chosen = [row for patient in rng.choice(patients, len(patients)) for row in of_patient[str(patient)]]
        for name, value in _summary(chosen).items():
            drawn[name].append(value)
    intervals = {}
    for name, value in values.items():
        low, high = np.nanpercentile(drawn[name], (5, 95)) if len(patients) > 1 else (np.nan, np.nan)
        intervals[name] = (value, float(low), float(high))
    return intervals


@dataclass(frozen=True, eq=False)
class _Row:
    probabilities: tuple[float, float]
    threshold: float
    pointing: tuple[bool, bool]
    false: int
    found: tuple[tuple[float, bool, bool], ...]
    slabs: tuple[tuple[float, float, float], ...]
    placeless: bool


def _row(pair: SeenPair, judged: Callable[[Seen], float], threshold: float) -> _Row:
    every = np.concatenate([clot.points_mm for clot in pair.clots])
    sides = pair.with_clots, pair.without
    places = [side.candidates_mm for side in sides]
    near = [[_away(near, clot.points_mm) <= HIT_MM for clot in pair.clots] for near in places]
    found = tuple((clot.ml, hit, luck) for clot, hit, luck in zip(pair.clots, near[0], near[1], strict=True))
    peaks = [side.probabilities.max((1, 2)) for side in sides]
    slabs = []
    for slab, z_mm in enumerate(pair.with_clots.z_mm):
        ml = sum(clot.ml * float(np.mean(np.abs(clot.points_mm[:, 2] - z_mm) <= SLAB_MM / 2)) for clot in pair.clots)
        slabs.append((ml, float(peaks[0][slab]), float(peaks[1][slab])))
    first, second = (judged(side) for side in sides)
    pointing = [_away(side.peak_mm[None], every) <= HIT_MM for side in sides]
    placeless = any(p >= threshold and not len(near) for p, near in zip((first, second), places, strict=True))
    return _Row((first, second), threshold, (pointing[0], pointing[1]), len(places[1]), found, tuple(slabs), placeless)


def _summary(rows: Sequence[_Row]) -> dict[str, float]:
    positive, negative = (np.array([row.probabilities[k] for row in rows]) for k in (0, 1))
    threshold = rows[0].threshold
    values = {
        "study AUC": _auc(positive, negative),
        "pairs in order": float(np.mean(positive > negative)),
        "sensitivity": float(np.mean(positive >= threshold)),
        "specificity": float(np.mean(negative < threshold)),
        "pointing": float(np.mean([row.pointing[0] for row in rows])),
        "pointing by luck": float(np.mean([row.pointing[1] for row in rows])),
        "false candidates": float(np.mean([row.false for row in rows])),
        "positive without a place": float(np.mean([row.placeless for row in rows])),
    }
    for name, (low, high) in SIZES_ML.items():
        clots = [clot for row in rows for clot in row.found if low <= clot[0] < high]
        values[f"clots {name}"] = len(clots)
        values[f"found {name}"] = float(np.mean([clot[1] for clot in clots])) if clots else np.nan
        values[f"by luck {name}"] = float(np.mean([clot[2] for clot in clots])) if clots else np.nan
    every = [slab for row in rows for slab in row.slabs]
    clear = np.array([slab[2] for slab in every] + [slab[1] for slab in every if slab[0] == 0])
    for name, (low, high) in SLAB_SIZES_ML.items():
        chosen = np.array([slab for slab in every if low <= slab[0] < high]).reshape(-1, 3)
        values[f"slab AUC, matched pairs at the same level, {name}"] = _auc(chosen[:, 1], chosen[:, 2])
        values[f"slab AUC, all levels, {name}"] = _auc(chosen[:, 1], clear)
    return values


def _away(places: Points, points: Points) -> float:
    """Least distance between two sets of points; infinite where one is empty."""
    return float(np.linalg.norm(places[:, None] - points[None], axis=2).min(initial=np.inf))


def _auc(positive: NDArray[np.generic], negative: NDArray[np.generic]) -> float:
    if not len(positive) or not len(negative):
        return np.nan
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.mean() / 2 / len(ordered))
