"""Both stages in 8-bit integers, which processors with VNNI multiply twice as fast as bfloat16; only for detecting.

Weights have one scale a filter, activations one a layer (post-training static quantisation, Jacob et al. 2018,
arXiv:1712.05877). The scales need no studies: every normalisation remembers mean and deviation of its training data.
torch's own convolutions (oneDNN) are used, with normalisation, ReLU and the way round a block folded in. [ours]
"""

from __future__ import annotations

import copy
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pe_app.errors import InputError
from pe_app.slab_encoder import Block, EncodedSlabs, SlabEncoder
from pe_app.study_classifier import ConvLSTM, StudyClassifier

DEVIATIONS = 10.0
"""Activations up to so many standard deviations above the mean are told apart. Those of attention peaks are reached on
phantoms and CT; twice as many cost more in rounding than is ever cut off."""

_MIDDLE = 128
"""Stands for 0 where a layer's numbers have a sign."""


class Int8Networks:
    """Both networks of a detector in 8-bit integers, from their weights; made in a fraction of a second.

    Args:
        encoder: stage I; is moved to the CPU.
        classifier: stage II; is moved to the CPU.

    Attributes:
        encoder: gives features in float32 and logits as the encoder itself does.
        classifier: a copy whose input gates, three quarters of its operations, are 8-bit; the recurrent part is not.

    Raises:
        InputError: if this machine or this encoder cannot.
    """

    def __init__(self, encoder: SlabEncoder, classifier: StudyClassifier) -> None:
        check_machine()
        if encoder.config.architecture != "resnet18":
            raise InputError(f"int8: not for the encoder {encoder.config.architecture}: choose another precision")
        self.encoder = _Int8Encoder(encoder.cpu().eval())
        self.classifier = copy.deepcopy(classifier.cpu()).eval()
        first = self.classifier.unit1
        lstm = first if isinstance(first, ConvLSTM) else first[0]  # type: ignore[index]
        lstm.input_gates = _Int8Gates(lstm.input_gates, self.encoder.largest_feature)


def check_machine() -> None:
    """Whether int8 gains anything here.

    Raises:
        InputError: if it does not, or torch cannot.
    """
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not capabilities.get("avx512_vnni") and not capabilities.get("avx_vnni"):
        raise InputError("int8: this processor has no VNNI (8-bit products); leave the precision at auto")
    if not hasattr(torch.ops.onednn, "qconv2d_pointwise"):  # oneDNN is not part of every build
        raise InputError(f"int8: torch {torch.__version__} has no 8-bit convolutions; leave the precision at auto")


class _Convolution:
    """A convolution of uint8 by int8, with bias and often ReLU, to uint8 or float32.

    Args:
        float_convolution: with its normalisation folded in.
        largest: of the input and of the output, which 255 stands for.
        signed: whether the output is from -largest to largest, 128 standing for 0.
    """

    def __init__(
        self, float_convolution: nn.Conv2d, largest: float, largest_output: float, *, signed: bool = False
    ) -> None:
        weight = float_convolution.weight.detach().float()
        self._weight_scale = weight.abs().amax((1, 2, 3)).clamp_min(1e-12) / 127
        rounded = (weight / self._weight_scale[:, None, None, None]).round().to(torch.int8)
        self._scale = largest / 255
        self.output_scale = largest_output / (127 if signed else 255)
        self.output_zero = _MIDDLE if signed else 0
        stride, padding = list(float_convolution.stride), list(float_convolution.padding)
        self._geometry = (stride, padding, [1, 1], 1)
        packed = torch.ops.onednn.qconv_prepack(rounded, self._weight_scale, self._scale, 0, *self._geometry)
        bias = float_convolution.bias
        self._weight = (packed, self._weight_scale, torch.zeros(len(weight), dtype=torch.int32))
        self._bias = None if bias is None else bias.detach().float()

    def quantised(self, x: Tensor) -> Tensor:
        """Activations from 0 as this convolution takes them."""
        return (x * (1 / self._scale)).round_().clamp_(0, 255).to(torch.uint8)

    def __call__(self, x: Tensor, *, relu: bool = True) -> Tensor:
        output = (self.output_scale, self.output_zero, torch.uint8)
        attribute = "relu" if relu else "none"
        return torch.ops.onednn.qconv2d_pointwise(  # type: ignore[no-any-return]
            x, self._scale, 0, *self._weight, self._bias, *self._geometry, *output, attribute, [], ""
        )

    def to_float(self, x: Tensor) -> Tensor:
        """The same without ReLU, not rounded."""
        return torch.ops.onednn.qconv2d_pointwise(  # type: ignore[no-any-return]
            x, self._scale, 0, *self._weight, self._bias, *self._geometry, 1.0, 0, torch.float32, "none", [], ""
        )

    def plus(self, x: Tensor, other: Tensor, scale: float, zero: int) -> Tensor:
        """ReLU of the convolution and ``other``, whose memory is used; as float32 where ``other`` is."""
        dtype = other.dtype
        output = (1.0 if dtype == torch.float32 else self.output_scale, 0, dtype)
        return torch.ops.onednn.qconv2d_pointwise.binary(  # type: ignore[no-any-return]
            *(x, self._scale, 0, *self._weight, other, self._bias, *self._geometry, *output),
            *(scale, zero, "sum", 1.0, "relu", [], ""),
        )


class _Int8Encoder:
    """Stage I from its slabs on; features leave it in float32."""

    def __init__(self, encoder: SlabEncoder) -> None:
        self._encoder = encoder
        reached = _reached(encoder.bn1).relu()
        self._stem = _Convolution(_folded(encoder.conv1, encoder.bn1), 1.0, float(reached.max()))
        self._blocks = []
        for layer in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
            for block in layer:
                step = _Int8Block(cast(Block, block), reached)
                self._blocks.append(step)
                reached = step.reached
        self.largest_feature = float(reached.max())

    def __call__(self, slabs: Tensor) -> EncodedSlabs:
        x = _pooled(self._stem(self._stem.quantised(slabs.contiguous(memory_format=torch.channels_last))))
        for block in self._blocks[:-1]:
            x = block(x)
        features = self._blocks[-1].to_float(x)
        return EncodedSlabs(features, self._encoder.logits(features))


class _Int8Block:
    """Two convolutions and a way round them, for an input whose channels reach up to ``reached``."""

    def __init__(self, block: Block, reached: Tensor) -> None:
        self._scale = float(reached.max()) / 255
        inner = float(_reached(block.bn1).max())
        self._first = _Convolution(_folded(block.conv1, block.bn1), float(reached.max()), inner)
        self._way = None
        if isinstance(block.downsample, nn.Sequential):
            convolution, norm = cast(nn.Conv2d, block.downsample[0]), cast(nn.BatchNorm2d, block.downsample[1])
            beyond = float(torch.maximum(_reached(norm), _reached(norm, -1.0)).max())
            self._way = _Convolution(_folded(convolution, norm), float(reached.max()), beyond, signed=True)
            reached = _reached(norm)
        self.reached = (_reached(block.bn2) + reached).relu()
        self._second = _Convolution(_folded(block.conv2, block.bn2), inner, float(self.reached.max()))

    def __call__(self, x: Tensor) -> Tensor:
        inner = self._first(x)
        if self._way is None:
            return self._second.plus(inner, x, self._scale, 0)
        return self._second.plus(inner, self._way(x, relu=False), self._way.output_scale, self._way.output_zero)

    def to_float(self, x: Tensor) -> Tensor:
        """The same for a block without a convolution on its way round, not rounded at the end."""
        return self._second.plus(self._first(x), x.float() * self._scale, 1.0, 0)


class _Int8Gates(nn.Module):
    """The input's half of all gates; takes and gives float32."""

    def __init__(self, convolution: nn.Conv2d, largest: float) -> None:
        super().__init__()
        self._convolution = _Convolution(convolution, largest, 1.0)

    def forward(self, features: Tensor) -> Tensor:
        given = features.contiguous(memory_format=torch.channels_last)
        return self._convolution.to_float(self._convolution.quantised(given))


def _folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    return fuse_conv_bn_eval(convolution, norm)


def _reached(norm: nn.BatchNorm2d, sign: float = 1.0) -> Tensor:
    """``(channels,)``: the largest output of a normalisation that is told apart; with -1 of its negative."""
    return sign * norm.bias.detach() + DEVIATIONS * norm.weight.detach().abs()


def _pooled(x: Tensor) -> Tensor:
    """3 x 3 max-pooling with stride 2 of uint8 from 0, which torch's own refuses in large pictures."""
    padded = F.pad(x, (1, 1, 1, 1))
    rows = torch.maximum(torch.maximum(padded[:, :, :-2:2], padded[:, :, 1:-1:2]), padded[:, :, 2::2])
    return torch.maximum(torch.maximum(rows[..., :-2:2], rows[..., 1:-1:2]), rows[..., 2::2])
