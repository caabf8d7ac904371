"""Clots of real size, grown along a patient's arteries: through branches, across the bifurcation, to the wall or not.

A clot is what can be reached from a seed along the arteries within some distance, and lies within some share of the
cross section. The distance is chosen so that the clot has the wanted volume; sizes follow real ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, dijkstra
from scipy.spatial import KDTree

from pe_app.common.errors import InputError

REAL_CLOTS_ML = ((0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0), (0.02, 0.05, 0.35, 1.13, 5.3, 26.5, 45.0))
"""Shares and volumes of 91 real clots of 33 patients (FUMPE, Masoudi et al. 2018, doi 10.1038/sdata.2018.180)."""

SMALL_CLOTS_ML = ((0.0, 1.0), (0.02, 1.0))
"""The half of them that a coarse map misses, evenly on a logarithmic scale."""

LEAST_ML = 0.02
"""A ball of 3.4 mm: a smaller clot shows on no slice."""

FULLEST = 0.35
"""Share of the arteries' volume that clots of one patient take at most."""

Burden = Literal["real", "small"]


@dataclass(frozen=True, eq=False)
class Arteries:
    """The voxels of arteries, where each lies in its cross section, and the way from one to the next.

    Attributes:
        voxels: ``(n, 3)`` indices.
        radius_mm: ``(n,)`` of the artery there.
        across: ``(n, 3)``, from the middle of the artery, in its radii.
        steps: ``(n, n)``, distance in mm to each of the 26 neighbours.
        spacing_mm: of the grid.
        shape: of the grid.
    """

    voxels: NDArray[np.int64]
    radius_mm: NDArray[np.float32]
    across: NDArray[np.float32]
    steps: csr_array
    spacing_mm: NDArray[np.float64]
    shape: tuple[int, ...]

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel."""
        return float(self.spacing_mm.prod()) / 1000

    @classmethod
    def of(cls, mask: NDArray[np.bool_], spacing_mm: tuple[float, float, float]) -> Arteries:
        """The arteries of a mask.

        Raises:
            InputError: if nothing in it is thick enough for a clot.
        """
        spacing = np.array(spacing_mm)
        depth = _depth(mask, spacing)
        ridge = mask & (depth >= ndimage.maximum_filter(depth, 3) - 0.25) & (depth > 0.6)
        if not ridge.any():
            raise InputError("no artery of the mask is thick enough for a clot; give a mask of pulmonary arteries")
        middle, voxels = np.argwhere(ridge), np.argwhere(mask)
        _, nearest = KDTree(middle * spacing).query(voxels * spacing)
        near, here = middle[nearest], depth[tuple(voxels.T)]
        radius = np.maximum(depth[tuple(near.T)] + 0.3, here + 0.2)
        towards = ((voxels - near) * spacing).astype(np.float32)
        # the middle is a chain of voxels: without smoothing, clots that leave room beside them come out as beads
        radius, *offsets = _smoothed(voxels, mask.shape, spacing, (radius, *towards.T))
        across = np.stack(offsets, 1) / radius[:, None]
        return cls(voxels, radius, across.astype(np.float32), _steps(mask, voxels, spacing), spacing, mask.shape)

    def distance_mm(self, seed: int, limit_mm: float) -> NDArray[np.float64]:
        """``(n,)``, along the arteries; infinite beyond the limit."""
        found: NDArray[np.float64] = dijkstra(self.steps, indices=seed, limit=limit_mm)
        return found


@dataclass(frozen=True, eq=False)
class GrownClot:
    """One clot.

    Attributes:
        members: rows of ``Arteries.voxels``.
        radius_mm: of the artery at the seed.
        occlusion: radius of the clot over that of the artery where it is not wider than ``widest``; above 1 it fills.
    """

    members: NDArray[np.int64]
    radius_mm: float
    occlusion: float


def draw_volumes_ml(rng: np.random.Generator, burden: Burden = "real") -> list[float]:
    """Volumes of one patient's clots, largest first; every third patient with real burden has a saddle embolus."""
    table, least, most = (REAL_CLOTS_ML, 3, 8) if burden == "real" else (SMALL_CLOTS_ML, 5, 13)
    shares, volumes = table
    count = int(rng.integers(least, most))
    return sorted((float(np.exp(np.interp(rng.random(), shares, np.log(volumes)))) for _ in range(count)), reverse=True)


def draw_clots(arteries: Arteries, rng: np.random.Generator, burden: Burden = "real") -> list[GrownClot]:
    """The clots of one patient. They may touch but share no voxel; what finds no room is left out."""
    volumes = draw_volumes_ml(rng, burden)
    saddle = burden == "real" and rng.random() < 0.3
    if saddle:
        volumes[0] = max(volumes[0], float(rng.uniform(5, 25)))
    used = np.zeros(len(arteries.voxels), bool)
    room_ml, clots = FULLEST * len(used) * arteries.voxel_ml, []
    for number, wanted in enumerate(volumes):
        volume_ml = min(wanted, room_ml)
        if volume_ml < LEAST_ML:
            continue
        low, high = _calibres(volume_ml, burden, saddle and number == 0)
        candidates = np.flatnonzero((arteries.radius_mm > low) & (arteries.radius_mm < high) & ~used)
        if len(candidates) == 0:
            continue
        # as often for each mm of artery, whatever its width
        chances = np.cumsum(1 / arteries.radius_mm[candidates].astype(float) ** 2)
        for _ in range(3):
            seed = int(candidates[np.searchsorted(chances, rng.random() * chances[-1])])
            clot = grow(arteries, seed, volume_ml, rng, saddle and number == 0)
            grown_ml = len(clot.members) * arteries.voxel_ml
            if grown_ml > 0.4 * volume_ml and not used[clot.members].any():
                used[clot.members] = True
                clots.append(clot)
                room_ml -= grown_ml
                break
    return clots


def grow(arteries: Arteries, seed: int, volume_ml: float, rng: np.random.Generator, saddle: bool = False) -> GrownClot:
    """A clot round a seed, of this volume where the arteries within its longest length hold as much."""
    longest_mm = float(np.interp(np.log(volume_ml), np.log([0.05, 0.5, 2, 8, 30]), [14, 35, 60, 90, 150]))
    distance = arteries.distance_mm(seed, longest_mm)
    reached = np.flatnonzero(np.isfinite(distance))
    distance, radius, across = distance[reached], arteries.radius_mm[reached], arteries.across[reached]
    kind = rng.random()
    occlusion = float(rng.uniform(0.55, 0.75) if kind < 0.3 else rng.uniform(0.75, 0.95) if kind < 0.65 else 1.4)
    widest_mm = float(rng.uniform(5, 8.5) if saddle else rng.uniform(4, 8))
    share = np.minimum(occlusion, widest_mm / radius)
    # one that does not fill its artery lies in the middle (polo mint, railway track) or leans to a wall
    lean = np.where(share < 1, (1 - share) * rng.uniform(0, 0.9), 0)
    side = rng.normal(size=3) * (0.3, 1, 1)
    bends = ndimage.gaussian_filter1d(rng.normal(size=(400, 3)), 12, axis=0) * 4
    towards = side / np.linalg.norm(side) + bends[distance.astype(int)]
    towards /= np.maximum(np.linalg.norm(towards, axis=1, keepdims=True), 1)
    from_axis = (((across - lean[:, None] * towards) / share[:, None]) ** 2).sum(1)
    inside = from_axis < 1
    reached, distance, from_axis = reached[inside], distance[inside], from_axis[inside]

    def within(length_mm: float) -> NDArray[np.bool_]:
        # ends taper as a paraboloid
        kept: NDArray[np.bool_] = from_axis * (0.2 * length_mm + 2) < length_mm - distance
        return kept

    short, long = 1.5, longest_mm
    for _ in range(9):
        middle = (short + long) / 2
        if np.count_nonzero(within(middle)) * arteries.voxel_ml < volume_ml:
            short = middle
        else:
            long = middle
    members = reached[within(long)]
    # where a clot leans to another wall in the next branch it may break: the largest piece is the clot
    _, piece = connected_components(arteries.steps[members][:, members], directed=False)
    largest = piece == np.bincount(piece).argmax() if len(members) else piece == 0
    return GrownClot(members[largest], float(arteries.radius_mm[seed]), occlusion)


def _calibres(volume_ml: float, burden: Burden, saddle: bool) -> tuple[float, float]:
    """Radii in mm of arteries in which a clot of this size starts."""
    if saddle:
        return 8, 16
    if burden == "small":
        return (0.8, 2.2) if volume_ml < 0.2 else (1.0, 3.5)
    return (4, 14) if volume_ml > 4 else (2, 11) if volume_ml > 0.6 else (1.0, 5)


def _depth(mask: NDArray[np.bool_], spacing: NDArray[np.float64]) -> NDArray[np.float32]:
    """Distance to the wall in mm, inside the mask."""
    depth = np.zeros(mask.shape, np.float32)
    found = ndimage.find_objects(mask.astype(np.uint8))
    if not found:
        return depth
    box = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in found[0])
    image = sitk.GetImageFromArray(mask[box].astype(np.uint8))
    image.SetSpacing(spacing[::-1].tolist())
    signed = sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=True)
    depth[box] = np.maximum(-sitk.GetArrayViewFromImage(signed), 0) + 0.3 * mask[box]
    return depth


def _smoothed(
    voxels: NDArray[np.int64],
    shape: tuple[int, ...],
    spacing: NDArray[np.float64],
    values: tuple[NDArray[np.float32], ...],
) -> list[NDArray[np.float32]]:
    """Values of the voxels, each averaged with those within about 2 mm."""
    low, high = voxels.min(0) - 2, voxels.max(0) + 3
    at, box = tuple((voxels - low).T), tuple(high - low)
    size = [2 * int(np.ceil(1.4 / step)) + 1 for step in spacing]

    def spread(what: NDArray[np.float32]) -> NDArray[np.float32]:
        grid = np.zeros(box, np.float32)
        grid[at] = what
        filtered: NDArray[np.float32] = ndimage.uniform_filter(grid, size, mode="constant")[at]
        return filtered

    weight = np.maximum(spread(np.ones(len(voxels), np.float32)), 1e-6)
    return [spread(np.asarray(value, np.float32)) / weight for value in values]


def _steps(mask: NDArray[np.bool_], voxels: NDArray[np.int64], spacing: NDArray[np.float64]) -> csr_array:
    """Distances between neighbouring voxels of a mask, both ways."""
    padded = np.pad(mask, 1)
    number = np.full(padded.shape, -1, np.int32)
    at = voxels + 1
    number[tuple(at.T)] = np.arange(len(voxels), dtype=np.int32)
    starts, ends, lengths = [], [], []
    for move in np.ndindex(3, 3, 3):
        step = np.array(move) - 1
        if tuple(step) <= (0, 0, 0):
            continue  # the other way round it is the same pair
        neighbour = number[tuple((at + step).T)]
        there = np.flatnonzero(neighbour >= 0)
        starts.append(there)
        ends.append(neighbour[there])
        lengths.append(np.full(len(there), np.linalg.norm(step * spacing), np.float32))
    one, two, length = np.concatenate(starts), np.concatenate(ends), np.concatenate(lengths)
    rows, columns = np.concatenate([one, two]), np.concatenate([two, one])
    return csr_array(coo_array((np.concatenate([length, length]), (rows, columns)), shape=(len(voxels),) * 2))
