"""DICOM files -> Volume: the chosen series' pixels in HU, and the way back to the archive.

A wrong rescale changes what the networks see without looking wrong on a screen, so pixels that cannot be HU of a
chest are refused.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import pixel_array
from pydicom.uid import CTImageStorage, ImplicitVRLittleEndian
from scipy import ndimage

from pe_app.common.errors import InputError, TooLarge
from pe_app.common.files import files_below
from pe_app.ct.dicom_files import MAX_BYTES, read_header, read_whole
from pe_app.ct.dicom_headers import SliceHeader, by_series, header_values, is_dicom, last_line, read_headers
from pe_app.ct.dicom_stack import Stack, choose_stack
from pe_app.ct.lost_slices import LostSlice, NamedFile, lost_slices
from pe_app.ct.source_series import SeriesFacts, SourceInstance, SourceSeries
from pe_app.ct.volume import PADDING_HU, Volume, canonical_volume

log = logging.getLogger(__name__)

AIR_PRESENT_HU = -200
"""Every CT of a chest holds voxels below this; values that never get there are not HU."""
_RESULT_TAGS = [
    "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientSize",
    "PatientWeight", "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber",
    "ReferringPhysicianName", "Modality", "SeriesNumber", "SeriesDate", "SeriesTime", "SeriesDescription",
    "BodyPartExamined", "PatientPosition", "PositionReferenceIndicator", "Manufacturer", "ManufacturerModelName",
    "InstitutionName", "DeviceSerialNumber", "SoftwareVersions", "ConvolutionKernel", "KVP", "ContrastBolusAgent",
]  # fmt: skip
"""What results must repeat of their source (patient, study, frame of reference), and what people look up."""


def read_dicom_folder(folder: Path, series: str | None = None) -> Volume:
    """The axial CT series with most slices below ``folder``, or the one whose SeriesInstanceUID is given.

    Headers are read first, without pixels; pixels once, of the chosen series, straight into one array.

    Raises:
        InputError: as ``read_volume``.
    """
    files = files_below(folder)
    if not files:
        raise InputError(f"{folder}: the folder is empty; a study needs the folder with all slices of a series")
    headers, lost = _read_all_headers(files)
    if not headers and lost:
        raise InputError(f"{lost[0].file.name}: {lost[0].reason}")
    if not headers:
        dicom = sum(is_dicom(path) for path in files)
        what = f"none of the {dicom} DICOM files is an image" if dicom else f"none of the {len(files)} files is DICOM"
        raise InputError(f"{folder}: {what}; a study needs the folder with all slices of a series")
    found = by_series(headers)
    try:
        stack = choose_stack(found, folder, series)
    except InputError as error:
        if not lost:
            raise
        raise InputError(f"{lost[0].file.name}: {lost[0].reason}; it may be why {error}") from error
    _check_nothing_lost(stack, lost, {header.path for header in headers})
    neighbours = len({header.patient for header in headers} - {stack.slices[0].patient})
    return read_stack(stack, folder, neighbours)


def _read_all_headers(files: Sequence[Path]) -> tuple[list[SliceHeader], list[LostSlice]]:
    headers: list[SliceHeader] = []
    damaged: dict[Path, str] = {}
    for path in files:
        try:
            headers += read_headers(path)
        except InputError as error:
            damaged[path] = str(error).removeprefix(f"{path.name}: ")
    slices = {header.path for header in headers}
    lost, texts = lost_slices([NamedFile(path, path.parent, path.name) for path in files], slices, damaged)
    for text in texts:
        log.warning("%s: is a text and no DICOM file, it is left out", text.path)
    return headers, lost


def _check_nothing_lost(stack: Stack, lost: Sequence[LostSlice], slices: Set[Path]) -> None:
    """Refuse a series where a file that cannot be read lies with its slices, or with no other's."""
    own = {one.path.parent for one in stack.slices}
    others = {path.parent for path in slices} - own
    for slice_ in lost:
        if slice_.file.folder not in others:
            more = f" ({len(lost)} such files)" if len(lost) > 1 else ""
            raise InputError(f"{slice_.file.name}: {slice_.reason}; it may be a slice of {stack.name}{more}")
        log.warning("%s: %s; it lies with another series and is left out", slice_.file.path, slice_.reason)


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


def _read_pixels(stack: Stack) -> NDArray[np.int16]:
    """``(slices, rows, columns)`` in HU; one file at a time, straight into one array."""
    voxels = np.empty((0, 0, 0), np.int16)
    count = len(stack.slices)
    if count * int(np.prod(stack.slices[0].matrix, dtype=np.int64)) * voxels.itemsize > MAX_BYTES:
        rows, columns = stack.slices[0].matrix
        raise TooLarge(f"{stack.name}: {count} slices of {rows} x {columns} are more than 1 GiB, which is not read")
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
    dataset = read_whole(path)
    if "PixelData" not in dataset:
        raise ValueError("there are no pixels")
    dataset.file_meta.setdefault("TransferSyntaxUID", ImplicitVRLittleEndian)  # missing where there is no preamble
    return dataset


def _slice_hu(dataset: pydicom.Dataset, one: SliceHeader) -> NDArray[np.int16]:
    """One slice's pixels in HU, padding as -1024."""
    if not np.isfinite([one.slope, one.intercept]).all() or one.slope == 0:
        fault = next(iter(one.unreadable), f"Rescale Slope (0028,1053) is {one.slope:g}")
        raise ValueError(f"no rescale slope and intercept, so the pixels are not in HU: {fault}")
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
    header = read_header(first.path, _RESULT_TAGS)
    thickness = {one.thickness_mm for one in stack.slices if np.isfinite(one.thickness_mm)}
    scanner = f"{header.get('Manufacturer') or ''} {header.get('ManufacturerModelName') or ''}"
    facts = SeriesFacts(
        image_types=tuple(sorted({one.image_type for one in stack.slices} - {""})),
        description=first.description,
        thickness_mm=max(thickness, default=None),
        lossy=next((one.lossy for one in stack.slices if one.lossy), ""),
        kernel=" ".join(map(str, header_values(header, "ConvolutionKernel"))),
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
                one.instance_number,
            )
            for one in stack.slices
        ),
        _as_json(header),
        str(root),
        facts,
    )


def _as_json(header: pydicom.Dataset) -> dict[str, object]:
    """DICOM JSON of a header, in UTF-8; values that break the standard's rules are left out."""
    charset = pydicom.charset.convert_encodings(header.get("SpecificCharacterSet") or "ISO_IR 6")
    kept: dict[str, object] = {}
    for tag in sorted(header.keys()):
        with (
            suppress(Exception),
            warnings.catch_warnings(action="ignore"),
        ):  # on values that break the rules
            element = header[tag]
            pydicom.charset.decode_element(element, charset)
            kept[f"{element.tag.group:04X}{element.tag.element:04X}"] = element.to_json_dict(None, 0)
    kept["00080005"] = {"vr": "CS", "Value": ["ISO_IR 192"]}
    return kept
