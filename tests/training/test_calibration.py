"""Temperature and threshold chosen on validation studies: kept in the file, used by the detector, told with it."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit, logit
from small_studies import CLASSIFIER, ENCODER, SLABS, small_studies

import pe_app.model.detector
from pe_app.common.errors import InputError
from pe_app.ct.volume_io import read_volume
from pe_app.model.detector import Decision, Detector, ModelCard, TrainingRecord
from pe_app.training.calibration import calibrate

RECORD = TrainingRecord(8, 4, 0, True, 1, 1, 1.0, "cpu", "2026-01-01T00:00:00Z", "", {"seed": 0}, {}, ("x",))


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    studies = small_studies(tmp_path_factory.mktemp("validation"), count=8)
    return tuple(replace(study, split="validation" if number < 6 else "test") for number, study in enumerate(studies))


@pytest.fixture
def model(tmp_path):
    detector = Detector.untrained(3, SLABS, ENCODER, CLASSIFIER)
    detector = replace(detector, card=ModelCard("ours", "1", RECORD, RECORD))
    detector.save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture(autouse=True)
def every_chest_is_good(monkeypatch):
    monkeypatch.setattr(pe_app.model.detector, "check_study", lambda *_: ())


def probabilities(path, studies):
    detector = Detector.load(path)
    return np.array([detector.detect(read_volume(study.path)).detection.probability for study in studies])


def test_the_threshold_finds_the_stated_share_of_positive_validation_studies(validation, model, tmp_path):
    out = tmp_path / "calibrated.safetensors"
    decision = calibrate(validation, model, out, sensitivity=0.6)
    kept = Detector.load(out)
    assert kept.decision == decision
    assert (decision.studies, decision.positive, decision.sensitivity) == (6, 3, 0.6)
    positive = [study for study in validation[:6] if study.label == "positive"]
    called = [kept.detect(read_volume(study.path)).detection.positive for study in positive]
    assert sum(called) == 2  # the fewest of 3 that are at least 60%


def test_the_temperature_divides_the_logit_and_leaves_the_order(validation, model, tmp_path):
    out = tmp_path / "calibrated.safetensors"
    temperature = calibrate(validation, model, out).temperature
    before, after = probabilities(model, validation), probabilities(out, validation)
    assert after == pytest.approx(expit(logit(before) / temperature), abs=1e-5)
    assert Detector.load(out).decision.threshold == 0.5


def test_every_detection_says_that_the_model_was_calibrated(validation, model, tmp_path):
    out = tmp_path / "calibrated.safetensors"
    decision = calibrate(validation, model, out, sensitivity=1.0)
    detection = Detector.load(out).detect(read_volume(validation[0].path)).detection
    assert detection.threshold == decision.threshold
    assert "for sensitivity 1" in detection.model.version
    assert "6 validation studies, 3 positive" in detection.model.version
    assert Detector.load(model).identity.version == "1"


def test_a_model_without_a_decision_in_its_file_has_the_papers(model, monkeypatch):
    assert Detector.load(model).decision == Decision(1.0, 0.5)


def test_half_precision_stays_half(validation, tmp_path):
    detector = Detector.untrained(3, SLABS, ENCODER, CLASSIFIER)
    detector = replace(detector, card=ModelCard("ours", "1", RECORD, RECORD))
    detector.save(tmp_path / "half.safetensors", half=True)
    calibrate(validation, tmp_path / "half.safetensors", tmp_path / "out.safetensors")
    sizes = [(tmp_path / name).stat().st_size for name in ("half.safetensors", "out.safetensors")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


def test_what_cannot_be_calibrated_is_refused(validation, model, tmp_path):
    detector = Detector.untrained(0, SLABS, ENCODER, CLASSIFIER)
    detector.save(tmp_path / "untrained.safetensors")
    with pytest.raises(InputError, match="not trained"):
        calibrate(validation, tmp_path / "untrained.safetensors", tmp_path / "out.safetensors")
    with pytest.raises(InputError, match="1 positive and 1 negative validation studies"):
        calibrate((*validation[:2], *validation[6:]), model, tmp_path / "out.safetensors")
    with pytest.raises(InputError, match="sensitivity must lie"):
        calibrate(validation, model, tmp_path / "out.safetensors", sensitivity=90)
