"""Is this a study that the method is for? What is not is refused with a reason, not guessed over."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from scipy import ndimage

from pe_app.common.errors import InputError
from pe_app.common.schema import read_as
from pe_app.ct.lungs import LUNG_AREA_MM2, Lungs, find_lungs
from pe_app.ct.source_series import SourceSeries, unlike_ct
from pe_app.ct.volume import Volume

CODES = {
    "no_contrast": "refuses: blood between the lungs is not enhanced, so emboli cannot be seen",
    "weak_contrast": "warns: small emboli may be missed",
    "lungs_cut": "warns: the lungs go on beyond the first or last slice",
    "not_chest": "refuses: no lungs, or no heart and vessels between them",
    "coarse_spacing": "refuses above 5 mm between slices, warns above 3 mm and of gaps between thin slices",
    "uneven_spacing": "refuses gaps, overlaps and two slices at one position; warns of copies of the same instance",
    "mixed_series": "refuses slices of several series, patients or scans as one; warns of other patients beside it",
    "too_few_slices": "refuses below 20 slices or 100 mm of lung",
    "field_of_view": "refuses below 150 mm, warns below 250 and above 550 mm",
    "matrix": "refuses below 64 pixels, warns below 256",
    "derived": "refuses projections, maps, localizers, colour pictures and other planes than axial; warns of reformats",
    "lossy": "warns: the pixels were once compressed with loss",
    "metal": "warns: streaks of metal may hide or mimic emboli",
    "padding": "refuses undeclared padding in tissue's range and blank slices within the lungs; warns of others",
    "tilted": "refuses: the gantry was tilted, slices are sheared against each other",
    "not_ct": "refuses: another modality",
    "untrained_model": "warns: the model's numbers are random",
    "demo_model": "warns: the model was trained on simulated emboli only",
}
"""Every code with what it does by default. Codes of the model come from its card (``ModelCard.reasons``)."""
NEVER_ACCEPTED = ("mixed_series", "not_chest", "not_ct", "tilted", "uneven_spacing")
"""Where these refuse there is no volume, or no lung in it, to analyse."""

PADDING_SEEN_HU = -700
"""Filling above this is taken for the body; below it for air, which does no harm."""
UNEVEN_HU = 60.0
"""Noise of a low-dose CT between neighbours after smoothing; the shell and the marrow of a bone differ by more."""
CHILDS_POOL = 0.01
"""Blood to measure as a share of the lungs: below 2 l of lung the vessels are smaller, too."""
BASE_MM, APEX_MM = 90.0, 100.0
"""Height over which an adult's lung area falls to nothing: below as a cone's, above as a dome's [ours]."""
MEDIASTINUM_MM = 120.0
"""Width of heart and great vessels round the middle of the body."""


@dataclass(frozen=True)
class Reason:
    """One observation on a study's fitness.

    Attributes:
        code: stable name for programs, one of ``CODES``.
        message: what was measured, where, and what to do.
        refuses: True where the study is not analysed, False for a warning.
    """

    code: str
    message: str
    refuses: bool


@dataclass(frozen=True)
class QualityLimits:
    """What a study must reach; all [ours], the paper took what came.

    Attributes:
        accept: codes that only warn here; a result says that it was made so.
        refuse: codes that refuse here, also where they would only warn.
        no_contrast_hu: emboli are 30 to 80 HU; blood below this hides them, so there is nothing to find.
        weak_contrast_hu: below this small emboli are uncertain for readers too.
        blood_pool_ml: blood that must be as bright: more than a superior vena cava full of contrast holds (about
            10 ml), less than pulmonary trunk or ascending aorta and its neighbours.
        max_spacing_mm: the paper's studies had 0.5 to 5 mm.
        wide_spacing_mm: above it an embolism of a segmental artery may fall between two slices.
        imaged_share: slices thinner than this share of their spacing leave gaps that were not imaged.
        min_slices: below it the 50 slabs would be made of interpolation.
        min_lung_mm: less is a part of the chest; adult lungs are 200 to 300 mm high.
        cut_area: share of the largest lung area that the first or last slice may show before the lung counts as cut.
        min_lung_area_cm2: the largest lung area of a chest, also of a small child; less is a
            lung base in an abdominal CT.
        min_matrix: smaller pixels than a twentieth of the chest are needed to see an artery at all.
        small_matrix: below it segmental arteries are blurred.
        min_field_mm, small_field_mm, large_field_mm: the network sees the middle three quarters of the field of
            view: of a small one lung is missing, in a large one the chest is small.
        max_pixel_ratio: pixels longer than wide by more than this are the slices of another plane.
        tilt_degrees, max_oblique_degrees: angle between the slices and the patient's axial plane from which an
            oblique reformat is warned of and refused.
        metal_hu, metal_ml: bone and blood stay below this HU; as much may be above, clips and calcium are less.
    """

    accept: tuple[str, ...] = ()
    refuse: tuple[str, ...] = ()
    no_contrast_hu: float = 100.0
    weak_contrast_hu: float = 200.0
    blood_pool_ml: float = 20.0
    max_spacing_mm: float = 5.0
    wide_spacing_mm: float = 3.0
    imaged_share: float = 0.7
    min_slices: int = 20
    min_lung_mm: float = 100.0
    cut_area: float = 0.15
    min_lung_area_cm2: float = 30.0
    min_matrix: int = 64
    small_matrix: int = 256
    min_field_mm: float = 150.0
    small_field_mm: float = 250.0
    large_field_mm: float = 550.0
    max_pixel_ratio: float = 1.3
    tilt_degrees: float = 5.0
    max_oblique_degrees: float = 20.0
    metal_hu: float = 2500.0
    metal_ml: float = 5.0

    def __post_init__(self) -> None:
        for code in (*self.accept, *self.refuse):
            if code not in CODES:
                raise InputError(f"there is no reason {code!r}; the codes are {', '.join(CODES)}")
        for code in self.accept:
            if code in NEVER_ACCEPTED:
                raise InputError(f"{code} cannot be accepted: such a study has no volume with lungs to analyse")


def read_limits(path: Path | None = None, accept: Sequence[str] = (), refuse: Sequence[str] = ()) -> QualityLimits:
    """The defaults, changed by a settings file (JSON of ``QualityLimits``' fields) and by codes given beside it.

    Raises:
        InputError: if the file or a code is wrong.
    """
    limits = QualityLimits()
    if path is not None:
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            known = {field.name for field in dataclasses.fields(QualityLimits)}
            if not isinstance(settings, dict) or not settings.keys() <= known:
                raise ValueError(f"expected an object with some of {', '.join(sorted(known))}")
            limits = read_as(TypeAdapter(QualityLimits), settings)
        except (OSError, ValueError) as error:  # InputError is a ValueError
            raise InputError(f"{path}: is not a file of quality limits ({str(error).splitlines()[0]})") from error
    return replace(limits, accept=(*limits.accept, *accept), refuse=(*limits.refuse, *refuse))


def check_study(
    volume: Volume, limits: QualityLimits = QualityLimits(), lungs: Lungs | None = None
) -> tuple[Reason, ...]:
    """Everything that speaks against analysing a CT; empty for a good one. Any reason that ``refuses`` is enough.

    Args:
        volume: the CT; what its headers say is judged where it has a ``source``.
        limits: what it must reach.
        lungs: ``find_lungs`` of it, where that is known already.
    """
    reasons = [*_check_grid(volume, limits), *_check_plane(volume, limits)]
    if volume.source is not None:
        reasons += _check_headers(volume.source, volume.spacing_mm[0], limits)
    if volume.shape[0] < limits.min_slices:
        text = (
            f"{volume.shape[0]} slices, at least {limits.min_slices} are needed: choose the series of the whole chest"
        )
        reasons.append(Reason("too_few_slices", text, True))
    if volume.shape[0] >= limits.min_slices or "too_few_slices" in limits.accept:  # else too little to look for lung in
        lungs = lungs or find_lungs(volume)
        reasons += _check_padding(volume, lungs)
        if lungs.slice_range is None or lungs.areas_mm2.max() < limits.min_lung_area_cm2 * 100:
            text = (
                f"no more than {lungs.areas_mm2.max() / 100:.0f} cm2 of lung on any of {volume.shape[0]} slices; a "
                f"chest has over {limits.min_lung_area_cm2:.0f}: choose the series of the chest"
            )
            reasons.append(Reason("not_chest", text, True))
        else:
            reasons += _check_lungs(volume, lungs, limits)
            reasons += _check_contrast(volume, lungs, limits)
            reasons += _check_metal(volume, lungs, limits)
    return judged(reasons, limits)


def judged(reasons: Iterable[Reason], limits: QualityLimits) -> tuple[Reason, ...]:
    """Reasons, refusals first, with the user's own choice of what refuses and what warns; an accepted one says so."""
    changed = []
    for reason in reasons:
        if reason.refuses and reason.code in limits.accept:
            reason = Reason(reason.code, f"{reason.message} [would be refused; accepted by the user]", False)
        changed.append(replace(reason, refuses=reason.refuses or reason.code in limits.refuse))
    return tuple(sorted(changed, key=lambda reason: not reason.refuses))


def blood_hu(volume: Volume, lungs: Lungs, pool_ml: float) -> tuple[float, float]:
    """How bright the brightest blood between the lungs is, and at which z_mm; NaN where there is nothing to measure.

    In the middle of the chest, in front of the spine: the HU that ``pool_ml`` of even tissue reach (less in small
    lungs, and a quarter of it all, where there is less). A voxel is as bright as the darkest of its neighbours, and
    only counts where the brightest is alike: so bone, calcium and streaks stay out.
    """
    step = lungs.step
    hu = volume.voxels[:: step[0], :: step[1], :: step[2]].astype(np.float32)
    smooth = ndimage.uniform_filter(hu, (1, 3, 3))
    darkest = ndimage.minimum_filter(smooth, (1, 3, 3))
    uneven = ndimage.maximum_filter(smooth, (1, 3, 3)) - darkest
    counted = (
        _mediastinum(hu, lungs, volume.spacing_mm[2] * step[2]) & (darkest > 0) & (uneven < UNEVEN_HU + 0.15 * darkest)
    )
    values, slices = darkest[counted], np.nonzero(counted)[0] * step[0]
    if values.size == 0:
        return float("nan"), float("nan")
    voxel_ml = float(np.prod(volume.spacing_mm)) * float(np.prod(step)) / 1000
    pool_ml = min(pool_ml, CHILDS_POOL * np.count_nonzero(lungs.mask) * voxel_ml)
    count = int(np.clip(round(pool_ml / voxel_ml), 1, max(1, values.size // 4)))
    brightest = np.argpartition(values, -count)[-count:]
    return float(values[brightest].min()), float(volume.slice_z_mm[int(np.median(slices[brightest]))])


def _mediastinum(hu: NDArray[np.float32], lungs: Lungs, pixel_mm: float) -> NDArray[np.bool_]:
    """Heart and great vessels: the middle of the body as high as the lungs, without spine, apices and bases.

    Found by the body's middle and not between both lungs, since one of them may be collapsed or absent.
    """
    slices, rows = (np.flatnonzero(lungs.mask.any(axis=axes)) for axes in ((1, 2), (0, 2)))
    bottom = slices[0] + int(0.2 * np.ptp(slices))  # below is the liver's dome
    top = slices[-1] - int(0.15 * np.ptp(slices))  # above are veins of the arm, full of contrast
    back = rows[0] + int(0.6 * np.ptp(rows))  # behind is the spine
    here = np.s_[bottom : top + 1, rows[0] : back + 1]

    tissue_columns = np.count_nonzero(hu[here] > -300, axis=(0, 1))
    middle = int(np.average(np.arange(hu.shape[2]), weights=tissue_columns + 1e-9))
    half = round(MEDIASTINUM_MM / 2 / pixel_mm)
    region = np.zeros(hu.shape, dtype=bool)
    region[(*here, slice(max(0, middle - half), middle + half + 1))] = True
    region &= ~lungs.mask
    return region


def _check_contrast(volume: Volume, lungs: Lungs, limits: QualityLimits) -> list[Reason]:
    hu, z_mm = blood_hu(volume, lungs, limits.blood_pool_ml)
    if np.isnan(hu):
        return [
            Reason("not_chest", "no heart and vessels found between the lungs: choose the series of the chest", True)
        ]
    where = f"the brightest blood between the lungs has {hu:.0f} HU (about z {z_mm:.0f} mm)"
    if hu < limits.no_contrast_hu:
        text = f"no contrast: {where}, {limits.no_contrast_hu:.0f} are needed: choose the series with contrast"
        return [Reason("no_contrast", text, True)]
    if hu < limits.weak_contrast_hu:
        text = f"weak contrast: {where}; below {limits.weak_contrast_hu:.0f} small emboli may be missed"
        return [Reason("weak_contrast", text, False)]
    return []


def _check_lungs(volume: Volume, lungs: Lungs, limits: QualityLimits) -> list[Reason]:
    """Enough lung, and both ends of it."""
    reasons = []
    first, last = lungs.slice_range or (0, 0)
    lung_mm = float(volume.slice_z_mm[last] - volume.slice_z_mm[first])
    if lung_mm < limits.min_lung_mm:
        text = (
            f"{volume.shape[0]} slices with {lung_mm:.0f} mm of lung, at least {limits.min_lung_mm:.0f} mm are needed: "
            "choose the series of the whole chest"
        )
        reasons.append(Reason("too_few_slices", text, True))
    shares = lungs.areas_mm2 / lungs.areas_mm2.max()
    for index, end, missing_mm in (
        (0, "lower", BASE_MM * np.sqrt(shares[0])),
        (-1, "upper", APEX_MM * (1 - np.sqrt(1 - shares[-1]))),
    ):
        if shares[index] > limits.cut_area:
            text = (
                f"the lungs are cut off at the {end} end: {lungs.areas_mm2[index] / 100:.0f} cm2 of lung on the "
                f"outermost slice (z {volume.slice_z_mm[index]:.0f} mm), {shares[index]:.0%} of the largest; about "
                f"{missing_mm:.0f} mm or more of lung lie beyond and were not analysed"
            )
            reasons.append(Reason("lungs_cut", text, False))
    return reasons


def _check_grid(volume: Volume, limits: QualityLimits) -> list[Reason]:
    """Spacing, matrix and field of view: what the header says."""
    reasons = []
    (_, rows, columns), (slice_mm, row_mm, column_mm) = volume.shape, volume.spacing_mm
    if slice_mm > limits.wide_spacing_mm + 0.05:
        refuses = slice_mm > limits.max_spacing_mm + 0.05  # headers round
        limit = limits.max_spacing_mm if refuses else limits.wide_spacing_mm
        text = f"slices are {slice_mm:.2f} mm apart, above {limit:.1f}: choose the thinner reconstruction"
        reasons.append(Reason("coarse_spacing", text, refuses))
    if min(rows, columns) < limits.small_matrix:
        refuses = min(rows, columns) < limits.min_matrix
        limit = limits.min_matrix if refuses else limits.small_matrix
        text = f"{rows} x {columns} pixels of {row_mm:.2f} x {column_mm:.2f} mm, below {limit}: small arteries are lost"
        reasons.append(Reason("matrix", text, refuses))
    field = f"the field of view is {rows * row_mm:.0f} x {columns * column_mm:.0f} mm"
    if min(rows * row_mm, columns * column_mm) < limits.small_field_mm:
        refuses = min(rows * row_mm, columns * column_mm) < limits.min_field_mm
        text = f"{field}, a chest needs {limits.small_field_mm:.0f}: its sides are not seen"
        reasons.append(Reason("field_of_view", text, refuses))
    elif max(rows * row_mm, columns * column_mm) > limits.large_field_mm:
        text = f"{field}, above {limits.large_field_mm:.0f}: the chest is small in it, choose a closer reconstruction"
        reasons.append(Reason("field_of_view", text, False))
    return reasons


def _check_plane(volume: Volume, limits: QualityLimits) -> list[Reason]:
    """Whether the slices are the patient's axial planes; a reformat of another plane has long pixels or is turned."""
    reasons = []
    _, row_mm, column_mm = volume.spacing_mm
    if max(row_mm, column_mm) > limits.max_pixel_ratio * min(row_mm, column_mm):
        plane = "coronal" if row_mm > column_mm else "sagittal"
        text = (
            f"pixels of {row_mm:.2f} x {column_mm:.2f} mm are those of a {plane} reformat: choose the series of axial "
            "slices"
        )
        reasons.append(Reason("derived", text, True))
    axis = volume.affine[:3, 0] / volume.spacing_mm[0]
    degrees = float(np.degrees(np.arccos(np.clip(axis[2], -1, 1))))
    if degrees > limits.tilt_degrees:
        text = f"the slices are turned by {degrees:.0f} degrees out of the axial plane, an oblique reformat"
        refuses = degrees > limits.max_oblique_degrees
        reasons.append(Reason("derived", text + (": choose the series of axial slices" if refuses else ""), refuses))
    return reasons


def _check_headers(source: SourceSeries, spacing_mm: float, limits: QualityLimits) -> list[Reason]:
    """What the DICOM headers say: how the pixels were made and compressed, and what lay beside them."""
    facts, reasons = source.facts, []
    types = " and ".join(facts.image_types)
    if kind := unlike_ct(types, facts.description):
        text = f"{facts.description or 'the series'} ({types}) is {kind}, not thin slices in HU: choose the original"
        reasons.append(Reason("derived", text, True))
    elif {"DERIVED", "SECONDARY", "REFORMATTED", "MPR"} & {
        word for kind in facts.image_types for word in kind.split("\\")
    }:
        text = f"Image Type {types}: made of other images; the original series shows more where there is one"
        reasons.append(Reason("derived", text, False))
    if facts.lossy:
        text = f"compressed with loss ({facts.lossy}): small emboli and noise are changed"
        reasons.append(Reason("lossy", text, False))
    if facts.thickness_mm and facts.thickness_mm < limits.imaged_share * spacing_mm:
        text = (
            f"slices of {facts.thickness_mm:.2f} mm are {spacing_mm:.2f} mm apart: "
            f"{1 - facts.thickness_mm / spacing_mm:.0%} of the chest was not imaged or not exported"
        )
        reasons.append(Reason("coarse_spacing", text, False))
    if facts.repeated:
        text = f"{facts.repeated} slices lie there as several copies of the same instance; each was taken once"
        reasons.append(Reason("uneven_spacing", text, False))
    if facts.neighbours:
        text = f"series of {facts.neighbours} other patients lie in the same folder; this is series {source.series_uid}"
        reasons.append(Reason("mixed_series", text, False))
    return reasons


def _check_padding(volume: Volume, lungs: Lungs) -> list[Reason]:
    """Slices without an image, and a frame whose undeclared filling would pass for tissue."""
    reasons = []
    flat = np.ptp(volume.voxels[:, ::7, ::7], axis=(1, 2)) == 0
    blank = np.flatnonzero(flat)
    if blank.size:
        lung = np.flatnonzero(lungs.areas_mm2 >= LUNG_AREA_MM2)  # not the range of the lungs, which a blank slice ends
        within = bool(lung.size and ((blank > lung[0]) & (blank < lung[-1])).any())
        text = f"{blank.size} of {flat.size} slices are blank, the first is slice {blank[0] + 1}"
        reasons.append(Reason("padding", text + (": export the series again" if within else ""), within))
    corners = volume.voxels[np.ix_(~flat, [0, 1, -2, -1], [0, 1, -2, -1])].astype(np.int16)
    filled = corners[(np.ptp(corners, axis=(1, 2)) == 0) & (corners[:, 0, 0] > PADDING_SEEN_HU)]
    if len(filled) > corners.shape[0] / 2:
        text = (
            f"the frame is filled with {int(np.median(filled))} HU and no Pixel Padding Value says so, it looks like "
            "tissue: write the padding as air (-1024 HU)"
        )
        reasons.append(Reason("padding", text, True))
    return reasons


def _check_metal(volume: Volume, lungs: Lungs, limits: QualityLimits) -> list[Reason]:
    """Metal at the height of heart and hila; above it undiluted contrast in veins of the arm is as bright."""
    first, last = lungs.slice_range or (0, 0)
    bottom, top = first + round(0.1 * (last - first)), last - round(0.3 * (last - first))
    voxels = volume.voxels[bottom : top + 1].astype(np.int16, copy=False)
    metal_ml = np.count_nonzero(voxels > limits.metal_hu) * float(np.prod(volume.spacing_mm)) / 1000
    if metal_ml <= limits.metal_ml:
        return []
    text = (
        f"metal: {metal_ml:.0f} ml between z {volume.slice_z_mm[bottom]:.0f} and {volume.slice_z_mm[top]:.0f} mm are "
        f"above {limits.metal_hu:.0f} HU; streaks may hide or mimic emboli"
    )
    return [Reason("metal", text, False)]
