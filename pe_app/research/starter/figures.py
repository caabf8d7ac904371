"""What held-out studies say of a detector: simulated patients, and painted variations of a real one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pe_app.common.errors import InputError
from pe_app.common.progress import Progress, ProgressCallback
from pe_app.ct.lungs import SliceRange, lung_range
from pe_app.ct.slabs import study_slabs
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_mask, read_volume
from pe_app.evaluation.roc import auc
from pe_app.model.detection import find_candidates
from pe_app.model.detector import Detector
from pe_app.model.slab_encoder import normalised
from pe_app.studies import Study

HIT_MM = 12.0
"""The attention's peak counts as a hit within this distance of an embolus: a cell of about 11 mm."""


def held_out_figures(
    detector: Detector, studies: Sequence[Study], masks: Path, prefix: str, progress: ProgressCallback
) -> dict[str, float]:
    """AUC with its DeLong interval, where the strongest slab's attention lies, and false candidates a study.

    The quality gate is left out: a background that shows the middle of a chest only would be refused.
    """
    truth, probabilities, hits, false = [], [], [], []
    for number, study in enumerate(studies):
        progress(Progress(f"look at held-out {prefix}", number, len(studies), study.study))
        volume = read_volume(study.path)
        slabs = study_slabs(volume, _lung_range(volume), detector.slabs)
        features, slab_probability = detector.encode(slabs)
        truth.append(int(study.label == "positive"))
        probabilities.append(detector.classify(features))
        maps = normalised(torch.from_numpy(detector.attention(features))).numpy()
        grid = slabs.to_volume(maps)
        if study.label == "positive":
            mask = read_mask(masks / f"{study.study}.nii.gz", volume)
            emboli_mm = mask.to_lps_mm(np.argwhere(mask.voxels))
            strongest = int(slab_probability.argmax())
            row, column = np.unravel_index(int(maps[strongest].argmax()), maps[strongest].shape)
            peak_mm = grid.to_lps_mm((strongest, int(row), int(column)))
            away_mm = float(np.linalg.norm(emboli_mm - peak_mm, axis=1).min())
            hits.append(maps[strongest].max() > 0 and away_mm <= HIT_MM)
        else:
            false.append(len(find_candidates(maps, slab_probability, grid, slabs.slice_index.tolist())))
    area = auc(truth, probabilities)
    figures = {
        "studies": len(truth),
        "auc": area.value,
        "auc_low": area.low,
        "auc_high": area.high,
        "accuracy": float(np.mean((np.array(probabilities) >= 0.5) == np.array(truth))),
        "pointing": float(np.mean(hits)),
        "false_candidates": float(np.mean(false)),
    }
    return {f"held_out_{prefix}_{name}": value for name, value in figures.items()}


def _lung_range(volume: Volume) -> SliceRange:
    """The lungs; all slices where hardly any are found, as in the middle of a chest that was cut out of it."""
    every = SliceRange(0, volume.shape[0] - 1)
    try:
        found = lung_range(volume)
    except InputError:
        return every
    return found if found.last - found.first > volume.shape[0] / 2 else every
