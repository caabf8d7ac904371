"""3 x 3 convolutions with a fifth of the multiplications, for processors without a GPU.

A tile of 6 x 6 results needs 6 * 6 * 3 * 3 = 324 products for each pair of channels when every result is computed by
itself. Interpolation at eight points (Winograd 1980; Lavin and Gray 2016, arXiv:1509.09308) needs 8 * 8 = 64: tiles of
8 x 8 pixels and the kernel are carried over to the points, multiplied there, and carried back. Only the product over
channels is large; it is one matrix product for each of the 64 points. In float32 the result is off by at most 1e-4 of
its spread, a hundredth and less of what bfloat16 costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 6
"""Rows and columns of the results of a tile; its pixels overlap the next tile's by two."""

POINTS = TILE + 2

FEWEST_PRODUCTS = {torch.float32: 96, torch.bfloat16: 150}
"""Products for each number that is carried over or back, ``channels * filters / (channels + filters)``, from which on
fewer products take no more time: measured against a direct convolution in float32, and in bfloat16 where autocast would
take that, on two cores with AVX-512 (``tests/measure/convolution_speed.py``)."""

FEWEST_TILES = 64
"""For fewer, carrying the kernel over costs more than the products that it saves."""

TILES_AT_ONCE = 320
"""So many tiles of 512 channels take 42 MB at their points."""

# Interpolation at 0, 1, -1, 2, -2, 1/2, -1/2 and infinity, a usual choice since its rounding errors stay small.
_TO_POINTS = torch.tensor(
    [
        [1, 0, -21 / 4, 0, 21 / 4, 0, -1, 0],
        [0, 1, 1, -17 / 4, -17 / 4, 1, 1, 0],
        [0, -1, 1, 17 / 4, -17 / 4, -1, 1, 0],
        [0, 1 / 2, 1 / 4, -5 / 2, -5 / 4, 2, 1, 0],
        [0, -1 / 2, 1 / 4, 5 / 2, -5 / 4, -2, 1, 0],
        [0, 2, 4, -5 / 2, -5, 1 / 2, 1, 0],
        [0, -2, 4, 5 / 2, -5, -1 / 2, 1, 0],
        [0, -1, 0, 21 / 4, 0, -21 / 4, 0, 1],
    ],
    dtype=torch.float64,
)
_KERNEL_TO_POINTS = torch.tensor(
    [
        [1, 0, 0],
        [-2 / 9, -2 / 9, -2 / 9],
        [-2 / 9, 2 / 9, -2 / 9],
        [1 / 90, 1 / 45, 2 / 45],
        [1 / 90, -1 / 45, 2 / 45],
        [32 / 45, 16 / 45, 8 / 45],
        [32 / 45, -16 / 45, 8 / 45],
        [0, 0, 1],
    ],
    dtype=torch.float64,
)
_FROM_POINTS = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 0],
        [0, 1, -1, 2, -2, 1 / 2, -1 / 2, 0],
        [0, 1, 1, 4, 4, 1 / 4, 1 / 4, 0],
        [0, 1, -1, 8, -8, 1 / 8, -1 / 8, 0],
        [0, 1, 1, 16, 16, 1 / 16, 1 / 16, 0],
        [0, 1, -1, 32, -32, 1 / 32, -1 / 32, 1],
    ],
    dtype=torch.float64,
)


class Conv3x3(nn.Conv2d):
    """``nn.Conv2d`` of 3 x 3 with stride 1 that keeps rows and columns; by points on a CPU if that is faster.

    By points it is in float32 also under autocast: with many channels that is faster than bfloat16 directly.

    Args:
        channels: of the input.
        filters: channels of the output.
        bias: as for ``nn.Conv2d``.

    Attributes:
        by_points: False for a direct convolution always.
    """

    def __init__(self, channels: int, filters: int, *, bias: bool = True) -> None:
        super().__init__(channels, filters, 3, padding=1, bias=bias)
        self.by_points = True

    def forward(self, images: Tensor) -> Tensor:
        """``(batch, channels, rows, columns)`` to ``(batch, filters, rows, columns)``."""
        if not (self.by_points and images.device.type == "cpu" and self._pays(images)):
            return super().forward(images)
        results = convolve(images, self.weight)
        return results if self.bias is None else results + self.bias[:, None, None]

    def _pays(self, images: Tensor) -> bool:
        batch, channels, rows, columns = images.shape
        tiles = batch * _tiles(rows) * _tiles(columns)
        products = channels * self.out_channels / (channels + self.out_channels)
        direct = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
        return tiles >= FEWEST_TILES and products >= FEWEST_PRODUCTS.get(direct, math.inf)


def choose(network: nn.Module, *, by_points: bool) -> None:
    """Set ``by_points`` of all convolutions of a network."""
    for module in network.modules():
        if isinstance(module, Conv3x3):
            module.by_points = by_points


def convolve(images: Tensor, kernel: Tensor) -> Tensor:
    """Convolution by points, differentiable once.

    Args:
        images: ``(batch, channels, rows, columns)``; under autocast taken as float32.
        kernel: ``(filters, channels, 3, 3)``.

    Returns:
        ``(batch, filters, rows, columns)``, channels last in memory: that of
        ``torch.nn.functional.conv2d(images, kernel, padding=1)`` but for rounding.
    """
    results: Tensor = _Convolution.apply(images, kernel)
    return results


class _Convolution(torch.autograd.Function):
    """Both ways of the convolution; the way back is the same algorithm transposed, with as few products."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, images: Tensor, kernel: Tensor) -> Tensor:
        points = _kernel_to_points(kernel)
        ctx.save_for_backward(images, points)
        batch, _, rows, columns = images.shape
        results = images.new_empty(batch, rows, columns, len(kernel))
        for part in _parts(images):
            products = torch.bmm(_to_points(images[part]), points.transpose(1, 2))
            results[part] = _from_points(products, rows, columns)
        return results.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        images, points = ctx.saved_tensors
        of_images, of_kernel = ctx.needs_input_grad
        batch, channels, rows, columns = images.shape
        images_slope = images.new_empty(batch, rows, columns, channels) if of_images else None
        points_slope = None
        for part in _parts(images):
            products_slope = _from_points_transposed(slope[part])
            if of_kernel:
                pixels, filters = _to_points(images[part]), products_slope.transpose(1, 2)
                points_slope = (
                    torch.bmm(filters, pixels) if points_slope is None else points_slope.baddbmm_(filters, pixels)
                )
            if images_slope is not None:
                tiles_slope = torch.bmm(products_slope, points)
                images_slope[part] = _to_points_transposed(tiles_slope, rows, columns)
        return (
            None if images_slope is None else images_slope.permute(0, 3, 1, 2),
            None if points_slope is None else _kernel_to_points_transposed(points_slope),
        )


def _tiles(length: int) -> int:
    return -(-length // TILE)


def _parts(images: Tensor) -> Iterator[slice]:
    """Some images at a time, so that their tiles take little memory."""
    batch, _, rows, columns = images.shape
    step = max(1, TILES_AT_ONCE // (_tiles(rows) * _tiles(columns)))
    return (slice(start, start + step) for start in range(0, batch, step))


def _along(matrix: Tensor, values: Tensor) -> Tensor:
    """The matrix times the values' first axis."""
    return (matrix.to(values) @ values.reshape(len(values), -1)).reshape(-1, *values.shape[1:])


def _along_second(matrix: Tensor, values: Tensor) -> Tensor:
    """The matrix times the values' second axis."""
    return (matrix.to(values) @ values.flatten(2)).reshape(len(values), -1, *values.shape[2:])


# Below, tiles at their points are (column point, row point, batch, tiles of rows, tiles of columns, channels).


def _to_points(images: Tensor) -> Tensor:
    """Images ``(batch, channels, rows, columns)`` to ``(points, tiles, channels)``."""
    batch, channels, rows, columns = images.shape
    down, across = _tiles(rows), _tiles(columns)
    margin = (0, 0, 1, TILE * across - columns + 1, 1, TILE * down - rows + 1)
    padded = F.pad(images.permute(0, 2, 3, 1), margin)
    at_rows = _along(_TO_POINTS, padded.unfold(1, POINTS, TILE).permute(4, 0, 1, 2, 3))
    both = _along(_TO_POINTS, at_rows.unfold(3, POINTS, TILE).permute(5, 0, 1, 2, 3, 4))
    return both.view(POINTS**2, batch * down * across, channels)


def _to_points_transposed(slope: Tensor, rows: int, columns: int) -> Tensor:
    """``(points, tiles, channels)`` to ``(batch, rows, columns, channels)``: overlapping tiles add up."""
    down, across, channels = _tiles(rows), _tiles(columns), slope.shape[2]
    at_columns = _along(_TO_POINTS.T, slope.view(POINTS, -1, across, channels))
    at_rows = _overlap_add(at_columns).view(POINTS, -1, down, (TILE * across + 2) * channels)
    padded = _overlap_add(_along(_TO_POINTS.T, at_rows)).view(-1, TILE * down + 2, TILE * across + 2, channels)
    return padded[:, 1 : rows + 1, 1 : columns + 1]


def _overlap_add(parts: Tensor) -> Tensor:
    """``(POINTS, a, tiles, b)`` to ``(a, TILE * tiles + 2, b)``: the last two of a tile lie on the next one's first."""
    _, before, tiles, after = parts.shape
    whole = parts.new_zeros(before, tiles + 1, TILE, after)
    whole[:, :-1] = parts[:TILE].permute(1, 2, 0, 3)
    whole[:, 1:, :2] += parts[TILE:].permute(1, 2, 0, 3)
    return whole.flatten(1, 2)[:, : TILE * tiles + 2].contiguous()


def _from_points(products: Tensor, rows: int, columns: int) -> Tensor:
    """``(points, tiles, filters)`` to ``(batch, rows, columns, filters)``."""
    down, across, filters = _tiles(rows), _tiles(columns), products.shape[2]
    half = _along(_FROM_POINTS, products.view(POINTS, POINTS, -1, filters))
    tiles = _along_second(_FROM_POINTS, half).view(TILE, TILE, -1, down, across, filters)
    whole = tiles.permute(2, 3, 1, 4, 0, 5).reshape(-1, TILE * down, TILE * across, filters)
    return whole[:, :rows, :columns]


def _from_points_transposed(slope: Tensor) -> Tensor:
    """``(batch, filters, rows, columns)`` to ``(points, tiles, filters)``."""
    batch, filters, rows, columns = slope.shape
    down, across = _tiles(rows), _tiles(columns)
    whole = F.pad(slope.permute(0, 2, 3, 1), (0, 0, 0, TILE * across - columns, 0, TILE * down - rows))
    tiles = whole.reshape(batch, down, TILE, across, TILE, filters).permute(4, 2, 0, 1, 3, 5)
    half = _along_second(_FROM_POINTS.T, tiles)
    return _along(_FROM_POINTS.T, half).view(POINTS**2, batch * down * across, filters)


def _kernel_to_points(kernel: Tensor) -> Tensor:
    """``(filters, channels, 3, 3)`` to ``(points, filters, channels)``."""
    half = _along(_KERNEL_TO_POINTS, kernel.permute(3, 2, 0, 1))
    return _along_second(_KERNEL_TO_POINTS, half).flatten(0, 1)


def _kernel_to_points_transposed(slope: Tensor) -> Tensor:
    """``(points, filters, channels)`` to ``(filters, channels, 3, 3)``."""
    half = _along_second(_KERNEL_TO_POINTS.T, slope.view(POINTS, POINTS, *slope.shape[1:]))
    return _along(_KERNEL_TO_POINTS.T, half).permute(2, 3, 1, 0)
