"""The whole way from a volume to a detection, and the file that holds a detector."""

import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import safetensors.torch
import torch

from pe_app.common.errors import InputError
from pe_app.common.progress import Cancelled
from pe_app.ct.quality import QualityLimits
from pe_app.ct.slabs import SlabConfig
from pe_app.ct.volume import Volume
from pe_app.model import winograd
from pe_app.model.detector import STARTER_MODEL, Decision, Detector, ModelCard, TrainingRecord
from pe_app.model.slab_encoder import EncoderConfig
from pe_app.model.study_classifier import ClassifierConfig
from pe_app.phantom import PhantomConfig, make_phantom

SLABS = SlabConfig(matrix=128, crop=64, slab_count=12)
RECORD = TrainingRecord(
    10, 5, 30, True, 3, 2, 1.5, "cpu", "2026-01-01T00:00:00+00:00", "abc", {"batch": 4}, {"accuracy": 0.9}, ("ab" * 32,)
)


@pytest.fixture(scope="module")
def detector() -> Detector:
    small = Detector.untrained(
        slabs=SLABS, encoder=EncoderConfig(width=8), classifier=ClassifierConfig(feature_channels=64, grid=4, filters=4)
    )
    return small.with_precision("float32")


@pytest.fixture(scope="module")
def volume() -> Volume:
    return make_phantom(np.random.default_rng(5), PhantomConfig(matrix=128, spacing_mm=3.0), positive=True).volume


def test_an_untrained_model_says_so_every_time(detector, volume):
    codes = [reason.code for reason in detector.detect(volume).detection.reasons]
    assert "untrained_model" in codes
    assert detector.detect(volume).detection.to_json()["model"]["trained"] is False


def test_a_model_that_saw_only_painted_emboli_says_so(detector):
    demo = Detector(detector.encoder, detector.classifier, SLABS, ModelCard("starter", "1", RECORD, RECORD))
    assert [reason.code for reason in demo.card.reasons()] == ["demo_model"]
    assert not demo.card.reasons()[0].refuses


def test_a_detection_has_one_evidence_a_slab_from_the_feet_to_the_head(detector, volume):
    result = detector.detect(volume)
    detection = result.detection
    assert detection.status == "analysed"
    assert len(detection.evidence) == 12
    assert (np.diff([slab.z_mm for slab in detection.evidence]) > 0).all()
    assert 0 <= detection.probability <= 1
    assert result.attention.shape == (12, 4, 4)
    assert result.attention.voxels.dtype == np.uint8
    json.dumps(detection.to_json(), allow_nan=False)


def test_attention_is_the_normalised_map_times_the_slab_probability(detector, volume):
    result = detector.detect(volume)
    for slab, entry in enumerate(result.detection.evidence):
        expected = 255 * entry.probability if entry.attention_peak > 0 else 0
        assert abs(float(result.attention.voxels[slab].max()) - expected) <= 1
        if entry.peak_lps_mm:
            peak = result.attention.to_index(entry.peak_lps_mm).round().astype(int)
            assert result.attention.voxels[tuple(peak)] == result.attention.voxels[slab].max()


def test_slab_probabilities_are_the_encoders_on_each_slab_alone(detector, volume):
    from pe_app.ct.lungs import lung_range
    from pe_app.ct.slabs import study_slabs

    pixels = torch.from_numpy(study_slabs(volume, lung_range(volume), SLABS).pixels.copy())
    with torch.no_grad():
        alone = [float(detector.encoder(slab[None]).logits.softmax(1)[0, 1]) for slab in pixels]
    evidence = [slab.probability for slab in detector.detect(volume).detection.evidence]
    assert evidence == pytest.approx(alone, abs=1e-5)


def test_the_fast_way_says_the_same_as_direct_float32_and_points_to_the_same_places():
    """The whole networks of the model that ships, with fewer slabs; in its slice a place is known to one cell."""
    phantom = make_phantom(np.random.default_rng(7), PhantomConfig(128, 5.0, burden="large"), positive=True)
    whole = Detector.load(STARTER_MODEL).to(torch.device("cpu"))
    whole = replace(whole, slabs=replace(whole.slabs, slab_count=8, slab_stride=25))
    found = []
    for precision, by_points in (("float32", False), ("float32", True), ("bfloat16", True)):
        whole = whole.with_precision(precision)
        for network in (whole.encoder, whole.classifier):
            winograd.choose(network, by_points=by_points)
        found.append(whole.detect(phantom.volume).detection)
    plain, points, fast = found
    assert points.probability == pytest.approx(plain.probability, abs=1e-4)
    assert [one.slices for one in points.candidates] == [one.slices for one in plain.candidates]
    for one, other in zip(points.candidates, plain.candidates, strict=True):
        assert one.centre_lps_mm == pytest.approx(other.centre_lps_mm, abs=0.1)
        assert one.slab_probability == pytest.approx(other.slab_probability, abs=1e-4)
    # one cell decides of a slab, no mean evens out what bfloat16 rounds
    assert fast.probability == pytest.approx(plain.probability, abs=0.04)
    assert [slab.probability for slab in fast.evidence] == pytest.approx(
        [slab.probability for slab in plain.evidence], abs=0.05
    )
    assert plain.candidates
    assert [one.slice_index for one in fast.candidates] == [one.slice_index for one in plain.candidates]
    cell_mm = 16 * phantom.volume.spacing_mm[1] * 128 / 512
    for one, other in zip(fast.candidates, plain.candidates, strict=True):
        assert np.linalg.norm(np.subtract(one.centre_lps_mm, other.centre_lps_mm)[:2]) <= cell_mm


def test_a_study_is_judged_in_float32_whatever_stage_one_runs_in(detector):
    features = torch.rand(SLABS.slab_count, 64, 4, 4).half()
    exact = detector.classifier.eval()(features[None].float()).sigmoid().item()
    assert detector.with_precision("bfloat16").classify(features) == pytest.approx(exact, abs=1e-7)


def test_cancelling_stops_between_slabs(detector, volume):
    def cancel(progress):
        if progress.done >= 10:
            raise Cancelled

    with pytest.raises(Cancelled):
        detector.detect(volume, cancel)


def test_a_volume_without_lung_is_refused_without_a_probability(detector):
    water = Volume(np.zeros((60, 128, 128), np.int16), np.diag([0.0, 0, 0, 1]) + np.eye(4)[[2, 1, 0, 3]] * [3, 2, 2, 0])
    result = detector.detect(water)
    assert result.detection.status == "refused"
    assert result.detection.probability is None
    assert result.attention is None
    assert any(reason.refuses for reason in result.detection.reasons)


def test_a_file_rebuilds_its_own_detector(detector, volume, tmp_path):
    carded = Detector(detector.encoder, detector.classifier, SLABS, ModelCard("mine", "7", RECORD, None))
    carded.save(tmp_path / "model.safetensors")
    loaded = Detector.load(tmp_path / "model.safetensors").with_precision("float32")
    assert loaded.card == carded.card
    assert loaded.slabs == SLABS
    assert loaded.detect(volume).detection.probability == detector.detect(volume).detection.probability


def test_the_identity_is_the_sha256_of_the_file(detector, tmp_path):
    import hashlib

    path = tmp_path / "model.safetensors"
    detector.save(path)
    assert Detector.load(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == detector.sha256


def test_another_setting_that_the_file_holds_is_another_model_and_limits_are_not(detector, tmp_path):
    detector.save(tmp_path / "model.safetensors", half=True)
    loaded = Detector.load(tmp_path / "model.safetensors")
    with pytest.raises(FrozenInstanceError):
        loaded.slabs = replace(SLABS, slab_count=6)
    others = [replace(loaded, slabs=replace(SLABS, slab_count=6)), replace(loaded, decision=Decision(threshold=0.3))]
    assert len({loaded.sha256, *(other.sha256 for other in others)}) == 3
    assert loaded.with_limits(QualityLimits(min_slices=2)).sha256 == loaded.sha256
    assert loaded.with_precision("float32").sha256 == loaded.sha256


def test_half_precision_halves_the_file_and_hardly_moves_the_probability(detector, volume, tmp_path):
    detector.save(tmp_path / "full.safetensors")
    detector.save(tmp_path / "half.safetensors", half=True)
    sizes = [(tmp_path / name).stat().st_size for name in ("half.safetensors", "full.safetensors")]
    assert sizes[0] < 0.6 * sizes[1]
    loaded = Detector.load(tmp_path / "half.safetensors").with_precision("float32")
    assert loaded.detect(volume).detection.probability == pytest.approx(
        detector.detect(volume).detection.probability, abs=5e-3
    )


def rewritten(path, settings=None, weights=None):
    """The model's file with some of its settings or weights replaced."""
    tensors = safetensors.torch.load(path.read_bytes())
    with safetensors.safe_open(path, "pt") as file:
        kept = json.loads(file.metadata()["detector"])
    changed = path.with_name("changed.safetensors")
    metadata = {"detector": json.dumps({**kept, **(settings or {})})}
    safetensors.torch.save_file({**tensors, **(weights or {})}, changed, metadata)
    return changed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "other"}, "not a model of this program"),
        ({"encoder": {"slices_per_slab": 5, "width": 100000}}, "its settings require"),
        ({"slabs": "{"}, "settings cannot be used"),
        ({"slabs": {"crop": 7}}, "settings cannot be used"),
        ({"card": {"name": "x", "version": "1", "encoder": {"studies": 3}, "classifier": None}}, "settings"),
    ],
)
def test_a_lying_header_is_refused_with_a_sentence_and_takes_no_memory(detector, tmp_path, settings, message):
    detector.save(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        Detector.load(rewritten(tmp_path / "model.safetensors", settings))


def test_the_same_detector_is_the_same_bytes_every_time(detector, tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(4)]
    for file in files:
        detector.save(file)
    assert len({file.read_bytes() for file in files}) == 1


def test_weights_that_are_not_finite_are_refused(detector, tmp_path):
    detector.save(tmp_path / "model.safetensors")
    broken = rewritten(tmp_path / "model.safetensors", weights={"encoder.fc.bias": torch.tensor([0.0, torch.nan])})
    with pytest.raises(InputError, match="not finite"):
        Detector.load(broken)


@pytest.mark.parametrize("name", ["extra", "encoder.extra"])
def test_weights_that_no_network_has_are_refused(detector, tmp_path, name):
    detector.save(tmp_path / "model.safetensors")
    more = rewritten(tmp_path / "model.safetensors", weights={name: torch.zeros(2)})
    with pytest.raises(InputError, match=f"weight .*{name.rpartition('.')[2]}"):
        Detector.load(more)


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, None])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        Detector.load(path)


def test_a_truncated_model_is_refused(detector, tmp_path):
    path = tmp_path / "model.safetensors"
    detector.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        Detector.load(path)


def test_a_reader_never_sees_a_half_written_model(detector, tmp_path):
    """A process that is killed while it saves again and again leaves a model that loads."""
    path = tmp_path / "model.safetensors"
    detector.save(path)
    program = f"from pe_app.model.detector import Detector\nd = Detector.load({str(path)!r})\nprint('go', flush=True)\n"
    program += f"while True: d.save({str(path)!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
    child.stdout.readline()
    for _ in range(20):
        Detector.load(path)
    child.kill()
    child.wait()
    Detector.load(path)
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")] == ["model.safetensors"]
