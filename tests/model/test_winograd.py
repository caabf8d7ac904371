"""Convolution by points against torch's direct one, in double precision, and against what it is meant to save."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pe_app.model import winograd
from pe_app.model.slab_encoder import EncoderConfig, SlabEncoder
from pe_app.model.winograd import Conv3x3, convolve


@pytest.fixture
def small(monkeypatch):
    """By points also for the few channels and tiles of a test."""
    monkeypatch.setattr(winograd, "FEWEST_PRODUCTS", dict.fromkeys((torch.float32, torch.float64, torch.bfloat16), 0))
    monkeypatch.setattr(winograd, "FEWEST_TILES", 0)


def made(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    filters=st.integers(1, 4),
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    at_once=st.integers(1, 12),
)
@settings(max_examples=60, deadline=None)
def test_every_size_gives_what_a_direct_convolution_gives(batch, channels, filters, rows, columns, at_once):
    images, kernel = made(batch, channels, rows, columns), made(filters, channels, 3, 3, seed=1)
    former, winograd.TILES_AT_ONCE = winograd.TILES_AT_ONCE, at_once
    try:
        found = convolve(images, kernel)
    finally:
        winograd.TILES_AT_ONCE = former
    torch.testing.assert_close(found, F.conv2d(images, kernel, padding=1), rtol=0, atol=1e-11)
    assert found.is_contiguous(memory_format=torch.channels_last) or 1 in found.shape


@pytest.mark.parametrize("at_once", [1, 320])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_both_slopes_are_those_of_automatic_differentiation(monkeypatch, at_once, memory):
    monkeypatch.setattr(winograd, "TILES_AT_ONCE", at_once)
    slopes = []
    for way in (convolve, lambda images, kernel: F.conv2d(images, kernel, padding=1)):
        images = made(3, 4, 13, 12).to(memory_format=memory).requires_grad_()
        kernel = made(5, 4, 3, 3, seed=1).requires_grad_()
        (way(images, kernel) * made(3, 5, 13, 12, seed=2)).sum().backward()
        slopes.append((images.grad, kernel.grad))
    for found, expected in zip(*slopes, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_only_the_slopes_that_are_asked_for_are_computed():
    images, kernel = made(1, 2, 6, 6), made(3, 2, 3, 3)
    learned = convolve(images, kernel.requires_grad_())
    learned.sum().backward()
    assert images.grad is None
    seen = convolve(images.requires_grad_(), kernel.detach())
    (slope,) = torch.autograd.grad(seen.sum(), images)
    torch.testing.assert_close(slope, torch.autograd.grad(F.conv2d(images, kernel, padding=1).sum(), images)[0])


def test_a_second_derivative_is_refused_and_not_wrong():
    images, kernel = made(1, 1, 6, 6).requires_grad_(), made(1, 1, 3, 3)
    (slope,) = torch.autograd.grad((convolve(images, kernel) ** 2).sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_float32_by_points_is_a_hundred_times_nearer_than_bfloat16():
    images = made(4, 256, 24, 24).relu()
    kernel = made(256, 256, 3, 3, seed=1) * (2 / (9 * 256)) ** 0.5
    exact = F.conv2d(images, kernel, padding=1)
    by_points = (convolve(images.float(), kernel.float()) - exact).abs().max()
    short = (F.conv2d(images.bfloat16(), kernel.bfloat16(), padding=1) - exact).abs().max()
    assert by_points < 1e-4 * exact.std()
    assert 100 * by_points < short


def test_under_autocast_it_stays_float32(small):
    torch.manual_seed(0)
    conv, images = Conv3x3(3, 4), torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = conv(images.bfloat16())
        found.sum().backward()
        conv.by_points = False
        assert conv(images).dtype == torch.bfloat16
    assert found.dtype == conv.weight.grad.dtype == torch.float32
    direct = F.conv2d(images.bfloat16().float(), conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(found, direct)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_torchs_layer(small, bias):
    torch.manual_seed(0)
    conv, direct = Conv3x3(3, 4, bias=bias), nn.Conv2d(3, 4, 3, padding=1, bias=bias)
    direct.load_state_dict(conv.state_dict())
    images = torch.rand(2, 3, 7, 9)
    torch.testing.assert_close(conv(images), direct(images))


def test_few_channels_few_tiles_and_other_formats_are_convolved_directly(monkeypatch):
    used = []
    monkeypatch.setattr(winograd, "convolve", lambda images, kernel: used.append(1) or F.conv2d(images, kernel))
    with torch.inference_mode():
        Conv3x3(64, 64)(torch.empty(16, 64, 24, 24))  # carrying over costs more
        Conv3x3(512, 512)(torch.empty(2, 512, 24, 24))
        Conv3x3(256, 256).double()(torch.empty(4, 256, 24, 24, dtype=torch.float64))
        with torch.autocast("cpu", torch.bfloat16):
            Conv3x3(256, 256)(torch.empty(4, 256, 24, 24))  # bfloat16 is as fast
        assert not used
        Conv3x3(256, 256)(torch.empty(4, 256, 24, 24))
        with torch.autocast("cpu", torch.bfloat16):
            Conv3x3(512, 512)(torch.empty(4, 512, 24, 24))
    assert len(used) == 2


def test_nearly_a_fifth_of_the_products_is_needed():
    """324 / 64 of a tile are saved, less what carrying tiles and kernel over takes: for the encoder's last layers."""
    images, kernel = torch.rand(10, 512, 24, 24), torch.rand(512, 512, 3, 3)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        convolve(images, kernel)
    direct = 2 * 9 * 512 * 512 * 10 * 24 * 24
    assert 4 < direct / counter.get_total_flops() < 324 / 64


def test_the_encoder_learns_the_same_either_way(small):
    """A step of training of the whole network, its slopes and running statistics."""
    networks = []
    for by_points in (True, False):
        torch.manual_seed(0)
        encoder = SlabEncoder(EncoderConfig(width=4)).double()
        winograd.choose(encoder, by_points=by_points)
        encoded = encoder(made(2, 5, 64, 64))
        (encoded.logits[:, 1].sum() + encoder.attention_map(encoded.features).square().sum()).backward()
        networks.append(encoder)
    for (name, found), expected in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-8, atol=1e-10, msg=name)
    for found, expected in zip(networks[0].buffers(), networks[1].buffers(), strict=True):
        torch.testing.assert_close(found, expected)
