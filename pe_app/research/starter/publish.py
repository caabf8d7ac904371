"""From stage I's weights to the model that ships: offset, stage II, threshold, figures.

Stage I's offset puts a chosen number of candidates into calibration studies without clots. Stage II is pooled evidence,
fitted on calibration patients; its threshold comes from fits that left the patient in question out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pe_app.common.errors import InputError
from pe_app.common.files import replacing
from pe_app.common.progress import Progress, ProgressCallback
from pe_app.ct.lungs import SliceRange, find_lungs
from pe_app.ct.slabs import SlabConfig, study_slabs
from pe_app.ct.volume import Volume
from pe_app.model.detector import THRESHOLD, Decision, Detector
from pe_app.model.slab_encoder import EncoderConfig, SlabEncoder
from pe_app.model.study_classifier import ClassifierConfig, PooledClassifier, pooled_numbers
from pe_app.research.starter.figures import Clot, Seen, SeenPair, look
from pe_app.research.starter.whole_studies import StudyPair, render_pair
from pe_app.research.starter.windows import Patient

SLABS = SlabConfig(slab_spacing="physical", pixel_mm=0.7)
"""The starter's slabs: as its windows are, slices 2.5 mm and pixels 0.7 mm apart."""

ENCODER = EncoderConfig(strongest_cells=1)

POINTS = 400
"""Voxels kept of a clot, to measure distances to."""

FALSE_CANDIDATES = 2.0
"""Wanted in a calibration study without clots, on average."""

SPECIFICITY = 0.9
"""Wanted on calibration studies of patients that the fit has not seen: the threshold is 0.5, or what this needs."""


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A detector and what it was calibrated on."""

    detector: Detector
    offset: float
    pairs: int


def prepared_pairs(
    folder: Path, patients: Sequence[Path], sets: Sequence[str], progress: ProgressCallback
) -> list[Path]:
    """Slabs of pairs of whole studies, one file a pair; what is there is kept."""
    files = []
    jobs = [(path, name) for path in patients for name in sets]
    for number, (path, name) in enumerate(jobs):
        progress(Progress(f"render pairs in {folder.name}", number, len(jobs), f"{path.name} {name}"))
        out = folder / f"{path.name}_{name}.npz"
        patient = Patient(path)
        if name not in patient.sets:
            continue
        if not out.exists():
            _write_pair(render_pair(patient, name, seed=number), out)
        files.append(out)
    if not files:
        raise InputError(f"{folder}: no patient to calibrate or measure on has clots: make ingredients first")
    return files


def seen_pairs(encoder: SlabEncoder, files: Sequence[Path]) -> Iterator[SeenPair]:
    """Stage I on the pairs of ``prepared_pairs``."""
    for path in files:
        with np.load(path) as saved:
            clots = tuple(Clot(float(ml), saved[f"clot_{number}"]) for number, ml in enumerate(saved["clot_ml"]))
            sides = [look(encoder, saved[kind], saved["grid_affine"]) for kind in ("with_clots", "without")]
        if clots:
            yield SeenPair(path.stem.split("_")[0], sides[0], sides[1], clots)


def calibrated(weights: Mapping[str, Tensor], pairs: Sequence[SeenPair]) -> Calibrated:
    """A detector of stage I's weights, with offset, stage II and threshold from calibration pairs.

    Args:
        weights: of the encoder.
        pairs: what it sees, without offset, of patients that it was not trained on.
    """
    offset = _offset([pair.without for pair in pairs])
    encoder = SlabEncoder(ENCODER)
    encoder.load_state_dict(dict(weights))
    with torch.no_grad():
        encoder.fc.bias[1] += offset
    pairs = [pair.shifted(offset) for pair in pairs]
    numbers, labels, patients = study_numbers(pairs)
    classifier = PooledClassifier(ClassifierConfig(encoder.config.feature_channels, SLABS.grid, kind="pooled"))
    classifier.read_cells_as(encoder)
    left_out = np.zeros(len(labels))
    for patient in sorted(set(patients)):
        others = np.array([name != patient for name in patients])
        fitted = PooledClassifier(classifier.config)
        fitted.fit(numbers[others], labels[others])
        left_out[~others] = _probabilities(fitted, numbers[~others])
    threshold = max(THRESHOLD, float(np.quantile(left_out[labels.numpy() == 0], SPECIFICITY)))
    classifier.fit(numbers, labels)
    decision = Decision(threshold=threshold, studies=len(labels), positive=int(labels.sum()))
    return Calibrated(Detector(encoder.eval(), classifier.eval(), SLABS, decision=decision), offset, len(pairs))


def study_numbers(pairs: Sequence[SeenPair]) -> tuple[Tensor, Tensor, list[str]]:
    """What stage II weighs of both studies of every pair, their labels and patients."""
    cells = [torch.from_numpy(side.cells) for pair in pairs for side in (pair.with_clots, pair.without)]
    labels = torch.tensor([1.0, 0.0] * len(pairs))
    return (
        torch.cat([pooled_numbers(one[None]) for one in cells]),
        labels,
        [pair.patient for pair in pairs for _ in range(2)],
    )


def study_probability(detector: Detector, seen: Seen) -> float:
    """As the detector judges, from cells already seen."""
    classifier = detector.classifier
    if not isinstance(classifier, PooledClassifier):
        raise TypeError("only pooled evidence judges from cells alone")
    return float(_probabilities(classifier, pooled_numbers(torch.from_numpy(seen.cells)[None]))[0])


def _probabilities(classifier: PooledClassifier, numbers: Tensor) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits = ((numbers - classifier.centre) / classifier.scale * classifier.fc.weight[0]).sum(
            1
        ) + classifier.fc.bias
    probabilities: NDArray[np.float32] = logits.sigmoid().numpy()
    return probabilities


def _offset(studies: Sequence[Seen]) -> float:
    """Added to all logits, it leaves ``FALSE_CANDIDATES`` in studies without clots."""
    low, high = -12.0, 6.0
    for _ in range(16):
        middle = (low + high) / 2
        count = np.mean([len(study.shifted(middle).candidates_mm) for study in studies])
        low, high = (low, middle) if count > FALSE_CANDIDATES else (middle, high)
    return low


def _write_pair(pair: StudyPair, out: Path) -> None:
    lung = _lung_range(pair.without)
    slabs = [study_slabs(volume, lung, SLABS) for volume in (pair.with_clots, pair.without)]
    numbers = np.asarray(pair.clots.voxels, np.uint8)
    clots: dict[str, NDArray[np.float64]] = {}
    ml: list[float] = []
    voxel_ml = float(np.prod(pair.clots.spacing_mm)) / 1000
    for number in np.unique(numbers[numbers > 0]):
        voxels = np.argwhere(numbers == number)
        clots[f"clot_{len(ml)}"] = pair.clots.to_lps_mm(voxels[:: max(1, len(voxels) // POINTS)])
        ml.append(len(voxels) * voxel_ml)
    with replacing(out) as temporary, temporary.open("wb") as file:
        np.savez(file, with_clots=slabs[0].pixels.astype(np.float16), without=slabs[1].pixels.astype(np.float16),
                 grid_affine=slabs[0].grid_affine, clot_ml=np.array(ml), **clots)  # fmt: skip


def _lung_range(volume: Volume) -> SliceRange:
    """The lungs; all slices where hardly any are found, as in the middle of a chest that was cut out of it."""
    found, last = find_lungs(volume).slice_range, volume.shape[0] - 1
    return found if found is not None and found.last - found.first > last / 2 else SliceRange(0, last)
