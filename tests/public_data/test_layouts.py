"""The downloads as their converters know them, rebuilt from phantoms with their quirks."""

from __future__ import annotations

from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest
import scipy.io
from conftest import dicom_slice
from public_layouts import LAYOUTS, Made, cadpe, fumpe, nnunet, rspect, write_nrrd
from typer.testing import CliRunner

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.cli import app
from pe_app.common.errors import InputError
from pe_app.ct.volume_io import read_volume
from pe_app.phantom.scan import PhantomConfig, make_phantom
from pe_app.public_data import run
from pe_app.public_data.proof import check_fit, fit_of
from pe_app.public_data.run import DatasetImport, DatasetLine, import_dataset
from pe_app.public_data.sets import public_set
from pe_app.studies import StudyAttributes, read_studies


@pytest.fixture(scope="module")
def made() -> Made:
    config = PhantomConfig(96, 5.0, "large")
    return Made(
        make_phantom(np.random.default_rng(4), config, positive=True),
        make_phantom(np.random.default_rng(5), config, positive=False),
    )


def brought_in(
    name: str, download: Path, studies: Path, settings: DatasetImport | None = None
) -> tuple[DatasetLine, ...]:
    pattern = "{name}_ct.nrrd,{name}_mask.nrrd" if name == "masks" else ""
    return import_dataset(public_set(name, download, pattern), download, studies, settings)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_clot_lies_where_it_was_put_and_slices_between_are_answered_none(name, made, tmp_path):
    download, studies = LAYOUTS[name](tmp_path / "download", made), tmp_path / "studies"
    lines = brought_in(name, download, studies)
    assert [line.status for line in lines] == ["imported", "imported"], lines
    listed = read_studies(studies / "studies.csv")
    assert [study.label for study in listed] == ["positive", "negative"]
    assert all(study.source and study.annotation for study in listed)
    for study, phantom in zip(listed, (made.positive, made.negative), strict=True):
        volume = read_volume(study.path)
        assert np.abs(volume.voxels.astype(int) - phantom.volume.voxels).max() == 0, "the CT is listed where it lies"
        truth = phantom.emboli_mask.voxels > 0
        assert np.array_equal(read_volume_mask(studies / "masks" / f"{study.study}.nrrd") > 0, truth)
        annotation = SparseAnnotation.read(study.annotation, volume)
        steps = np.diff([entry.z_mm for entry in annotation.slices])
        assert ((steps >= 5) & (steps <= 15)).all()
        for entry in annotation.slices:
            assert entry.state == ("embolism" if truth[entry.slice_index].any() else "none")
        for index, outline in annotation.masks.items():
            assert np.array_equal(outline, truth[index])
    positive = SparseAnnotation.read(listed[0].annotation)
    assert {entry.state for entry in positive.slices} == {"embolism", "none"}


def read_volume_mask(path: Path) -> np.ndarray:
    """The array in canonical order, by another reader than the one under test."""
    array, _ = nrrd.read(str(path), index_order="C")
    return array


def test_rspect_answers_become_slices_without_outlines_and_study_attributes(made, tmp_path):
    download, studies = rspect(tmp_path / "download", made), tmp_path / "studies"
    lines = brought_in("rspect", download, studies)
    assert [line.status for line in lines] == ["imported", "imported"]
    positive, negative = read_studies(studies / "studies.csv")
    assert (positive.study, positive.label, positive.terms) == (
        "rspect-1.5.1",
        "positive",
        "RSNA, non-commercial use only",
    )
    assert positive.attributes == StudyAttributes("yes", "both", "acute", "1 or above", "good", "")
    assert (negative.label, negative.annotation) == ("negative", None)
    assert negative.attributes == StudyAttributes(quality="motion", mimic="flow artifact")
    annotation = SparseAnnotation.read(positive.annotation, read_volume(positive.path))
    truth = made.positive.emboli_mask.voxels.any(axis=(1, 2))
    assert dict(annotation.masks) == {}
    for entry in annotation.slices:
        assert (entry.state, entry.not_outlined) == (
            ("embolism", True) if truth[entry.slice_index] else ("none", False)
        )
    assert 0 < sum(entry.not_outlined for entry in annotation.slices) < len(annotation.slices)
    assert not (studies / "masks").exists()


def test_a_study_of_which_images_are_missing_is_not_answered(made, tmp_path):
    download = rspect(tmp_path / "download", made)
    series = download / "train" / "1.5.1" / "1.5.1.7"
    sorted(series.iterdir())[0].unlink()
    (line,) = [one for one in brought_in("rspect", download, tmp_path / "studies") if one.status == "failed"]
    assert line.study == "rspect-1.5.1"
    assert "images are answered" in line.reason
    assert [study.study for study in read_studies(tmp_path / "studies" / "studies.csv")] == ["rspect-1.5.2"]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mask_whose_orientation_differs_stops_that_study_with_figures(axis, made, tmp_path):
    download = cadpe(tmp_path / "download", made)
    flipped = np.flip(made.positive.emboli_mask.voxels, axis)
    write_nrrd(flipped, made.positive, download / "rs" / "0001RefStd.nrrd")
    lines = brought_in("cadpe", download, tmp_path / "studies")
    assert [line.status for line in lines] == ["failed", "imported"]
    assert "of the mask lies in the chest" in lines[0].reason
    assert "exchanged with" in lines[0].reason
    assert [study.study for study in read_studies(tmp_path / "studies" / "studies.csv")] == ["cadpe-e032"]


def test_the_order_of_fumpes_slices_is_that_of_file_names_and_the_other_one_is_noticed(made, tmp_path):
    """With files named from the feet the same mask array would be upside down."""
    download = fumpe(tmp_path / "download", made)
    mask = scipy.io.loadmat(download / "GroundTruth" / "PAT001.mat")["Mask"]
    scipy.io.savemat(download / "GroundTruth" / "PAT001.mat", {"Mask": mask[:, :, ::-1]}, format="5")
    lines = brought_in("fumpe", download, tmp_path / "studies")
    assert [line.status for line in lines] == ["failed", "imported"]
    assert "fits better when flipped" in lines[0].reason or "lies in air" in lines[0].reason


def test_a_mask_outside_of_the_chest_is_refused(made):
    outside = np.zeros(made.positive.volume.shape, np.uint8)
    outside[:4, :6, :6] = 1
    with pytest.raises(InputError, match="its mask lies outside of the chest: 0% of the mask lies in the chest"):
        check_fit(fit_of(outside, made.positive.volume), "a")


def test_a_mask_on_lung_is_refused(made):
    voxels = made.positive.volume.voxels
    lung = (voxels < -700) & (voxels > -900)
    lung[:, : voxels.shape[1] // 3] = lung[:, -voxels.shape[1] // 3 :] = False
    with pytest.raises(InputError, match="lies in air or lung"):
        check_fit(fit_of(lung, made.positive.volume), "a")


def test_the_same_call_resumes_and_reads_nothing_twice(made, tmp_path, monkeypatch):
    download, studies = cadpe(tmp_path / "download", made), tmp_path / "studies"
    honest = run.fit_of

    def cut(*_: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "fit_of", cut)
    with pytest.raises(KeyboardInterrupt):
        brought_in("cadpe", download, studies)
    monkeypatch.setattr(run, "fit_of", honest)
    assert [line.status for line in brought_in("cadpe", download, studies)] == ["imported", "imported"]
    before = (studies / "studies.csv").read_bytes()
    monkeypatch.setattr(run, "read_volume", cut)
    assert [line.status for line in brought_in("cadpe", download, studies)] == ["known", "known"]
    assert (studies / "studies.csv").read_bytes() == before
    with pytest.raises(KeyboardInterrupt):
        brought_in("cadpe", download, studies, DatasetImport(every_mm=None))


def test_a_split_that_somebody_set_stays_and_every_slice_can_be_taken(made, tmp_path):
    download, studies = cadpe(tmp_path / "download", made), tmp_path / "studies"
    brought_in("cadpe", download, studies)
    listed = studies / "studies.csv"
    listed.write_text(listed.read_text().replace("cadpe-001.json,,", "cadpe-001.json,test,"))
    brought_in("cadpe", download, studies, DatasetImport(every_mm=None, copy=True))
    first = read_studies(listed)[0]
    assert first.split == "test"
    assert first.path == studies / "cadpe-001.nrrd"
    annotation = SparseAnnotation.read(first.annotation, read_volume(first.path))
    assert len(annotation.slices) == made.positive.volume.shape[0]


def test_one_damaged_study_is_a_line_and_stops_no_other(made, tmp_path):
    download = fumpe(tmp_path / "download", made)
    (download / "GroundTruth" / "PAT001.mat").write_bytes(b"MATLAB 5.0 MAT-file, cut off")
    lines = brought_in("fumpe", download, tmp_path / "studies")
    assert [line.status for line in lines] == ["failed", "imported"]
    assert "PAT001.mat: cannot be read as a MATLAB file: copy it again" in lines[0].reason


def test_processes_import_what_one_would(made, tmp_path):
    download = cadpe(tmp_path / "download", made)
    alone = brought_in("cadpe", download, tmp_path / "a")
    together = brought_in("cadpe", download, tmp_path / "b", DatasetImport(workers=2))
    assert alone == together
    assert (tmp_path / "a" / "annotations" / "cadpe-001.json").read_bytes() == (
        tmp_path / "b" / "annotations" / "cadpe-001.json"
    ).read_bytes()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fumpe", "has no folder CT_scans"),
        ("cadpe", "has no folder images"),
        ("read", "has no folder images"),
        ("rspect", r"train\.csv: is not there"),
        ("nnunet", r"dataset\.json: is not there"),
        ("masks", "no file is like"),
    ],
)
def test_a_folder_of_another_layout_is_refused(name, sentence, tmp_path):
    (tmp_path / "download").mkdir()
    with pytest.raises(InputError, match=sentence):
        brought_in(name, tmp_path / "download", tmp_path / "studies")


def test_the_command_shows_the_terms_once_and_writes_them_into_the_list(made, tmp_path):
    download, studies = nnunet(tmp_path / "download", made), tmp_path / "studies"
    arguments = ["import-dataset", "nnunet", str(download), "--studies", str(studies), "--workers", "1"]
    first, second = (CliRunner().invoke(app, arguments) for _ in range(2))
    assert first.exit_code == 0, first.output
    assert "Terms of use: CC BY-NC 4.0 (non-commercial)" in first.output
    assert "2 studies (1 positive, 1 negative; 0 unchanged" in first.output
    assert "Terms of use" not in second.output
    assert "2 unchanged since an earlier import" in second.output
    listed = read_studies(studies / "studies.csv")
    assert {(study.source, study.terms) for study in listed} == {("Fair-PE", "CC BY-NC 4.0 (non-commercial)")}
    assert [study.split for study in listed] == ["", "test"]


def test_real_clots_survive_the_way_through_fumpes_layout(real_data, tmp_path):
    """Shapes of FUMPE itself; there is no CT to prove them on, so that the proof is left out."""
    from pe_app.public_data.fumpe import read_mask

    image = nibabel.load(real_data / "fumpe_clot_masks" / "PAT001.nii.gz")
    mask = np.asarray(image.dataobj).astype(np.uint8).transpose(2, 1, 0)[::4, ::4, ::4]
    hu = np.where(mask > 0, 50, -800).astype(np.int16)
    hu[:, 0, 0] = -1000
    folder = tmp_path / "PAT001"
    folder.mkdir()
    for k, plane in enumerate(hu):
        dataset = dicom_slice((plane + 1024).astype(np.uint16), (-100.0, -100.0, 2.0 * k), PixelSpacing=[2.6, 2.6])
        dataset.save_as(folder / f"D{len(hu) - k:04}.dcm", enforce_file_format=True)
    scipy.io.savemat(tmp_path / "PAT001.mat", {"Mask": np.moveaxis(mask[::-1], 0, 2)}, format="5")
    volume = read_volume(folder)
    placed = read_mask(tmp_path / "PAT001.mat", volume)
    assert mask.any()
    assert np.array_equal(placed > 0, volume.voxels == 50)
