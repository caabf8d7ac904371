"""Files to Volumes and back: a DICOM folder, NIfTI or NRRD becomes HU in canonical order, or a sentence why not.

What is cut off, has no place in the patient or does not hold HU is refused, never repaired.
"""

from __future__ import annotations

import errno
import gzip
import logging
import os
import re
import struct
import zlib
from dataclasses import replace
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from pe_app.common.errors import InputError, TooLarge
from pe_app.common.files import replacing
from pe_app.ct.dicom_headers import MAX_POSITION_MM, SPACING_RANGE_MM, is_dicom, last_line, millimetres
from pe_app.ct.dicom_pixels import check_hu_range, read_dicom_folder
from pe_app.ct.dicom_stack import TILT_DEGREES
from pe_app.ct.source_series import read_source, source_path
from pe_app.ct.volume import PADDING_HU, Volume, canonical_volume

log = logging.getLogger(__name__)

os.environ["ITK_NIFTI_SFORM_PERMISSIVE"] = "1"
"""ITK refuses an sform that a rounding took off right angles, as those of many public sets; ours tells how far off."""
sitk.ProcessObject.SetGlobalWarningDisplay(False)  # and says so each time

SUFFIXES = (".nii.gz", ".nii", ".nrrd")
"""Files that hold one volume."""
MAX_NIFTI_HEADER = 1 << 24
"""Bytes before the voxels: headers have 352, and some programs' extensions a few thousand more."""
MAX_VOXELS = 2**29
"""512 x 512 x 2048: more is a damaged header, not a chest."""
MAX_BYTES = 2**30
"""What a file may unpack to: a megabyte of gzip can promise any amount, and reading takes twice that memory."""

_NRRD_SPACES = {
    "left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las",
}  # fmt: skip


def read_volume(path: str | Path, *, series: str | None = None) -> Volume:
    """Read a chest CT: HU as int16 in canonical order, whatever the scanner did not measure as -1024.

    Args:
        path: a folder with a DICOM series (searched recursively; other files are skipped), a .nii, .nii.gz or .nrrd
            file. Of several series the axial CT series with most slices is taken; the choice is logged.
        series: the SeriesInstanceUID to take instead.

    Raises:
        InputError: if it is not one complete, evenly spaced, untilted axial CT in HU; says what is wrong and where.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return read_dicom_folder(path, series)
        kind = _suffix(path) if path.is_file() else ""
        if kind:
            if series is not None:
                raise InputError(f"{path.name}: a {kind} file has no series {series} to choose; leave the series out")
            return _read_ct_file(path)
        if path.is_file() and (is_dicom(path) or path.suffix.lower() == ".dcm"):
            raise InputError(f"{path.name}: one DICOM file is one slice; a study needs the folder with all of them")
        if path.is_file():
            raise InputError(f"{path.name}: expected a DICOM folder or a file ending in {', '.join(SUFFIXES)}")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    raise InputError(f"{path}: there is no such file or folder")


def read_mask(path: str | Path, like: Volume) -> Volume:
    """Read a label map (.nii, .nii.gz or .nrrd) that lies on the grid of the CT ``like``; integers from 0.

    Raises:
        InputError: if it lies on another grid or holds anything but whole numbers from 0 to 32767.
    """
    path = Path(path)
    if not path.is_file() or not _suffix(path):
        raise InputError(f"{path}: expected a mask in a file ending in {', '.join(SUFFIXES)}")
    mask = _read_image_file(path)
    if not like.same_grid(mask):
        raise InputError(
            f"{path.name}: the mask is not on the grid of {like.name}: {mask.shape} voxels of "
            f"{millimetres(mask.spacing_mm)} mm against {like.shape} of {millimetres(like.spacing_mm)} mm, first "
            f"voxel at {millimetres(mask.affine[:3, 3])} against {millimetres(like.affine[:3, 3])}: "
            "resample it to the CT"
        )
    low, high = mask.voxels.min(), mask.voxels.max()
    whole = mask.voxels.dtype.kind in "iu" or bool((np.mod(mask.voxels, 1) == 0).all())
    if not whole or low < 0 or high > 32767:
        raise InputError(f"{path.name}: a mask holds whole numbers from 0 to 32767, this one {low} to {high}")
    return Volume(mask.voxels.astype(np.uint8 if high <= 255 else np.int16), like.affine, mask.name)


def write_volume(volume: Volume, path: str | Path) -> None:
    """Write .nrrd, .nii.gz (both compressed) or .nii; a reader sees the former file or the whole new one, never half.

    Raises:
        InputError: if the ending is another one or the file cannot be written.
    """
    path = Path(path)
    suffix = _suffix(path)
    if not suffix:
        raise InputError(f"{path.name}: a volume is written to a file ending in {', '.join(SUFFIXES)}")
    try:
        with replacing(path) as unfinished:
            write_image(image_from_volume(volume), unfinished)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be written: {last_line(error)}") from error


def write_image(image: sitk.Image, path: Path) -> None:
    """Write an image with ITK and make sure that it is whole: ITK does not notice a disk that gets full at the end.

    Raises:
        OSError: if the disk is full.
        RuntimeError: if ITK itself fails.
    """
    sitk.WriteImage(image, str(path), useCompression=_suffix(path) != ".nii", compressionLevel=3)
    try:
        if _suffix(path) == ".nrrd":
            _check_nrrd(path)
        else:
            reader = sitk.ImageFileReader()
            reader.SetFileName(str(path))
            reader.ReadImageInformation()
            _check_nifti(path, {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()})
    except (InputError, EOFError, RuntimeError, zlib.error) as error:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def resample_like(volume: Volume, reference: Volume) -> Volume:
    """``volume`` on the grid of ``reference``: linear interpolation, 0 outside; keeps the kind of number."""
    resample = sitk.ResampleImageFilter()
    slices, rows, columns = reference.shape
    geometry = image_from_volume(Volume(np.zeros((1, 1, 1), np.uint8), reference.affine))
    resample.SetReferenceImage(geometry)
    resample.SetSize((columns, rows, slices))
    resample.SetInterpolator(sitk.sitkLinear)
    resample.SetOutputPixelType(sitk.sitkFloat32)
    resample.SetDefaultPixelValue(0)
    values = sitk.GetArrayFromImage(resample.Execute(image_from_volume(volume)))
    if volume.voxels.dtype.kind in "iub":
        np.rint(values, out=values)
    return Volume(values.astype(volume.voxels.dtype, copy=False), reference.affine, volume.name)


def volume_from_image(image: sitk.Image, name: str) -> Volume:
    """A 3-D SimpleITK image as a Volume with its own kind of number, axes brought into canonical order.

    Raises:
        InputError: if it is not a 3-D scalar image or its geometry is absurd.
    """
    _check_grid(image.GetSize(), image.GetNumberOfComponentsPerPixel(), name)
    spacing = np.array(image.GetSpacing())
    affine = np.eye(4)
    affine[:3, :3] = (np.array(image.GetDirection()).reshape(3, 3) * spacing)[:, ::-1]  # array order is (z, y, x)
    affine[:3, 3] = image.GetOrigin()
    low, high = SPACING_RANGE_MM
    if not np.isfinite(affine).all() or not ((low <= spacing) & (spacing <= high)).all():
        raise InputError(f"{name}: voxels of {millimetres(spacing)} mm cannot be; the header is wrong: export it again")
    if np.abs(affine[:3, 3]).max() > MAX_POSITION_MM:
        raise InputError(f"{name}: its place, {affine[:3, 3].tolist()} mm, cannot be: the header is wrong")
    skew = _skew_degrees(affine)
    if skew > TILT_DEGREES:
        raise InputError(
            f"{name}: its axes are sheared by {skew:.1f} degrees, as by a tilted gantry: export a reformat with "
            "straight axial slices"
        )
    try:
        return canonical_volume(sitk.GetArrayFromImage(image), affine, name)
    except ValueError as error:
        raise InputError(f"{error}; the header is wrong: export it again") from error


def image_from_volume(volume: Volume) -> sitk.Image:
    """A Volume as a SimpleITK image (LPS, as ITK); booleans become uint8."""
    voxels = volume.voxels.astype(np.uint8) if volume.voxels.dtype == bool else volume.voxels
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels))
    image.SetSpacing(volume.spacing_mm[::-1])
    image.SetOrigin(volume.affine[:3, 3].tolist())
    image.SetDirection((volume.affine[:3, :3] / volume.spacing_mm)[:, ::-1].ravel().tolist())
    return image


def _read_ct_file(path: Path) -> Volume:
    """A NIfTI or NRRD file as a CT: its values checked to be HU and brought to int16."""
    image = _read_image_file(path)
    if image.shape[0] == 1:
        raise InputError(f"{path.name}: has a single slice; a study needs the whole chest")
    values = image.voxels
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():  # NaN survives min and max
        raise InputError(f"{path.name}: holds NaN or infinite values; a CT has a number of HU in every voxel")
    check_hu_range(low, high, path.name)
    if values.dtype.kind == "f":
        values = np.rint(values)
    return _with_source(Volume(np.maximum(values, PADDING_HU).astype(np.int16), image.affine, path.name), path)


def _with_source(volume: Volume, path: Path) -> Volume:
    """An imported CT with the DICOM series that it came from, if the file still holds those voxels."""
    try:
        source = read_source(source_path(path))
    except InputError as error:
        log.warning("%s", error)
        return volume
    return replace(volume, source=source) if source and source.image_sha256 == volume.sha256 else volume


def _read_image_file(path: Path) -> Volume:
    """A NIfTI or NRRD file with its own kind of number, in canonical order; only where the file is whole."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        if _suffix(path) == ".nrrd":
            _check_nrrd(path)
        else:
            _check_nifti_kind(path)
        reader.ReadImageInformation()
        _check_grid(reader.GetSize(), reader.GetNumberOfComponents(), path.name)
        if _suffix(path) != ".nrrd":
            _check_nifti(path, {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()})
        image = reader.Execute()
        if _suffix(path) != ".nrrd":
            _place_by_sform(image, path.name)
        return volume_from_image(image, path.name)
    except InputError:
        raise
    except (OSError, EOFError, RuntimeError, ValueError, zlib.error) as error:
        raise InputError(f"{path.name}: cannot be read ({last_line(error)}): export it again") from error


def _skew_degrees(affine: NDArray[np.float64]) -> float:
    """By how much two axes are off a right angle, at most."""
    return float(np.degrees(np.arcsin(np.abs(np.triu(_cosines(affine), 1)).max().clip(0, 1))))


def _cosines(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(3, 3)``: cosines of the angles between the axes; 1 on the diagonal, 0 beside it where they are upright."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines: NDArray[np.float64] = directions.T @ directions
    return cosines


def _check_grid(size: tuple[int, ...], components: int, name: str) -> None:
    """Refuse what is not one number on a 3-D grid of a possible size."""
    if len(size) != 3:
        raise InputError(f"{name}: has {len(size)} dimensions ({'x'.join(map(str, size))}); a CT has 3")
    if components != 1:
        raise InputError(f"{name}: has {components} numbers a voxel (colour or vectors); a CT has 1")
    count = int(np.prod(size, dtype=np.float64))
    if not 0 < count <= MAX_VOXELS:
        message = f"{name}: {'x'.join(map(str, size))} voxels cannot be; the header is wrong: export it again"
        raise TooLarge(message) if count else InputError(message)


def _check_nifti_kind(path: Path) -> None:
    """Refuse what is no NIfTI-1 in millimetres, or has an ending that lies about its compression, before ITK does."""
    packed = path.name.lower().endswith(".gz")
    with path.open("rb") as file:
        magic = file.read(3)
    if magic == b"BZh":
        raise InputError(f"{path.name}: is compressed by bzip2, which is not read: unpack it")
    if packed and magic and magic[:2] != b"\x1f\x8b":
        raise InputError(f"{path.name}: is not compressed, against its ending: rename it to end in .nii")
    if not packed and magic[:2] == b"\x1f\x8b":
        raise InputError(f"{path.name}: is compressed, against its ending: rename it to end in .nii.gz")
    with gzip.open(path) if packed else path.open("rb") as stream:
        head = stream.read(348)
    if 540 in (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")):
        raise InputError(f"{path.name}: is NIfTI-2, which is not read: convert it to NIfTI-1")
    unit = {1: "metres", 3: "micrometres"}.get(head[123] & 7) if len(head) == 348 else None
    if unit:
        raise InputError(f"{path.name}: its places are in {unit}, those of a CT in millimetres: convert it again")


def _check_nifti(path: Path, header: dict[str, str]) -> None:
    """Refuse a file without a place, with fewer bytes than its header promises, or with NaN: ITK reads both as 0."""
    if int(header["qform_code"]) <= 0 and int(header["sform_code"]) <= 0:
        raise InputError(f"{path.name}: has neither qform nor sform, so left and right are unknown: convert it again")
    voxels = int(np.prod([int(header[f"dim[{k}]"]) for k in (1, 2, 3)], dtype=np.int64))
    width, compressed = int(header["bitpix"]) // 8, path.name.lower().endswith(".gz")
    with gzip.open(path) if compressed else path.open("rb") as stream:
        head = stream.read(348)
        order = "<" if int.from_bytes(head[:4], "little") == 348 else ">"
        (start,) = struct.unpack_from(f"{order}f", head, 108)  # ITK shows another offset than the one it follows
        if not 352 <= start <= MAX_NIFTI_HEADER:  # also where it is not a number
            raise InputError(f"{path.name}: its voxels begin at byte {start}, 352 is the least: convert it again")
        stream.read(int(start) - len(head))
        is_float = int(header["datatype"]) in (16, 64)
        _check_data(stream, voxels * width, np.dtype(f"{order}f{width}") if is_float else None, path.name)


def _place_by_sform(image: sitk.Image, name: str) -> None:
    """Lay a NIfTI image where its sform says, as nibabel does, unless that is sheared, singular or ITK went elsewhere.

    ITK makes the axes of an sform upright; one that is off by a rounding keeps its own.
    """
    if int(image.GetMetaData("sform_code")) <= 0:
        return
    sform = np.array([[float(x) for x in image.GetMetaData(f"srow_{axis}").split()] for axis in "xyz"])
    sform[:2] *= -1  # NIfTI's RAS to LPS
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(image.GetSize()) - 1)
    read = [image.TransformIndexToPhysicalPoint(corner.tolist()) for corner in corners]
    off = np.abs(corners @ sform[:, :3].T + sform[:, 3] - read).max()
    spacing = np.linalg.norm(sform[:, :3], axis=0)
    if np.isfinite(sform).all() and spacing.min() > 0:
        skew = _skew_degrees(sform)
        if 1e-4 < skew <= TILT_DEGREES and abs(np.linalg.det(sform[:, :3] / spacing)) > 0.5:
            image.SetSpacing(spacing.tolist())
            image.SetDirection((sform[:, :3] / spacing).ravel().tolist())
            image.SetOrigin(sform[:, 3].tolist())
            return
        if skew > TILT_DEGREES:
            raise InputError(
                f"{name}: the axes of its sform are sheared by {skew:.1f} degrees: export a reformat with straight "
                "axial slices, or convert it again"
            )
    if not off <= 0.5:
        raise InputError(
            f"{name}: its sform is sheared, singular or at odds with its qform (corners {off:.1f} mm apart), so its "
            "place in the patient is unknown: convert it again"
        )


def _check_nrrd(path: Path) -> None:
    """Refuse a header without a place in the patient or with its data elsewhere, and data that are cut off."""
    with path.open("rb") as file:
        if file.read(4) != b"NRRD":
            raise InputError(f"{path.name}: is not an NRRD file")
        fields: dict[str, str] = {}
        while line := file.readline().rstrip(b"\r\n"):  # an empty line ends the header, however long it is
            key, colon, value = line.decode("latin-1").partition(": ")
            if colon:
                fields[key.strip().lower()] = value.strip()
        end = file.tell()
    if end == path.stat().st_size or "data file" in fields or "datafile" in fields:
        raise InputError(f"{path.name}: its voxels are in another file; write header and voxels into one .nrrd")
    directions = re.findall(r"none|\([^)]*\)", fields.get("space directions", "none").lower())
    listed = [int(size) for size in fields.get("sizes", "").split() if size.isdigit()]
    if len(listed) == len(directions) == 4 and directions.count("none") == 1:  # a list of volumes, as sequences are
        count = listed[directions.index("none")]
        if count != 1:
            raise InputError(f"{path.name}: holds a list of {count} volumes; a CT is one: save one of them alone")
        directions.remove("none")
    if fields.get("space", "").lower() not in _NRRD_SPACES or "none" in directions:
        raise InputError(f"{path.name}: has no space or space directions, so its place in the patient is unknown")
    encoding = fields.get("encoding", "").lower()
    if encoding in ("bzip2", "bz2"):
        raise InputError(f"{path.name}: is compressed by bzip2, which is not read: save it with gzip")
    if encoding in ("gzip", "gz", "raw"):
        width = _NRRD_BYTES.get(fields.get("type", "").lower())
        sizes = [int(size) for size in fields.get("sizes", "").split()]
        if width is None or not sizes or min(sizes) < 1:
            raise InputError(f"{path.name}: type {fields.get('type')!r} or sizes {sizes} are no image's")
        with path.open("rb") as file:
            file.seek(end)
            stream = file if encoding == "raw" else gzip.GzipFile(fileobj=file)
            _check_data(stream, int(np.prod(sizes, dtype=np.float64)) * width, None, path.name)


_NRRD_BYTES = {
    **dict.fromkeys(("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"), 1),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), 2),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), 2),
    **dict.fromkeys(
        ("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t", "float"), 4
    ),
    **dict.fromkeys(("longlong", "long long", "int64", "int64_t", "ulonglong", "uint64", "uint64_t", "double"), 8),
}


def _check_data(stream: BufferedIOBase, expected: int, floats: np.dtype[np.generic] | None, name: str) -> None:
    """Read ``expected`` bytes and one more, so that a compressed stream checks its sum; floats are to be finite."""
    if expected > MAX_BYTES:
        raise TooLarge(f"{name}: unpacks to {expected / 2**30:.1f} GiB, more than 1 is not read: save it as 16-bit")
    present = 0
    while present <= expected and (chunk := stream.read(1 << 20)):
        present += len(chunk)
        if floats is not None:
            whole = len(chunk) - len(chunk) % floats.itemsize
            if not np.isfinite(np.frombuffer(chunk[:whole], floats)).all():
                raise InputError(f"{name}: holds NaN or infinite values; a CT has a number of HU in every voxel")
    if present < expected:
        raise InputError(f"{name}: cut off, {present} of {expected} bytes are there: copy or export it again")


def _suffix(path: Path) -> str:
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")
