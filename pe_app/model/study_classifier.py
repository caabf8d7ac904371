"""Stage II of the method: the features of a study's 50 slabs, from the feet to the head, become one logit.

Two bidirectional units of ConvLSTM halve the grid twice, 24 -> 12 -> 6; then the mean over the slabs and one linear
unit. Source: section 2.3 of the paper; [ours] marks what the paper leaves open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_app.model.slab_encoder import SlabEncoder
from pe_app.model.winograd import Conv3x3

POOLED_NUMBERS = (
    "strongest cell",
    "mean of 5",
    "mean of 50",
    "mean of 5 slabs",
    "in two slabs",
    "log of cells above 0",
)
"""What ``PooledClassifier`` weighs of a study."""

RIDGE = 1.0
"""Of its weights: keeps numbers that say nearly the same from pulling against each other."""


@dataclass(frozen=True)
class ClassifierConfig:
    """The shape of the classifier. The defaults are the paper's (section 2.3) unless marked [ours].

    Attributes:
        feature_channels: channels of the encoder's features.
        grid: rows and columns of the features; a multiple of 4.
        filters: channels of every ConvLSTM's state.
        directions: ``"parallel"``, where both directions read the same input and are concatenated; or ``"serial"``,
            where the descending one reads the ascending one's output. The paper can be read both ways [ours].
        channel_dropout: share of whole channels dropped from inputs and recurrent states, for a whole sequence.
        head_dropout: share of numbers dropped before the last linear unit.
        kind: ``"convlstm"``, the paper's; or ``"pooled"``, a logistic regression on a few numbers of stage I's
            strongest cells (``PooledClassifier``), for as few labelled studies as no ConvLSTM learns from [ours].
    """

    feature_channels: int = 512
    grid: int = 24
    filters: int = 96
    directions: Literal["parallel", "serial"] = "parallel"
    channel_dropout: float = 0.2
    head_dropout: float = 0.5
    kind: Literal["convlstm", "pooled"] = "convlstm"

    def __post_init__(self) -> None:
        if self.grid % 4 or min(self.grid, self.feature_channels, self.filters) < 1:
            raise ValueError(f"the grid is halved twice and nothing may be empty, got {self}")
        if self.kind not in ("convlstm", "pooled"):
            raise ValueError(f"kind must be 'convlstm' or 'pooled', got {self.kind!r}")
        if self.directions not in ("parallel", "serial"):
            raise ValueError(f"directions must be 'parallel' or 'serial', got {self}")


class StudyClassifier(nn.Module):
    """Two units of ascending and descending ConvLSTM, each followed by 2 x 2 max-pooling, and a linear head."""

    def __init__(self, config: ClassifierConfig = ClassifierConfig()) -> None:
        super().__init__()
        self.config = config
        channels = (2 if config.directions == "parallel" else 1) * config.filters
        self.unit1 = _unit(config.feature_channels, config)
        self.unit2 = _unit(channels, config)
        self.dropout = nn.Dropout(config.head_dropout)
        self.fc = nn.Linear(channels * (config.grid // 4) ** 2, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(batch,)`` of "this study shows an embolism".

        Args:
            features: ``(batch, slabs, feature_channels, grid, grid)``, of any float type, slabs from the feet to the
                head.
        """
        x = features.to(self.fc.weight.dtype)
        x = _pooled(self.unit1(x))
        x = _pooled(self.unit2(x))
        seen = self.dropout(x.mean(1).flatten(1))
        logits: Tensor = (seen * self.fc.weight[0]).sum(1) + self.fc.bias  # a product that autocast does not shorten
        return logits


class PooledClassifier(nn.Module):
    """Stage II for few labelled studies: a few numbers of stage I's strongest cells, weighed by logistic regression.

    The numbers (``pooled_numbers``) come from the logit of every cell, which is stage I's own head. Nothing else is
    learned than their weights, so that tens of studies suffice and no more is claimed than that.
    """

    cell_weight: Tensor
    cell_bias: Tensor
    centre: Tensor
    scale: Tensor

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("cell_weight", torch.zeros(config.feature_channels))
        self.register_buffer("cell_bias", torch.zeros(()))
        self.register_buffer("centre", torch.zeros(len(POOLED_NUMBERS)))
        self.register_buffer("scale", torch.ones(len(POOLED_NUMBERS)))
        self.fc = nn.Linear(len(POOLED_NUMBERS), 1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(batch,)``, of features as ``StudyClassifier`` takes them."""
        numbers = (self.numbers(features) - self.centre) / self.scale
        logits: Tensor = (numbers * self.fc.weight[0]).sum(1) + self.fc.bias
        return logits

    @torch.no_grad()
    def read_cells_as(self, encoder: SlabEncoder) -> None:
        """Take over stage I's head, which turns the features of a cell into its logit."""
        self.cell_weight.copy_(encoder.fc.weight[1] - encoder.fc.weight[0])
        self.cell_bias.copy_(encoder.fc.bias[1] - encoder.fc.bias[0])

    @torch.no_grad()
    def numbers(self, features: Tensor) -> Tensor:
        """``(batch, len(POOLED_NUMBERS))`` of features ``(batch, slabs, feature_channels, grid, grid)``."""
        cells = torch.einsum("bschw,c->bshw", features.to(self.fc.weight.dtype), self.cell_weight) + self.cell_bias
        return pooled_numbers(cells)

    @torch.no_grad()
    def fit(self, numbers: Tensor, positive: Tensor, ridge: float = RIDGE) -> None:
        """Logistic regression on numbers ``(studies, len(POOLED_NUMBERS))`` and labels ``(studies,)``, 0 or 1.

        Newton's method on standardised numbers; ``ridge`` times half the squared weights is added to the summed loss.
        Both labels weigh as much as half of the studies, whatever their number.
        """
        numbers, positive = numbers.double(), positive.double()
        self.centre.copy_(numbers.mean(0))
        self.scale.copy_(numbers.std(0).clamp(min=1e-3))
        x = torch.cat([(numbers - self.centre) / self.scale, torch.ones(len(numbers), 1, dtype=torch.float64)], 1)
        share = positive.mean().clamp(1e-3, 1 - 1e-3)
        weight = torch.where(positive > 0, 0.5 / share, 0.5 / (1 - share))
        penalty = torch.diag(torch.tensor([ridge] * (x.shape[1] - 1) + [1e-6], dtype=torch.float64))
        solution = torch.zeros(x.shape[1], dtype=torch.float64)
        for _ in range(50):
            chance = (x @ solution).sigmoid()
            slope = x.T @ (weight * (chance - positive)) + penalty @ solution
            curve = x.T @ (x * (weight * chance * (1 - chance))[:, None]) + penalty
            step = torch.linalg.solve(curve, slope)
            solution -= step * min(1.0, 2.0 / float(step.abs().max().clamp(min=1e-12)))
            if step.abs().max() < 1e-9:
                break
        self.fc.weight.copy_(solution[None, :-1])
        self.fc.bias.copy_(solution[-1:])


def pooled_numbers(cells: Tensor) -> Tensor:
    """Six numbers of a study's cells, ``(batch, slabs, rows, columns)`` logits: see ``POOLED_NUMBERS``."""
    batch, slabs = cells.shape[:2]
    peaks = cells.flatten(2).amax(2)  # of every slab
    ordered = cells.flatten(1).sort(1, descending=True).values
    strongest_slabs = peaks.sort(1, descending=True).values[:, : min(5, slabs)].mean(1)
    # an embolus is seen from two slabs in a row: at one cell or its neighbours
    wide = F.max_pool2d(cells.flatten(0, 1)[:, None], 3, 1, 1).view_as(cells)
    pairs = torch.maximum(torch.minimum(cells[:, 1:], wide[:, :-1]), torch.minimum(cells[:, :-1], wide[:, 1:]))
    lasting = (pairs if slabs > 1 else cells).flatten(1).amax(1)
    many = torch.log1p((cells > 0).flatten(1).sum(1).to(cells.dtype))
    means = [ordered[:, :count].mean(1) for count in (1, 5, 50)]
    return torch.stack([*means, strongest_slabs, lasting, many], 1).view(batch, len(POOLED_NUMBERS))


def build_classifier(config: ClassifierConfig) -> Classifier:
    """The network of a kind."""
    return PooledClassifier(config) if config.kind == "pooled" else StudyClassifier(config)


class ConvLSTM(nn.Module):
    """ConvLSTM over a sequence, in one direction or in both at once, with batch normalisation after each.

    ``i, f, o = sigmoid(.)``, ``g = tanh(.)`` of 3 x 3 convolutions of input and state, ``c' = f c + i g``,
    ``h' = o tanh(c')``, no peepholes (Shi et al. 2015, arXiv:1506.04214). The input's half of all gates does not depend
    on the state: one convolution for all positions and directions; only the state's half is in the loop.

    Args:
        channels: of the input.
        filters: channels of the state of each direction.
        directions: any of ``"ascending"`` and ``"descending"``; their outputs are concatenated.
        dropout: share of whole channels dropped in training from the input and from each state, one choice for the
            whole sequence.
    """

    def __init__(self, channels: int, filters: int, directions: tuple[str, ...], dropout: float) -> None:
        super().__init__()
        self.directions = directions
        self.dropout = dropout
        self.input_gates = Conv3x3(channels, 4 * filters * len(directions))
        self.state_gates = nn.ModuleDict(
            {direction: nn.Conv2d(filters, 4 * filters, 3, padding=1, bias=False) for direction in directions}
        )
        self.norm = nn.BatchNorm2d(filters * len(directions))
        if self.input_gates.weight.is_meta:  # waits for a file's weights: as in SlabEncoder
            return
        for gate in torch.split(self.input_gates.weight, filters):
            nn.init.xavier_uniform_(gate)
        for direction in directions:
            nn.init.orthogonal_(self.state_gates[direction].weight)  # type: ignore[arg-type]
        with torch.no_grad():  # forget bias 1 (Jozefowicz et al. 2015): at first, the state is kept
            self.input_gates.bias.zero_()  # type: ignore[union-attr]
            self.input_gates.bias.view(-1, 4, filters)[:, 1] = 1  # type: ignore[union-attr]

    def forward(self, sequence: Tensor) -> Tensor:
        """``(batch, positions, channels, rows, columns)`` to ``(..., filters * directions, rows, columns)``."""
        batch, positions, channels = sequence.shape[:3]
        if self.training and self.dropout > 0:
            sequence = sequence * self._channel_mask(sequence, channels)[:, None]
        gates = self.input_gates(sequence.flatten(0, 1))
        gates = gates.reshape(batch, positions, *gates.shape[1:])
        states = [
            self._run(part, direction)
            for part, direction in zip(gates.chunk(len(self.directions), 2), self.directions, strict=True)
        ]
        joined = torch.cat(states, 2)
        return self.norm(joined.flatten(0, 1)).reshape(joined.shape)  # type: ignore[no-any-return]

    def _run(self, gates: Tensor, direction: str) -> Tensor:
        """States ``(batch, positions, filters, rows, columns)`` from the input's half of the gates."""
        filters = gates.shape[2] // 4
        weight = self.state_gates[direction].weight
        # Under autocast the convolution is in bfloat16; gates and states stay in the precision of the weights, since
        # a forget gate of 8 bits is off by up to 0.2 % at every one of 50 positions.
        state = gates.new_zeros((len(gates), filters, *gates.shape[3:]), dtype=weight.dtype)  # type: ignore[arg-type]
        cell = state
        mask = self._channel_mask(state, filters) if self.training and self.dropout > 0 else None
        steps = gates.unbind(1) if direction == "ascending" else gates.unbind(1)[::-1]
        states = []
        for step in steps:
            recurrent = self.state_gates[direction](state if mask is None else state * mask)
            total = recurrent.to(cell.dtype) + step
            keep, candidate = total.split((3 * filters, filters), 1)
            write, forget, read = keep.sigmoid().chunk(3, 1)
            cell = forget * cell + write * candidate.tanh()
            state = read * cell.tanh()
            states.append(state)
        return torch.stack(states if direction == "ascending" else states[::-1], 1)

    def _channel_mask(self, like: Tensor, channels: int) -> Tensor:
        """``(batch, channels, 1, 1)``: 0 for dropped channels, ``1 / (1 - dropout)`` for the others."""
        return F.dropout(like.new_ones(len(like), channels, 1, 1), self.dropout)


def _unit(channels: int, config: ClassifierConfig) -> nn.Module:
    """One unit of the paper: an ascending and a descending ConvLSTM."""
    filters, dropout = config.filters, config.channel_dropout
    if config.directions == "parallel":
        return ConvLSTM(channels, filters, ("ascending", "descending"), dropout)
    return nn.Sequential(
        ConvLSTM(channels, filters, ("ascending",), dropout), ConvLSTM(filters, filters, ("descending",), dropout)
    )


def _pooled(sequence: Tensor) -> Tensor:
    """2 x 2 max-pooling of rows and columns; slabs stay apart."""
    pooled = F.max_pool2d(sequence.flatten(0, 1), 2)
    return pooled.reshape(*sequence.shape[:2], *pooled.shape[1:])


Classifier = StudyClassifier | PooledClassifier
"""Either kind of stage II."""
