"""What the starter's windows are cut from: chests drawn round real vessel trees, and real CT, with sets of clots.

One folder for each patient, read by memory map: ``arteries``, ``tissue``, ``veins`` (drawn) or ``hu``, ``blood``,
``radius`` (real) as ``.npy`` on a grid of 2.5 x 0.7 x 0.7 mm, ``clots.npz`` and ``places.npz``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from pe_app.common.files import replacing
from pe_app.phantom.chest import draw_chest
from pe_app.phantom.clots import Arteries, Burden, draw_clots
from pe_app.phantom.trees import VesselTree, paired, read_tree

log = logging.getLogger(__name__)

SPACING_MM = (2.5, 0.7, 0.7)
SETS: Mapping[Burden, int] = {"real": 8, "small": 8}
"""Sets of clots of every patient."""

SPAN_BIT = 128
"""Added to the tissue between the lungs' outermost points."""


@dataclass(frozen=True, eq=False)
class ClotSet:
    """One patient's clots: voxels in order of their index, how much of each is clot (0 to 255), and of which clot."""

    index: NDArray[np.int32]
    share: NDArray[np.uint8]
    number: NDArray[np.uint8]


def write_drawn(folder: Path, name: str, out: Path) -> None:
    """Ingredients of a chest round one tree of a folder of vessel masks."""
    rng = np.random.default_rng([ord(letter) for letter in name])
    fine = read_tree(folder, name)  # clots are grown on slices half as far apart
    tree = VesselTree(name, paired(fine.arteries), paired(fine.veins), paired(fine.lungs), SPACING_MM)
    tissue, span = draw_chest(tree, rng)
    arteries = Arteries.of(fine.arteries > 127, fine.spacing_mm)
    sets: dict[str, ClotSet] = {}
    for burden, count in SETS.items():
        for number in range(count):
            drawn = np.zeros(fine.arteries.shape, np.uint8)
            for clot_number, clot in enumerate(draw_clots(arteries, rng, burden), start=1):
                drawn[tuple(arteries.voxels[clot.members].T)] = clot_number
            share = paired(np.where(drawn > 0, 255, 0).astype(np.uint8))
            sets[f"{burden}_{number}"] = _clot_set(share, np.maximum(drawn[0::2], drawn[1::2]))
    arrays = {"arteries": tree.arteries, "veins": tree.veins, "tissue": tissue | (span.astype(np.uint8) * SPAN_BIT)}
    _write(out / name, arrays, sets, span, tree.arteries)


def write_real(name: str, hu: NDArray[np.float32], arteries: NDArray[np.bool_] | None, out: Path) -> None:
    """Ingredients of a real CT on the grid; without arteries it is a scan without contrast, and has no clots."""
    rng = np.random.default_rng([ord(letter) for letter in name])
    hu = np.clip(hu, -1024, 2000).astype(np.float32)
    sets: dict[str, ClotSet] = {}
    share = np.zeros(hu.shape, np.uint8)
    arrays: dict[str, NDArray[np.generic]] = {"hu": hu.astype(np.int16)}
    if arteries is not None:
        tree = Arteries.of(arteries, SPACING_MM)
        for burden, count in SETS.items():
            for number in range(count):
                drawn = np.zeros(hu.shape, np.uint8)
                for clot_number, clot in enumerate(draw_clots(tree, rng, burden), start=1):
                    drawn[tuple(tree.voxels[clot.members].T)] = clot_number
                sets[f"{burden}_{number}"] = _clot_set(np.where(drawn > 0, 255, 0).astype(np.uint8), drawn)
        share[arteries] = 255
        width = 2 / np.array(SPACING_MM)
        near = ndimage.gaussian_filter(arteries.astype(np.float32), width)
        blood = ndimage.gaussian_filter(np.where(arteries, hu, 0), width) / np.maximum(near, 0.01)
        radius = np.zeros(hu.shape, np.uint8)
        radius[tuple(tree.voxels.T)] = np.minimum(tree.radius_mm * 10, 255)
        arrays["blood"] = np.where(near > 0.01, np.clip(blood, 0, 1500), 0).astype(np.int16)
        arrays["radius"] = radius
    arrays["arteries"] = share
    _write(out / name, arrays, sets, ndimage.binary_opening(hu < -500), share)


def on_grid(image: sitk.Image, spacing_z_mm: float = SPACING_MM[0]) -> NDArray[np.float32]:
    """A CT on the grid, (slices, rows, columns), slices feet to head."""
    image = sitk.DICOMOrient(image, "LPS")
    new = np.array([SPACING_MM[2], SPACING_MM[1], spacing_z_mm])
    size = np.maximum((np.array(image.GetSize()) * np.array(image.GetSpacing()) / new).astype(int), 1)
    moved = sitk.Resample(
        sitk.Cast(image, sitk.sitkFloat32), size.tolist(), sitk.Transform(), sitk.sitkLinear, image.GetOrigin(),
        new.tolist(), image.GetDirection(), -1024.0,
    )  # fmt: skip
    hu: NDArray[np.float32] = sitk.GetArrayFromImage(moved)
    return hu


def bright_vessels(
    hu: NDArray[np.float32], least_hu: float = 140.0, smallest_mm3: float = 60.0, whole_chest: bool = True
) -> NDArray[np.bool_]:
    """Enhanced vessels in the lungs and at their hila; arteries and veins are not told apart.

    Args:
        hu: on the grid.
        least_hu: of blood in a thin vessel: one that lung darkens further shows no clot.
        smallest_mm3: a connected vessel has at least this volume.
        whole_chest: False where the image ends within the lungs: air at its edge is then lung, too.
    """
    soft = ndimage.gaussian_filter(hu, (0.2, 0.45, 0.45))
    near = np.zeros(hu.shape, bool)
    for level, plane in enumerate(hu[:, ::2, ::2]):
        regions, count = ndimage.label(plane < -400)
        edge = np.unique(np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]]))
        size = np.bincount(regions.ravel())
        kept = [k for k in range(1, count + 1) if not (whole_chest and k in edge) and size[k] * 1.96 > 600]
        lungs = np.pad(np.isin(regions, kept), 12)
        if not lungs.any():
            continue
        grown = ndimage.distance_transform_edt(~lungs) <= 9
        closed = (ndimage.distance_transform_edt(grown) > 9)[12:-12, 12:-12]
        near[level] = np.repeat(np.repeat(closed, 2, 0), 2, 1)[: hu.shape[1], : hu.shape[2]]
    vessels = (soft > least_hu) & (soft < 900) & near
    regions, _ = ndimage.label(vessels, np.ones((3, 3, 3)))
    large = np.bincount(regions.ravel())[1:] * float(np.prod(SPACING_MM)) > smallest_mm3
    kept_mask: NDArray[np.bool_] = np.isin(regions, 1 + np.flatnonzero(large))
    return kept_mask


def _clot_set(share: NDArray[np.uint8], number: NDArray[np.uint8]) -> ClotSet:
    index = np.flatnonzero(share)
    return ClotSet(index.astype(np.int32), share.ravel()[index], number.ravel()[index])


def _write(
    folder: Path,
    arrays: Mapping[str, NDArray[np.generic]],
    sets: Mapping[str, ClotSet],
    span: NDArray[np.bool_],
    arteries: NDArray[np.uint8],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    flat = {f"{name}.{part}": getattr(clots, part) for name, clots in sets.items() if len(clots.index)
            for part in ("index", "share", "number")}  # fmt: skip
    np.savez(folder / "clots.npz", **flat)
    anywhere = np.argwhere(span[:, ::4, ::4]) * (1, 4, 4)
    vessel = np.argwhere(arteries[:, ::2, ::2] > 127) * (1, 2, 2)
    with replacing(folder / "places.npz") as temporary, temporary.open("wb") as file:  # last: the folder is complete
        np.savez(file, anywhere=anywhere.astype(np.int16), vessel=vessel.astype(np.int16))
