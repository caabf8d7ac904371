"""The DICOM series that a CT came from: the way back to the archive, and what its headers say of its fitness.

A ``Volume`` read from DICOM carries it. An imported CT is an .nrrd without headers: its series lies beside it as
``STUDIES/.pe/sources/<study>.json`` (schema ``pe-source/1``) and travels with it again when it is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydicom import Dataset
from pydicom.sequence import Sequence as Items

from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_app.common.schema import Schema, json_text

FOLDER = Path(".pe", "sources")
"""Where the sources of a folder of studies lie; the server does not list what begins with a dot."""


_PROJECTION = re.compile(
    r"(?<![a-z])(min ?ip|mip|intensity projection|maximum|minimum|projection image|vrt|volume rendered|ssd)(?![a-z])",
    re.I,
)
_MAP = re.compile(r"iodine|(?<![a-z])(pbv|vnc|vmi map|perfusion|virtual non|lung vessels)(?![a-z])", re.I)


def unlike_ct(image_type: str, description: str) -> str:
    """What an axial series shows where its voxels are no HU of one thin slice, in words; empty for a CT.

    Told by Image Type (0008,0008), also value 4 of enhanced CT (``MAXIMUM``), and by the series' name.
    """
    text = f"{image_type} {description}".replace("_", " ")
    if _PROJECTION.search(text):
        return "an intensity projection or rendering"
    return "a map of contrast or perfusion" if _MAP.search(text) else ""


@dataclass(frozen=True)
class SeriesFacts:
    """What the headers say of a series' fitness; empty where they say nothing.

    Attributes:
        image_types: the different Image Types (0008,0008) of its slices, values joined by a backslash.
        description: Series Description; empty after de-identification.
        thickness_mm: Slice Thickness (0018,0050), not the spacing; None where unknown.
        lossy: how its pixels were compressed with loss, e.g. ``JPEG 2000, 10:1``; empty where they were not.
        kernel: Convolution Kernel.
        scanner: manufacturer and model.
        repeated: instances that lay there more than once and were taken once.
        neighbours: other patients whose series lay in the same folder.
    """

    image_types: tuple[str, ...] = ()
    description: str = ""
    thickness_mm: float | None = None
    lossy: str = ""
    kernel: str = ""
    scanner: str = ""
    repeated: int = 0
    neighbours: int = 0


@dataclass(frozen=True)
class SourceInstance:
    """One slice's origin.

    Attributes:
        sop_instance_uid: the instance; the same for all slices of an enhanced multi-frame file.
        position_mm: Image Position (Patient).
        frame: frame number from 1 in a multi-frame file; None in a file of one slice.
        file: where it was read, below ``SourceSeries.root``.
        number: Instance Number (0020,0013), what a PACS shows; None where it is missing.
    """

    sop_instance_uid: str
    position_mm: tuple[float, float, float]
    frame: int | None = None
    file: str = ""
    number: int | None = None


@dataclass(frozen=True)
class SourceSeries:
    """Patient, study and series as their archive knows them, and every slice's instance.

    Attributes:
        patient_id, study_uid, series_uid, frame_of_reference_uid, sop_class_uid: as in the headers.
        orientation: Image Orientation (Patient) of the stored slices; the Volume may have been flipped since.
        pixel_mm: Pixel Spacing: between rows, between columns.
        matrix: rows, columns.
        instances: one a slice, in the Volume's order from the feet to the head.
        header: what the patient, study, series and equipment modules of results must repeat, as DICOM JSON.
        root: the folder or archive that the files lay in.
        facts: what the headers say of the series' fitness.
        image_sha256: of the Volume's voxels; empty where it was not stored.
        pseudonyms: whether identifiers are pseudonyms; then the way back needs the key.
    """

    patient_id: str
    study_uid: str
    series_uid: str
    frame_of_reference_uid: str
    sop_class_uid: str
    orientation: tuple[float, float, float, float, float, float]
    pixel_mm: tuple[float, float]
    matrix: tuple[int, int]
    instances: tuple[SourceInstance, ...] = ()
    header: Mapping[str, object] = field(default_factory=dict)
    root: str = ""
    facts: SeriesFacts = field(default_factory=SeriesFacts)
    image_sha256: str = ""
    pseudonyms: bool = False

    @property
    def series_number(self) -> int | None:
        """Series Number; None where it is missing."""
        text = self._text("00200011")
        return int(text) if text.isdigit() else None

    @property
    def instance_numbers(self) -> tuple[int, ...]:
        """What a PACS shows as the number of every slice; empty where one is missing or used twice."""
        numbers = tuple(one.number if one.frame is None else one.frame for one in self.instances)
        found = tuple(number for number in numbers if number is not None)
        return found if len(set(found)) == len(numbers) else ()

    @property
    def patient_study(self) -> tuple[str, str, str]:
        """Patient ID, accession number and study date as in the headers; empty after de-identification."""
        if self.pseudonyms:
            return "", "", ""
        return self.patient_id, self._text("00080050"), self._text("00080020")

    def _text(self, tag: str) -> str:
        element = self.header.get(tag)
        values = element.get("Value") if isinstance(element, Mapping) else None
        return str(values[0]) if isinstance(values, list) and values else ""

    def datasets(self) -> list[Dataset]:
        """The source instances as headers without pixels, in slice order: what highdicom calls source images.

        One a slice, or one in all for a multi-frame file, with position and orientation of its frames.

        Raises:
            InputError: where the instances are not known, as after de-identification.
        """
        if not self.instances:
            raise InputError(
                f"series {self.series_uid}: its instances are not known here, so that nothing can refer to them: "
                "read the DICOM files, or use the key of the de-identification"
            )
        self._check_identifiers()
        if self.instances[0].frame is None:
            return [self._slice_dataset(instance) for instance in self.instances]
        return [self._multi_frame_dataset()]

    def _check_identifiers(self) -> None:
        """Refuse to make objects that refer to nothing.

        Raises:
            InputError: naming the tag that lacks a value, or has one value for several slices.
        """
        needed = {
            "SOP Class UID (0008,0016)": self.sop_class_uid,
            "Study Instance UID (0020,000D)": self.study_uid,
            "Series Instance UID (0020,000E)": self.series_uid,
            "SOP Instance UID (0008,0018)": all(instance.sop_instance_uid for instance in self.instances),
        }
        empty = [tag for tag, value in needed.items() if not value]
        names = [(instance.sop_instance_uid, instance.frame) for instance in self.instances]
        if empty:
            raise InputError(f"series {self.series_uid}: {empty[0]} is empty, so that nothing can refer to its slices")
        if len(set(names)) < len(names):
            raise InputError(
                f"series {self.series_uid}: {len(names)} slices have {len(set(names))} different SOP Instance UIDs "
                "(0008,0018), so that nothing can refer to one of them"
            )

    def _shared_dataset(self, sop_instance_uid: str) -> Dataset:
        dataset = Dataset.from_json(json.dumps(_cleaned(self.header)))
        dataset.PatientID = self.patient_id
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = self.study_uid, self.series_uid
        dataset.FrameOfReferenceUID = self.frame_of_reference_uid
        dataset.SOPClassUID, dataset.SOPInstanceUID = self.sop_class_uid, sop_instance_uid
        dataset.Rows, dataset.Columns = self.matrix
        return dataset

    def _slice_dataset(self, instance: SourceInstance) -> Dataset:
        dataset = self._shared_dataset(instance.sop_instance_uid)
        dataset.ImagePositionPatient = list(instance.position_mm)
        dataset.ImageOrientationPatient = list(self.orientation)
        dataset.PixelSpacing = list(self.pixel_mm)
        if self.facts.thickness_mm is not None:
            dataset.SliceThickness = self.facts.thickness_mm
        return dataset

    def _multi_frame_dataset(self) -> Dataset:
        dataset = self._shared_dataset(self.instances[0].sop_instance_uid)
        dataset.NumberOfFrames = max(instance.frame or 1 for instance in self.instances)
        measures, orientation = Dataset(), Dataset()
        measures.PixelSpacing = list(self.pixel_mm)
        measures.SliceThickness = self.facts.thickness_mm
        orientation.ImageOrientationPatient = list(self.orientation)
        shared = Dataset()
        shared.PixelMeasuresSequence = Items([measures])
        shared.PlaneOrientationSequence = Items([orientation])
        dataset.SharedFunctionalGroupsSequence = Items([shared])
        groups = [Dataset() for _ in range(dataset.NumberOfFrames)]
        for instance in self.instances:
            position = Dataset()
            position.ImagePositionPatient = list(instance.position_mm)
            groups[(instance.frame or 1) - 1].PlanePositionSequence = Items([position])
        dataset.PerFrameFunctionalGroupsSequence = Items(groups)
        return dataset


SOURCE = Schema(SourceSeries, "pe-source", 1)


_DATE = re.compile(r"[12]\d{3}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])")
_TIME = re.compile(r"(?:[01]\d|2[0-3])(?:[0-5]\d(?:[0-5]\d(?:\.\d{1,6})?)?)?")
_SEX = "00100040"


def _cleaned(header: Mapping[str, object]) -> dict[str, object]:
    """A header's DICOM JSON with values left empty that no object may repeat: dates, times and a sex that are none.

    Anonymisers write birth dates of zeros, words for dates, and a sex beyond M, F and O.
    """
    return {tag: _clean_element(tag, element) for tag, element in header.items()}


def _clean_element(tag: str, element: object) -> object:
    if not isinstance(element, dict):
        return element
    pattern = {"DA": _DATE, "TM": _TIME}.get(str(element.get("vr")))
    values = element.get("Value") or []
    valid = all(pattern is None or pattern.fullmatch(str(value)) for value in values)
    if tag == _SEX:
        valid = all(value in ("M", "F", "O") for value in values)
    return element if valid else {"vr": element.get("vr")}


def source_path(ct: Path) -> Path:
    """Where the record of a CT file's source series lies: in ``.pe/sources`` of its folder of studies."""
    folder = ct.parent.parent if ct.parent.name == "volumes" else ct.parent
    stem = ct.name
    for suffix in (".gz", ".nii", ".nrrd"):
        stem = stem.removesuffix(suffix)
    return folder / FOLDER / f"{stem}.json"


def write_source(source: SourceSeries, path: Path) -> None:
    """Store a record, all or nothing."""
    write_durably(path, json_text({"schema": str(SOURCE), **asdict(source)}))  # positions to the last digit


def read_source(path: Path) -> SourceSeries | None:
    """A stored record; None where there is none.

    Raises:
        InputError: if it is damaged or something else.
    """
    try:
        return SOURCE.read(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"{path}: is no record of a source series ({first}): import the study again") from error
