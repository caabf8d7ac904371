"""Whether a mask of emboli fits its CT: orientation is proven by the voxels, not believed from a header.

A clot holds 0 to 150 HU and lies in or beside enhanced blood, inside the chest. A mask that is mirrored, turned upside
down or shifted lies on lung, bone or air instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pe_app.common.errors import InputError
from pe_app.ct.lungs import find_lungs
from pe_app.ct.volume import Volume

CLOT_HU = (-20, 150)
"""A clot and the rim that it shares with its vessel."""

BLOOD_HU = 170
"""Enhanced blood is above; soft tissue and clots are below."""

AIR_HU = -300
"""Air and inflated lung are below."""

RIM_MM = 3.0
"""How far round a mask enhanced blood is looked for."""

MARGIN_MM = 15.0
"""How far outside of the lungs' box a clot may lie."""

LEAST_INSIDE, MOST_AIR, FLIPPED_FACTOR = 0.9, 0.5, 2.0
"""Share of a mask inside the lungs' box, share of it in air, and how much better than the mask as it is a flipped one
may fit: measured on simulated studies, see ``tests/measure/orientation.py``."""

ALTERNATIVES: dict[str, tuple[tuple[int, ...], bool]] = {
    "head and feet": ((0,), False),
    "front and back": ((1,), False),
    "left and right": ((2,), False),
    "front and back, left and right": ((1, 2), False),
    "rows and columns": ((), True),
}
"""What converters get wrong: axes that are flipped, and whether rows and columns are exchanged."""


@dataclass(frozen=True)
class Fit:
    """How a mask lies on its CT.

    Attributes:
        inside: share of its voxels inside the box of the lungs, with a margin.
        air: share of them in air or inflated lung.
        score: share of clot-like voxels, times 0.1 plus the share of enhanced blood round the mask.
        flipped_score: the highest score of the mask with axes exchanged as converters do (``ALTERNATIVES``).
        flipped: which of them that is, in words.
    """

    inside: float
    air: float
    score: float
    flipped_score: float
    flipped: str

    def __str__(self) -> str:
        return (
            f"{self.inside:.0%} of the mask lies in the chest, {self.air:.0%} in air; it fits with {self.score:.3f}, "
            f"with {self.flipped} exchanged with {self.flipped_score:.3f}"
        )


def fit_of(mask: NDArray[np.generic], volume: Volume) -> Fit:
    """How a mask that is not empty lies on its CT.

    Args:
        mask: ``(slices, rows, columns)`` on the CT's grid, above 0 on emboli.
        volume: the CT.

    Raises:
        InputError: if no lung is found in the CT.
    """
    inner = np.argwhere(mask)
    rim = _rim(mask, inner, volume)
    voxels = volume.voxels
    shape = np.array(voxels.shape)
    scores: dict[str, float] = {}
    for name, (flips, turn) in {"": ((), False), **ALTERNATIVES}.items():
        if not turn or shape[1] == shape[2]:
            clot, blood = (voxels[tuple(_moved(places, shape, flips, turn).T)] for places in (inner, rim))
            like_clot = np.mean((clot >= CLOT_HU[0]) & (clot <= CLOT_HU[1]))
            scores[name] = float(like_clot * (0.1 + np.mean(blood > BLOOD_HU)))
    own = scores.pop("")
    best = max(scores, key=lambda name: scores[name])
    hu = voxels[tuple(inner.T)]
    return Fit(_share_inside(inner, volume), float(np.mean(hu < AIR_HU)), own, scores[best], best)


def check_fit(fit: Fit, name: str) -> None:
    """Refuse a mask that does not lie where emboli can.

    Raises:
        InputError: with the figures.
    """
    if fit.inside < LEAST_INSIDE:
        raise InputError(f"{name}: its mask lies outside of the chest: {fit}; is it the mask of this CT?")
    if fit.air > MOST_AIR:
        raise InputError(f"{name}: its mask lies in air or lung, not in vessels: {fit}; is it shifted or another CT's?")
    if fit.flipped_score > FLIPPED_FACTOR * fit.score:
        raise InputError(f"{name}: its mask fits better when flipped: {fit}; image and mask differ in orientation")


def _rim(mask: NDArray[np.generic], inner: NDArray[np.int64], volume: Volume) -> NDArray[np.int64]:
    """Places ``(n, 3)`` within ``RIM_MM`` of the mask and outside of it; the mask's own where there are none."""
    reach = np.maximum(np.rint(RIM_MM / np.array(volume.spacing_mm)).astype(int), 1)
    low = np.maximum(inner.min(axis=0) - reach, 0)
    high = np.minimum(inner.max(axis=0) + reach + 1, mask.shape)
    part = np.asarray(mask[tuple(map(slice, low, high))]) != 0
    spread = part
    for axis, steps in enumerate(reach):
        length = [1, 1, 1]
        length[axis] = 2 * int(steps) + 1
        spread = ndimage.maximum_filter(spread, length)
    rim = np.argwhere(spread & ~part) + low
    return rim if len(rim) else inner


def _moved(
    places: NDArray[np.int64], shape: NDArray[np.int64], flips: tuple[int, ...], turn: bool
) -> NDArray[np.int64]:
    moved = places[:, [0, 2, 1]] if turn else places.copy()
    for axis in flips:
        moved[:, axis] = shape[axis] - 1 - moved[:, axis]
    return moved


def _share_inside(inner: NDArray[np.int64], volume: Volume) -> float:
    """Share of voxels inside the box of the lungs, widened by ``MARGIN_MM``."""
    lungs = find_lungs(volume)
    if lungs.slice_range is None:
        raise InputError(f"{volume.name}: no lung found; is it a CT of the chest?")
    found = np.argwhere(lungs.mask) * lungs.step
    margin = MARGIN_MM / np.array(volume.spacing_mm)
    low, high = found.min(axis=0) - margin, found.max(axis=0) + np.array(lungs.step) + margin
    return float(np.mean(((inner >= low) & (inner <= high)).all(axis=1)))
