"""The benchmark compares like with like: its textbook implementations say the same as the program."""

import json

import numpy as np
import pytest
import torch
from small_studies import CLASSIFIER, ENCODER, SLABS, small_chest
from typer.testing import CliRunner

from pe_app.cli import app
from pe_app.common.errors import InputError
from pe_app.ct.lungs import lung_range
from pe_app.ct.slabs import study_slabs
from pe_app.ct.volume_io import read_volume
from pe_app.model.detector import Detector
from pe_app.model.slab_encoder import SlabEncoder
from pe_app.model.study_classifier import ClassifierConfig, StudyClassifier
from pe_app.research.bench import limits, measure, textbook
from pe_app.research.bench.measure import STEPS, Step, run_bench, write_phantom_series


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "series"
    write_phantom_series(folder, slices=60, matrix=64)
    return folder


@pytest.fixture
def quick(monkeypatch):
    """A machine that is measured in a moment."""
    monkeypatch.setattr(limits, "SIDES", (32,))
    monkeypatch.setattr(limits, "COPIED_BYTES", 2**16)
    monkeypatch.setattr(measure, "default_model", lambda: None)
    small = Detector.untrained
    monkeypatch.setattr(measure.Detector, "untrained", lambda: small(0, SLABS, ENCODER, CLASSIFIER))


def test_the_textbook_reads_the_same_voxels(series):
    assert np.array_equal(textbook.read_series(series), read_volume(series).voxels)


def test_the_textbook_prepares_nearly_the_same_slabs():
    volume, _ = small_chest(3, emboli=2)
    lung = lung_range(volume)
    ours = study_slabs(volume, lung, SLABS).pixels
    plain = textbook.prepare(volume, lung, SLABS)
    assert plain.shape == ours.shape
    # zoom lays the outermost slices on each other, the paper's way keeps the extent: half a slice apart at the ends
    assert np.corrcoef(plain.ravel(), ours.ravel())[0, 1] > 0.97


def test_the_textbook_encodes_and_looks_the_same():
    torch.manual_seed(0)
    encoder = SlabEncoder(ENCODER).eval()
    slabs = torch.rand(3, 5, 64, 64)
    features, logits = textbook.encode(encoder, slabs)
    with torch.inference_mode():
        encoded = encoder(slabs)
    torch.testing.assert_close(features, encoded.features)
    torch.testing.assert_close(logits, encoded.logits)
    leaf = features.clone().requires_grad_()
    maps = textbook.grad_cam(encoder, leaf, encoder.logits(leaf), learning=False)
    torch.testing.assert_close(maps, encoder.attention_map(leaf))


@pytest.mark.parametrize("directions", ["parallel", "serial"])
def test_the_textbook_classifies_the_same(directions):
    torch.manual_seed(0)
    classifier = StudyClassifier(ClassifierConfig(6, 4, 3, directions)).eval()
    features = torch.rand(2, 5, 6, 4, 4)
    torch.testing.assert_close(textbook.classify(classifier, features), classifier(features))


def test_the_operations_of_the_encoder_are_the_papers():
    with torch.device("meta"):
        encoder = SlabEncoder()
        counted = limits.operations(lambda: encoder(torch.empty(1, 5, 384, 384)))
    assert counted / 2 == pytest.approx(9.18e9, rel=1e-3)  # a product and a sum each


def test_ratios_are_those_of_the_seconds():
    row = Step("encode", 2.0, 6.0, 1.0).to_json()
    assert (row["speedup"], row["of_limit"]) == (3.0, 0.5)
    assert Step("request", 2.0, None, None).to_json()["speedup"] is None


def test_every_step_but_the_server_is_measured_in_the_tables_order(series, quick, monkeypatch):
    monkeypatch.setattr(measure, "PENetConfig", lambda stride: SMALL_PENET[stride])
    found = run_bench(series, steps=[step for step in reversed(STEPS) if step != "request"], repeats=1).to_json()
    assert [row["step"] for row in found["steps"]] == [step for step in STEPS if step != "request"]
    for row in found["steps"]:
        assert row["seconds"] > 0
        assert row["limit_seconds"] > 0
        assert row["textbook_seconds"] > 0
        if row["step"].startswith("penet"):  # its own way is among those of which the faster counts
            assert row["speedup"] >= 1
    assert found["machine"]["gflops_float32"] > 0


def test_the_command_prints_the_table_as_json(series, quick):
    result = CliRunner().invoke(app, ["bench", str(series), "--json", "--step", "lungs", "--repeats", "1"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["steps"]
    assert [set(row) for row in rows] == [
        {"step", "seconds", "textbook_seconds", "limit_seconds", "speedup", "of_limit"}
    ]


def test_the_memory_of_a_detection_holds_the_study_and_its_attention():
    used = measure.measure_memory(slices=40, matrix=64)
    assert used["slices"] == 40
    assert used["idle_mb"] > 100  # torch alone
    assert used["peak_mb"] - used["idle_mb"] == used["above_idle_mb"] > 40 * 64 * 64 * 2 / 2**20


def test_a_step_that_does_not_exist_is_refused(series):
    with pytest.raises(InputError, match="no step 'cook'"):
        run_bench(series, steps=["cook"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_gives_the_same_table_and_the_same_detection(series):
    steps = [step for step in STEPS if step != "request"]
    found = run_bench(series, torch.device("cuda"), steps, repeats=1).to_json()
    assert found["machine"]["device"] == torch.cuda.get_device_name()
    assert all(row["of_limit"] > 0 for row in found["steps"])
    volume = read_volume(series)
    plain = Detector.untrained()
    plain = plain.with_precision("float32")
    expected = plain.detect(volume).detection.probability
    fast = Detector.untrained().to(torch.device("cuda")).detect(volume).detection
    assert fast.probability == pytest.approx(expected, abs=0.01)


SMALL_PENET = {
    stride: measure.PENetConfig(resize=40, crop=32, stride=stride, width=32, groups=16, blocks=(1, 1, 1, 1))
    for stride in (1, 24)
}
