"""What stage I learns from besides the label: how well its attention agrees with the reader's mask.

Source: section 2.2 of the paper; [ours] marks what the paper leaves open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pe_app.model.slab_encoder import normalised

RARE = 5.0
"""Weight of a cell with embolism in ``cell_loss``: there are few of them."""


@dataclass(frozen=True)
class AttentionLoss:
    """Which attention loss is used. The defaults are the paper's unless marked [ours].

    Attributes:
        kind: of positive slabs: ``1 - continuous_dice``, ``1 - soft_dice``, or ``"mse"``, the mean squared error of
            the original GAIN-ext (Li et al. 2018, arXiv:1802.10171); or ``"cells"``, binary cross-entropy of the
            decision asked of every cell for itself (``cell_loss``), in slabs with and without embolism [ours].
        negatives: of slabs without embolism: ``"smoothed"``, the continuous Dice loss with smoothing 1 on the map that
            is not normalised [ours]; ``"mean"`` of that map; or ``"none"``, the literal reading of the formula.
    """

    kind: Literal["continuous_dice", "soft_dice", "mse", "cells"] = "continuous_dice"
    negatives: Literal["smoothed", "mean", "none"] = "smoothed"

    def __post_init__(self) -> None:
        if self.kind not in ("continuous_dice", "soft_dice", "mse", "cells"):
            raise ValueError(f"kind must be 'continuous_dice', 'soft_dice', 'mse' or 'cells', got {self.kind!r}")
        if self.negatives not in ("smoothed", "mean", "none"):
            raise ValueError(f"negatives must be 'smoothed', 'mean' or 'none', got {self.negatives!r}")


def attention_loss(
    maps: Tensor,
    masks: Tensor,
    labels: Tensor,
    settings: AttentionLoss = AttentionLoss(),
) -> Tensor:
    """Disagreement of every slab's attention with its mask, 0 at best.

    Positives: the map normalised by its own maximum against the mask; an empty map has loss 1 and no gradient.
    Negatives: the map as it is presses towards empty, ``1 - 1 / (sum(a) + 1)`` by default; their masks are not read.
    Normalised, a negative's map would keep its loss however weak it became. Where a part of a mask is not known, only
    the attention on cells that are known to be free counts, as in a negative; a mask of which nothing is known has loss
    0 and no gradient [ours].

    Args:
        maps: ``(batch, rows, columns)``, attention maps that are not normalised, from 0.
        masks: same shape: 1 embolism, 0 none, -1 not known.
        labels: ``(batch,)``, 1 for slabs with embolism, 0 for those without, -1 where not known.
        settings: kinds of loss.

    Returns:
        ``(batch,)``, float32 (float64 for float64).

    Raises:
        ValueError: if the shapes differ.
    """
    maps, masks = _checked(maps, masks)
    if labels.shape != maps.shape[:1]:
        raise ValueError(f"expected {len(maps)} labels, one a map, got shape {tuple(labels.shape)}")

    shape, unknown = normalised(maps), (masks < 0).flatten(1).any(1)
    free = (masks == 0) | (labels == 0)[:, None, None]
    outlines = masks.clamp(min=0)
    match settings.kind:
        case "continuous_dice":
            positive = 1 - continuous_dice(shape, outlines)
        case "soft_dice":
            positive = 1 - soft_dice(shape, outlines)
        case "mse":
            positive = (shape - outlines).square().mean((1, 2))
        case "cells":
            raise ValueError("cells are judged by their logits, not by a map: call cell_loss")

    match settings.negatives:
        case "smoothed":
            mass = (maps * free).sum((1, 2))
            negative = mass / (mass + 1)  # = 1 - 1 / (mass + 1), without cancellation
        case "mean":
            negative = (maps * free).mean((1, 2))
        case "none":
            negative = torch.zeros_like(positive)
    return torch.where((labels > 0) & ~unknown, positive, negative)


def cell_loss(logits: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of every cell whose truth is known, cells with embolism weighing ``RARE`` times as much.

    Args:
        logits: ``(batch, rows, columns)``, the decision's difference of each cell (``SlabEncoder.cell_logits``).
        masks: same shape: 1 embolism, 0 none, -1 not known.
        labels: ``(batch,)``, 1 for slabs with embolism, 0 for those without (every cell is then 0), -1 not known.

    Returns:
        ``(batch,)``, the weighted mean over a slab's known cells; 0 where none is known.
    """
    logits, masks = _checked(logits, masks)
    truth = torch.where((labels == 0)[:, None, None], torch.zeros_like(masks), masks)
    weight = torch.where(truth > 0, RARE, 1.0) * (truth >= 0)
    losses = F.binary_cross_entropy_with_logits(logits, truth.clamp(min=0), reduction="none")
    return (losses * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)


def continuous_dice(attention: Tensor, mask: Tensor, smooth: float = 0.0) -> Tensor:
    """Overlap of a soft attention map with a binary mask, 1 at best.

    ``cDC = (2 S + smooth) / (c M + A + smooth)`` with ``S = sum(a m)``, ``M = sum(m)``, ``A = sum(a)`` and
    ``c = S / sum(m [a > 0])``, or 1 where map and mask are disjoint. Without smoothing it does not change when the map
    is multiplied by a constant, and is 1 where both are empty (the limit of vanishing smoothing).

    Args:
        attention: ``(batch, rows, columns)``, from 0; 24 x 24 for a 384 x 384 slab.
        mask: same shape, 0 or 1; all zeros for a slab without embolism.
        smooth: added above and below; the formula of the source has none.

    Returns:
        ``(batch,)``, from 0 to 1; float32 (float64 for float64).

    Raises:
        ValueError: if the shapes differ.

    Source: Shamir et al. 2019, arXiv:1906.11031; L_CDC in equation (3) of the paper.
    """
    attention, mask = _checked(attention, mask)
    shared = (attention * mask).sum((1, 2))
    touched = (mask * (attention > 0)).sum((1, 2))
    factor = torch.where(touched > 0, shared / touched.clamp(min=1), 1.0)
    return _ratio(2 * shared + smooth, factor * mask.sum((1, 2)) + attention.sum((1, 2)) + smooth)


def soft_dice(attention: Tensor, mask: Tensor, smooth: float = 0.0) -> Tensor:
    """``(2 S + smooth) / (M + A + smooth)`` with the symbols of ``continuous_dice``; 1 only for a binary map.

    Source: Milletari et al. 2016, arXiv:1606.04797, with plain sums below.
    """
    attention, mask = _checked(attention, mask)
    total = mask.sum((1, 2)) + attention.sum((1, 2))
    return _ratio(2 * (attention * mask).sum((1, 2)) + smooth, total + smooth)


def _checked(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Maps and masks of one shape, in at least float32: a sum of 576 cells is too long for 8 or 11 bits."""
    if maps.ndim != 3 or maps.shape != masks.shape:
        raise ValueError(
            f"expected maps and masks of one shape (batch, rows, columns), got {tuple(maps.shape)} and "
            f"{tuple(masks.shape)}"
        )
    dtype = torch.promote_types(maps.dtype, torch.float32)
    return maps.to(dtype), masks.to(dtype)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """``above / below``, and 1 without gradient where both are 0."""
    return torch.where(below > 0, above, 1.0) / torch.where(below > 0, below, 1.0)
