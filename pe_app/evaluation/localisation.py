"""Does the attention lie on the emboli? Pointing game, energy inside, key slices, FROC, and trivial baselines.

A cell of an attention map is 16 pixels (about 11 mm) wide, so everything but FROC is judged on the map's own grid:
a cell counts as embolism where it holds any piece of the mask. What no reader has reviewed is not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pe_app.ct.volume import Volume

Floats = NDArray[np.float32] | NDArray[np.float64]

FALSE_POSITIVES_PER_STUDY = (0.5, 1.0, 2.0, 4.0)
"""False candidates a study at which FROC is read."""

TOUCHING = 1e-9
"""Overlaps below this share of a cell are rounding."""


@dataclass(frozen=True, eq=False)
class CellTruth:
    """What readers say of the cells of one study's attention maps.

    Attributes:
        embolism: ``(slabs, rows, columns)``, True where the cell holds a piece of the mask.
        judged: ``(slabs,)``, True where a reviewed slice lies in the slab's cell; the others say nothing.
    """

    embolism: NDArray[np.bool_]
    judged: NDArray[np.bool_]

    @property
    def positive_slabs(self) -> NDArray[np.bool_]:
        """``(slabs,)``, True where the slab shows embolism."""
        return np.asarray(self.embolism.any(axis=(1, 2)))


@dataclass(frozen=True, eq=False)
class CandidateOutcome:
    """One study's candidates against its emboli, all that FROC needs.

    Attributes:
        embolus_scores: ``(emboli,)``, the highest score of a candidate that hits it; -inf where none does.
        false_scores: scores of the candidates that hit no embolus.
    """

    embolus_scores: NDArray[np.float64]
    false_scores: NDArray[np.float64]


@dataclass(frozen=True)
class FrocPoint:
    """Share of the emboli found at a number of false candidates a study, with its bootstrap interval."""

    false_per_study: float
    sensitivity: float
    low: float
    high: float


def cell_truth(attention: Volume, mask: Volume, reviewed_slices: Sequence[int] | None = None) -> CellTruth:
    """The mask on the grid of the attention maps: a cell is embolism where mask and cell overlap at all.

    Voxels and cells are boxes; an overlap in all three axes counts, so that no embolus is too small to be seen and a
    slice thicker than a cell fills all the cells that it covers.

    Args:
        attention: on its coarse grid ``(slabs, rows, columns)``.
        mask: on the CT's grid, above 0 where there is embolism.
        reviewed_slices: CT slices that a reader looked at; None where the mask is the truth of all slices.

    Raises:
        ValueError: if the axes of the two grids are not parallel.
    """
    overlaps = [
        _overlap(scale, offset, voxels, cells)
        for (scale, offset), voxels, cells in zip(
            _axis_by_axis(attention, mask), mask.shape, attention.shape, strict=True
        )
    ]
    reviewed = np.ones(mask.shape[0], dtype=bool)
    if reviewed_slices is not None:
        reviewed[:] = False
        reviewed[list(reviewed_slices)] = True
    inside = np.greater(mask.voxels, 0)
    positive_slices = np.flatnonzero(reviewed & inside.any(axis=(1, 2)))
    embolism = np.zeros(attention.shape, dtype=bool)
    for index in positive_slices:
        plane = overlaps[1] @ inside[index].astype(np.float32) @ overlaps[2].T > 0
        embolism[overlaps[0][:, index] > 0] |= plane
    return CellTruth(embolism, np.asarray(overlaps[0] @ reviewed.astype(np.float32) > 0))


def pointing_game(maps: Floats, truth: CellTruth) -> float:
    """Whether the maximum of the study's maps lies in the mask, with a tolerance of half a cell.

    The maximum is a point, the centre of its cell; it lies within half a cell (along every axis) of the mask just
    where its cell holds a piece of the mask. Of several equal maxima, the share that does: a deterministic tie rule
    that gives a flat map what guessing gives. A map without mass points nowhere: 0. Slabs that were not judged do not
    take part.

    Args:
        maps: ``(slabs, rows, columns)``, at least 0, weighted so that slabs can be compared (attention times slab
            probability).
        truth: of the same grid.

    Source: Zhang et al. 2018, Top-Down Neural Attention by Excitation Backprop, section 4.1.
    """
    _check_maps(maps, truth)
    return _hit(maps[truth.judged], truth.embolism[truth.judged])


def pointing_slabs(maps: Floats, truth: CellTruth) -> NDArray[np.float64]:
    """The pointing game slab by slab: ``(positive slabs,)``, from 0 to 1. Weights of the slabs do not matter."""
    _check_maps(maps, truth)
    return np.array([_hit(maps[k], truth.embolism[k]) for k in np.flatnonzero(truth.positive_slabs)])


def energy_inside(maps: Floats, truth: CellTruth) -> NDArray[np.float64]:
    """Share of a positive slab's attention that lies in the mask, ``sum(A M) / sum(A)``: ``(positive slabs,)``.

    0 where the map is empty.

    Source: Wang et al. 2020, Score-CAM, section 4.3 (energy-based pointing game).
    """
    _check_maps(maps, truth)
    chosen = maps[truth.positive_slabs].astype(np.float64)
    inside = (chosen * truth.embolism[truth.positive_slabs]).sum(axis=(1, 2))
    total = chosen.sum(axis=(1, 2))
    return np.asarray(np.divide(inside, total, out=np.zeros_like(total), where=total > 0))


def key_slice_hit(slab_scores: Floats, truth: CellTruth, count: int) -> bool:
    """Whether one of the ``count`` strongest judged slabs lies within one slab of an embolism.

    Args:
        slab_scores: ``(slabs,)``, e.g. the slab probabilities.
        truth: of the same slabs.
        count: how many slabs a reader would look at. Of equal scores, those nearer to the feet come first.
    """
    if slab_scores.shape != truth.judged.shape:
        raise ValueError(f"expected one score for each of {len(truth.judged)} slabs, got {slab_scores.shape}")
    near = ndimage.binary_dilation(truth.positive_slabs, structure=np.ones(3, dtype=bool))
    order = np.argsort(-slab_scores, kind="stable")
    return bool(near[order[truth.judged[order]][:count]].any())


def map_mass(maps: Floats) -> float:
    """Mean of a study's maps; on a negative study the attention that should not be there."""
    return float(maps.mean())


def centred_gaussian(shape: tuple[int, int, int], sigma: float = 0.25) -> NDArray[np.float64]:
    """The baseline that always looks at the middle of the chest: a Gaussian, 1 in the centre.

    Args:
        shape: slabs, rows, columns.
        sigma: standard deviation as a share of each axis.
    """
    axes = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (sigma * n)) ** 2) for n in shape]
    return np.asarray(axes[0][:, None, None] * axes[1][:, None] * axes[2])


def mean_mask(training: Sequence[CellTruth]) -> NDArray[np.float64]:
    """The baseline that looks where emboli of the training studies were: the mean of their cells."""
    if not training:
        raise ValueError("the mean mask of no study is not defined")
    return np.asarray(np.mean([truth.embolism for truth in training], axis=0, dtype=np.float64))


def number_emboli(mask: Volume) -> Volume:
    """Embolus numbers 1 to n for a binary mask: connected regions, neighbours by face, edge or corner."""
    labels, _ = ndimage.label(np.greater(mask.voxels, 0), structure=np.ones((3, 3, 3)))
    return mask.with_voxels(labels)


def match_candidates(
    positions_lps_mm: Floats, scores: Floats, emboli: Volume, distance_mm: float = 0.0
) -> CandidateOutcome:
    """Which emboli a study's candidates hit.

    A candidate hits an embolus where its position lies at most ``distance_mm`` from one of its voxels, taken as boxes:
    at 0 mm it must lie inside. Several candidates on one embolus count once and are not false; a candidate may hit two
    emboli.

    Args:
        positions_lps_mm: ``(candidates, 3)``.
        scores: ``(candidates,)``, e.g. attention peak times slab probability.
        emboli: on the CT's grid, 0 or the number of the embolus (``number_emboli``); all 0 in a negative study.
        distance_mm: 0, 2 or 5 mm, as in the CAD-PE challenge.

    Source: Gonzalez et al. 2020, Computer Aided Detection for Pulmonary Embolism Challenge (CAD-PE), section 3.
    """
    positions = np.asarray(positions_lps_mm, dtype=np.float64).reshape(-1, 3)
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (len(positions),):
        raise ValueError(f"expected one score for each of {len(positions)} candidates, got {values.shape}")
    index = emboli.to_index(positions)
    numbers = [int(n) for n in np.unique(emboli.voxels[np.greater(emboli.voxels, 0)])]
    hits = np.zeros((len(numbers), len(positions)), dtype=bool)
    for row, number in enumerate(numbers):
        voxels = np.argwhere(emboli.voxels == number)
        for column, place in enumerate(index):
            outside = np.maximum(np.abs(place - voxels) - 0.5, 0) * np.sign(place - voxels)
            nearest = np.linalg.norm(outside @ emboli.affine[:3, :3].T, axis=1).min()
            hits[row, column] = nearest <= distance_mm + 1e-6
    best = np.where(hits, values, -np.inf).max(axis=1, initial=-np.inf)
    return CandidateOutcome(best, values[~hits.any(axis=0)])


def froc(
    outcomes: Sequence[CandidateOutcome],
    false_per_study: Sequence[float] = FALSE_POSITIVES_PER_STUDY,
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> tuple[FrocPoint, ...]:
    """Share of all emboli found at stated numbers of false candidates a study, with 95% bootstrap intervals.

    At f false candidates a study the lowest threshold is taken that leaves at most ``f * studies`` of them. Whole
    studies are resampled, because emboli of one patient are alike.

    Args:
        outcomes: one for each study, negatives included.
        false_per_study: where the curve is read.
        seed: of the bootstrap.
        resamples: number of bootstrap samples.

    Returns:
        One point for each of ``false_per_study``; nan where there is no embolus at all.
    """
    studies = len(outcomes)
    if studies == 0:
        raise ValueError("FROC of no study is not defined")
    owner_true = np.repeat(np.arange(studies), [len(o.embolus_scores) for o in outcomes])
    owner_false = np.repeat(np.arange(studies), [len(o.false_scores) for o in outcomes])
    true_scores = np.concatenate([o.embolus_scores for o in outcomes])
    false_scores = np.concatenate([o.false_scores for o in outcomes])
    order = np.argsort(-false_scores, kind="stable")
    owner_false, false_scores = owner_false[order], false_scores[order]

    def sensitivities(weights: NDArray[np.int64]) -> list[float]:
        false_count = np.cumsum(weights[owner_false])
        found = []
        for rate in false_per_study:
            too_many = int(np.searchsorted(false_count, rate * studies, side="right"))
            limit = false_scores[too_many] if too_many < len(false_scores) else -np.inf
            total = weights[owner_true].sum()
            found.append(float((weights[owner_true] * (true_scores > limit)).sum() / total) if total else np.nan)
        return found

    rng = np.random.default_rng(seed)
    measured = sensitivities(np.ones(studies, dtype=np.int64))
    samples = np.array(
        [sensitivities(rng.multinomial(studies, np.full(studies, 1 / studies))) for _ in range(resamples)]
    )
    points = []
    for rate, value, column in zip(false_per_study, measured, samples.T, strict=True):
        known = column[~np.isnan(column)]
        low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
        points.append(FrocPoint(float(rate), value, float(low), float(high)))
    return tuple(points)


def _axis_by_axis(attention: Volume, mask: Volume) -> list[tuple[float, float]]:
    """(scale, offset) of each axis: cell index = scale * voxel index + offset."""
    matrix = np.linalg.inv(attention.affine) @ mask.affine
    scales = np.diag(matrix)[:3]
    drift = np.abs(matrix[:3, :3] - np.diag(scales)) * mask.shape
    if drift.max() > 0.05:
        raise ValueError(f"{attention.name}: its axes are not parallel to those of {mask.name}")
    return [(float(scale), float(offset)) for scale, offset in zip(scales, matrix[:3, 3], strict=True)]


def _overlap(scale: float, offset: float, voxels: int, cells: int) -> NDArray[np.float32]:
    """``(cells, voxels)``: the share of each cell's length that each voxel covers, along one axis."""
    centre = scale * np.arange(voxels) + offset
    cell = np.arange(cells)[:, None]
    length = np.minimum(centre + scale / 2, cell + 0.5) - np.maximum(centre - scale / 2, cell - 0.5)
    return np.where(length > TOUCHING, length, 0).astype(np.float32)


def _hit(maps: Floats, embolism: NDArray[np.bool_]) -> float:
    """Share of the cells that hold the maximum which are embolism; 0 for an empty map."""
    peak = maps.max(initial=0.0)
    return float(embolism[maps == peak].mean()) if peak > 0 else 0.0


def _check_maps(maps: Floats, truth: CellTruth) -> None:
    if maps.shape != truth.embolism.shape:
        raise ValueError(f"expected maps of shape {truth.embolism.shape}, got {maps.shape}")
