"""Centrelines of a phantom's vessels and airways: hand-drawn great vessels, then trees grown to fill each lobe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]
MURRAY_EXPONENT = 2.4
"""Parent radius ** m = sum of child radii ** m; 2.3 to 3 in human pulmonary arteries (Huang et al. 1996)."""


@dataclass
class Branch:
    """One unbranched piece of a vessel.

    Attributes:
        points: ``(n, 3)`` centreline in nominal mm, from the root outwards.
        radius_mm: ``(n,)``.
        parent: index of the branch it leaves, or -1.
        place: the word for an embolus in it: central, lobar, segmental or subsegmental.
        side: ``right`` or ``left`` lung, or empty for the trunk.
    """

    points: Points
    radius_mm: NDArray[np.float64]
    parent: int = -1
    place: str = "central"
    side: str = ""
    children: list[int] = field(default_factory=list)


def tube(nodes: ArrayLike, radii: ArrayLike, step: float = 0.5) -> tuple[Points, NDArray[np.float64]]:
    """A smooth centreline through ``nodes`` (Catmull-Rom), sampled every ``step`` radii; radii are interpolated."""
    node = np.asarray(nodes, dtype=np.float64)
    radius = np.broadcast_to(np.asarray(radii, dtype=np.float64), len(node))
    padded = np.concatenate([[2 * node[0] - node[1]], node, [2 * node[-1] - node[-2]]])
    points, radius_of = [node[:1]], [radius[:1]]
    for i in range(len(node) - 1):
        length = float(np.linalg.norm(node[i + 1] - node[i]))
        count = max(int(np.ceil(length / (step * max(min(radius[i], radius[i + 1]), 0.4)))), 1)
        t = (np.arange(1, count + 1) / count)[:, None]
        p0, p1, p2, p3 = padded[i : i + 4]
        curve = p1 + 0.5 * t * ((p2 - p0) + t * ((2 * p0 - 5 * p1 + 4 * p2 - p3) + t * (3 * (p1 - p2) + p3 - p0)))
        points.append(curve)
        radius_of.append(radius[i] + (radius[i + 1] - radius[i]) * t[:, 0])
    return np.concatenate(points), np.concatenate(radius_of)


def place_of(radius_mm: float) -> str:
    """The generation that an artery of this radius stands for in the phantom."""
    if radius_mm >= 3.9:
        return "lobar"
    return "segmental" if radius_mm >= 2.1 else "subsegmental"


class Tree:
    """A growing list of branches that know their parents."""

    def __init__(self) -> None:
        self.branches: list[Branch] = []

    def add(self, nodes: ArrayLike, radii: ArrayLike, parent: int, place: str = "central", side: str = "") -> int:
        """Append a branch and return its index."""
        points, radius = tube(nodes, radii)
        self.branches.append(Branch(points, radius, parent, place, side))
        if parent >= 0:
            self.branches[parent].children.append(len(self.branches) - 1)
        return len(self.branches) - 1

    def grow(
        self, parent: int, targets: Points, leaf_mm: float, rng: np.random.Generator, largest_mm: float = 9.0
    ) -> None:
        """Let a tree leave the end of ``parent`` and reach every target (after Kitaoka et al. 1999).

        Each branch heads for the centroid of its targets; these are then divided in two by a plane, one half for
        each child. Its radius follows Murray's law from the number of leaves it feeds.
        """
        mother = self.branches[parent]
        self._grow(parent, mother.points[-1], _tangent(mother.points), targets, leaf_mm, rng, largest_mm)

    def _grow(
        self,
        parent: int,
        start: Points,
        heading: Points,
        targets: Points,
        leaf_mm: float,
        rng: np.random.Generator,
        largest_mm: float,
    ) -> None:
        count = len(targets)
        way = targets.mean(axis=0) - start
        share = 1.0 if count == 1 else 0.36 + 0.14 * rng.random()
        end = start + share * way
        length = float(np.sqrt(share * way @ (share * way)))
        radius = min(leaf_mm * count ** (1 / MURRAY_EXPONENT), largest_mm)
        middle = (start + end) / 2 + heading * 0.18 * length + rng.normal(0, 0.05 * length, 3)
        tip = radius if count > 1 else 0.75 * radius
        index = self.add(
            np.stack([start, middle, end]),
            (radius, (radius + tip) / 2, tip),
            parent,
            place_of(radius),
            self.branches[parent].side,
        )
        if count == 1:
            return
        spread = np.ptp(targets, axis=0) * rng.uniform(0.7, 1.3, 3)
        direction = rng.normal(0, 0.25, 3)
        direction[int(spread.argmax())] += 1
        along = targets @ direction
        order = along.argsort()
        cut = int(np.clip(round(count * rng.uniform(0.32, 0.68)), 1, count - 1))
        heading = _tangent(self.branches[index].points)
        for half in (order[:cut], order[cut:]):
            self._grow(index, end, heading, targets[half], leaf_mm, rng, radius)

    def downstream(self, index: int) -> list[int]:
        """All branches fed by this one, itself excluded."""
        found, waiting = [], list(self.branches[index].children)
        while waiting:
            child = waiting.pop()
            found.append(child)
            waiting.extend(self.branches[child].children)
        return found


def _tangent(points: Points) -> Points:
    step = points[-1] - points[-2]
    return np.asarray(step / max(float(np.linalg.norm(step)), 1e-6))


@dataclass(frozen=True, eq=False)
class Vessels:
    """Every tube of a phantom in nominal mm; arteries and veins as trees, the others as (points, radii)."""

    arteries: Tree
    veins: Tree
    bronchi: list[tuple[Points, NDArray[np.float64]]]
    aorta: list[tuple[Points, NDArray[np.float64]]]
    superior_veins: list[tuple[Points, NDArray[np.float64]]]
    inferior_vein: tuple[Points, NDArray[np.float64]]
    outflow: tuple[Points, NDArray[np.float64]]
    oesophagus: tuple[Points, NDArray[np.float64]]
    azygos: tuple[Points, NDArray[np.float64]]
    clavicles: list[tuple[Points, NDArray[np.float64]]]


def grow_vessels(rng: np.random.Generator, lung_depth: Callable[[Points], NDArray[np.float64]], leaves: int) -> Vessels:
    """The vessels of one patient.

    Args:
        rng: source of chance.
        lung_depth: nominal points ``(n, 3)`` -> mm inside the lungs (negative outside).
        leaves: end branches of arteries in each lung.
    """

    def moved(nodes: Sequence[Sequence[float]], sigma: float = 1.5) -> Points:
        return np.array(nodes, dtype=np.float64) + rng.normal(0, sigma, (len(nodes), 3))

    wide = rng.uniform(0.88, 1.18)  # pulmonary arteries from narrow to dilated
    arteries = Tree()
    fork = np.array([12.0, -12.0, 20.0]) + rng.normal(0, 1.5, 3)
    trunk = arteries.add(np.stack([(16, -40, -2), (17, -29, 10), fork]), np.array([13.5, 13.5, 12.5]) * wide, -1)
    right = arteries.add(
        np.concatenate([[fork], moved([(-4, 2, 18), (-22, 8, 15), (-40, 9, 10)])]),
        np.array([11, 10.5, 10, 8.5]) * wide,
        trunk,
        side="right",
    )
    left = arteries.add(
        np.concatenate([[fork], moved([(24, 0, 24), (37, 12, 26), (45, 22, 22)])]),
        np.array([11, 10.5, 10, 9]) * wide,
        trunk,
        side="left",
    )
    right_end, left_end = arteries.branches[right].points[-1], arteries.branches[left].points[-1]
    interlobar = arteries.add(
        np.concatenate([[right_end], moved([(-49, 14, -3), (-52, 20, -16)], 1.0)]),
        np.array([8.0, 7.6, 7.0]) * wide,
        right,
        "lobar",
        "right",
    )
    descending = arteries.add(
        np.concatenate([[left_end], moved([(51, 31, 8), (51, 33, -10)], 1.0)]),
        np.array([8.6, 7.8, 7.0]) * wide,
        left,
        "lobar",
        "left",
    )
    truncus = arteries.add(
        np.concatenate([[right_end], moved([(-49, 6, 20), (-55, 4, 30)], 1.0)]),
        np.array([7.0, 6.5, 6.0]) * wide,
        right,
        "lobar",
        "right",
    )
    apical = arteries.add(
        np.concatenate([[left_end], moved([(52, 18, 29), (57, 12, 36)], 1.0)]),
        np.array([6.5, 6.0, 5.6]) * wide,
        left,
        "lobar",
        "left",
    )

    veins = Tree()
    vein_of = {
        (side, low): veins.add(moved(nodes, 1.0), (7.5, 6.5, 5.5), -1, side=side)
        for side, low, nodes in (
            ("right", False, [(-24, 20, -8), (-40, 4, 0), (-52, -4, 6)]),
            ("right", True, [(-24, 28, -26), (-40, 30, -32), (-54, 30, -38)]),
            ("left", False, [(26, 18, -4), (42, 4, 4), (52, -2, 10)]),
            ("left", True, [(26, 32, -24), (42, 36, -30), (54, 38, -36)]),
        )
    }

    for side, sign in (("right", -1), ("left", 1)):
        targets = _points_in_lung(rng, lung_depth, sign, leaves)
        lobe = _lobes(targets)
        roots = {"right": (truncus, interlobar, interlobar), "left": (apical, descending, descending)}[side]
        for number, root in enumerate(roots):
            if (lobe == number).sum() > 0:
                arteries.grow(root, targets[lobe == number], rng.uniform(0.58, 0.72), rng, 6.2 * wide)
        targets = _points_in_lung(rng, lung_depth, sign, int(leaves * 0.7))
        low = _lobes(targets) == 2
        for is_low in (False, True):
            if (low == is_low).any():
                veins.grow(vein_of[side, is_low], targets[low == is_low], rng.uniform(0.55, 0.68), rng, 5.6)

    bronchi = [
        tube(moved([(0, 16, 145), (1, 20, 90), (2, 22, 34)], 1.0), rng.uniform(7.5, 9.5)),
        tube(moved([(1, 22, 34), (-20, 22, 16), (-40, 21, 2), (-46, 24, -12)], 0.7), (7.5, 6.8, 5.6, 5.0)),
        tube(moved([(3, 22, 34), (24, 24, 12), (42, 26, 2), (46, 24, -8)], 0.7), (7.0, 6.2, 5.4, 4.6)),
    ]
    for branch in arteries.branches[trunk + 3 :]:
        radius = float(branch.radius_mm.mean())
        if radius > 1.0:
            aside = np.array([-np.sign(branch.points[0, 0]), 0.5, 0.15]) / 1.13
            thin = np.minimum(branch.radius_mm * 0.72, 4.2)
            bronchi.append((branch.points + aside * (branch.radius_mm + 1.35 * thin)[:, None], thin))

    ascending = rng.uniform(14, 19)
    aorta = [
        tube(
            moved(
                [
                    *((6, -14, -26), (-8, -22, -4), (-14, -24, 22), (-10, -18, 46), (4, 0, 58), (17, 22, 56)),
                    *((23, 42, 40), (23, 47, 20), (20, 47, -30), (14, 45, -80), (4, 42, -175)),
                ],
                1.0,
            ),
            np.array([12, *[ascending] * 3, *[ascending - 2] * 2, *[ascending - 3.5] * 3, 11, 10]),
        ),
        tube(moved([(-8, -14, 54), (-16, -4, 80), (-22, 0, 140)], 1.0), (6, 5.5, 4)),
        tube(moved([(4, 2, 58), (10, 4, 85), (18, 8, 140)], 1.0), (4.5, 4, 3.5)),
        tube(moved([(14, 16, 58), (22, 20, 90), (45, 12, 118), (110, 5, 122)], 1.0), (5, 4.5, 4, 3.5)),
    ]
    superior_veins = [
        tube(moved([(-30, -16, 78), (-31, -12, 45), (-32, -9, 10), (-35, -11, -26)], 1.0), (8.5, 9.5, 10, 10.5)),
        tube(moved([(-110, -20, 118), (-60, -36, 104), (-36, -26, 88), (-30, -16, 76)], 1.0), (5, 6, 7, 8)),
        tube(moved([(110, -20, 118), (60, -42, 100), (22, -42, 84), (-16, -30, 75), (-30, -16, 68)], 1.0), 6.0),
    ]
    return Vessels(
        arteries,
        veins,
        bronchi,
        aorta,
        superior_veins,
        inferior_vein=tube(moved([(-26, 12, -175), (-28, 6, -100), (-32, -4, -62)], 1.0), (11, 12, 13)),
        outflow=tube([(16, -52, -30), (16, -48, -14), (16, -40, 0)], np.array([15, 14, 13.5]) * wide),
        oesophagus=tube(moved([(4, 32, 140), (4, 36, 30), (6, 38, -40), (16, 30, -100)], 1.0), (6, 6, 7, 8)),
        azygos=tube(moved([(-3, 46, -150), (-4, 47, 20), (-14, 38, 42), (-29, 8, 42), (-31, -6, 38)], 0.7), 3.2),
        clavicles=[tube(moved([(s * 22, -66, 84), (s * 80, -62, 104), (s * 150, -12, 122)]), 6.0) for s in (-1, 1)],
    )


def _points_in_lung(
    rng: np.random.Generator, lung_depth: Callable[[Points], NDArray[np.float64]], sign: int, count: int
) -> Points:
    """``count`` points spread evenly (best of several candidates) in one lung, 5 mm or more from its surface."""
    low, high = np.array([20.0, -95, -140]), np.array([135.0, 95, 130])
    tried = rng.uniform(low, high, (40 * count, 3))
    tried[:, 0] *= sign
    inside = tried[lung_depth(tried) > 5]
    chosen = inside[:count]
    spare = inside[count : 2 * count]
    if len(spare) == len(chosen):  # of every pair keep the one whose nearest neighbour is farther away
        crowd = [np.sort(((p[:, None] - chosen[None]) ** 2).sum(-1), axis=1)[:, 1] for p in (chosen, spare)]
        chosen = np.where((crowd[1] > crowd[0])[:, None], spare, chosen)
    return np.asarray(chosen)


def fissure_height(y: NDArray[np.float32]) -> NDArray[np.float32]:
    """Z of the oblique fissure at depth y: high at the back, low at the front; nominal mm."""
    return -18 + 0.72 * y


def _lobes(points: Points) -> NDArray[np.int64]:
    """0 upper, 1 middle or lingula, 2 lower."""
    _, y, z = points.T
    return np.where(z < fissure_height(y), 2, np.where(z < 2, 1, 0))
