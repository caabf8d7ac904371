"""The 3D CNN of the paper's comparison: inflated 3D convolutions, a ConvLSTM along the patient, a dense unit.

The paper names the parts (section 3.3) and not their sizes; [ours] marks what it leaves open. Written from Carreira and
Zisserman 2017 (I3D, arXiv:1705.07750) and Szegedy et al. 2015 (the Inception table, arXiv:1409.4842).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pe_app.ct.lungs import lung_range
from pe_app.ct.slabs import SlabConfig, study_slabs
from pe_app.ct.volume import Volume
from pe_app.model.study_classifier import ConvLSTM

INCEPTION: tuple[tuple[tuple[int, int, int, int, int, int], ...], ...] = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
"""Filters of the Inception modules 3b-3c, 4b-4f, 5b-5c: 1x1; reduction, 3x3; reduction, 3x3; after pooling."""


@dataclass(frozen=True)
class CNN3DConfig:
    """The shape of the network.

    Attributes:
        channels: input channels; 3 for weights trained on videos, 1 for CT.
        width: channels after the first convolution; all others scale with it, 64 is I3D's.
        filters: channels of the ConvLSTM's state [ours, as in stage II].
        dropout: share of numbers dropped before the dense unit [ours, as in stage II].
    """

    channels: int = 1
    width: int = 64
    filters: int = 96
    dropout: float = 0.5


def cnn3d_planes(volume: Volume, slabs: SlabConfig) -> NDArray[np.float32]:
    """What the network reads of a study: the lung range resized to 200 slices, at half the in-plane resolution.

    The slices are those of stage II's slabs, averaged over 2 x 2 pixels: 200 x 192 x 192, PENet's resolution [ours].
    """
    found = study_slabs(volume, lung_range(volume), replace(slabs, slab_spacing="lung"))
    planes = found.pixels[:, : slabs.slab_stride].reshape(-1, 1, slabs.crop, slabs.crop)
    pooled: NDArray[np.float32] = F.avg_pool2d(torch.from_numpy(planes.copy()), 2)[:, 0].numpy()
    return pooled


class InflatedInception(nn.Module):
    """I3D up to its last Inception module: Inception-v1 with every convolution inflated along the slices."""

    def __init__(self, channels: int = 1, width: int = 64) -> None:
        super().__init__()
        scale = width / 64
        self.conv1 = _unit(channels, width, 7, stride=2)
        self.conv2a = _unit(width, width, 1)
        self.conv2b = _unit(width, 3 * width, 3)
        inner, stages = 3 * width, []
        for rows in INCEPTION:
            modules = []
            for row in rows:
                filters = tuple(max(round(count * scale), 1) for count in row)
                modules.append(_Inception(inner, filters))
                inner = filters[0] + filters[2] + filters[4] + filters[5]
            stages.append(nn.Sequential(*modules))
        self.stages = nn.ModuleList(stages)
        self.out_channels = inner
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, slices, rows, columns)`` to ``(batch, 1024, slices / 8, rows / 32, columns / 32)``."""
        x = F.max_pool3d(self.conv1(x), (1, 3, 3), (1, 2, 2), (0, 1, 1))
        x = F.max_pool3d(self.conv2b(self.conv2a(x)), (1, 3, 3), (1, 2, 2), (0, 1, 1))
        x = F.max_pool3d(self.stages[0](x), 3, 2, 1)
        x = F.max_pool3d(self.stages[1](x), 2, 2, ceil_mode=True)
        deepest: Tensor = self.stages[2](x)
        return deepest


class CNN3D(nn.Module):
    """Inflated Inception, one ascending ConvLSTM over the remaining slices, mean, dropout, one dense unit."""

    def __init__(self, config: CNN3DConfig = CNN3DConfig()) -> None:
        super().__init__()
        self.config = config
        self.inception = InflatedInception(config.channels, config.width)
        self.lstm = ConvLSTM(self.inception.out_channels, config.filters, ("ascending",), dropout=0.0)
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(config.filters, 1)

    def forward(self, studies: Tensor) -> Tensor:
        """Logits ``(batch,)`` of "this study shows an embolism".

        Args:
            studies: ``(batch, slices, rows, columns)`` of HU mapped to 0..1, slices from the feet to the head; sides
                multiples of 32, slices of 8.
        """
        x = self.inception(studies[:, None].expand(-1, self.config.channels, -1, -1, -1))
        states = self.lstm(x.transpose(1, 2))
        logits: Tensor = self.fc(self.dropout(states.mean((1, 3, 4)))).squeeze(1)
        return logits


class _Inception(nn.Module):
    """Four branches side by side: 1x1x1; 1x1x1, 3x3x3; 1x1x1, 3x3x3; pooling, 1x1x1."""

    def __init__(self, channels: int, filters: tuple[int, ...]) -> None:
        super().__init__()
        self.single = _unit(channels, filters[0], 1)
        self.middle = nn.Sequential(_unit(channels, filters[1], 1), _unit(filters[1], filters[2], 3))
        self.small = nn.Sequential(_unit(channels, filters[3], 1), _unit(filters[3], filters[4], 3))
        self.pooled = nn.Sequential(nn.MaxPool3d(3, 1, 1), _unit(channels, filters[5], 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.single(x), self.middle(x), self.small(x), self.pooled(x)], 1)


def _unit(channels: int, filters: int, size: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv3d(channels, filters, size, stride, size // 2, bias=False), nn.BatchNorm3d(filters, 1e-3), nn.ReLU()
    )
