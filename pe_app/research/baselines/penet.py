"""PENet, the 3D CNN over windows of 24 slices that the paper compares itself with.

Written from Huang et al. 2020, PENet - a scalable deep-learning model for automated diagnosis of pulmonary embolism
using volumetric CT imaging, npj Digital Medicine 3:61, and the works it builds on: ResNeXt (Xie et al. 2017,
arXiv:1611.05431), squeeze-and-excitation (Hu et al. 2018, arXiv:1709.01507), group normalisation (Wu and He 2018,
arXiv:1803.08494), stochastic depth (Huang et al. 2016, arXiv:1603.09382). No weights of the original are used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pe_app.ct.volume import PADDING_HU, Volume


@dataclass(frozen=True)
class PENetConfig:
    """The shape of PENet and of its windows. The defaults are the original's unless marked [ours].

    Attributes:
        slices: slices of a window.
        resize: rows and columns that every slice is resampled to before the crop.
        crop: rows and columns of the centre crop.
        hu_window: HU that become 0 and 1, as in the original's released preprocessing.
        mean: subtracted after that, the mean of the original's training data.
        stride: slices between the starts of neighbouring windows; 24, so windows do not overlap [ours].
        channels: input channels; the original repeats the CT three times to start from videos.
        width: channels after the first convolution.
        groups: groups of the 3 x 3 x 3 convolutions.
        blocks: bottlenecks of the four encoders.
        final_survival: share of training steps in which the last bottleneck takes part, falling linearly from 1.
    """

    slices: int = 24
    resize: int = 208
    crop: int = 192
    hu_window: tuple[float, float] = (-100.0, 900.0)
    mean: float = 0.15897
    stride: int = 24
    channels: int = 3
    width: int = 64
    groups: int = 32
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    final_survival: float = 0.5

    def __post_init__(self) -> None:
        if self.width % max(self.groups // 2, 16) or min(self.blocks) < 1 or self.crop > self.resize:
            raise ValueError(f"the width must hold whole groups of channels and the crop fit the slice, got {self}")


class PENet(nn.Module):
    """ResNeXt-50 in 3D with group normalisation and squeeze-and-excitation; 28,398,705 parameters by default."""

    def __init__(self, config: PENetConfig = PENetConfig()) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Sequential(
            nn.Conv3d(config.channels, config.width, 7, stride=(1, 2, 2), padding=3, bias=False), _norm(config.width)
        )
        channels, number = config.width, 0
        encoders = []
        for level, count in enumerate(config.blocks):
            filters = config.width * 2 ** (level + 1)
            for place in range(count):
                stride = 2 if level and not place else 1
                survival = 1 - number / sum(config.blocks) * (1 - config.final_survival)
                encoders.append(_Bottleneck(channels, filters, config.groups, stride, survival))
                channels, number = 2 * filters, number + 1
        self.encoders = nn.Sequential(*encoders)
        self.fc = nn.Linear(channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="leaky_relu", a=0.01)

    def forward(self, windows: Tensor) -> Tensor:
        """Logits ``(batch,)`` of "this window shows an embolism" for windows ``(batch, slices, crop, crop)``."""
        x = windows[:, None].expand(-1, self.config.channels, -1, -1, -1)
        x = F.max_pool3d(F.leaky_relu(self.stem(x)), 3, stride=2, padding=1)
        logits: Tensor = self.fc(self.encoders(x).mean((2, 3, 4))).squeeze(1)
        return logits


def penet_planes(volume: Volume, config: PENetConfig = PENetConfig()) -> NDArray[np.float32]:
    """All slices of a study as PENet reads them, from the feet to the head: ``(slices, crop, crop)``.

    HU are clipped to the window, mapped to 0..1 and the mean is subtracted. Slices keep their own spacing, as in the
    original. A study of fewer slices than a window is filled up with air [ours].
    """
    low, high = config.hu_window
    hu = volume.voxels.astype(np.float32)
    missing = config.slices - len(hu)
    if missing > 0:
        hu = np.pad(hu, ((0, missing), (0, 0), (0, 0)), constant_values=PADDING_HU)
    planes = torch.from_numpy((np.clip(hu, low, high) - low) / (high - low) - config.mean)[:, None]
    size = (config.resize, config.resize)
    if planes.shape[2:] != size:
        planes = F.interpolate(planes, size, mode="bilinear", antialias=True)
    margin = (config.resize - config.crop) // 2
    cropped: NDArray[np.float32] = planes[:, 0, margin : margin + config.crop, margin : margin + config.crop].numpy()
    return cropped


def window_starts(slices: int, config: PENetConfig = PENetConfig()) -> list[int]:
    """First slices of the windows that cover a study; the last window ends with the last slice."""
    return sorted({*range(0, slices - config.slices, config.stride), slices - config.slices})


def penet_windows(volume: Volume, config: PENetConfig = PENetConfig()) -> NDArray[np.float32]:
    """The windows of a study, ``(windows, slices, crop, crop)``; its probability is the maximum over them."""
    planes = penet_planes(volume, config)
    return np.stack([planes[start : start + config.slices] for start in window_starts(len(planes), config)])


class _Bottleneck(nn.Module):
    """1 x 1 x 1, grouped 3 x 3 x 3 and 1 x 1 x 1 convolutions, squeeze-and-excitation, and a way round them."""

    def __init__(self, channels: int, filters: int, groups: int, stride: int, survival: float) -> None:
        super().__init__()
        self.survival = survival
        out = 2 * filters
        self.reduce = nn.Sequential(nn.Conv3d(channels, filters, 1, bias=False), _norm(filters))
        self.spatial = nn.Sequential(
            nn.Conv3d(filters, filters, 3, stride=stride, padding=1, groups=groups, bias=False), _norm(filters)
        )
        self.expand = nn.Sequential(nn.Conv3d(filters, out, 1, bias=False), _norm(out))
        self.squeeze = nn.Linear(out, out // 16)
        self.excite = nn.Linear(out // 16, out)
        self.skip = (
            nn.Sequential(nn.Conv3d(channels, out, 1, stride=stride, bias=False), _norm(out))
            if stride != 1 or channels != out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        around: Tensor = self.skip(x)
        if self.training and torch.rand(()) >= self.survival:
            return around
        inner = F.leaky_relu(self.spatial(F.leaky_relu(self.reduce(x))))
        inner = self.expand(inner)
        gate = self.excite(F.leaky_relu(self.squeeze(inner.mean((2, 3, 4))))).sigmoid()
        return F.leaky_relu(inner * gate[:, :, None, None, None] + around)


def _norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with 16 channels a group."""
    return nn.GroupNorm(channels // 16, channels)
