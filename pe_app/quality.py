"""Is this a study that the method is for? What is not is refused with a reason, not guessed over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pe_app.lungs import Lungs, find_lungs
from pe_app.volume import Volume

UNEVEN_HU = 60.0
"""Noise of a low-dose CT between neighbours after smoothing; the shell and the marrow of a bone differ by more."""
MEDIASTINUM_MM = 120.0
"""Width of heart and great vessels round the middle of the body."""


@dataclass(frozen=True)
class Reason:
    """One finding about a study's fitness.

    Attributes:
        code: stable name for programs: ``no_contrast``, ``weak_contrast``, ``lungs_cut``, ``not_chest``,
            ``coarse_spacing``, ``too_few_slices``, ``field_of_view`` or ``matrix``.
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
        no_contrast_hu: emboli are 30 to 80 HU; blood below this hides them, so there is nothing to find.
        weak_contrast_hu: below this small emboli are uncertain for readers too.
        blood_pool_ml: blood that must be as bright: more than a superior vena cava full of contrast holds (about
            10 ml), less than pulmonary trunk or ascending aorta and its neighbours.
        max_spacing_mm: the paper's studies had 0.5 to 5 mm.
        wide_spacing_mm: above it an embolism of a segmental artery may fall between two slices.
        min_slices: below it the 50 slabs would be made of interpolation.
        min_lung_mm: less is a part of the chest; adult lungs are 200 to 300 mm high.
        cut_area: share of the largest lung area that the first or last slice may show before the lung counts as cut.
        min_lung_area_cm2: the largest lung area of a chest; less is a lung base in an abdominal CT.
        min_matrix: smaller pixels than a twentieth of the chest are needed to see an artery at all.
        small_matrix: below it segmental arteries are blurred.
        min_field_mm, small_field_mm, large_field_mm: the network sees the middle three quarters of the field of
            view: of a small one lung is missing, in a large one the chest is small.
    """

    no_contrast_hu: float = 100.0
    weak_contrast_hu: float = 200.0
    blood_pool_ml: float = 20.0
    max_spacing_mm: float = 5.0
    wide_spacing_mm: float = 3.0
    min_slices: int = 20
    min_lung_mm: float = 100.0
    cut_area: float = 0.15
    min_lung_area_cm2: float = 50.0
    min_matrix: int = 64
    small_matrix: int = 256
    min_field_mm: float = 150.0
    small_field_mm: float = 250.0
    large_field_mm: float = 550.0


def check_study(
    volume: Volume, limits: QualityLimits = QualityLimits(), lungs: Lungs | None = None
) -> tuple[Reason, ...]:
    """Everything that speaks against analysing a CT; empty for a good one. Any reason that ``refuses`` is enough.

    Args:
        volume: the CT.
        limits: what it must reach.
        lungs: ``find_lungs`` of it, where that is known already.
    """
    reasons = _check_grid(volume, limits)
    if volume.shape[0] < limits.min_slices:
        text = (
            f"{volume.shape[0]} slices, at least {limits.min_slices} are needed: choose the series of the whole chest"
        )
        return (*reasons, Reason("too_few_slices", text, True))  # too little to look for lung and blood in
    lungs = lungs or find_lungs(volume)
    if lungs.slice_range is None or lungs.areas_mm2.max() < limits.min_lung_area_cm2 * 100:
        return (
            *reasons,
            Reason(
                "not_chest",
                f"no more than {lungs.areas_mm2.max() / 100:.0f} cm2 of lung on any of {volume.shape[0]} slices; a "
                f"chest has over {limits.min_lung_area_cm2:.0f}: choose the series of the chest",
                True,
            ),
        )
    return (*reasons, *_check_lungs(volume, lungs, limits), *_check_contrast(volume, lungs, limits))


def blood_hu(volume: Volume, lungs: Lungs, pool_ml: float) -> tuple[float, float]:
    """How bright the brightest blood between the lungs is, and at which z_mm; NaN where there is nothing to measure.

    In the middle of the chest, in front of the spine: the HU that ``pool_ml`` of even tissue reach (a quarter of it
    all, where there is less). A voxel is as bright as the darkest of its neighbours, and only counts where the
    brightest is alike: so bone, calcium and streaks stay out.
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
    largest = lungs.areas_mm2.max()
    for index, end in ((0, "lower"), (-1, "upper")):
        area = lungs.areas_mm2[index]
        if area > limits.cut_area * largest:
            text = (
                f"the lungs are cut off at the {end} end: {area / 100:.0f} cm2 of lung on the outermost slice "
                f"(z {volume.slice_z_mm[index]:.0f} mm); what lies beyond was not analysed"
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
