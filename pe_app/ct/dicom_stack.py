"""Slices of one series in order: which series is the study's CT, and whether its slices make one volume.

A wrong slice order or a missing slice changes what the networks see without looking wrong on a screen, so whatever is
not one complete, evenly spaced, untilted axial CT series is refused, never repaired.
"""

from __future__ import annotations

import filecmp
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pe_app.common.errors import InputError, UnfitStudy
from pe_app.ct.dicom_headers import SliceHeader, millimetres
from pe_app.ct.source_series import unlike_ct

log = logging.getLogger(__name__)

POSITION_TOLERANCE_MM = 0.1
"""Headers round positions to 0.1 mm and worse; a missing slice is off by a whole spacing."""
TILT_DEGREES = 0.5
"""A tilt above this shears the volume by more than a pixel over a chest."""
MAX_MATRIX = 4096
"""Rows and columns beyond any CT's: a damaged header that would take all memory."""
LESSER_SERIES = 0.5
"""A second series stands in for a larger one that has gaps where it is at least this share as long."""
MAX_SCOUTS = 4
"""Images across the others that are left out of a series: more are another scan, and the series is mixed."""
_PICTURES = {
    "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.7.1", "1.2.840.10008.5.1.4.1.1.7.2",
    "1.2.840.10008.5.1.4.1.1.7.3", "1.2.840.10008.5.1.4.1.1.7.4",
}  # fmt: skip
"""SOP classes of Secondary Capture."""
_MIXED = "two series are mixed, export one series alone"


@dataclass(frozen=True, eq=False)
class Stack:
    """Slices that make one volume: alike, from the feet to the head, evenly spaced.

    Attributes:
        name: how messages call the series.
        slices: in order, each instance once.
        spacing_mm: between neighbours.
        repeated: instances that were there more than once.
    """

    name: str
    slices: tuple[SliceHeader, ...]
    spacing_mm: float
    repeated: int


def arrange(slices: Sequence[SliceHeader]) -> Stack:
    """Slices of one series as a stack.

    Raises:
        UnfitStudy: saying with which code what is uneven, tilted or mixed, and where.
        InputError: if a header lacks what every CT has.
    """
    name = f"series {slices[0].series}"
    fault = unsuitable(slices)
    if fault is not None:
        raise _named(fault, name)
    kept, repeated = _each_once(_slices_alone(slices, name))
    kept = _one_acquisition(kept, name)
    ordered = _sorted_slices(kept, name)
    positions = np.array([one.position_mm for one in ordered])
    spacing_mm = check_uniform_spacing(positions @ ordered[0].normal, name)
    _check_tilt(positions, ordered[0].normal, name)
    return Stack(name, tuple(ordered), spacing_mm, repeated)


def choose_stack(found: Mapping[str, list[SliceHeader]], folder: Path, series: str | None) -> Stack:
    """The series asked for, or the axial CT series with most slices that make a stack."""
    if series is not None:
        if series not in found:
            known = ", ".join(sorted(found)[:10])
            raise InputError(f"{folder}: there is no series {series}; there are {len(found)}: {known}")
        return arrange(found[series])
    faults = {uid: unsuitable(slices) for uid, slices in found.items()}
    usable = in_order_of_choice([slices for uid, slices in found.items() if faults[uid] is None])
    if not usable:
        raise _none_usable({_called(found[uid][0]): fault for uid, fault in faults.items() if fault is not None})
    stack = _first_stack(usable)
    if len(found) > 1:
        taken = stack.slices[0].series
        others = ", ".join(f"{uid} ({len(slices)})" for uid, slices in found.items() if uid != taken)
        log.info("%s: took series %s (%d slices) and left %s", folder, taken, len(stack.slices), others)
    return stack


def in_order_of_choice(usable: Sequence[list[SliceHeader]]) -> list[list[SliceHeader]]:
    """Series with most slices first; projections and maps last.

    Equal counts are reconstructions of one scan: the first made is the one for soft tissue as a rule.
    """

    def order(slices: list[SliceHeader]) -> tuple[bool, int, int, str]:
        first = slices[0]
        return unlike_ct(first.image_type, first.description) != "", -len(slices), first.number, first.series

    return sorted(usable, key=order)


def unsuitable(slices: Sequence[SliceHeader]) -> UnfitStudy | InputError | None:
    """Why a series cannot be the study's CT, from its headers alone; None where it can. The text names no series."""
    images = _slices_alone(slices)
    modality = next((one.modality for one in images or slices if one.modality != "CT"), None)
    if modality is not None:
        return UnfitStudy("not_ct", f"its modality is {modality or 'missing'}, not CT")
    if not images:
        return UnfitStudy("derived", "it is a localizer")
    if any(one.colour for one in images):
        return UnfitStudy("derived", "it holds colour images")
    if (size := max(max(one.matrix) for one in images)) > MAX_MATRIX:
        return InputError(f"its slices have up to {size} rows or columns, the header is wrong")
    if (torn := next((one for one in images if one.part_of), None)) is not None:
        return InputError(
            f"{torn.path.name} is one part of a concatenation, a series torn into several enhanced files: export it "
            "as one enhanced file or as one file a slice"
        )
    if any(one.frames > 1 and one.frame is None for one in images):
        return InputError("several slices share one file that is no enhanced CT: export it as one file a slice")
    if len(images) == 1:
        return UnfitStudy("too_few_slices", "it has a single slice")
    for one in images:
        if not one.has_place:
            faults = [fault for fault in one.unreadable if not fault.startswith("Rescale")]
            why = f" ({'; '.join(faults)})" if faults else ""
            return InputError(f"{one.path.name} lacks a valid position, orientation or pixel spacing{why}")
    if np.median([one.normal[2] for one in images]) < 0.7:
        return UnfitStudy("derived", "its slices are not axial")
    return None


def _slices_alone(slices: Sequence[SliceHeader], name: str = "") -> list[SliceHeader]:
    """The series without what lies among its slices and is none: localizers, pictures of the screen, scouts.

    A picture of the screen is an instance of another SOP class than most; a scout is one of few whose plane lies
    across that of the others. Each is named in the log where ``name`` is given.
    """
    images = [one for one in slices if not one.localizer]
    classes = Counter(one.sop_class for one in images)
    usual = max(classes, key=lambda kind: classes[kind], default="")
    kept = [one for one in images if one.sop_class == usual or one.sop_class not in _PICTURES]
    placed = [one for one in kept if one.has_place]
    if placed:
        middle = np.median([one.normal for one in placed], axis=0)
        across = {one.path for one in placed if abs(float(one.normal @ middle)) < 0.7}
        if len(across) <= MAX_SCOUTS and len(across) < len(placed) / 4:
            kept = [one for one in kept if one.path not in across]
    left = [one for one in images if one not in kept] if len(kept) < len(images) else []
    if name and left:
        names = ", ".join(one.path.name for one in left[:5])
        log.warning("%s: %d pictures among its slices are left out, they are no slices: %s", name, len(left), names)
    return kept


def _one_acquisition(slices: list[SliceHeader], name: str) -> list[SliceHeader]:
    """The slices of one acquisition, where a series holds several of the same places.

    They are told apart by Temporal Position Identifier, Acquisition Number or acquisition time. The one with most
    slices is taken, of equal ones the first; where none of the three tells them apart the slices stay together, and
    are refused for lying at the same positions.
    """
    places = Counter(round(float(one.position_mm @ slices[0].normal), 2) for one in slices)
    if max(places.values()) == 1 or len(places) < 2:
        return slices
    for what, value in (("temporal position", "temporal"), ("acquisition", "acquisition"), ("time", "time")):
        groups = _groups(slices, value)
        if len(groups) > 1 and min(map(len, groups)) > 1:
            taken = max(groups, key=len)
            others = ", ".join(f"{getattr(one[0], value)} ({len(one)})" for one in groups if one is not taken)
            log.warning(
                "%s: holds %d acquisitions; took %s %s (%d slices) and left %s", name, len(groups), what,
                getattr(taken[0], value), len(taken), others,
            )  # fmt: skip
            return taken
    return slices


def _groups(slices: Sequence[SliceHeader], value: str) -> list[list[SliceHeader]]:
    """Slices of equal value, in the order of the values; of times those between which no place comes twice.

    None where a value is missing, or a group holds a place twice.
    """
    if any(not getattr(one, value) for one in slices):
        return []
    ordered = sorted(slices, key=lambda one: _in_order(getattr(one, value)))
    groups: list[list[SliceHeader]] = []
    places: set[float] = set()
    for one in ordered:
        place = round(float(one.position_mm @ slices[0].normal), 2)
        new = place in places if value == "time" else not groups or getattr(groups[-1][0], value) != getattr(one, value)
        if new or not groups:
            groups.append([])
            places = set()
        elif place in places:
            return []
        groups[-1].append(one)
        places.add(place)
    if value == "time" and any(  # the same moment on both sides: time tells nothing
        before[-1].time == after[0].time for before, after in pairwise(groups)
    ):
        return []
    return groups


def _in_order(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return float("inf"), text


def check_uniform_spacing(positions: ArrayLike, name: str) -> float:
    """Distance between neighbouring slices, if it is the same everywhere.

    Args:
        positions: ``(slices,)``, mm along the slices' normal, from the feet to the head.
        name: whose positions they are.

    Returns:
        The spacing in mm, above 0.

    Raises:
        UnfitStudy: if two slices lie at one position, or one is missing; says between which, counted from 1.
    """
    along = np.asarray(positions, dtype=np.float64)
    if along.size < 2 or not np.isfinite(along).all():
        text = f"{name}: a study needs at least two slices with a position, got {along.tolist()}"
        raise UnfitStudy("too_few_slices", text)
    steps = np.diff(along)
    if steps.min() < 0.01:
        k = int(steps.argmin())
        raise UnfitStudy(
            "mixed_series" if np.count_nonzero(steps < 0.01) > steps.size / 3 else "uneven_spacing",
            f"{name}: slice {k + 1} and {k + 2} of {along.size} lie at the same position ({along[k]:.2f} mm); two "
            "series are mixed or a slice was exported twice: export one series alone",
        )
    usual = float(np.sort(steps)[(steps.size - 1) // 2])  # the lower median: a gap never becomes the rule
    off = np.abs(steps - usual)
    if off.max() > max(POSITION_TOLERANCE_MM, 0.05 * usual) + 1e-6:
        k = int(off.argmax())
        why = "some are missing" if steps[k] > usual else "they overlap, two series are mixed"
        raise UnfitStudy(
            "uneven_spacing",
            f"{name}: slices are {usual:.2f} mm apart, but {steps[k]:.2f} mm between slice {k + 1} and {k + 2} of "
            f"{along.size}; {why}: export the whole series again",
        )
    return float((along[-1] - along[0]) / steps.size)


def _named(fault: InputError, name: str) -> InputError:
    text = f"{name}: {fault}: a study needs the folder with all slices of an axial CT series"
    return UnfitStudy(fault.code, text) if isinstance(fault, UnfitStudy) else InputError(text)


def _first_stack(usable: Sequence[list[SliceHeader]]) -> Stack:
    """The first series if it makes a stack; where it has gaps, another one that shows about as much."""
    try:
        return arrange(usable[0])
    except InputError as fault:
        for other in usable[1:]:
            if _length_mm(other) >= LESSER_SERIES * _length_mm(usable[0]):
                with suppress(InputError):
                    stack = arrange(other)
                    log.warning("%s: so series %s is taken", fault, other[0].series)
                    return stack
        raise


def _length_mm(slices: Sequence[SliceHeader]) -> float:
    return float(np.ptp([one.position_mm @ slices[0].normal for one in slices]))


def _called(one: SliceHeader) -> str:
    """A series by its UID, with number and description, by which people know it."""
    known = " ".join(
        part for part in (str(one.number or ""), f"'{one.description}'" if one.description else "") if part
    )
    return f"series {one.series} ({known})" if known else f"series {one.series}"


def _none_usable(faults: Mapping[str, InputError]) -> InputError:
    """What to say of a folder without a usable series: the faults, and the code that all of them amount to."""
    reasons = "; ".join(f"{name}: {fault}" for name, fault in list(faults.items())[:3])
    more = f"; and {len(faults) - 3} series more" if len(faults) > 3 else ""
    text = f"{reasons}{more}: a study needs the folder with all slices of an axial CT series"
    codes = {fault.code if isinstance(fault, UnfitStudy) else "" for fault in faults.values()}
    if "" in codes:
        return InputError(text)
    if codes == {"too_few_slices"} and len(faults) > 1:
        return UnfitStudy("mixed_series", f"{len(faults)} series of a single slice each lie together: {text}")
    return UnfitStudy(next((code for code in ("too_few_slices", "derived") if code in codes), "not_ct"), text)


def _each_once(slices: Sequence[SliceHeader]) -> tuple[list[SliceHeader], int]:
    """The slices without copies of the same instance, and how many copies there were."""
    kept: dict[object, SliceHeader] = {}
    repeated = 0
    for one in slices:
        key = (one.instance, one.frame) if one.instance else one.path
        if key in kept and filecmp.cmp(kept[key].path, one.path, shallow=False):
            repeated += 1
        else:  # the same name for other bytes is no copy
            kept[key if key not in kept else one.path] = one
    return list(kept.values()), repeated


def _sorted_slices(slices: list[SliceHeader], name: str) -> list[SliceHeader]:
    """From the feet to the head along the common normal, after every slice was found to be alike."""
    normal = slices[0].normal
    slices = sorted(slices, key=lambda one: float(one.position_mm @ normal))
    first = slices[0]
    for k, one in enumerate(slices):
        where = f"slice {k + 1} of {len(slices)}"
        if np.abs(one.orientation - first.orientation).max() > 1e-3:
            fault = f"slice 1 and {k + 1} of {len(slices)} have different orientations"
        elif one.matrix != first.matrix:
            a, b = ("x".join(map(str, matrix)) for matrix in (first.matrix, one.matrix))
            fault = f"slice 1 has {a} pixels, {where} has {b}"
        elif np.abs(np.subtract(one.pixel_mm, first.pixel_mm)).max() > 1e-3:
            a, b = (millimetres(pixel) for pixel in (first.pixel_mm, one.pixel_mm))
            fault = f"slice 1 has pixels of {a} mm, {where} {b} mm"
        elif (one.patient, one.study) != (first.patient, first.study):  # LIDC has a frame of reference a slice
            fault = f"slice 1 and {k + 1} of {len(slices)} name different patients or studies"
        else:
            continue
        raise UnfitStudy("mixed_series", f"{name}: {fault}: {_MIXED}")
    return slices


def _check_tilt(positions: NDArray[np.float64], normal: NDArray[np.float64], name: str) -> None:
    """Refuse slices that are stacked along another direction than their normal: the volume would be sheared."""
    stacked = positions[-1] - positions[0]
    tilt = np.degrees(np.arccos(np.clip(abs(stacked @ normal) / np.linalg.norm(stacked), 0, 1)))
    if tilt > TILT_DEGREES:
        raise UnfitStudy(
            "tilted",
            f"{name}: the gantry was tilted by {tilt:.1f} degrees, the slices are sheared against each other: "
            "export a reformat with straight axial slices",
        )
    middle = np.linspace(positions[0], positions[-1], len(positions))
    aside = np.linalg.norm(positions - middle - np.outer((positions - middle) @ normal, normal), axis=1)
    if aside.max() > 1.0:
        k = int(aside.argmax())
        text = f"{name}: slice {k + 1} of {len(positions)} is {aside[k]:.2f} mm aside of the others: {_MIXED}"
        raise UnfitStudy("mixed_series", text)
