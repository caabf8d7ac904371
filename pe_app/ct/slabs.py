"""What the networks see of a volume: slabs of 5 slices, and the way back from their maps to the patient.

Stage I takes one slab round an annotated slice (``slab_at``), stage II fifty over the lung (``study_slabs``).
Every step from the CT to a slab is linear in the slice index, so the way back is one affine.
Source: sections 2.1 and 3.1 of the paper; [ours] marks what the paper leaves open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.sparse import csr_array

from pe_app.common.errors import InputError
from pe_app.ct.lungs import SliceRange
from pe_app.ct.volume import PADDING_HU, Volume

ENCODER_STRIDE = 16
"""Pixels of a slab per cell of the encoder's last map: 384 -> 24."""

MOST = 1000
"""Slabs, slices between them, slices in one: more is a damaged or hostile model file."""
LARGEST_MATRIX = 2048
LARGEST_HU = 32768.0
SMALLEST_PIXEL_MM, LARGEST_PIXEL_MM = 0.2, 5.0

BODY_HU = -300
"""Above this a voxel is body, or the table under it."""


@dataclass(frozen=True)
class SlabConfig:
    """How a volume becomes slabs. The defaults are the paper's (section 3.1) unless marked [ours].

    Attributes:
        spacing_mm: slice spacing that every volume is resampled to first.
        slices_per_slab: slices of a slab, the channels of the encoder's input.
        slab_count: slabs of a study.
        slab_stride: slices between the starts of neighbouring slabs in the resized lung range.
        slab_spacing: ``"lung"`` takes the 5 slices of the lung range resized to ``range_slices`` (the paper's way);
            ``"physical"`` takes them ``spacing_mm`` apart round each of the 50 positions, as stage I does [ours].
        matrix: rows and columns that every slice is resampled to [ours].
        crop: rows and columns of the centre crop; a multiple of 16.
        pixel_mm: size of a slab's pixels. None takes the paper's ``crop`` of ``matrix`` pixels, whatever they measure;
            a size takes ``crop`` pixels of it round the middle of the body instead, and ``matrix`` plays no part: the
            same anatomy then has the same size in every study [ours].
        hu_window: HU that become 0 and 1.
    """

    spacing_mm: float = 2.5
    slices_per_slab: int = 5
    slab_count: int = 50
    slab_stride: int = 4
    slab_spacing: Literal["lung", "physical"] = "lung"
    matrix: int = 512
    crop: int = 384
    pixel_mm: float | None = None
    hu_window: tuple[float, float] = (-1024.0, 500.0)

    def __post_init__(self) -> None:
        if self.crop % ENCODER_STRIDE or self.crop > self.matrix:
            raise ValueError(f"crop must be a multiple of {ENCODER_STRIDE} and at most the matrix, got {self}")
        sizes = (self.slab_count, self.slab_stride, self.slices_per_slab, self.matrix, self.crop)
        if min(sizes) < 1 or max(sizes[:3]) > MOST or self.matrix > LARGEST_MATRIX or not 0 < self.spacing_mm < MOST:
            raise ValueError(f"no study needs slabs of that number or size: {self}")
        if self.pixel_mm is not None and not SMALLEST_PIXEL_MM <= self.pixel_mm <= LARGEST_PIXEL_MM:
            raise ValueError(
                f"pixel_mm must be from {SMALLEST_PIXEL_MM} to {LARGEST_PIXEL_MM} mm, or None, got {self.pixel_mm}"
            )
        if self.slices_per_slab % 2 == 0 or self.slab_spacing not in ("lung", "physical"):
            raise ValueError(f"a slab needs a middle slice and a spacing of 'lung' or 'physical', got {self}")
        if not -LARGEST_HU <= self.hu_window[0] < self.hu_window[1] <= LARGEST_HU:
            raise ValueError(f"the HU window goes from a lower to a higher value, got {self.hu_window}")

    @property
    def range_slices(self) -> int:
        """Slices that the lung range is resized to: 200."""
        return self.slab_count * self.slab_stride

    @property
    def grid(self) -> int:
        """Rows and columns of an attention map: 24."""
        return self.crop // ENCODER_STRIDE


@dataclass(frozen=True, eq=False)
class Slabs:
    """The slabs of one study, from the feet to the head, and their place in the CT.

    Attributes:
        pixels: ``(slab_count, slices_per_slab, crop, crop)`` float32 from 0 to 1; a read-only view in which
            neighbouring slabs share memory.
        grid_affine: ``(4, 4)``, lays the coarse grid (slab, row, column) of the maps into LPS mm, as a Volume's.
        slice_index: ``(slab_count,)``, the CT slice nearest to the middle of each slab.
        z_mm: ``(slab_count,)``, LPS z of the middle of each slab, at the centre of the crop.
    """

    pixels: NDArray[np.float32]
    grid_affine: NDArray[np.float64]
    slice_index: NDArray[np.int64]
    z_mm: NDArray[np.float64]

    def to_volume(self, maps: NDArray[np.generic], name: str = "attention") -> Volume:
        """Maps ``(slab_count, grid, grid)`` as a volume on their own coarse grid in patient space."""
        expected = (len(self.pixels), *(n // ENCODER_STRIDE for n in self.pixels.shape[2:]))
        if maps.shape != expected:
            raise ValueError(f"expected maps of shape {expected}, got {maps.shape}")
        return Volume(maps, self.grid_affine, name)


@dataclass(frozen=True)
class CropPlane:
    """Where a slab's pixels lie in a slice: pixel k is centred at CT index ``first + k * step``, along rows, columns.

    Attributes:
        step: CT pixels per pixel of a slab.
        first: fractional CT index of the first pixel.
    """

    step: tuple[float, float]
    first: tuple[float, float]


def slab_at(volume: Volume, slice_index: int, config: SlabConfig) -> NDArray[np.float32]:
    """The slab round one CT slice, for stage I: ``(slices_per_slab, crop, crop)``, from 0 to 1.

    The annotated slice is exactly the middle channel; its neighbours lie ``spacing_mm`` apart and are interpolated
    linearly. Beyond the ends of the volume the outermost slice is repeated [ours].
    """
    if not 0 <= slice_index < volume.shape[0]:
        raise InputError(f"{volume.name}: there is no slice {slice_index}, the slices are 0 to {volume.shape[0] - 1}")
    weights = _slab_weights(np.array([float(slice_index)]), volume, config)
    return _weighted_slices(volume, weights, config)


def study_slabs(volume: Volume, lung: SliceRange, config: SlabConfig) -> Slabs:
    """The slabs of a whole study, for stage II.

    The slices that contain lung, at ``spacing_mm``, are resized to 200; slab k covers slices 4k to 4k+4 of them and
    the last slab repeats slice 199 [ours]. Both interpolations are linear in z and are applied as one.

    Args:
        volume: the CT in HU.
        lung: first and last CT slice with lung (``lung_range``).
        config: the settings; ``slab_spacing="physical"`` keeps the positions and takes slices ``spacing_mm`` apart.

    Raises:
        InputError: if the lung range is shorter than one slab.
    """
    first, count = _lung_on_resampled_grid(volume, lung, config)
    step = config.spacing_mm / volume.spacing_mm[0]  # CT slices per resampled slice
    per_slice = count / config.range_slices  # resampled slices per resized slice, extents preserved
    resized = (np.arange(config.range_slices) + 0.5) * per_slice - 0.5
    middle = config.slab_stride * np.arange(config.slab_count) + config.slices_per_slab // 2
    centres = (first + (middle + 0.5) * per_slice - 0.5) * step  # in CT slices; the last may touch slice 199 twice

    if config.slab_spacing == "lung":
        resize = _interpolation(np.clip(resized, 0, count - 1), count)
        resample = _interpolation((first + np.arange(count)) * step, volume.shape[0])
        slices = _weighted_slices(volume, csr_array(resize @ resample), config)
        overhang = config.slices_per_slab - config.slab_stride
        slices = np.concatenate([slices, np.repeat(slices[-1:], max(overhang, 0), axis=0)])
        windows = np.lib.stride_tricks.sliding_window_view(slices, config.slices_per_slab, axis=0)
        pixels = np.moveaxis(windows[:: config.slab_stride][: config.slab_count], -1, 1)
    else:
        flat = _weighted_slices(volume, _slab_weights(centres, volume, config), config)
        pixels = flat.reshape(config.slab_count, config.slices_per_slab, config.crop, config.crop)
        pixels.setflags(write=False)

    grid_affine = volume.affine @ _grid_to_index(volume, centres, config)
    middle_cell = np.stack([np.arange(config.slab_count), *[np.full(config.slab_count, (config.grid - 1) / 2)] * 2], 1)
    z_mm = (middle_cell @ grid_affine[:3, :3].T + grid_affine[:3, 3])[:, 2]
    nearest = np.clip(np.rint(centres), 0, volume.shape[0] - 1).astype(np.int64)
    return Slabs(pixels, grid_affine, nearest, z_mm)


def crop_plane(volume: Volume, config: SlabConfig) -> CropPlane:
    """Where the pixels of a study's slabs lie in its slices."""
    if config.pixel_mm is None:
        return _centre_crop(volume.shape[1:], config)
    steps = [config.pixel_mm / mm for mm in volume.spacing_mm[1:]]
    middles = _middle_of_body(volume)
    firsts = [middle - (config.crop - 1) / 2 * step for middle, step in zip(middles, steps, strict=True)]
    return CropPlane((steps[0], steps[1]), (firsts[0], firsts[1]))


def mask_crop(mask: NDArray[np.generic], config: SlabConfig, plane: CropPlane | None = None) -> NDArray[np.float32]:
    """One slice's mask ``(rows, columns)`` on the pixels of a slab, ``(crop, crop)``, above 0 where the mask is.

    Args:
        mask: of one slice.
        config: the settings.
        plane: of the mask's CT (``crop_plane``); needed with ``pixel_mm`` only.
    """
    plane = plane or _centre_crop(mask.shape, config)
    cropped: NDArray[np.float32] = _in_plane(np.asarray(mask != 0)[None], plane, config, outside=0.0)[0]
    return cropped


def attention_target(
    mask: NDArray[np.generic], config: SlabConfig, plane: CropPlane | None = None
) -> NDArray[np.float32]:
    """The cells of the attention map that a slice's mask covers: ``(grid, grid)``, 0 or 1; arguments as ``mask_crop``.

    Reduced with antialiased bilinear interpolation, every value above 0 becomes 1: slightly larger than the embolism
    on purpose (section 2.2 of the paper). Plain bilinear interpolation would sample single points and lose small
    emboli. Empty only where the mask lies outside the centre crop.
    """
    cropped = torch.from_numpy(mask_crop(mask, config, plane))[None, None]
    reduced = F.interpolate(cropped, (config.grid, config.grid), mode="bilinear", antialias=True)
    return (reduced[0, 0] > 0).numpy().astype(np.float32)


def _lung_on_resampled_grid(volume: Volume, lung: SliceRange, config: SlabConfig) -> tuple[int, int]:
    """First slice and number of slices of the lung range on the grid of ``spacing_mm`` that starts at CT slice 0."""
    step = config.spacing_mm / volume.spacing_mm[0]
    last_slice = int(np.floor((volume.shape[0] - 1) / step + 1e-6))
    first = int(np.clip(np.rint(lung.first / step), 0, last_slice))
    last = int(np.clip(np.rint(lung.last / step), 0, last_slice))
    count = last - first + 1
    if count < config.slices_per_slab:
        raise InputError(
            f"{volume.name}: lung on {count} slices of {config.spacing_mm} mm only (CT slices {lung.first} to "
            f"{lung.last}); a study needs at least {config.slices_per_slab}: export the whole chest"
        )
    return first, count


def _interpolation(positions: NDArray[np.float64], size: int) -> csr_array:
    """Matrix ``(len(positions), size)`` of linear interpolation at fractional indices; beyond the ends, the end."""
    clamped = np.clip(positions, 0, size - 1)
    lower = np.minimum(np.floor(clamped).astype(np.int64), max(size - 2, 0))
    upper = np.minimum(lower + 1, size - 1)
    fraction = clamped - lower
    rows = np.arange(len(positions))
    entries = np.concatenate([1 - fraction, fraction])
    places = (np.concatenate([rows, rows]), np.concatenate([lower, upper]))
    matrix = csr_array((entries, places), shape=(len(positions), size))
    matrix.eliminate_zeros()
    return matrix


def _slab_weights(centres: NDArray[np.float64], volume: Volume, config: SlabConfig) -> csr_array:
    """Weights of the CT slices in slabs whose slices lie ``spacing_mm`` apart round each centre (in CT slices)."""
    half = config.slices_per_slab // 2
    offsets = np.arange(-half, half + 1) * config.spacing_mm / volume.spacing_mm[0]
    return _interpolation((centres[:, None] + offsets).ravel(), volume.shape[0])


def _weighted_slices(volume: Volume, weights: csr_array, config: SlabConfig) -> NDArray[np.float32]:
    """Weighted sums of CT slices ``(len(weights), crop, crop)``, windowed to 0..1; only the slices used are read."""
    used = np.unique(weights.indices)
    plane = crop_plane(volume, config)
    planes = _in_plane(volume.voxels[used], plane, config, outside=PADDING_HU)
    mixed: NDArray[np.float32] = weights[:, used].astype(np.float32) @ planes.reshape(len(used), -1)
    low, high = config.hu_window
    np.clip(mixed, low, high, out=mixed)
    mixed -= low
    mixed /= high - low
    return np.reshape(mixed, (-1, config.crop, config.crop))


def _centre_crop(shape: tuple[int, ...], config: SlabConfig) -> CropPlane:
    if config.pixel_mm is not None:
        raise ValueError("with pixel_mm the crop lies where the body is: give the CT's crop_plane")
    margin = (config.matrix - config.crop) // 2
    down, across = (size / config.matrix for size in shape)  # extents preserved
    return CropPlane((down, across), ((margin + 0.5) * down - 0.5, (margin + 0.5) * across - 0.5))


def _middle_of_body(volume: Volume) -> tuple[float, float]:
    """Row and column of the body's centre of mass, over all slices; the middle of the image where there is no body."""
    slices = max(1, volume.shape[0] // 24)
    rows, columns = (max(1, round(4 / mm)) for mm in volume.spacing_mm[1:])
    body = np.greater(volume.voxels[::slices, ::rows, ::columns], BODY_HU).sum(0)
    if not body.any():
        return (volume.shape[1] - 1) / 2, (volume.shape[2] - 1) / 2
    across, down = body.sum(0), body.sum(1)
    row, column = (float(np.average(np.arange(len(sums)), weights=sums)) for sums in (down, across))
    return row * rows, column * columns


def _in_plane(planes: NDArray[np.generic], plane: CropPlane, config: SlabConfig, outside: float) -> NDArray[np.float32]:
    """Slices ``(n, rows, columns)`` resampled and cropped: ``(n, crop, crop)``, ``outside`` beyond the image."""
    if config.pixel_mm is not None:
        along_rows = _resampled(planes.astype(np.float32), 1, plane.first[0], plane.step[0], config.crop, outside)
        return _resampled(along_rows, 2, plane.first[1], plane.step[1], config.crop, outside)
    margin = (config.matrix - config.crop) // 2
    if planes.shape[1:] == (config.matrix, config.matrix):
        return planes[:, margin : margin + config.crop, margin : margin + config.crop].astype(np.float32)
    tensor = torch.from_numpy(planes.astype(np.float32))[:, None]
    resampled = F.interpolate(tensor, (config.matrix, config.matrix), mode="bilinear", antialias=True)
    return resampled[:, 0, margin : margin + config.crop, margin : margin + config.crop].numpy()


def _resampled(
    planes: NDArray[np.float32], axis: int, first: float, step: float, count: int, outside: float
) -> NDArray[np.float32]:
    """Linear interpolation along one axis at ``first + k * step``; over a whole new pixel where that is larger."""
    reach, size = max(step, 1.0), planes.shape[axis]
    centres = first + np.arange(count) * step
    start = np.floor(centres - reach).astype(np.int64) + 1
    taps = start[:, None] + np.arange(int(np.ceil(2 * reach)) + 1)
    weights = np.clip(1 - np.abs(taps - centres[:, None]) / reach, 0, None)
    weights /= weights.sum(1, keepdims=True)
    weights[(taps < 0) | (taps >= size)] = 0
    shape = (1, count, 1) if axis == 1 else (1, 1, count)
    missing = (outside * (1 - weights.sum(1))).astype(np.float32).reshape(shape)
    total: NDArray[np.float32] = np.take(planes, np.zeros(count, np.int64), axis) * np.float32(0) + missing
    for tap, weight in zip(np.clip(taps, 0, size - 1).T, weights.T.astype(np.float32), strict=True):
        if weight.any():
            total += np.take(planes, tap, axis) * weight.reshape(shape)
    return total


def _grid_to_index(volume: Volume, centres: NDArray[np.float64], config: SlabConfig) -> NDArray[np.float64]:
    """``(4, 4)``: cell (slab, row, column) of the maps to fractional CT index (slice, row, column), at cell centres."""
    plane = crop_plane(volume, config)
    matrix = np.eye(4)
    matrix[0, 0] = centres[1] - centres[0]
    matrix[0, 3] = centres[0]
    for axis, (step, first) in enumerate(zip(plane.step, plane.first, strict=True), start=1):
        matrix[axis, axis] = ENCODER_STRIDE * step
        matrix[axis, 3] = first + (ENCODER_STRIDE - 1) / 2 * step
    return matrix
