"""Real enhanced CT to paint emboli into: whole chests, single slices drawn out to a stack, and variations of both."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from pe_app.common.errors import InputError
from pe_app.ct.volume import PADDING_HU, Volume, axial_affine
from pe_app.ct.volume_io import image_from_volume, read_mask, read_volume, volume_from_image
from pe_app.phantom.painting import find_arteries

log = logging.getLogger(__name__)

CHEST_FIELD_MM = 340.0
"""A usual field of view."""

SINGLE_SLICE_SPACING_MM = 2.5
SINGLE_SLICE_COUNT = 28


@dataclass(frozen=True)
class Background:
    """A real enhanced CT to paint into, and its vessels."""

    name: str
    volume: Volume
    arteries: Volume


@cache
def whole_chest(argument: str) -> Background:
    """From ``CT`` or ``CT,ARTERIES``; without arteries enhanced vessels are searched."""
    ct, _, arteries = argument.partition(",")
    volume = read_volume(ct)
    mask = read_mask(arteries, volume) if arteries else find_arteries(volume)
    return Background(Path(ct).resolve().parent.name, _on_a_chest(volume, PADDING_HU), _on_a_chest(mask, 0))


def _on_a_chest(volume: Volume, outside: int) -> Volume:
    """A cropped CT in a field of view as wide as a chest's, so that its pixels are as large as in other studies."""
    missing = [max(0, math.ceil((CHEST_FIELD_MM / step - count) / 2)) for step, count in
               zip(volume.spacing_mm[1:], volume.shape[1:], strict=True)]  # fmt: skip
    margins = ((0, 0), *((side, side) for side in missing))
    affine = volume.affine.copy()
    affine[:3, 3] = volume.to_lps_mm((0, -missing[0], -missing[1]))
    return Volume(np.pad(volume.voxels, margins, constant_values=outside), affine, volume.name)


def single_slices(folder: Path) -> list[Path]:
    """Files of a folder of single slices of different patients."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in (".dcm", ""))


def drawn_out(path: Path, rng: np.random.Generator) -> Background | None:
    """One slice as a short stack whose anatomy drifts from slice to slice; None where no vessel is found in it.

    Not a chest: its vessels all run along z. But its tissue, noise and scanner are those of another real patient.
    """
    image = sitk.ReadImage(str(path))
    plane = sitk.GetArrayFromImage(image)
    if plane.ndim == 3:
        plane = plane[0]
    plane = np.clip(plane, PADDING_HU, 3071).astype(np.float32)
    count, size = SINGLE_SLICE_COUNT, plane.shape
    drift = [_drift(rng, count, size, amplitude=rng.uniform(2, 5)) for _ in range(2)]
    rows, columns = np.meshgrid(*(np.arange(side, dtype=np.float32) for side in size), indexing="ij")
    stack = np.stack(
        [
            ndimage.map_coordinates(plane, (rows + down, columns + right), order=1, mode="nearest")
            for down, right in zip(*drift, strict=True)
        ]
    )
    spacing = (SINGLE_SLICE_SPACING_MM, *image.GetSpacing()[1::-1])
    voxels = np.rint(stack).astype(np.int16)
    volume = Volume(voxels, axial_affine(spacing, (0.0, 0.0, 0.0)), path.stem)
    try:
        arteries = find_arteries(volume)
        return Background(path.stem, volume, arteries) if arteries.voxels.any() else None
    except InputError as error:
        log.info("%s is not painted into: %s", path.name, error)
        return None


def _drift(rng: np.random.Generator, count: int, size: tuple[int, ...], amplitude: float) -> list[NDArray[np.float32]]:
    """Smooth displacements in pixels, one plane a slice, that change slowly along the stack."""
    coarse = ndimage.gaussian_filter(rng.standard_normal((count, 16, 16)), (3, 1.5, 1.5))
    coarse *= amplitude / max(float(coarse.std()), 1e-6)
    zoom = [side / 16 for side in size]
    return [ndimage.zoom(plane, zoom, order=1).astype(np.float32) for plane in coarse]


def varied(background: Background, rng: np.random.Generator) -> Background:
    """Another patient, nearly: bent, turned, scaled, moved; other contrast, kernel and noise.

    One real CT painted many times would teach its own anatomy; this takes some of that away, no more.
    """
    image = image_from_volume(background.volume)
    turn = sitk.Euler3DTransform()
    size = np.array(image.GetSize()) / 2
    turn.SetCenter(image.TransformContinuousIndexToPhysicalPoint(size.tolist()))
    turn.SetRotation(*np.deg2rad(rng.uniform((-4, -4, -10), (4, 4, 10))))
    turn.SetTranslation(rng.uniform((-15, -10, 0), (15, 10, 0)).tolist())
    scale = sitk.ScaleTransform(3, [*(rng.uniform(0.85, 1.15) for _ in range(2)), 1.0])
    scale.SetCenter(turn.GetCenter())
    bend = sitk.BSplineTransformInitializer(image, [4, 4, 4])
    bend.SetParameters(rng.normal(0, rng.uniform(1, 6), bend.GetNumberOfParameters()).tolist())
    all_three = sitk.CompositeTransform([turn, scale, bend])
    moved = sitk.Resample(image, image, all_three, sitk.sitkLinear, float(PADDING_HU), sitk.sitkFloat32)
    mask = image_from_volume(background.arteries)
    arteries = sitk.Resample(mask, mask, all_three, sitk.sitkNearestNeighbor)

    voxels = sitk.GetArrayFromImage(moved)
    inside = voxels > -1000
    bright = voxels > 120
    voxels[bright] = 120 + (voxels[bright] - 120) * rng.uniform(0.65, 1.35)
    sharpness = rng.uniform(-0.6, 0.9)
    blurred = ndimage.gaussian_filter(voxels, (0, 0.9, 0.9))
    voxels += sharpness * (voxels - blurred)  # below 0 as a soft kernel, above as a sharp one
    grain = ndimage.gaussian_filter(rng.standard_normal(voxels.shape, np.float32), (0, *2 * (rng.uniform(0.4, 0.9),)))
    voxels[inside] += rng.uniform(-15, 15) + (grain * (rng.uniform(2, 22) / grain.std()))[inside]
    volume = background.volume.with_voxels(np.clip(np.rint(voxels), PADDING_HU, 3071).astype(np.int16))
    return Background(background.name, volume, volume_from_image(arteries, "arteries"))
