"""What stage II learns from: the features of whole studies, computed once by a frozen stage I."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from pe_app.datasets.cache import PreparedFile, holds, image_of
from pe_app.datasets.sources import StudySource, naming, read_sources
from pe_app.detector import Detector
from pe_app.files import replacing
from pe_app.lungs import lung_range
from pe_app.progress import Progress, ProgressCallback, silent
from pe_app.slabs import study_slabs
from pe_app.studies import Study
from pe_app.volume_io import read_volume


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
    sources = read_sources(studies, annotations=False, progress=progress)
    return tuple(file.path for file in encode_sources(detector, sources, cache_dir, progress))


def encode_sources(
    detector: Detector, sources: Sequence[StudySource], cache_dir: Path, progress: ProgressCallback = silent
) -> tuple[PreparedFile, ...]:
    """``encode_studies`` for studies whose files were identified already."""
    key, count = encoder_key(detector), detector.slabs.slab_count
    shape = (count, detector.encoder.config.feature_channels, detector.slabs.grid, detector.slabs.grid)
    files = []
    for number, source in enumerate(sources):
        report = _part_of("encode studies", number, len(sources), count, source.study.study, progress)
        report(Progress("", 0, count))
        with naming(source.study):
            image, volume = image_of(source, cache_dir)
            path = cache_dir / f"{image}-{key}.npy"
            if not holds(path, np.dtype(np.float16), shape):
                volume = volume or read_volume(source.study.path)
                features, _ = detector.encode(study_slabs(volume, lung_range(volume), detector.slabs), report)
                with replacing(path) as temporary:
                    np.save(temporary, features.cpu().numpy())
        files.append(PreparedFile(source.study.study, image, path))
    progress(Progress("encode studies", len(sources) * count, len(sources) * count))
    return tuple(files)


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


def _part_of(
    task: str, number: int, count: int, size: int, text: str, progress: ProgressCallback
) -> Callable[[Progress], None]:
    """A callback that reports the progress of one of ``count`` parts, each of ``size`` units, as progress of all."""
    return lambda part: progress(Progress(task, number * size + part.done, count * size, text))
