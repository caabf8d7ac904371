"""A patient's own arteries, veins and lungs, from masks, on the grid that a chest is drawn on.

Files as the vessel annotation of CAD-PE has them: ``NAME.nii.gz`` with 1 in pulmonary arteries and 2 in veins, and
``NAME_lungmask.nii.gz`` with the lungs above 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from pe_app.common.errors import InputError

ARTERY, VEIN = 1, 2
LUNG_ENDING = "_lungmask.nii.gz"

MARGIN_MM = 25.0
"""Kept round the lungs within a slice: the chest wall."""

SMOOTHING = 0.35
"""Standard deviation of the filter before a coarser grid samples a mask, in steps of that grid."""

Shares = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class VesselTree:
    """Arteries, veins and lungs of one patient: the share of every voxel that they take, 0 to 255.

    Attributes:
        name: of the patient's files.
        arteries, veins, lungs: ``(slices, rows, columns)``, slices feet to head.
        spacing_mm: (slice, row, column).
    """

    name: str
    arteries: Shares
    veins: Shares
    lungs: Shares
    spacing_mm: tuple[float, float, float]


def tree_names(folder: str | Path) -> tuple[str, ...]:
    """Patients of a folder of vessel masks.

    Raises:
        InputError: if there is none.
    """
    folder = Path(folder)
    names = sorted(path.name.removesuffix(LUNG_ENDING) for path in folder.glob(f"*{LUNG_ENDING}"))
    names = [name for name in names if (folder / f"{name}.nii.gz").is_file()]
    if not names:
        raise InputError(
            f"{folder}: no vessel trees: each patient needs NAME.nii.gz (1 artery, 2 vein) and NAME{LUNG_ENDING}"
        )
    return tuple(names)


def read_tree(folder: str | Path, name: str, spacing_mm: tuple[float, float, float] = (1.25, 0.7, 0.7)) -> VesselTree:
    """One patient's masks, cropped to the lungs with the chest wall and resampled without aliasing.

    Raises:
        InputError: if a file cannot be read, the two lie on different grids, or a label is missing.
    """
    folder = Path(folder)
    vessels, lungs = (_read(folder / file) for file in (f"{name}.nii.gz", f"{name}{LUNG_ENDING}"))
    labels, lung = sitk.GetArrayViewFromImage(vessels), sitk.GetArrayViewFromImage(lungs) > 0
    if labels.shape != lung.shape:
        raise InputError(
            f"{folder / name}: vessels have {labels.shape} voxels and lungs {lung.shape}: export both on one grid"
        )
    for what, label in (("artery (1)", ARTERY), ("vein (2)", VEIN)):
        if not (labels == label).any():
            raise InputError(f"{folder / name}.nii.gz: no voxel of {what}: give arteries as 1 and veins as 2")
    if not lung.any():
        raise InputError(f"{folder / name}{LUNG_ENDING}: the lung mask is empty")
    low, high = _lung_box(lung, vessels)
    step = np.array(spacing_mm[::-1])
    origin = vessels.TransformIndexToPhysicalPoint([int(v) for v in low])
    size = [int(v) for v in np.ceil((high - low) * np.array(vessels.GetSpacing()) / step)]
    size[2] += size[2] % 2
    box = tuple(slice(int(a), int(b) + 1) for a, b in zip(low[::-1], high[::-1], strict=True))

    def shares(mask: NDArray[np.bool_]) -> Shares:
        part = sitk.GetImageFromArray(np.ascontiguousarray(mask[box]).astype(np.uint8))
        part.SetSpacing(vessels.GetSpacing())
        part.SetDirection(vessels.GetDirection())
        part.SetOrigin(origin)
        return _resampled(part, size, step)

    return VesselTree(name, shares(labels == ARTERY), shares(labels == VEIN), shares(lung), spacing_mm)


def paired(shares: Shares) -> Shares:
    """Two neighbouring slices as one."""
    return np.asarray((shares[0::2].astype(np.uint16) + shares[1::2]) // 2, np.uint8)


def _read(path: Path) -> sitk.Image:
    try:
        return sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    except RuntimeError as error:
        raise InputError(f"{path}: cannot be read as an image: give a NIfTI file") from error


def _lung_box(lung: NDArray[np.bool_], image: sitk.Image) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last index (column, row, slice) of the lungs and the wall round them."""
    ends = []
    for axis in (2, 1, 0):
        there = np.flatnonzero(lung.any(tuple(k for k in range(3) if k != axis)))
        ends.append((there[0], there[-1]))
    margin = np.round(MARGIN_MM / np.array(image.GetSpacing())).astype(int) * (1, 1, 0)
    low, high = np.array(ends).T
    return np.maximum(low - margin, 0), np.minimum(high + margin, np.array(image.GetSize()) - 1)


def _resampled(mask: sitk.Image, size: list[int], step: NDArray[np.float64]) -> Shares:
    image = sitk.Cast(mask, sitk.sitkFloat32)
    for axis, (old, new) in enumerate(zip(mask.GetSpacing(), step, strict=True)):
        if old < 0.9 * new and image.GetSize()[axis] > 4:
            image = sitk.RecursiveGaussian(image, SMOOTHING * float(new), False, 0, axis)
    image = sitk.Resample(
        image, size, sitk.Transform(), sitk.sitkLinear, mask.GetOrigin(), step.tolist(), mask.GetDirection(), 0.0
    )
    shares: Shares = np.rint(np.clip(sitk.GetArrayViewFromImage(image), 0, 1) * 255).astype(np.uint8)
    return shares
