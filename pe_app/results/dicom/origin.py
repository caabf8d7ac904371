"""What all result objects share: the source images they are made from, their equipment, names and UIDs."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.sr.codedict import codes

import pe_app
from pe_app.common.errors import InputError
from pe_app.ct.source_series import SourceSeries
from pe_app.ct.volume import Volume
from pe_app.model.detection import Detection, ModelIdentity

MANUFACTURER = "pe-app, open source"
RESEARCH = "research use only"

FIRST_SERIES_NUMBER = 9100
"""Results come after the scanner's own series in every viewer's list."""

_NAMESPACE = uuid.UUID("5bb0a5b2-3f0e-5f0c-9d8a-0f5d3c0f6c11")
_TYPE_2 = (  # what may be empty, but highdicom wants to be there
    "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime",
    "ReferringPhysicianName",
)  # fmt: skip


class Equipment(TypedDict):
    """The arguments that highdicom's objects share."""

    manufacturer: str
    manufacturer_model_name: str
    software_versions: list[str]
    device_serial_number: str


@dataclass(frozen=True, eq=False)
class Origin:
    """The CT that results are made of, and the DICOM series that it came from.

    Raises:
        InputError: where the series is not known, or the CT does not lie on its slices.
    """

    volume: Volume
    source: SourceSeries

    @classmethod
    def of(cls, volume: Volume) -> Origin:
        """The origin of a CT that was read from DICOM, or imported from there."""
        if volume.source is None:
            raise InputError(
                f"{volume.name}: is not known to come from DICOM, so that no result can refer to it: give the DICOM "
                "folder, or import it with pe-app import"
            )
        if not volume.source.frame_of_reference_uid:
            raise InputError(f"{volume.name}: its headers name no frame of reference, so that no result can lie in it")
        return cls(volume, volume.source)

    @cached_property
    def images(self) -> list[Dataset]:
        """Headers of the source instances: one a slice from the feet to the head, or one multi-frame image."""
        images = self.source.datasets()
        thickness = f"{self.volume.spacing_mm[0]:.6g}"  # of what is drawn on a slice, where the source says none
        for image in images:
            for keyword in _TYPE_2:
                if keyword not in image:
                    setattr(image, keyword, None)
            measured = image
            if "SharedFunctionalGroupsSequence" in image:
                measured = image.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
            if not measured.get("SliceThickness"):
                measured.SliceThickness = thickness
        return images

    def reference(self, slice_index: int) -> tuple[str, str, int | None]:
        """SOP class, SOP instance and, of a multi-frame image, frame number of a slice."""
        instance = self.source.instances[slice_index]
        return self.source.sop_class_uid, instance.sop_instance_uid, instance.frame

    def to_stored(self, voxels: NDArray[np.generic]) -> NDArray[np.generic]:
        """An array on the CT's grid as the instances store it: ``(frames, rows, columns)`` in the order of ``images``.

        The Volume's axes are canonical; a scanner's rows may run the other way, as with a prone patient.
        """
        order, flips = self._turn
        stored = np.flip(voxels.transpose(order), [axis for axis in range(3) if flips[axis]])
        frames = [instance.frame for instance in self.source.instances]
        if frames[0] is None:
            return np.ascontiguousarray(stored)
        placed = np.zeros((self.images[0].NumberOfFrames, *stored.shape[1:]), stored.dtype)
        placed[[(frame or 1) - 1 for frame in frames]] = stored
        return placed

    @cached_property
    def _turn(self) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Which axis of the volume each stored axis is, and whether it runs the other way."""
        positions = np.array([instance.position_mm for instance in self.source.instances])
        orientation = np.array(self.source.orientation)
        rows_mm, columns_mm = self.source.pixel_mm
        stored = np.eye(4)
        stored[:3, 0] = (positions[-1] - positions[0]) / max(len(positions) - 1, 1)
        stored[:3, 1] = orientation[3:] * rows_mm  # the second triple runs down a column, from row to row
        stored[:3, 2] = orientation[:3] * columns_mm
        stored[:3, 3] = positions[0]
        shape = (len(positions), *self.source.matrix)
        way = np.linalg.inv(stored) @ self.volume.affine
        turn = np.rint(way[:3, :3])
        corners = np.array(np.meshgrid(*((0, count - 1) for count in self.volume.shape))).reshape(3, -1).T
        there = corners @ way[:3, :3].T + way[:3, 3]
        order = tuple(int(axis) for axis in np.abs(turn).argmax(axis=1))
        whole = np.array_equal(np.abs(turn).sum(axis=0), (1, 1, 1)) and len(set(order)) == 3
        fits = whole and tuple(self.volume.shape[axis] for axis in order) == shape
        expected = corners @ turn.T + [(count - 1) * (turn[axis].min() < 0) for axis, count in enumerate(shape)]
        if not fits or np.abs(there - expected).max() > 0.3:
            raise InputError(
                f"{self.volume.name}: does not lie on the slices of its series {self.source.series_uid}; it was "
                "resampled or belongs to another one: import the series again"
            )
        return order, tuple(bool(turn[axis].min() < 0) for axis in range(3))


def code(value: str, meaning: str) -> CodedConcept:
    """A code of our own, where no public one exists."""
    return CodedConcept(value, "99PEAPP", meaning)


def described(detection: Detection, what: str) -> str:
    """A series description, at most 64 characters."""
    return f"{detection.caution}; {what}" if detection.caution else f"{what} ({RESEARCH})"


def describe(dataset: Dataset, detection: Detection | None, what: str) -> None:
    """Name an object's series; a chest is not one of two sides."""
    dataset.SeriesDescription = what if detection is None else described(detection, what)
    dataset.BodyPartExamined = "CHEST"


def equipment(model: ModelIdentity | None) -> Equipment:
    """Who made an object: this program and its model, whose SHA-256 is the serial number."""
    versions = [f"pe-app {pe_app.__version__}", *([f"{model.name} {model.version}"[:64]] if model else [])]
    return {
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": "pe-app",
        "software_versions": versions,
        "device_serial_number": model.sha256 if model else pe_app.__version__,
    }


def algorithm(model: ModelIdentity) -> AlgorithmIdentificationSequence:
    """Name and version of the model, for segments."""
    return AlgorithmIdentificationSequence(
        f"pe-app {model.name}"[:64],
        codes.DCM.ArtificialIntelligence,
        f"{model.version}"[:64] or "0",
        source=MANUFACTURER,
        parameters={"sha256": model.sha256},
    )


def content_key(payload: Mapping[str, object], *parts: bytes) -> str:
    """The identity of a content: what is the same gets the same UIDs, so that a second send is recognised."""
    digest = hashlib.sha256(json.dumps(payload, sort_keys=True).encode())
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def derived_uid(*parts: object) -> str:
    """A UID that is the same for the same parts (UUID-derived, root 2.25)."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, '|'.join(map(str, parts))).int}"
