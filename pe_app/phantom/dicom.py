"""Simulated studies as a hospital's archive hands them over: DICOM slices with headers, and reports in a CSV."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from pe_app.common.files import making_folder, write_durably
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.common.tables import table_text
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_volume
from pe_app.studies import Study

DAY = "20260102"
"""Of every study: fixed, so that the same studies give the same files."""
REPORTS = {
    "positive": "INDICATION: Dyspnoea, rule out PE.\nFINDINGS: Filling defects in the pulmonary arteries.\n"
    "IMPRESSION: Acute pulmonary embolism.",
    "negative": "INDICATION: Dyspnoea, rule out PE.\nFINDINGS: Well opacified pulmonary arteries.\n"
    "IMPRESSION: No evidence of pulmonary embolism.",
}


def write_dicom_studies(studies: Sequence[Study], out: Path, progress: ProgressCallback = silent) -> Path:
    """Write each study as OUT/dicom/<study>, one file per slice, and their reports by accession number.

    Studies that are there already are kept.

    Returns:
        OUT/reports.csv with the columns accession and report.
    """
    rows = []
    for done, study in enumerate(studies):
        progress(Progress("write DICOM", done, len(studies)))
        folder = out / "dicom" / study.study
        if not folder.exists():
            write_series(read_volume(study.path), study, folder)
        if study.label in REPORTS:
            rows.append((accession_of(study), REPORTS[study.label]))
    path = out / "reports.csv"
    write_durably(path, table_text(("accession", "report"), rows))
    progress(Progress("write DICOM", len(studies), len(studies)))
    return path


def accession_of(study: Study) -> str:
    """The accession number of a simulated study: 16 characters at most, the same in every call."""
    return f"PH{hashlib.sha256(study.study.encode()).hexdigest()[:10].upper()}"


def write_series(volume: Volume, study: Study, folder: Path) -> None:
    """A volume as an axial CT series whose headers say that it is simulated; all files or none."""
    low = -1024
    with making_folder(folder) as unfinished:
        for index in range(volume.shape[0]):
            dataset = _header(volume, study, index)
            dataset.RescaleSlope, dataset.RescaleIntercept = 1, low
            stored = np.clip(volume.voxels[index].astype(np.int32) - low, 0, 65535)
            dataset.PixelData = stored.astype("<u2").tobytes()
            dataset.save_as(unfinished / f"IM{index + 1:04d}.dcm", enforce_file_format=True)


def _header(volume: Volume, study: Study, index: int) -> pydicom.Dataset:
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = _uid(study.study, "slice", index)
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = _uid(study.study, "study"), _uid(study.study, "series")
    dataset.FrameOfReferenceUID = _uid(study.study, "frame of reference")
    dataset.PatientID, dataset.PatientName = study.patient or study.study, f"Simulated^{study.patient or study.study}"
    dataset.PatientBirthDate, dataset.PatientSex, dataset.ReferringPhysicianName = "", "", ""
    dataset.StudyDate = dataset.SeriesDate = DAY
    dataset.StudyTime, dataset.StudyID, dataset.AccessionNumber = "120000", "1", accession_of(study)
    dataset.StudyDescription, dataset.SeriesDescription = "Simulated CTPA, no patient", "PE simulated"
    dataset.Modality, dataset.Manufacturer, dataset.SeriesNumber, dataset.InstanceNumber = (
        "CT",
        "pe-app phantom",
        1,
        index + 1,
    )
    dataset.ImageType = ["DERIVED", "PRIMARY", "AXIAL"]
    slice_mm, row_mm, column_mm = volume.spacing_mm
    columns = volume.affine[:3, 2] / column_mm
    rows = volume.affine[:3, 1] / row_mm
    dataset.ImagePositionPatient = [round(float(mm), 4) for mm in volume.to_lps_mm((index, 0, 0))]
    dataset.ImageOrientationPatient = [round(float(one), 6) for one in (*columns, *rows)]
    dataset.PixelSpacing, dataset.SliceThickness = [float(row_mm), float(column_mm)], float(slice_mm)
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = *volume.shape[1:], 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    return dataset


def _uid(*parts: object) -> UID:
    """Below 2.25, as made of a UUID: the same for the same study."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return UID(f"2.25.{int.from_bytes(digest[:16], 'big')}")
