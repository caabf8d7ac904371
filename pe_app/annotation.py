"""What readers saw: the slices that were looked at, and the outlines of emboli on them.

Not reviewed is not negative: a slice that is not listed says nothing. An annotation is a ``.json`` with the reviewed
slices and, beside it, a ``.seg.nrrd`` with the outlines that 3D Slicer opens and saves as a segmentation; that one
carries the reviewed slices too, in the tag ``PE.Review`` of its segment.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeGuard, cast, get_args

import numpy as np
from numpy.typing import NDArray

from pe_app.errors import InputError
from pe_app.files import write_durably
from pe_app.lungs import SliceRange, lung_range
from pe_app.segmentation import Segment, on_grid, read_segment, write_segment
from pe_app.volume import Volume

State = Literal["embolism", "none", "uncertain"]
"""What a reader says of a slice. There is no word for "not looked at": such a slice is not listed."""

SCHEMA = "pe-annotation/1"
TAG = "PE.Review"
LONGEST_READER = 64

_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|\+00:00)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ReviewedSlice:
    r"""One slice that a reader looked at.

    Attributes:
        slice_index: 0 is nearest the feet.
        z_mm: LPS z of its centre; shows when the index is counted otherwise.
        state: what the reader saw.
        reader: who; at most 64 printable characters without ``|``, ``"`` and ``\``.
        time: when, ISO 8601 in UTC; "" where unknown.

    Raises:
        InputError: if a value has another type or lies outside its range.
    """

    slice_index: int
    z_mm: float
    state: State
    reader: str = ""
    time: str = ""

    def __post_init__(self) -> None:
        if not _is_integer(self.slice_index) or self.slice_index < 0:
            raise InputError(f"slice_index must be an integer from 0 on, got {reprlib.repr(self.slice_index)}")
        where = f"slice {self.slice_index}"
        if not _is_number(self.z_mm) or not -1e6 < self.z_mm < 1e6:
            raise InputError(f"{where}: z_mm must be a number of millimetres, got {reprlib.repr(self.z_mm)}")
        if self.state not in get_args(State):
            states = ", ".join(get_args(State))
            raise InputError(f"{where}: unknown state {reprlib.repr(self.state)}; the states are {states}")
        if not isinstance(self.reader, str) or len(self.reader) > LONGEST_READER:
            raise InputError(f"{where}: reader must be a name of at most {LONGEST_READER} characters")
        # '|' separates the tags of a .seg.nrrd; its header readers disagree on escaped quotes
        if not self.reader.isprintable() or set('|"\\') & set(self.reader):
            raise InputError(f'{where}: reader {self.reader!a} must be printable and without | " and \\')
        if not isinstance(self.time, str) or (self.time and not _is_utc(self.time)):
            raise InputError(
                f"{where}: time must be ISO 8601 in UTC like 2024-05-31T08:15:00Z, got {reprlib.repr(self.time)}"
            )
        object.__setattr__(self, "z_mm", float(self.z_mm))


@dataclass(frozen=True, eq=False)
class SparseAnnotation:
    """The reviewed slices of one study, about every 10 mm, and the outlines on those with embolism.

    Attributes:
        image_sha256: identity of the CT's voxels (``Volume.sha256``).
        shape: slices, rows, columns of the CT.
        spacing_mm: its spacing, in the same order.
        slices: sorted by ``slice_index``, each slice once.
        masks: the outline ``(rows, columns)`` of every slice with embolism, and of no other; read-only.

    Raises:
        InputError: if slices and masks contradict each other or do not fit the CT's shape.
    """

    image_sha256: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    slices: tuple[ReviewedSlice, ...]
    masks: Mapping[int, NDArray[np.bool_]]

    def __post_init__(self) -> None:
        x, y, z = (float(step) for step in self.spacing_mm)
        object.__setattr__(self, "spacing_mm", (x, y, z))
        slices = tuple(sorted(self.slices, key=lambda reviewed: reviewed.slice_index))
        for reviewed, following in pairwise(slices):
            if reviewed.slice_index == following.slice_index:
                raise InputError(f"annotation: slice {reviewed.slice_index} is listed twice")
        if slices and slices[-1].slice_index >= self.shape[0]:
            raise InputError(
                f"annotation: slice {slices[-1].slice_index} does not exist, the slices are 0 to {self.shape[0] - 1}"
            )
        positive = {reviewed.slice_index for reviewed in slices if reviewed.state == "embolism"}
        masks = {index: np.array(self.masks[index], dtype=bool) for index in sorted(self.masks)}
        for index, mask in masks.items():
            if index not in positive:
                raise InputError(f"annotation: there is an outline on slice {index}, which is not listed as embolism")
            if mask.shape != self.shape[1:]:
                raise InputError(f"annotation: the mask of slice {index} is {mask.shape}, not {self.shape[1:]}")
            mask.setflags(write=False)
        for index in sorted(positive):
            if index not in masks or not masks[index].any():
                raise InputError(
                    f"annotation: slice {index} is listed as embolism but nothing is outlined on it; outline the "
                    "embolism or mark the slice as uncertain"
                )
        object.__setattr__(self, "slices", slices)
        object.__setattr__(self, "masks", MappingProxyType(masks))

    def __reduce__(self) -> tuple[type[SparseAnnotation], tuple[object, ...]]:
        """To another process it goes by its fields; a read-only mapping cannot go."""
        return type(self), (self.image_sha256, self.shape, self.spacing_mm, self.slices, dict(self.masks))

    @classmethod
    def empty(cls, volume: Volume) -> SparseAnnotation:
        """The annotation of a CT that nobody has looked at."""
        return cls(volume.sha256, volume.shape, volume.spacing_mm, (), {})

    @classmethod
    def from_mask(
        cls, volume: Volume, mask: Volume, slice_indices: Sequence[int], reader: str = "", time: str = ""
    ) -> SparseAnnotation:
        """Take the given slices of a mask as reviewed: embolism where the mask is not empty, else none.

        The other slices stay unreviewed, whatever the mask holds there.

        Raises:
            InputError: if the mask lies on another grid than the CT, or a slice does not exist.
        """
        if not mask.same_grid(volume):
            raise InputError(f"{mask.name}: the mask lies on another grid than the CT {volume.name}")
        slices, masks = [], {}
        for index in map(int, slice_indices):
            if not 0 <= index < volume.shape[0]:
                raise InputError(f"{volume.name}: there is no slice {index}, the slices are 0 to {volume.shape[0] - 1}")
            drawn = mask.voxels[index] != 0
            if drawn.any():
                masks[index] = drawn
            state: State = "embolism" if index in masks else "none"
            slices.append(ReviewedSlice(index, float(volume.slice_z_mm[index]), state, reader, time))
        return replace(cls.empty(volume), slices=tuple(slices), masks=masks)

    def review(self, reviewed: ReviewedSlice, mask: NDArray[np.generic] | None = None) -> SparseAnnotation:
        """The annotation with that slice added, or replaced where it was reviewed before.

        Args:
            reviewed: the reader's word.
            mask: ``(rows, columns)``, the outline; needed for embolism, refused (unless empty) for other states.
        """
        index = reviewed.slice_index
        others = tuple(other for other in self.slices if other.slice_index != index)
        masks = {other: drawn for other, drawn in self.masks.items() if other != index}
        if mask is not None and mask.any():
            masks[index] = mask != 0
        return replace(self, slices=(*others, reviewed), masks=masks)

    def state(self, slice_index: int) -> State | None:
        """What the reader said of a slice; None where nobody looked."""
        return next((reviewed.state for reviewed in self.slices if reviewed.slice_index == slice_index), None)

    def open_slices(self, schedule: Sequence[int]) -> tuple[int, ...]:
        """The slices of a schedule that are not reviewed yet."""
        reviewed = {entry.slice_index for entry in self.slices}
        return tuple(index for index in schedule if index not in reviewed)

    def is_complete(self, schedule: Sequence[int]) -> bool:
        """Whether every slice of a schedule is reviewed."""
        return not self.open_slices(schedule)

    def check_belongs_to(self, volume: Volume) -> None:
        """Refuse an annotation of another CT, or one whose slices are counted otherwise.

        Raises:
            InputError: if size, voxels or spacing differ, or a slice lies half a slice or more away from its z_mm.
        """
        if self.shape != volume.shape:
            raise InputError(f"annotation: made on {_by(self.shape)} voxels, but {volume.name} has {_by(volume.shape)}")
        if self.image_sha256 != volume.sha256:
            raise InputError(
                f"annotation: made on other voxels than {volume.name} (SHA-256 {self.image_sha256[:12]} against "
                f"{volume.sha256[:12]}): choose the CT that was annotated"
            )
        if not np.allclose(self.spacing_mm, volume.spacing_mm, rtol=1e-3, atol=0):
            raise InputError(
                f"annotation: made at a spacing of {_by(self.spacing_mm)} mm, but {volume.name} has "
                f"{_by(volume.spacing_mm)}"
            )
        z_mm = volume.slice_z_mm
        half_slice = (z_mm[-1] - z_mm[0]) / max(len(z_mm) - 1, 1) / 2 or volume.spacing_mm[0] / 2
        for reviewed in self.slices:
            place = float(z_mm[reviewed.slice_index])
            if abs(reviewed.z_mm - place) > half_slice:
                raise InputError(
                    f"annotation: slice {reviewed.slice_index} is said to lie at z {reviewed.z_mm:.2f} mm, but in "
                    f"{volume.name} it lies at {place:.2f}; count slices from the feet"
                )

    def to_json(self) -> dict[str, object]:
        """The reviewed slices as plain JSON, schema ``pe-annotation/1``; the outlines travel as ``.seg.nrrd``."""
        image = {"sha256": self.image_sha256, "size": list(self.shape), "spacing_mm": list(self.spacing_mm)}
        return {"schema": SCHEMA, "image": image, "slices": [asdict(reviewed) for reviewed in self.slices]}

    @classmethod
    def from_json(cls, payload: object, masks: Mapping[int, NDArray[np.bool_]]) -> SparseAnnotation:
        """The annotation that ``to_json`` wrote, from whatever arrived.

        Args:
            payload: decoded JSON of any shape; unknown keys are ignored.
            masks: the outlines by slice (``slice_masks``).

        Raises:
            InputError: naming the first value that is not as it must be.
        """
        body = _mapping(payload, "the annotation")
        if body.get("schema") != SCHEMA:
            found = reprlib.repr(body.get("schema"))
            raise InputError(f"annotation: unknown schema {found}, expected {SCHEMA!r}; update the older program")
        image = _image(body)
        sha256 = image.get("sha256")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise InputError(f"annotation: image.sha256 must be 64 hexadecimal digits, got {reprlib.repr(sha256)}")
        spacing = _three(image.get("spacing_mm"), "image.spacing_mm")
        if not all(_is_number(step) and 0 < step < 1e6 for step in spacing):
            raise InputError(f"annotation: image.spacing_mm must be positive numbers, got {reprlib.repr(spacing)}")
        entries = body.get("slices")
        if not isinstance(entries, list):
            raise InputError(f"annotation: slices must be a list, got {reprlib.repr(entries)}")
        slices = tuple(_reviewed_slice(entry, number) for number, entry in enumerate(entries, start=1))
        return cls(sha256, _image_size(image), cast(tuple[float, float, float], spacing), slices, masks)

    def write(self, path: Path, volume: Volume) -> None:
        """Write ``path`` (.json) and the .seg.nrrd beside it, each all or nothing, the .json last.

        The .json records which outlines belong to it, so that ``read`` detects a save that was interrupted between
        the two.

        Raises:
            InputError: if the annotation belongs to another CT.
        """
        self.check_belongs_to(volume)
        voxels = np.zeros(self.shape, dtype=np.uint8)
        for index, mask in self.masks.items():
            voxels[index] = mask
        review = json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        write_segment(volume.with_voxels(voxels), segmentation_path(path), {TAG: review})
        payload = {**self.to_json(), "mask_sha256": _masks_sha256(self.masks)}
        write_durably(path, json.dumps(payload, ensure_ascii=False, allow_nan=False, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path, volume: Volume | None = None) -> SparseAnnotation:
        """Read an annotation from its .json, or from a .seg.nrrd alone that carries the tag ``PE.Review``.

        Args:
            path: the .json (the .seg.nrrd is looked for beside it) or the .seg.nrrd.
            volume: its CT. Needed where Slicer saved a part of the grid; the annotation is checked against it.

        Raises:
            InputError: if a file is missing or damaged, the two are of different saves, or do not fit the CT.
        """
        alone = path.name.endswith(".seg.nrrd")
        segmentation = path if alone else segmentation_path(path)
        segment = read_segment(segmentation)
        payload = _tagged_json(segment, path) if alone else _json(path.name, _text(path))
        masks = slice_masks(segment.mask.voxels if volume is None else on_grid(segment.mask, volume))
        expected = payload.get("mask_sha256") if isinstance(payload, dict) else None
        try:
            if volume is None and masks and segment.mask.shape != _image_size(_image(payload)):
                raise InputError(f"{segmentation.name} holds a part of the grid only; give its CT too")
            if expected is not None and expected != _masks_sha256(masks):
                raise InputError(
                    f"the outlines in {segmentation.name} are of another save (was one interrupted?); that file holds "
                    "the reviewed slices of its own save too: read it alone"
                )
            annotation = cls.from_json(payload, masks)
        except InputError as error:
            raise InputError(f"{path.name}: {error}") from error
        if volume is not None:
            annotation.check_belongs_to(volume)
        return annotation


def segmentation_path(path: Path) -> Path:
    """Where the outlines of an annotation's .json lie: ``study.json`` -> ``study.seg.nrrd``."""
    if path.suffix != ".json":
        raise InputError(f"{path.name}: an annotation is a .json file with a .seg.nrrd beside it")
    return path.with_suffix(".seg.nrrd")


def slice_masks(mask: NDArray[np.generic]) -> dict[int, NDArray[np.bool_]]:
    """The slices of a mask ``(slices, rows, columns)`` on which something is outlined, by slice."""
    drawn = mask.any(axis=(1, 2))
    return {int(index): mask[index] != 0 for index in np.flatnonzero(drawn)}


def slice_schedule(volume: Volume, every_mm: float = 10.0, lung: SliceRange | None = None) -> tuple[int, ...]:
    """The slices to review: nearest to positions equally spaced over the lung, both of its ends among them.

    The step is the one nearest to ``every_mm`` that divides the range evenly; of a CT with thicker slices every slice
    is taken. A range shorter than half a step gets its middle slice.

    Args:
        volume: the CT.
        every_mm: about 10 mm in section 3.1 of the paper.
        lung: first and last slice with lung; found in the CT when not given.

    Raises:
        InputError: if the CT holds no lung.
    """
    if not every_mm > 0:
        raise ValueError(f"every_mm must be positive, got {every_mm}")
    first, last = lung or lung_range(volume)
    bottom, top = volume.slice_z_mm[[first, last]]
    steps = round((top - bottom) / every_mm)
    places = np.linspace(bottom, top, steps + 1) if steps else [(bottom + top) / 2]
    return tuple(sorted({volume.nearest_slice(z_mm) for z_mm in places}))


def _tagged_json(segment: Segment, path: Path) -> object:
    if TAG not in segment.tags:
        raise InputError(
            f"{path.name}: does not say which slices were reviewed (no tag {TAG}), and an empty slice may be one that "
            "nobody looked at; give the .json, or review its slices first"
        )
    return _json(f"{path.name}, tag {TAG}", segment.tags[TAG])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: is not UTF-8 text, so no annotation") from error


def _json(name: str, text: str) -> object:
    try:
        payload: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: is not valid JSON ({error}); was it edited or cut off?") from error
    return payload


def _reviewed_slice(entry: object, number: int) -> ReviewedSlice:
    fields = _mapping(entry, f"entry {number} of slices")
    absent = [field for field in ("slice_index", "z_mm", "state") if field not in fields]
    if absent:
        raise InputError(f"annotation: entry {number} of slices lacks {absent[0]}")
    known = {field: fields[field] for field in ReviewedSlice.__dataclass_fields__ if field in fields}
    try:
        return ReviewedSlice(**known)  # type: ignore[arg-type]  # ReviewedSlice checks the types itself
    except InputError as error:
        raise InputError(f"annotation: entry {number} of slices: {error}") from error


def _mapping(value: object, what: str) -> dict[object, object]:
    if not isinstance(value, dict):
        raise InputError(f"annotation: {what} must be a JSON object, got {reprlib.repr(value)}")
    return value


def _image(payload: object) -> dict[object, object]:
    return _mapping(_mapping(payload, "the annotation").get("image"), "image")


def _image_size(image: Mapping[object, object]) -> tuple[int, int, int]:
    size = _three(image.get("size"), "image.size")
    if not all(_is_integer(count) and 0 < count < 2**16 for count in size):
        raise InputError(f"annotation: image.size must be counts of voxels, got {reprlib.repr(size)}")
    return cast(tuple[int, int, int], size)


def _three(value: object, what: str) -> tuple[object, object, object]:
    if not isinstance(value, list) or len(value) != 3:
        raise InputError(
            f"annotation: {what} must be a list of three (slices, rows, columns), got {reprlib.repr(value)}"
        )
    x, y, z = value
    return x, y, z


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_utc(text: str) -> bool:
    if not _TIME.fullmatch(text):
        return False
    try:
        datetime.fromisoformat(text)
    except ValueError:  # a 31st of February
        return False
    return True


def _masks_sha256(masks: Mapping[int, NDArray[np.bool_]]) -> str:
    """Identity of the outlines: their slices and pixels, however the file that carries them is packed."""
    digest = hashlib.sha256()
    for index in sorted(masks):
        digest.update(f"{index} {masks[index].shape}\n".encode())
        digest.update(np.packbits(masks[index]).tobytes())
    return digest.hexdigest()


def _by(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.6g}" for number in numbers)
