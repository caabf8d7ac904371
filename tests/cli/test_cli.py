"""The commands as a person types them: what they print, what they write, how they end."""

import csv
import json
import os
import shutil
import subprocess
import sys

import nibabel
import nrrd
import numpy as np
import pytest

from pe_app.ct.slabs import SlabConfig
from pe_app.ct.volume import Volume, axial_affine
from pe_app.ct.volume_io import write_volume
from pe_app.model.detector import Detector
from pe_app.model.slab_encoder import EncoderConfig
from pe_app.model.study_classifier import ClassifierConfig
from pe_app.phantom import PhantomConfig, make_phantom


def run(*arguments: object, folder=None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pe_app", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=250)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a simulated study and a small model."""
    folder = tmp_path_factory.mktemp("cli")
    phantom = make_phantom(np.random.default_rng(8), PhantomConfig(matrix=128, spacing_mm=4.0), positive=True)
    write_volume(phantom.volume, folder / "study.nii.gz")
    slabs = SlabConfig(matrix=128, crop=64, slab_count=10)
    classifier = ClassifierConfig(feature_channels=64, grid=4, filters=4)
    Detector.untrained(slabs=slabs, encoder=EncoderConfig(width=8), classifier=classifier).save(
        folder / "m.safetensors"
    )
    return folder


def test_detect_writes_what_it_promises_and_prints_the_same_json(workplace):
    done = run(
        *("detect", workplace / "study.nii.gz", "--model", workplace / "m.safetensors", "--out", workplace / "out"),
        *("--json", "--full-resolution"),
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed == json.loads((workplace / "out" / "detection.json").read_text())
    assert printed["status"] == "analysed"
    assert len(printed["evidence"]) == 10
    attention, _ = nrrd.read(str(workplace / "out" / "attention.nrrd"))
    assert attention.shape == (4, 4, 10)
    full, _ = nrrd.read(str(workplace / "out" / "attention_full.nrrd"))
    assert sorted(full.shape) == sorted(nibabel.load(workplace / "study.nii.gz").shape)
    assert (workplace / "out" / "review.png").read_bytes().startswith(b"\x89PNG")
    page = (workplace / "out" / "index.html").read_text()
    assert "Research use only" in page
    assert "Untrained model: not a clinical result" in page
    assert "default-src 'none'" in page  # nothing is loaded


def test_detect_says_in_words_what_limits_the_result(workplace):
    done = run(
        *("detect", workplace / "study.nii.gz", "--model", workplace / "m.safetensors", "--out", workplace / "words"),
    )
    assert "Probability of embolism" in done.stdout
    assert "numbers are random" in done.stdout
    assert "Research use only" in done.stdout


def test_a_study_that_the_method_is_not_for_is_refused_with_exit_code_3(workplace):
    still = np.random.default_rng(0).normal(0, 20, (60, 128, 128)).astype(np.int16)
    still[:, :8] = -1000
    write_volume(Volume(still, axial_affine((3.0, 2.5, 2.5))), workplace / "water.nrrd")
    done = run(
        *("detect", workplace / "water.nrrd", "--model", workplace / "m.safetensors", "--out", workplace / "refused"),
    )
    assert done.returncode == 3, done.stderr
    assert "not_chest" in done.stdout
    written = json.loads((workplace / "refused" / "detection.json").read_text())
    assert written["probability"] is None
    assert not (workplace / "refused" / "attention.nrrd").exists()


def test_many_studies_make_a_worklist_and_the_bad_one_costs_exit_code_4_and_no_other_result(workplace):
    given = workplace / "many"
    given.mkdir()
    shutil.copy(workplace / "study.nii.gz", given / "good.nii.gz")
    (given / "bad.nrrd").write_bytes(b"NRRD0004\nno more")
    command = ("detect", given, "--model", workplace / "m.safetensors", "--out", workplace / "list", "--json")
    first = run(*command)
    assert first.returncode == 4, first.stderr
    lines = [json.loads(line) for line in first.stdout.splitlines()]
    assert [(line["study"], line["status"]) for line in lines] == [("bad", "failed"), ("good", "analysed")]
    assert "2 studies, bad to good" in first.stderr
    assert "1 of 2 analysed (50%), 1 failed. Untrained model: not a clinical result." in first.stderr
    alone = json.loads((workplace / "list" / "good" / "detection.json").read_text())
    assert lines[1]["detection"] == alone
    page = (workplace / "list" / "index.html").read_text()
    assert "1 of 2 analysed (50%)" in page
    assert "data:image/jpeg;base64," in page
    (given / "bad.nrrd").unlink()
    again = run(*command[:-1])
    assert again.returncode == 0, again.stderr
    assert "unchanged, skipped" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("detect", "nowhere"), "nowhere"),
        (("detect", "study.nii.gz", ".", "--series", "1.2.3"), "--series"),
        (("detect", "nowhere.csv", "--out", "x"), "nowhere.csv"),
        (("detect", "study.nii.gz", "--model", "study.nii.gz"), "study.nii.gz"),
        (("train", "encoder", "--studies", "nowhere.csv", "--out", "x.safetensors"), "nowhere.csv"),
        (("serve", "nowhere"), "nowhere"),
        (("serve", ".", "--host", "0.0.0.0"), "pe-app tokens add"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(workplace, arguments, sentence):
    done = run(*arguments, folder=workplace)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pe-app: ")
    assert sentence in last
    assert "Traceback" not in done.stderr


def test_phantom_and_both_trainings_make_a_model_that_detects(workplace):
    studies = workplace / "phantoms" / "studies.csv"
    made = run("phantom", "--studies", 10, "--seed", 3, "--matrix", 64, "--workers", 1, "--out", studies.parent)
    assert made.returncode == 0, made.stderr
    small = ("--matrix", 64, "--crop", 64, "--slab-count", 6, "--width", 4, "--filters", 2)
    first = workplace / "encoder.safetensors"
    stage_one = run(
        *("train", "encoder", "--studies", studies, "--out", first, "--epochs", 1, "--batch", 4, *small),
        *("--synthetic", "--precision", "float32", "--shift-cells", 1, "--jitter-hu", 10),
    )
    assert stage_one.returncode == 0, stage_one.stderr
    second = workplace / "model.safetensors"
    stage_two = run(
        *("train", "classifier", "--studies", studies, "--encoder", first, "--out", second, "--epochs", 1),
        *("--batch", 4, "--synthetic", "--precision", "float32"),
    )
    assert stage_two.returncode == 0, stage_two.stderr
    done = run("detect", workplace / "study.nii.gz", "--model", second, "--out", workplace / "trained", "--json")
    detection = json.loads(done.stdout)
    assert detection["model"]["trained"] is True
    assert "demo_model" in [reason["code"] for reason in detection["reasons"]]
    with (workplace / "model.run" / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1


def test_reports_become_labels_of_the_study_list(workplace):
    (workplace / "list.csv").write_text("study,path\na,study.nii.gz\n")
    (workplace / "reports.csv").write_text(
        'study,report\na,"IMPRESSION: Acute pulmonary embolism in the right lower lobe."\n'
    )
    done = run("label-reports", "reports.csv", "--out", "labels.csv", "--studies", "list.csv", folder=workplace)
    assert done.returncode == 0, done.stderr
    with (workplace / "list.csv").open() as file:
        assert next(csv.DictReader(file))["label"] == "positive"


def test_help_names_every_command_and_says_what_it_is_not_for():
    done = run("--help")
    for command in ("detect", "train", "phantom", "serve", "demo", "label-reports", "evaluate"):
        assert command in done.stdout
    assert "not for diagnosis" in " ".join(done.stdout.split())
