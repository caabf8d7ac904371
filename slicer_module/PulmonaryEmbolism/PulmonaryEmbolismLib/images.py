"""NRRD and NIfTI files as arrays with their place in the patient. No MRML, so that a thread can read a large CT.

Array order is (slice, row, column); ``affine`` takes (slice, row, column, 1) to LPS millimetres.
"""

from __future__ import annotations

import gzip
import itertools
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Tuple

import numpy as np

SUFFIXES = (".nii.gz", ".nii", ".nrrd")
"""What ``read_image`` reads."""

_NRRD_TYPES = {
    "signed char": "i1", "int8": "i1", "int8_t": "i1",
    "uchar": "u1", "unsigned char": "u1", "uint8": "u1", "uint8_t": "u1",
    "short": "i2", "short int": "i2", "signed short": "i2", "int16": "i2", "int16_t": "i2",
    "ushort": "u2", "unsigned short": "u2", "uint16": "u2", "uint16_t": "u2",
    "int": "i4", "signed int": "i4", "int32": "i4", "int32_t": "i4",
    "uint": "u4", "unsigned int": "u4", "uint32": "u4", "uint32_t": "u4",
    "float": "f4", "double": "f8",
}  # fmt: skip
_NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"}
_TO_LPS = {"left-posterior-superior": (1, 1, 1), "right-anterior-superior": (-1, -1, 1),
           "left-anterior-superior": (1, -1, 1), "lps": (1, 1, 1), "ras": (-1, -1, 1), "las": (1, -1, 1)}  # fmt: skip


class ImageError(ValueError):
    """A file that cannot be used, said in a sentence."""


@dataclass(frozen=True, eq=False)
class Image:
    """A 3-D array and its place; ``fields`` are the free key/value pairs of a NRRD header."""

    voxels: np.ndarray
    affine: np.ndarray
    fields: Dict[str, str] = field(default_factory=dict)

    @property
    def slice_z_mm(self) -> Tuple[float, ...]:
        """LPS z of the centre of every slice."""
        slices, rows, columns = self.voxels.shape
        middle = self.affine[2, 1] * (rows - 1) / 2 + self.affine[2, 2] * (columns - 1) / 2 + self.affine[2, 3]
        return tuple(float(middle + self.affine[2, 0] * k) for k in range(slices))

    def canonical(self) -> Image:
        """The same voxels with slices from the feet to the head, rows to the back, columns to the left."""
        directions = self.affine[:3, :3]
        world = (2, 1, 0)  # of slice, row and column
        order = max(
            itertools.permutations(range(3)), key=lambda axes: sum(abs(directions[w, a]) for w, a in zip(world, axes))
        )
        flips = [directions[w, a] < 0 for w, a in zip(world, order)]
        voxels = self.voxels.transpose(order)
        step = np.zeros((4, 4))
        step[3, 3] = 1
        for axis, (old, flip) in enumerate(zip(order, flips)):
            step[old, axis] = -1 if flip else 1
            step[old, 3] = voxels.shape[axis] - 1 if flip else 0
        voxels = voxels[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
        return Image(np.ascontiguousarray(voxels), self.affine @ step, self.fields)


def read_image(path: Path) -> Image:
    """One .nrrd, .nii or .nii.gz file, whole.

    Raises:
        ImageError: if the file is of another kind, damaged, or not three-dimensional.
    """
    try:
        if path.name.endswith(".nrrd"):
            return _read_nrrd(path)
        if path.name.endswith((".nii", ".nii.gz")):
            return _read_nifti(path)
    except ImageError:
        raise
    except (OSError, EOFError, ValueError, KeyError, IndexError, zlib.error) as error:
        raise ImageError(f"{path.name} is damaged or of a kind that this module does not read ({error})") from error
    raise ImageError(f"{path.name} is of a kind that this module does not read; it reads .nrrd, .nii and .nii.gz")


def write_segmentation(
    path: Path, masks: Dict[int, np.ndarray], shape: Tuple[int, int, int], affine: np.ndarray, review: str
) -> None:
    """The masks of some slices as one segment "embolism" on the CT's whole grid, as Slicer writes a .seg.nrrd.

    Args:
        path: the file; it appears when it is complete.
        masks: (rows, columns) per slice index, in canonical order.
        shape: (slices, rows, columns) of the CT.
        affine: (slice, row, column) to LPS mm.
        review: the annotation as compact JSON, kept in the segment's tags; without ``|``, which separates tags.
    """
    if "|" in review:
        raise ValueError("'|' would cut the segment's tag short")
    voxels = np.zeros(shape, np.uint8)
    for k, mask in masks.items():
        voxels[k] = mask != 0
    slices, rows, columns = shape
    vectors = " ".join("({},{},{})".format(*(repr(float(x)) for x in affine[:3, axis])) for axis in (2, 1, 0))
    header = [
        "NRRD0004",
        "# 3D Slicer Pulmonary Embolism module",
        "type: unsigned char",
        "dimension: 3",
        "space: left-posterior-superior",
        f"sizes: {columns} {rows} {slices}",
        f"space directions: {vectors}",
        "kinds: domain domain domain",
        "encoding: gzip",
        "space origin: ({},{},{})".format(*(repr(float(x)) for x in affine[:3, 3])),
        "Segmentation_ContainedRepresentationNames:=Binary labelmap|",
        "Segmentation_MasterRepresentation:=Binary labelmap",
        "Segmentation_SourceRepresentation:=Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset:=0 0 0",
        "Segment0_ID:=embolism",
        "Segment0_Name:=embolism",
        "Segment0_NameAutoGenerated:=0",
        "Segment0_Color:=0.9 0.2 0.15",
        "Segment0_ColorAutoGenerated:=0",
        f"Segment0_Extent:=0 {columns - 1} 0 {rows - 1} 0 {slices - 1}",
        "Segment0_LabelValue:=1",
        "Segment0_Layer:=0",
        f"Segment0_Tags:=PE.Review:{review}|",
    ]
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as out:
        out.write("\n".join(header).encode() + b"\n\n")
        with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1, mtime=0) as packed:
            packed.write(voxels.data)
    os.replace(temporary, path)


def _read_nrrd(path: Path) -> Image:
    header: Dict[str, str] = {}
    fields: Dict[str, str] = {}
    with open(path, "rb") as file:
        if not file.readline().startswith(b"NRRD"):
            raise ImageError(f"{path.name} does not begin like a NRRD file")
        for raw in iter(file.readline, b""):
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            if not line:
                break
            if ":=" in line and not line.startswith("#"):
                key, _, value = line.partition(":=")
                fields[key] = value
            elif ": " in line and not line.startswith("#"):
                key, _, value = line.partition(": ")
                header[key.strip().lower()] = value.strip()
        payload = file.read()
    if header.get("dimension") != "3" or "space directions" not in header:
        raise ImageError(f"{path.name} is not one three-dimensional image with a place in the patient")
    if "data file" in header or "datafile" in header:
        raise ImageError(f"{path.name} keeps its voxels in a second file")
    encoding = header["encoding"].lower()
    if encoding in ("gzip", "gz"):
        payload = gzip.decompress(payload)
    elif encoding != "raw":
        raise ImageError(f"{path.name} is encoded as {encoding}; this module reads raw and gzip")
    order = ">" if header.get("endian", "little").lower() == "big" else "<"
    sizes = [int(n) for n in header["sizes"].split()]
    voxels = _array(payload, order + _NRRD_TYPES[header["type"].lower()], sizes)
    vectors = np.array([_vector(part) for part in header["space directions"].split()])
    origin = _vector(header["space origin"])
    to_lps = np.array(_TO_LPS[header["space"].lower()], float)
    affine = np.eye(4)
    affine[:3, :3] = (vectors[::-1] * to_lps).T
    affine[:3, 3] = np.array(origin) * to_lps
    return Image(voxels, affine, fields)


def _read_nifti(path: Path) -> Image:
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    order = "<" if int.from_bytes(data[:4], "little") == 348 else ">"
    if len(data) < 352 or data[344:346] not in (b"n+", b"ni"):
        raise ImageError(f"{path.name} does not begin like a NIfTI file")

    def header(at: int, kind: str, count: int) -> np.ndarray:
        return np.frombuffer(data, order + kind, count, at).astype(float)

    dim = header(40, "i2", 8).astype(int)
    if any(n > 1 for n in dim[4 : dim[0] + 1]) or dim[0] < 3:
        raise ImageError(f"{path.name} is not one three-dimensional image")
    offset = int(header(108, "f4", 1)[0])
    dtype = order + _NIFTI_TYPES[int(header(70, "i2", 1)[0])]
    voxels = _array(data[offset:], dtype, list(dim[1:4]))
    slope, inter = header(112, "f4", 2)
    if slope not in (0.0, 1.0) or inter != 0.0:
        scaled = voxels * np.float32(slope or 1.0) + np.float32(inter)
        voxels = np.rint(scaled).astype(np.int16) if np.abs(scaled).max() < 32768 else scaled.astype(np.float32)
    ijk_to_ras = np.eye(4)
    if int(header(254, "i2", 1)[0]) > 0:
        ijk_to_ras[:3] = header(280, "f4", 12).reshape(3, 4)
    elif int(header(252, "i2", 1)[0]) > 0:
        ijk_to_ras[:3] = _qform(header(256, "f4", 6), header(76, "f4", 4))
    else:
        raise ImageError(f"{path.name} does not say where it lies in the patient")
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ ijk_to_ras[:, [2, 1, 0, 3]]
    return Image(voxels, affine)


def _array(payload: bytes, dtype: str, sizes: list) -> np.ndarray:
    """File order (fastest axis first) as (slice, row, column) in the machine's own byte order."""
    kind = np.dtype(dtype)
    count = int(np.prod(sizes))
    voxels = np.frombuffer(payload, kind, count).reshape(sizes[::-1])
    return voxels.astype(kind.newbyteorder("="), copy=False)


def _vector(text: str) -> Tuple[float, ...]:
    return tuple(float(x) for x in text.strip("()").split(","))


def _qform(quaternion: np.ndarray, pixdim: np.ndarray) -> np.ndarray:
    """The affine that NIfTI's quaternion means (nifti1.h, method 2)."""
    b, c, d = quaternion[:3]
    a = np.sqrt(max(1.0 - b * b - c * c - d * d, 0.0))
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * b * c - 2 * a * d, 2 * b * d + 2 * a * c],
            [2 * b * c + 2 * a * d, a * a + c * c - b * b - d * d, 2 * c * d - 2 * a * b],
            [2 * b * d - 2 * a * c, 2 * c * d + 2 * a * b, a * a + d * d - c * c - b * b],
        ]
    )
    scale = pixdim[1:4] * np.array([1, 1, -1 if pixdim[0] < 0 else 1])
    return np.column_stack([rotation * scale, quaternion[3:6]])
