"""A DICOM series of 24 x 40 x 32 voxels in many positions with a blob to recognise, and a detection of it."""

from pathlib import Path

import numpy as np
from conftest import dicom_slice
from small_studies import small_chest

from pe_app.ct.quality import Reason
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_volume
from pe_app.model.detection import Detection, Evidence, ExtentEstimate, ImageIdentity, ModelIdentity, find_candidates
from pe_app.model.detector import DetectionResult

SLICES, ROWS, COLUMNS = 24, 40, 32
MARK_HU = 777
TAGS = {
    "FrameOfReferenceUID": "1.2.3.4",
    "SpecificCharacterSet": "ISO_IR 100",
    "PatientName": "Döe^Jané",
    "PatientID": "P1",
    "PatientBirthDate": "19500101",
    "PatientSex": "F",
    "StudyDate": "20260102",
    "StudyTime": "101112",
    "StudyID": "7",
    "AccessionNumber": "A1",
    "ReferringPhysicianName": "",
}
TURNS = {
    "head first, supine": (1, 0, 0, 0, 1, 0),
    "prone: rows and columns run the other way": (-1, 0, 0, 0, -1, 0),
    "columns run the other way": (-1, 0, 0, 0, 1, 0),
    "oblique by 10 degrees": (1, 0, 0, 0, np.cos(np.radians(10)), np.sin(np.radians(10))),
    "rows are stored as columns": (0, 1, 0, 1, 0, 0),
}
"""Image Orientation (Patient) by what it means."""


def stored_pixels(seed: int = 0) -> np.ndarray:
    """Noise round water, air in a corner, and a blob of ``MARK_HU`` that no symmetry maps onto itself."""
    rng = np.random.default_rng(seed)
    hu = np.rint(rng.normal(0, 30, (SLICES, ROWS, COLUMNS))).astype(np.int16)
    hu[:, :4, :4] = -1000
    hu[5:9, 8:14, 20:23] = hu[7, 10:12, 20:29] = MARK_HU
    return hu + 1024


def write_turned(write_series, turn: str = "head first, supine", step_mm: float = 3.0, **tags: object) -> Path:
    """The series in one of the ``TURNS``; a negative step stacks the instances from the head to the feet."""
    orientation = np.array(TURNS[turn], dtype=float)
    normal = np.cross(orientation[:3], orientation[3:])
    positions = np.array([-20.0, -30.0, 100.0]) + np.arange(SLICES)[:, None] * step_mm * normal
    return write_series(stored_pixels(), positions, ImageOrientationPatient=orientation.tolist(), **{**TAGS, **tags})


def marked(volume: Volume) -> np.ndarray:
    return volume.voxels == MARK_HU


def detection_of(volume: Volume, *reasons: Reason, refused: bool = False, trained: bool = True) -> DetectionResult:
    """A detection made by hand: two regions of attention on a grid of 8 x 5 x 4 cells over the CT."""
    model = ModelIdentity("tester", "3", "ab" * 32, trained)
    image = ImageIdentity.of(volume)
    if refused:
        return DetectionResult(Detection("refused", reasons, None, 0.5, (), (), image, model), None)
    cell = np.array((3, 8, 8))
    affine = volume.affine @ np.diag([*cell, 1])
    affine[:3, 3] = volume.to_lps_mm((cell - 1) / 2)
    maps = np.zeros((8, 5, 4), np.float32)
    maps[2, 1, 2], maps[2, 1, 3], maps[5, 3, 1] = 1.0, 0.8, 1.0
    probability = np.array([0.1, 0.2, 0.9, 0.3, 0.2, 0.6, 0.1, 0.1], np.float32)
    grid = Volume(np.rint(255 * maps * probability[:, None, None]).astype(np.uint8), affine, "attention")
    slices = [3 * slab + 1 for slab in range(8)]
    evidence = tuple(
        Evidence(slab, float(grid.slice_z_mm[slab]), slices[slab], float(probability[slab]), float(maps[slab].max()),
                 tuple(grid.to_lps_mm((slab, *np.unravel_index(maps[slab].argmax(), (5, 4)))).tolist())
                 if maps[slab].any() else None)
        for slab in range(8)
    )  # fmt: skip
    candidates = find_candidates(maps, probability, grid, slices)
    extent = ExtentEstimate(12.5, 0.25)
    detection = Detection("analysed", reasons, 0.71, 0.5, evidence, candidates, image, model, {}, extent)
    return DetectionResult(detection, grid, maps)


def read_turned(write_series, turn: str = "head first, supine", step_mm: float = 3.0) -> tuple[Path, Volume]:
    folder = write_turned(write_series, turn, step_mm)
    return folder, read_volume(folder)


def write_dicom(
    folder: Path, seed: int, series: int = 1, every: int = 1, volume: Volume | None = None, **tags: object
) -> list[Path]:
    """A CT, by default ``small_chest(seed)``, as an axial series ``1.2.<seed>.<series>`` of study ``1.2.<seed>``."""
    volume = volume or small_chest(seed, emboli=2)[0]
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for k in range(0, volume.shape[0], every):
        position = tuple(volume.to_lps_mm((k, 0, 0)).tolist())
        usual = {
            "StudyInstanceUID": f"1.2.{seed}",
            "SeriesInstanceUID": f"1.2.{seed}.{series}",
            "SeriesNumber": series,
            "PatientID": f"patient-{seed}",
            "StudyDate": "20260102",
            "StudyDescription": "CT PE",
            "PixelSpacing": list(volume.spacing_mm[1:]),
            "FrameOfReferenceUID": f"1.2.{seed}.0",
            "InstanceNumber": k + 1,
        }
        dataset = dicom_slice((volume.voxels[k] + 1024).astype(np.uint16), position, **{**usual, **tags})
        files.append(folder / f"{seed}-{series}-{k}.dcm")
        dataset.save_as(files[-1], enforce_file_format=True)
    return files
