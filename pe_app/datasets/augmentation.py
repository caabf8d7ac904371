"""Slabs changed at random while stage I learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pe_app.datasets.slabs import SlabItem
from pe_app.errors import InputError
from pe_app.slabs import ENCODER_STRIDE, SlabConfig


@dataclass(frozen=True)
class Augmentation:
    """How strongly slabs are changed at random where that is wanted; the paper (section 3.1) does not [ours].

    Attributes:
        flip: mirror left and right with probability 1/2.
        shift_cells: move in the plane by up to so many cells of the attention map (16 pixels, 11 mm) along rows and
            columns; whole cells, so that the target moves exactly. An embolism is never moved out of the slab.
        jitter_hu: add one offset of up to so many HU to a slab.
        window_cells: learn from square windows of so many cells of the attention map instead of whole slabs, 0 for
            whole ones. A window of a slab with embolism holds a part of it; one without is cut at the place of another
            slab's window, so that the place tells nothing. A quarter of the area costs a quarter of the time. The
            validation looks at windows, too, always the same ones.
    """

    flip: bool = True
    shift_cells: int = 2
    jitter_hu: float = 30.0
    window_cells: int = 0

    def __post_init__(self) -> None:
        if min(self.shift_cells, self.window_cells) < 0 or not 0 <= self.jitter_hu < float("inf"):
            raise InputError(f"augmentation: no strength may be negative, got {self}")


def augmented(
    items: SlabItem, augmentation: Augmentation, config: SlabConfig, generator: torch.Generator, together: int = 1
) -> SlabItem:
    """A batch of slabs with their targets changed at random, ``together`` consecutive ones in the same way."""
    slabs, targets = items.slab.clone(), items.target.clone()
    groups, cells = len(slabs) // together, augmentation.shift_cells
    if augmentation.flip:
        chosen = (torch.rand(groups, generator=generator) < 0.5).repeat_interleave(together)
        slabs[chosen], targets[chosen] = slabs[chosen].flip(-1), targets[chosen].flip(-1)
    if cells:
        moves = torch.randint(-cells, cells + 1, (groups, 2), generator=generator).tolist()
        for group, (rows, columns) in enumerate(moves):
            all_of_it = slice(group * together, (group + 1) * together)
            moved = _shifted(targets[all_of_it], rows, columns)
            if torch.equal(moved.flatten(1).any(1), targets[all_of_it].flatten(1).any(1)):
                targets[all_of_it] = moved
                slabs[all_of_it] = _shifted(slabs[all_of_it], rows * ENCODER_STRIDE, columns * ENCODER_STRIDE)
    if augmentation.jitter_hu:
        low, high = config.hu_window
        offset = (2 * torch.rand(groups, generator=generator) - 1) * augmentation.jitter_hu / (high - low)
        slabs = (slabs + offset.repeat_interleave(together)[:, None, None, None]).clamp(0, 1)
    if 0 < augmentation.window_cells < config.grid:
        slabs, targets = _windows(slabs, targets, augmentation.window_cells, generator, together)
    return items._replace(slab=slabs, target=targets)


def _windows(
    slabs: Tensor, targets: Tensor, cells: int, generator: torch.Generator, together: int
) -> tuple[Tensor, Tensor]:
    """Windows of ``cells`` cells: round a random cell of the target; elsewhere where a slab with a target has its.

    That is another one of the same group, or where there is none a random one of the batch.
    """
    free, filled = targets.shape[-1] - cells, targets.flatten(1).any(1)
    corners = torch.randint(0, free + 1, (len(targets), 2), generator=generator)
    for number in filled.nonzero()[:, 0].tolist():
        marked = targets[number].nonzero()
        chosen = marked[torch.randint(len(marked), (), generator=generator)]
        inside = torch.randint(0, cells, (2,), generator=generator)
        corners[number] = (chosen - inside).clamp(0, free)
    if filled.any():
        others = corners[filled]
        corners[~filled] = others[torch.randint(len(others), (int((~filled).sum()),), generator=generator)]
        for place in (~filled).nonzero()[:, 0].tolist():
            first = place - place % together
            mates = filled[first : first + together].nonzero()[:, 0]
            if len(mates):
                corners[place] = corners[first + int(mates[0])].clone()

    def cut(planes: Tensor, step: int) -> Tensor:
        side = cells * step
        return torch.stack(
            [
                plane[..., row : row + side, column : column + side]
                for plane, (row, column) in zip(planes, (corners * step).tolist(), strict=True)
            ]
        )

    return cut(slabs, ENCODER_STRIDE), cut(targets, 1)


def _shifted(planes: Tensor, rows: int, columns: int) -> Tensor:
    """Planes ``(..., rows, columns)`` moved down and to the right, air or nothing (0) moving in."""
    height, width = planes.shape[-2:]
    if abs(rows) >= height or abs(columns) >= width:
        return torch.zeros_like(planes)
    moved = torch.zeros_like(planes)
    kept = planes[..., max(-rows, 0) : height - max(rows, 0), max(-columns, 0) : width - max(columns, 0)]
    moved[..., max(rows, 0) : height + min(rows, 0), max(columns, 0) : width + min(columns, 0)] = kept
    return moved
