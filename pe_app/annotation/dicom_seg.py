"""DICOM SEG objects that readers drew elsewhere as annotations of our studies.

A segmentation says what was outlined, not which slices were looked at: an empty slice may be one that nobody saw.
Whoever imports it has to say so (``Reviewed``); nothing is guessed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, cast, get_args

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import UID, SegmentationStorage

from pe_app.annotation.record import LONGEST_READER
from pe_app.annotation.seg_nrrd import on_grid
from pe_app.annotation.sparse import SparseAnnotation
from pe_app.common.errors import InputError
from pe_app.ct.dicom_files import read_whole
from pe_app.ct.dicom_headers import last_line
from pe_app.ct.source_series import SourceSeries, read_source, source_path
from pe_app.ct.volume import Volume, canonical_volume
from pe_app.ct.volume_io import MAX_VOXELS, read_volume
from pe_app.studies import Study, read_studies, write_studies

log = logging.getLogger(__name__)

PULMONARY_EMBOLISM = ("59282003", "SCT")
LABELMAP_STORAGE = UID("1.2.840.10008.5.1.4.1.1.66.7")

Wholesale = Literal["segmented", "range", "all"]
Reviewed = Wholesale | tuple[int, int]
"""Which slices the reader looked at.

``segmented``: those with an outline and no others; no slice becomes ``none``. ``range``: from the lowest to the highest
outlined slice. ``all``: every slice of the CT. Two numbers: from the first to the second slice index, 0 nearest the
feet. What was reviewed and has no outline is ``none``.
"""


class Annotations(Protocol):
    """Where the annotations of a folder of studies are kept."""

    def current(self, study: Study, volume: Volume) -> SparseAnnotation | None:
        """What is reviewed of a study already; None where nothing is."""

    def save(self, study: Study, annotation: SparseAnnotation, volume: Volume) -> str:
        """Keep an annotation in the place of the one that ``current`` gave; tells where it is."""


class ListedAnnotations:
    """Annotations as files beside a study list, which names them."""

    def __init__(self, study_list: Path) -> None:
        self._list = study_list

    def current(self, study: Study, volume: Volume) -> SparseAnnotation | None:
        """The annotation that the list names."""
        path = self._listed(study)
        return SparseAnnotation.read(path, volume) if path else None

    def save(self, study: Study, annotation: SparseAnnotation, volume: Volume) -> str:
        """Write the file that the list names, or ``annotations/STUDY.json``, and then the list."""
        path = self._listed(study)
        if path is None:
            path = self._list.parent / "annotations" / f"{study.study}.json"
            if path.exists():
                raise InputError(f"{path}: is there already and not in the study list; move it away")
        annotation.write(path, volume)
        studies = read_studies(self._list)
        changed = [replace(one, annotation=path) if one.study == study.study else one for one in studies]
        write_studies(changed, self._list)
        return str(path)

    def _listed(self, study: Study) -> Path | None:
        return next(one.annotation for one in read_studies(self._list) if one.study == study.study)


@dataclass(frozen=True)
class Imported:
    """What became of one file: the study, where its annotation is, and how many of its slices are what by now."""

    study: str
    place: str
    embolism: int
    none: int


@dataclass(frozen=True, eq=False)
class DrawnSegments:
    """The outlines of a DICOM SEG.

    Attributes:
        path: its file.
        study_uid, series_uid, frame_of_reference_uid: what it was drawn on; the series is "" where it does not say.
        reader: its content creator, as readers are named here.
        frames: every outline with the affine that lays ``(0, row, column)`` into LPS mm, the first column one slice.
    """

    path: Path
    study_uid: str
    series_uid: str
    frame_of_reference_uid: str
    reader: str
    frames: tuple[tuple[NDArray[np.bool_], NDArray[np.float64]], ...]

    def on(self, volume: Volume) -> Volume:
        """The outlines on the CT's grid, 0 or 1; never interpolated.

        Raises:
            InputError: if their pixels are not the CT's, or something is outlined outside of it.
        """
        mask = np.zeros(volume.shape, np.uint8)
        for drawn, plane in self.frames:
            affine = plane.copy()
            affine[:3, 0] *= volume.spacing_mm[0]
            part = canonical_volume(drawn[None].astype(np.uint8), affine, self.path.name)
            mask |= on_grid(part, volume)
        return volume.with_voxels(mask)


def read_drawn_segments(path: Path, segment: str = "") -> DrawnSegments:
    """Read the outlines of emboli from a DICOM SEG.

    Args:
        path: the file.
        segment: number or label of the segment, or ``all``; needed where several segments do not all say that they
            are emboli.

    Raises:
        InputError: if it is no binary segmentation, is damaged, or it is not clear which segment is meant.
    """
    try:
        dataset = read_whole(path, force=False)
        if dataset.get("SOPClassUID") not in (SegmentationStorage, LABELMAP_STORAGE):
            raise InputError(f"{path.name}: is not a DICOM segmentation (SEG)")
        if dataset.SegmentationType == "FRACTIONAL":
            raise InputError(
                f"{path.name}: is a fractional segmentation; a share of a pixel is no outline: export it as binary"
            )
        if int(dataset.Rows) * int(dataset.Columns) * int(dataset.NumberOfFrames) > MAX_VOXELS:
            raise InputError(f"{path.name}: its size cannot be; the header is wrong: export it again")
        return DrawnSegments(
            path,
            str(dataset.StudyInstanceUID),
            _referenced_series(dataset),
            str(dataset.get("FrameOfReferenceUID", "")),
            _reader_name(str(dataset.get("ContentCreatorName", ""))),
            _frames(dataset, _chosen(dataset, segment, path.name)),
        )
    except InputError:
        raise
    except Exception as error:  # pydicom raises nearly anything on damaged bytes
        raise InputError(f"{path.name}: cannot be read as DICOM segmentation ({last_line(error)})") from error


def annotation_of(drawn: DrawnSegments, volume: Volume, reviewed: Reviewed, reader: str = "") -> SparseAnnotation:
    """The reviewed slices and outlines of a CT.

    Raises:
        InputError: if the segmentation belongs to another CT, or outlines lie where nobody is said to have looked.
    """
    _check_source(drawn, volume)
    mask = drawn.on(volume)
    outlined = [int(index) for index in np.flatnonzero(mask.voxels.any(axis=(1, 2)))]
    slices = _reviewed_slices(outlined, volume.shape[0], reviewed, drawn.path.name)
    return SparseAnnotation.from_mask(volume, mask, slices, reader or drawn.reader)


def merged(annotation: SparseAnnotation, added: SparseAnnotation) -> SparseAnnotation:
    """One annotation of both; a slice of both must say the same, since no reader's word replaces another's.

    An outline completes a slice on which embolism was seen and not outlined.

    Raises:
        InputError: naming the slices that differ.
    """
    result, differ = annotation, []
    not_outlined = {entry.slice_index for entry in annotation.slices if entry.not_outlined}
    for reviewed in added.slices:
        index = reviewed.slice_index
        if annotation.state(index) is None or (reviewed.outlined and index in not_outlined):
            result = result.review(reviewed, added.masks.get(index))
        elif reviewed.not_outlined and annotation.state(index) == "embolism":
            continue
        elif annotation.state(index) != reviewed.state or not np.array_equal(
            annotation.masks.get(index, False), added.masks.get(index, False)
        ):
            differ.append(index)
    if differ:
        slices = ", ".join(map(str, differ[:10])) + (" ..." if len(differ) > 10 else "")
        raise InputError(
            f"slices {slices} are reviewed already, with another result: no reader's word is replaced; leave them out "
            "with --reviewed, or take the former annotation out of the study list"
        )
    return result


def import_segmentations(
    files: Sequence[Path],
    folder: Path,
    reviewed: Reviewed,
    segment: str = "",
    reader: str = "",
    annotations: Annotations | None = None,
    told: Callable[[Imported], None] = lambda imported: None,
) -> tuple[str, ...]:
    """Add DICOM SEG files to the annotations of a folder of studies.

    One bad file does not stop the others; a file imported twice changes nothing.

    Args:
        files: the segmentations.
        folder: holds ``studies.csv``.
        reviewed: which slices the reader looked at.
        segment: as ``read_drawn_segments``.
        reader: who drew them; by default the content creator in each file.
        annotations: where they are kept; by default beside the study list.
        told: called for every file that was imported.

    Returns:
        Why files were left out, a sentence each.

    Raises:
        InputError: if the study list cannot be read.
    """
    studies = read_studies(folder / "studies.csv")
    annotations = annotations or ListedAnnotations(folder / "studies.csv")
    sources = [_source(study) for study in studies]
    problems = []
    for path in files:
        try:
            drawn = read_drawn_segments(path, segment)
            study = _study_of(drawn, studies, sources, folder)
            volume = read_volume(study.path)
            annotation = annotation_of(drawn, volume, reviewed, reader)
            current = annotations.current(study, volume)
            if current is not None:
                annotation = merged(current, annotation)
            place = annotations.save(study, annotation, volume)
        except InputError as error:
            problems.append(str(error) if path.name in str(error) else f"{path.name}: {error}")
            continue
        states = [entry.state for entry in annotation.slices]
        told(Imported(study.study, place, states.count("embolism"), states.count("none")))
    return tuple(problems)


def parse_reviewed(text: str) -> Reviewed:
    """``segmented``, ``range``, ``all`` or two slice indices, ``12-80``.

    Raises:
        InputError: for anything else.
    """
    if text in get_args(Wholesale):
        return cast(Wholesale, text)
    first, dash, last = text.partition("-")
    if dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last):
        return int(first), int(last)
    raise InputError(
        f"--reviewed {text}: give the slices the reader saw: segmented (only those with an outline), range (all "
        "between them, too), all, or A-B (slice indices, 0 nearest the feet)"
    )


def _reviewed_slices(outlined: Sequence[int], count: int, reviewed: Reviewed, name: str) -> list[int]:
    if reviewed == "segmented":
        return list(outlined)
    if reviewed == "all":
        return list(range(count))
    if reviewed == "range":
        return list(range(min(outlined), max(outlined) + 1)) if outlined else []
    first, last = reviewed
    if last >= count:
        raise InputError(f"{name}: there is no slice {last}, the slices are 0 to {count - 1}")
    outside = [index for index in outlined if not first <= index <= last]
    if outside:
        raise InputError(
            f"{name}: something is outlined on slice {outside[0]}, outside of the reviewed slices {first} to {last}; "
            "slices are counted from 0, nearest the feet"
        )
    return list(range(first, last + 1))


def _check_source(drawn: DrawnSegments, volume: Volume) -> None:
    source = volume.source
    if source is None:
        raise InputError(f"{volume.name}: is not known to come from DICOM: import it with pe-app import")
    if drawn.frame_of_reference_uid != source.frame_of_reference_uid:
        raise InputError(
            f"{drawn.path.name}: lies in another frame of reference than {volume.name}; its places mean nothing there: "
            "choose the segmentation of this series"
        )


def _source(study: Study) -> SourceSeries | None:
    """The DICOM series of a listed study; None where it is not known."""
    try:
        return read_volume(study.path).source if study.path.is_dir() else read_source(source_path(study.path))
    except InputError as error:
        log.warning("%s", error)
        return None


def _study_of(
    drawn: DrawnSegments, studies: Sequence[Study], sources: Sequence[SourceSeries | None], folder: Path
) -> Study:
    """The study that a segmentation was drawn on: of the same series, else the only one of its frame of reference."""
    known = [(study, source) for study, source in zip(studies, sources, strict=True) if source is not None]
    for study, source in known:
        if drawn.series_uid and source.series_uid == drawn.series_uid:
            return study
    near = [
        study
        for study, source in known
        if source.study_uid == drawn.study_uid and source.frame_of_reference_uid == drawn.frame_of_reference_uid
    ]
    if len(near) == 1:
        return near[0]
    same_study = [study.study for study, source in known if source.study_uid == drawn.study_uid]
    if same_study:
        raise InputError(
            f"{drawn.path.name}: was drawn on another series of study {', '.join(same_study)}, in another frame of "
            f"reference or not clear which: import series {drawn.series_uid or 'it was drawn on'}"
        )
    raise InputError(
        f"{drawn.path.name}: none of the {len(studies)} studies in {folder} is series "
        f"{drawn.series_uid or '(it names none)'} that it was drawn on: import that series first with pe-app import"
    )


def _referenced_series(dataset: Dataset) -> str:
    referenced = dataset.get("ReferencedSeriesSequence") or []
    return str(referenced[0].SeriesInstanceUID) if referenced else ""


def _reader_name(creator: str) -> str:
    """A DICOM person name as readers are named here: its parts with spaces, without what separates tags."""
    cleaned = "".join(letter for letter in creator.partition("=")[0].replace("^", " ") if letter not in '|"\\')
    return " ".join(cleaned.split())[:LONGEST_READER]


def _chosen(dataset: Dataset, segment: str, name: str) -> list[int]:
    """The numbers of the segments that hold the emboli."""
    labels = {int(item.SegmentNumber): str(item.SegmentLabel) for item in dataset.SegmentSequence}
    labels.pop(0, None)  # the background of a label map
    if segment:
        meant = [
            number
            for number, label in labels.items()
            if segment == "all" or segment in (str(number), label) or segment.lower() == label.lower()
        ]
    else:
        emboli = [int(item.SegmentNumber) for item in dataset.SegmentSequence if _says_embolism(item)]
        meant = list(labels) if len(labels) == 1 else emboli
    if not meant or (not segment and len(meant) < len(labels)):
        known = ", ".join(f"{number} {label!r}" for number, label in labels.items())
        raise InputError(f"{name}: which segment holds the emboli? It has {known}: choose one, or all, with --segment")
    return meant


def _says_embolism(item: Dataset) -> bool:
    kinds = item.get("SegmentedPropertyTypeCodeSequence") or []
    coded = any((kind.get("CodeValue"), kind.get("CodingSchemeDesignator")) == PULMONARY_EMBOLISM for kind in kinds)
    return coded or "embol" in str(item.SegmentLabel).lower()


def _frames(dataset: Dataset, segments: Sequence[int]) -> tuple[tuple[NDArray[np.bool_], NDArray[np.float64]], ...]:
    """The outlines that are not empty, with their planes."""
    pixels = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    shared = dataset.get("SharedFunctionalGroupsSequence") or [Dataset()]
    frames = []
    for stored, own in zip(pixels, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        if dataset.SegmentationType == "LABELMAP":
            drawn = np.isin(stored, segments)
        else:
            number = _group(own, shared[0], "SegmentIdentificationSequence").ReferencedSegmentNumber
            drawn = stored != 0 if int(number) in segments else np.zeros(stored.shape, bool)
        if drawn.any():
            frames.append((drawn, _plane(own, shared[0])))
    return tuple(frames)


def _plane(own: Dataset, shared: Dataset) -> NDArray[np.float64]:
    """``(4, 4)``: the affine of a frame, its first column the unit normal."""
    orientation = np.array(
        _group(own, shared, "PlaneOrientationSequence").ImageOrientationPatient, dtype=np.float64
    ).reshape(2, 3)
    rows_mm, columns_mm = (float(step) for step in _group(own, shared, "PixelMeasuresSequence").PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = np.cross(*orientation)
    affine[:3, 1] = orientation[1] * rows_mm  # the second triple runs down a column, from row to row
    affine[:3, 2] = orientation[0] * columns_mm
    affine[:3, 3] = [float(mm) for mm in _group(own, shared, "PlanePositionSequence").ImagePositionPatient]
    return affine


def _group(own: Dataset, shared: Dataset, keyword: str) -> Dataset:
    group: Dataset = (own if keyword in own else shared)[keyword][0]
    return group
