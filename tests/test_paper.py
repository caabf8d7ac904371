"""The paper's numbers as sentences: Shi et al., MIDL 2020, and what follows from them."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pe_app.ct.slabs import SlabConfig
from pe_app.model.losses import AttentionLoss
from pe_app.model.slab_encoder import EncoderConfig, SlabEncoder
from pe_app.model.study_classifier import ClassifierConfig, StudyClassifier


@pytest.fixture(scope="module")
def encoder():
    with torch.device("meta"):
        return SlabEncoder()


def classifier(directions):
    with torch.device("meta"):
        return StudyClassifier(ClassifierConfig(directions=directions))


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def gmac(network, *shape):
    """Multiplications and additions of convolutions and matrix products, as pairs, in 10^9."""
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(shape, device="meta"))
    return counter.get_total_flops() / 2e9


def test_a_slab_is_5_slices_and_a_study_is_50_slabs_over_200_slices_of_the_lung():
    config = SlabConfig()
    assert config.slices_per_slab == 5
    assert config.slab_count == 50
    assert config.slab_stride == 4
    assert config.range_slices == 200


def test_volumes_are_resampled_to_2_5_mm_and_cropped_to_384_of_512_pixels():
    config = SlabConfig()
    assert config.spacing_mm == 2.5
    assert (config.matrix, config.crop) == (512, 384)
    assert config.slices_per_slab * config.spacing_mm == 12.5


def test_hounsfield_units_are_clipped_to_minus_1024_and_500():
    assert SlabConfig().hu_window == (-1024, 500)


def test_an_attention_map_has_24_by_24_cells_of_16_pixels():
    assert SlabConfig().grid == 24
    assert SlabConfig().crop / SlabConfig().grid == 16


def test_the_encoder_has_11_183_810_parameters(encoder):
    assert parameters(encoder) == 11_183_810


def test_a_slab_of_384_pixels_becomes_512_features_on_24_by_24_cells_and_two_logits(encoder):
    encoded = encoder(torch.empty(2, 5, 384, 384, device="meta"))
    assert encoded.features.shape == (2, 512, 24, 24)
    assert encoded.logits.shape == (2, 2)
    assert encoder.attention_map(encoded.features).shape == (2, 24, 24)


def test_the_encoder_takes_9_18_gmac_a_slab_and_459_a_study(encoder):
    per_slab = gmac(encoder, 1, 5, 384, 384)
    assert per_slab == pytest.approx(9.18, abs=0.005)
    assert 50 * per_slab == pytest.approx(459, abs=0.5)


def test_a_stock_resnet18_would_leave_12_by_12_cells_only(encoder):
    with torch.device("meta"):
        stock = SlabEncoder()
        block = stock.layer4[0]
        block.conv1.stride = block.downsample[0].stride = (2, 2)
    assert stock(torch.empty(1, 5, 384, 384, device="meta")).features.shape == (1, 512, 12, 12)


def test_the_encoder_reads_what_the_slabs_are_and_the_classifier_what_the_encoder_gives():
    slabs, encoder, classifier = SlabConfig(), EncoderConfig(), ClassifierConfig()
    assert encoder.slices_per_slab == slabs.slices_per_slab
    assert classifier.feature_channels == encoder.feature_channels == 512
    assert classifier.grid == slabs.grid


def test_the_features_of_a_study_are_29_5_megabytes_in_float16():
    config = ClassifierConfig()
    values = SlabConfig().slab_count * config.feature_channels * config.grid**2
    assert values * 2 / 1e6 == pytest.approx(29.5, abs=0.05)


@pytest.mark.parametrize(("directions", "millions", "gmacs"), [("parallel", 6.2, 135), ("serial", 4.1, 89)])
def test_the_classifier_has_6_2_million_parameters_and_135_gmac_or_4_1_and_89_in_series(directions, millions, gmacs):
    network = classifier(directions)
    assert parameters(network) / 1e6 == pytest.approx(millions, abs=0.05)
    assert gmac(network, 1, 50, 512, 24, 24) == pytest.approx(gmacs, abs=0.5)


@pytest.mark.parametrize(("directions", "channels"), [("parallel", 192), ("serial", 96)])
def test_two_units_of_96_filters_halve_the_grid_from_24_over_12_to_6(directions, channels):
    network = classifier(directions)
    seen = []
    for unit in (network.unit1, network.unit2):
        unit.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
    assert network(torch.empty(2, 50, 512, 24, 24, device="meta")).shape == (2,)
    assert seen == [(50, channels, 24, 24), (50, channels, 12, 12)]
    assert network.fc.in_features == channels * 6 * 6


def test_kernels_are_3_by_3_and_dropout_is_a_fifth_of_the_channels_and_half_before_the_head():
    network = classifier("parallel")
    assert network.unit1.input_gates.kernel_size == (3, 3)
    assert network.unit1.state_gates["ascending"].kernel_size == (3, 3)
    assert (network.config.filters, network.config.channel_dropout, network.config.head_dropout) == (96, 0.2, 0.5)


def test_the_attention_loss_is_the_continuous_dice_loss():
    assert dataclasses.asdict(AttentionLoss()) == {"kind": "continuous_dice", "negatives": "smoothed"}
