"""One CT series out of a DICOM folder: sorted by patient position, checked, its pixels in HU.

A wrong slice order, a missing slice or a wrong rescale changes what the networks see without looking wrong on a
screen, so whatever is not one complete, evenly spaced, untilted axial CT series is refused, never repaired.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import ArrayLike, NDArray
from pydicom.uid import CTImageStorage, ImplicitVRLittleEndian
from scipy import ndimage

from pe_app.errors import InputError
from pe_app.volume import PADDING_HU, Volume, canonical_volume

log = logging.getLogger(__name__)

POSITION_TOLERANCE_MM = 0.1
"""Headers round positions to 0.1 mm and worse; a missing slice is off by a whole spacing."""
TILT_DEGREES = 0.5
"""A tilt above this shears the volume by more than a pixel over a chest."""
MAX_MATRIX = 4096
"""Rows and columns beyond any CT's: a damaged header that would take all memory."""
SPACING_RANGE_MM = (0.1, 30.0)
"""Outside it a header's spacing is a mistake (metres, micrometres, zero)."""

_HEADER_TAGS = [
    "SOPClassUID", "SeriesInstanceUID", "SeriesNumber", "Modality", "ImageType", "Rows", "Columns",
    "SamplesPerPixel", "NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
]  # fmt: skip
_MIXED = "two series are mixed, export one series alone"


def read_dicom_folder(folder: Path, series: str | None = None) -> Volume:
    """The axial CT series with most slices below ``folder``, or the one whose SeriesInstanceUID is given.

    Headers are read first, without pixels; pixels once, of the chosen series, straight into one array.

    Raises:
        InputError: as ``read_volume``.
    """
    slices = _choose_series(_series_in(folder), folder, series)
    name = f"series {slices[0].series}"
    slices = _sorted_slices(slices, name)
    positions = np.array([one.position_mm for one in slices])
    spacing_mm = check_uniform_spacing(positions @ slices[0].normal, name)
    _check_tilt(positions, slices[0].normal, name)

    affine = np.eye(4)
    rows_mm, columns_mm = slices[0].pixel_mm
    affine[:3, 0] = slices[0].normal * spacing_mm
    affine[:3, 1] = slices[0].orientation[3:] * rows_mm  # the second triple runs down a column, from row to row
    affine[:3, 2] = slices[0].orientation[:3] * columns_mm
    affine[:3, 3] = positions[0]
    return canonical_volume(_read_pixels(slices, name), affine, name)


def check_uniform_spacing(positions: ArrayLike, name: str) -> float:
    """Distance between neighbouring slices, if it is the same everywhere.

    Args:
        positions: ``(slices,)``, mm along the slices' normal, from the feet to the head.
        name: whose positions they are.

    Returns:
        The spacing in mm, above 0.

    Raises:
        InputError: if two slices lie at one position, or one is missing; says between which, counted from 1.
    """
    along = np.asarray(positions, dtype=np.float64)
    if along.size < 2 or not np.isfinite(along).all():
        raise InputError(f"{name}: a study needs at least two slices with a position, got {along.tolist()}")
    steps = np.diff(along)
    if steps.min() < 0.01:
        k = int(steps.argmin())
        raise InputError(
            f"{name}: slice {k + 1} and {k + 2} of {along.size} lie at the same position ({along[k]:.2f} mm); two "
            "series are mixed or a slice was exported twice: export one series alone"
        )
    usual = float(np.sort(steps)[(steps.size - 1) // 2])  # the lower median: a gap never becomes the rule
    off = np.abs(steps - usual)
    if off.max() > max(POSITION_TOLERANCE_MM, 0.05 * usual) + 1e-6:
        k = int(off.argmax())
        why = "some are missing" if steps[k] > usual else "two series are mixed"
        raise InputError(
            f"{name}: slices are {usual:.2f} mm apart, but {steps[k]:.2f} mm between slice {k + 1} and {k + 2} of "
            f"{along.size}; {why}: export the whole series again"
        )
    return float((along[-1] - along[0]) / steps.size)


def is_dicom(path: Path) -> bool:
    """By content: the DICM mark, or a data set without preamble that begins with group 0002 or 0008."""
    with path.open("rb") as file:
        head = file.read(132)
    return head[128:] == b"DICM" or (len(head) > 8 and head[0] in (2, 8) and head[1] == head[3] == 0)


@dataclass(frozen=True, eq=False)
class _Slice:
    """What the sorting pass learns of one DICOM file without its pixels."""

    path: Path
    series: str
    number: int
    modality: str
    localizer: bool
    colour: bool
    frames: int
    matrix: tuple[int, int]
    position_mm: NDArray[np.float64]
    orientation: NDArray[np.float64]
    pixel_mm: tuple[float, float]

    @property
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
        return bool(np.isfinite(numbers).all()) and bool(unit) and possible and upright


def _series_in(folder: Path) -> dict[str, list[_Slice]]:
    """The images of every series below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise InputError(f"{folder}: the folder is empty; a study needs the folder with all slices of a series")
    found: dict[str, list[_Slice]] = defaultdict(list)
    dicom = 0
    for path in files:
        if is_dicom(path):
            dicom += 1
            header = _read_header(path)
            if header is not None:
                found[header.series].append(header)
        elif path.suffix.lower() == ".dcm" and not path.name.startswith("."):  # a lost end slice leaves no gap
            size = path.stat().st_size
            raise InputError(f"{path.name}: its {size} bytes are not DICOM, it was cut off or damaged: export it again")
    if not found:
        what = f"none of the {dicom} DICOM files is an image" if dicom else f"none of the {len(files)} files is DICOM"
        raise InputError(f"{folder}: {what}; a study needs the folder with all slices of a series")
    return found


def _read_header(path: Path) -> _Slice | None:
    """The header of one DICOM file; None where it is no image (DICOMDIR, report, presentation state)."""
    try:
        with path.open("rb") as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_HEADER_TAGS, force=True)
        if "Rows" not in header or "Columns" not in header or "SeriesInstanceUID" not in header:
            if header.get("SOPClassUID") == CTImageStorage:
                raise ValueError("no rows, columns or series: it is cut off")
            return None
        return _Slice(
            path=path,
            series=str(header.SeriesInstanceUID),
            number=int(header.get("SeriesNumber") or 0),
            modality=str(header.get("Modality") or ("CT" if header.get("SOPClassUID") == CTImageStorage else "")),
            localizer="LOCALIZER" in (header.get("ImageType") or ()),
            colour=int(header.get("SamplesPerPixel") or 1) != 1,
            frames=int(header.get("NumberOfFrames") or 1),
            matrix=(int(header.Rows), int(header.Columns)),
            position_mm=_numbers(header.get("ImagePositionPatient"), 3),
            orientation=_numbers(header.get("ImageOrientationPatient"), 6),
            pixel_mm=tuple(_numbers(header.get("PixelSpacing"), 2).tolist()),
        )
    except Exception as error:  # pydicom raises nearly anything on damaged bytes
        raise InputError(f"{path.name}: the DICOM header is damaged ({last_line(error)}): export it again") from error


def _choose_series(found: dict[str, list[_Slice]], folder: Path, series: str | None) -> list[_Slice]:
    """The series asked for, or the axial CT series with most slices."""
    if series is not None:
        if series not in found:
            known = ", ".join(sorted(found)[:10])
            raise InputError(f"{folder}: there is no series {series}; there are {len(found)}: {known}")
        found = {series: found[series]}
    faults = {uid: _unsuitable(slices) for uid, slices in found.items()}
    usable = [slices for uid, slices in found.items() if not faults[uid]]
    if not usable:
        reasons = "; ".join(f"series {uid}: {fault}" for uid, fault in list(faults.items())[:3])
        more = f"; and {len(faults) - 3} series more" if len(faults) > 3 else ""
        raise InputError(f"{reasons}{more}: a study needs the folder with all slices of an axial CT series")
    # equal counts are reconstructions of one scan: the first made is the one for soft tissue as a rule
    usable.sort(key=lambda slices: (-len(slices), slices[0].number, slices[0].series))
    if len(found) > 1:
        others = ", ".join(f"{uid} ({len(slices)})" for uid, slices in found.items() if slices is not usable[0])
        chosen = usable[0]
        log.info("%s: took series %s (%d slices) and left %s", folder, chosen[0].series, len(chosen), others)
    return [one for one in usable[0] if not one.localizer]


def _unsuitable(slices: list[_Slice]) -> str:
    """Why a series cannot be the study's CT, in words; empty where it can."""
    images = [one for one in slices if not one.localizer]
    modality = next((one.modality for one in slices if one.modality != "CT"), None)
    if modality is not None:
        return f"its modality is {modality or 'missing'}, not CT"
    if not images:
        return "it is a localizer"
    if any(one.colour for one in images):
        return "it holds colour images"
    if (size := max(max(one.matrix) for one in images)) > MAX_MATRIX:
        return f"its slices have up to {size} rows or columns, the header is wrong"
    if any(one.frames > 1 for one in images):
        return "several slices share one file (enhanced CT): export it as one file a slice"
    if len(images) == 1:
        return "it has a single slice"
    for one in images:
        if not one.has_place:
            return f"{one.path.name} lacks a valid position, orientation or pixel spacing"
    if np.median([one.normal[2] for one in images]) < 0.7:
        return "its slices are not axial"
    return ""


def _sorted_slices(slices: list[_Slice], name: str) -> list[_Slice]:
    """From the feet to the head along the common normal, after every slice was found to be alike."""
    normal = slices[0].normal
    slices = sorted(slices, key=lambda one: float(one.position_mm @ normal))
    first = slices[0]
    for k, one in enumerate(slices):
        if np.abs(one.orientation - first.orientation).max() > 1e-3:
            raise InputError(f"{name}: slice 1 and {k + 1} of {len(slices)} have different orientations: {_MIXED}")
        if one.matrix != first.matrix:
            a, b = ("x".join(map(str, matrix)) for matrix in (first.matrix, one.matrix))
            raise InputError(f"{name}: slice 1 has {a} pixels, slice {k + 1} of {len(slices)} has {b}: {_MIXED}")
        if np.abs(np.subtract(one.pixel_mm, first.pixel_mm)).max() > 1e-3:
            a, b = (millimetres(pixel) for pixel in (first.pixel_mm, one.pixel_mm))
            raise InputError(f"{name}: slice 1 has pixels of {a} mm, slice {k + 1} of {len(slices)} {b} mm: {_MIXED}")
    return slices


def _check_tilt(positions: NDArray[np.float64], normal: NDArray[np.float64], name: str) -> None:
    """Refuse slices that are stacked along another direction than their normal: the volume would be sheared."""
    stacked = positions[-1] - positions[0]
    tilt = np.degrees(np.arccos(np.clip(abs(stacked @ normal) / np.linalg.norm(stacked), 0, 1)))
    if tilt > TILT_DEGREES:
        raise InputError(
            f"{name}: the gantry was tilted by {tilt:.1f} degrees, the slices are sheared against each other: "
            "export a reformat with straight axial slices"
        )
    middle = np.linspace(positions[0], positions[-1], len(positions))
    aside = np.linalg.norm(positions - middle - np.outer((positions - middle) @ normal, normal), axis=1)
    if aside.max() > 1.0:
        k = int(aside.argmax())
        raise InputError(
            f"{name}: slice {k + 1} of {len(positions)} is {aside[k]:.2f} mm aside of the others: {_MIXED}"
        )


def _read_pixels(slices: list[_Slice], name: str) -> NDArray[np.int16]:
    """``(slices, rows, columns)`` in HU; one file at a time, straight into one array."""
    voxels = np.empty((0, 0, 0), np.int16)
    for k, one in enumerate(slices):
        where = f"{name}: slice {k + 1} of {len(slices)} ({one.path.name})"
        try:
            hu = _slice_hu(one.path)
        except Exception as error:  # pydicom, GDCM and the codecs raise nearly anything on damaged bytes
            raise InputError(f"{where}: its pixels cannot be read ({last_line(error)}): export it again") from error
        if hu.shape != one.matrix:
            raise InputError(f"{where}: has pixels of shape {hu.shape}, its header says {one.matrix}: export it again")
        if k == 0:  # the first slice proves that the header's matrix is real before all memory is taken
            voxels = np.empty((len(slices), *one.matrix), np.int16)
        voxels[k] = hu
    return voxels


def _slice_hu(path: Path) -> NDArray[np.int16]:
    """One slice's pixels in HU, padding as -1024."""
    dataset = pydicom.dcmread(path, force=True)
    if "PixelData" not in dataset:
        raise ValueError("there are no pixels")
    slope, intercept = float(dataset.get("RescaleSlope", np.nan)), float(dataset.get("RescaleIntercept", np.nan))
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise ValueError("no rescale slope and intercept, so the pixels are not in HU")
    dataset.file_meta.setdefault("TransferSyntaxUID", ImplicitVRLittleEndian)  # missing where there is no preamble
    try:
        stored = dataset.pixel_array
    except (NotImplementedError, RuntimeError):  # no decoder at hand: GDCM knows the rest, and rescales itself
        if not dataset.file_meta.TransferSyntaxUID.is_compressed:
            raise
        decoded = sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO="GDCMImageIO"))
        stored = np.rint((np.squeeze(decoded, 0) - intercept) / slope)
    hu = stored * np.float32(slope) + np.float32(intercept)
    padded = _padding(dataset, stored)
    if padded is not None:
        hu[padded] = PADDING_HU
    rounded: NDArray[np.int16] = np.clip(np.rint(hu), PADDING_HU, 32767).astype(np.int16)
    return rounded


def _padding(dataset: pydicom.Dataset, stored: NDArray[np.float64]) -> NDArray[np.bool_] | None:
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
    hu = np.array(ends) * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    if hu.max() > -900 and hu.min() < 3000:  # a value that tissue has too: only what reaches the frame is padding
        labels, _ = ndimage.label(padded)
        frame = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
        padded = np.isin(labels, frame[frame > 0])
    return padded


def _numbers(values: ArrayLike | None, count: int) -> NDArray[np.float64]:
    """``count`` numbers; NaN where the tag is missing or has another number of them."""
    numbers = np.array([] if values is None else values, dtype=np.float64).ravel()
    return numbers if numbers.size == count else np.full(count, np.nan)


def millimetres(values: ArrayLike) -> str:
    """Lengths in a message: ``0.70 x 0.70``."""
    return " x ".join(f"{value:.2f}" for value in np.asarray(values).ravel())


def last_line(error: Exception) -> str:
    """The telling part of an error: ITK puts its sources' paths before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
