"""One simulated study: patient and scan drawn at random, organs painted slice by slice, vessels, clots and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage

from pe_app.ct.volume import PADDING_HU, Volume, axial_affine
from pe_app.phantom.anatomy import LUNG_BOTTOM_MM, LUNG_TOP_MM, Field, Grain, Patient, Scan, layers, lung_depth
from pe_app.phantom.emboli import BURDENS, BurdenName, Clot, Embolus, place_clots
from pe_app.phantom.raster import Grid, Tubes
from pe_app.phantom.vessels import Points, Tree, Vessels, grow_vessels

SPACINGS_MM = {0.8: 0.05, 1.0: 0.25, 1.25: 0.2, 1.5: 0.15, 2.0: 0.15, 2.5: 0.12, 3.0: 0.05, 5.0: 0.03}
"""How often each slice spacing is drawn; most hospitals reconstruct 1 to 2.5 mm."""

SOLID_MM = 1.6
"""Pixels on which organs are painted before they are enlarged to the scanner's; vessels are painted on the latter."""

Piece = tuple[Points, NDArray[np.float64]]


@dataclass(frozen=True)
class PhantomConfig:
    """What a simulated study looks like.

    Attributes:
        matrix: rows and columns.
        spacing_mm: slice spacing; drawn at random where None.
        burden: ``"mixed"``, 1 to 6 emboli of every size as a hospital sees them; or ``"large"``, 3 to 5 emboli that
            nearly fill the central and lobar arteries.
    """

    matrix: int = 512
    spacing_mm: float | None = None
    burden: BurdenName = "mixed"

    def __post_init__(self) -> None:
        if self.matrix < 64 or not (self.spacing_mm is None or 0.3 <= self.spacing_mm <= 10):
            raise ValueError(f"a phantom needs a matrix from 64 on and a spacing of 0.3 to 10 mm, got {self}")


@dataclass(frozen=True, eq=False)
class Phantom:
    """A simulated study with its truth.

    Attributes:
        volume: the CT, int16 HU.
        emboli_mask: uint8 on the CT's grid, the number of the embolus (1 ...) in each of its voxels.
        emboli: in the order of their numbers; empty for a negative study.
        arteries: uint8 on the CT's grid, 1 in pulmonary arteries, clots included.
    """

    volume: Volume
    emboli_mask: Volume
    emboli: tuple[Embolus, ...]
    arteries: Volume


def make_phantom(
    rng: np.random.Generator, config: PhantomConfig, positive: bool, patient: Patient | None = None
) -> Phantom:
    """A simulated contrast-enhanced chest CT; with emboli in pulmonary arteries if ``positive``.

    The same generator state gives the same study with and without emboli: everything but the clots is drawn from
    streams of its own.

    Args:
        rng: source of chance.
        config: matrix, spacing, how much clot.
        positive: whether emboli are added.
        patient: the same for two studies of one patient; drawn where None.
    """
    body, vessels_rng, grain_rng, clot_rng, noise_rng = rng.spawn(5)
    patient = patient or Patient.draw(body)
    scan = Scan.draw(body)
    grid, offset_mm = _draw_grid(body, config, patient)
    vessels = grow_vessels(
        vessels_rng,
        lambda p: np.asarray(lung_depth(patient, *p.T)),
        leaves=int(np.clip(config.matrix**2 / 440, 100, 600)),
    )
    frame = _Frame(np.array(patient.scale), offset_mm)
    clots: list[Clot] = []
    if positive:
        burden = BURDENS[config.burden]
        count = 1 + int(clot_rng.choice(len(burden.counts), p=burden.counts))
        smallest_mm = max(0.75 * grid.pixel_mm, 0.3 * grid.spacing_mm)
        while not clots:  # a place may not exist in this tree: draw again
            clots = place_clots(vessels.arteries, clot_rng, count, smallest_mm, burden)

    extras = _Extras.draw(body, vessels)
    tubes = _all_tubes(grid, frame, scan, vessels, extras)
    arteries = _artery_tubes(grid, frame, scan, vessels.arteries, clots)
    clot_tubes = [Tubes(grid, [frame.piece((clot.points, clot.radius_mm))]) for clot in clots]
    fields = _SmoothFields(grain_rng, grid)
    noise = _Noise.draw(noise_rng, grid, scan, frame)

    shape = (grid.slices, grid.matrix, grid.matrix)
    voxels = np.empty(shape, np.int16)
    artery_mask, emboli_mask = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    for index in range(grid.slices):
        hu = _solids(patient, scan, frame, grid, fields, index)
        for group, value in tubes:
            _paint(hu, group, index, value)
        covered = np.zeros_like(hu)
        for group, value in arteries:
            _paint(hu, group, index, value, covered)
        artery_mask[index] = covered >= 0.5
        for number, (clot, group) in enumerate(zip(clots, clot_tubes, strict=True), start=1):
            drawn = group.draw(index)
            if drawn is not None:
                box, amount = drawn
                amount = np.minimum(amount, covered[box])  # a clot never leaves its artery
                hu[box] += amount * (clot.hu - hu[box])
                emboli_mask[index][box][amount >= 0.5] = number
        noise.add(hu, index)
        voxels[index] = np.clip(np.rint(hu), PADDING_HU, 3071)

    centre = (grid.matrix - 1) / 2 * grid.pixel_mm
    affine = axial_affine((grid.spacing_mm, grid.pixel_mm, grid.pixel_mm), (-centre, -centre, grid.bottom_mm))
    volume = Volume(voxels, affine, "phantom")
    mask = volume.with_voxels(emboli_mask)
    emboli = describe_emboli(mask, [(clot.place, clot.hu) for clot in clots])
    return Phantom(volume, mask, emboli, volume.with_voxels(artery_mask))


def describe_emboli(mask: Volume, drawn: Sequence[tuple[str, float]]) -> tuple[Embolus, ...]:
    """What can be seen of the drawn emboli; the numbers in ``mask`` are closed up where one is too small to be seen."""
    voxel_mm3 = float(np.prod(mask.spacing_mm))
    emboli: list[Embolus] = []
    boxes = ndimage.find_objects(mask.voxels, len(drawn))
    for number, ((place, hu), box) in enumerate(zip(drawn, boxes, strict=True), start=1):
        if box is None:
            continue
        cells = np.argwhere(mask.voxels[box] == number) + [side.start for side in box]
        mask.voxels[tuple(cells.T)] = len(emboli) + 1
        centre = cells[np.linalg.norm((cells - cells.mean(0)) * mask.spacing_mm, axis=1).argmin()]
        x, y, z = (float(value) for value in mask.to_lps_mm(centre))
        emboli.append(Embolus(place, (x, y, z), len(cells) * voxel_mm3, hu))  # type: ignore[arg-type]
    return tuple(emboli)


@dataclass(frozen=True, eq=False)
class _Frame:
    """From the nominal adult to this patient on this table: scaled, then moved."""

    scale: NDArray[np.float64]
    offset_mm: NDArray[np.float64]

    def piece(self, piece: Piece) -> Piece:
        points, radius = piece
        return points * self.scale + self.offset_mm, radius * float(self.scale.mean())


@dataclass(frozen=True, eq=False)
class _Extras:
    """What looks like an embolus and is none, or is merely there: nodes, plugs, nodules."""

    nodes: list[Piece]
    plugs: list[Piece]
    nodules: list[Piece]
    jets: list[Piece]
    node_hu: float

    @classmethod
    def draw(cls, rng: np.random.Generator, vessels: Vessels) -> _Extras:
        large = [b for b in vessels.arteries.branches if b.place in ("central", "lobar", "segmental")]
        nodes = []
        for _ in range(int(rng.integers(4, 14))):  # lymph nodes lie against the vessels of the hilum
            branch = large[int(rng.integers(len(large)))]
            at = int(rng.integers(len(branch.points)))
            size = float(rng.uniform(2.5, 6.5))
            aside = rng.normal(0, 1, 3)
            centre = branch.points[at] + aside / np.linalg.norm(aside) * (branch.radius_mm[at] + 0.8 * size)
            nodes.append(_blob(rng, centre, size))
        thin = [piece for piece in vessels.bronchi if piece[1].mean() < 4]
        plugs = []
        if thin and rng.random() < 0.4:
            for number in rng.integers(len(thin), size=int(rng.integers(1, 5))):
                points, radius = thin[int(number)]
                plugs.append((points, radius * 1.15))
        leaves = [b for b in vessels.arteries.branches if not b.children]
        nodules = []
        for _ in range(int(rng.integers(0, 4))):
            end = leaves[int(rng.integers(len(leaves)))].points[-1]
            nodules.append(_blob(rng, end + rng.normal(0, 4, 3), float(rng.uniform(2, 6))))
        return cls(nodes, plugs, nodules, _jets(rng, vessels.superior_veins[0]), float(rng.uniform(30, 65)))


def _jets(rng: np.random.Generator, cava: Piece) -> list[Piece]:
    """Streams of blood without contrast in the superior vena cava; they end and begin anew."""
    points, radius = cava
    turn = rng.uniform(0, 6.3) + np.linspace(0, rng.uniform(-2, 2), len(points))
    aside = 0.5 * radius[:, None] * np.stack([np.cos(turn), np.sin(turn), 0 * turn], axis=1)
    shown = np.sin(np.linspace(0, rng.uniform(4, 12), len(points)) + rng.uniform(0, 6.3)) > -0.3
    return [((points + aside)[shown], radius[shown] * rng.uniform(0.25, 0.5))]


def _blob(rng: np.random.Generator, centre: Points, size_mm: float) -> Piece:
    """A lumpy ball of a few overlapping spheres."""
    points = centre + rng.normal(0, 0.3 * size_mm, (4, 3))
    return points, size_mm * rng.uniform(0.6, 1.0, 4)


def _draw_grid(rng: np.random.Generator, config: PhantomConfig, patient: Patient) -> tuple[Grid, NDArray[np.float64]]:
    """Pixels of a field of view that holds the chest, and how far the patient lies off its centre."""
    spacing = float(rng.choice(list(SPACINGS_MM), p=list(SPACINGS_MM.values())))
    spacing = config.spacing_mm or spacing
    field_mm = float(np.clip(330 * patient.scale[0] + patient.fat_mm + rng.uniform(0, 70), 300, 480))
    offset = np.array([rng.normal(0, 6), rng.normal(0, 8), rng.normal(0, 100)])
    bottom = LUNG_BOTTOM_MM * patient.scale[2] + offset[2] - rng.uniform(10, 40)
    top = LUNG_TOP_MM * patient.scale[2] + offset[2] + rng.uniform(8, 25)
    slices = int((top - bottom) / spacing) + 1
    return Grid(slices, config.matrix, spacing, field_mm / config.matrix, float(bottom)), offset


def _all_tubes(grid: Grid, frame: _Frame, scan: Scan, vessels: Vessels, extras: _Extras) -> list[tuple[Tubes, float]]:
    """Everything tubular but the pulmonary arteries, in painter's order."""

    def tubes(pieces: Sequence[Piece], hu: float, grow: float = 1.0) -> tuple[Tubes, float]:
        return Tubes(grid, [frame.piece((points, radius * grow)) for points, radius in pieces]), hu

    veins = [(branch.points, branch.radius_mm) for branch in vessels.veins.branches]
    return [
        tubes([vessels.oesophagus], 35.0),
        tubes(extras.nodes, extras.node_hu),
        tubes(extras.nodules, 45.0),
        tubes(vessels.bronchi, 0.0, 1.22),
        tubes(vessels.bronchi, -970.0),
        tubes(extras.plugs, 25.0),
        tubes([vessels.azygos], 0.6 * scan.aorta),
        tubes([vessels.inferior_vein], scan.inferior_cava),
        tubes(vessels.superior_veins, min(scan.cava, 1500.0)),
        tubes(extras.jets if scan.mixing else [], 0.5 * (scan.inferior_cava + scan.pulmonary)),
        tubes(vessels.aorta, scan.aorta),
        tubes([vessels.outflow], scan.pulmonary),
        tubes(veins, scan.veins),
        tubes(vessels.clavicles, 520.0),
    ]


def _artery_tubes(
    grid: Grid, frame: _Frame, scan: Scan, tree: Tree, clots: Sequence[Clot]
) -> list[tuple[Tubes, float]]:
    """The arteries: downstream of a complete occlusion little contrast arrives."""
    starved = {index for clot in clots for index in clot.starved}
    fed = [b for index, b in enumerate(tree.branches) if index not in starved]
    groups = [
        ([(b.points, b.radius_mm) for b in fed], scan.pulmonary),
        ([(tree.branches[i].points, 0.9 * tree.branches[i].radius_mm) for i in starved], 60 + 0.3 * scan.pulmonary),
        ([clot.occluded for clot in clots if clot.occluded is not None], scan.pulmonary),
    ]
    return [(Tubes(grid, [frame.piece(piece) for piece in pieces]), hu) for pieces, hu in groups if pieces]


def _paint(
    hu: NDArray[np.float32], tubes: Tubes, index: int, value: float, covered: NDArray[np.float32] | None = None
) -> None:
    """Draw one slice of some tubes; ``covered`` keeps how much of every pixel tubes have taken."""
    drawn = tubes.draw(index)
    if drawn is not None:
        box, amount = drawn
        hu[box] += amount * (value - hu[box])
        if covered is not None:
            np.maximum(covered[box], amount, out=covered[box])


def _solids(
    patient: Patient, scan: Scan, frame: _Frame, grid: Grid, fields: _SmoothFields, index: int
) -> NDArray[np.float32]:
    """Organs of one slice, painted on coarse pixels with soft edges and enlarged: ``(matrix, matrix)`` HU."""
    z = (grid.bottom_mm + index * grid.spacing_mm - frame.offset_mm[2]) / frame.scale[2]
    x, y = fields.x / frame.scale[0], fields.y / frame.scale[1]
    x, y = x - frame.offset_mm[0] / frame.scale[0], y - frame.offset_mm[1] / frame.scale[1]
    hu = np.full((fields.size, fields.size), -1000.0, np.float32)
    for layer in layers(patient, scan, x, y, float(z), fields.grain(index)):
        amount = np.clip(np.asarray(layer.depth_mm, np.float32) / fields.pixel_mm + 0.5, 0, 1)
        touched = np.flatnonzero(amount.any(axis=1))
        if len(touched) == 0:
            continue
        rows = slice(touched[0], touched[-1] + 1)
        value = layer.hu[rows] if isinstance(layer.hu, np.ndarray) and layer.hu.ndim else layer.hu
        hu[rows] += amount[rows] * (value - hu[rows])
    if fields.size == grid.matrix:
        return hu
    enlarged = F.interpolate(torch.from_numpy(hu)[None, None], (grid.matrix, grid.matrix), mode="bicubic")
    return enlarged[0, 0].numpy()


class _SmoothFields:
    """Smooth random fields in the patient, four sizes of grain, on the coarse pixels of one slice at a time."""

    def __init__(self, rng: np.random.Generator, grid: Grid) -> None:
        field_mm = grid.matrix * grid.pixel_mm
        self.size = min(grid.matrix, round(field_mm / SOLID_MM / 8) * 8)
        self.pixel_mm = field_mm / self.size
        places = ((np.arange(self.size) - (self.size - 1) / 2) * self.pixel_mm).astype(np.float32)
        self.x, self.y = places[None, :], places[:, None]
        self._spacing_mm = grid.spacing_mm
        length = grid.slices * grid.spacing_mm
        self._lattices = [
            (mm, rng.standard_normal((int(length / mm) + 3, *[int(field_mm / mm) + 4] * 2)).astype(np.float32))
            for mm in (55.0, 20.0, 7.0, 2.8)
        ]

    def grain(self, index: int) -> Grain:
        """The fields of one slice."""
        return Grain(*(self._plane(mm, lattice, index) for mm, lattice in self._lattices))

    def _plane(self, mm: float, lattice: NDArray[np.float32], index: int) -> Field:
        place = index * self._spacing_mm / mm
        below = int(place)
        part = place - below
        # weights of equal power, so that the field is as strong between two layers of the lattice as on them
        plane = (np.cos(part * np.pi / 2) * lattice[below] + np.sin(part * np.pi / 2) * lattice[below + 1])[None, None]
        enlarged = F.interpolate(torch.from_numpy(plane), (self.size, self.size), mode="bicubic")
        return enlarged[0, 0].numpy() * np.float32(1.35)


@dataclass(frozen=True, eq=False)
class _Noise:
    """Noise of one scan: correlated by the kernel, stronger in thin slices.

    With it come streaks from dense contrast in the cava and level bars through shoulders, or arms beside the chest.
    """

    rng: np.random.Generator
    sigma_hu: float
    kernel_pixels: float
    streak_hu: float
    streak_at: NDArray[np.float32]
    cava_slices: tuple[float, float]
    shoulders: float
    bars_hu: float
    outside: NDArray[np.bool_] | None

    @classmethod
    def draw(cls, rng: np.random.Generator, grid: Grid, scan: Scan, frame: _Frame) -> _Noise:
        places = (np.arange(grid.matrix, dtype=np.float32) - (grid.matrix - 1) / 2) * np.float32(grid.pixel_mm)
        x, y = places[None, :], places[:, None]
        landmarks, _ = frame.piece((np.array([(-31.0, -10, -15), (-31, -10, 95), (0, 0, 80)]), np.ones(3)))
        slices = (landmarks[:, 2] - grid.bottom_mm) / grid.spacing_mm
        angle = np.arctan2(y - landmarks[0, 1], x - landmarks[0, 0])
        away = np.hypot(y - landmarks[0, 1], x - landmarks[0, 0])
        teeth = sum(np.sin(n * angle + rng.uniform(0, 6.3)) for n in rng.integers(9, 40, 3))
        streaks = (teeth * np.exp(-away / 45) * np.clip(away / 8 - 0.8, 0, 1)).astype(np.float32)
        circle = np.hypot(x, y) > grid.matrix / 2 * grid.pixel_mm
        return cls(
            rng,
            sigma_hu=float(rng.uniform(9, 22) * (2.0 / grid.spacing_mm) ** 0.4),
            kernel_pixels=float(rng.uniform(0.5, 0.95) * 0.7 / grid.pixel_mm),
            streak_hu=max(scan.cava - 600, 0) * 0.09,
            streak_at=streaks,
            cava_slices=(float(slices[0]), float(slices[1])),
            shoulders=float(slices[2]) if scan.arms_up else 0.0,
            bars_hu=float(rng.uniform(8, 25) if scan.arms_up else rng.uniform(6, 16)),
            outside=circle if rng.random() < 0.4 else None,
        )

    def add(self, hu: NDArray[np.float32], index: int) -> None:
        """Add the noise of a slice; slices are asked for in their order."""
        white = self.rng.standard_normal(hu.shape, dtype=np.float32)
        grain = ndimage.gaussian_filter(white, self.kernel_pixels) if self.kernel_pixels > 0.3 else white
        hu += grain * (self.sigma_hu / max(float(grain.std()), 1e-6)) * np.where(hu < -900, 0.5, 1).astype(np.float32)
        if self.streak_hu > 0 and self.cava_slices[0] < index < self.cava_slices[1]:
            hu += self.streak_at * np.float32(self.streak_hu * self.rng.uniform(0.3, 1))
        if index > self.shoulders:  # few photons pass sideways through shoulders and arms: level bars
            bars = ndimage.uniform_filter1d(white, max(hu.shape[1] // 8, 3), axis=1)
            hu += bars * (self.bars_hu / max(float(bars.std()), 1e-6)) * (hu > -950)
        if self.outside is not None:
            hu[self.outside] = PADDING_HU
