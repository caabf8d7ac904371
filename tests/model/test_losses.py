import itertools
import math

import pytest
import torch

from pe_app.model.losses import AttentionLoss, attention_loss, cell_loss, continuous_dice, soft_dice

KINDS = ("continuous_dice", "soft_dice", "mse")
NEGATIVES = ("smoothed", "mean", "none")


def maps_and_masks(seed=0, batch=4, grid=6, dtype=torch.float64):
    """Maps after ReLU, about half of their cells 0, and masks that overlap them in part."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(batch, grid, grid, generator=generator, dtype=dtype).relu()
    masks = (torch.rand(batch, grid, grid, generator=generator) < 0.3).to(dtype)
    return maps, masks


def looped_continuous_dice(attention, mask):
    """Shamir et al. 2019, formula by formula."""
    shared = size_mask = size_map = touched = 0.0
    for row, column in itertools.product(*map(range, attention.shape)):
        a, m = attention[row, column].item(), mask[row, column].item()
        shared += a * m
        size_mask += m
        size_map += a
        touched += m * (1 if a > 0 else 0)
    c = shared / touched if touched > 0 else 1
    return 2 * shared / (c * size_mask + size_map)


@pytest.mark.parametrize("seed", range(5))
def test_continuous_dice_is_the_formula_of_its_source(seed):
    maps, masks = maps_and_masks(seed)
    expected = [looped_continuous_dice(a, m) for a, m in zip(maps, masks, strict=True)]
    assert continuous_dice(maps, masks).tolist() == pytest.approx(expected, abs=1e-14)


def test_continuous_dice_depends_only_on_the_share_touched_and_on_outside_over_inside():
    maps, masks = maps_and_masks()
    inside, outside = (maps * masks).sum((1, 2)), (maps * (1 - masks)).sum((1, 2))
    touched = (masks * (maps > 0)).sum((1, 2))
    expected = 2 / (masks.sum((1, 2)) / touched + 1 + outside / inside)
    torch.testing.assert_close(continuous_dice(maps, masks), expected, rtol=0, atol=1e-14)


def test_continuous_dice_of_a_binary_map_is_the_dice_coefficient():
    maps, masks = maps_and_masks()
    binary = (maps > 0).double()
    dice = 2 * (binary * masks).sum((1, 2)) / (binary.sum((1, 2)) + masks.sum((1, 2)))
    torch.testing.assert_close(continuous_dice(binary, masks), dice, rtol=0, atol=1e-14)
    torch.testing.assert_close(soft_dice(binary, masks), dice, rtol=0, atol=1e-14)


@pytest.mark.parametrize("factor", [1e-6, 0.3, 7.0, 1e6])
def test_continuous_dice_does_not_change_when_the_map_is_multiplied(factor):
    maps, masks = maps_and_masks()
    torch.testing.assert_close(continuous_dice(factor * maps, masks), continuous_dice(maps, masks))


def test_a_constant_map_on_exactly_the_mask_has_continuous_dice_1_and_soft_dice_below():
    _, masks = maps_and_masks()
    assert continuous_dice(0.2 * masks, masks).tolist() == pytest.approx([1.0] * 4)
    assert soft_dice(0.2 * masks, masks).tolist() == pytest.approx([2 * 0.2 / (1 + 0.2)] * 4)


def test_disjoint_map_and_mask_have_dice_0_and_two_empty_ones_agree():
    maps = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]], [[0.5, 0.0]], [[0.0, 0.0]]])
    masks = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    for dice in (continuous_dice, soft_dice):
        assert dice(maps, masks).tolist() == [0.0, 0.0, 0.0, 1.0]


def test_soft_dice_is_its_formula():
    maps, masks = maps_and_masks()
    expected = [
        (2 * sum(a * m for a, m in pairs) + 1) / (sum(a for a, _ in pairs) + sum(m for _, m in pairs) + 1)
        for pairs in (
            list(zip(a.flatten().tolist(), m.flatten().tolist(), strict=True)) for a, m in zip(maps, masks, strict=True)
        )
    ]
    assert soft_dice(maps, masks, 1.0).tolist() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("dice", [continuous_dice, soft_dice])
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_dice_gradients_agree_with_finite_differences(dice, smooth):
    maps, masks = maps_and_masks()
    positive = (maps + 0.1).requires_grad_()  # away from the kink at 0
    assert torch.autograd.gradcheck(lambda a: dice(a, masks, smooth), positive)


def test_the_gradient_pushes_mass_from_outside_the_mask_to_inside_and_ignores_empty_cells():
    before_relu = torch.randn(1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before_relu.requires_grad_()
    masks = torch.zeros(1, 6, 6, dtype=torch.float64)
    masks[0, 2:5, 1:4] = 1
    maps = before_relu.relu()
    loss = attention_loss(maps, masks, torch.ones(1))
    (gradient,) = torch.autograd.grad(loss.sum(), before_relu)

    alive, inside = maps > 0, masks > 0
    mass_in, mass_out = maps[inside].sum(), maps[~inside].sum()
    denominator = masks.sum() / (alive & inside).sum() + 1 + mass_out / mass_in
    # d/da of 1 - 2 / denominator: the same for all living cells inside, and for all outside
    assert gradient[alive & ~inside] == pytest.approx((2 / denominator**2 / mass_in).item())
    assert gradient[alive & inside] == pytest.approx((-2 / denominator**2 * mass_out / mass_in**2).item())
    assert (gradient[~alive] == 0).all()


def test_normalising_changes_neither_loss_nor_gradient_of_a_positive():
    maps, masks = maps_and_masks()
    maps.requires_grad_()
    raw = 1 - continuous_dice(maps, masks)
    loss = attention_loss(maps, masks, torch.ones(4))
    torch.testing.assert_close(loss, raw, rtol=0, atol=1e-14)
    gradients = [torch.autograd.grad(value.sum(), maps)[0] for value in (loss, raw)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


def test_positives_are_compared_with_the_map_divided_by_its_maximum():
    maps, masks = maps_and_masks()
    divided = torch.stack([a / a.max() for a in maps])
    soft = attention_loss(maps, masks, torch.ones(4), AttentionLoss("soft_dice"))
    torch.testing.assert_close(soft, 1 - soft_dice(divided, masks))
    squared = attention_loss(maps, masks, torch.ones(4), AttentionLoss("mse"))
    torch.testing.assert_close(squared, torch.stack([x.square().mean() for x in divided - masks]))


def test_a_negative_costs_1_minus_1_over_its_mass_plus_1():
    maps, masks = maps_and_masks()
    loss = attention_loss(maps, torch.zeros_like(masks), torch.zeros(4))
    assert loss.tolist() == pytest.approx([1 - 1 / (a.sum().item() + 1) for a in maps])
    torch.testing.assert_close(loss, 1 - continuous_dice(maps, torch.zeros_like(maps), 1.0))


def test_an_empty_map_costs_a_negative_nothing_and_a_positive_1():
    empty = torch.zeros(2, 4, 4)
    masks = torch.zeros(2, 4, 4)
    masks[1, 1, 1] = 1
    assert attention_loss(empty, masks, torch.tensor([0, 1])).tolist() == [0.0, 1.0]


def test_a_weaker_map_costs_a_negative_less_by_default_and_with_the_mean():
    maps, _ = maps_and_masks()
    for negatives in ("smoothed", "mean"):
        losses = [
            attention_loss(factor * maps, maps, torch.zeros(4), AttentionLoss(negatives=negatives))
            for factor in (0.1, 1.0, 10.0)
        ]
        assert (losses[0] < losses[1]).all()
        assert (losses[1] < losses[2]).all()


def test_negatives_can_be_pressed_by_their_mean_or_left_alone():
    maps, masks = maps_and_masks()
    mean = attention_loss(maps, masks, torch.zeros(4), AttentionLoss(negatives="mean"))
    assert mean.tolist() == pytest.approx([sum(a.flatten().tolist()) / 36 for a in maps])
    assert attention_loss(maps, masks, torch.zeros(4), AttentionLoss(negatives="none")).tolist() == [0.0] * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_where_nothing_is_outlined_attention_costs_nothing_and_has_no_gradient(kind, negatives):
    maps, masks = maps_and_masks()
    maps.requires_grad_()
    losses = attention_loss(
        maps, torch.full_like(masks, -1), torch.tensor([1, 1, -1, 1]), AttentionLoss(kind, negatives)
    )
    assert losses.tolist() == [0, 0, 0, 0]
    losses.sum().backward()
    assert not maps.grad.any()


def test_where_a_part_is_known_to_be_free_only_the_attention_there_costs():
    maps, masks = maps_and_masks()
    masks = torch.full_like(masks, -1)
    masks[:, 1:3, 2:4] = 0
    maps.requires_grad_()
    losses = attention_loss(maps, masks, torch.tensor([1, -1, 1, -1]))
    mass = maps[:, 1:3, 2:4].sum((1, 2))
    torch.testing.assert_close(losses, 1 - 1 / (mass + 1))
    losses.sum().backward()
    inside = torch.zeros_like(masks, dtype=torch.bool)
    inside[:, 1:3, 2:4] = True
    assert (maps.grad[inside] > 0).all()
    assert not maps.grad[~inside].any()


def test_every_slab_of_a_batch_has_its_own_loss():
    maps, masks = maps_and_masks()
    labels = torch.tensor([1, 0, 1, 0])
    together = attention_loss(maps, masks, labels)
    alone = [attention_loss(maps[k : k + 1], masks[k : k + 1], labels[k : k + 1]).item() for k in range(4)]
    assert together.tolist() == pytest.approx(alone, abs=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_finite_for_empty_maps_empty_masks_and_short_floats(kind, negatives, dtype):
    maps, masks = maps_and_masks(batch=8, grid=24, dtype=torch.float32)
    maps, masks = maps.to(dtype), masks.to(dtype)
    maps[:2] = 0
    masks[::2] = 0
    maps.requires_grad_()
    for labels in (torch.zeros(8), torch.ones(8), torch.arange(8) % 2):
        loss = attention_loss(maps, masks, labels, AttentionLoss(kind, negatives))
        (gradient,) = torch.autograd.grad(loss.sum(), maps)
        assert loss.dtype == torch.float32
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


def test_a_bfloat16_map_is_summed_in_float32():
    maps = torch.full((1, 24, 24), 1.0, dtype=torch.bfloat16)  # a sum of 576 ones ends at 256 in 8 bits
    loss = attention_loss(maps, torch.zeros_like(maps), torch.zeros(1))
    assert loss.item() == pytest.approx(576 / 577, rel=1e-6)
    assert not math.isclose(loss.item(), 256 / 257, rel_tol=1e-4)


def test_shapes_that_differ_are_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match=r"\(2, 4, 4\) and \(2, 4, 5\)"):
        continuous_dice(torch.zeros(2, 4, 4), torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match="2 labels"):
        attention_loss(torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), torch.zeros(3))


def test_unknown_kinds_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'mse' or 'cells', got 'dice'"):
        AttentionLoss(kind="dice")
    with pytest.raises(ValueError, match="'mean' or 'none', got 'zero'"):
        AttentionLoss(negatives="zero")


def test_cells_are_judged_one_by_one_where_their_truth_is_known():
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 2, dtype=torch.float64)
    masks = torch.tensor([[[1, 0], [-1, 0]], [[1, 1], [0, -1]], [[-1, -1], [-1, -1]]], dtype=torch.float64)
    found = cell_loss(logits, masks, torch.tensor([1, 0, -1]))
    probability = torch.sigmoid(logits)
    first = [(5.0, probability[0, 0, 0]), (1.0, 1 - probability[0, 0, 1]), (1.0, 1 - probability[0, 1, 1])]
    expected = sum(-weight * torch.log(p) for weight, p in first) / 7
    assert float(found[0]) == pytest.approx(float(expected))
    assert float(found[1]) == pytest.approx(float(-torch.log(1 - probability[1]).mean()))  # a negative slab: all free
    assert float(found[2]) == 0.0


def test_cells_have_no_loss_of_maps():
    with pytest.raises(ValueError, match="cell_loss"):
        attention_loss(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), torch.ones(1), AttentionLoss("cells"))
