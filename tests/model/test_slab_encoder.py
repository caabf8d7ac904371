import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pe_app.common.errors import InputError
from pe_app.model.slab_encoder import EncoderConfig, SlabEncoder, normalised

SMALL = EncoderConfig(width=8)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return SlabEncoder(SMALL)


@pytest.fixture
def slabs():
    return torch.rand(3, 5, 64, 48, generator=torch.Generator().manual_seed(1))


def grad_cam(encoder, slabs, score):
    """Grad-CAM as its source says it: gradients of the score by automatic differentiation, averaged over pixels."""
    encoded = encoder(slabs)
    target = encoded.logits[:, 1] - (encoded.logits[:, 0] if score == "difference" else 0)
    (gradient,) = torch.autograd.grad(target.sum(), encoded.features, create_graph=True)
    weights = gradient.mean((2, 3), keepdim=True)
    return (weights * encoded.features).sum(1).relu()


@pytest.mark.parametrize("score", ["difference", "positive_logit"])
@pytest.mark.parametrize("training", [True, False])
def test_closed_form_attention_agrees_with_double_back_propagation(slabs, score, training):
    torch.manual_seed(0)
    encoder = SlabEncoder(EncoderConfig(width=8, attention_score=score)).double().train(training)
    slabs = slabs.double()
    with torch.no_grad():
        encoder.fc.weight[1].abs_()  # features are not negative: no map is empty
    weighting = torch.randn(3, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    closed = encoder.attention_map(encoder(slabs).features)
    differentiated = grad_cam(encoder, slabs, score)
    assert (closed.amax((1, 2)) > 0).all()
    assert (closed - differentiated).abs().max() < 1e-12

    parameters = dict(encoder.named_parameters())
    ours = torch.autograd.grad((closed * weighting).sum(), parameters.values(), allow_unused=True)
    theirs = torch.autograd.grad((differentiated * weighting).sum(), parameters.values(), allow_unused=True)
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        if name == "fc.bias":  # no attention depends on it
            assert a is None
        else:
            assert (a - b).abs().max() < 1e-12, name


def test_attention_teaches_the_last_layer_too_and_detaching_its_weights_would_not(encoder, slabs):
    with torch.no_grad():
        encoder.fc.weight[1] = 0.1  # no map is empty
        features = encoder(slabs).features
    (gradient,) = torch.autograd.grad(encoder.attention_map(features).sum(), encoder.fc.weight)
    alive = encoder.attention_map(features) > 0
    expected = (features * alive[:, None]).sum((0, 2, 3)) / alive[0].numel()  # d sum(A) / d w_k, by hand
    assert expected.max() > 0
    torch.testing.assert_close(gradient, torch.stack([-expected, expected]))

    weight = encoder.fc.weight.detach()[1] - encoder.fc.weight.detach()[0]
    detached = torch.einsum("bkuv,k->buv", features.requires_grad_(), weight).relu()
    assert torch.autograd.grad(detached.sum(), encoder.fc.weight, allow_unused=True) == (None,)


def test_without_relu_the_attention_is_the_difference_of_the_logits(encoder, slabs):
    with torch.no_grad():
        encoder.fc.weight[1] = encoder.fc.weight[0] + encoder.fc.weight[1].abs()  # then ReLU changes nothing
        encoded = encoder(slabs)
        bias = encoder.fc.bias[1] - encoder.fc.bias[0]
        explained = encoder.attention_map(encoded.features).sum((1, 2)) + bias
    torch.testing.assert_close(explained, encoded.logits[:, 1] - encoded.logits[:, 0])


def test_the_two_scores_give_different_maps(slabs):
    torch.manual_seed(0)
    encoder = SlabEncoder(SMALL)
    literal = SlabEncoder(EncoderConfig(width=8, attention_score="positive_logit"))
    literal.load_state_dict(encoder.state_dict())
    features = encoder(slabs).features
    with torch.no_grad():
        encoder.fc.weight[1] = -encoder.fc.weight[1].abs()
        encoder.fc.weight[0] = encoder.fc.weight[1] - 1
        literal.fc.weight.copy_(encoder.fc.weight)
    # the positive logit lies below zero everywhere although the decision is "embolism"
    assert (literal.attention_map(features) == 0).all()
    assert (encoder.attention_map(features).amax((1, 2)) > 0).all()


def test_every_map_is_divided_by_its_own_maximum_and_an_empty_one_stays_empty():
    maps = torch.tensor([[[1.0, 4.0]], [[0.0, 0.0]], [[1e-6, 0.0]]])
    assert normalised(maps).tolist() == [[[0.25, 1.0]], [[0.0, 0.0]], [[1.0, 0.0]]]


def test_a_slab_has_one_cell_of_features_per_16_pixels(encoder, slabs):
    encoded = encoder(slabs)
    assert encoded.features.shape == (3, 64, 4, 3)
    assert encoded.logits.shape == (3, 2)
    assert (encoded.features >= 0).all()


def test_the_last_stage_is_the_only_difference_from_a_stock_resnet18():
    """Names and shapes of torchvision 0.20's resnet18, derived from its published architecture."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight": (64, 5, 7, 7), "fc.weight": (2, 512), "fc.bias": (2,)}
    expected |= {f"bn1.{part}": (64,) for part in norm}
    for stage, (inputs, filters) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], 1):
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            expected[f"{name}.conv1.weight"] = (filters, filters if block else inputs, 3, 3)
            expected[f"{name}.conv2.weight"] = (filters, filters, 3, 3)
            expected |= {f"{name}.bn{k}.{part}": (filters,) for k in (1, 2) for part in norm}
        if inputs != filters:
            expected[f"layer{stage}.0.downsample.0.weight"] = (filters, inputs, 1, 1)
            expected |= {f"layer{stage}.0.downsample.1.{part}": (filters,) for part in norm}
    with torch.device("meta"):
        encoder = SlabEncoder()
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert shapes == {k: () if k.endswith("num_batches_tracked") else v for k, v in expected.items()}
    strides = [stage[0].conv1.stride[0] for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)]
    assert strides == [1, 2, 2, 1]


def test_convolutions_start_as_he_initialised():
    torch.manual_seed(0)
    encoder = SlabEncoder(EncoderConfig(width=16))
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1), name


def test_a_slab_is_encoded_the_same_alone_and_in_a_batch_and_in_either_memory_layout(encoder, slabs):
    encoder.eval()
    with torch.inference_mode():
        together = encoder(slabs)
        alone = encoder(slabs[1:2])
        torch.testing.assert_close(together.features[1:2], alone.features, rtol=1e-4, atol=1e-5)
        last = encoder.to(memory_format=torch.channels_last)(slabs.to(memory_format=torch.channels_last))
        torch.testing.assert_close(together.features, last.features, rtol=1e-4, atol=1e-5)


def test_the_logits_are_the_head_of_the_mean_features(encoder, slabs):
    encoded = encoder(slabs)
    torch.testing.assert_close(encoded.logits, encoder.fc(encoded.features.mean((2, 3))))


def test_under_autocast_features_are_short_and_logits_and_maps_are_not(encoder, slabs):
    encoder.eval()
    exact = encoder(slabs)
    with torch.autocast("cpu", torch.bfloat16):
        encoded = encoder(slabs)
        maps = encoder.attention_map(encoded.features)
    assert (encoded.features.dtype, encoded.logits.dtype, maps.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(encoded.logits, exact.logits, rtol=0.05, atol=0.02)
    peak = exact.features.max().item()
    torch.testing.assert_close(encoded.features.float(), exact.features, rtol=0.05, atol=0.02 * peak)
    maps.sum().backward()
    assert encoder.conv1.weight.grad.isfinite().all()


def test_a_detection_does_not_round_the_hu_of_a_slab_and_training_may(encoder):
    """Two slabs of contrast medium that differ by 3 HU are one in bfloat16; the window is 1,524 HU wide."""
    hu = torch.tensor([296.0, 299.0])
    slabs = ((hu + 1024) / 1524)[:, None, None, None].expand(2, 5, 64, 48)
    assert slabs[0, 0, 0, 0].bfloat16() == slabs[1, 0, 0, 0].bfloat16()
    seen = []
    encoder.bn1.register_forward_hook(lambda _module, _images, stem: seen.append(stem))  # the ReLU works in place
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        encoder.eval()(slabs)
        encoder.train()(slabs)
    seen_by_a_detection, seen_in_training = seen
    exact = nn.functional.conv2d(slabs, encoder.conv1.weight, stride=2, padding=3)
    exact = exact.relu() / (1 + encoder.bn1.eps) ** 0.5  # what a fresh normalisation does in evaluation
    torch.testing.assert_close(seen_by_a_detection, exact)
    assert not torch.equal(seen_by_a_detection[0], seen_by_a_detection[1])
    assert torch.equal(seen_in_training[0], seen_in_training[1])


def imagenet_weights(width=8):
    """Weights as torchvision stores them: three colours, 1,000 classes."""
    torch.manual_seed(3)
    weights = SlabEncoder(EncoderConfig(slices_per_slab=3, width=width)).state_dict()
    weights["bn1.running_mean"] = torch.randn(width)
    return weights | {"fc.weight": torch.randn(1000, 8 * width), "fc.bias": torch.randn(1000)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_imagenet_weights_see_a_slab_of_equal_slices_as_a_grey_picture(tmp_path, encoder, suffix):
    weights = imagenet_weights()
    path = tmp_path / f"resnet18{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    head = encoder.fc.weight.clone()
    encoder.load_imagenet(path)

    stock = SlabEncoder(EncoderConfig(slices_per_slab=3, width=8)).eval()
    stock.load_state_dict({k: v for k, v in weights.items() if not k.startswith("fc.")}, strict=False)
    grey = torch.rand(1, 1, 32, 32)
    with torch.inference_mode():
        ours = encoder.eval()(grey.expand(1, 5, 32, 32)).features
        theirs = stock(grey.expand(1, 3, 32, 32)).features
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(encoder.fc.weight, head)


def test_weights_of_another_network_are_refused_by_name(tmp_path, encoder):
    path = tmp_path / "densenet.safetensors"
    save_file({"features.conv0.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"densenet.safetensors: .*bn1.bias and \d+ others of \d+ are missing"):
        encoder.load_imagenet(path)


def test_weights_of_another_width_are_refused_with_both_shapes(tmp_path, encoder):
    path = tmp_path / "wide.safetensors"
    save_file(imagenet_weights(width=16), path)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(InputError, match="width 8 needs"):
        encoder.load_imagenet(path)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


class Dangerous:
    def __reduce__(self):
        return (print, ("code in a weights file ran",))


def test_files_that_are_no_weights_are_refused_and_run_no_code(tmp_path, encoder, capsys):
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"\xff" * 64)
    text = tmp_path / "text.pth"
    text.write_text("not a zip")
    empty = tmp_path / "empty.pth"
    empty.touch()
    dangerous = tmp_path / "dangerous.pth"
    torch.save({"conv1.weight": Dangerous()}, dangerous)
    nested = tmp_path / "nested.pth"
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, nested)
    for path in (garbage, text, empty, dangerous, nested, tmp_path / "absent.pth", tmp_path / "absent.safetensors"):
        with pytest.raises(InputError, match=path.name):
            encoder.load_imagenet(path)
    assert capsys.readouterr().out == ""


def test_settings_without_meaning_are_refused():
    with pytest.raises(ValueError, match="width=0"):
        EncoderConfig(width=0)
    with pytest.raises(ValueError, match="'softmax'"):
        EncoderConfig(attention_score="softmax")


def test_densenet121_has_the_parameters_of_torchvisions_and_keeps_a_24_by_24_map():
    with torch.device("meta"):
        network = SlabEncoder(EncoderConfig(architecture="densenet121"))
        encoded = network(torch.empty(1, 5, 384, 384))
    stock_features, two_more_slices, head = 6_953_856, 2 * 64 * 7 * 7, 2 * 1024 + 2
    assert sum(weight.numel() for weight in network.parameters()) == stock_features + two_more_slices + head
    assert encoded.features.shape == (1, 1024, 24, 24)


def test_densenets_attention_is_grad_cam():
    torch.manual_seed(0)
    network = SlabEncoder(EncoderConfig(width=2, architecture="densenet121")).double().eval()
    features = network(torch.rand(2, 5, 64, 64, dtype=torch.float64)).features.detach().requires_grad_()
    logits = network.logits(features)
    (gradient,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), features)
    expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu()
    assert torch.allclose(network.attention_map(features), expected)


def test_the_strongest_cells_decide_and_grad_cam_by_autograd_agrees_with_the_closed_form():
    torch.manual_seed(0)
    config = EncoderConfig(slices_per_slab=3, width=4, strongest_cells=3)
    encoder = SlabEncoder(config).double().eval()
    features = torch.rand(2, 32, 6, 6, dtype=torch.float64, requires_grad=True)
    logits = encoder.logits(features)
    difference = logits[:, 1] - logits[:, 0]
    cells = torch.einsum("bchw,c->bhw", features, encoder.fc.weight[1] - encoder.fc.weight[0])
    cells = cells + encoder.fc.bias[1] - encoder.fc.bias[0]
    torch.testing.assert_close(difference, cells.flatten(1).topk(3).values.mean(1))
    (slope,) = torch.autograd.grad(difference.sum(), features)
    grad_cam = (slope.mean((2, 3), keepdim=True) * features).sum(1).relu()
    torch.testing.assert_close(encoder.attention_map(features), grad_cam)


def test_no_network_asks_fewer_cells_than_none():
    with pytest.raises(ValueError, match="strongest_cells"):
        EncoderConfig(strongest_cells=-1)
