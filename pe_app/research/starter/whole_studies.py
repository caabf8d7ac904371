"""Whole studies with clots and their twins, to calibrate the starter on and to measure it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pe_app.ct.volume import Volume, axial_affine
from pe_app.phantom.rendering import DrawnWindows, RealWindows, Renderer
from pe_app.research.starter.ingredients import SPACING_MM, SPAN_BIT
from pe_app.research.starter.windows import Patient


@dataclass(frozen=True, eq=False)
class StudyPair:
    """The same study with clots and without.

    Attributes:
        name: of patient and set of clots.
        patient: both are of this patient.
        with_clots, without: in HU.
        clots: number of the clot in each of its voxels.
    """

    name: str
    patient: str
    with_clots: Volume
    without: Volume
    clots: Volume


def render_pair(patient: Patient, clots: str, seed: int) -> StudyPair:
    """Both studies, with the same bolus, noise and kernel."""
    levels, whole = np.arange(patient.shape[0]), [slice(0, size) for size in patient.shape[1:]]
    share = patient.clots(levels, whole[0], whole[1], clots)
    found = patient.sets[clots]
    numbers = np.zeros(patient.shape, np.uint8)
    seen = found.share >= 128
    numbers.ravel()[found.index[seen]] = found.number[seen]
    affine = axial_affine(SPACING_MM, (0.0, 0.0, 0.0))
    name = f"{patient.name}_{clots}"
    volumes = []
    for kind, amount in (("pe", share), ("none", np.zeros_like(share))):
        hu = _rendered(patient, amount, seed)
        volumes.append(Volume(np.clip(np.rint(hu), -1024, 3071).astype(np.int16), affine, f"{name}_{kind}"))
    return StudyPair(name, patient.name, volumes[0], volumes[1], Volume(numbers, affine, f"clots of {name}"))


def _rendered(patient: Patient, clots: NDArray[np.uint8], seed: int) -> NDArray[np.float32]:
    renderer, groups = Renderer(seed), torch.zeros(1, dtype=torch.long)

    def layer(array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array, np.float32))[None]

    arrays = patient.arrays
    arteries, real = layer(arrays["arteries"]) / 255, torch.tensor([patient.real])
    if patient.real:
        windows = RealWindows(
            layer(arrays["hu"]), layer(arrays["blood"]), arteries, layer(clots) / 255, layer(arrays["radius"]) / 10
        )
        hu = renderer.real(windows, groups, other_bolus=True)
    else:
        tissue = layer(np.asarray(arrays["tissue"], np.uint8) % SPAN_BIT)
        enhanced = torch.tensor([True])
        hu = renderer.drawn(
            DrawnWindows(tissue, arteries, layer(arrays["veins"]) / 255, layer(clots) / 255, enhanced), groups
        )
    scanned: NDArray[np.float32] = renderer.scanned(hu, groups, real)[0].numpy()
    return scanned
