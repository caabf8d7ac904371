"""Emboli painted into a real enhanced CT: what was painted is then known exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from pe_app.common.errors import InputError
from pe_app.ct.lungs import find_lungs
from pe_app.ct.quality import blood_hu
from pe_app.ct.volume import Volume
from pe_app.phantom.emboli import BURDENS, CLOT_HU, Embolus, clot_along
from pe_app.phantom.scan import describe_emboli
from pe_app.phantom.vessels import Points

LARGEST_RADIUS_MM = 8.5
"""Thicker enhanced tubes may be aorta or heart; the main pulmonary arteries go with them."""

CLOSED_MM = 16.0
"""Lungs closed by so much contain their vessels and the hila, but not the mediastinum."""

TOP_SHARE = 0.25
"""Of the lung's height, from the top: between the lungs there run vessels of neck and arms, no pulmonary artery."""

SMALLEST_RADIUS_MM = 1.4
"""Thinner vessels cannot show a clot at usual pixels."""

SMALLEST_CLOT_MM3 = 25.0
"""A smaller clot (a ball of 3.6 mm) is drawn anew: a reader would not mark it."""

LEAST_CONTRAST_HU = 40.0
"""So is one that cannot be seen: in voxels that are mostly lung, or in blood hardly brighter than the clot."""

TRIES = 30
"""How many clots of a study that are too small or touch another are drawn anew before they are left out."""


@dataclass(frozen=True, eq=False)
class PaintedStudy:
    """A real CT with painted emboli.

    Attributes:
        volume: the CT, int16 HU; unchanged outside the emboli and their soft edges.
        emboli_mask: uint8 on its grid, the number of the embolus (1 ...) in each of its voxels.
        emboli: in the order of their numbers.
    """

    volume: Volume
    emboli_mask: Volume
    emboli: tuple[Embolus, ...]


def paint_emboli(
    volume: Volume, arteries: Volume | None, rng: np.random.Generator, count: int | None = None
) -> PaintedStudy:
    """Paint clots of random shape, place and density into the enhanced arteries of a CT.

    The blood in every voxel, and no more of it than the partial volume there, becomes clot: noise stays, edges are
    as soft as the scanner's, and nothing outside the artery and its edge changes. Emboli do not touch each other;
    where there is no room for all, there are fewer.

    Args:
        volume: an enhanced chest CT.
        arteries: its pulmonary arteries, above 0, on its grid; None finds enhanced vessels (``find_arteries``).
        rng: source of chance.
        count: how many emboli; drawn from 1 to 6 where None.

    Raises:
        InputError: if the arteries are empty or lie on another grid.
    """
    arteries = arteries if arteries is not None else find_arteries(volume)
    if not arteries.same_grid(volume):
        raise InputError(f"{arteries.name}: the arteries lie on another grid than {volume.name}")
    box = _box(np.asarray(arteries.voxels) != 0, margin=3, name=arteries.name)
    inside = np.asarray(arteries.voxels[box], np.uint8) > 0
    hu = volume.voxels[box].astype(np.float32)
    spacing = np.array(volume.spacing_mm)
    depth = ndimage.distance_transform_edt(inside, sampling=spacing).astype(np.float32)
    ridge = _ridge(depth, spacing)
    if ridge is None:
        raise InputError(f"{arteries.name}: no artery is thick enough for a clot; give a mask of pulmonary arteries")
    edge = ndimage.binary_dilation(inside, np.ones((1, 3, 3)))
    smooth = ndimage.gaussian_filter(hu, (0, 0.8, 0.8))
    blood = ndimage.maximum_filter(np.where(inside, smooth, -1024), [2 * int(np.ceil(4 / s)) + 1 for s in spacing])
    around = ndimage.minimum_filter(smooth, (1, 5, 5))

    mask = np.zeros(volume.shape, np.uint8)
    view, taken = mask[box], np.zeros_like(inside)
    drawn: list[tuple[str, float]] = []
    chances = BURDENS["mixed"].counts
    wanted = count or 1 + int(rng.choice(len(chances), p=chances))
    for _ in range(wanted + TRIES):
        if len(drawn) == wanted:
            break
        points, radius = ridge.walk(rng)
        fill = float(rng.uniform(1.0, 1.15) if rng.random() < 0.35 else rng.uniform(0.5, 0.8))
        wall = 0.0 if fill > 1 else float(rng.choice([0.0, rng.uniform(0.6, 1)]))
        clot_hu = float(rng.uniform(*CLOT_HU))
        amount = _spheres(clot_along(points, radius, rng, fill, wall), spacing, inside.shape) * edge
        clot = (amount >= 0.5) & inside
        if (taken & (amount > 0)).any() or np.count_nonzero(clot) * np.prod(spacing) < SMALLEST_CLOT_MM3:
            continue
        other = np.minimum(around, clot_hu)  # what shares an edge voxel with the blood: lung, fat
        share = np.clip((smooth - other) / np.maximum(blood - other, 1), 0, 1)
        darker = amount * share * np.maximum(blood - clot_hu, 0)
        if smooth[clot].mean() < clot_hu + LEAST_CONTRAST_HU or darker[clot].mean() < LEAST_CONTRAST_HU:
            continue
        hu -= darker
        drawn.append((place_in_chest(float(radius.mean())), clot_hu))
        view[clot] = len(drawn)
        taken |= ndimage.binary_dilation(amount > 0)
    painted = volume.voxels.copy()
    painted[box] = np.where(taken, np.clip(np.rint(hu), -1024, 3071), painted[box])
    emboli_mask = volume.with_voxels(mask)
    emboli = describe_emboli(emboli_mask, drawn)
    return PaintedStudy(Volume(painted, volume.affine, volume.name), emboli_mask, emboli)


def find_arteries(volume: Volume) -> Volume:
    """Enhanced vessels of a CT without a mask: as bright as blood, within the lungs and their hila.

    Limits: pulmonary veins are as bright as arteries and branch as they do; here nothing tells them apart, so some
    emboli come to lie in veins. Aorta, heart and great veins are removed by their thickness (more than 17 mm) with
    5 mm round them, and the pulmonary trunk and the first centimetres of both main arteries go with them: saddle
    emboli need a mask. What is thinner and near a lung, such as the azygos arch, stays.

    Raises:
        InputError: if there is no lung or no contrast.
    """
    lungs = find_lungs(volume)
    bright = blood_hu(volume, lungs, 20.0)[0] if lungs.slice_range else -np.inf
    if lungs.slice_range is None or not bright > 150:
        raise InputError(f"{volume.name}: no enhanced vessels were found: give an enhanced CT, or a mask of arteries")
    coarse_mm = np.array(volume.spacing_mm) * lungs.step
    hull = ndimage.distance_transform_edt(~lungs.mask, sampling=coarse_mm) <= CLOSED_MM
    hull = ndimage.distance_transform_edt(hull, sampling=coarse_mm) > CLOSED_MM + 2  # kept off the ribs
    first, last = lungs.slice_range
    top = int(last - TOP_SHARE * (last - first)) // lungs.step[0]
    hull[top:] &= ndimage.binary_closing(lungs.mask[top:], np.ones((1, 3, 3)), iterations=2)
    coarse = volume.voxels[:: lungs.step[0], :: lungs.step[1], :: lungs.step[2]].astype(np.float32)
    depth = ndimage.distance_transform_edt(coarse > 0.5 * bright, sampling=coarse_mm)
    thick = depth > LARGEST_RADIUS_MM
    if thick.any():
        hull &= ndimage.distance_transform_edt(~thick, sampling=coarse_mm) > LARGEST_RADIUS_MM + 5
    remains = ndimage.distance_transform_edt((coarse > 0.5 * bright) & hull, sampling=coarse_mm)
    hull &= depth < 1.5 * remains + 1.5  # no skins of what was removed
    for axis, step in enumerate(lungs.step):
        hull = np.repeat(hull, step, axis=axis)
    hull = hull[tuple(slice(0, count) for count in volume.shape)]
    smooth = ndimage.uniform_filter(volume.voxels.astype(np.float32), (1, 2, 2))
    vessels = hull & (smooth > max(0.5 * bright, 120)) & (smooth < 1.6 * bright)
    labels, _ = ndimage.label(vessels)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    vessels = (sizes * float(np.prod(volume.spacing_mm)) >= 200)[labels]  # 0.2 ml: more than a stray bright spot
    return Volume(vessels.astype(np.uint8), volume.affine, f"vessels of {volume.name}")


def place_in_chest(radius_mm: float) -> str:
    """The generation that an artery of this radius usually is in an adult."""
    for place, smallest in (("central", 6.5), ("lobar", 3.9), ("segmental", 2.1)):
        if radius_mm >= smallest:
            return place
    return "subsegmental"


@dataclass(frozen=True, eq=False)
class _Ridge:
    """The middle of the vessels: where the distance to the wall is largest, in mm from the first voxel."""

    points: Points
    radius_mm: NDArray[np.float64]
    tree: KDTree

    def walk(self, rng: np.random.Generator) -> tuple[Points, NDArray[np.float64]]:
        """A stretch of centreline of 3 to 9 radii: from the middle of a vessel on, without turning back."""
        # thin vessels are many and have most of the middle voxels: lobar ones come as often as segmental ones
        steps = np.digitize(self.radius_mm, (2.1, 3.9, 6.5))
        weights = np.array((0.12, 0.34, 0.34, 0.2))[steps] / np.bincount(steps, minlength=4)[steps]
        for _ in range(50):
            at = int(rng.choice(len(self.points), p=weights / weights.sum()))
            length = self.radius_mm[at] * rng.uniform(3, 9)
            path, heading = [at], rng.normal(0, 1, 3)
            walked = 0.0
            while walked < length:
                here = self.points[path[-1]]
                reach = max(1.2 * self.radius_mm[path[-1]], 3.0)
                near = np.array(self.tree.query_ball_point(here, reach))
                step = self.points[near] - here
                far = np.linalg.norm(step, axis=1)
                ahead = (far > 0.4 * reach) & (step @ heading > 0.5 * far * np.linalg.norm(heading))
                if not ahead.any():
                    break
                best = near[ahead][self.radius_mm[near[ahead]].argmax()]
                heading = 0.5 * heading / np.linalg.norm(heading) + (self.points[best] - here) / reach
                walked += float(np.linalg.norm(self.points[best] - here))
                path.append(int(best))
            if len(path) >= 3:
                return self.points[path], self.radius_mm[path]
        around = np.array([-1.0, 0.0, 1.0])[:, None] * self.radius_mm[at] * np.array([0.3, 0.6, 0.6])
        return self.points[at] + around, np.full(3, self.radius_mm[at])


def _ridge(depth: NDArray[np.float32], spacing: NDArray[np.float64]) -> _Ridge | None:
    top = (depth >= ndimage.maximum_filter(depth, 3)) & (depth >= SMALLEST_RADIUS_MM)
    index = np.argwhere(top)
    if len(index) < 3:
        return None
    points = index * spacing
    radius = depth[top] + 0.3 * spacing[1]  # the distance is to the first voxel's centre outside, not to the wall
    return _Ridge(points, radius.astype(np.float64), KDTree(points))


def _spheres(
    clot: tuple[Points, NDArray[np.float64]], spacing: NDArray[np.float64], shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """How much of every voxel lies in a union of spheres, with edges of one voxel."""
    amount = np.zeros(shape, np.float32)
    edge = float(spacing[1:].mean()) * 1.25
    for centre, radius in zip(*clot, strict=True):
        low = np.maximum(np.floor((centre - radius - edge) / spacing).astype(int), 0)
        high = np.minimum(np.ceil((centre + radius + edge) / spacing).astype(int) + 1, shape)
        if (high <= low).any():
            continue
        axes = [(np.arange(a, b) * s - c) ** 2 for a, b, s, c in zip(low, high, spacing, centre, strict=True)]
        away = np.sqrt(axes[0][:, None, None] + axes[1][None, :, None] + axes[2][None, None, :])
        view = amount[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        np.maximum(view, np.clip(0.5 + (radius - away) / edge, 0, 1), out=view)
    return amount


def _box(mask: NDArray[np.bool_], margin: int, name: str) -> tuple[slice, ...]:
    """The smallest box round a mask, a little larger."""
    if not mask.any():
        raise InputError(f"{name}: the mask of arteries is empty")
    found = ndimage.find_objects(mask.astype(np.uint8))[0]
    return tuple(slice(max(side.start - margin, 0), side.stop + margin) for side in found)
