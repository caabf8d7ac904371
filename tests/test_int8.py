"""Networks in 8-bit integers: they hardly say anything else than in float32."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_studies import CLASSIFIER, ENCODER, SLABS, small_chest
from torch import nn

from pe_app import int8
from pe_app.detector import Detector
from pe_app.errors import InputError
from pe_app.int8 import Int8Networks
from pe_app.lungs import lung_range
from pe_app.slab_encoder import EncoderConfig, SlabEncoder
from pe_app.slabs import study_slabs
from pe_app.study_classifier import StudyClassifier


def runs_here() -> bool:
    try:
        int8.check_machine()
    except InputError:
        return False
    return True


needs_vnni = pytest.mark.skipif(not runs_here(), reason="this processor or torch has no 8-bit products")


@pytest.fixture(scope="module")
def detector() -> Detector:
    """Random weights whose normalisations remember the statistics of a chest, as after a training."""
    made = Detector.untrained(0, SLABS, ENCODER, CLASSIFIER)
    volume, _ = small_chest(1, emboli=3)
    slabs = torch.from_numpy(study_slabs(volume, lung_range(volume), SLABS).pixels.copy())
    made.encoder.train()
    with torch.no_grad():
        for _ in range(40):
            made.encoder(slabs)
    made.to(torch.device("cpu"))
    made.precision = "float32"
    return made


@needs_vnni
def test_a_convolution_is_that_of_the_rounded_integers():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 3, stride=2, padding=1)
    x = torch.randint(0, 256, (2, 8, 12, 12), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    largest, largest_output = 3.0, 2.0
    scale = layer.weight.detach().abs().amax((1, 2, 3), keepdim=True) / 127
    weight = (layer.weight.detach() / scale).round() * scale
    exact = F.conv2d(x.double() * largest / 255, weight.double(), layer.bias.detach().double(), 2, 1).relu()
    expected = (exact * 255 / largest_output).clamp(max=255)
    found = int8._Convolution(layer, largest, largest_output)(x)
    assert found.dtype == torch.uint8
    assert float((found.double() - expected).abs().max()) <= 0.501


def test_pooling_is_torchs():
    x = torch.randint(0, 256, (2, 3, 16, 12), dtype=torch.uint8)
    assert torch.equal(int8._pooled(x).float(), F.max_pool2d(x.float(), 3, 2, 1))


@needs_vnni
def test_features_logits_and_gates_are_nearly_those_of_float32(detector):
    networks = Int8Networks(detector.encoder, detector.classifier)
    volume, _ = small_chest(2, emboli=3)
    slabs = torch.from_numpy(study_slabs(volume, lung_range(volume), SLABS).pixels.copy())
    with torch.inference_mode():
        plain, fast = detector.encoder(slabs), networks.encoder(slabs)
        study, fast_study = (network(plain.features[None]) for network in (detector.classifier, networks.classifier))
    assert fast.features.dtype == torch.float32
    assert np.corrcoef(plain.features.flatten(), fast.features.flatten())[0, 1] > 0.95  # 0.998 at full width
    torch.testing.assert_close(fast.logits.softmax(1), plain.logits.softmax(1), atol=0.03, rtol=0)
    torch.testing.assert_close(fast_study.sigmoid(), study.sigmoid(), atol=0.01, rtol=0)


@needs_vnni
def test_a_detection_in_int8_says_so_and_nearly_the_same(detector):
    volume, _ = small_chest(3, emboli=3)
    eight_bit = copy.deepcopy(detector).use("int8")
    assert eight_bit.identity.version.endswith("int8")
    slabs = study_slabs(volume, lung_range(volume), SLABS)
    features, probability = detector.encode(slabs)
    fast_features, fast_probability = eight_bit.encode(slabs)
    assert fast_probability == pytest.approx(probability, abs=0.03)
    assert eight_bit.classify(fast_features) == pytest.approx(detector.classify(features), abs=0.01)
    assert "int8" not in eight_bit.use("auto").identity.version


@needs_vnni
def test_another_encoder_is_refused_with_a_sentence():
    densenet = SlabEncoder(EncoderConfig(width=8, architecture="densenet121"))
    with pytest.raises(InputError, match="densenet121"):
        Int8Networks(densenet, StudyClassifier(CLASSIFIER))


def test_a_processor_without_vnni_is_refused_with_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    with pytest.raises(InputError, match="no VNNI"):
        Detector.untrained(0, SLABS, ENCODER, CLASSIFIER).use("int8")
