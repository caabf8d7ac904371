"""Every step as a textbook would write it: right, plain, and not hurried. What ``pe-app bench`` compares with.

They use the same networks and weights, so the results agree and only the way of computing differs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from pe_app.ct.slabs import SlabConfig
from pe_app.ct.volume import Volume
from pe_app.model import winograd
from pe_app.model.losses import AttentionLoss, attention_loss
from pe_app.model.slab_encoder import SlabEncoder, normalised
from pe_app.model.study_classifier import ConvLSTM, StudyClassifier


def read_series(folder: Path) -> NDArray[np.float64]:
    """HU ``(slices, rows, columns)`` of a DICOM series: every file decoded, sorted by z, rescaled, stacked."""
    files = [pydicom.dcmread(path) for path in folder.iterdir() if path.is_file()]
    files.sort(key=lambda file: float(file.ImagePositionPatient[2]))
    return np.stack([file.pixel_array * float(file.RescaleSlope) + float(file.RescaleIntercept) for file in files])


def find_lungs(hu: NDArray[np.int16] | NDArray[np.float64]) -> tuple[int, int]:
    """First and last slice of the two largest pieces of air that do not touch the edge, at full resolution."""
    labels, _ = ndimage.label(hu < -400)
    edge = np.unique(np.concatenate([labels[:, [0, -1]].ravel(), labels[:, :, [0, -1]].ravel()]))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    sizes[edge] = 0
    lungs = np.isin(labels, np.argsort(sizes)[-2:])
    slices = np.flatnonzero(lungs.any(axis=(1, 2)))
    return int(slices[0]), int(slices[-1])


def prepare(volume: Volume, lung: tuple[int, int], config: SlabConfig) -> NDArray[np.float32]:
    """Slabs ``(slab_count, slices_per_slab, crop, crop)``: each resampling of the paper a pass over the volume."""
    voxels = volume.voxels.astype(np.float32)
    if voxels.shape[1:] != (config.matrix, config.matrix):
        voxels = ndimage.zoom(voxels, (1, config.matrix / voxels.shape[1], config.matrix / voxels.shape[2]), order=1)
    step = config.spacing_mm / volume.spacing_mm[0]
    resampled = ndimage.zoom(voxels, (1 / step, 1, 1), order=1)
    chest = resampled[round(lung[0] / step) : round(lung[1] / step) + 1]
    resized = ndimage.zoom(chest, (config.range_slices / len(chest), 1, 1), order=1)
    margin = (config.matrix - config.crop) // 2
    cropped = resized[:, margin : margin + config.crop, margin : margin + config.crop]
    low, high = config.hu_window
    scaled = (np.clip(cropped, low, high) - low) / (high - low)
    scaled = np.concatenate([scaled, scaled[-1:]])
    starts = range(0, config.range_slices, config.slab_stride)
    slabs: NDArray[np.float32] = np.stack([scaled[start : start + config.slices_per_slab] for start in starts])
    return slabs


def without_shortcuts(network: nn.Module) -> None:
    """Let every convolution of a network be direct from now on, in torch's default memory order."""
    network.to(memory_format=torch.contiguous_format)
    winograd.choose(network, by_points=False)


def encode(encoder: SlabEncoder, slabs: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits of slabs, one after the other, in float32."""
    with torch.inference_mode():
        encoded = [encoder(slab[None]) for slab in slabs]
    return torch.cat([each.features for each in encoded]), torch.cat([each.logits for each in encoded])


def grad_cam(encoder: SlabEncoder, features: Tensor, logits: Tensor, *, learning: bool) -> Tensor:
    """Attention maps ``(batch, rows, columns)`` by back-propagation; with its own graph where it is learned from."""
    score = (logits[:, 1] - logits[:, 0]).sum()
    (gradient,) = torch.autograd.grad(score, features, create_graph=learning, retain_graph=learning)
    return (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu()


def attention_on_ct(encoder: SlabEncoder, features: Tensor, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The attention of a whole study interpolated to the CT's own grid."""
    leaf = features.detach().float().requires_grad_()
    maps = normalised(grad_cam(encoder, leaf, encoder.logits(leaf), learning=False))
    full = F.interpolate(maps[None, None], shape, mode="trilinear")[0, 0]
    return (255 * full).byte().cpu().numpy()


def encoder_step(
    encoder: SlabEncoder,
    optimiser: torch.optim.Optimizer,
    slabs: Tensor,
    targets: Tensor,
    labels: Tensor,
) -> None:
    """One step of stage I in float32 whose attention is a second back-propagation through the network's head."""
    encoder.train()
    encoded = encoder(slabs)
    maps = grad_cam(encoder, encoded.features, encoded.logits, learning=True)
    loss = F.cross_entropy(encoded.logits, labels) + attention_loss(maps, targets, labels, AttentionLoss()).mean()
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


def classify(classifier: StudyClassifier, features: Tensor) -> Tensor:
    """Logits ``(batch,)`` of features ``(batch, slabs, channels, grid, grid)``, a cell after the other in a loop.

    Every step is one convolution of the concatenated input and state, and one direction follows the other.
    """
    x = features.to(classifier.fc.weight.dtype)
    for unit in (classifier.unit1, classifier.unit2):
        for lstm in [unit] if isinstance(unit, ConvLSTM) else unit.children():
            x = _conv_lstm(lstm, x)  # type: ignore[arg-type]
        x = F.max_pool2d(x.flatten(0, 1), 2).reshape(*x.shape[:3], x.shape[3] // 2, x.shape[4] // 2)
    return classifier.fc(classifier.dropout(x.mean(1).flatten(1)))[:, 0]  # type: ignore[no-any-return]


def classifier_step(
    classifier: StudyClassifier, optimiser: torch.optim.Optimizer, features: Tensor, labels: Tensor
) -> None:
    """One step of stage II in float32 over ``classify``."""
    classifier.train()
    loss = F.binary_cross_entropy_with_logits(classify(classifier, features), labels)
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


def _conv_lstm(lstm: ConvLSTM, sequence: Tensor) -> Tensor:
    states = []
    parts = zip(
        lstm.directions,
        lstm.input_gates.weight.chunk(len(lstm.directions)),
        lstm.input_gates.bias.chunk(len(lstm.directions)),  # type: ignore[union-attr]
        strict=True,
    )
    for direction, weight, bias in parts:
        kernel = torch.cat([weight, lstm.state_gates[direction].weight], 1)  # type: ignore[list-item]
        filters = len(weight) // 4
        state = sequence.new_zeros(len(sequence), filters, *sequence.shape[3:])
        cell = state
        order = range(sequence.shape[1]) if direction == "ascending" else reversed(range(sequence.shape[1]))
        seen: dict[int, Tensor] = {}
        for position in order:
            gates = F.conv2d(torch.cat([sequence[:, position], state], 1), kernel, bias, padding=1)
            write, forget, read, candidate = gates.chunk(4, 1)
            cell = forget.sigmoid() * cell + write.sigmoid() * candidate.tanh()
            state = read.sigmoid() * cell.tanh()
            seen[position] = state
        states.append(torch.stack([seen[position] for position in range(sequence.shape[1])], 1))
    joined = torch.cat(states, 2)
    return lstm.norm(joined.flatten(0, 1)).reshape(joined.shape)  # type: ignore[no-any-return]
