"""Downloads of public data sets as their converters know them, quirks included, made of phantoms."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import scipy.io
from conftest import dicom_slice

from pe_app.phantom.scan import Phantom
from pe_app.public_data.rspect import ANSWERS, IDS


@dataclass(frozen=True)
class Made:
    """Phantoms that the layouts are made of."""

    positive: Phantom
    negative: Phantom


def write_dicom(phantom: Phantom, folder: Path, *, names_from_head: bool = False, study: str = "1.2.3") -> list[str]:
    """The phantom as DICOM, the names of the files counted from the feet or from the head; UIDs from the feet."""
    folder.mkdir(parents=True)
    volume = phantom.volume
    spacing = {"PixelSpacing": list(volume.spacing_mm[1:]), "StudyInstanceUID": study, "FrameOfReferenceUID": "1.9"}
    uids = []
    for k, plane in enumerate(volume.voxels):
        number = len(volume.voxels) - k if names_from_head else k + 1
        position = tuple(float(round(mm, 4)) for mm in volume.to_lps_mm((k, 0, 0)))
        dataset = dicom_slice((plane + 1024).astype(np.uint16), position, **spacing)
        uids.append(str(dataset.SOPInstanceUID))
        dataset.save_as(folder / f"D{number:04}.dcm", enforce_file_format=True)
    return uids


def lps_of(phantom: Phantom) -> np.ndarray:
    """``(4, 4)``: from array index (column, row, slice) to LPS mm, as NRRD and NIfTI count."""
    affine = phantom.volume.affine.copy()
    affine[:, :3] = affine[:, [2, 1, 0]]
    return affine


def write_nrrd(array: np.ndarray, phantom: Phantom, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = lps_of(phantom)
    header = {
        "space": "left-posterior-superior",
        "space directions": affine[:3, :3].T,
        "space origin": affine[:3, 3],
        "kinds": ["domain"] * 3,
    }
    nrrd.write(str(path), np.ascontiguousarray(array.transpose(2, 1, 0)), header, index_order="F")


def write_nifti(array: np.ndarray, affine_lps: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), np.diag([-1, -1, 1, 1]) @ affine_lps)
    nibabel.save(image, path)


def fumpe(folder: Path, made: Made) -> Path:
    """Names from the head, masks in the order of names; PAT024 is negative."""
    for name, phantom in (("PAT001", made.positive), ("PAT024", made.negative)):
        write_dicom(phantom, folder / "CT_scans" / name, names_from_head=True)
        mask = (phantom.emboli_mask.voxels > 0).astype(np.uint8)[::-1]
        (folder / "GroundTruth").mkdir(exist_ok=True)
        scipy.io.savemat(folder / "GroundTruth" / f"{name}.mat", {"Mask": np.moveaxis(mask, 0, 2)}, format="5")
    return folder


def cadpe(folder: Path, made: Made) -> Path:
    for image, mask, phantom in (("001", "0001RefStd", made.positive), ("e0032", "e0032RefStd", made.negative)):
        write_nrrd(phantom.volume.voxels, phantom, folder / "images" / f"{image}.nrrd")
        write_nrrd(phantom.emboli_mask.voxels, phantom, folder / "rs" / f"{mask}.nrrd")
    return folder


def read(folder: Path, made: Made) -> Path:
    """The masks' headers run from the head to the feet and have coarse spacings; their arrays do not."""
    for maker, name, phantom in (("GE", "01GE", made.positive), ("TOSHIBA", "01TS", made.negative)):
        write_dicom(phantom, folder / "images" / f"{maker} (DICOM files)" / name)
        wrong = np.diag([1.0, 1.0, -5.0, 1.0])
        write_nifti((phantom.emboli_mask.voxels > 0).astype(np.uint8), wrong, folder / "rs" / f"{name}.nii.gz")
    return folder


def rspect(folder: Path, made: Made) -> Path:
    rows = []
    answers = {
        "1.5.1": (made.positive, {"central_pe": 1, "leftsided_pe": 1, "rightsided_pe": 1, "rv_lv_ratio_gte_1": 1}),
        "1.5.2": (made.negative, {"negative_exam_for_pe": 1, "qa_motion": 1, "flow_artifact": 1}),
    }
    for study, (phantom, told) in answers.items():
        series = f"{study}.7"
        uids = write_dicom(phantom, folder / "train" / study / series, study=study)
        for uid, mask in zip(uids, phantom.emboli_mask.voxels, strict=True):
            values = {**dict.fromkeys(ANSWERS, 0), **told, "pe_present_on_image": int(mask.any())}
            rows.append([study, series, uid, *(values[name] for name in ANSWERS)])
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[*IDS, *ANSWERS], *rows])
    return folder


def nnunet(folder: Path, made: Made) -> Path:
    for images, labels, name, phantom in (
        ("imagesTr", "labelsTr", "a", made.positive),
        ("imagesTs", "labelsTs", "b", made.negative),
    ):
        affine = lps_of(phantom)
        write_nifti(phantom.volume.voxels, affine, folder / images / f"{name}_0000.nii.gz")
        lung = np.where(phantom.emboli_mask.voxels > 0, 2, 0).astype(np.uint8)
        lung[:, :3, :3] = 1  # another structure
        write_nifti(lung, affine, folder / labels / f"{name}.nii.gz")
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "name": "Fair PE",
                "channel_names": {"0": "CT"},
                "labels": {"background": 0, "lung": 1, "embolism": 2},
                "licence": "CC BY-NC 4.0 (non-commercial)",
            }
        )
    )
    return folder


def masks(folder: Path, made: Made) -> Path:
    for name, phantom in (("x1", made.positive), ("x2", made.negative)):
        write_nrrd(phantom.volume.voxels, phantom, folder / f"{name}_ct.nrrd")
        write_nrrd((phantom.emboli_mask.voxels > 0).astype(np.uint8), phantom, folder / f"{name}_mask.nrrd")
    return folder


LAYOUTS: dict[str, Callable[[Path, Made], Path]] = {
    "fumpe": fumpe, "cadpe": cadpe, "read": read, "nnunet": nnunet, "masks": masks,
}  # fmt: skip
