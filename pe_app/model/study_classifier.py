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

from pe_app.model.winograd import Conv3x3

OPEN = 3.0
"""Bias of a gate that is nearly open; its negative nearly shuts one."""

RARE, SLOPE = 20.0, 0.1
"""Where a classifier starts from evidence: so many standard deviations above the mean lies what later units pass on,
about as high as the few cells that show an embolism; and how steeply they do."""

EVIDENCE_WEIGHT, EVIDENCE_OFFSET = 15.0, -1.2
"""Of the mean evidence in the logit; the offset puts the border between the two halves of simulated studies."""


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
    """

    feature_channels: int = 512
    grid: int = 24
    filters: int = 96
    directions: Literal["parallel", "serial"] = "parallel"
    channel_dropout: float = 0.2
    head_dropout: float = 0.5

    def __post_init__(self) -> None:
        if self.grid % 4 or min(self.grid, self.feature_channels, self.filters) < 1:
            raise ValueError(f"the grid is halved twice and nothing may be empty, got {self}")
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

    @torch.no_grad()
    def start_from_evidence(self, weight: Tensor, threshold: float, clear: float) -> None:
        """Begin with a classifier that averages stage I's evidence over the study instead of knowing nothing [ours].

        One filter of every ConvLSTM passes on how far a cell's evidence ``weight f`` lies above the threshold, and the
        head adds these up. All else keeps its random weights, the head's a tenth of them.

        Args:
            weight: ``(feature_channels,)``, stage I's ``w_embolism - w_none``.
            threshold: of a cell's evidence, above which little lies in studies without embolism.
            clear: a higher value, that a clear embolism reaches.
        """
        weight, offset = weight / (clear - threshold), -threshold / (clear - threshold)
        for lstm in (module for module in self.modules() if isinstance(module, ConvLSTM)):
            lstm.pass_on(weight, offset)
            ways = len(lstm.directions)  # the next one reads the first filter of each of them
            weight, offset = torch.zeros(ways * self.config.filters), -SLOPE * RARE
            weight[:: self.config.filters] = SLOPE / ways
        positions = (self.config.grid // 4) ** 2
        self.fc.weight *= 0.1
        self.fc.weight[0].view(-1, positions)[:: self.config.filters] = EVIDENCE_WEIGHT / (positions * ways)
        self.fc.bias.fill_(EVIDENCE_OFFSET)


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

    @torch.no_grad()
    def pass_on(self, weight: Tensor, offset: float) -> None:
        """Let the first filter of each direction show ``tanh(weight x + offset)`` of every place, without memory.

        Args:
            weight: ``(channels,)``.
            offset: added before the hyperbolic tangent.
        """
        ways, kernel = len(self.directions), self.input_gates.weight.shape[1:]
        filters = self.norm.num_features // ways
        gates = self.input_gates.weight.view(ways, 4, filters, *kernel)
        gates[:, :, 0] = 0
        gates[:, 3, 0, :, 1, 1] = weight
        bias = torch.tensor([OPEN, -OPEN, OPEN, offset])  # write, forget, read, candidate
        self.input_gates.bias.view(ways, 4, filters)[:, :, 0] = bias  # type: ignore[union-attr]
        for direction in self.directions:
            self.state_gates[direction].weight.view(4, filters, filters, 3, 3)[:, 0] = 0  # type: ignore[operator]

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
