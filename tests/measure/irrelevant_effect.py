"""What something irrelevant does to a trained detector.

Run ``python tests/measure/irrelevant_effect.py benchmark comparison``.

The same test studies of ``pe-app phantom --benchmark``, which show neither emboli nor anything irrelevant, are given a
lead, dense rib lesions, streaks between the arms or a sharp kernel, and the models of ``pe-app compare`` look at them
before and after. Told are the mean changes of the study's and the slabs' logits with 95% intervals, and which part of
the change in stage I's evidence comes from cells of the map whose pixels the thing did not touch.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from scipy.special import logit

from pe_app.ct.lungs import lung_range
from pe_app.ct.slabs import Slabs, study_slabs
from pe_app.ct.volume_io import read_volume
from pe_app.model.detector import Detector
from pe_app.research.benchmark import Nuisance, add_nuisance, read_truth_table
from pe_app.studies import read_studies

TOUCHED = 0.01
"""Mean change of a cell's pixels, of the HU window, from which the thing touches it."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--systems", default="scenario3,scenario2")
    parser.add_argument("--studies", type=int, default=16)
    given = parser.parse_args()
    systems = given.systems.split(",")
    models = [
        (system, Detector.load(path))
        for system in systems
        for path in sorted(given.comparison.glob(f"seed*/{system}/model.safetensors"))
    ]
    truth = read_truth_table(given.benchmark / "truth.csv")
    studies = [
        study
        for study in read_studies(given.benchmark / "studies.csv")
        if study.split == "test" and study.label == "negative" and not truth[study.study].nuisance
    ][: given.studies]
    changes: dict[tuple[str, str], list[tuple[float, ...]]] = defaultdict(list)
    for number, study in enumerate(studies):
        volume = read_volume(study.path)
        lungs = lung_range(volume)
        for kind in get_args(Nuisance):
            shown = add_nuisance(volume, kind, np.random.default_rng(number))
            for system, detector in models:
                plain, changed = (study_slabs(one, lungs, detector.slabs) for one in (volume, shown))
                grid = detector.slabs.grid
                cells = np.abs(changed.pixels - plain.pixels).mean(1).reshape(len(plain.pixels), grid, -1, grid, 16)
                untouched = cells.mean((2, 4)) < TOUCHED
                before, after = (_seen(detector, one) for one in (plain, changed))
                evidence = after[2] - before[2]
                changes[system, kind].append(
                    (after[0] - before[0], after[1] - before[1], evidence[untouched].sum(), evidence.sum())
                )
        print(f"{number + 1} of {len(studies)}", file=sys.stderr, flush=True)
    print("| system | irrelevant | study logit | slab logit, mean | from untouched cells |\n|---|---|---|---|---|")
    for (system, kind), rows in changes.items():
        study_logit, slab_logit, elsewhere, everywhere = np.array(rows).T
        share = f"{elsewhere.sum() / everywhere.sum():.0%}" if abs(everywhere.mean()) > 1 else ""
        print(f"| {system} | {kind} | {_with_interval(study_logit)} | {_with_interval(slab_logit)} | {share} |")
    print(f"\n{len(studies)} studies, {len(models) // len(systems)} seeds")


@torch.inference_mode()
def _seen(detector: Detector, slabs: Slabs) -> tuple[float, float, np.ndarray]:
    """The study's logit, the mean logit of its slabs, and stage I's evidence for embolism in every cell."""
    features, probability = detector.encode(slabs)
    weight = detector.encoder.fc.weight[1] - detector.encoder.fc.weight[0]
    evidence = torch.einsum("schw,c->shw", features.float(), weight).numpy()
    return float(logit(detector.classify(features))), float(logit(probability).mean()), evidence


def _with_interval(values: np.ndarray) -> str:
    margin = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():+.2f} ({values.mean() - margin:+.2f} to {values.mean() + margin:+.2f})"


if __name__ == "__main__":
    main()
