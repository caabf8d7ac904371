"""Tubes onto slices: spheres along a centreline, cut by thin planes, averaged to the thickness of a slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Coverage = tuple[tuple[slice, slice], NDArray[np.float32]]
"""A box of one slice (rows, columns) and how much of every pixel in it is covered, 0 to 1."""
EDGE_PIXELS = 1.25
"""Width of an edge: the point spread of the scanner and the pixel itself."""


@dataclass(frozen=True)
class Grid:
    """The pixels of a scan. Positions are mm from the centre of the gantry, z of slice 0 is ``bottom_mm``."""

    slices: int
    matrix: int
    spacing_mm: float
    pixel_mm: float
    bottom_mm: float

    @property
    def planes(self) -> int:
        """Thin planes that a slice is averaged from: 1.2 mm apart at most, or somewhat less than a large pixel."""
        return int(np.ceil(self.spacing_mm / max(1.2, 0.75 * self.pixel_mm)))


class Tubes:
    """The cross-sections of many spheres, ready to be drawn slice by slice.

    Args:
        grid: the pixels.
        pieces: (points ``(n, 3)`` x, y, z in mm, radii ``(n,)``), each sampled at most a radius apart.
    """

    def __init__(
        self, grid: Grid, pieces: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], edge: float = EDGE_PIXELS
    ) -> None:
        self._grid, self._edge = grid, edge
        points = np.concatenate([p for p, _ in pieces] or [np.zeros((0, 3))])
        radius = np.concatenate([r for _, r in pieces] or [np.zeros(0)])
        step = grid.spacing_mm / grid.planes
        first = grid.bottom_mm - 0.5 * (grid.spacing_mm - step)
        reach = np.maximum(radius, 0.6 * step)  # a thin level vessel must not slip between two planes
        low = np.maximum(np.ceil((points[:, 2] - reach - first) / step), 0).astype(np.int64)
        high = np.minimum(np.floor((points[:, 2] + reach - first) / step), grid.slices * grid.planes - 1).astype(
            np.int64
        )
        count = np.maximum(high - low + 1, 0)
        row = np.repeat(np.arange(len(points)), count)
        plane = low[row] + np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        away = (points[row, 2] - first - plane * step) / reach[row]
        centre = points[row, :2] / grid.pixel_mm + (grid.matrix - 1) / 2
        cut = radius[row] * np.sqrt(np.maximum(1 - away * away, 0)) / grid.pixel_mm
        seen = ((centre > -cut[:, None]) & (centre < grid.matrix - 1 + cut[:, None])).all(1)
        seen &= cut > 0.12 * radius[row] / grid.pixel_mm
        order = np.flatnonzero(seen)
        order = order[np.argsort(plane[order], kind="stable")]
        self._centre, self._cut = centre[order].astype(np.float32), cut[order].astype(np.float32)
        self._bounds = np.searchsorted(plane[order], np.arange(grid.slices * grid.planes + 1))

    def draw(self, index: int) -> Coverage | None:
        """Coverage of slice ``index``, or None where no tube touches it."""
        planes = self._grid.planes
        bounds = self._bounds[index * planes : (index + 1) * planes + 1]
        if bounds[0] == bounds[-1]:
            return None
        centre, cut = self._centre[bounds[0] : bounds[-1]], self._cut[bounds[0] : bounds[-1]]
        nearest = np.rint(centre).astype(np.int64)
        half = np.ceil(cut + self._edge / 2 + 0.5).astype(np.int64)
        low, high = (nearest - half[:, None]).min(0), (nearest + half[:, None]).max(0)
        width, height = high - low + 1
        total = np.zeros((height, width), np.float32)
        for k in range(planes):
            part = slice(bounds[k] - bounds[0], bounds[k + 1] - bounds[0])
            if part.start < part.stop:
                total += _discs(
                    centre[part] - low, nearest[part] - low, cut[part], half[part], width, height, self._edge
                )
        total /= planes
        inside = np.maximum(low, 0), np.minimum(high + 1, self._grid.matrix)
        box = slice(inside[0][1], inside[1][1]), slice(inside[0][0], inside[1][0])
        return box, total[box[0].start - low[1] : box[0].stop - low[1], box[1].start - low[0] : box[1].stop - low[0]]


def _discs(
    centre: NDArray[np.float32],
    nearest: NDArray[np.int64],
    cut: NDArray[np.float32],
    half: NDArray[np.int64],
    width: int,
    height: int,
    edge: float,
) -> NDArray[np.float32]:
    """Union of discs on one plane; small ones of a size together, large ones one by one."""
    plane = np.zeros((height, width), np.float32)
    flat = plane.reshape(-1)
    strength = np.minimum(1, 2 * cut / edge)  # thinner than a pixel: only part of it
    for size in np.unique(half):
        chosen = np.flatnonzero(half == size)
        offset = np.arange(-size, size + 1)
        across = (nearest[chosen, 0, None] + offset - centre[chosen, 0, None]).astype(np.float32) ** 2
        down = (nearest[chosen, 1, None] + offset - centre[chosen, 1, None]).astype(np.float32) ** 2
        if size > 12:
            for i, j in enumerate(chosen):
                cover = np.sqrt(down[i][:, None] + across[i][None])
                np.subtract(0.5 + cut[j] / edge, cover / edge, out=cover)
                x, y = nearest[j] - size
                view = plane[y : y + 2 * size + 1, x : x + 2 * size + 1]
                np.maximum(view, np.clip(cover, 0, 1, out=cover), out=view)
            continue
        cover = np.sqrt(down[:, :, None] + across[:, None, :])
        cover *= -1 / edge
        cover += (0.5 + cut[chosen] / edge)[:, None, None]
        np.clip(cover, 0, 1, out=cover)
        cover *= strength[chosen, None, None]
        rows = (nearest[chosen, 1, None] + offset) * width
        place = rows[:, :, None] + (nearest[chosen, 0, None] + offset)[:, None, :]
        np.maximum.at(flat, place.ravel(), cover.ravel())
    return plane
