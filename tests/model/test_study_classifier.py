import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pe_app.model.study_classifier import (
    POOLED_NUMBERS,
    ClassifierConfig,
    ConvLSTM,
    PooledClassifier,
    StudyClassifier,
)

SMALL = ClassifierConfig(feature_channels=6, grid=8, filters=4)
DIRECTIONS = ("ascending", "descending")


def small_lstm(directions=("ascending",), channels=3, filters=4, dropout=0.0):
    torch.manual_seed(0)
    lstm = ConvLSTM(channels, filters, directions, dropout).double()
    torch.nn.init.normal_(lstm.input_gates.bias)
    return lstm.eval()


def textbook_convlstm(sequence, kernel, bias, input_mask=None, state_mask=None):
    """Shi et al. 2015 without peepholes: at every position one convolution of input and state together."""
    filters = len(bias) // 4
    state = cell = torch.zeros(len(sequence), filters, *sequence.shape[3:], dtype=sequence.dtype)
    states = []
    for position in range(sequence.shape[1]):
        x = sequence[:, position] if input_mask is None else sequence[:, position] * input_mask
        h = state if state_mask is None else state * state_mask
        gates = F.conv2d(torch.cat([x, h], 1), kernel, bias, padding=1)
        i, f, o, g = (gates[:, k * filters : (k + 1) * filters] for k in range(4))
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        state = torch.sigmoid(o) * torch.tanh(cell)
        states.append(state)
    return torch.stack(states, 1)


def weights_of(lstm, direction):
    """Kernel over input and state, and bias, of one direction."""
    k = lstm.directions.index(direction)
    n = len(lstm.directions)
    kernel = torch.cat([lstm.input_gates.weight.chunk(n)[k], lstm.state_gates[direction].weight], 1)
    return kernel, lstm.input_gates.bias.chunk(n)[k]


def normalised(lstm, states):
    return lstm.norm(states.flatten(0, 1)).view_as(states)


def random_sequence(batch=2, positions=5, channels=3, grid=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, positions, channels, grid, grid, dtype=torch.float64, generator=generator)


def test_one_direction_is_the_textbook_convlstm():
    lstm, sequence = small_lstm(), random_sequence()
    expected = normalised(lstm, textbook_convlstm(sequence, *weights_of(lstm, "ascending")))
    torch.testing.assert_close(lstm(sequence), expected, rtol=0, atol=1e-12)


def test_both_directions_are_two_textbook_convlstms_side_by_side():
    lstm, sequence = small_lstm(DIRECTIONS), random_sequence()
    up = textbook_convlstm(sequence, *weights_of(lstm, "ascending"))
    down = textbook_convlstm(sequence.flip(1), *weights_of(lstm, "descending")).flip(1)
    expected = normalised(lstm, torch.cat([up, down], 2))
    torch.testing.assert_close(lstm(sequence), expected, rtol=0, atol=1e-12)


def test_gradients_agree_with_the_textbook_convlstm():
    lstm, sequence = small_lstm(DIRECTIONS), random_sequence().requires_grad_()
    up = textbook_convlstm(sequence, *weights_of(lstm, "ascending"))
    down = textbook_convlstm(sequence.flip(1), *weights_of(lstm, "descending")).flip(1)
    wanted = (sequence, *lstm.parameters())
    theirs = torch.autograd.grad(normalised(lstm, torch.cat([up, down], 2)).square().sum(), wanted)
    ours = torch.autograd.grad(lstm(sequence).square().sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_agree_with_finite_differences():
    lstm = small_lstm(DIRECTIONS, channels=1, filters=1)
    sequence = random_sequence(1, 3, 1, 2).requires_grad_()
    assert torch.autograd.gradcheck(lstm, sequence)
    parameters = dict(lstm.named_parameters())
    assert torch.autograd.gradcheck(
        lambda *values: torch.func.functional_call(lstm, dict(zip(parameters, values, strict=True)), sequence.detach()),
        tuple(parameters.values()),
    )


def test_a_descending_convlstm_reads_the_slabs_from_the_head_to_the_feet():
    up, down = small_lstm(("ascending",)), small_lstm(("descending",))
    down.state_gates["descending"].load_state_dict(up.state_gates["ascending"].state_dict())
    sequence = random_sequence()
    torch.testing.assert_close(down(sequence.flip(1)).flip(1), up(sequence))
    changed = sequence.clone()
    changed[:, 2] += 1
    differs = [(a(changed) != a(sequence)).flatten(2).any(2).all(0).tolist() for a in (up, down)]
    assert differs == [[False, False, True, True, True], [True, True, True, False, False]]


def test_at_first_the_forget_gates_have_bias_1_and_all_others_0():
    torch.manual_seed(0)
    lstm = ConvLSTM(3, 4, DIRECTIONS, 0.2)
    assert lstm.input_gates.bias.view(2, 4, 4).tolist() == [[[0.0] * 4, [1.0] * 4, [0.0] * 4, [0.0] * 4]] * 2


def test_dropout_takes_whole_channels_with_one_choice_for_the_whole_sequence(monkeypatch):
    lstm = small_lstm(channels=6, dropout=0.5)
    sequence = random_sequence(channels=6)
    drawn = []
    drop = F.dropout
    monkeypatch.setattr(F, "dropout", lambda *args, **kwargs: drawn.append(drop(*args, **kwargs)) or drawn[-1])
    lstm.train()
    lstm.norm.eval()
    torch.manual_seed(1)
    states = lstm(sequence)

    inputs, recurrent = drawn
    assert [tuple(mask.shape) for mask in drawn] == [(2, 6, 1, 1), (2, 4, 1, 1)]
    assert set(inputs.flatten().tolist()) == set(recurrent.flatten().tolist()) == {0.0, 2.0}
    expected = textbook_convlstm(sequence, *weights_of(lstm, "ascending"), inputs, recurrent)
    torch.testing.assert_close(states, normalised(lstm, expected), rtol=0, atol=1e-12)


def test_a_dropped_channel_is_dropped_at_every_position():
    lstm = small_lstm(channels=6, dropout=0.5).train()
    sequence = random_sequence(1, 5, 6).requires_grad_()
    torch.manual_seed(1)
    (gradient,) = torch.autograd.grad(lstm(sequence).square().sum(), sequence)
    silent = (gradient == 0).flatten(3).all(3)[0]  # (positions, channels)
    assert (silent == silent[0]).all()
    assert 0 < silent[0].sum() < 6


@pytest.mark.parametrize("part", ["channel_dropout", "head_dropout"])
def test_dropout_changes_the_logit_in_training_and_not_in_evaluation(part):
    torch.manual_seed(0)
    rates = {"channel_dropout": 0.0, "head_dropout": 0.0} | {part: 0.5}
    classifier = StudyClassifier(ClassifierConfig(feature_channels=6, grid=8, filters=4, **rates))
    features = torch.rand(2, 3, 6, 8, 8)
    assert not torch.equal(classifier(features), classifier(features))
    classifier.eval()
    assert torch.equal(classifier(features), classifier(features))


def test_dropout_keeps_the_mean_of_the_input():
    torch.manual_seed(0)
    lstm = ConvLSTM(1, 1, ("ascending",), 0.2)
    masks = lstm._channel_mask(torch.zeros(1), 20_000)
    assert masks.mean().item() == pytest.approx(1, abs=0.02)
    assert (masks == 0).float().mean().item() == pytest.approx(0.2, abs=0.02)


def textbook_classifier(classifier, features):
    """Section 2.3 of the paper, layer by layer, for evaluation."""
    x = features
    for unit in (classifier.unit1, classifier.unit2):
        for lstm in [unit] if isinstance(unit, ConvLSTM) else list(unit):
            states = []
            for direction in lstm.directions:
                way = (lambda s: s) if direction == "ascending" else (lambda s: s.flip(1))
                states.append(way(textbook_convlstm(way(x), *weights_of(lstm, direction))))
            x = normalised(lstm, torch.cat(states, 2))
        rows = [x[..., k::2, :] for k in (0, 1)]
        x = torch.stack([half[..., k::2] for half, k in itertools.product(rows, (0, 1))]).amax(0)
    pooled = x.mean(1).flatten(1)  # over the slabs only: the head sees where
    return pooled @ classifier.fc.weight[0] + classifier.fc.bias


@pytest.mark.parametrize("directions", ["parallel", "serial"])
def test_the_classifier_is_the_paper_layer_by_layer(directions):
    torch.manual_seed(0)
    config = ClassifierConfig(feature_channels=6, grid=8, filters=4, directions=directions)
    classifier = StudyClassifier(config).double().eval()
    features = random_sequence(2, 5, 6, 8)
    logits = classifier(features)
    assert logits.shape == (2,)
    torch.testing.assert_close(logits, textbook_classifier(classifier, features), rtol=0, atol=1e-12)


@pytest.mark.parametrize("directions", ["parallel", "serial"])
def test_the_order_of_the_slabs_matters(directions):
    torch.manual_seed(0)
    config = ClassifierConfig(feature_channels=6, grid=8, filters=4, directions=directions)
    classifier = StudyClassifier(config).eval()
    features = torch.rand(2, 5, 6, 8, 8)
    assert not torch.allclose(classifier(features), classifier(features.flip(1)), atol=1e-6)


def test_every_parameter_learns():
    torch.manual_seed(0)
    classifier = StudyClassifier(SMALL)
    loss = F.binary_cross_entropy_with_logits(classifier(torch.rand(2, 3, 6, 8, 8)), torch.tensor([0.0, 1.0]))
    loss.backward()
    for name, parameter in classifier.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def study_of_cells(amount: int, weight: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Features of a study with so many cells of evidence 4, ``(10, 6, 8, 8)``, in two slabs in a row."""
    features = torch.zeros(10, 6, 8, 8)
    for place in torch.randperm(9 * 64, generator=draw)[:amount].tolist():
        for slab in (place // 64, place // 64 + 1):
            features[slab, :, place // 8 % 8, place % 8] = 4 * weight / (weight @ weight)
    return features


def pooled_classifier(weight: torch.Tensor, bias: float = 0.0) -> PooledClassifier:
    classifier = PooledClassifier(ClassifierConfig(6, 8, kind="pooled"))
    classifier.cell_weight.copy_(weight)
    classifier.cell_bias.fill_(bias)
    return classifier


def test_the_numbers_of_a_pooled_classifier_are_those_of_numpy():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, generator=draw)
    features = torch.randn(2, 10, 6, 8, 8, generator=draw)
    numbers = pooled_classifier(weight, -1.0).numbers(features).numpy()
    cells = np.einsum("bschw,c->bshw", features.numpy(), weight.numpy()) - 1
    for found, study in zip(numbers, cells, strict=True):
        ordered = np.sort(study.ravel())[::-1]
        padded = np.pad(study, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
        neighbours = [(slab, other) for slab in range(10) for other in (slab - 1, slab + 1) if 0 <= other < 10]
        lasting = max(
            min(study[slab, row, column], padded[other, row : row + 3, column : column + 3].max())
            for slab, other in neighbours
            for row, column in np.ndindex(8, 8)
        )
        slabs = np.sort(study.reshape(10, -1).max(1))[-5:].mean()
        expected = [ordered[0], ordered[:5].mean(), ordered[:50].mean(), slabs, lasting, np.log1p((study > 0).sum())]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_pooled_classifier_is_the_logistic_regression_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.linear_model")
    draw = np.random.default_rng(0)
    labels = draw.random(60) < 0.4
    numbers = draw.normal(size=(60, len(POOLED_NUMBERS))) * 3 + labels[:, None] * draw.normal(size=6) + 5
    classifier = PooledClassifier(ClassifierConfig(6, 8, kind="pooled")).double()
    classifier.fit(torch.from_numpy(numbers), torch.from_numpy(labels.astype(float)), ridge=1.0)
    standardised = (numbers - numbers.mean(0)) / numbers.std(0, ddof=1)
    theirs = sklearn.LogisticRegression(C=1.0, class_weight="balanced", tol=1e-10, max_iter=10000)
    theirs.fit(standardised, labels)
    np.testing.assert_allclose(classifier.fc.weight.detach()[0], theirs.coef_[0], atol=1e-4)
    assert float(classifier.fc.bias) == pytest.approx(float(theirs.intercept_[0]), abs=1e-4)


def test_a_pooled_classifier_ranks_studies_by_their_evidence_after_a_few_of_them():
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(6, generator=draw)
    classifier = pooled_classifier(weight, -2.0)
    amounts = [0, 0, 0, 0, 1, 2, 3, 5]
    studies = torch.stack([study_of_cells(amount, weight, draw) for amount in amounts])
    studies += 0.05 * torch.randn(studies.shape, generator=draw)
    classifier.fit(classifier.numbers(studies), torch.tensor([float(amount > 0) for amount in amounts]))
    fresh = torch.stack([study_of_cells(amount, weight, draw) for amount in (0, 1, 8)])
    none, one, many = classifier(fresh).tolist()
    assert none < 0 < one < many


def test_cached_float16_features_are_read_as_they_are():
    torch.manual_seed(0)
    classifier = StudyClassifier(SMALL).eval()
    features = torch.rand(2, 3, 6, 8, 8).half()
    assert torch.equal(classifier(features), classifier(features.float()))


def test_under_autocast_the_logit_stays_near_float32_over_50_slabs_and_learns():
    torch.manual_seed(0)
    classifier = StudyClassifier(SMALL).eval()
    features = torch.rand(4, 50, 6, 8, 8)
    exact = classifier(features)
    with torch.autocast("cpu", torch.bfloat16):
        short = classifier(features)
    assert short.dtype == torch.float32
    torch.testing.assert_close(short, exact, rtol=0.02, atol=0.02)
    short.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in classifier.parameters())


def test_a_grid_that_cannot_be_halved_twice_is_refused():
    with pytest.raises(ValueError, match=r"halved twice.*grid=6"):
        ClassifierConfig(grid=6)
    with pytest.raises(ValueError, match="'both'"):
        ClassifierConfig(directions="both")
