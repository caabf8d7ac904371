"""One CT series out of DICOM files: sorted by patient position, checked, its pixels in HU.

A wrong slice order, a missing slice or a wrong rescale changes what the networks see without looking wrong on a
screen, so whatever is not one complete, evenly spaced, untilted axial CT series is refused, never repaired.
"""

from __future__ import annotations

import filecmp
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import ArrayLike, NDArray
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import pixel_array
from pydicom.uid import (
    JPEG2000,
    CTImageStorage,
    EnhancedCTImageStorage,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    LegacyConvertedEnhancedCTImageStorage,
)
from scipy import ndimage

from pe_app.common.errors import InputError, UnfitStudy
from pe_app.ct.source_series import SeriesFacts, SourceInstance, SourceSeries, unlike_ct
from pe_app.ct.volume import PADDING_HU, Volume, canonical_volume

log = logging.getLogger(__name__)

POSITION_TOLERANCE_MM = 0.1
"""Headers round positions to 0.1 mm and worse; a missing slice is off by a whole spacing."""
TILT_DEGREES = 0.5
"""A tilt above this shears the volume by more than a pixel over a chest."""
MAX_MATRIX = 4096
"""Rows and columns beyond any CT's: a damaged header that would take all memory."""
SPACING_RANGE_MM = (0.1, 30.0)
"""Outside it a header's spacing is a mistake (metres, micrometres, zero)."""
MAX_POSITION_MM = 1e5
"""Scanners place their patients within metres of the origin."""
AIR_PRESENT_HU = -200
"""Every CT of a chest holds voxels below this; values that never get there are not HU."""
LESSER_SERIES = 0.5
"""A second series stands in for a larger one that has gaps where it is at least this share as long."""

DICOM_HEAD = 132
"""Bytes that tell whether a file is DICOM."""

_ENHANCED = (EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
_LOSSY_SYNTAXES = {
    JPEGBaseline8Bit: "JPEG", JPEGExtended12Bit: "JPEG", JPEGLSNearLossless: "JPEG-LS near-lossless",
    JPEG2000: "JPEG 2000",
}  # fmt: skip
_LOSSY_METHODS = {"ISO_10918_1": "JPEG", "ISO_14495_1": "JPEG-LS near-lossless", "ISO_15444_1": "JPEG 2000"}
_HEADER_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID",
    "SeriesNumber", "SeriesDescription", "Modality", "ImageType", "Rows", "Columns", "SamplesPerPixel",
    "NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
    "RescaleSlope", "RescaleIntercept", "LossyImageCompression", "LossyImageCompressionMethod",
    "LossyImageCompressionRatio", "ConcatenationUID", "InConcatenationTotalNumber", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
_RESULT_TAGS = [
    "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientSize",
    "PatientWeight", "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber",
    "ReferringPhysicianName", "Modality", "SeriesNumber", "SeriesDate", "SeriesTime", "SeriesDescription",
    "BodyPartExamined", "PatientPosition", "PositionReferenceIndicator", "Manufacturer", "ManufacturerModelName",
    "InstitutionName", "DeviceSerialNumber", "SoftwareVersions", "ConvolutionKernel", "KVP", "ContrastBolusAgent",
]  # fmt: skip
"""What results must repeat of their source (patient, study, frame of reference), and what people look up."""
_MIXED = "two series are mixed, export one series alone"


def read_dicom_folder(folder: Path, series: str | None = None) -> Volume:
    """The axial CT series with most slices below ``folder``, or the one whose SeriesInstanceUID is given.

    Headers are read first, without pixels; pixels once, of the chosen series, straight into one array.

    Raises:
        InputError: as ``read_volume``.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise InputError(f"{folder}: the folder is empty; a study needs the folder with all slices of a series")
    headers = [header for path in files for header in read_headers(path)]
    if not headers:
        dicom = sum(is_dicom(path) for path in files)
        what = f"none of the {dicom} DICOM files is an image" if dicom else f"none of the {len(files)} files is DICOM"
        raise InputError(f"{folder}: {what}; a study needs the folder with all slices of a series")
    found = by_series(headers)
    stack = _choose_stack(found, folder, series)
    neighbours = len({header.patient for header in headers} - {stack.slices[0].patient})
    return read_stack(stack, folder, neighbours)


def by_series(headers: Sequence[SliceHeader]) -> dict[str, list[SliceHeader]]:
    """Slices by SeriesInstanceUID, in the order of their first ones."""
    found: dict[str, list[SliceHeader]] = defaultdict(list)
    for header in headers:
        found[header.series].append(header)
    return found


def read_stack(stack: Stack, root: Path, neighbours: int = 0) -> Volume:
    """A stack as a Volume.

    Args:
        stack: the slices (``arrange``).
        root: the folder that their files lie in, for the way back.
        neighbours: other patients found beside it.

    Raises:
        InputError: if pixels cannot be read.
    """
    affine = np.eye(4)
    first = stack.slices[0]
    rows_mm, columns_mm = first.pixel_mm
    affine[:3, 0] = first.normal * stack.spacing_mm
    affine[:3, 1] = first.orientation[3:] * rows_mm  # the second triple runs down a column, from row to row
    affine[:3, 2] = first.orientation[:3] * columns_mm
    affine[:3, 3] = first.position_mm
    voxels = _read_pixels(stack)
    check_hu_range(float(voxels.min()), float(voxels.max()), stack.name)
    volume = canonical_volume(voxels, affine, stack.name)
    return replace(volume, source=_source(stack, root, neighbours))


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


def check_hu_range(low: float, high: float, name: str) -> None:
    """Refuse values that cannot be HU of a chest.

    Raises:
        InputError: if there is no air among them, or more than 16 bits hold.
    """
    if low > AIR_PRESENT_HU or high > 32767:
        raise InputError(
            f"{name}: values run from {low:g} to {high:g}, these are not HU (air is near -1000, water 0): "
            "export the CT without windowing or scaling"
        )


def is_dicom(path: Path) -> bool:
    """By content: the DICM mark, or a data set without preamble that begins with group 0002 or 0008."""
    with path.open("rb") as file:
        return looks_dicom(file.read(DICOM_HEAD))


def looks_dicom(head: bytes) -> bool:
    """``is_dicom`` of a file's first ``DICOM_HEAD`` bytes."""
    return head[128:] == b"DICM" or (len(head) > 8 and head[0] in (2, 8) and head[1] == head[3] == 0)


@dataclass(frozen=True, eq=False)
class SliceHeader:
    """What the sorting pass learns of one slice without its pixels: a file, or one frame of an enhanced file.

    Attributes:
        path: the file.
        frame: frame number from 0 in an enhanced file; None in a file of one slice.
        instance, sop_class, patient, study, series, frame_of_reference: identifiers as in the header.
        number: Series Number.
        description: Series Description.
        modality: CT where the header names none but the SOP class does.
        image_type: values joined by a backslash.
        colour: whether a pixel has several numbers.
        frames: of the file.
        matrix: rows, columns.
        position_mm, orientation, pixel_mm: NaN where they are missing.
        thickness_mm: Slice Thickness; NaN where it is missing.
        slope, intercept: to HU; NaN where they are missing.
        lossy: how it was compressed with loss; empty where it was not.
        part_of: Concatenation UID where the series is torn into several enhanced files.
    """

    path: Path
    frame: int | None
    instance: str
    sop_class: str
    patient: str
    study: str
    series: str
    frame_of_reference: str
    number: int
    description: str
    modality: str
    image_type: str
    colour: bool
    frames: int
    matrix: tuple[int, int]
    position_mm: NDArray[np.float64]
    orientation: NDArray[np.float64]
    pixel_mm: tuple[float, float]
    thickness_mm: float
    slope: float
    intercept: float
    lossy: str
    part_of: str

    @property
    def localizer(self) -> bool:
        """Whether it is the overview picture that the scan was planned on."""
        return "LOCALIZER" in self.image_type.split("\\")

    @cached_property
    def normal(self) -> NDArray[np.float64]:
        """Perpendicular to the slice, towards the head."""
        normal = np.cross(self.orientation[:3], self.orientation[3:])
        return normal if normal[2] > 0 else -normal

    @property
    def has_place(self) -> bool:
        """Whether position, orientation and pixel spacing are there and possible."""
        numbers = np.concatenate([self.position_mm, self.orientation, self.pixel_mm])
        unit = np.abs(np.linalg.norm(self.orientation.reshape(2, 3), axis=1) - 1).max() < 0.01
        low, high = SPACING_RANGE_MM
        possible = all(low <= mm <= high for mm in self.pixel_mm)
        upright = abs(float(self.orientation[:3] @ self.orientation[3:])) < 0.01
        near = bool(np.isfinite(numbers).all()) and float(np.abs(self.position_mm).max()) <= MAX_POSITION_MM
        return near and bool(unit) and possible and upright


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


def read_headers(path: Path) -> list[SliceHeader]:
    """The slices of one file; none where it is no DICOM image (DICOMDIR, report, presentation state).

    Raises:
        InputError: if the file is damaged.
    """
    if not is_dicom(path):
        if path.suffix.lower() == ".dcm" and not path.name.startswith("."):  # a lost end slice leaves no gap
            size = path.stat().st_size
            raise InputError(f"{path.name}: its {size} bytes are not DICOM, it was cut off or damaged: export it again")
        return []
    try:
        with path.open("rb") as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_HEADER_TAGS, force=True)
        if "Rows" not in header or "Columns" not in header or "SeriesInstanceUID" not in header:
            kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
            if kind in (CTImageStorage, *_ENHANCED):
                raise ValueError("no rows, columns or series: it is cut off")
            return []
        if header.get("SOPClassUID") in _ENHANCED:
            return [_frame_header(path, header, frame) for frame in range(int(header.NumberOfFrames))]
        return [_header(path, header, header, None)]
    except Exception as error:  # pydicom raises nearly anything on damaged bytes
        raise InputError(f"{path.name}: the DICOM header is damaged ({last_line(error)}): export it again") from error


def unsuitable(slices: Sequence[SliceHeader]) -> UnfitStudy | InputError | None:
    """Why a series cannot be the study's CT, from its headers alone; None where it can. The text names no series."""
    images = [one for one in slices if not one.localizer]
    modality = next((one.modality for one in slices if one.modality != "CT"), None)
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
            return InputError(f"{one.path.name} lacks a valid position, orientation or pixel spacing")
    if np.median([one.normal[2] for one in images]) < 0.7:
        return UnfitStudy("derived", "its slices are not axial")
    return None


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
    kept, repeated = _each_once([one for one in slices if not one.localizer])
    ordered = _sorted_slices(kept, name)
    positions = np.array([one.position_mm for one in ordered])
    spacing_mm = check_uniform_spacing(positions @ ordered[0].normal, name)
    _check_tilt(positions, ordered[0].normal, name)
    return Stack(name, tuple(ordered), spacing_mm, repeated)


def _named(fault: InputError, name: str) -> InputError:
    text = f"{name}: {fault}: a study needs the folder with all slices of an axial CT series"
    return UnfitStudy(fault.code, text) if isinstance(fault, UnfitStudy) else InputError(text)


def _frame_header(path: Path, header: pydicom.Dataset, frame: int) -> SliceHeader:
    """One frame of an enhanced file: its functional groups, own ones before shared ones."""
    groups = [
        *(header.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1],
        *(header.get("SharedFunctionalGroupsSequence") or []),
    ]
    found = pydicom.Dataset()
    for name, keywords in (
        ("PlanePositionSequence", ("ImagePositionPatient",)),
        ("PlaneOrientationSequence", ("ImageOrientationPatient",)),
        ("PixelMeasuresSequence", ("PixelSpacing", "SliceThickness")),
        ("PixelValueTransformationSequence", ("RescaleSlope", "RescaleIntercept")),
        ("CTImageFrameTypeSequence", ("FrameType",)),
    ):
        items: Sequence[pydicom.Dataset] = next((group[name].value for group in groups if group.get(name)), [])
        for keyword in keywords:
            if items and keyword in items[0]:
                found[keyword] = items[0][keyword]
    return _header(path, header, found, frame)


def _header(path: Path, header: pydicom.Dataset, place: pydicom.Dataset, frame: int | None) -> SliceHeader:
    is_ct = header.get("SOPClassUID") in (CTImageStorage, *_ENHANCED)
    types = place.get("FrameType") or header.get("ImageType") or ()
    return SliceHeader(
        path=path,
        frame=frame,
        instance=str(header.get("SOPInstanceUID") or ""),
        sop_class=str(header.get("SOPClassUID") or ""),
        patient=str(header.get("PatientID") or ""),
        study=str(header.get("StudyInstanceUID") or ""),
        series=str(header.SeriesInstanceUID),
        frame_of_reference=str(header.get("FrameOfReferenceUID") or ""),
        number=int(header.get("SeriesNumber") or 0),
        description=str(header.get("SeriesDescription") or ""),
        modality=str(header.get("Modality") or ("CT" if is_ct else "")),
        image_type="\\".join([types] if isinstance(types, str) else types).upper(),
        colour=int(header.get("SamplesPerPixel") or 1) != 1,
        frames=int(header.get("NumberOfFrames") or 1),
        matrix=(int(header.Rows), int(header.Columns)),
        position_mm=_numbers(place.get("ImagePositionPatient"), 3),
        orientation=_numbers(place.get("ImageOrientationPatient"), 6),
        pixel_mm=tuple(_numbers(place.get("PixelSpacing"), 2).tolist()),
        thickness_mm=_number(place.get("SliceThickness")),
        slope=_number(place.get("RescaleSlope")),
        intercept=_number(place.get("RescaleIntercept")),
        lossy=_lossy(header),
        part_of=str(header.get("ConcatenationUID") or "") if header.get("InConcatenationTotalNumber") != 1 else "",
    )


def _lossy(header: pydicom.Dataset) -> str:
    """How a slice was once compressed with loss, e.g. ``JPEG 2000, 10:1``; the mark stays after decompression."""
    syntax = header.file_meta.get("TransferSyntaxUID")
    marked = header.get("LossyImageCompression")
    if marked == "00" and syntax == JPEG2000:  # this syntax holds either kind
        return ""
    if marked != "01" and syntax not in _LOSSY_SYNTAXES:
        return ""
    methods, ratios = _values(header, "LossyImageCompressionMethod"), _values(header, "LossyImageCompressionRatio")
    method = _LOSSY_METHODS.get(str(methods[-1])) if methods else None
    ratio = f", {_number(ratios[-1]):.0f}:1" if ratios else ""
    return (method or _LOSSY_SYNTAXES.get(syntax, "an unknown method")) + ratio


def _values(header: pydicom.Dataset, keyword: str) -> list[object]:
    value = header.get(keyword)
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, pydicom.multival.MultiValue)) else [value]


def in_order_of_choice(usable: Sequence[list[SliceHeader]]) -> list[list[SliceHeader]]:
    """Series with most slices first; projections and maps last.

    Equal counts are reconstructions of one scan: the first made is the one for soft tissue as a rule.
    """

    def order(slices: list[SliceHeader]) -> tuple[bool, int, int, str]:
        first = slices[0]
        return unlike_ct(first.image_type, first.description) != "", -len(slices), first.number, first.series

    return sorted(usable, key=order)


def _choose_stack(found: Mapping[str, list[SliceHeader]], folder: Path, series: str | None) -> Stack:
    """The series asked for, or the axial CT series with most slices that make a stack."""
    if series is not None:
        if series not in found:
            known = ", ".join(sorted(found)[:10])
            raise InputError(f"{folder}: there is no series {series}; there are {len(found)}: {known}")
        return arrange(found[series])
    faults = {uid: unsuitable(slices) for uid, slices in found.items()}
    usable = in_order_of_choice([slices for uid, slices in found.items() if faults[uid] is None])
    if not usable:
        raise _none_usable({uid: fault for uid, fault in faults.items() if fault is not None})
    stack = _first_stack(usable)
    if len(found) > 1:
        taken = stack.slices[0].series
        others = ", ".join(f"{uid} ({len(slices)})" for uid, slices in found.items() if uid != taken)
        log.info("%s: took series %s (%d slices) and left %s", folder, taken, len(stack.slices), others)
    return stack


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


def _none_usable(faults: Mapping[str, InputError]) -> InputError:
    """What to say of a folder without a usable series: the faults, and the code that all of them amount to."""
    reasons = "; ".join(f"series {uid}: {fault}" for uid, fault in list(faults.items())[:3])
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


def _read_pixels(stack: Stack) -> NDArray[np.int16]:
    """``(slices, rows, columns)`` in HU; one file at a time, straight into one array."""
    voxels = np.empty((0, 0, 0), np.int16)
    count = len(stack.slices)
    for path, members in groupby(enumerate(stack.slices), key=lambda member: member[1].path):
        dataset = None
        for k, one in members:
            where = f"{stack.name}: slice {k + 1} of {count} ({path.name})"
            try:
                dataset = dataset or _with_pixels(path)
                hu = _slice_hu(dataset, one)
            except Exception as error:  # pydicom, GDCM and the codecs raise nearly anything on damaged bytes
                raise InputError(f"{where}: its pixels cannot be read ({last_line(error)}): export it again") from error
            if hu.shape != one.matrix:
                raise InputError(
                    f"{where}: has pixels of shape {hu.shape}, its header says {one.matrix}: export it again"
                )
            if k == 0:  # the first slice proves that the header's matrix is real before all memory is taken
                voxels = np.empty((count, *one.matrix), np.int16)
            voxels[k] = hu
    return voxels


def _with_pixels(path: Path) -> pydicom.Dataset:
    dataset = pydicom.dcmread(path, force=True)
    if "PixelData" not in dataset:
        raise ValueError("there are no pixels")
    dataset.file_meta.setdefault("TransferSyntaxUID", ImplicitVRLittleEndian)  # missing where there is no preamble
    return dataset


def _slice_hu(dataset: pydicom.Dataset, one: SliceHeader) -> NDArray[np.int16]:
    """One slice's pixels in HU, padding as -1024."""
    if not np.isfinite([one.slope, one.intercept]).all() or one.slope == 0:
        raise ValueError("no rescale slope and intercept, so the pixels are not in HU")
    if dataset.BitsAllocated not in (16, 32):
        raise ValueError(f"a CT has 16 bits a pixel, this one {dataset.BitsAllocated}")
    try:
        stored = pixel_array(dataset, index=one.frame or 0, raw=True)
    except (NotImplementedError, RuntimeError):  # no decoder at hand: GDCM knows the rest
        if not dataset.file_meta.TransferSyntaxUID.is_compressed:
            raise
        stored = _decoded_by_gdcm(dataset, one)
    hu = stored * np.float32(one.slope) + np.float32(one.intercept)
    padded = _padding(dataset, stored, one)
    if padded is not None:
        hu[padded] = PADDING_HU
    rounded: NDArray[np.int16] = np.clip(np.rint(hu), PADDING_HU, 32767).astype(np.int16)
    return rounded


def _decoded_by_gdcm(dataset: pydicom.Dataset, one: SliceHeader) -> NDArray[np.float64]:
    """Stored values of one compressed slice, handed to SimpleITK alone and without a rescale that it would apply."""
    single = pydicom.Dataset()
    single.file_meta = FileMetaDataset()
    single.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    single.file_meta.MediaStorageSOPClassUID = single.SOPClassUID = CTImageStorage
    single.file_meta.MediaStorageSOPInstanceUID = single.SOPInstanceUID = one.instance
    for keyword in (
        *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"),
        "PhotometricInterpretation",
    ):
        single[keyword] = dataset[keyword]
    offsets = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
    extended = offsets if all(offsets) else None
    frame = get_frame(dataset.PixelData, one.frame or 0, number_of_frames=one.frames, extended_offsets=extended)
    single.PixelData = encapsulate([frame])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "slice.dcm")
        single.save_as(path, enforce_file_format=True)
        decoded = sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO="GDCMImageIO"))
    plane: NDArray[np.float64] = np.squeeze(decoded, 0)
    return plane


def _padding(dataset: pydicom.Dataset, stored: NDArray[np.float64], one: SliceHeader) -> NDArray[np.bool_] | None:
    """Where Pixel Padding Value (0028,0120), up to its Range Limit (0028,0121), says that nothing was measured."""
    value, limit = dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")
    if value is None:
        return None
    ends = [int(value), int(value if limit is None else limit)]
    if dataset.PixelRepresentation == 1:  # some writers store a signed padding as unsigned: 63536 is -2000
        ends = [end - 65536 if end > 32767 else end for end in ends]
    else:
        ends = [end + 65536 if end < 0 else end for end in ends]
    padded = np.asarray((stored >= min(ends)) & (stored <= max(ends)))
    hu = np.array(ends) * one.slope + one.intercept
    if hu.max() > -900 and hu.min() < 3000:  # a value that tissue has too: only what reaches the frame is padding
        labels, _ = ndimage.label(padded)
        frame = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
        padded = np.isin(labels, frame[frame > 0])
    return padded


def _source(stack: Stack, root: Path, neighbours: int) -> SourceSeries:
    """The way back to the archive, and what the headers say of the series' fitness."""
    first = stack.slices[0]
    with first.path.open("rb") as file:
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_RESULT_TAGS, force=True)
    thickness = {one.thickness_mm for one in stack.slices if np.isfinite(one.thickness_mm)}
    scanner = f"{header.get('Manufacturer') or ''} {header.get('ManufacturerModelName') or ''}"
    facts = SeriesFacts(
        image_types=tuple(sorted({one.image_type for one in stack.slices} - {""})),
        description=first.description,
        thickness_mm=max(thickness, default=None),
        lossy=next((one.lossy for one in stack.slices if one.lossy), ""),
        kernel=" ".join(map(str, _values(header, "ConvolutionKernel"))),
        scanner=scanner.strip(),
        repeated=stack.repeated,
        neighbours=neighbours,
    )
    return SourceSeries(
        first.patient,
        first.study,
        first.series,
        first.frame_of_reference,
        first.sop_class,
        tuple(first.orientation.tolist()),
        first.pixel_mm,
        first.matrix,
        tuple(
            SourceInstance(
                one.instance,
                tuple(one.position_mm.tolist()),
                None if one.frame is None else one.frame + 1,
                Path(os.path.relpath(one.path, root)).as_posix(),
            )
            for one in stack.slices
        ),
        _as_json(header),
        str(root),
        facts,
    )


def _as_json(header: pydicom.Dataset) -> dict[str, object]:
    """DICOM JSON of a header, in UTF-8; values that break the standard's rules are left out."""
    header.decode()
    kept: dict[str, object] = {}
    for element in header:
        with suppress(ValueError, TypeError):
            kept[f"{element.tag.group:04X}{element.tag.element:04X}"] = element.to_json_dict(None, 0)
    kept["00080005"] = {"vr": "CS", "Value": ["ISO_IR 192"]}
    return kept


def _numbers(values: ArrayLike | None, count: int) -> NDArray[np.float64]:
    """``count`` numbers; NaN where the tag is missing or has another number of them."""
    numbers = np.array([] if values is None else values, dtype=np.float64).ravel()
    return numbers if numbers.size == count else np.full(count, np.nan)


def _number(value: object) -> float:
    """One number; NaN where the tag is missing or empty."""
    return float("nan") if value in (None, "") else float(str(value))


def millimetres(values: ArrayLike) -> str:
    """Lengths in a message: ``0.70 x 0.70``."""
    return " x ".join(f"{value:.2f}" for value in np.asarray(values).ravel())


def last_line(error: Exception) -> str:
    """The telling part of an error: ITK puts its sources' paths before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
