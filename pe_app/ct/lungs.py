"""Where the lung begins and ends along the body axis: what stage II resizes and the reading schedule covers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pe_app.common.errors import InputError
from pe_app.ct.volume import Volume

AIR_HU = -400
"""Below this a voxel is lung or gas: half-way between soft tissue and inflated lung."""
OPEN_AIR_HU = -930
"""Smoothed air outside the body stays below this, lung (even where the field of view cuts it) above."""
GAS_HU = -945
"""A small region with a lower median is pure gas (trachea, stomach, bowel); parenchyma holds blood and tissue."""
LARGE_REGION_MM2 = 2500.0
"""A region of a slice above this may be lung that emphysema makes nearly as dark as gas; a trachea has 300."""
LARGE_GAS_HU = -970
"""The median below which a large region is gas too."""
GRID_MM = 2.7
"""Working grid in the slice: fine enough for an apex of 1 cm, coarse enough for a study in under a second."""
STEP_MM = 2.6
"""Slices are skipped while they stay closer than this."""
LUNG_AREA_MM2 = 300.0
"""A slice contains lung from this area on; below it, it is the tip of an apex or recess, or a wrong voxel."""
LUNG_VOLUME_MM3 = 50_000.0
"""Least volume of lung, that of one slab through it; less is bowel or a cut from elsewhere."""

_IN_SLICE = ndimage.generate_binary_structure(3, 1)
_IN_SLICE[[0, 2]] = False  # neighbours within the slice only


class SliceRange(NamedTuple):
    """Slices of a CT from the feet to the head, both ends included."""

    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Lungs:
    """Where the lung lies in a CT, on a coarse grid.

    Attributes:
        mask: lung on every n-th slice, row and column.
        step: those three n: ``voxels[::a, ::b, ::c]`` is the mask's grid.
        areas_mm2: ``(slices,)``, area of lung on every slice of the CT.
        slice_range: first and last slice with lung; None where there is no lung.
    """

    mask: NDArray[np.bool_]
    step: tuple[int, int, int]
    areas_mm2: NDArray[np.float64]
    slice_range: SliceRange | None


def lung_range(volume: Volume, lungs: Lungs | None = None) -> SliceRange:
    """First and last slice that contain lung; of ``lungs``, where they were found already.

    Air outside the body, gas in stomach and bowel, foam in the table, and slices where the trachea alone is filled
    with air do not count.

    Raises:
        InputError: if no lung is found.
    """
    found = (lungs or find_lungs(volume)).slice_range
    if found is None:
        raise InputError(
            f"{volume.name}: no lung found in {volume.shape[0]} slices from z {volume.slice_z_mm[0]:.1f} to "
            f"{volume.slice_z_mm[-1]:.1f} mm; is it a CT of the chest?"
        )
    return found


def find_lungs(volume: Volume) -> Lungs:
    """The lungs of a CT by threshold and shape; good for where they begin and end, not for their outline."""
    slices_mm, rows_mm, columns_mm = volume.spacing_mm
    step = max(1, int(STEP_MM / slices_mm)), max(1, round(GRID_MM / rows_mm)), max(1, round(GRID_MM / columns_mm))
    hu = volume.voxels[:: step[0], :: step[1], :: step[2]].astype(np.float32)
    pixel_mm2 = rows_mm * columns_mm * step[1] * step[2]

    inside_air = (hu < AIR_HU) & ~_open_air(hu)
    mask = _without_gas(hu, _lung_components(hu, inside_air, pixel_mm2 * slices_mm * step[0]), pixel_mm2)
    areas = np.repeat(np.count_nonzero(mask, axis=(1, 2)) * pixel_mm2, step[0])[: volume.shape[0]]

    runs, count = ndimage.label(areas >= LUNG_AREA_MM2)
    if count == 0:
        return Lungs(mask, step, areas, None)
    lung = np.flatnonzero(runs == runs[areas.argmax()])  # one run: lung has no gaps along the body
    return Lungs(mask, step, areas, SliceRange(int(lung[0]), int(lung[-1])))


def _open_air(hu: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Air outside the body, slice by slice (the mouth joins it to the lung in space), with the skin's soft edge."""
    smooth = ndimage.uniform_filter(hu, (1, 3, 3))
    air = smooth < OPEN_AIR_HU
    frame = np.zeros_like(air)
    frame[:, [0, -1], :] = frame[:, :, [0, -1]] = True
    labels, count = ndimage.label(air, _IN_SLICE)
    touches = np.zeros(count + 1, dtype=bool)
    touches[labels[frame]] = True
    touches[0] = False
    return np.asarray(ndimage.binary_dilation(touches[labels], _IN_SLICE, iterations=2))


def _lung_components(hu: NDArray[np.float32], air: NDArray[np.bool_], voxel_mm3: float) -> NDArray[np.bool_]:
    """The pieces of enclosed air that are lung: large, not pure gas, and lined with soft tissue."""
    labels, _ = ndimage.label(air)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    lung = np.zeros_like(air)
    largest = 0
    for label in np.argsort(sizes)[::-1][:12]:
        if sizes[label] * voxel_mm3 < LUNG_VOLUME_MM3 or sizes[label] < 0.05 * largest:
            break
        piece = labels == label
        if np.median(hu[piece]) > GAS_HU - 20 and _lined_with_tissue(hu, air, piece):
            lung |= piece
            largest = max(largest, int(sizes[label]))
    return lung


def _lined_with_tissue(hu: NDArray[np.float32], air: NDArray[np.bool_], piece: NDArray[np.bool_]) -> bool:
    """Whether ``piece`` lies behind a chest wall: beyond the shell of a table or blanket is open air again.

    Looked at 8 to 11 mm outside of the piece. Where a narrow field of view cuts the lung, at least half of its wall
    is to be seen; a table shows less.
    """
    margin = ((0, 0), (4, 4), (4, 4))
    near = ndimage.binary_dilation(np.pad(piece, margin), _IN_SLICE, iterations=2)
    behind = ndimage.binary_dilation(near, _IN_SLICE, iterations=2) & ~near & ~np.pad(air, margin)
    seen = behind[:, 4:-4, 4:-4]
    tissue = np.count_nonzero(hu[seen] > -300)
    return bool(tissue > 0.75 * np.count_nonzero(seen)) and bool(tissue > 0.5 * np.count_nonzero(behind))


def _without_gas(hu: NDArray[np.float32], lung: NDArray[np.bool_], pixel_mm2: float) -> NDArray[np.bool_]:
    """Drop the trachea, and gas that touches the lung's component: regions of a slice that are mostly pure gas."""
    labels, count = ndimage.label(lung, _IN_SLICE)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    small = sizes * pixel_mm2 < LARGE_REGION_MM2
    # more than half of the voxels below a limit: the median is, without sorting
    keep = np.bincount(labels[hu < GAS_HU], minlength=count + 1) < sizes / 2
    keep |= ~small & (np.bincount(labels[hu < LARGE_GAS_HU], minlength=count + 1) < sizes / 2)
    keep[0] = False
    return np.asarray(keep[labels])
