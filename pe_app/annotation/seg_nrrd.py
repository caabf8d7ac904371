"""Outlines as files of 3D Slicer: .seg.nrrd, written and read without Slicer.

Slicer saves the part of the grid that holds something, with an origin of its own; overlapping segments lie in layers
of a 4-D file; what is known of a segment stands in its tags. Fields as slicer-core 5.11 writes them.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from pe_app.common.errors import InputError, TooLarge
from pe_app.common.files import replacing
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import MAX_VOXELS, image_from_volume, volume_from_image, write_image

NAME = "embolism"
"""Name and ID of the segment that holds the emboli."""


@dataclass(frozen=True, eq=False)
class Segment:
    """One segment of a .seg.nrrd: its voxels on the file's own grid, in canonical order, and its tags."""

    mask: Volume
    tags: Mapping[str, str]


def read_segmentation(path: Path, volume: Volume) -> Volume:
    """The outlines of a .seg.nrrd on the CT's grid, 0 or 1, whatever part of it was saved and in what order.

    Raises:
        InputError: as ``read_segment`` and ``on_grid``.
    """
    return volume.with_voxels(on_grid(read_segment(path).mask, volume))


def read_segment(path: Path) -> Segment:
    """The segment of a .seg.nrrd that holds the emboli.

    Of several it is the one named ``embolism``, or the only one that is no helper (helpers' names begin with ``_``).
    A label map without segments counts as one, whatever its labels.

    Raises:
        InputError: if the file cannot be read or the segment is ambiguous.
    """
    if not path.is_file():
        raise InputError(f"{path.name}: there is no such file; outlines are saved as .seg.nrrd beside the .json")
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO")
    reader.SetFileName(str(path))
    try:
        _check_attached(path)
        reader.ReadImageInformation()
        size, layers = reader.GetSize(), reader.GetNumberOfComponents()
        if math.prod(size) * layers > MAX_VOXELS:
            raise TooLarge(f"{path.name}: {_by(size)} voxels in {layers} layers cannot be; save it again from Slicer")
        if len(size) != 3:
            raise InputError(f"{path.name}: expected a 3-D segmentation, got {_by(size)} voxels in {layers} layers")
        image = reader.Execute()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path.name}: is damaged or not a segmentation; save it again as .seg.nrrd") from error
    fields = {field: image.GetMetaData(field) for field in image.GetMetaDataKeys()}

    number = _segment_number(fields, path.name)
    if number is None:
        if layers > 1:
            raise InputError(f"{path.name}: has {layers} numbers a voxel and names no segments; save it as .seg.nrrd")
        return Segment(volume_from_image(image != 0, path.name), {})
    layer = _header_integer(fields, f"Segment{number}_Layer", number if layers > 1 else 0, path.name)
    value = _header_integer(fields, f"Segment{number}_LabelValue", 1, path.name)
    if layer >= layers or value == 0:
        raise InputError(
            f"{path.name}: its header gives its segment the label {value} in layer {layer} of {layers}; save it again"
        )
    if layers > 1:
        image = sitk.VectorIndexSelectionCast(image, layer)
    tags = dict(tag.split(":", 1) for tag in fields.get(f"Segment{number}_Tags", "").split("|") if ":" in tag)
    return Segment(volume_from_image(image == value, path.name), tags)


def on_grid(part: Volume, volume: Volume) -> NDArray[np.uint8]:
    """A mask on a part of the CT's grid on the whole of it; never interpolated.

    Raises:
        InputError: if its voxels are not the CT's, or something is outlined outside of it.
    """
    mask = np.zeros(volume.shape, dtype=np.uint8)
    drawn = np.argwhere(part.voxels)
    if len(drawn) == 0:
        return mask
    corners = np.array(list(product(*((0, count - 1) for count in part.shape))))
    offsets = volume.to_index(part.to_lps_mm(corners)) - corners
    offset = np.rint(offsets[0]).astype(np.int64)
    if np.abs(offsets - offset).max() > 0.1:
        raise InputError(
            f"{part.name}: its voxels are not those of {volume.name} (spacing {_by(part.spacing_mm)} against "
            f"{_by(volume.spacing_mm)} mm, or shifted): choose the CT as source geometry of the segmentation"
        )
    placed = drawn + offset
    if (placed < 0).any() or (placed >= volume.shape).any():
        raise InputError(f"{part.name}: something is outlined outside of {volume.name}; erase it there")
    mask[tuple(placed.T)] = 1
    return mask


def write_segment(mask: Volume, path: Path, tags: Mapping[str, str]) -> None:
    """Write a mask as a segmentation with one segment, all or nothing.

    Args:
        mask: 0 or 1, on the CT's grid.
        path: ends in ``.seg.nrrd``.
        tags: kept with the segment by Slicer; no ``|`` in them, which separates tags.
    """
    slices, rows, columns = mask.shape
    image = image_from_volume(mask)
    fields = {
        "Segment0_ID": NAME,
        "Segment0_Name": NAME,
        "Segment0_NameAutoGenerated": "0",
        "Segment0_Color": "1 0.2 0.1",
        "Segment0_ColorAutoGenerated": "0",
        "Segment0_LabelValue": "1",
        "Segment0_Layer": "0",
        "Segment0_Extent": f"0 {columns - 1} 0 {rows - 1} 0 {slices - 1}",
        "Segment0_Tags": "".join(f"{name}:{value}|" for name, value in tags.items()),
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for field, value in fields.items():
        image.SetMetaData(field, value)
    with replacing(path) as temporary:
        write_image(image, temporary)


def _check_attached(path: Path) -> None:
    """Refuse a header that takes its voxels from another file: an uploaded one could name any file of the server."""
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                return
            if re.match(rb"data ?file:", line, re.IGNORECASE):
                raise InputError(f"{path.name}: its voxels are in another file; save both into one .seg.nrrd")


def _segment_number(fields: Mapping[str, str], name: str) -> int | None:
    """Which segment holds the emboli; None in a plain label map."""
    names = {
        int(match[1]): label.strip()
        for field, label in fields.items()
        if (match := re.fullmatch(r"Segment(\d+)_Name", field))
    }
    if not names and not any(field.startswith("Segmentation_") for field in fields):
        return None
    chosen = [number for number, label in names.items() if label.lower() == NAME]
    chosen = chosen or [number for number, label in names.items() if not label.startswith("_")]
    if len(chosen) != 1:
        found = ", ".join(names.values()) or "none"
        raise InputError(f"{name}: which segment holds the emboli? found {found}; name one of them {NAME!r}")
    return chosen[0]


def _header_integer(fields: Mapping[str, str], field: str, default: int, name: str) -> int:
    text = fields.get(field, str(default)).strip()
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise InputError(f"{name}: {field} must be an integer, got {reprlib.repr(text)}; save the segmentation again")
    return int(text)


def _by(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.6g}" for number in numbers)
