"""HU of windows of a chest, drawn anew each time: bolus phase, mixing, clot, point spread, noise, motion, streaks.

All windows of a batch are rendered at once. Rows of a batch that share a group (twins: the same window with its clot
and without) share every draw, noise included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pe_app.phantom.chest import Tissue

NOT_SOLID = (Tissue.AIR, Tissue.LUNG, Tissue.AIRWAY)


@dataclass(frozen=True, eq=False)
class DrawnWindows:
    """Windows of drawn chests, each ``(batch, slices, rows, columns)``.

    Attributes:
        tissue: numbers of ``Tissue``.
        arteries, veins, clots: share of every voxel, 0 to 1.
        enhanced: ``(batch,)``, False for a scan without contrast.
    """

    tissue: Tensor
    arteries: Tensor
    veins: Tensor
    clots: Tensor
    enhanced: Tensor


@dataclass(frozen=True, eq=False)
class RealWindows:
    """Windows of real enhanced CT, each ``(batch, slices, rows, columns)``.

    Attributes:
        hu: as scanned.
        blood_hu: in vessels and near them, what the blood there has.
        arteries, clots: share of every voxel, 0 to 1.
        radius_mm: of the artery; 0 elsewhere.
    """

    hu: Tensor
    blood_hu: Tensor
    arteries: Tensor
    clots: Tensor
    radius_mm: Tensor


class Renderer:
    """Source of chance and the pictures made from it."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def drawn(self, windows: DrawnWindows, groups: Tensor) -> Tensor:
        """HU before point spread and noise, of drawn chests.

        Blood of the pulmonary arteries has 170 to 580 HU, mostly 260 or more; veins are darker (early), as bright or
        brighter (late); contrast mixes unevenly. A clot has 20 to 90 HU with texture and is never brighter than blood.
        """
        tissue, arteries, veins, clots = windows.tissue, windows.arteries, windows.veins, windows.clots
        batch, slices, rows, columns = arteries.shape
        draw = _Draws(self.generator, batch, groups)
        chance, phase = draw(0, 1), draw(0, 1)
        blood = torch.where(chance < 0.85, 260 + 320 * draw(0, 1) ** 1.3, draw(170, 260))
        vein = torch.where(
            phase < 0.5,
            blood * draw(0.55, 1),
            torch.where(phase < 0.92, blood * draw(0.9, 1.25), torch.minimum(draw(60, 170), blood)),
        )
        aorta = torch.where(draw(0, 1) < 0.3, draw(60, 180), blood * draw(0.5, 1.15))
        right = torch.where(draw(0, 1) < 0.3, draw(600, 1300), blood * draw(0.7, 1.6))
        left = torch.where(draw(0, 1) < 0.3, torch.minimum(draw(80, 200), blood), vein)
        plain = draw(30, 60)
        blood, vein, aorta, right, left = (
            torch.where(windows.enhanced, value, plain) for value in (blood, vein, aorta, right, left)
        )
        values = {
            Tissue.AIR: torch.full((batch,), -1000.0), Tissue.LUNG: draw(-900, -770), Tissue.SOFT: draw(15, 55),
            Tissue.FAT: draw(-110, -75), Tissue.BONE: draw(150, 420), Tissue.WALL: draw(30, 65), Tissue.AORTA: aorta,
            Tissue.RIGHT_HEART: right, Tissue.LEFT_HEART: left, Tissue.MYOCARDIUM: draw(50, 110),
            Tissue.FINE_VESSEL: torch.minimum(draw(-450, 120), blood), Tissue.AIRWAY: draw(-1000, -900),
            Tissue.OPACITY: draw(-20, 75), Tissue.NODE: draw(20, 75), Tissue.MUCUS: draw(0, 50),
        }  # fmt: skip
        calm = draw(0, 1) < 0.6  # a window of healthy lung
        for mimic, instead in ((Tissue.OPACITY, Tissue.LUNG), (Tissue.MUCUS, Tissue.AIRWAY), (Tissue.NODE, Tissue.FAT)):
            values[mimic] = torch.where(calm, values[instead], values[mimic])
        table = torch.stack([values[kind] for kind in Tissue], 1)
        hu = torch.gather(table, 1, tissue.long().flatten(1)).view_as(arteries)
        solid = torch.ones_like(hu)
        for kind in NOT_SOLID:
            solid[tissue == kind] = 0
        air = (tissue == Tissue.LUNG).float()
        shape = (batch, slices, rows, columns)
        patches, clouds = self._uneven(shape, 4)[groups], self._uneven(shape, 14)[groups]
        hu = (
            hu
            + patches * (solid * 10 + air * _per(draw(8, 45)) + 70 * (tissue == Tissue.BONE))
            + clouds * air * _per(draw(5, 40))
        )
        mixing = 1 + self._uneven(shape, 20)[groups] * _per(0.16 * draw(0, 1) ** 2 * windows.enhanced)
        hu = hu * (1 - veins) + veins * _per(vein) * (1 + 0.05 * clouds)
        hu = hu * (1 - arteries) + arteries * _per(blood) * mixing
        clot_hu = _per(draw(20, 90)) + 9 * self._uneven(shape, 5)[groups]
        return hu + torch.minimum(clots, arteries) * (clot_hu - _per(blood) * mixing).clamp(max=0)

    def real(self, windows: RealWindows, groups: Tensor, other_bolus: bool) -> Tensor:
        """HU of real windows with clots in their arteries, and another contrast of the blood if wanted.

        In thick arteries the blood is exchanged for clot, so that the scan's own noise stays; thin ones, where blood
        and wall mix in every voxel, become clot as a whole.
        """
        hu, blood, shape = windows.hu, windows.blood_hu, windows.hu.shape
        draw = _Draws(self.generator, shape[0], groups)
        if other_bolus:
            gain = _per(draw(0.55, 1.2))
            hu, blood = (torch.where(x > 120, 120 + (x - 120) * gain, x) for x in (hu, blood))
        soft = torch.full((shape[0],), 0.6)
        clot = blurred(windows.clots, soft)
        share = torch.where(
            clot > 0.004, (clot / blurred(windows.arteries, soft).clamp(min=0.15)).clamp(0, 1), torch.zeros(())
        )
        thin = ((4 - windows.radius_mm) / 2).clamp(0, 1)
        grain = blurred(torch.randn(shape, generator=self.generator), torch.full((shape[0],), 0.7))[groups]
        clot_hu = _per(draw(20, 90)) + 9 * self._uneven(shape, 5)[groups] + thin * grain * 45
        return hu - share * (thin * hu + (1 - thin) * blood - clot_hu).clamp(min=0)

    def scanned(self, hu: Tensor, groups: Tensor, real: Tensor) -> Tensor:
        """Point spread, kernel, noise and artefacts; little of them where ``real`` (batch,), which has its own."""
        batch, _, rows, columns = hu.shape
        draw = _Draws(self.generator, batch, groups)
        hu = blurred(hu, torch.where(real, 0.05 + 0.8 * (draw(0, 1) - 0.6).clamp(min=0), draw(0.45, 1.05)))
        hu = mixed_along_z(hu, draw(0, 0.2) * ~real)
        moved = torch.where(draw(0, 1) < 0.06, draw(0.2, 0.5), torch.zeros(batch))
        if moved.any():  # the heart beat meanwhile: edges appear twice
            hu = hu + _per(moved) * (torch.roll(hu, (2, 3), (2, 3)) - hu)
        sharp = torch.where(draw(0, 1) < 0.4, draw(0.2, 1), torch.zeros(batch))
        hu = hu + _per(sharp) * (hu - blurred(hu, torch.full((batch,), 1.0)))
        amount = torch.where(real, 18 * draw(0, 1) ** 2, torch.where(draw(0, 1) < 0.5, draw(8, 20), draw(20, 50)))
        noise = self._noise(hu.shape)[groups] * _per(amount) * (1 - 0.35 * (hu < -500).float())
        streaks = torch.where(draw(0, 1) < 0.06, draw(10, 40), torch.zeros(batch))
        down, right = torch.arange(rows)[:, None], torch.arange(columns)[None]
        waves = (0.15 * down + 0.1 * right)[None] * draw(0.5, 3)[:, None, None] + draw(0, 6)[:, None, None]
        waves = torch.sin(waves + 2 * self._uneven((batch, 1, rows, columns), 32)[groups, 0])[:, None]
        return hu + noise + _per(streaks) * waves + _per(draw(-25, 25))

    def _noise(self, shape: tuple[int, ...]) -> Tensor:
        """Noise of standard deviation 1 with the texture of a kernel: directional, band-passed, correlated along z."""
        batch = shape[0]
        draw = _Draws(self.generator, batch, torch.arange(batch))
        noise = blurred(torch.randn(shape, generator=self.generator), draw(0.3, 1.1), draw(0.3, 1.1))
        noise = noise - _per(draw(0, 0.9)) * F.avg_pool2d(noise, 5, 1, 2)
        noise = mixed_along_z(noise, draw(0, 0.25))
        return noise / noise.std((1, 2, 3), keepdim=True)

    def _uneven(self, shape: tuple[int, ...], pixels: int) -> Tensor:
        """Random values that change over so many pixels."""
        batch, slices, rows, columns = shape
        small = (batch, slices, max(rows // pixels, 2), max(columns // pixels, 2))
        values = torch.randn(small, generator=self.generator)
        return F.interpolate(values, (rows, columns), mode="bilinear", align_corners=False)


class _Draws:
    """Uniform numbers ``(batch,)``, the same within a group."""

    def __init__(self, generator: torch.Generator, batch: int, groups: Tensor) -> None:
        self.generator, self.batch, self.groups = generator, batch, groups

    def __call__(self, low: float, high: float) -> Tensor:
        return (torch.rand(self.batch, generator=self.generator) * (high - low) + low)[self.groups]


def blurred(images: Tensor, sigma: Tensor, sigma_columns: Tensor | None = None, reach: int = 3) -> Tensor:
    """Gaussian blur in the plane of ``(batch, slices, rows, columns)``, each of the batch with its own width (pixels).

    Args:
        images: what to blur.
        sigma: ``(batch,)``.
        sigma_columns: ``(batch,)`` along a row where it differs from that along a column.
        reach: pixels to either side.
    """
    across = sigma if sigma_columns is None else sigma_columns
    return _weighted(_weighted(images, _gaussian(across, reach), -1), _gaussian(sigma, reach), -2)


def mixed_along_z(images: Tensor, weight: Tensor) -> Tensor:
    """Every slice with so much (batch,) of each neighbour mixed in."""
    padded = torch.cat([images[:, :1], images, images[:, -1:]], 1)
    share = _per(weight)
    return (1 - 2 * share) * images + share * (padded[:, :-2] + padded[:, 2:])


def _gaussian(sigma: Tensor, reach: int) -> Tensor:
    away = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-(away**2) / (2 * sigma[:, None] ** 2 + 1e-6))
    return kernel / kernel.sum(1, keepdim=True)


def _weighted(images: Tensor, kernel: Tensor, axis: int) -> Tensor:
    reach = kernel.shape[1] // 2
    padded = F.pad(images, (reach, reach, 0, 0) if axis == -1 else (0, 0, reach, reach), "replicate")
    size = images.shape[axis]
    total = torch.zeros_like(images)
    for k in range(kernel.shape[1]):
        total.addcmul_(padded.narrow(axis, k, size), _per(kernel[:, k]))
    return total


def _per(values: Tensor) -> Tensor:
    """``(batch,)`` as a factor of images."""
    return values.to(torch.float32)[:, None, None, None]
