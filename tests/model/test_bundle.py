"""The MONAI Bundle: run as MONAI runs bundles, in another process, and held against the detector itself."""

import json
import os
import subprocess
import sys

import nrrd
import numpy as np
import pytest

from pe_app.common.errors import InputError
from pe_app.ct.slabs import SlabConfig
from pe_app.ct.volume_io import read_volume, write_volume
from pe_app.model.bundle import write_bundle
from pe_app.model.detector import Detector
from pe_app.model.slab_encoder import EncoderConfig
from pe_app.model.study_classifier import ClassifierConfig
from pe_app.phantom import PhantomConfig, make_phantom


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    slabs = SlabConfig(matrix=128, crop=64, slab_count=10)
    classifier = ClassifierConfig(feature_channels=64, grid=4, filters=4)
    Detector.untrained(slabs=slabs, encoder=EncoderConfig(width=8), classifier=classifier).save(path)
    return path


@pytest.mark.timeout(1500)  # imports MONAI in another process: minutes on a busy machine
def test_monai_runs_the_bundle_and_gets_what_the_detector_says(model, tmp_path):
    phantom = make_phantom(np.random.default_rng(8), PhantomConfig(matrix=128, spacing_mm=4.0), positive=True)
    study = tmp_path / "study.nii.gz"
    write_volume(phantom.volume, study)
    write_bundle(model, tmp_path / "bundle")
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    done = subprocess.run(
        [*command, "--image", str(study), "--output_dir", str(tmp_path / "out")],
        cwd=tmp_path / "bundle",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    written = json.loads((tmp_path / "out" / "detection.json").read_text())
    expected = Detector.load(model).detect(read_volume(study))
    # another process may use another number of threads, so sums differ in the last digits
    assert written["probability"] == pytest.approx(expected.detection.probability, abs=2e-3)
    assert written["model"]["sha256"] == expected.detection.model.sha256
    attention, _ = nrrd.read(str(tmp_path / "out" / "attention.nrrd"))
    np.testing.assert_allclose(attention.T.astype(int), expected.attention.voxels.astype(int), atol=2)


def test_the_bundle_has_the_folders_that_monai_asks_for_and_says_what_it_is(model, tmp_path):
    write_bundle(model, tmp_path / "bundle")
    files = {str(path.relative_to(tmp_path / "bundle")) for path in (tmp_path / "bundle").rglob("*") if path.is_file()}
    assert files == {"configs/metadata.json", "configs/inference.json", "models/model.safetensors", "docs/README.md"}
    metadata = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    required = {
        "version", "changelog", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors",
        "copyright", "network_data_format",
    }  # fmt: skip
    assert required <= metadata.keys()
    assert "Research use only" in metadata["description"]
    assert "its numbers are random" in metadata["description"]
    assert (tmp_path / "bundle" / "models" / "model.safetensors").read_bytes() == model.read_bytes()


def test_a_folder_that_holds_something_is_left_alone(model, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write_bundle(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt"}


def test_what_is_no_model_makes_no_bundle(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read"):
        write_bundle(tmp_path / "x.safetensors", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
