"""Simulated studies as an export: the road from there to a labelled study list, in the words that a person types."""

import numpy as np
import pydicom
from typer.testing import CliRunner

from pe_app.cli import app
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_volume, write_volume
from pe_app.phantom.dicom import accession_of, write_dicom_studies
from pe_app.studies import Study, read_studies


def small_studies(folder):
    rng = np.random.default_rng(0)
    studies = []
    for number, label in enumerate(("positive", "negative", "positive", "")):
        affine = np.array([[0, 0, 0.7, -90.0], [0, 0.8, 0, -80.0], [2.5, 0, 0, -200.0], [0, 0, 0, 1]])
        volume = Volume(rng.integers(-1024, 1500, (6, 9, 8)).astype(np.int16), affine, f"s{number}")
        write_volume(volume, folder / f"s{number}.nrrd")
        studies.append(Study(f"s{number}", folder / f"s{number}.nrrd", f"p{number // 2}", label))
    return studies


def run(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_dicom_of_a_volume_is_that_volume_and_says_that_it_is_simulated(tmp_path):
    studies = small_studies(tmp_path)
    write_dicom_studies(studies, tmp_path)
    for study in studies:
        volume, again = read_volume(study.path), read_volume(tmp_path / "dicom" / study.study)
        np.testing.assert_array_equal(volume.voxels, again.voxels)
        np.testing.assert_allclose(volume.affine, again.affine, atol=1e-3)
    header = pydicom.dcmread(next((tmp_path / "dicom" / "s0").iterdir()))
    assert "Simulated" in str(header.PatientName)
    assert header.AccessionNumber == accession_of(studies[0])


def test_from_an_export_to_labels_by_accession_number_resumed_after_a_lost_study(tmp_path):
    studies = small_studies(tmp_path)
    reports = write_dicom_studies(studies, tmp_path)
    out = tmp_path / "studies"
    run("import", tmp_path / "dicom" / "s0", tmp_path / "dicom" / "s1", "--studies", out, "--names", "accession")
    run("import", tmp_path / "dicom", "--studies", out, "--names", "accession")
    text = run("label-reports", reports, "--out", tmp_path / "labels.csv", "--studies", out / "studies.csv")
    assert "3 of 3 reports belong to a study" in text
    assert "1 studies have no report" in text or "1 study" in text
    found = {study.study: study for study in read_studies(out / "studies.csv")}
    assert {name: found[name].label for name in found} == {accession_of(one): one.label for one in studies}
    assert {found[accession_of(one)].patient for one in studies[:2]} == {"p0"}
    assert {one.fitness for one in found.values()} == {"refused"}, "noise is no chest, and the list says so"
