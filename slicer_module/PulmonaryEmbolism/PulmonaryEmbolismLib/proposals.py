"""Where paint may begin: a proposal is never the reader's work until the reader takes it. No Slicer, no Qt."""

from __future__ import annotations

from typing import Iterable, Optional, Sequence

import numpy as np

from PulmonaryEmbolismLib import images
from PulmonaryEmbolismLib.answers import Candidate
from PulmonaryEmbolismLib.drafts import Masks

CLOT_HU = (0, 100)
"""Hounsfield units of clot; the reader may change them."""

GROW_MM = 15.0
"""How far a grown region reaches from where the reader pointed: clot is as bright as the muscle next to it."""


def fill_between(masks: Masks, reviewed: Iterable[int]) -> Masks:
    """Masks for the slices between neighbouring painted ones, by shape: the mean of their signed distances.

    Two painted slices with a slice reviewed otherwise between them are not joined. Source: Raya and Udupa 1990,
    shape-based interpolation.
    """
    between: Masks = {}
    order = sorted({*masks, *reviewed})
    for low, high in zip(order, order[1:]):
        if low not in masks or high not in masks or high - low < 2:
            continue
        either = masks[low] | masks[high]
        rows, columns = np.flatnonzero(either.any(1)), np.flatnonzero(either.any(0))
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        below, above = _signed_distance(masks[low][box]), _signed_distance(masks[high][box])
        for k in range(low + 1, high):
            share = (k - low) / (high - low)
            mask = np.zeros_like(either)
            mask[box] = (1 - share) * below + share * above > 0
            if mask.any():
                between[k] = mask
    return between


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    """Pixels to the outline of the mask, positive inside; half a pixel at either side of the outline."""
    padded = np.pad(mask, 1)
    inner = padded[1:-1, :-2] & padded[1:-1, 2:] & padded[:-2, 1:-1] & padded[2:, 1:-1]
    outline = np.argwhere(mask & ~inner)
    nearest = np.full(mask.shape, np.inf)
    row, column = np.ogrid[: mask.shape[0], : mask.shape[1]]
    for r, c in outline:
        np.minimum(nearest, (row - r) ** 2 + (column - c) ** 2, out=nearest)
    return np.where(mask, np.sqrt(nearest) + 0.5, 0.5 - np.sqrt(nearest))


def in_range(hu: np.ndarray, low: float, high: float) -> np.ndarray:
    """Where a slice's Hounsfield units lie in the clot range."""
    return (hu >= low) & (hu <= high)


def grow(inside: np.ndarray, row: int, column: int, spacing_mm: Sequence[float]) -> np.ndarray:
    """The connected part of ``inside`` round a pixel, within ``GROW_MM`` of it; nothing if the pixel is not in it.

    Args:
        inside: (rows, columns), true where the region may grow.
        row: of the pixel.
        column: of the pixel.
        spacing_mm: between rows and between columns.
    """
    region = np.zeros_like(inside)
    if not (0 <= row < inside.shape[0] and 0 <= column < inside.shape[1] and inside[row, column]):
        return region
    reach = [int(np.ceil(GROW_MM / mm)) for mm in spacing_mm]
    rows, columns = (slice(max(at - n, 0), at + n + 1) for at, n in zip((row, column), reach))
    r, c = np.ogrid[rows.start : min(rows.stop, inside.shape[0]), columns.start : min(columns.stop, inside.shape[1])]
    near = ((r - row) * spacing_mm[0]) ** 2 + ((c - column) * spacing_mm[1]) ** 2 <= GROW_MM**2
    may = np.pad(inside[rows, columns] & near, 1)
    grown = np.zeros_like(may)
    grown[row - rows.start + 1, column - columns.start + 1] = True
    while True:
        wider = grown.copy()
        wider[1:] |= grown[:-1]
        wider[:-1] |= grown[1:]
        wider[:, 1:] |= grown[:, :-1]
        wider[:, :-1] |= grown[:, 1:]
        wider &= may
        if np.array_equal(wider, grown):
            break
        grown = wider
    region[rows, columns] = grown[1:-1, 1:-1]
    return region


def candidate_region(
    candidate: Candidate,
    attention: images.Image,
    shape: Sequence[int],
    affine: np.ndarray,
    within: Optional[np.ndarray],
) -> np.ndarray:
    """Where paint may begin on a candidate's slice: attention above half of its maximum in the candidate's box.

    Args:
        candidate: the region that the reader accepted.
        attention: the attention volume on its own coarse grid.
        shape: (slices, rows, columns) of the CT.
        affine: (slice, row, column) of the CT to LPS mm.
        within: (rows, columns) to keep to, as the clot range; None to keep everything.

    Returns:
        (rows, columns), true where the region is; the reader corrects it.
    """
    rows, columns = shape[1:]
    index = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1)
    places = index @ affine[:3, 1:3].T + affine[:3, 0] * candidate.slice_index + affine[:3, 3]
    half = np.maximum(np.array(candidate.extent_mm[:2]) / 2, 5.0)
    inside = (np.abs(places[..., :2] - np.array(candidate.centre_lps_mm[:2])) <= half).all(-1)
    if not inside.any():
        return inside
    to_grid = np.linalg.inv(attention.affine)
    values = np.zeros((rows, columns))
    values[inside] = _trilinear(attention.voxels, places[inside] @ to_grid[:3, :3].T + to_grid[:3, 3])
    region = inside & (values >= max(values.max() / 2, 1e-9))
    return region if within is None else region & within


def _trilinear(voxels: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Values at fractional indices ``(n, 3)``; the edge's value beyond the edge."""
    last = np.array(voxels.shape) - 1
    index = np.clip(index, 0, last)
    low = np.minimum(np.floor(index).astype(int), np.maximum(last - 1, 0))
    high = np.minimum(low + 1, last)
    share = index - low
    total = np.zeros(len(index))
    for corner in np.ndindex(2, 2, 2):
        take = np.array(corner, bool)
        place = np.where(take, high, low)
        total += np.where(take, share, 1 - share).prod(1) * voxels[tuple(place.T)]
    return total
