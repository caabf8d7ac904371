"""A CT (or a map on a grid) with its place in the patient: the first noun that every other module speaks of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pe_app.ct.source_series import SourceSeries

PADDING_HU = -1024
"""Air; stands for everything that the scanner did not measure."""


@dataclass(frozen=True, eq=False)
class Volume:
    """One 3-D array with the affine that lays it into the patient.

    The order is canonical: ``voxels[slice, row, column]``, slices from the feet to the head, rows from front to
    back, columns from the patient's right to left. World coordinates are LPS millimetres, as in DICOM and ITK.

    Attributes:
        voxels: ``(slices, rows, columns)``; HU as int16 for a CT, other numbers for masks and attention.
        affine: ``(4, 4)``; ``affine @ (slice, row, column, 1)`` is the LPS position in mm of that voxel's centre.
        name: how messages call it, e.g. ``series 1.2.840`` or a file name; never a patient's name.
        source: the DICOM series that the grid came from, where it is known.

    Raises:
        ValueError: if the array is not 3-D, the affine is singular, or the axes are not in canonical order.
    """

    voxels: NDArray[np.generic]
    affine: NDArray[np.float64]
    name: str = "volume"
    source: SourceSeries | None = None

    def __post_init__(self) -> None:
        if self.voxels.ndim != 3 or 0 in self.voxels.shape:
            raise ValueError(f"{self.name}: expected a 3-D array with voxels, got shape {self.voxels.shape}")
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.allclose(affine[3], (0, 0, 0, 1)):
            raise ValueError(f"{self.name}: expected a finite 4 x 4 affine, got {affine.tolist()}")
        if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise ValueError(f"{self.name}: the affine is singular, two of its axes coincide")
        if (np.array([affine[2, 0], affine[1, 1], affine[0, 2]]) <= 0).any():
            raise ValueError(f"{self.name}: axes must run to the head, to the back and to the left")
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns."""
        return self.voxels.shape  # type: ignore[return-value]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between the centres of neighbouring voxels along (slice, row, column)."""
        slices, rows, columns = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(slices), float(rows), float(columns)

    @cached_property
    def slice_z_mm(self) -> NDArray[np.float64]:
        """``(slices,)``: LPS z of the centre of every slice, rising from the feet to the head."""
        slices, rows, columns = self.shape
        index = np.zeros((slices, 3))
        index[:, 0] = np.arange(slices)
        index[:, 1:] = (rows - 1) / 2, (columns - 1) / 2
        return self.to_lps_mm(index)[:, 2]

    def nearest_slice(self, z_mm: float) -> int:
        """Index of the slice whose centre is nearest to ``z_mm``; the first or last one outside the volume."""
        return int(np.abs(self.slice_z_mm - z_mm).argmin())

    def to_lps_mm(self, index: ArrayLike) -> NDArray[np.float64]:
        """LPS mm of (fractional) voxel indices ``(..., 3)`` in (slice, row, column) order."""
        positions: NDArray[np.float64] = np.asarray(index, dtype=np.float64) @ self.affine[:3, :3].T
        return positions + self.affine[:3, 3]

    def to_index(self, lps_mm: ArrayLike) -> NDArray[np.float64]:
        """Fractional voxel indices (slice, row, column) of LPS positions ``(..., 3)``; the inverse of to_lps_mm."""
        inverse = np.linalg.inv(self.affine)
        index: NDArray[np.float64] = np.asarray(lps_mm, dtype=np.float64) @ inverse[:3, :3].T
        return index + inverse[:3, 3]

    @cached_property
    def sha256(self) -> str:
        """Identity of the voxels: SHA-256 of the array as little-endian int16 in canonical order (C layout)."""
        return hashlib.sha256(np.ascontiguousarray(self.voxels, dtype="<i2").data).hexdigest()

    def with_voxels(self, voxels: NDArray[np.generic]) -> Volume:
        """Other voxels on the same grid, e.g. a mask of this CT."""
        if voxels.shape != self.shape:
            raise ValueError(f"{self.name}: a grid of {self.shape} cannot hold an array of {voxels.shape}")
        return Volume(voxels, self.affine, self.name, self.source)

    def same_grid(self, other: Volume, tolerance_mm: float = 0.05) -> bool:
        """Whether both have the same shape and every corner lies within ``tolerance_mm`` of the other's."""
        if self.shape != other.shape:
            return False
        corners = np.array(np.meshgrid(*((0, n - 1) for n in self.shape))).reshape(3, -1).T
        return bool(np.abs(self.to_lps_mm(corners) - other.to_lps_mm(corners)).max() <= tolerance_mm)


def canonical_volume(voxels: NDArray[np.generic], affine: ArrayLike, name: str = "volume") -> Volume:
    """An array in any order of axes as a Volume: axes swapped and flipped, never interpolated.

    Args:
        voxels: 3-D, any order and direction of axes.
        affine: ``(4, 4)``; ``affine @ (i, j, k, 1)`` is the LPS position in mm of ``voxels[i, j, k]``.
        name: how messages call the volume.

    Raises:
        ValueError: as Volume, where no order of the axes is canonical.
    """
    given = np.array(affine, dtype=np.float64)
    lengths = np.linalg.norm(given[:3, :3], axis=0)
    cosines = given[:3, :3] / np.where(lengths > 0, lengths, 1)
    # array axis 0 is to run along z, axis 1 along y, axis 2 along x: the best match of the six orders
    order = max(permutations(range(3)), key=lambda axes: sum(abs(cosines[2 - k, axes[k]]) for k in range(3)))
    turned = voxels.transpose(order)
    matrix = given[:, [*order, 3]]
    for axis in range(3):
        if matrix[2 - axis, axis] < 0:
            turned = np.flip(turned, axis)
            matrix[:, 3] += matrix[:, axis] * (turned.shape[axis] - 1)
            matrix[:, axis] *= -1
    return Volume(np.ascontiguousarray(turned), matrix, name)


def axial_affine(
    spacing_mm: tuple[float, float, float], origin_lps_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> NDArray[np.float64]:
    """Affine of an untilted axial volume: spacing along (slice, row, column), LPS position of voxel (0, 0, 0)."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2] = spacing_mm
    affine[:3, 3] = origin_lps_mm
    affine[3, 3] = 1
    return affine
