"""What readers saw: the slices that were looked at, and the outlines of emboli on them.

Not reviewed is not negative: a slice that is not listed says nothing. An annotation is a ``.json`` with the reviewed
slices and, beside it, a ``.seg.nrrd`` with the outlines that 3D Slicer opens and saves as a segmentation; that one
carries the reviewed slices too, in the tag ``PE.Review`` of its segment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from pe_app.annotation.record import (
    AnnotatedImage,
    AnnotationRecord,
    CandidateDecision,
    Reading,
    ReviewedSlice,
    State,
)
from pe_app.annotation.seg_nrrd import Segment, on_grid, read_segment, write_segment
from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_app.common.schema import json_text
from pe_app.ct.lungs import SliceRange, lung_range
from pe_app.ct.volume import Volume

TAG = "PE.Review"

REACH_MM = 25.0
"""How far outside of a CT a candidate's centre may lie: two cells of the attention map."""


@dataclass(frozen=True, eq=False)
class SparseAnnotation:
    """The reviewed slices of one study, about every 10 mm, and the outlines on those with embolism.

    Attributes:
        image_sha256: identity of the CT's voxels (``Volume.sha256``).
        shape: slices, rows, columns of the CT.
        spacing_mm: its spacing, in the same order.
        slices: sorted by ``slice_index``, each slice once.
        masks: the outline ``(rows, columns)`` of every slice with embolism but those that were ``not_outlined``, and of
            no other; read-only.
        decisions: what readers decided on the model's candidates, one per model and candidate.
        note: of the study as a whole.
        reading: how it was read.

    Raises:
        InputError: if slices and masks contradict each other or do not fit the CT's shape.
    """

    image_sha256: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    slices: tuple[ReviewedSlice, ...]
    masks: Mapping[int, NDArray[np.bool_]]
    decisions: tuple[CandidateDecision, ...] = ()
    note: str = ""
    reading: Reading = field(default_factory=Reading)

    def __post_init__(self) -> None:
        x, y, z = (float(step) for step in self.spacing_mm)
        object.__setattr__(self, "spacing_mm", (x, y, z))
        slices = tuple(sorted(self.slices, key=lambda reviewed: reviewed.slice_index))
        decisions = tuple(sorted(self.decisions, key=lambda decision: (decision.model_sha256, decision.rank)))
        for reviewed, following in pairwise(slices):
            if reviewed.slice_index == following.slice_index:
                raise InputError(f"annotation: slice {reviewed.slice_index} is listed twice")
        for one, other in pairwise(decisions):
            if (one.model_sha256, one.rank) == (other.model_sha256, other.rank):
                raise InputError(f"annotation: two decisions on candidate {one.rank} of model {one.model_sha256[:12]}")
        named = [*(reviewed.slice_index for reviewed in slices), *(decision.slice_index for decision in decisions)]
        if max(named, default=0) >= self.shape[0]:
            raise InputError(f"annotation: slice {max(named)} does not exist, the slices are 0 to {self.shape[0] - 1}")
        object.__setattr__(self, "slices", slices)
        object.__setattr__(self, "decisions", decisions)
        object.__setattr__(self, "masks", MappingProxyType(_checked_masks(slices, self.masks, self.shape)))

    def __reduce__(self) -> tuple[type[SparseAnnotation], tuple[object, ...]]:
        """To another process it goes by its fields; a read-only mapping cannot go."""
        masks = dict(self.masks)
        return type(self), (
            *(self.image_sha256, self.shape, self.spacing_mm, self.slices, masks),
            *(self.decisions, self.note, self.reading),
        )

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
            mask: ``(rows, columns)``, the outline; needed for embolism that is not ``not_outlined``, refused (unless
                empty) for all others.
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
                    f"annotation: slice {reviewed.slice_index} lies, by its annotation, at z {reviewed.z_mm:.2f} mm, "
                    f"but in {volume.name} it lies at {place:.2f}; count slices from the feet"
                )
        reach = REACH_MM / np.array(volume.spacing_mm)
        for decision in self.decisions:
            index = volume.to_index(np.array([decision.centre_lps_mm]))[0]
            if (index < -reach).any() or (index > np.array(volume.shape) - 1 + reach).any():
                centre = ", ".join(f"{mm:.1f}" for mm in decision.centre_lps_mm)
                raise InputError(
                    f"annotation: candidate {decision.rank} lies, by its annotation, at ({centre}) mm, outside of "
                    f"{volume.name}; places are in LPS, x to the left and y to the back"
                )

    def to_json(self) -> dict[str, object]:
        """All but the outlines as plain JSON, schema ``pe-annotation/2``; the outlines travel as ``.seg.nrrd``."""
        return self._record().to_json()

    @classmethod
    def from_json(cls, payload: object, masks: Mapping[int, NDArray[np.bool_]]) -> SparseAnnotation:
        """The annotation that ``to_json`` wrote, or an older program, from whatever arrived.

        Args:
            payload: decoded JSON of any shape; unknown keys are ignored.
            masks: the outlines by slice (``slice_masks``).

        Raises:
            InputError: naming the first value that is not as it must be.
        """
        return cls._of(AnnotationRecord.from_json(payload), masks)

    @classmethod
    def _of(cls, record: AnnotationRecord, masks: Mapping[int, NDArray[np.bool_]]) -> SparseAnnotation:
        image = record.image
        slices, decisions = tuple(record.slices), tuple(record.decisions)
        return cls(image.sha256, image.size, image.spacing_mm, slices, masks, decisions, record.note, record.reading)

    def _record(self, mask_sha256: str | None = None) -> AnnotationRecord:
        image = AnnotatedImage(self.image_sha256, self.shape, self.spacing_mm)
        return AnnotationRecord(image, list(self.slices), list(self.decisions), self.note, self.reading, mask_sha256)

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
        write_segment(volume.with_voxels(voxels), segmentation_path(path), {TAG: _tag(self.to_json())})
        payload = self._record(_masks_sha256(self.masks)).to_json()
        write_durably(path, json_text(payload, indent=1) + "\n")

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
        try:
            record = AnnotationRecord.from_json(payload)
            if volume is None and masks and segment.mask.shape != record.image.size:
                raise InputError(f"{segmentation.name} holds a part of the grid only; give its CT too")
            if record.mask_sha256 is not None and record.mask_sha256 != _masks_sha256(masks):
                raise InputError(
                    f"the outlines in {segmentation.name} are of another save (was one interrupted?); that file holds "
                    "the reviewed slices of its own save too: read it alone"
                )
            annotation = cls._of(record, masks)
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


def _checked_masks(
    slices: Sequence[ReviewedSlice], outlines: Mapping[int, NDArray[np.bool_]], shape: tuple[int, int, int]
) -> dict[int, NDArray[np.bool_]]:
    """The outlines, read-only: one on every slice that is outlined, and on no other."""
    listed = {reviewed.slice_index: reviewed for reviewed in slices}
    masks = {index: np.array(outlines[index], dtype=bool) for index in sorted(outlines)}
    for index, mask in masks.items():
        if index not in listed or listed[index].state != "embolism":
            raise InputError(f"annotation: there is an outline on slice {index}, which is not listed as embolism")
        if listed[index].not_outlined:
            raise InputError(f"annotation: there is an outline on slice {index}, which is listed as not_outlined")
        if mask.shape != shape[1:]:
            raise InputError(f"annotation: the mask of slice {index} is {mask.shape}, not {shape[1:]}")
        mask.setflags(write=False)
    for index, reviewed in listed.items():
        if reviewed.outlined and (index not in masks or not masks[index].any()):
            raise InputError(
                f"annotation: slice {index} is listed as embolism but nothing is outlined on it; outline the "
                "embolism, or mark the slice as embolism that is not outlined, or as uncertain"
            )
    return masks


def _tag(payload: Mapping[str, object]) -> str:
    """An annotation's JSON as a tag of a segment; notes, which may hold anything, are percent-encoded there."""
    return json.dumps(_with_notes(payload, _quoted), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _quoted(note: str) -> str:
    return quote(note, safe=" ,.;:!?()[]{}'&/+-=*#@")


def _with_notes(payload: object, change: Callable[[str], str]) -> object:
    """An annotation's JSON with its notes changed; whatever is no note stays as it is."""
    if not isinstance(payload, Mapping):
        return payload
    changed = _with_note(payload, change)
    if isinstance(payload.get("slices"), list):
        changed["slices"] = [
            _with_note(entry, change) if isinstance(entry, Mapping) else entry for entry in payload["slices"]
        ]
    return changed


def _with_note(entry: Mapping[str, object], change: Callable[[str], str]) -> dict[str, object]:
    note = entry.get("note")
    return {**entry, "note": change(note)} if isinstance(note, str) else dict(entry)


def _tagged_json(segment: Segment, path: Path) -> object:
    if TAG not in segment.tags:
        raise InputError(
            f"{path.name}: does not record which slices were reviewed (no tag {TAG}), and an empty slice may be one "
            "that nobody looked at; give the .json, or review its slices first"
        )
    return _with_notes(_json(f"{path.name}, tag {TAG}", segment.tags[TAG]), unquote)


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


def _masks_sha256(masks: Mapping[int, NDArray[np.bool_]]) -> str:
    """Identity of the outlines: their slices and pixels, however the file that carries them is packed."""
    digest = hashlib.sha256()
    for index in sorted(masks):
        digest.update(f"{index} {masks[index].shape}\n".encode())
        digest.update(np.packbits(masks[index]).tobytes())
    return digest.hexdigest()


def _by(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.6g}" for number in numbers)
