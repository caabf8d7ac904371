"""What the model says of a study: the noun that leaves the method for the command line, the server and Slicer.

``Detection.to_json`` is the contract with every reader of results; its schema is ``pe-detection/2``. Files of schema 1,
which lack sizes, places and the extent estimate, are still read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pe_app.common.schema import Schema
from pe_app.ct.quality import Reason
from pe_app.ct.volume import Volume

NOTICE = "Research use only, not for diagnosis."

NOT_CLINICAL = {"untrained_model": "Untrained model", "demo_model": "Demonstration model"}
"""Reasons of a model whose numbers are not a clinical result, and what such a model is called."""

CANDIDATE_THRESHOLD = 0.5
"""Attention x slab probability from which a region is a candidate: nowhere in a slab that is rather without embolism
[ours]. With 0.3, the model that ships found no more emboli and showed ten times as many false candidates."""

PEAKS_APART_MM = 20.0
"""A larger region is shared out among several candidates [ours]: on a rendered patient never trained on, 6 instead of 4
of 7 emboli of 0.3 to 3 ml then had a candidate within 12 mm at 2 false ones a study."""

MAX_CANDIDATES = 20
"""More places than this help no reader; the strongest are kept [ours]."""

Side = Literal["left", "right", "midline"]
"""Of the patient; midline is between the lungs, nearer to neither, as the pulmonary trunk and a saddle embolus are."""

Level = Literal["central", "peripheral"]
"""Central is trunk, main and lobar arteries; peripheral is segmental arteries and beyond."""

Point = tuple[float, float, float]
Floats = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """What one slab contributes.

    Attributes:
        slab: 0 nearest the feet.
        z_mm: LPS z of its middle.
        slice_index: CT slice nearest to its middle.
        probability: stage I's probability of embolism in this slab.
        attention_peak: maximum of its un-normalised attention map; 0 where the map is empty.
        peak_lps_mm: where that maximum lies; None where the map is empty.
    """

    slab: int
    z_mm: float
    slice_index: int
    probability: float
    attention_peak: float
    peak_lps_mm: Point | None


@dataclass(frozen=True)
class Candidate:
    """A region of attention: where to look. Ranked by ``peak * slab_probability``.

    Attributes:
        rank: 1 for the strongest.
        z_mm: LPS z of its strongest cell's slab.
        slice_index: CT slice nearest to it.
        centre_lps_mm: attention-weighted centre of the region.
        extent_mm: its box along (left-right, front-back, feet-head), whole cells of about 11 mm.
        peak: attention at the strongest cell, 1 where it is its slab's maximum.
        slab_probability: stage I's probability of that slab.
        size_mm: the longest side of its box.
        slices: CT slices of its lowest and its highest slab.
        volume_ml: of its cells, whole ones; attention is wider than the clot it lies on.
        side, level: where it lies (``candidate_places``); None where that is not known. As all fields from
            ``size_mm`` on are in a file of schema 1.
    """

    rank: int
    z_mm: float
    slice_index: int
    centre_lps_mm: Point
    extent_mm: Point
    peak: float
    slab_probability: float
    size_mm: float | None = None
    slices: tuple[int, int] | None = None
    volume_ml: float | None = None
    side: Side | None = None
    level: Level | None = None

    @property
    def place(self) -> str:
        """Side and level in words, ``left, peripheral``; empty where neither is known."""
        return ", ".join(word for word in (self.side, self.level) if word)


@dataclass(frozen=True)
class ExtentEstimate:
    """How far attention reaches in a study. An estimate of extent and not a clot burden: no clot is outlined.

    Attributes:
        volume_ml: of all cells at or above the threshold of a candidate.
        slab_share: share of the slabs, from the lung's lowest to its highest, that hold such a cell; 0 to 1.
    """

    volume_ml: float
    slab_share: float


@dataclass(frozen=True)
class ImageIdentity:
    """Which voxels were analysed.

    Attributes:
        size: slices, rows, columns.
        spacing_mm: likewise.
        sha256: of the voxels.
        series_number: Series Number of its DICOM series; None where it has none.
        instance_numbers: Instance Number, or frame number, of every slice from the feet to the head; empty where
            they are not known.
    """

    size: tuple[int, int, int]
    spacing_mm: Point
    sha256: str
    series_number: int | None = None
    instance_numbers: tuple[int, ...] = ()

    @classmethod
    def of(cls, volume: Volume) -> ImageIdentity:
        """The identity of a CT."""
        source = volume.source
        series, instances = (source.series_number, source.instance_numbers) if source else (None, ())
        return cls(volume.shape, volume.spacing_mm, volume.sha256, series, instances)

    def slice_name(self, slice_index: int) -> str:
        """What a slice is called: as a PACS does where it came from one, else by its place from the feet."""
        if slice_index < len(self.instance_numbers):
            series = "" if self.series_number is None else f"series {self.series_number}, "
            return f"{series}image {self.instance_numbers[slice_index]}"
        return f"slice {slice_index + 1} of {self.size[0]} from the feet"


@dataclass(frozen=True)
class ModelIdentity:
    """Which model spoke: its card's name and version, the SHA-256 of its file, whether both stages are trained."""

    name: str
    version: str
    sha256: str
    trained: bool
    date: str = ""


@dataclass(frozen=True)
class Detection:
    """A study's probability with the evidence behind it, or the reasons why there is none.

    Attributes:
        status: ``refused`` when the method is not made for this study; then there is no probability.
        reasons: everything a reader must know first: why it was refused, what limits it, what the model never saw.
        probability: stage II's probability of embolism; None when refused.
        threshold: probability from which the study counts as positive.
        evidence: one entry a slab, feet to head; empty when refused.
        candidates: ranked places to look at; empty when refused.
        image: the voxels analysed.
        model: the model that spoke.
        seconds: duration of every step.
        extent_estimate: how far attention reaches; None when refused, and in a file of schema 1.
    """

    status: Literal["analysed", "refused"]
    reasons: tuple[Reason, ...]
    probability: float | None
    threshold: float
    evidence: tuple[Evidence, ...]
    candidates: tuple[Candidate, ...]
    image: ImageIdentity
    model: ModelIdentity
    seconds: Mapping[str, float] = field(default_factory=dict)
    extent_estimate: ExtentEstimate | None = None

    @property
    def positive(self) -> bool | None:
        """Whether the probability reaches the threshold; None when refused."""
        return None if self.probability is None else self.probability >= self.threshold

    @property
    def notice(self) -> str:
        """What stands on everything that leaves the program."""
        return NOTICE

    @property
    def not_clinical(self) -> str:
        """``Demonstration model`` or ``Untrained model``, whose numbers are not a clinical result; else empty."""
        return next((NOT_CLINICAL[reason.code] for reason in self.reasons if reason.code in NOT_CLINICAL), "")

    @property
    def caution(self) -> str:
        """What heads everything that shows this detection; empty for a model trained on real emboli."""
        return f"{self.not_clinical}: not a clinical result" if self.not_clinical else ""

    def to_json(self) -> dict[str, object]:
        """The detection as plain finite JSON, schema ``pe-detection/2``.

        Raises:
            ValueError: if a number is not finite; a result with such a number must not leave the method.
        """
        return DETECTION.write(self)

    @classmethod
    def from_json(cls, payload: object) -> Detection:
        """The detection that ``to_json`` wrote, now or with schema 1.

        Raises:
            InputError: naming the first value that is not as it must be, or a schema that is not known.
        """
        return DETECTION.read(payload)


DETECTION = Schema(
    Detection, "pe-detection", 2, oldest=1, derived={"notice": "string", "positive": ["boolean", "null"]}
)


def find_candidates(
    attention: Floats,
    slab_probability: Floats,
    grid: Volume,
    slice_index: Sequence[int],
    threshold: float = CANDIDATE_THRESHOLD,
    *,
    at_least_one: bool = False,
) -> tuple[Candidate, ...]:
    """Regions of ``attention * slab probability`` at or above a threshold (``candidate_regions``), strongest first.

    Args:
        attention: ``(slabs, grid, grid)``, each map divided by its own maximum.
        slab_probability: ``(slabs,)``.
        grid: the coarse grid in patient space (``Slabs.to_volume``).
        slice_index: CT slice of every slab.
        threshold: above 0, at most 1.
        at_least_one: where nothing reaches the threshold, the strongest cell is a candidate all the same.
    """
    weighted = attention * slab_probability[:, None, None]
    if at_least_one and 0 < weighted.max() < threshold:
        threshold = float(weighted.max())
    regions = candidate_regions(weighted, grid.spacing_mm, threshold)
    cell_mm = np.array(grid.spacing_mm)
    cell_ml = float(cell_mm.prod()) / 1000
    found = []
    for rank, box in enumerate(ndimage.find_objects(regions), start=1):
        cells = np.argwhere(regions == rank)
        strength = weighted[tuple(cells.T)]
        slab, row, column = cells[strength.argmax()]
        centre = grid.to_lps_mm(np.average(cells, axis=0, weights=strength))
        extent = np.array([side.stop - side.start for side in box]) * cell_mm
        found.append(
            Candidate(
                rank=rank,
                z_mm=float(grid.slice_z_mm[slab]),
                slice_index=int(slice_index[slab]),
                centre_lps_mm=_point(centre),
                extent_mm=_point(extent[::-1]),
                peak=float(attention[slab, row, column]),
                slab_probability=float(slab_probability[slab]),
                size_mm=float(extent.max()),
                slices=(int(slice_index[box[0].start]), int(slice_index[box[0].stop - 1])),
                volume_ml=len(cells) * cell_ml,
            )
        )
    return tuple(found)


def candidate_regions(
    weighted: Floats, cell_mm: Sequence[float], threshold: float = CANDIDATE_THRESHOLD
) -> NDArray[np.int32]:
    """The cells of every candidate: its rank, 0 elsewhere.

    A connected region (26 neighbours) that is larger than ``PEAKS_APART_MM`` may hold several emboli, and its middle
    none: it is shared out among its strongest cells that lie so far apart, each cell to the strongest within reach.

    Args:
        weighted: ``(slabs, grid, grid)``, attention times slab probability.
        cell_mm: size of a cell (slab, row, column).
        threshold: above 0, at most 1.
    """
    regions, count = ndimage.label(weighted >= threshold, structure=np.ones((3, 3, 3)))
    parts = np.zeros(regions.shape, np.int32)
    peaks: list[tuple[float, int]] = []
    for region, box in enumerate(ndimage.find_objects(regions, count), start=1):
        cells = np.argwhere(regions[box] == region) + [side.start for side in box]
        strength = weighted[tuple(cells.T)]
        places = cells * np.array(cell_mm)
        which = np.zeros(len(cells), np.int32)
        for cell in np.argsort(-strength, kind="stable"):
            if which[cell]:
                continue
            peaks.append((-float(strength[cell]), int(cells[cell][0])))
            near = np.linalg.norm(places - places[cell], axis=1) <= PEAKS_APART_MM
            which[near & (which == 0)] = len(peaks)
        parts[tuple(cells.T)] = which
    rank_of = np.zeros(len(peaks) + 1, np.int32)
    for rank, part in enumerate(sorted(range(len(peaks)), key=peaks.__getitem__)[:MAX_CANDIDATES], start=1):
        rank_of[part + 1] = rank
    ranks: NDArray[np.int32] = rank_of[parts]
    return ranks


def estimate_extent(
    attention: Floats, slab_probability: Floats, grid: Volume, threshold: float = CANDIDATE_THRESHOLD
) -> ExtentEstimate:
    """How far ``attention * slab probability`` at or above a threshold reaches; arguments as ``find_candidates``."""
    strong = attention * slab_probability[:, None, None] >= threshold
    cell_ml = float(np.prod(grid.spacing_mm)) / 1000
    return ExtentEstimate(float(strong.sum()) * cell_ml, float(strong.any(axis=(1, 2)).mean()))


def _point(values: Floats) -> Point:
    x, y, z = (float(value) for value in values)
    return x, y, z
