"""Where in the chest a candidate lies: its side, and whether centrally; told by the lungs, not by halves of the image.

The side is that of the nearer lung; the level is the distance from the tissue between the lungs (mediastinum with the
main arteries), outside of which arteries branch into the lungs. Both are worked out on a grid of about 5 mm, half a
cell of the attention map: a candidate's place is not known more finely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pe_app.ct.lungs import Lungs
from pe_app.ct.volume import Volume
from pe_app.model.detection import Candidate, Level, Point, Side

GRID_MM = 5.0
"""Working grid: two points of it to a cell of the attention map."""

MIDLINE_MM = 10.0
"""Between the lungs, a place whose distances to them differ by less is on neither side [ours, on phantoms]."""

CENTRAL_MM = 18.0
"""Up to this far from the tissue between the lungs an artery is main or lobar as a rule [ours, on phantoms]."""

VESSELS_MM = 7.5
"""Gaps of the lung up to twice as wide are vessels within it; wider ones belong to the tissue between the lungs."""

SMALLER_LUNG = 0.15
"""Share of the larger lung that the smaller one has at least; less is a piece of the same one."""


def place_candidates(candidates: Sequence[Candidate], volume: Volume, lungs: Lungs) -> tuple[Candidate, ...]:
    """The candidates with side and level; unchanged where both lungs cannot be told apart (one is collapsed)."""
    chest = _Chest.of(volume, lungs) if candidates else None
    if chest is None:
        return tuple(candidates)
    return tuple(
        replace(candidate, side=chest.side(candidate.centre_lps_mm), level=chest.level(candidate.centre_lps_mm))
        for candidate in candidates
    )


@dataclass(frozen=True, eq=False)
class _Chest:
    """Distances on the working grid, in mm.

    Attributes:
        grid: the working grid in patient space; its voxels are the distance to the tissue between the lungs,
            negative within.
        to_right, to_left: distance to either lung, 0 within.
    """

    grid: Volume
    to_right: NDArray[np.float64]
    to_left: NDArray[np.float64]

    @classmethod
    def of(cls, volume: Volume, lungs: Lungs) -> _Chest | None:
        """None where both lungs cannot be told apart."""
        skip = np.maximum(1, np.rint(GRID_MM / (np.array(volume.spacing_mm) * lungs.step))).astype(int)
        mask = lungs.mask[:: skip[0], :: skip[1], :: skip[2]]
        affine = volume.affine @ np.diag([*(skip * lungs.step), 1.0])
        spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
        sides = _both_lungs(mask, spacing_mm)
        if sides is None:
            return None
        right, left = (_closed(side, spacing_mm) for side in sides)
        # from the right lung leftwards, and from the left lung rightwards
        beside_right = np.maximum.accumulate(right, axis=2)
        beside_left = np.maximum.accumulate(left[:, :, ::-1], axis=2)[:, :, ::-1]
        gaps, count = ndimage.label(ndimage.binary_opening(beside_right & beside_left & ~right & ~left))
        if count == 0:
            return None
        # the largest gap is the mediastinum; another one is a nodule or a mass within a lung
        between = gaps == 1 + int(np.bincount(gaps.ravel())[1:].argmax())
        signed = _distance_to(between, spacing_mm) - _distance_to(~between, spacing_mm)
        to_right, to_left = (_distance_to(side, spacing_mm) for side in sides)
        return cls(Volume(signed, affine), to_right, to_left)

    def side(self, lps_mm: Point) -> Side:
        """Of the nearer lung; midline where neither is."""
        cell = self._cell(lps_mm)
        right, left = float(self.to_right[cell]), float(self.to_left[cell])
        if min(right, left) > 0 and abs(right - left) < MIDLINE_MM:
            return "midline"
        return "right" if right < left else "left"

    def level(self, lps_mm: Point) -> Level:
        """By the distance from the tissue between the lungs."""
        return "central" if float(self.grid.voxels[self._cell(lps_mm)]) <= CENTRAL_MM else "peripheral"

    def _cell(self, lps_mm: Point) -> tuple[int, int, int]:
        index = np.rint(self.grid.to_index(lps_mm)).astype(int).clip(0, np.array(self.grid.shape) - 1)
        slice_index, row, column = (int(k) for k in index)
        return slice_index, row, column


def _both_lungs(
    mask: NDArray[np.bool_], spacing_mm: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
    """The right and the left lung; where they touch (at the front, behind the sternum) they are pulled apart."""
    seeds = None
    for shrunk in (mask, *(ndimage.binary_erosion(mask, iterations=times) for times in (1, 2, 3, 4))):
        labels, count = ndimage.label(shrunk)
        sizes = np.bincount(labels.ravel(), minlength=3)[1:]
        first, second = np.argsort(sizes)[::-1][:2]
        if count > 1 and sizes[second] >= SMALLER_LUNG * sizes[first]:
            seeds = [labels == first + 1, labels == second + 1]
            break
    if seeds is None:
        return None
    right, left = sorted(seeds, key=lambda seed: float(np.nonzero(seed)[2].mean()))  # columns run from right to left
    nearer_right = _distance_to(right, spacing_mm) <= _distance_to(left, spacing_mm)
    return mask & nearer_right, mask & ~nearer_right


def _closed(lung: NDArray[np.bool_], spacing_mm: NDArray[np.float64]) -> NDArray[np.bool_]:
    """A lung with its vessels filled in."""
    pad = int(np.ceil(VESSELS_MM / spacing_mm.min())) + 1
    grown = _distance_to(np.pad(lung, pad), spacing_mm) <= VESSELS_MM
    closed: NDArray[np.bool_] = (_distance_to(~grown, spacing_mm) > VESSELS_MM)[pad:-pad, pad:-pad, pad:-pad]
    return closed


def _distance_to(mask: NDArray[np.bool_], spacing_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    distance: NDArray[np.float64] = ndimage.distance_transform_edt(~mask, sampling=spacing_mm)
    return distance
