"""Stage I of the method: a slab of 5 slices becomes features, a decision, and a map of where the embolism is.

Source: section 2.2 of the paper; [ours] marks what the paper leaves open.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pe_app.common.device import unshortened
from pe_app.common.errors import InputError
from pe_app.model.winograd import Conv3x3


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of the encoder. The defaults are the paper's (section 2.2) unless marked [ours].

    Attributes:
        slices_per_slab: slices of a slab, the channels of the input.
        width: channels after the first convolution; the features have 8 times as many, 16 times for DenseNet121.
        attention_score: what the attention map explains: ``"difference"`` of the two logits, the score that decides
            [ours]; or ``"positive_logit"``, the literal reading, whose map may die since cross-entropy leaves the
            level of one logit free.
        architecture: ``"resnet18"``; or ``"densenet121"``, which the authors name as future work [ours].
        strongest_cells: cells whose mean decides of a slab. 0 takes the features' mean over the whole map (the paper);
            a few, such as 3, ask each cell for itself and let the strongest speak: a clot of one cell in 576 hardly
            moves the mean. The attention map's closed form is exact for both [ours].
    """

    slices_per_slab: int = 5
    width: int = 64
    attention_score: Literal["difference", "positive_logit"] = "difference"
    architecture: Literal["resnet18", "densenet121"] = "resnet18"
    strongest_cells: int = 0

    def __post_init__(self) -> None:
        if self.attention_score not in ("difference", "positive_logit"):
            raise ValueError(f"attention_score must be 'difference' or 'positive_logit', got {self.attention_score!r}")
        if self.architecture not in ("resnet18", "densenet121"):
            raise ValueError(f"architecture must be 'resnet18' or 'densenet121', got {self.architecture!r}")
        if self.strongest_cells < 0:
            raise ValueError(f"strongest_cells must be 0 (all) or more, got {self.strongest_cells}")
        if min(self.slices_per_slab, self.width) < 1 or (self.architecture == "densenet121" and self.width % 2):
            raise ValueError(f"a slab needs slices and the network channels (DenseNet an even number), got {self}")

    @property
    def feature_channels(self) -> int:
        """Channels of the features: 512, of DenseNet121 1024."""
        return (8 if self.architecture == "resnet18" else 16) * self.width


@dataclass(frozen=True, eq=False)
class EncodedSlabs:
    """What the encoder says of a batch of slabs.

    Attributes:
        features: ``(batch, feature_channels, grid, grid)``, the last convolution's activations after ReLU.
        logits: ``(batch, 2)``: none, embolism.
    """

    features: Tensor
    logits: Tensor


class SlabEncoder(nn.Module):
    """ResNet18 that keeps a 24 x 24 map: the last stage has stride 1, the head is one linear layer over the mean.

    Parameters carry torchvision's names, so weights of its ResNet18 fit. DenseNet121 (MONAI's) keeps its map likewise:
    the last transition does not pool.
    """

    def __init__(self, config: EncoderConfig = EncoderConfig()) -> None:
        super().__init__()
        self.config = config
        if config.architecture == "densenet121":
            self.densenet = _densenet121(config)
        else:
            width = config.width
            self.conv1 = nn.Conv2d(config.slices_per_slab, width, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.layer1 = nn.Sequential(_Block(width, width), _Block(width, width))
            self.layer2 = nn.Sequential(_Block(width, 2 * width, stride=2), _Block(2 * width, 2 * width))
            self.layer3 = nn.Sequential(_Block(2 * width, 4 * width, stride=2), _Block(4 * width, 4 * width))
            self.layer4 = nn.Sequential(_Block(4 * width, 8 * width), _Block(8 * width, 8 * width))
        self.fc = nn.Linear(config.feature_channels, 2)
        for module in self.modules():
            # a network that waits for a file's weights has none to fill, and torch would load its compiler for it
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # He et al. 2015

    def forward(self, slabs: Tensor) -> EncodedSlabs:
        """Encode slabs ``(batch, slices_per_slab, rows, columns)`` of HU mapped to 0..1; sides multiples of 16."""
        if self.config.architecture == "densenet121":
            features = self.densenet(slabs)
        else:
            features = self.layer4(self.layer3(self.layer2(self.layer1(self._stem(slabs)))))
        return EncodedSlabs(features, self.logits(features))

    def _stem(self, slabs: Tensor) -> Tensor:
        """First convolution to maximum: channels of a quarter of the rows and columns."""
        # bfloat16 rounds soft tissue to steps of 6 HU: noise that training can bear and a detection need not
        with nullcontext() if self.training else unshortened(slabs.device):
            stem = F.relu(self.bn1(self.conv1(slabs)), inplace=True)
            return F.max_pool2d(stem, 3, stride=2, padding=1)

    def logits(self, features: Tensor) -> Tensor:
        """``(batch, 2)``, none and embolism, of features ``(batch, feature_channels, rows, columns)``.

        With ``strongest_cells`` both are the means over the cells whose difference is largest.
        """
        if not self.config.strongest_cells:
            mean = features.mean((2, 3), dtype=self.fc.weight.dtype)
        else:
            difference = self.cell_logits(features).flatten(1)
            count = min(self.config.strongest_cells, difference.shape[1])
            strongest = difference.topk(count, 1).indices[:, None].expand(-1, features.shape[1], -1)
            mean = features.flatten(2).gather(2, strongest).mean(2, dtype=self.fc.weight.dtype)
        # a product that autocast does not shorten
        logits: Tensor = (mean[:, None] * self.fc.weight).sum(2) + self.fc.bias
        return logits

    def cell_logits(self, features: Tensor) -> Tensor:
        """``(batch, rows, columns)``: the head's difference, embolism minus none, of each cell for itself."""
        weight, bias = self.fc.weight[1] - self.fc.weight[0], self.fc.bias[1] - self.fc.bias[0]
        logits: Tensor = (features * weight[:, None, None]).sum(1) + bias
        return logits

    def attention_map(self, features: Tensor) -> Tensor:
        """Grad-CAM for "embolism" in closed form, differentiable with respect to features and weights.

        ``A = ReLU(sum_k a_k f_k)`` with ``a_k`` the mean over the pixels of ``d score / d f_k``. The head is linear in
        a mean of f_k over pixels, all of the ``rows * columns`` or the strongest, so the mean slope is
        ``a_k = w_k / (rows * columns)`` either way and no second backward pass is needed.
        ``w = w_embolism - w_none``, or ``w_embolism`` alone for ``"positive_logit"``.

        Args:
            features: ``(batch, feature_channels, rows, columns)``, as ``forward`` returns them.

        Returns:
            ``(batch, rows, columns)``, from 0, not normalised, in the precision of the weights also under autocast.

        Source: Selvaraju et al. 2017, arXiv:1610.02391; equation (1) of the paper.
        """
        none, embolism = self.fc.weight
        weight = embolism if self.config.attention_score == "positive_logit" else embolism - none
        rows, columns = features.shape[2:]
        score: Tensor = (features * (weight / (rows * columns))[:, None, None]).sum(1)
        return score.relu()

    def load_imagenet(self, path: str | Path) -> None:
        """Start from a local file of ImageNet weights for ResNet18, ``.safetensors`` or torch weights [ours].

        The first convolution is inflated from colours to slices: every slice gets the sum over the colours divided by
        the number of slices, so a slab of equal slices is seen as a grey picture was. The head keeps its own weights.

        Raises:
            InputError: if the file cannot be read or holds another network.
        """
        path = Path(path)
        if self.config.architecture != "resnet18":
            raise InputError(f"{path}: weights of ResNet18 do not fit {self.config.architecture}: choose one of them")
        weights = _read_weights(path)
        own = self.state_dict()
        wanted = {name for name in own if not name.startswith("fc.") and not name.endswith("num_batches_tracked")}
        missing = sorted(wanted - weights.keys())
        if missing:
            raise InputError(
                f"{path}: these are no ResNet18 weights with torchvision's names, {missing[0]} and {len(missing) - 1} "
                f"others of {len(wanted)} are missing: choose torchvision's resnet18"
            )
        fitting = {name: weights[name] for name in wanted}
        if fitting["conv1.weight"].ndim == 4:
            slices = self.config.slices_per_slab
            fitting["conv1.weight"] = (fitting["conv1.weight"].sum(1, keepdim=True) / slices).repeat(1, slices, 1, 1)
        for name, weight in fitting.items():
            if weight.shape != own[name].shape:
                raise InputError(
                    f"{path}: {name} has the shape {tuple(weight.shape)}, this encoder of width {self.config.width} "
                    f"needs {tuple(own[name].shape)}: choose torchvision's resnet18 and width 64"
                )
        self.load_state_dict(own | fitting)


def normalised(maps: Tensor) -> Tensor:
    """Attention maps ``(batch, rows, columns)``, each divided by its own maximum where that is above 0."""
    peak = maps.amax((-2, -1), keepdim=True)
    return maps / torch.where(peak > 0, peak, torch.ones_like(peak))


def _densenet121(config: EncoderConfig) -> nn.Module:
    """MONAI's DenseNet121 up to its last map, with a ReLU (Huang et al. 2017, arXiv:1608.06993)."""
    from monai.networks.nets import DenseNet121  # seconds to import, and only this encoder needs it

    width = config.width
    network = DenseNet121(2, config.slices_per_slab, 1, init_features=width, growth_rate=width // 2)
    network.features.transition3.pool = nn.Identity()
    return nn.Sequential(network.features, nn.ReLU(inplace=True))


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a way round them (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, channels: int, filters: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = (
            nn.Conv2d(channels, filters, 3, stride=stride, padding=1, bias=False)
            if stride > 1
            else Conv3x3(channels, filters, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = Conv3x3(filters, filters, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, filters, 1, stride=stride, bias=False), nn.BatchNorm2d(filters))
            if channels != filters
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(inner)) + self.downsample(x), inplace=True)


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a weights file by name; loading one runs no code."""
    try:
        weights: object = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path}: not a readable weights file ({type(error).__name__}): "
            "give a .safetensors file or one that torch.save wrote from a state_dict"
        ) from error
    if not isinstance(weights, Mapping) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise InputError(f"{path}: expected named tensors only: save the network's state_dict")
    return dict(weights)
