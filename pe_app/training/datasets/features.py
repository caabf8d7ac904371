"""What stage II learns from: the features of whole studies, computed once by a frozen stage I."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from pe_app.common.errors import InputError
from pe_app.common.files import replacing
from pe_app.common.progress import ProgressCallback, silent
from pe_app.ct.lungs import lung_range
from pe_app.ct.slabs import SlabConfig, Slabs, study_slabs
from pe_app.ct.volume_io import read_volume
from pe_app.model.detector import Detector
from pe_app.model.study_classifier import PooledClassifier
from pe_app.studies import Study
from pe_app.training.datasets.cache import IN_THIS_PROCESS, Entry, Preparation, PreparedFile, holds, image_of, prepare
from pe_app.training.datasets.sources import StudySource, read_sources


class StudyItem(NamedTuple):
    """One study of stage II: features ``(slabs, channels, grid, grid)`` float16 and label, 1 for positive."""

    features: Tensor
    label: Tensor


class StudyFeatures(Dataset[StudyItem]):
    """The studies of stage II: files of features (``encode_studies``) and their labels, 1 for positive.

    Attributes:
        files: one a study.
        labels: ``(len,)``, 1 for positive, 0 for negative.
    """

    def __init__(self, files: Sequence[PreparedFile], labels: Sequence[int]) -> None:
        if len(files) != len(labels):
            raise ValueError(f"expected a label a study, got {len(labels)} for {len(files)}")
        self.files = tuple(files)
        self.labels: NDArray[np.uint8] = np.array(labels, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> StudyItem:
        features = np.load(self.files[index].path, mmap_mode="r")
        return StudyItem(torch.from_numpy(np.array(features)), torch.tensor(int(self.labels[index])))

    def pooled_numbers(self, classifier: PooledClassifier) -> tuple[Tensor, Tensor]:
        """What a pooled classifier weighs of every study, ``(studies, numbers)``, and their labels."""
        device = classifier.fc.weight.device
        numbers = [
            classifier.numbers(torch.from_numpy(np.load(file.path))[None].to(device)).cpu()[0] for file in self.files
        ]
        return torch.stack(numbers), torch.from_numpy(np.array(self.labels))


def encode_studies(
    detector: Detector, studies: Sequence[Study], cache_dir: Path, progress: ProgressCallback = silent
) -> tuple[Path, ...]:
    """Features of stage I for whole studies, computed once: the input of stage II.

    Each is a float16 array ``(slabs, channels, grid, grid)`` in ``cache_dir/<image sha256>-<encoder key>.npy``, 29.5 MB
    at full size. Called again after an interruption, only what is missing is computed.

    Args:
        detector: its encoder and slab settings are used, in evaluation mode and its precision.
        studies: any studies.
        cache_dir: may be shared by runs and detectors.
        progress: told after every few slabs; may raise ``Cancelled``.

    Returns:
        One file a study, in the order of ``studies``.

    Raises:
        InputError: that names the study which cannot be used.
    """
    sources = read_sources(studies, annotations=False, progress=progress, cache_dir=cache_dir)
    return tuple(file.path for file in encode_sources(detector, sources, cache_dir, progress))


def encode_sources(
    detector: Detector,
    sources: Sequence[StudySource],
    cache_dir: Path,
    progress: ProgressCallback = silent,
    preparation: Preparation = IN_THIS_PROCESS,
    refused: Callable[[InputError], None] | None = None,
) -> tuple[PreparedFile, ...]:
    """``encode_studies`` for studies whose files were identified already; each of several processes encodes its part.

    Args:
        detector: as for ``encode_studies``; the same in every process.
        sources: the studies.
        cache_dir: as for ``encode_studies``.
        progress: as for ``encode_studies``.
        preparation: in how many processes studies are read while others are encoded, and in how much space.
        refused: told of a study that cannot be used, which is then left out; by default the error is raised.
    """
    key, count = encoder_key(detector), detector.slabs.slab_count
    shape = (count, detector.encoder.config.feature_channels, detector.slabs.grid, detector.slabs.grid)
    half = np.dtype(np.float16)
    entries = [Entry(source, cache_dir, key, half, shape, feature_bytes(detector)) for source in sources]

    def encode(entry: Entry, read: tuple[str, Slabs, Tensor], report: ProgressCallback) -> PreparedFile:
        image, slabs, pixels = read
        file = entry.file(image)
        if holds(file.path, half, shape):  # the same voxels in another file
            return file
        features, _ = detector.encode(replace(slabs, pixels=pixels.numpy()), report)
        with replacing(file.path) as temporary:
            np.save(temporary, features.cpu().numpy())
        return file

    begin = partial(_read, config=detector.slabs)
    files = prepare(
        "encode studies", entries, begin, encode, preparation, progress, units=count, refused=refused
    )  # fmt: skip
    return tuple(file for file in files if file is not None)


def feature_bytes(detector: Detector) -> int:
    """Size of a study's features: two bytes for each of slabs x channels x grid x grid."""
    slabs = detector.slabs
    return 2 * slabs.slab_count * detector.encoder.config.feature_channels * slabs.grid**2


def _read(entry: Entry, config: SlabConfig) -> tuple[str, Slabs, Tensor]:
    """A study's image and slabs, the pixels apart: a tensor goes from process to process without being copied."""
    image, volume = image_of(entry.source, entry.folder)
    volume = volume or read_volume(entry.source.study.path)
    slabs = study_slabs(volume, lung_range(volume), config)
    pixels = torch.from_numpy(slabs.pixels.copy())
    return image, replace(slabs, pixels=slabs.pixels[:0]), pixels


def encoder_key(detector: Detector) -> str:
    """Identity of features: encoder weights, encoder and slab settings."""
    parts = [weights_sha256(detector.encoder), asdict(detector.encoder.config), asdict(detector.slabs)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def weights_sha256(network: nn.Module) -> str:
    """Identity of a network's weights and running statistics."""
    content = hashlib.sha256()
    for name, weight in sorted(network.state_dict().items()):
        content.update(name.encode())
        content.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()
