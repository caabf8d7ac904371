"""Simulated studies of real patients' vessel trees, bent anew, with clots of real size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray

from pe_app.ct.volume import Volume, axial_affine
from pe_app.phantom.chest import draw_chest
from pe_app.phantom.clots import Arteries, draw_clots
from pe_app.phantom.painting import place_in_chest
from pe_app.phantom.rendering import DrawnWindows, Renderer
from pe_app.phantom.scan import Phantom, describe_emboli
from pe_app.phantom.trees import VesselTree, paired, read_tree

SPACING_MM = (2.5, 0.7, 0.7)

BEND_MM = (1.0, 5.0)
"""Standard deviation of the displacements of a coarse mesh: another patient, nearly."""

HALF = 128
"""Share of a voxel, of 255, from which on it belongs to a mask."""


def make_tree_phantom(folder: Path, name: str, rng: np.random.Generator, positive: bool) -> Phantom:
    """A simulated study of one tree of a folder (``trees``).

    The same generator state gives the same study with and without emboli.

    Args:
        folder: vessel and lung masks.
        name: of the patient in it.
        rng: source of chance.
        positive: with emboli.

    Raises:
        InputError: if the masks cannot be used.
    """
    seeds = rng.integers(2**31, size=4)
    fine = bent(read_tree(folder, name), np.random.default_rng(seeds[0]))
    tree = VesselTree(name, paired(fine.arteries), paired(fine.veins), paired(fine.lungs), SPACING_MM)
    numbers = np.zeros(fine.arteries.shape, np.uint8)
    drawn = []
    if positive:
        arteries = Arteries.of(fine.arteries >= HALF, fine.spacing_mm)
        for clot in draw_clots(arteries, np.random.default_rng(seeds[1])):
            drawn.append((place_in_chest(clot.radius_mm), float("nan")))
            numbers[tuple(arteries.voxels[clot.members].T)] = len(drawn)
    share = paired(np.where(numbers > 0, 255, 0).astype(np.uint8))
    tissue, _ = draw_chest(tree, np.random.default_rng(seeds[2]))
    hu = _scanned(tree, tissue, share, int(seeds[3]))
    affine = axial_affine(SPACING_MM, (0.0, 0.0, 0.0))
    volume = Volume(np.clip(np.rint(hu), -1024, 3071).astype(np.int16), affine, name)
    mask = volume.with_voxels(np.where(share >= HALF, np.maximum(numbers[0::2], numbers[1::2]), 0).astype(np.uint8))
    inside = volume.with_voxels((tree.arteries >= HALF).astype(np.uint8))
    return Phantom(volume, mask, describe_emboli(mask, drawn), inside)


def bent(tree: VesselTree, rng: np.random.Generator) -> VesselTree:
    """The same patient bent by a smooth random field."""
    image = sitk.GetImageFromArray(tree.arteries)
    image.SetSpacing(tree.spacing_mm[::-1])
    bend = sitk.BSplineTransformInitializer(image, [4, 4, 4])
    bend.SetParameters(rng.normal(0, rng.uniform(*BEND_MM), bend.GetNumberOfParameters()).tolist())

    def moved(shares: NDArray[np.uint8]) -> NDArray[np.uint8]:
        one = sitk.GetImageFromArray(shares)
        one.CopyInformation(image)
        found: NDArray[np.uint8] = sitk.GetArrayFromImage(sitk.Resample(one, image, bend, sitk.sitkLinear))
        return found

    return VesselTree(tree.name, moved(tree.arteries), moved(tree.veins), moved(tree.lungs), tree.spacing_mm)


def _scanned(tree: VesselTree, tissue: NDArray[np.uint8], clots: NDArray[np.uint8], seed: int) -> NDArray[np.float32]:
    def layer(array: NDArray[np.uint8]) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.float32))[None]

    renderer, one = Renderer(seed), torch.zeros(1, dtype=torch.long)
    windows = DrawnWindows(layer(tissue), layer(tree.arteries) / 255, layer(tree.veins) / 255, layer(clots) / 255,
                           torch.ones(1, dtype=torch.bool))  # fmt: skip
    scanned: NDArray[np.float32] = renderer.scanned(renderer.drawn(windows, one), one, torch.zeros(1) > 0)[0].numpy()
    return scanned
