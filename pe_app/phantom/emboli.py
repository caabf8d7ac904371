"""Clots: their shapes along an artery, and painting them into a real enhanced CT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pe_app.phantom.vessels import Points, Tree

Place = Literal["saddle", "central", "lobar", "segmental", "subsegmental"]
CLOT_HU = (30.0, 80.0)
"""Acute thrombus (30 to 80 HU): less than enhanced blood, more than water."""


@dataclass(frozen=True)
class Burden:
    """How much clot the patients have.

    Attributes:
        places: how often each place is drawn where the vessels and voxels allow it.
        counts: chance of 1, 2, ... emboli.
        saddle: least and largest radius of a saddle embolus over that of the arteries it lies in.
        partial: the same of the other emboli that let contrast pass.
    """

    places: Mapping[Place, float]
    counts: tuple[float, ...]
    saddle: tuple[float, float]
    partial: tuple[float, float]


BurdenName = Literal["mixed", "large"]
BURDENS: dict[BurdenName, Burden] = {
    "mixed": Burden(
        {"saddle": 0.07, "central": 0.2, "lobar": 0.27, "segmental": 0.33, "subsegmental": 0.13},
        (0.26, 0.24, 0.2, 0.13, 0.1, 0.07),
        (0.3, 0.52),
        (0.42, 0.78),
    ),
    "large": Burden({"saddle": 0.4, "central": 0.35, "lobar": 0.25}, (0, 0, 0.3, 0.4, 0.3), (0.55, 0.75), (0.7, 0.85)),
}
"""Emboli of every size, as a hospital sees them; or several that nearly fill the central and lobar arteries."""


@dataclass(frozen=True)
class Embolus:
    """One embolus whose place is known exactly.

    Attributes:
        place: the artery it lies in.
        centre_lps_mm: a voxel of its mask, the one nearest to the mask's centre of mass.
        volume_mm3: of its mask.
        hu: of the clot before noise and partial volume.
    """

    place: Place
    centre_lps_mm: tuple[float, float, float]
    volume_mm3: float
    hu: float


@dataclass(frozen=True, eq=False)
class Clot:
    """A clot as spheres.

    Attributes:
        place: the artery it lies in.
        hu: its density.
        points: ``(n, 3)`` centres, in the frame of the artery's centreline.
        radius_mm: ``(n,)``.
        occluded: the stretch of artery that it fills and widens (points, radii); None where contrast passes.
        starved: indices of branches downstream of a complete occlusion.
    """

    place: Place
    hu: float
    points: Points
    radius_mm: NDArray[np.float64]
    occluded: tuple[Points, NDArray[np.float64]] | None = None
    starved: tuple[int, ...] = ()


def clot_along(
    points: Points, radius_mm: NDArray[np.float64], rng: np.random.Generator, fill: float, wall: float
) -> tuple[Points, NDArray[np.float64]]:
    """Spheres of an irregular clot along a stretch of artery.

    Args:
        points: ``(n, 3)`` centreline.
        radius_mm: ``(n,)`` of the artery.
        rng: source of chance.
        fill: radius of the clot over that of the artery; above 1 it occludes.
        wall: 0 floats in the middle (polo mint, railway track), 1 lies against the wall.

    Returns:
        centres and radii; rounded ends, lumpy along its way, turning slowly round the axis.
    """
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    step = max(0.3 * fill * float(radius_mm.mean()), 0.25)
    at = np.linspace(0, length[-1], max(int(length[-1] / step), 2) + 1)
    axis = np.stack([np.interp(at, length, points[:, k]) for k in range(3)], axis=1)
    artery = np.interp(at, length, radius_mm)
    knots = max(len(at) // 6, 3)
    lumps = [np.interp(np.linspace(0, knots - 1, len(at)), np.arange(knots), rng.normal(0, 1, knots)) for _ in range(3)]
    ends = np.minimum(at, at[-1] - at) / (0.9 * artery)
    radius = fill * artery * np.clip(1 + 0.16 * lumps[0], 0.6, 1.4) * np.sqrt(np.clip(0.12 + ends, 0, 1))
    tangent = np.gradient(axis, axis=0)
    tangent /= np.maximum(np.linalg.norm(tangent, axis=1, keepdims=True), 1e-6)
    start = rng.normal(0, 1, 3)
    side = start - tangent * (tangent @ start)[:, None]
    side /= np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-6)
    turn = rng.uniform(-0.5, 0.5) * lumps[1]
    side = side * np.cos(turn)[:, None] + np.cross(tangent, side) * np.sin(turn)[:, None]
    room = np.maximum(artery - 0.85 * radius, 0)
    away = room * np.clip(wall + 0.15 * lumps[2], -1, 1)
    return axis + side * away[:, None], radius


def place_clots(
    tree: Tree, rng: np.random.Generator, count: int, smallest_mm: float, burden: Burden = BURDENS["mixed"]
) -> list[Clot]:
    """``count`` clots in different branches of an arterial tree; fewer where there is no room for so many.

    Args:
        tree: the arteries.
        rng: source of chance.
        count: how many.
        smallest_mm: least radius of a clot that the voxels can show.
        burden: where the clots lie, and how large they are.
    """
    clots: list[Clot] = []
    used: set[int] = set()
    names = list(burden.places)
    weights = np.array(list(burden.places.values()))
    for _ in range(12 * count):
        if len(clots) == count:
            break
        place = names[int(rng.choice(len(names), p=weights / weights.sum()))]
        drawn = _saddle(tree, rng, burden) if place == "saddle" else _in_branch(tree, rng, place, smallest_mm, burden)
        if drawn is None or used & drawn[1]:
            continue
        clots.append(drawn[0])
        used |= drawn[1]
    return clots


def _saddle(tree: Tree, rng: np.random.Generator, burden: Burden) -> tuple[Clot, set[int]] | None:
    """Across the bifurcation, a leg in each main artery."""
    right, left = (tree.branches[i] for i in tree.branches[0].children[:2])
    legs = []
    for branch in (left, right):
        reach = max(int(len(branch.points) * rng.uniform(0.35, 0.8)), 3)
        legs.append((branch.points[:reach], branch.radius_mm[:reach]))
    points = np.concatenate([legs[0][0][::-1], legs[1][0][1:]])
    radius = np.concatenate([legs[0][1][::-1], legs[1][1][1:]])
    shape = clot_along(points, radius, rng, rng.uniform(*burden.saddle), rng.uniform(0, 0.5))
    return Clot("saddle", float(rng.uniform(*CLOT_HU)), *shape), {0, *tree.branches[0].children[:2]}


def _in_branch(
    tree: Tree, rng: np.random.Generator, place: Place, smallest_mm: float, burden: Burden
) -> tuple[Clot, set[int]] | None:
    fits = [
        i
        for i, b in enumerate(tree.branches)
        if b.place == place and i > 0 and b.radius_mm.mean() >= max(smallest_mm, 1.0) and len(b.points) > 3
    ]
    if not fits:
        return None
    first = int(rng.choice(fits))
    radius = float(tree.branches[first].radius_mm.mean())
    complete = rng.random() < {"central": 0.12, "lobar": 0.3, "segmental": 0.45, "subsegmental": 0.7}.get(place, 0)
    length = radius * (rng.uniform(2, 5) if place in ("central", "lobar") else rng.uniform(3, 9))
    from_start = rng.uniform(0, 0.6)
    points, radii, passed = _walk(tree, rng, first, from_start, length)
    if complete:
        fill, wall = 1.15, 0.0
    else:
        fill = max(float(rng.uniform(*burden.partial)), min(smallest_mm / radius, 0.85))
        wall = float(rng.choice([0.0, rng.uniform(0.6, 1)]))
    shape = clot_along(points, radii, rng, fill, wall)
    if not complete and rng.random() < 0.4 and len(passed) > 1:  # a leg into the other child as well
        points, radii, more = _walk(tree, rng, first, from_start, length, avoid=passed[1])
        second = clot_along(points, radii, rng, fill, wall)
        shape = np.concatenate([shape[0], second[0]]), np.concatenate([shape[1], second[1]])
        passed += more
    starved = tuple(tree.downstream(passed[-1])) if complete else ()
    widened = (points, radii * rng.uniform(1.0, 1.2)) if complete else None
    return Clot(place, float(rng.uniform(*CLOT_HU)), *shape, widened, starved), set(passed)


def _walk(
    tree: Tree, rng: np.random.Generator, first: int, start: float, length: float, avoid: int = -1
) -> tuple[Points, NDArray[np.float64], list[int]]:
    """A stretch of centreline from a fraction of branch ``first`` downstream over ``length`` mm."""
    branch = tree.branches[first]
    skip = int(start * (len(branch.points) - 2))
    points, radii, passed = branch.points[skip:], branch.radius_mm[skip:], [first]
    while True:
        along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
        onward = [c for c in tree.branches[passed[-1]].children if c != avoid]
        if along[-1] >= length or not onward:
            keep = max(int(np.searchsorted(along, length)) + 1, 3)
            return points[:keep], radii[:keep], passed
        size = np.array([tree.branches[c].radius_mm.mean() for c in onward])
        passed.append(onward[int(rng.choice(len(onward), p=size / size.sum()))])
        points = np.concatenate([points, tree.branches[passed[-1]].points[1:]])
        radii = np.concatenate([radii, tree.branches[passed[-1]].radius_mm[1:]])
