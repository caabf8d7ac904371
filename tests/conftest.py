"""Fixtures of all tests: real CT where it is at hand, and DICOM series made to measure."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real CT studies; tests that ask for it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PE_TEST_DATA", default))
    if not (folder / "ct_lidc0001_contrast").is_dir():
        pytest.skip("no real CT at hand: set PE_TEST_DATA to its folder")
    return folder


def dicom_slice(stored: np.ndarray, position: tuple[float, float, float], **tags: object) -> pydicom.Dataset:
    """One CT instance; ``tags`` replace or (with None) remove what is usual, by keyword."""
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID = "1.2.3"
    usual: dict[str, object] = {
        "SeriesInstanceUID": "1.2.840",
        "SeriesNumber": 2,
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [0.8, 0.7],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "ImagePositionPatient": list(position),
    }
    for keyword, value in {**usual, **tags}.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset.PixelData = stored.tobytes()
    return dataset


WriteSeries = Callable[..., Path]


@pytest.fixture
def write_series(tmp_path: Path) -> WriteSeries:
    """Writes slices ``stored[k]`` at ``positions[k]`` as DICOM files, in shuffled file order; gives their folder."""

    def write(
        stored: np.ndarray,
        positions: np.ndarray | None = None,
        folder: Path | None = None,
        edit: Callable[[int, pydicom.Dataset], None] | None = None,
        **tags: object,
    ) -> Path:
        folder = folder or tmp_path / "series"
        folder.mkdir(parents=True, exist_ok=True)
        if positions is None:
            positions = np.array([[-100.0, -120.0, -300 + 2.5 * k] for k in range(len(stored))])
        order = np.random.default_rng(len(stored)).permutation(len(stored))
        for name, k in enumerate(order):
            dataset = dicom_slice(stored[k], tuple(positions[k].tolist()), InstanceNumber=int(order[-k]), **tags)
            if edit is not None:
                edit(int(k), dataset)
            prefix = str(tags.get("SeriesInstanceUID", "1.2.840")).replace(".", "_")
            dataset.save_as(folder / f"{prefix}_{name:03d}", enforce_file_format=True)
        return folder

    return write
