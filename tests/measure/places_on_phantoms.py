"""How well side and level are told, on simulated chests whose emboli are known.

Run ``python tests/measure/places_on_phantoms.py``.

The truth is the simulated artery that the clot was put into: its side is that of the tree's branch, its level the word
of ``Embolus.place`` (saddle, central and lobar are central; segmental and subsegmental are peripheral). With
``--model`` the candidates of a model are judged too: those that lie within 10 mm of an embolus, and how the extent
estimate goes with the volume of all emboli.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage, stats

from pe_app.ct.lungs import find_lungs
from pe_app.ct.volume import Volume
from pe_app.model.candidate_places import place_candidates
from pe_app.model.detection import Candidate
from pe_app.model.detector import Detector
from pe_app.phantom import PhantomConfig, make_phantom, scan

CENTRAL = ("saddle", "central", "lobar")
NEAR_MM = 10.0


@dataclass(frozen=True)
class Told:
    """One embolus or candidate: the artery's place and side, and what was said of it."""

    place: str
    side: str
    said_side: str | None
    said_level: str | None

    @property
    def side_is_right(self) -> bool:
        """A saddle lies on both sides: every word for it counts but is reported apart."""
        return self.place == "saddle" or self.side == self.said_side

    @property
    def level_is_right(self) -> bool:
        return (self.place in CENTRAL) == (self.said_level == "central")


def phantom_with_sides(seed: int, matrix: int, spacing_mm: float):
    """A positive phantom, and the side of the artery of each of its emboli (``midline`` for the trunk)."""
    sides = {}
    put = scan.place_clots

    def remembered(tree, *arguments):
        clots = put(tree, *arguments)
        for clot in clots:
            middle = clot.points[len(clot.points) // 2]
            nearest = min(tree.branches, key=lambda branch: np.linalg.norm(branch.points - middle, axis=1).min())
            sides[clot.hu] = nearest.side or "midline"
        return clots

    scan.place_clots = remembered
    try:
        phantom = make_phantom(np.random.default_rng(seed), PhantomConfig(matrix, spacing_mm), positive=True)
    finally:
        scan.place_clots = put
    return phantom, [sides[embolus.hu] for embolus in phantom.emboli]


def at(lps_mm: tuple[float, float, float]) -> Candidate:
    """A candidate at a known place."""
    return Candidate(1, lps_mm[2], 0, lps_mm, (11.0, 11.0, 6.0), 1.0, 1.0)


def of_places(phantom, sides) -> list[Told]:
    """What is said of the emboli's own centres: the rule alone, without a model."""
    placed = place_candidates(
        [at(embolus.centre_lps_mm) for embolus in phantom.emboli], phantom.volume, find_lungs(phantom.volume)
    )
    return [
        Told(embolus.place, side, candidate.side, candidate.level)
        for embolus, side, candidate in zip(phantom.emboli, sides, placed, strict=True)
    ]


def of_candidates(phantom, sides, candidates) -> list[Told]:
    """What is said of a model's candidates that lie within ``NEAR_MM`` of an embolus."""
    mask: Volume = phantom.emboli_mask
    told = []
    for candidate in candidates:
        index = np.rint(mask.to_index(candidate.centre_lps_mm)).astype(int).clip(0, np.array(mask.shape) - 1)
        box = tuple(
            slice(max(0, k - round(15 / mm)), k + round(15 / mm) + 1)
            for k, mm in zip(index, mask.spacing_mm, strict=True)
        )
        cut = mask.voxels[box]
        if not cut.any():
            continue
        distance, nearest = ndimage.distance_transform_edt(cut == 0, sampling=mask.spacing_mm, return_indices=True)
        here = tuple(k - side.start for k, side in zip(index, box, strict=True))
        if distance[here] <= NEAR_MM:
            number = int(cut[tuple(nearest[:, *here])]) - 1
            told.append(Told(phantom.emboli[number].place, sides[number], candidate.side, candidate.level))
    return told


def table(told: list[Told]) -> str:
    """Counts by place, as Markdown."""
    lines = ["| place | emboli | side right | midline instead | level right |", "|---|---|---|---|---|"]
    for place in ("saddle", "central", "lobar", "segmental", "subsegmental", "all"):
        these = [one for one in told if place in (one.place, "all")]
        midline = sum(one.said_side == "midline" and one.side != "midline" for one in these if one.place != "saddle")
        side = "" if place == "saddle" else f"{sum(one.side_is_right for one in these if one.place != 'saddle')}"
        lines.append(
            f"| {place} | {len(these)} | {side} | {midline if place != 'saddle' else ''} | "
            f"{sum(one.level_is_right for one in these)} |"
        )
    saddles = Counter(one.said_side for one in told if one.place == "saddle")
    return "\n".join([*lines, "", f"Saddle emboli were said to be: {dict(saddles)}"])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=18)
    parser.add_argument("--seed", type=int, default=8000)
    parser.add_argument("--matrix", type=int, default=160)
    parser.add_argument("--spacing", type=float, default=2.5)
    parser.add_argument("--model", type=Path)
    given = parser.parse_args()
    detector = Detector.load(given.model) if given.model else None
    rule, model, extents = [], [], []
    studies = 0
    try:
        for seed in range(given.seed, given.seed + given.studies):
            phantom, sides = phantom_with_sides(seed, given.matrix, given.spacing)
            rule += of_places(phantom, sides)
            studies += 1
            print(f"phantom {seed}: {len(rule)} emboli so far", file=sys.stderr, flush=True)
            if detector:
                detection = detector.detect(phantom.volume).detection
                model += of_candidates(phantom, sides, detection.candidates)
                if detection.extent_estimate:
                    volume_ml = sum(embolus.volume_mm3 for embolus in phantom.emboli) / 1000
                    extents.append((volume_ml, detection.extent_estimate.volume_ml))
    except KeyboardInterrupt:
        print("stopped: the tables are of the phantoms so far", file=sys.stderr)
    print(f"The rule at the emboli's own places, {studies} phantoms\n\n{table(rule)}")
    if detector:
        print(f"\nCandidates of {detector.card.name} within {NEAR_MM:.0f} mm of an embolus\n\n{table(model)}")
        truth, said = np.array(extents).T
        rank = stats.spearmanr(truth, said).statistic
        print(
            f"\nExtent estimate against the emboli's volume, {len(extents)} studies: Spearman {rank:.2f}; median "
            f"{np.median(said):.1f} ml of attention for {np.median(truth):.1f} ml of emboli"
        )


if __name__ == "__main__":
    main()
