"""What a number format changes: ``python tests/measure/precision_on_studies.py benchmark/studies.csv --model MODEL``.

Every study of a list (``pe-app phantom --benchmark``) is looked at in float32 with direct convolutions, in float32 as
it runs (``pe_app/model/winograd.py``), and in bfloat16 as it runs. Told are the AUC of the study probability, that of
the slab probability against the simulated emboli, how far the peaks of the attention move, in cells of the map, the
largest change of a probability, and which candidates stay within a cell of where they were.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from pe_app.common.errors import InputError
from pe_app.common.memory import keep_freed_memory
from pe_app.ct.lungs import lung_range
from pe_app.ct.slabs import study_slabs
from pe_app.ct.volume_io import read_mask, read_volume
from pe_app.model.detection import find_candidates
from pe_app.model.detector import Detector, default_model
from pe_app.model.slab_encoder import normalised
from pe_app.research.bench.textbook import without_shortcuts
from pe_app.studies import read_studies

DIRECT = "direct float32"
FORMATS = {DIRECT: "float32", "float32": "float32", "bfloat16": "bfloat16"}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", type=Path)
    parser.add_argument("--model", type=Path, default=default_model())
    parser.add_argument("--split", default="test")
    given = parser.parse_args()
    keep_freed_memory()
    detectors = {name: Detector.load(given.model).to(torch.device("cpu")) for name in FORMATS}
    for name, detector in detectors.items():
        detector = detector.with_precision(FORMATS[name])
    without_shortcuts(detectors[DIRECT].encoder)
    without_shortcuts(detectors[DIRECT].classifier)
    studies = [study for study in read_studies(given.studies) if study.split == given.split]
    labels: list[bool] = []
    painted: list[np.ndarray] = []
    found: dict[str, list[tuple[float, np.ndarray, np.ndarray, float]]] = {name: [] for name in FORMATS}
    places: dict[str, list[np.ndarray]] = {name: [] for name in FORMATS}
    cell_mm = 0.0
    for study in studies:
        volume = read_volume(study.path)
        config = detectors[DIRECT].slabs
        try:
            slabs = study_slabs(volume, lung_range(volume), config)
        except InputError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        mask = given.studies.parent / "masks" / f"{study.study}.nrrd"
        cut = np.zeros(volume.shape[0], bool)
        if mask.is_file():
            cut = read_mask(mask, volume).voxels.any((1, 2))
        labels.append(study.label == "positive")
        painted.append(cut[slabs.slice_index])
        for name, detector in detectors.items():
            features, probability = detector.encode(slabs)
            maps = detector.attention(features)
            found[name].append((detector.classify(features), probability, maps, features.float().numpy()[::7]))
            shown, grid = normalised(torch.from_numpy(maps)).numpy(), slabs.to_volume(maps)
            candidates = find_candidates(shown, probability, grid, slabs.slice_index.tolist())
            places[name].append(np.array([one.centre_lps_mm for one in candidates]).reshape(-1, 3))
            cell_mm = max(grid.spacing_mm)
        print(f"{len(labels)} of {len(studies)}", file=sys.stderr, flush=True)
    print(f"| | {' | '.join(FORMATS)} |\n|---|{'---|' * len(FORMATS)}")
    inside = np.concatenate(painted)
    slab = {name: np.concatenate([one[1] for one in found[name]]) for name in FORMATS}
    study_wide = {name: np.array([one[0] for one in found[name]]) for name in FORMATS}
    maps = {name: np.concatenate([one[2] for one in found[name]]) for name in FORMATS}
    moved = {name: _distance(maps[DIRECT], maps[name]) for name in FORMATS}
    strongest = np.concatenate([one[1] == one[1].max() for one in found[DIRECT]])
    rows = {
        "AUC of studies": [roc_auc_score(labels, study_wide[name]) for name in FORMATS],
        "AUC of slabs": [roc_auc_score(inside, slab[name]) for name in FORMATS],
        "largest change of a study's probability": [_most(study_wide, name) for name in FORMATS],
        "largest change of a slab's probability": [_most(slab, name) for name in FORMATS],
        "correlation of the features": [_alike(found[DIRECT], found[name]) for name in FORMATS],
        "correlation of the maps": [np.corrcoef(maps[DIRECT].ravel(), maps[name].ravel())[0, 1] for name in FORMATS],
        "peak moves, mean of slabs with an embolus": [moved[name][inside].mean() for name in FORMATS],
        "peak moves, mean of strongest slabs": [moved[name][strongest].mean() for name in FORMATS],
        "peak moves, mean of all": [moved[name].mean() for name in FORMATS],
        "peak stays, share of all": [(moved[name] == 0).mean() for name in FORMATS],
    }
    rows["candidates"] = [sum(map(len, places[name])) for name in FORMATS]
    rows["candidates that are in direct float32, too"] = [
        _kept(places[name], places[DIRECT], cell_mm) for name in FORMATS
    ]
    for title, values in rows.items():
        print(f"| {title} | " + " | ".join(f"{value:.5f}" for value in values) + " |")
    print(f"\n{len(labels)} studies, {len(inside)} slabs, {np.count_nonzero(inside)} with an embolus")


def _distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    places = [np.stack(np.unravel_index(m.reshape(len(m), -1).argmax(1), m.shape[1:])) for m in (one, other)]
    return np.hypot(*(places[0] - places[1]))


def _kept(places: list[np.ndarray], plain: list[np.ndarray], cell_mm: float) -> int:
    """Candidates that have one of the plain way's within a cell."""
    distances = [np.linalg.norm(one[:, None] - other, axis=2) for one, other in zip(places, plain, strict=True)]
    return sum(int((each.min(1, initial=np.inf) <= cell_mm).sum()) for each in distances)


def _most(values: dict[str, np.ndarray], name: str) -> float:
    return float(np.abs(values[name] - values[DIRECT]).max())


def _alike(one: list, other: list) -> float:
    """Of the studies, the mean."""
    return float(np.mean([np.corrcoef(a[3].ravel(), b[3].ravel())[0, 1] for a, b in zip(one, other, strict=True)]))


if __name__ == "__main__":
    main()
