"""Masks that were drawn on the stored pixels of a DICOM series, laid onto the Volume that was read from it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pe_app.common.errors import InputError
from pe_app.ct.volume import Volume, canonical_volume


def from_stored(mask: NDArray[np.generic], volume: Volume, name: str) -> NDArray[np.generic]:
    """A mask in the order of the series' instances, from the feet to the head, on the Volume's grid.

    Args:
        mask: ``(slices, rows, columns)``, rows and columns as the instances store them.
        volume: read from that series.
        name: of the mask, for messages.

    Raises:
        InputError: if it has another number of slices, rows or columns.
    """
    source = volume.source
    if source is None:
        raise TypeError(f"{volume.name} was not read from DICOM")
    stored = (len(source.instances), *source.matrix)
    if mask.shape != stored:
        raise InputError(
            f"{name}: is {_by(mask.shape)}, but the series stores {_by(stored)}: they are not of one study"
        )
    positions = np.array([instance.position_mm for instance in source.instances])
    rows_mm, columns_mm = source.pixel_mm
    affine = np.eye(4)
    affine[:3, 0] = (positions[-1] - positions[0]) / max(len(positions) - 1, 1)
    affine[:3, 1] = np.array(source.orientation[3:]) * rows_mm  # the second triple runs down a column
    affine[:3, 2] = np.array(source.orientation[:3]) * columns_mm
    affine[:3, 3] = positions[0]
    placed = canonical_volume(mask, affine, name)
    if not volume.same_grid(placed, tolerance_mm=0.5):
        raise InputError(f"{name}: cannot be laid onto {volume.name}: the series' positions contradict each other")
    return placed.voxels


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
