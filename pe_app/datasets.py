"""What the two stages learn from, prepared once and then read at disk speed: slabs for stage I, features for stage II.

Both caches are files that are whole or absent, named after the content they were made from: a file of another image,
annotation, encoder or setting has another name, so that nothing stale is ever read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from pe_app.annotation import SparseAnnotation
from pe_app.detector import Detector
from pe_app.errors import InputError
from pe_app.files import replacing, write_durably
from pe_app.lungs import SliceRange, lung_range
from pe_app.progress import Progress, ProgressCallback, silent
from pe_app.slabs import ENCODER_STRIDE, SlabConfig, attention_target, slab_at, study_slabs
from pe_app.studies import Study
from pe_app.volume import Volume
from pe_app.volume_io import read_volume

logger = logging.getLogger(__name__)

EMBOLISM, NONE = 1, 0

NegativeSlabs = Literal["mixed", "negative_studies", "matched"]
"""Where slabs without embolism come from: see ``prepare_slabs``."""


class SlabItem(NamedTuple):
    """One slab of stage I, or a batch of them with a leading axis.

    Attributes:
        slab: ``(slices_per_slab, crop, crop)`` float32 from 0 to 1.
        target: ``(grid, grid)`` float32, 0 or 1: the cells that the reader's mask covers; zeros without embolism.
        label: 1 with embolism, 0 without.
        study: which of the data set's studies it is from.
    """

    slab: Tensor
    target: Tensor
    label: Tensor
    study: Tensor


class StudyItem(NamedTuple):
    """One study of stage II: features ``(slabs, channels, grid, grid)`` float16 and label, 1 for positive."""

    features: Tensor
    label: Tensor


@dataclass(frozen=True)
class Augmentation:
    """How strongly slabs are changed at random where that is wanted; the paper (section 3.1) does not [ours].

    Attributes:
        flip: mirror left and right with probability 1/2.
        shift_cells: move in the plane by up to so many cells of the attention map (16 pixels, 11 mm) along rows and
            columns; whole cells, so that the target moves exactly. An embolism is never moved out of the slab.
        jitter_hu: add one offset of up to so many HU to a slab.
        window_cells: learn from square windows of so many cells of the attention map instead of whole slabs, 0 for
            whole ones. A window of a slab with embolism holds a part of it; one without is cut at the place of another
            slab's window, so that the place tells nothing. A quarter of the area costs a quarter of the time. The
            validation looks at windows, too, always the same ones.
    """

    flip: bool = True
    shift_cells: int = 2
    jitter_hu: float = 30.0
    window_cells: int = 0

    def __post_init__(self) -> None:
        if min(self.shift_cells, self.window_cells) < 0 or not 0 <= self.jitter_hu < float("inf"):
            raise InputError(f"augmentation: no strength may be negative, got {self}")


@dataclass(frozen=True, eq=False)
class StudySource:
    """A study of the list with what it was read from.

    Attributes:
        study: its row of the list.
        files_sha256: of the bytes of its image files; knows that an image is the same without decoding it.
        annotation: its reviewed slices; None for a label-only study.
    """

    study: Study
    files_sha256: str
    annotation: SparseAnnotation | None

    @property
    def annotation_sha256(self) -> str:
        """Identity of the reviewed slices and masks; empty for a label-only study."""
        if self.annotation is None:
            return ""
        content = hashlib.sha256(json.dumps(self.annotation.to_json(), sort_keys=True).encode())
        for index in sorted(self.annotation.masks):
            content.update(np.packbits(self.annotation.masks[index]).tobytes())
        return content.hexdigest()


def read_sources(
    studies: Sequence[Study], annotations: bool = True, progress: ProgressCallback = silent
) -> tuple[StudySource, ...]:
    """Read the annotations of all studies and the identity of their images.

    Raises:
        InputError: that names the study whose files are missing or cannot be used.
    """
    sources = []
    for number, study in enumerate(studies):
        progress(Progress("read the studies", number, len(studies), study.study))
        with _naming(study):
            try:
                files_sha256 = _files_sha256(study.path)
            except OSError as error:
                raise InputError(f"{study.path} cannot be read ({error.strerror}): correct the study list") from error
            reviewed = _annotation(study) if annotations else None
        sources.append(StudySource(study, files_sha256, reviewed))
    progress(Progress("read the studies", len(studies), len(studies)))
    return tuple(sources)


@dataclass(frozen=True)
class PreparedFile:
    """What was prepared of one study: its name, the SHA-256 of its voxels, and the file."""

    study: str
    image_sha256: str
    path: Path


class AnnotatedSlabs(Dataset[SlabItem]):
    """The slabs of stage I: annotated slices, and as many without embolism (``prepare_slabs``).

    Files are opened for every item, so that thousands of studies need no file handles and workers share nothing.

    Attributes:
        files: one a study.
        labels: ``(len,)``, 1 with embolism, 0 without.
        slices: ``(len,)``, the CT slice in the middle of each slab.
        places: of each slab, the number of its file and its row in it.
    """

    def __init__(self, files: Sequence[PreparedFile]) -> None:
        self.files = tuple(files)
        records = [np.load(file.path, mmap_mode="r") for file in files]
        self.labels: NDArray[np.uint8] = np.concatenate([record["label"] for record in records])
        self.slices: NDArray[np.int32] = np.concatenate([record["slice"] for record in records])
        self.places = [(file, row) for file, rows in enumerate(records) for row in range(len(rows))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> SlabItem:
        file, row = self.places[index]
        record = np.load(self.files[file].path, mmap_mode="r")[row]
        return SlabItem(
            torch.from_numpy(record["slab"].astype(np.float32)),
            torch.from_numpy(record["target"].astype(np.float32)),
            torch.tensor(int(record["label"])),
            torch.tensor(file),
        )


class TwinSlabs(Dataset[SlabItem]):
    """Slabs in pairs: with embolism, and the same place of the same chest without; a leading axis of 2 in every part.

    Attributes:
        slabs: both of each pair.
        pairs: ``(len, 2)``, their places in ``slabs``.
    """

    def __init__(self, slabs: AnnotatedSlabs, patients: Mapping[str, str]) -> None:
        """Pair the slabs of a study with those of the next one of the list, of the same patient and as many.

        Args:
            slabs: of the training.
            patients: patient by study.

        Raises:
            InputError: if there is no such pair of studies.
        """
        self.slabs = slabs
        counts = [len(np.load(file.path, mmap_mode="r")) for file in slabs.files]
        starts = np.concatenate([[0], np.cumsum(counts)])
        pairs = [
            (starts[number] + row, starts[number + 1] + row)
            for number in range(len(counts) - 1)
            if counts[number] == counts[number + 1]
            and patients[slabs.files[number].study] == patients[slabs.files[number + 1].study]
            and slabs.labels[starts[number] : starts[number + 1]].all()
            and not slabs.labels[starts[number + 1] : starts[number + 2]].any()
            for row in range(counts[number])
        ]
        if not pairs:
            raise InputError("no twins among the studies: list each study with emboli just before the one without")
        self.pairs = np.array(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> SlabItem:
        both = [self.slabs[int(place)] for place in self.pairs[index]]
        return SlabItem(*(torch.stack(parts) for parts in zip(*both, strict=True)))


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


def prepare_slabs(
    sources: Sequence[StudySource],
    config: SlabConfig,
    cache_dir: Path,
    seed: int = 0,
    progress: ProgressCallback = silent,
    negatives: NegativeSlabs = "mixed",
) -> AnnotatedSlabs:
    """The slabs that one side of the split trains or validates on, drawn once and kept.

    Positive: every slice marked "embolism". Negative, as many in all. Slices marked "uncertain" and slices of other
    studies that were not reviewed are never used. Drawn once, not anew for every epoch, as in the paper (section 3.1:
    10,388 of each). Where negative slabs come from:

    - ``"mixed"``: half from slices marked "none", half from the lung range of studies with the label "negative", the
      same number a study, and more of these where fewer are marked [ours].
    - ``"negative_studies"``: all from the lung range of negative studies, as in the paper (section 3.1).
    - ``"matched"``: all from negative studies, at the relative heights in the lung at which the positive slabs lie.
      Emboli sit round the hilum; drawn over the whole lung, slabs can be told apart by their height alone [ours].

    Args:
        sources: studies of one side of the split (``read_sources``).
        config: how slices become slabs.
        cache_dir: where the prepared slabs are kept; what is there already is not prepared again.
        seed: of the draw.
        progress: told before every study; may raise ``Cancelled``.
        negatives: where slabs without embolism come from.

    Raises:
        InputError: if there is no slab of one kind, or a study cannot be used.
    """
    if negatives not in get_args(NegativeSlabs):
        raise ValueError(f"negatives must be one of {', '.join(get_args(NegativeSlabs))}, got {negatives!r}")
    positive = [_embolism_targets(source, config) for source in sources]
    none = [_reviewed(source, "none") for source in sources]
    drawn_from = [source.study.label == "negative" for source in sources]
    wanted = sum(map(len, positive))
    if wanted == 0:
        count = sum(source.annotation is not None for source in sources)
        raise InputError(
            f"no annotated embolism slice in {len(sources)} studies ({count} with an annotation): mark embolism on "
            "slices of more studies, or set their split in the study list"
        )

    generator = np.random.default_rng(seed)
    if negatives != "mixed":
        none = [[] for _ in sources]
    marked = [(number, index) for number, indices in enumerate(none) for index in indices]
    share = min(len(marked), wanted - wanted // 2 if any(drawn_from) else wanted)
    kept = {marked[place] for place in generator.permutation(len(marked))[:share]}
    random = _dealt(wanted - share, drawn_from, generator)
    heights = iter(generator.permutation(_heights(sources, positive, cache_dir)) if negatives == "matched" else ())

    files = []
    for number, source in enumerate(sources):
        progress(Progress("prepare slabs", number, len(sources), source.study.study))
        negative = [index for index in none[number] if (number, index) in kept]
        at = tuple(round(float(height), 3) for height in islice(heights, random[number]))
        wish = _Wish(positive[number], negative, random[number], _reviewed(source, "uncertain"), seed, at)
        if wish.positive or wish.negative or wish.random:
            files.append(_slab_file(source, wish, config, cache_dir))
    progress(Progress("prepare slabs", len(sources), len(sources)))

    slabs = AnnotatedSlabs(files)
    if slabs.labels.all():
        raise InputError(
            f"no slice without embolism in {len(sources)} studies: add studies with the label 'negative', or mark "
            "slices 'none'"
        )
    if 2 * wanted > len(slabs):
        logger.warning("%d slabs with embolism, but only %d without: add studies", wanted, len(slabs) - wanted)
    return slabs


def augmented(
    items: SlabItem, augmentation: Augmentation, config: SlabConfig, generator: torch.Generator, together: int = 1
) -> SlabItem:
    """A batch of slabs with their targets changed at random, ``together`` consecutive ones in the same way."""
    slabs, targets = items.slab.clone(), items.target.clone()
    groups, cells = len(slabs) // together, augmentation.shift_cells
    if augmentation.flip:
        chosen = (torch.rand(groups, generator=generator) < 0.5).repeat_interleave(together)
        slabs[chosen], targets[chosen] = slabs[chosen].flip(-1), targets[chosen].flip(-1)
    if cells:
        moves = torch.randint(-cells, cells + 1, (groups, 2), generator=generator).tolist()
        for group, (rows, columns) in enumerate(moves):
            all_of_it = slice(group * together, (group + 1) * together)
            moved = _shifted(targets[all_of_it], rows, columns)
            if torch.equal(moved.flatten(1).any(1), targets[all_of_it].flatten(1).any(1)):
                targets[all_of_it] = moved
                slabs[all_of_it] = _shifted(slabs[all_of_it], rows * ENCODER_STRIDE, columns * ENCODER_STRIDE)
    if augmentation.jitter_hu:
        low, high = config.hu_window
        offset = (2 * torch.rand(groups, generator=generator) - 1) * augmentation.jitter_hu / (high - low)
        slabs = (slabs + offset.repeat_interleave(together)[:, None, None, None]).clamp(0, 1)
    if 0 < augmentation.window_cells < config.grid:
        slabs, targets = _windows(slabs, targets, augmentation.window_cells, generator, together)
    return items._replace(slab=slabs, target=targets)


def _windows(
    slabs: Tensor, targets: Tensor, cells: int, generator: torch.Generator, together: int
) -> tuple[Tensor, Tensor]:
    """Windows of ``cells`` cells: round a random cell of the target; elsewhere where a slab with a target has its.

    That is another one of the same group, or where there is none a random one of the batch.
    """
    free, filled = targets.shape[-1] - cells, targets.flatten(1).any(1)
    corners = torch.randint(0, free + 1, (len(targets), 2), generator=generator)
    for number in filled.nonzero()[:, 0].tolist():
        marked = targets[number].nonzero()
        chosen = marked[torch.randint(len(marked), (), generator=generator)]
        inside = torch.randint(0, cells, (2,), generator=generator)
        corners[number] = (chosen - inside).clamp(0, free)
    if filled.any():
        others = corners[filled]
        corners[~filled] = others[torch.randint(len(others), (int((~filled).sum()),), generator=generator)]
        for place in (~filled).nonzero()[:, 0].tolist():
            first = place - place % together
            mates = filled[first : first + together].nonzero()[:, 0]
            if len(mates):
                corners[place] = corners[first + int(mates[0])].clone()

    def cut(planes: Tensor, step: int) -> Tensor:
        side = cells * step
        return torch.stack(
            [
                plane[..., row : row + side, column : column + side]
                for plane, (row, column) in zip(planes, (corners * step).tolist(), strict=True)
            ]
        )

    return cut(slabs, ENCODER_STRIDE), cut(targets, 1)


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
        with _naming(source.study):
            image, volume = _image(source, cache_dir)
            path = cache_dir / f"{image}-{key}.npy"
            if not _holds(path, np.dtype(np.float16), shape):
                volume = volume or read_volume(source.study.path)
                features, _ = detector.encode(study_slabs(volume, lung_range(volume), detector.slabs), report)
                with replacing(path) as temporary:
                    np.save(temporary, features.cpu().numpy())
        files.append(PreparedFile(source.study.study, image, path))
    progress(Progress("encode studies", len(sources) * count, len(sources) * count))
    return tuple(files)


def prepare_arrays(
    sources: Sequence[StudySource],
    task: str,
    key: str,
    make: Callable[[Volume], NDArray[np.float16]],
    cache_dir: Path,
    progress: ProgressCallback = silent,
) -> tuple[PreparedFile, ...]:
    """One float16 array a study, made once by ``make`` and kept under the identity of its image and ``key``."""
    files = []
    for number, source in enumerate(sources):
        progress(Progress(task, number, len(sources), source.study.study))
        with _naming(source.study):
            image, volume = _image(source, cache_dir)
            path = cache_dir / f"{image}-{key}.npy"
            if not _holds(path, np.dtype(np.float16), None):
                array = make(volume or read_volume(source.study.path))
                with replacing(path) as temporary:
                    np.save(temporary, array)
        files.append(PreparedFile(source.study.study, image, path))
    progress(Progress(task, len(sources), len(sources)))
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


@dataclass(frozen=True, eq=False)
class _Wish:
    """Which slabs of a study are wanted: targets by positive slice, negative slices, and how many random ones.

    ``heights`` are those of the random ones as shares of the lung range; empty where they may lie anywhere in it.
    """

    positive: Mapping[int, NDArray[np.float32]]
    negative: Sequence[int]
    random: int
    uncertain: Sequence[int]
    seed: int
    heights: tuple[float, ...] = ()

    def key(self, config: SlabConfig) -> str:
        """Identity of the slabs that this wish gives for one image."""
        targets = {index: hashlib.sha256(target.tobytes()).hexdigest() for index, target in self.positive.items()}
        uncertain = self.uncertain if self.random else ()
        seed = self.seed if self.random else 0
        wish = [targets, *map(list, (self.negative, uncertain)), self.random, seed, *self.heights]
        return hashlib.sha256(json.dumps([wish, asdict(config)]).encode()).hexdigest()


def _annotation(study: Study) -> SparseAnnotation | None:
    """The reviewed slices of a study; its CT is decoded only where Slicer saved outlines on a part of the grid."""
    if study.annotation is None:
        return None
    try:
        return SparseAnnotation.read(study.annotation)
    except InputError:
        return SparseAnnotation.read(study.annotation, read_volume(study.path))


def _embolism_targets(source: StudySource, config: SlabConfig) -> dict[int, NDArray[np.float32]]:
    """Targets of the slices marked "embolism", by slice index."""
    name = source.study.study
    indices = _reviewed(source, "embolism")
    if source.annotation is None or not indices:
        return {}
    if source.study.label == "negative":
        raise InputError(
            f"study {name}: its label is 'negative', but slice {indices[0]} is marked 'embolism': correct one of them"
        )
    targets = {}
    for index in indices:
        target = attention_target(source.annotation.masks[index], config)
        if target.any():
            targets[index] = target
        else:
            logger.warning("study %s: the mask on slice %d lies outside the centre crop, it is left out", name, index)
    return targets


def _reviewed(source: StudySource, state: str) -> list[int]:
    if source.annotation is None:
        return []
    return [reviewed.slice_index for reviewed in source.annotation.slices if reviewed.state == state]


def _dealt(total: int, eligible: Sequence[bool], generator: np.random.Generator) -> list[int]:
    """``total`` dealt out evenly over the eligible, the remainder to randomly chosen ones."""
    shares = [0] * len(eligible)
    places = generator.permutation(np.flatnonzero(eligible))
    for order, place in enumerate(places.tolist()):
        shares[place] = total // len(places) + (order < total % len(places))
    return shares


def _slab_file(source: StudySource, wish: _Wish, config: SlabConfig, cache_dir: Path) -> PreparedFile:
    """The prepared slabs of one study; made where they are not there yet."""
    fields = [
        ("slab", "<f2", (config.slices_per_slab, config.crop, config.crop)),
        ("target", "u1", (config.grid, config.grid)),
        ("label", "u1"),
        ("slice", "<i4"),
    ]
    dtype = np.dtype(fields)
    key = wish.key(config)
    with _naming(source.study):
        image, volume = _image(source, cache_dir)
        file = PreparedFile(source.study.study, image, cache_dir / f"{image}-{key}.npy")
        if _holds(file.path, dtype, None):
            return file
        volume = volume or read_volume(source.study.path)
        if source.annotation is not None:
            source.annotation.check_belongs_to(volume)
        negative = [*wish.negative, *_random_slices(volume, wish, int(key, 16))]
        with replacing(file.path) as temporary:
            count = len(wish.positive) + len(negative)
            records = np.lib.format.open_memmap(temporary, "w+", dtype, (count,))  # type: ignore[no-untyped-call]
            wanted = [*((index, EMBOLISM) for index in wish.positive), *((index, NONE) for index in negative)]
            for record, (index, label) in zip(records, wanted, strict=True):
                record["slab"] = slab_at(volume, index, config)
                record["target"] = wish.positive[index] if label == EMBOLISM else 0
                record["label"] = label
                record["slice"] = index
            records.flush()
    return file


def _random_slices(volume: Volume, wish: _Wish, seed: int) -> list[int]:
    """Slices within the lung range of a negative study, none twice, none that is used or uncertain already."""
    if not wish.random:
        return []
    lung = lung_range(volume)
    taken = {*wish.negative, *wish.uncertain}
    free = [index for index in range(lung.first, lung.last + 1) if index not in taken]
    if wish.heights:
        chosen_at: list[int] = []
        for height in wish.heights[: len(free)]:
            place = lung.first + height * (lung.last - lung.first)
            chosen_at.append(free.pop(int(np.abs(np.array(free) - place).argmin())))
        return sorted(chosen_at)
    chosen = np.random.default_rng(seed).permutation(len(free))[: wish.random]
    return sorted(free[place] for place in chosen)


def _heights(sources: Sequence[StudySource], positive: Sequence[Mapping[int, object]], cache_dir: Path) -> list[float]:
    """Heights of the positive slices, from 0 at the lowest slice with lung to 1 at the highest."""
    heights = []
    for source, slices in zip(sources, positive, strict=True):
        if slices:
            with _naming(source.study):
                lung = _lung(source, cache_dir)
            span = max(lung.last - lung.first, 1)
            heights += [min(max((index - lung.first) / span, 0.0), 1.0) for index in slices]
    return heights


def _lung(source: StudySource, cache_dir: Path) -> SliceRange:
    """The lung range: remembered by the files' bytes."""
    note = cache_dir / "lungs" / source.files_sha256
    if not note.is_file():
        lung = lung_range(read_volume(source.study.path))
        write_durably(note, f"{lung.first} {lung.last}")
        return lung
    first, last = note.read_text().split()
    return SliceRange(int(first), int(last))


def _image(source: StudySource, cache_dir: Path) -> tuple[str, Volume | None]:
    """SHA-256 of the voxels, and the volume where it had to be read for that: remembered by the files' bytes."""
    note = cache_dir / "images" / source.files_sha256
    if note.is_file():
        return note.read_text(), None
    volume = read_volume(source.study.path)
    write_durably(note, volume.sha256)
    return volume.sha256, volume


def _holds(path: Path, dtype: np.dtype[np.void] | np.dtype[np.float16], shape: tuple[int, ...] | None) -> bool:
    """Whether a cache file is there and whole; one that a failing disk cut short is made again."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return array.dtype == dtype and shape in (None, array.shape)


def _files_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, or of all files of a folder in the order of their names."""
    files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
    content = hashlib.sha256()
    for entry in files:
        with entry.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
    return content.hexdigest()


def _shifted(planes: Tensor, rows: int, columns: int) -> Tensor:
    """Planes ``(..., rows, columns)`` moved down and to the right, air or nothing (0) moving in."""
    height, width = planes.shape[-2:]
    if abs(rows) >= height or abs(columns) >= width:
        return torch.zeros_like(planes)
    moved = torch.zeros_like(planes)
    kept = planes[..., max(-rows, 0) : height - max(rows, 0), max(-columns, 0) : width - max(columns, 0)]
    moved[..., max(rows, 0) : height + min(rows, 0), max(columns, 0) : width + min(columns, 0)] = kept
    return moved


def _part_of(
    task: str, number: int, count: int, size: int, text: str, progress: ProgressCallback
) -> Callable[[Progress], None]:
    """A callback that reports the progress of one of ``count`` parts, each of ``size`` units, as progress of all."""
    return lambda part: progress(Progress(task, number * size + part.done, count * size, text))


@contextmanager
def _naming(study: Study) -> Iterator[None]:
    """Errors in a study's files say which study it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"study {study.study}: {error}") from error
