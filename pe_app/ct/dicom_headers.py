"""What DICOM headers tell of a series' slices, read without their pixels."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import ArrayLike, NDArray
from pydicom.dataelem import RawDataElement
from pydicom.uid import (
    JPEG2000,
    CTImageStorage,
    EnhancedCTImageStorage,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    LegacyConvertedEnhancedCTImageStorage,
)

from pe_app.common.errors import InputError
from pe_app.ct.dicom_files import read_header

SPACING_RANGE_MM = (0.1, 30.0)
"""Outside it a header's spacing is a mistake (metres, micrometres, zero)."""
MAX_POSITION_MM = 1e5
"""Scanners place their patients within metres of the origin."""
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
    "SeriesNumber", "InstanceNumber", "SeriesDescription", "Modality", "ImageType", "Rows", "Columns",
    "SamplesPerPixel", "NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "SliceThickness",
    "RescaleSlope", "RescaleIntercept", "LossyImageCompression", "LossyImageCompressionMethod",
    "LossyImageCompressionRatio", "ConcatenationUID", "InConcatenationTotalNumber", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "AccessionNumber", "StudyDate", "AcquisitionNumber",
    "TemporalPositionIdentifier", "AcquisitionTime", "AcquisitionDateTime",
]  # fmt: skip


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
        instance_number: Instance Number; None where it is missing.
        part_of: Concatenation UID where the series is torn into several enhanced files.
        accession: Accession Number.
        date: Study Date as 2026-01-31; empty where it is missing or none.
        acquisition, temporal, time: what tells acquisitions of one series apart, as written.
        unreadable: what is missing or wrong of the values that voxels in HU with a place need, in words.
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
    accession: str
    date: str
    acquisition: str
    temporal: str
    time: str
    unreadable: tuple[str, ...]
    instance_number: int | None = None

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


def read_headers(path: Path) -> list[SliceHeader]:
    """The slices of one file; none where it is no DICOM image (DICOMDIR, report, presentation state, another format).

    Raises:
        InputError: if it is DICOM and damaged.
    """
    if not is_dicom(path):
        return []
    try:
        header = read_header(path, _HEADER_TAGS)
        if "Rows" not in header or "Columns" not in header or "SeriesInstanceUID" not in header:
            kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
            if kind in (CTImageStorage, *_ENHANCED) and header.get("Modality") in (None, "", "CT"):
                raise ValueError("no rows, columns or series: it is cut off")
            return []
        if header.get("SOPClassUID") in _ENHANCED:
            return [_frame_header(path, header, frame) for frame in range(_whole(header, "NumberOfFrames", 0))]
        return [_header(path, header, header, None)]
    except Exception as error:  # pydicom raises nearly anything on damaged bytes
        raise InputError(f"{path.name}: the DICOM header is damaged ({last_line(error)}): export it again") from error


def by_series(headers: Sequence[SliceHeader]) -> dict[str, list[SliceHeader]]:
    """Slices by SeriesInstanceUID, in the order of their first ones."""
    found: dict[str, list[SliceHeader]] = defaultdict(list)
    for header in headers:
        found[header.series].append(header)
    return found


def is_dicom(path: Path) -> bool:
    """By content: the DICM mark, or a data set without preamble that begins with group 0002 or 0008."""
    if path.is_symlink() and not path.exists():
        return False
    with path.open("rb") as file:
        return looks_dicom(file.read(DICOM_HEAD))


def looks_dicom(head: bytes) -> bool:
    """``is_dicom`` of a file's first ``DICOM_HEAD`` bytes."""
    return head[128:] == b"DICM" or (len(head) > 8 and head[0] in (2, 8) and head[1] == head[3] == 0)


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
            element = items[0].get_item(keyword) if items else None
            if element is not None:
                found[element.tag] = element
    return _header(path, header, found, frame)


def _header(path: Path, header: pydicom.Dataset, place: pydicom.Dataset, frame: int | None) -> SliceHeader:
    is_ct = header.get("SOPClassUID") in (CTImageStorage, *_ENHANCED)
    types = place.get("FrameType") or header.get("ImageType") or ()
    day = str(header.get("StudyDate") or "")
    return SliceHeader(
        path=path,
        frame=frame,
        instance=str(header.get("SOPInstanceUID") or ""),
        sop_class=str(header.get("SOPClassUID") or ""),
        patient=str(header.get("PatientID") or ""),
        study=str(header.get("StudyInstanceUID") or ""),
        series=str(header.SeriesInstanceUID),
        frame_of_reference=str(header.get("FrameOfReferenceUID") or ""),
        number=_whole(header, "SeriesNumber", 0),
        description=str(header.get("SeriesDescription") or ""),
        modality=str(header.get("Modality") or ("CT" if is_ct else "")),
        image_type="\\".join([types] if isinstance(types, str) else types).upper(),
        colour=_whole(header, "SamplesPerPixel", 1) > 1,
        frames=_whole(header, "NumberOfFrames", 1) or 1,
        matrix=(int(header.Rows), int(header.Columns)),
        position_mm=_numbers(place, "ImagePositionPatient", 3),
        orientation=_numbers(place, "ImageOrientationPatient", 6),
        pixel_mm=tuple(_numbers(place, "PixelSpacing", 2).tolist()),
        thickness_mm=_number(place, "SliceThickness"),
        slope=_number(place, "RescaleSlope"),
        intercept=_number(place, "RescaleIntercept"),
        lossy=_lossy(header),
        instance_number=None if (number := _whole(header, "InstanceNumber", -1)) < 0 else number,
        part_of=str(header.get("ConcatenationUID") or "") if header.get("InConcatenationTotalNumber") != 1 else "",
        accession=str(header.get("AccessionNumber") or ""),
        date=f"{day[:4]}-{day[4:6]}-{day[6:]}" if re.fullmatch(r"[12]\d{7}", day) else "",
        acquisition=_text(header, "AcquisitionNumber"),
        temporal=_text(header, "TemporalPositionIdentifier"),
        time=_text(header, "AcquisitionDateTime") or _text(header, "AcquisitionTime"),
        unreadable=tuple(fault for keyword in _NEEDED if (fault := _fault(place, keyword))),
    )


def _lossy(header: pydicom.Dataset) -> str:
    """How a slice was once compressed with loss, e.g. ``JPEG 2000, 10:1``; the mark stays after decompression."""
    syntax = header.file_meta.get("TransferSyntaxUID")
    marked = header.get("LossyImageCompression")
    if marked == "00" and syntax == JPEG2000:  # this syntax holds either kind
        return ""
    if marked != "01" and syntax not in _LOSSY_SYNTAXES:
        return ""
    methods = header_values(header, "LossyImageCompressionMethod")
    ratios = _texts(header, "LossyImageCompressionRatio")
    method = _LOSSY_METHODS.get(str(methods[-1])) if methods else None
    ratio = f", {float(ratios[-1]):.0f}:1" if ratios and _is_number(ratios[-1]) else ""
    return (method or _LOSSY_SYNTAXES.get(syntax, "an unknown method")) + ratio


def header_values(header: pydicom.Dataset, keyword: str) -> list[object]:
    """All values of an element; none where it is missing or empty."""
    value = header.get(keyword)
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, pydicom.multival.MultiValue)) else [value]


def _texts(header: pydicom.Dataset, keyword: str) -> list[str]:
    """The values of an element as they are written, whatever kind it says it is and whether or not they are valid."""
    element = header.get_item(keyword)
    if element is None or element.value in (None, "", b""):
        return []
    value = element.value
    if isinstance(value, bytes):
        if isinstance(element, RawDataElement) and element.VR in ("US", "SS", "UL", "SL", "FD", "FL"):
            value = header[keyword].value
        else:
            value = value.decode("latin-1")
    if isinstance(value, str):
        return [part.strip(" \0") for part in value.split("\\")]
    return [str(part) for part in value] if isinstance(value, (list, pydicom.multival.MultiValue)) else [str(value)]


def _text(header: pydicom.Dataset, keyword: str) -> str:
    return next(iter(_texts(header, keyword)), "")


def _is_number(text: str) -> bool:
    return bool(_NUMBER.fullmatch(text))


_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


def _numbers(header: pydicom.Dataset, keyword: str, count: int) -> NDArray[np.float64]:
    """``count`` numbers; NaN where the tag is missing, has another number of them, or is no number."""
    texts = _texts(header, keyword)
    if len(texts) != count or not all(map(_is_number, texts)):
        return np.full(count, np.nan)
    return np.array([float(text) for text in texts])


def _number(header: pydicom.Dataset, keyword: str) -> float:
    """One number; NaN where the tag is missing, empty or no number."""
    text = _text(header, keyword)
    return float(text) if _is_number(text) else float("nan")


def _whole(header: pydicom.Dataset, keyword: str, otherwise: int) -> int:
    """One whole number; ``otherwise`` where the tag is missing, empty or no number."""
    number = _number(header, keyword)
    return int(number) if np.isfinite(number) else otherwise


_NEEDED = {
    "ImagePositionPatient": 3,
    "ImageOrientationPatient": 6,
    "PixelSpacing": 2,
    "RescaleSlope": 1,
    "RescaleIntercept": 1,
}
"""What makes voxels in HU with a place, and how many numbers each has."""


def _fault(header: pydicom.Dataset, keyword: str) -> str:
    """What is wrong with a value that is needed: the tag's name and what it says; empty where it is there and valid."""
    if np.isfinite(_numbers(header, keyword, _NEEDED[keyword])).all():
        return ""
    tag = pydicom.datadict.tag_for_keyword(keyword) or 0
    name = f"{pydicom.datadict.dictionary_description(keyword)} ({tag >> 16:04X},{tag & 0xFFFF:04X})"
    texts = _texts(header, keyword)
    return f"{name} is {'missing' if not texts else repr(chr(92).join(texts)[:60])}"


def millimetres(values: ArrayLike) -> str:
    """Lengths in a message: ``0.70 x 0.70``."""
    return " x ".join(f"{value:.2f}" for value in np.asarray(values).ravel())


def last_line(error: Exception) -> str:
    """The telling part of an error: ITK puts its sources' paths before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
