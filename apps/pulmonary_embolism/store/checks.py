"""What a client may bring: names that are never paths, finite JSON, outlines that lie on this CT.

All of it is checked before anything is written; what is wrong is an ``InputError`` with the sentence for the client.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from pe_app.annotation.seg_nrrd import read_segment
from pe_app.annotation.sparse import SparseAnnotation
from pe_app.common.errors import InputError
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_mask, volume_from_image

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd")
LABEL_ENDINGS = (".seg.nrrd", *IMAGE_ENDINGS)

LONGEST_NAME = 128
"""Bytes; file systems take 255, of which endings and the names of unfinished files need some."""

DEEPEST_JSON = 32
"""Levels; MONAI Label's own reader of its index fails at some hundred."""

LARGEST_GRID = 2**29
"""Voxels; 512 x 512 x 2000."""

_TAG = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,62}[A-Za-z0-9_-])?")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
"""What no file can be called on Windows."""


def is_listed(name: str) -> bool:
    """Whether a file in the studies folder can be a study: it can be shown, and its name is neither hidden nor long."""
    return name.isprintable() and not name.startswith(".") and len(name.encode()) <= LONGEST_NAME


def check_study_name(name: str) -> None:
    """Refuse an id for a new study that is not a file's name on every system.

    Raises:
        InputError: if it holds separators or invisible characters, is reserved, too long, or not in Unicode's NFC.
    """
    good = (
        is_listed(name)
        and name == name.strip(" .") != ""
        and not set(name) & set('/\\:*?"<>|')
        and unicodedata.is_normalized("NFC", name)
        and not _RESERVED.fullmatch(name)
        and split_ending(f"{name}.nrrd") == (name, ".nrrd")
    )
    if not good:
        raise InputError(f"{name[:LONGEST_NAME]!a} cannot name a study: use letters, digits, - and _")


def is_tag(text: str) -> bool:
    """Whether a text can be a tag."""
    return bool(_TAG.fullmatch(text)) and not _RESERVED.fullmatch(text)


def check_tag(tag: str) -> None:
    """Refuse a tag that is no name.

    Raises:
        InputError: if it is anything but up to 64 letters, digits, dots, - and _.
    """
    if not is_tag(tag):
        raise InputError(f"{tag[:LONGEST_NAME]!a} is no tag: use letters, digits, - and _")


def split_ending(name: str, endings: tuple[str, ...] = LABEL_ENDINGS) -> tuple[str, str]:
    """A file's name without its ending, and the ending as it is written.

    Raises:
        InputError: if it ends otherwise.
    """
    ending = next((ending for ending in endings if name.lower().endswith(ending)), None)
    if ending is None:
        raise InputError(f"expected a file ending in {', '.join(endings)}, got {name!a}")
    return name[: -len(ending)], name[-len(ending) :]


def check_inside(path: Path, root: Path) -> None:
    """Refuse a path that leads out of the studies folder through a link.

    Raises:
        InputError: naming it.
    """
    if not path.resolve().is_relative_to(root):
        raise InputError(f"{path.name}: leads out of the studies folder through a link: put the file itself there")


def printable(text: str) -> str:
    """A text of a client as it may be shown in a terminal: without characters that no reader sees."""
    return "".join(character if character.isprintable() else "?" for character in text)


def finite_json(value: object) -> dict[str, Any]:
    """A copy of a JSON object that every reader of JSON understands.

    Raises:
        InputError: if it is no object, or holds numbers that are not finite or beyond 64 bits, text that is no UTF-8,
            or more than 32 levels.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"expected a JSON object, got {type(value).__name__}")
    copy: dict[str, Any] = _finite(value, 1)
    return copy


def _finite(value: object, level: int) -> Any:
    if level > DEEPEST_JSON:
        raise InputError(f"expected JSON of at most {DEEPEST_JSON} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"expected JSON in UTF-8, got {value[:40]!a}") from error
        return value
    if isinstance(value, (int, float)):
        if not math.isfinite(value) if isinstance(value, float) else abs(value) >= 2**63:
            raise InputError("expected JSON with finite numbers of at most 64 bits")
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {_finite(key, level): _finite(entry, level + 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry, level + 1) for entry in value]
    raise InputError(f"expected JSON, got a {type(value).__name__}")


def read_annotation(payload: object, source: Path, volume: Volume) -> SparseAnnotation:
    """A client's annotation and its outlines, checked against the CT.

    Raises:
        InputError: if they contradict each other or belong to other voxels.
    """
    if not isinstance(payload, dict):
        raise InputError("annotation: expected a JSON object of schema pe-annotation/2")
    if not source.name.endswith(".nrrd"):
        mask = read_mask(source, volume)
        masks = {index: plane != 0 for index, plane in enumerate(mask.voxels) if plane.any()}
        annotation = SparseAnnotation.from_json(payload, masks)
        annotation.check_belongs_to(volume)
        return annotation
    if len(read_segment(source).tags) == 0:  # a label map: its labels would count as one outline
        read_mask(source, volume)
    with tempfile.TemporaryDirectory(prefix="pe-") as folder:
        path = Path(folder) / "annotation.json"
        path.write_text(json.dumps({**payload, "mask_sha256": None}), encoding="utf-8")
        path.with_name("annotation.seg.nrrd").write_bytes(source.read_bytes())
        return SparseAnnotation.read(path, volume)


def painted_slices(mask: Volume, volume: Volume, reader: str) -> SparseAnnotation:
    """A label map as an annotation: its painted slices show embolism; of the others nobody said that they show none."""
    painted = [index for index, plane in enumerate(mask.voxels) if plane.any()]
    name = reader if len(reader) <= 64 and reader.isprintable() and not set(reader) & set('|"\\') else ""
    time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return SparseAnnotation.from_mask(volume, mask, painted, name, time)


def read_grid(path: Path) -> Volume:
    """The grid of a CT's file, without reading its voxels: they are 0.

    Raises:
        InputError: if its header cannot be read.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        size = reader.GetSize()
        if len(size) != 3 or math.prod(size) > LARGEST_GRID:
            raise InputError(f"{path.name}: {'x'.join(map(str, size))} voxels are no CT")
        image = sitk.Image(size, sitk.sitkUInt8)
    except RuntimeError as error:
        raise InputError(f"{path.name}: its header cannot be read: export it again") from error
    image.SetSpacing(reader.GetSpacing())
    image.SetOrigin(reader.GetOrigin())
    image.SetDirection(reader.GetDirection())
    return volume_from_image(image, path.name)
