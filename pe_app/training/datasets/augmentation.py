"""Slabs changed at random while stage I learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pe_app.common import distributed
from pe_app.common.errors import InputError
from pe_app.ct.slabs import ENCODER_STRIDE, SlabConfig
from pe_app.training.datasets.slabs import SlabItem


@dataclass(frozen=True)
class Augmentation:
    """How strongly slabs are changed at random where that is wanted; the paper (section 3.1) does not [ours].

    Attributes:
        flip: mirror left and right with probability 1/2.
        shift_cells: move in the plane by up to this many cells of the attention map (16 pixels, 11 mm) along rows and
            columns; whole cells, so that the target moves exactly. An embolism is never moved out of the slab, so slabs
            with one that is not outlined stay.
        jitter_hu: add one offset of up to this many HU to a slab.
        window_cells: learn from square windows of this many cells of the attention map instead of complete slabs, 0
            for complete ones. A window of a slab with embolism holds a part of it; one without is cut at the place of
            another slab's window, so that its place carries no information. A quarter of the area costs a quarter of
            the time. The validation uses windows, too, always the same ones.
    """

    flip: bool = True
    shift_cells: int = 2
    jitter_hu: float = 30.0
    window_cells: int = 0

    def __post_init__(self) -> None:
        if min(self.shift_cells, self.window_cells) < 0 or not 0 <= self.jitter_hu < float("inf"):
            raise InputError(f"augmentation: no strength may be negative, got {self}")


class _Changes(NamedTuple):
    """What is drawn for every slab of a batch.

    Attributes:
        flipped: ``(batch,)``, mirrored left and right.
        moves: ``(batch, 2)``, cells down and to the right.
        offset: ``(batch,)``, added to the pixels; None for nothing.
        corners: ``(batch, 2)``, first row and column of the window's cells; None for the whole slab.
    """

    flipped: Tensor
    moves: Tensor
    offset: Tensor | None
    corners: Tensor | None

    def of(self, own: slice) -> _Changes:
        """Those of some of the slabs."""
        return _Changes(*(None if part is None else part[own] for part in self))  # type: ignore[arg-type]


def augmented(
    items: SlabItem, augmentation: Augmentation, config: SlabConfig, generator: torch.Generator, together: int = 1
) -> SlabItem:
    """A batch of slabs with their targets changed at random, ``together`` consecutive ones in the same way.

    Where several processes hold parts of the batch, it is drawn for the whole: windows depend on each other's targets.
    """
    targets, own = distributed.gather_rows(items.target)  # cells of which nothing is known, -1, stay where they are
    changes = _drawn(targets, augmentation, config, generator, together).of(own)
    slabs = _moved(items.slab, changes, ENCODER_STRIDE)
    targets = _moved(items.target, changes, 1)
    if changes.offset is not None:
        slabs = (slabs + changes.offset[:, None, None, None]).clamp(0, 1)
    if changes.corners is not None:
        cells = augmentation.window_cells
        slabs = _cut(slabs, changes.corners, cells, ENCODER_STRIDE)
        targets = _cut(targets, changes.corners, cells, 1)
    return items._replace(slab=slabs, target=targets)


def _drawn(
    targets: Tensor, augmentation: Augmentation, config: SlabConfig, generator: torch.Generator, together: int
) -> _Changes:
    """What is done to the slabs with these targets; each draw follows the targets as those before have changed them."""
    groups, cells = len(targets) // together, augmentation.shift_cells
    flipped = torch.zeros(len(targets), dtype=torch.bool)
    moves = torch.zeros(len(targets), 2, dtype=torch.long)
    if augmentation.flip:
        flipped = (torch.rand(groups, generator=generator) < 0.5).repeat_interleave(together)
        targets = _moved(targets, _Changes(flipped, moves, None, None), 1)
    if cells:
        wanted = torch.randint(-cells, cells + 1, (groups, 2), generator=generator).repeat_interleave(together, 0)
        moved = _moved(targets, _Changes(torch.zeros_like(flipped), wanted, None, None), 1)
        lost = (moved > 0).flatten(1).any(1) != (targets > 0).flatten(1).any(1)
        lost |= (targets < 0).flatten(1).any(1)  # what is not outlined might be moved out
        kept = ~lost.view(groups, together).any(1).repeat_interleave(together)
        moves[kept], targets = wanted[kept], torch.where(kept[:, None, None], moved, targets)
    offset = corners = None
    if augmentation.jitter_hu:
        low, high = config.hu_window
        drawn = (2 * torch.rand(groups, generator=generator) - 1) * augmentation.jitter_hu / (high - low)
        offset = drawn.repeat_interleave(together)
    if 0 < augmentation.window_cells < config.grid:
        corners = _corners(targets, augmentation.window_cells, generator, together)
    return _Changes(flipped, moves, offset, corners)


def _corners(targets: Tensor, cells: int, generator: torch.Generator, together: int) -> Tensor:
    """Windows of ``cells`` cells: round a random cell of the target; elsewhere where a slab with a target has its.

    That is another one of the same group, or where there is none a random one of the batch.
    """
    free, filled = targets.shape[-1] - cells, (targets > 0).flatten(1).any(1)
    corners = torch.randint(0, free + 1, (len(targets), 2), generator=generator)
    for number in filled.nonzero()[:, 0].tolist():
        marked = (targets[number] > 0).nonzero()
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
    return corners


def _moved(planes: Tensor, changes: _Changes, step: int) -> Tensor:
    """Planes ``(batch, ..., rows, columns)`` mirrored and moved, by cells of ``step`` pixels."""
    planes = planes.clone()
    planes[changes.flipped] = planes[changes.flipped].flip(-1)
    for number, (rows, columns) in enumerate((changes.moves * step).tolist()):
        if rows or columns:
            planes[number] = _shifted(planes[number], rows, columns)
    return planes


def _cut(planes: Tensor, corners: Tensor, cells: int, step: int) -> Tensor:
    """Windows ``(batch, ..., cells * step, cells * step)`` of planes."""
    side = cells * step
    windows = [
        plane[..., row : row + side, column : column + side]
        for plane, (row, column) in zip(planes, (corners * step).tolist(), strict=True)
    ]
    return torch.stack(windows) if windows else planes[..., :side, :side]


def _shifted(planes: Tensor, rows: int, columns: int) -> Tensor:
    """Planes ``(..., rows, columns)`` moved down and to the right, air or nothing (0) moving in."""
    height, width = planes.shape[-2:]
    if abs(rows) >= height or abs(columns) >= width:
        return torch.zeros_like(planes)
    moved = torch.zeros_like(planes)
    kept = planes[..., max(-rows, 0) : height - max(rows, 0), max(-columns, 0) : width - max(columns, 0)]
    moved[..., max(rows, 0) : height + min(rows, 0), max(columns, 0) : width + min(columns, 0)] = kept
    return moved
