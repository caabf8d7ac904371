"""Batches of windows with and without clots: bent, turned and rendered anew each time.

A batch holds pairs (a window with clot and its twin without, alike in everything else), windows from anywhere, and
windows at vessels. Every cell of the network's map is asked whether it shows a clot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pe_app.ct.slabs import ENCODER_STRIDE
from pe_app.phantom.rendering import DrawnWindows, RealWindows, Renderer
from pe_app.research.starter.ingredients import SPACING_MM, SPAN_BIT, ClotSet

SLICES = 5
LEAST_PIXELS = 8.0
"""A cell shows a clot from this many of its 256 pixels on (4 mm2), in the middle slice or the next to either side."""

ASK_NOT = -1.0
"""Target of a cell that holds less clot, clot in an outer slice only, or clot that cannot be seen."""

SEEN_HU = 150.0
"""A pixel of clot counts as many pixels as it is darker than in the twin, in this unit, and at most as one."""

TINY_ML, TINY_CHANCE = 0.1, 0.4
"""Smaller clots are chosen less often than others."""


@dataclass(frozen=True)
class WindowSettings:
    """How batches are made.

    Attributes:
        side: pixels of a window, a multiple of 16.
        pairs: windows with a clot, each with its twin.
        others: windows from anywhere and at vessels, half and half.
        real_share: of windows, from real CT.
        flat_share: of these, from single slices that are drawn out to a slab.
        small_share: of windows with a clot, from sets of small ones.
        scale: least and largest millimetre per millimetre.
        turn_degrees: at most, in the plane.
        plain_share: of windows without a pair, drawn as a scan without contrast.
        varied: False for windows to validate on: no flips; real CT as it was scanned.
        hu_window: mapped to 0..1.
    """

    side: int = 128
    pairs: int = 7
    others: int = 8
    real_share: float = 0.4
    flat_share: float = 0.5
    small_share: float = 0.5
    scale: tuple[float, float] = (0.85, 1.2)
    turn_degrees: float = 15.0
    plain_share: float = 0.08
    varied: bool = True
    hu_window: tuple[float, float] = (-1024.0, 500.0)


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows and what their cells show; the pairs come first, a window with clot and its twin in turn.

    Attributes:
        slabs: ``(batch, 5, side, side)`` from 0 to 1.
        target: ``(batch, cells, cells)``: 1 a clot, 0 none, -1 not asked.
        clot_ml: ``(batch,)`` of the clot that a window was cut round; 0 for others.
        groups: ``(batch,)``, the same number for twins.
        pairs: how many windows with a clot come first.
    """

    slabs: Tensor
    target: Tensor
    clot_ml: Tensor
    groups: Tensor
    pairs: int


class Patient:
    """Ingredients of one patient (``ingredients``), by memory map."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.arrays: dict[str, NDArray[np.generic]] = {
            path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))
        }
        self.real = "hu" in self.arrays
        self.shape = self.arrays["arteries"].shape
        self.flat = self.shape[0] == SLICES
        places = np.load(folder / "places.npz")
        self.anywhere, self.vessel = places["anywhere"].astype(int), places["vessel"].astype(int)
        packed = np.load(folder / "clots.npz")
        names = sorted({name.rpartition(".")[0] for name in packed.files})
        self.sets = {name: ClotSet(*(packed[f"{name}.{part}"] for part in ("index", "share", "number")))
                     for name in names}  # fmt: skip
        self.small = [name for name in names if name.startswith("small")]
        self.usual = [name for name in names if name.startswith("real")]

    def clots(self, levels: NDArray[np.int64], rows: slice, columns: slice, name: str) -> NDArray[np.uint8]:
        """Share of clot in a box."""
        found, plane = self.sets[name], self.shape[1] * self.shape[2]
        out = np.zeros((len(levels), rows.stop - rows.start, columns.stop - columns.start), np.uint8)
        for place, level in enumerate(levels):
            first, last = np.searchsorted(found.index, (level * plane, (level + 1) * plane))
            row, column = np.divmod(found.index[first:last] - level * plane, self.shape[2])
            row, column = row - rows.start, column - columns.start
            inside = (row >= 0) & (row < out.shape[1]) & (column >= 0) & (column < out.shape[2])
            out[place, row[inside], column[inside]] = found.share[first:last][inside]
        return out


@dataclass(frozen=True, eq=False)
class _Spec:
    patient: Patient
    centre: NDArray[np.int64]
    clots: str | None
    clot_ml: float = 0.0


class WindowSource:
    """Draws batches from patients."""

    def __init__(self, patients: Sequence[Patient], seed: int, settings: WindowSettings = WindowSettings()) -> None:
        self.settings = settings
        self.rng = np.random.default_rng(seed)
        self.renderer = Renderer(seed)
        self.drawn = [patient for patient in patients if not patient.real]
        self.scans = [patient for patient in patients if patient.real and not patient.flat]
        self.flat = [patient for patient in patients if patient.flat]

    def batch(self) -> Batch:
        """The next batch."""
        specs = [self._with_clot() for _ in range(self.settings.pairs)]
        specs += [self._without(at_vessel=bool(number % 2)) for number in range(self.settings.others)]
        return self._rendered(specs)

    def _patient(self, with_clots: bool) -> Patient:
        rng = self.rng
        while True:
            real = (rng.random() < self.settings.real_share and (self.scans or self.flat)) or not self.drawn
            flat = real and self.flat and (rng.random() < self.settings.flat_share or not self.scans)
            pool = self.flat if flat else self.scans if real else self.drawn
            patient = pool[rng.integers(len(pool))]
            if patient.sets or not with_clots:
                return patient

    def _with_clot(self) -> _Spec:
        rng = self.rng
        patient = self._patient(with_clots=True)
        names = patient.small if rng.random() < self.settings.small_share else patient.usual
        names = names or patient.small or patient.usual
        name = names[rng.integers(len(names))]
        clots = patient.sets[name]
        volumes_ml = np.bincount(clots.number, clots.share / 255) * float(np.prod(SPACING_MM)) / 1000
        chances = np.where(volumes_ml < TINY_ML, TINY_CHANCE, 1.0) * (volumes_ml > 0)
        one = int(rng.choice(len(volumes_ml), p=chances / chances.sum()))
        voxels = np.flatnonzero(clots.number == one)
        centre = np.array(np.unravel_index(clots.index[rng.choice(voxels)], patient.shape))
        ml = float(volumes_ml[one])
        return _Spec(patient, self._beside(centre, jump=1), name, ml)

    def _without(self, at_vessel: bool) -> _Spec:
        rng = self.rng
        patient = self._patient(with_clots=False)
        if at_vessel and len(patient.vessel):
            return _Spec(patient, self._beside(patient.vessel[rng.integers(len(patient.vessel))]), None)
        return _Spec(patient, patient.anywhere[rng.integers(len(patient.anywhere))], None)

    def _beside(self, centre: NDArray[np.int64], jump: int = 0) -> NDArray[np.int64]:
        """Anywhere in the window rather than in its middle."""
        reach = int(0.4 * self.settings.side)
        move = (self.rng.integers(-jump, jump + 1), *self.rng.integers(-reach, reach + 1, 2))
        moved: NDArray[np.int64] = centre + np.array(move)
        return moved

    def _rendered(self, specs: Sequence[_Spec]) -> Batch:
        pairs, side = self.settings.pairs, self.settings.side
        layers = [self._layers(spec) for spec in specs]
        # twins: the same layers again, without the clot
        order = [*(k for pair in range(pairs) for k in (pair, pair)), *range(pairs, len(specs))]
        groups = torch.tensor([*(k for pair in range(pairs) for k in (2 * pair,) * 2), *range(2 * pairs, len(order))])
        with_clot = torch.tensor([not (row < 2 * pairs and row % 2) for row in range(len(order))])

        def stacked(name: str) -> Tensor:
            nothing = torch.zeros(SLICES, side, side)
            return torch.stack([layers[k].get(name, nothing) for k in order])

        clots = stacked("clots") * with_clot[:, None, None, None]
        real = torch.tensor([specs[k].patient.real for k in order])
        plain = torch.rand(len(order), generator=self.renderer.generator) < self.settings.plain_share
        plain &= torch.arange(len(order)) >= 2 * pairs
        hu = torch.zeros_like(clots)
        for is_real in (False, True):
            rows = torch.where(real == is_real)[0]
            if len(rows) == 0:
                continue
            _, inverse = torch.unique(groups[rows], return_inverse=True)
            names = ("hu", "blood", "arteries", "radius") if is_real else ("tissue", "arteries", "veins")
            part = {name: stacked(name)[rows] for name in names}
            if is_real:
                windows = RealWindows(part["hu"], part["blood"], part["arteries"] / 255, clots[rows] / 255,
                                      part["radius"] / 10)  # fmt: skip
                hu[rows] = self.renderer.real(windows, inverse, self.settings.varied)
            else:
                drawn = DrawnWindows(part["tissue"], part["arteries"] / 255, part["veins"] / 255, clots[rows] / 255,
                                     ~plain[rows])  # fmt: skip
                hu[rows] = self.renderer.drawn(drawn, inverse)
        seen = torch.zeros_like(hu)
        firsts = torch.arange(0, 2 * pairs, 2)
        seen[firsts] = ((hu[firsts + 1] - hu[firsts]) / SEEN_HU).clamp(0, 1)
        scanned = self.renderer.scanned(hu, groups, real)
        hu = scanned if self.settings.varied else torch.where(real[:, None, None, None], hu, scanned)
        low, high = self.settings.hu_window
        slabs, target = ((hu - low) / (high - low)).clamp(0, 1), cell_targets(clots / 255, seen)
        if self.settings.varied:
            slabs, target = self._flipped(slabs, target, groups)
        clot_ml = torch.tensor([specs[k].clot_ml for k in order]) * with_clot
        return Batch(slabs, target, clot_ml, groups, pairs)

    def _layers(self, spec: _Spec) -> dict[str, Tensor]:
        """What a window needs, bent: every array of the patient and the clots, ``(5, side, side)``."""
        patient, side = spec.patient, self.settings.side
        where = self._bent(patient.flat)  # (1 or 5, side, side, 2): row and column from the centre
        at = torch.from_numpy(spec.centre[1:].astype(np.float32)) + where
        low = at.amin((0, 1, 2)).floor().int() - 1
        high = at.amax((0, 1, 2)).ceil().int() + 2
        rows, columns = slice(int(low[0]), int(high[0])), slice(int(low[1]), int(high[1]))
        if patient.flat:
            levels = np.arange(SLICES)
        else:
            levels = np.clip(np.arange(SLICES) - SLICES // 2 + spec.centre[0], 0, patient.shape[0] - 1)
        inner = [np.clip(np.arange(cut.start, cut.stop), 0, size - 1)
                 for cut, size in zip((rows, columns), patient.shape[1:], strict=True)]  # fmt: skip
        box = [slice(int(index[0]), int(index[-1]) + 1) for index in inner]
        first = [index - part.start for index, part in zip(inner, box, strict=True)]
        shape = torch.tensor([columns.stop - columns.start, rows.stop - rows.start])
        corner = torch.tensor([columns.start, rows.start])
        grid = (at.flip(-1) - corner + 0.5) / shape * 2 - 1
        grid = grid.expand(SLICES, side, side, 2)

        def cut(array: NDArray[np.generic]) -> Tensor:
            part = np.stack([array[level, box[0], box[1]] for level in levels])
            return torch.from_numpy(part[:, first[0]][:, :, first[1]].astype(np.float32))

        names = [name for name in patient.arrays if name != "tissue"]
        smooth = torch.stack([cut(patient.arrays[name]) for name in names], 1)
        if spec.clots is not None:
            clots = torch.from_numpy(patient.clots(levels, rows, columns, spec.clots).astype(np.float32))
            smooth = torch.cat([smooth, clots[:, None]], 1)
            names = [*names, "clots"]
        moved = F.grid_sample(smooth, grid, mode="bilinear", padding_mode="border", align_corners=False)
        layers = {name: moved[:, place] for place, name in enumerate(names)}
        if "tissue" in patient.arrays:
            tissue = cut(patient.arrays["tissue"])[:, None] % SPAN_BIT
            layers["tissue"] = F.grid_sample(tissue, grid, "nearest", "border", align_corners=False)[:, 0]
        return layers

    def _bent(self, flat: bool) -> Tensor:
        """Rows and columns of the window's pixels from its centre: turned, scaled, bent; drifting where flat."""
        rng, side = self.rng, self.settings.side
        angle = np.deg2rad(rng.uniform(-1, 1) * self.settings.turn_degrees)
        scale = rng.uniform(*self.settings.scale) * np.exp(rng.uniform(-0.07, 0.07, 2))
        steps = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        down, right = torch.meshgrid(steps, steps, indexing="ij")
        row = (np.cos(angle) * down - np.sin(angle) * right) * scale[0]
        column = (np.sin(angle) * down + np.cos(angle) * right) * scale[1]
        bend = torch.from_numpy(rng.normal(0, rng.uniform(0.5, 4), (1, 2, 6, 6)).astype(np.float32))
        bend = F.interpolate(bend, (side, side), mode="bicubic", align_corners=True)
        where = torch.stack([row, column], -1)[None] + bend.permute(0, 2, 3, 1)
        if flat:
            walk = np.cumsum(rng.normal(size=(SLICES, 2)), 0)
            where = where + torch.from_numpy((walk - walk[SLICES // 2]).astype(np.float32))[:, None, None]
        return where

    def _flipped(self, slabs: Tensor, target: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        chances = torch.rand(len(slabs), 3, generator=self.renderer.generator)[groups] < torch.tensor([0.5, 0.15, 0.5])
        for row, (sides, upright, along) in enumerate(chances.tolist()):
            for wanted, axis in ((sides, -1), (upright, -2)):
                if wanted:
                    slabs[row], target[row] = slabs[row].flip(axis), target[row].flip(axis)
            if along:
                slabs[row] = slabs[row].flip(0)
        return slabs, target


def cell_targets(clots: Tensor, seen: Tensor) -> Tensor:
    """``(batch, cells, cells)``: 1 a clot, 0 none, -1 not asked.

    Args:
        clots: share of every voxel, ``(batch, 5, side, side)``.
        seen: how clearly each of them shows, 0 to 1.
    """
    touched, shown = _pixels(clots), _pixels(seen)
    middle = slice(SLICES // 2 - 1, SLICES // 2 + 2)
    target = torch.full_like(touched[:, 0], ASK_NOT)
    target[shown[:, middle].amax(1) >= LEAST_PIXELS] = 1
    target[touched.sum(1) < 0.25] = 0
    return target


def _pixels(values: Tensor) -> Tensor:
    """Sum over the pixels of every cell, ``(batch, 5, cells, cells)``."""
    batch, slices, side, _ = values.shape
    cells = side // ENCODER_STRIDE
    return values.reshape(batch, slices, cells, ENCODER_STRIDE, cells, ENCODER_STRIDE).sum((3, 5))
