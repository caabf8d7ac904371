"""Where a system looked in one study, against what is known of its emboli; the system is a model or a baseline."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_mask
from pe_app.evaluation.localisation import (
    CandidateOutcome,
    cell_truth,
    energy_inside,
    key_slice_hit,
    map_mass,
    match_candidates,
    number_emboli,
    pointing_game,
    pointing_slabs,
)
from pe_app.model.detection import Detection, find_candidates
from pe_app.studies import Study

FROC_DISTANCES_MM = (0.0, 2.0, 5.0)
"""How far a candidate may lie from an embolus that it hits; 5 mm is half a cell of the attention map."""

KEY_SLICES = 3
"""Slabs that a reader would look at first."""


@dataclass(frozen=True, eq=False)
class StudyLocalisation:
    """Where one system looked in one study, against the truth.

    Attributes:
        pointing: 1 where the study's maximum lies on an embolism; None where no mask is known.
        pointing_slabs: the same for every slab with embolism.
        energy: share of the attention inside the mask, for every slab with embolism.
        key_slice: whether one of the 3 strongest slabs shows embolism; None where no mask is known.
        candidates: outcomes at each of ``FROC_DISTANCES_MM``; None where not all emboli are known.
        mass: mean attention, of a negative study only.
    """

    pointing: float | None = None
    pointing_slabs: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    energy: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    key_slice: bool | None = None
    candidates: tuple[CandidateOutcome, ...] | None = None
    mass: float | None = None


@dataclass(frozen=True, eq=False)
class StudyTruth:
    """What is known of the emboli of a positive study.

    Attributes:
        mask: on the CT's grid, above 0 where there is embolism.
        reviewed: slices whose emboli are all known, outlined or none; None where the mask is the truth of all slices.
    """

    mask: Volume
    reviewed: tuple[int, ...] | None

    @cached_property
    def emboli(self) -> Volume:
        """Numbered emboli, cut to their box, as matching them needs no more; of a mask of 0 and 1 its regions."""
        numbered = self.mask if self.mask.voxels.max() > 1 else number_emboli(self.mask)
        places = np.argwhere(numbered.voxels)
        first, last = places.min(axis=0), places.max(axis=0) + 1
        affine = numbered.affine.copy()
        affine[:3, 3] = numbered.to_lps_mm(first)
        return Volume(numbered.voxels[tuple(map(slice, first, last))], affine, numbered.name)


@dataclass(frozen=True, eq=False)
class Look:
    """Where a system looks in a study.

    Attributes:
        maps: ``(slabs, grid, grid)``, attention times slab probability, at least 0.
        grid: their place in the patient.
        slab_scores: ``(slabs,)``.
        positions_lps_mm: ``(candidates, 3)``.
        candidate_scores: ``(candidates,)``.
    """

    maps: NDArray[np.float64]
    grid: Volume
    slab_scores: NDArray[np.float64]
    positions_lps_mm: NDArray[np.float64]
    candidate_scores: NDArray[np.float64]

    @classmethod
    def of_model(cls, detection: Detection, maps: NDArray[np.float64], grid: Volume) -> Look:
        """Where a model looked: its maps and candidates as they are shown."""
        slab_scores = np.array([slab.probability for slab in detection.evidence])
        found = detection.candidates
        return cls(
            maps * slab_scores[:, None, None],
            grid,
            slab_scores,
            np.array([candidate.centre_lps_mm for candidate in found]).reshape(-1, 3),
            np.array([candidate.peak * candidate.slab_probability for candidate in found]),
        )

    @classmethod
    def of_prior(cls, prior: NDArray[np.float64], grid: Volume) -> Look:
        """A baseline that looks at the same cells in every study."""
        scaled = prior / max(float(prior.max()), 1e-12)
        alike = np.ones(len(scaled))
        found = find_candidates(scaled, alike, grid, [0] * len(scaled))
        return cls(
            scaled,
            grid,
            scaled.max(axis=(1, 2)),
            np.array([candidate.centre_lps_mm for candidate in found]).reshape(-1, 3),
            np.array([candidate.peak for candidate in found]),
        )


def read_truth(study: Study, volume: Volume, masks: Path | None) -> StudyTruth | None:
    """The emboli of a positive study: its mask of all slices where there is one, else its outlined slices.

    None for a negative study, and where nothing is outlined: a slice with embolism that is not outlined does not tell
    where to look.

    Raises:
        InputError: if mask or annotation cannot be used on this CT.
    """
    if study.label != "positive":
        return None
    if masks is not None and (masks / f"{study.study}.nrrd").is_file():
        mask = read_mask(masks / f"{study.study}.nrrd", volume)
        return StudyTruth(mask, None) if mask.voxels.any() else None
    if study.annotation is None:
        return None
    annotation = SparseAnnotation.read(study.annotation, volume)
    if not annotation.masks:
        return None
    voxels = np.zeros(volume.shape, np.uint8)
    for index, outline in annotation.masks.items():
        voxels[index] = outline
    reviewed = tuple(entry.slice_index for entry in annotation.slices if entry.outlined or entry.state == "none")
    return StudyTruth(volume.with_voxels(voxels), reviewed)


def localise(look: Look, study: Study, truth: StudyTruth | None) -> StudyLocalisation:
    """Where a system looked in one study, against what is known of it."""
    if study.label == "negative":
        every = CandidateOutcome(np.empty(0), look.candidate_scores)
        return StudyLocalisation(candidates=(every,) * len(FROC_DISTANCES_MM), mass=map_mass(look.maps))
    if truth is None:
        return StudyLocalisation()
    cells = cell_truth(look.grid, truth.mask, truth.reviewed)
    outcomes = None
    if truth.reviewed is None:
        outcomes = tuple(
            match_candidates(look.positions_lps_mm, look.candidate_scores, truth.emboli, distance)
            for distance in FROC_DISTANCES_MM
        )
    return StudyLocalisation(
        pointing=pointing_game(look.maps, cells),
        pointing_slabs=pointing_slabs(look.maps, cells),
        energy=energy_inside(look.maps, cells),
        key_slice=key_slice_hit(look.slab_scores, cells, KEY_SLICES),
        candidates=outcomes,
    )
