"""A chest drawn round a patient's own arteries, veins and lungs: a tissue for every voxel.

Crude where the masks say nothing (heart, aorta, airways, wall), and rich in what mimics an embolus: nodes and fat
beside arteries, airways beside arteries, nodules, collapse, mucus.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage

from pe_app.phantom.trees import VesselTree

Labels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


class Tissue(IntEnum):
    """What a voxel outside the labelled vessels consists of."""

    AIR = 0
    LUNG = 1
    SOFT = 2
    FAT = 3
    BONE = 4
    WALL = 5
    AORTA = 6
    RIGHT_HEART = 7
    LEFT_HEART = 8
    MYOCARDIUM = 9
    FINE_VESSEL = 10
    AIRWAY = 11
    OPACITY = 12
    NODE = 13
    MUCUS = 14


def draw_chest(tree: VesselTree, rng: np.random.Generator) -> tuple[Labels, Mask]:
    """Tissues ``(slices, rows, columns)``, and what lies between the lungs' outermost points (lungs, mediastinum)."""
    return _Chest(tree, rng).drawn()


class _Chest:
    def __init__(self, tree: VesselTree, rng: np.random.Generator) -> None:
        self.rng = rng
        self.spacing = np.array(tree.spacing_mm)
        self.lung = tree.lungs > 127
        self.artery = tree.arteries > 127
        self.vessel = self.artery | (tree.veins > 127)
        self.shape = self.lung.shape
        self.axes = [np.arange(n) * step for n, step in zip(self.shape, self.spacing, strict=True)]
        self.span = _span(self.lung)
        self.coarse, self.fine = self._field(5), self._field(2)
        wide = ndimage.binary_erosion(tree.veins > 127, iterations=5)
        veins = np.argwhere(wide) if wide.sum() > 50 else np.argwhere(tree.veins > 127)
        columns = np.flatnonzero(self.lung.any((0, 1)))
        self.atrium_z, self.atrium_y = (np.median(veins, 0) * self.spacing)[:2]
        self.middle_x = float(columns[0] + columns[-1]) / 2 * self.spacing[2]
        self.labels = np.full(self.shape, Tissue.WALL, np.uint8)

    def drawn(self) -> tuple[Labels, Mask]:
        between = self.span & ~self.lung
        self.labels[(self.coarse + 0.4 * self.fine) > 0] = Tissue.FAT
        fatty = (self.coarse + 0.5 * self.fine)[between] > self.rng.uniform(-0.8, 0.5)
        self.labels[between] = np.where(fatty, Tissue.FAT, Tissue.SOFT)
        free = between & ~self.vessel
        self._heart_and_great_vessels(free)
        self._airways(free)
        self._wall()
        self._lungs(between)
        return self.labels, self.span

    def _heart_and_great_vessels(self, free: Mask) -> None:
        z, y, x, about = self.atrium_z, self.atrium_y, self.middle_x, self._about
        top = self.shape[0] * self.spacing[0]
        chambers = [
            (Tissue.LEFT_HEART, (z - 35 + about(4), y - 25 + about(4), x + 38 + about(4)), (30, 26, 29)),
            (Tissue.RIGHT_HEART, (z - 30 + about(4), y - 55 + about(4), x + 5 + about(4)), (30, 20, 30)),
            (Tissue.RIGHT_HEART, (z - 22 + about(4), y - 25 + about(4), x - 36 + about(4)), (28, 22, 21)),
        ]
        for _, centre, radii in chambers:
            self._ball(centre, (radii[0] + 9, radii[1] + 9, radii[2] + 9), Tissue.MYOCARDIUM, free)
        for tissue, centre, radii in chambers:
            self._ball(centre, radii, tissue, free)
        arch = z + 55 + about(8)
        down, up = (y + 38 + about(3), x + 22 + about(3)), (y - 38 + about(3), x - 10 + about(3))
        self._tube((0, arch), *down, 12 + about(1), Tissue.AORTA, free)
        self._tube((z - 15, arch), *up, 16 + about(1), Tissue.AORTA, free)
        for way in np.linspace(0, 1, 30):
            y_way, x_way = (a + (b - a) * way for a, b in zip(up, down, strict=True))
            self._ball((arch + 8 * np.sin(np.pi * way), y_way, x_way), (13, 13, 13), Tissue.AORTA, free)
        self._tube((z - 10, top), y - 22 + about(3), x - 32 + about(3), 8 + about(1), Tissue.RIGHT_HEART, free)
        self._tube((0, top), y + 66, x, 22, Tissue.BONE, ~self.lung & ~self.vessel)

    def _airways(self, free: Mask) -> None:
        z, y, x, about = self.atrium_z, self.atrium_y, self.middle_x, self._about
        y, x, split = y + 2 + about(3), x + about(3), z + 32 + about(5)
        top = self.shape[0] * self.spacing[0]
        self._tube((split, top), y, x, 11, Tissue.SOFT, free)
        self._tube((split, top), y, x, 9, Tissue.AIRWAY, free)
        for side in (-1, 1):
            for way in np.linspace(0, 1, 24):
                self._ball((split - 22 * way, y + 3 * way, x + side * 36 * way), (7, 7, 7), Tissue.AIRWAY, free)

    def _wall(self) -> None:
        outside, step = ~self.span, self.spacing[1]
        away = ndimage.distance_transform_edt(outside[:, ::3, ::3], sampling=(1e3, 3 * step, 3 * step))
        away = np.repeat(np.repeat(away, 3, 1), 3, 2)[:, : self.shape[1], : self.shape[2]]
        z, y, x = np.ix_(*self.axes)
        angle = np.arctan2(y - self.atrium_y, x - self.middle_x)
        rib = np.sin((z + 40 * np.cos(angle)) / 22 * 2 * np.pi) > 0.3
        bone = (away > 2) & (away < 10) & rib & outside
        self.labels[bone] = Tissue.BONE
        self.labels[(away > 0) & (away <= 10) & ~rib] = Tissue.WALL
        self.labels[away > 34] = Tissue.AIR

    def _lungs(self, between: Mask) -> None:
        lung, rng = self.lung, self.rng
        self.labels[lung] = Tissue.LUNG
        # where two random fields are near zero there are threads: vessels too fine for the masks
        threads = self._field(6) ** 2 + self._field(6) ** 2
        density = np.clip(self._field(15) * 0.3 + 1, 0.4, 1.6) * rng.uniform(0.07, 0.14)
        self.labels[lung & (threads < density**2)] = Tissue.FINE_VESSEL
        wide = _opened(self.vessel, 7)
        near = _box_mean(wide, 9) > 0.001
        self.labels[near & lung & (self.fine + self.coarse > 0.6)] = Tissue.NODE
        self.labels[between & near & ~self.vessel & (self.coarse > 0)] = Tissue.NODE
        for size, beside in ((3, 5), (7, 10)):
            thick = _opened(self.artery, size)
            down, right = (int(rng.choice([-1, 1]) * beside * share) for share in (0.6, 0.8))
            tubes = np.roll(thick, (down, right), (1, 2))
            wall = _box_mean(tubes, 3)
            self.labels[(wall > 0.05) & lung & ~self.vessel] = Tissue.NODE
            filled = self._field(25) > 1.3
            inside = (wall > 0.9) & (lung | between) & ~self.vessel
            self.labels[inside] = np.where(filled[inside], Tissue.MUCUS, Tissue.AIRWAY)
        places = np.argwhere(lung)
        for _ in range(14):
            radius = float(rng.uniform(2, 9))
            z, y, x = places[rng.integers(len(places))] * self.spacing
            radii = radius * rng.uniform(0.7, 1.3), radius, radius * rng.uniform(0.7, 1.3)
            self._ball((z, y, x), radii, Tissue.OPACITY, lung)
        if rng.random() < 0.5:  # collapse and consolidation: low and behind
            z, y, _ = np.ix_(*self.axes)
            low = (y - self.atrium_y) / 60 + (self.atrium_z - z) / 120
            self.labels[lung & (self._field(12) + 0.25 * self.fine + low > 2.6)] = Tissue.OPACITY

    def _about(self, mm: float) -> float:
        return float(self.rng.normal() * mm)

    def _field(self, mm: float) -> NDArray[np.float32]:
        """Smooth noise of standard deviation 1 that changes over so many mm."""
        small = [int(np.ceil(n / max(mm / step, 1))) + 2 for n, step in zip(self.shape, self.spacing, strict=True)]
        coarse = torch.from_numpy(ndimage.gaussian_filter(self.rng.standard_normal(small, np.float32), 0.7))
        spread = F.interpolate((coarse / coarse.std())[None, None], self.shape, mode="trilinear")
        field: NDArray[np.float32] = spread[0, 0].numpy()
        return field

    def _ball(
        self, centre: tuple[float, float, float], radii: tuple[float, float, float], tissue: Tissue, where: Mask
    ) -> None:
        box = tuple(
            slice(int(np.clip((c - r) / s, 0, n)), int(np.clip((c + r) / s + 2, 0, n)))
            for c, r, s, n in zip(centre, radii, self.spacing, self.shape, strict=True)
        )
        parts = [((axis[side] - c) / r) ** 2 for axis, side, c, r in zip(self.axes, box, centre, radii, strict=True)]
        inside = parts[0][:, None, None] + parts[1][None, :, None] + parts[2][None, None] < 1
        self.labels[box][inside & where[box]] = tissue

    def _tube(self, z: tuple[float, float], y: float, x: float, radius: float, tissue: Tissue, where: Mask) -> None:
        for level in np.flatnonzero((self.axes[0] >= z[0]) & (self.axes[0] <= z[1])):
            disc = (self.axes[1][:, None] - y) ** 2 + (self.axes[2][None] - x) ** 2 < radius**2
            self.labels[level][disc & where[level]] = tissue


def _span(lung: Mask) -> Mask:
    """Slice by slice, what lies between lung and lung along rows or columns, closed."""
    span = np.zeros_like(lung)
    for level, plane in enumerate(lung):
        filled = np.zeros_like(plane)
        for axis in (0, 1):
            after = np.maximum.accumulate(plane, axis)
            before = np.flip(np.maximum.accumulate(np.flip(plane, axis), axis), axis)
            filled |= after & before
        span[level] = ndimage.binary_closing(np.pad(filled, 12), iterations=6)[12:-12, 12:-12]
    return span


def _box_mean(mask: Mask, size: int) -> NDArray[np.float32]:
    planes = torch.from_numpy(mask.astype(np.float32))[None]
    mean: NDArray[np.float32] = F.avg_pool2d(planes, size, 1, size // 2)[0].numpy()
    return mean


def _opened(mask: Mask, size: int) -> Mask:
    """Only what is at least so many pixels wide."""
    opened: Mask = _box_mean(_box_mean(mask, size) > 0.99, size) > 0.01
    return opened
