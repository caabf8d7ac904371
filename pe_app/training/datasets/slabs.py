"""What stage I learns from: slabs of slices with and without embolism, drawn once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pe_app.annotation.judged import missed_slices, rejected_places
from pe_app.common import distributed
from pe_app.common.errors import InputError
from pe_app.common.files import replacing
from pe_app.common.progress import ProgressCallback, silent
from pe_app.ct.lungs import lung_range
from pe_app.ct.slabs import CropPlane, SlabConfig, attention_target, crop_plane, mask_crop, slab_at
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_volume
from pe_app.training.datasets.cache import (
    IN_THIS_PROCESS,
    Entry,
    Preparation,
    PreparedFile,
    holds,
    image_of,
    lung_of,
    prepare,
)
from pe_app.training.datasets.sources import StudySource

logger = logging.getLogger(__name__)

EMBOLISM, NONE, UNKNOWN = 1, 0, -1

HARD_TIMES = 2
"""So much more often than others a slab is drawn on which a reader corrected the model [ours]."""

MOST_REPEATS = 4
"""So often at most a slab is drawn in one epoch to balance a few outlined slices with many that are not [ours]."""

NotOutlined = Literal["balanced", "as_listed", "left_out"]
"""What slices with embolism that is not outlined contribute: see ``EncoderTraining``."""

NegativeSlabs = Literal["mixed", "negative_studies", "matched", "half_matched"]
"""Where slabs without embolism come from: see ``prepare_slabs``."""


class SlabItem(NamedTuple):
    """One slab of stage I, or a batch of them with a leading axis.

    Attributes:
        slab: ``(slices_per_slab, crop, crop)`` float32 from 0 to 1.
        target: ``(grid, grid)`` float32: 1 on the cells that the reader's outline covers, 0 on those without embolism,
            -1 on those of which nothing is known: all cells of a slice with embolism that is not outlined.
        label: 1 with embolism, 0 without, -1 where that is not known and only a candidate was rejected.
        study: which of the data set's studies it is from.
    """

    slab: Tensor
    target: Tensor
    label: Tensor
    study: Tensor


class AnnotatedSlabs(Dataset[SlabItem]):
    """The slabs of stage I: annotated slices, and as many without embolism (``prepare_slabs``).

    Files are opened for every item, so that thousands of studies need no file handles and workers share nothing.

    Attributes:
        files: one a study.
        labels: ``(len,)``, 1 with embolism, 0 without.
        outlined: ``(len,)``, whether the embolism of a slab is outlined; False without embolism.
        hard: ``(len,)``, whether a reader corrected the model there: rejected its candidate, or marked an embolism that
            it missed.
        slices: ``(len,)``, the CT slice in the middle of each slab.
        places: of each slab, the number of its file and its row in it.
    """

    def __init__(self, files: Sequence[PreparedFile]) -> None:
        self.files = tuple(files)
        labels, slices, outlined, hard, self.places = [], [], [], [], []
        for number, file in enumerate(files):  # one after the other: mapped pages count as memory of this process
            records = np.load(file.path, mmap_mode="r")
            labels.append(np.array(records["label"]))
            slices.append(np.array(records["slice"]))
            hard.append(np.array(records["hard"], dtype=bool))
            outlined.append((records["label"] == EMBOLISM) & (records["target"] != UNKNOWN).all(axis=(1, 2)))
            self.places += [(number, row) for row in range(len(records))]
        self.labels: NDArray[np.int8] = np.concatenate(labels)
        self.slices: NDArray[np.int32] = np.concatenate(slices)
        self.outlined: NDArray[np.bool_] = np.concatenate(outlined)
        self.hard: NDArray[np.bool_] = np.concatenate(hard)

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

    def epoch_order(self, generator: torch.Generator, halves: bool = True) -> list[int]:
        """The slabs of one epoch in random order, as many as there are.

        Hard ones come ``HARD_TIMES`` as often as others of their kind. With ``halves``, those with embolism are half
        outlined and half not, where there are both and no slab has to be repeated more than ``MOST_REPEATS`` times.
        """
        outlined = np.flatnonzero(self.outlined)
        others = np.flatnonzero((self.labels == EMBOLISM) & ~self.outlined)
        if not halves:
            outlined, others = np.sort(np.concatenate([outlined, others])), outlined[:0]
        if not self.hard.any() and (len(outlined) == 0 or len(others) == 0):
            return torch.randperm(len(self), generator=generator).tolist()
        fewer, more = sorted((outlined, others), key=len)
        total = len(fewer) + len(more)
        wanted = min(total // 2, MOST_REPEATS * len(fewer))
        rest = np.flatnonzero(self.labels != EMBOLISM)
        chosen: list[int] = []
        for kind, count in ((fewer, wanted), (more, total - wanted), (rest, len(rest))):
            often = np.concatenate([kind, *[kind[self.hard[kind]]] * (HARD_TIMES - 1)])
            chosen += _cycled(often, count, generator)
        return [chosen[place] for place in torch.randperm(len(chosen), generator=generator).tolist()]


def _cycled(places: NDArray[np.int64], count: int, generator: torch.Generator) -> list[int]:
    """``count`` of the places, all of them equally often but for the last round, in random order."""
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += places[torch.randperm(len(places), generator=generator).numpy()].tolist()
    return drawn[:count]


class TwinSlabs(Dataset[SlabItem]):
    """Slabs in pairs: with embolism, and the same place of the same chest without; a leading axis of 2 in every part.

    Attributes:
        slabs: both of each pair.
        pairs: ``(len, 2)``, their places in ``slabs``.
    """

    def __init__(self, slabs: AnnotatedSlabs, patients: Mapping[str, str]) -> None:
        """Pair the slabs of a study with those of the next one of the list, of the same known patient and as many.

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
            and "" != patients[slabs.files[number].study] == patients[slabs.files[number + 1].study]
            and slabs.labels[starts[number] : starts[number + 1]].all()
            and not slabs.labels[starts[number + 1] : starts[number + 2]].any()
            for row in range(counts[number])
        ]
        if not pairs:
            raise InputError(
                "no matched pairs among the studies: list each study with emboli just before the one without"
            )
        self.pairs = np.array(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> SlabItem:
        both = [self.slabs[int(place)] for place in self.pairs[index]]
        return SlabItem(*(torch.stack(parts) for parts in zip(*both, strict=True)))


def prepare_slabs(
    sources: Sequence[StudySource],
    config: SlabConfig,
    cache_dir: Path,
    seed: int = 0,
    progress: ProgressCallback = silent,
    negatives: NegativeSlabs = "mixed",
    preparation: Preparation = IN_THIS_PROCESS,
    not_outlined: bool = True,
    decisions: bool = False,
) -> AnnotatedSlabs:
    """The slabs that one side of the split trains or validates on, drawn once and kept.

    Positive: every slice marked "embolism", outlined or not. Negative, as many in all. Slices marked "uncertain" and
    slices of other studies that were not reviewed are never used. Drawn once, not anew for every epoch, as in the paper
    (section 3.1: 10,388 of each). Where negative slabs come from:

    - ``"mixed"``: half from slices marked "none", half from the lung range of studies with the label "negative", the
      same number a study, and more of these where fewer are marked [ours].
    - ``"negative_studies"``: all from the lung range of negative studies, as in the paper (section 3.1).
    - ``"matched"``: all from negative studies, at the relative heights in the lung at which the positive slabs lie.
      Emboli sit round the hilum; drawn over the whole lung, slabs can be told apart by their height alone [ours].
    - ``"half_matched"``: half of each study's as ``"matched"``, the others from anywhere in the lung, so that stage I
      learns what levels without emboli look like, too: matched alone leaves it undefined there [ours].

    Args:
        sources: studies of one side of the split (``read_sources``).
        config: how slices become slabs.
        cache_dir: where the prepared slabs are kept; what is there already is not prepared again.
        seed: of the draw.
        progress: told before every study; may raise ``Cancelled``.
        negatives: where slabs without embolism come from.
        preparation: in how many processes, and in how much space.
        not_outlined: whether slices with embolism that is not outlined are used.
        decisions: whether readers' decisions on candidates are used. A rejected candidate is a slab more, on whose
            place attention must not lie; without embolism where its slice or study is known to have none. It and slices
            with an embolism that the model missed are hard.

    Raises:
        InputError: if there is no slab of one kind, a study cannot be used, or there is no room.
    """
    if negatives not in get_args(NegativeSlabs):
        raise ValueError(f"negatives must be one of {', '.join(get_args(NegativeSlabs))}, got {negatives!r}")
    positive = [_embolism_targets(source, config, not_outlined) for source in sources]
    judged = [
        _Judged.of(source, config, not_outlined) if decisions and source.judged else _Judged() for source in sources
    ]
    none = [
        [index for index in _reviewed(source, "none") if index not in more.rejected]
        for source, more in zip(sources, judged, strict=True)
    ]
    drawn_from = [source.study.label == "negative" for source in sources]
    wanted = sum(map(len, positive))
    if wanted == 0:
        count = sum(source.reviewed is not None for source in sources)
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
    heights = iter(generator.permutation(_heights(sources, positive, cache_dir)) if "matched" in negatives else ())

    entries = []
    for number, source in enumerate(sources):
        negative = [index for index in none[number] if (number, index) in kept]
        matched = random[number] if negatives == "matched" else (random[number] + 1) // 2
        at = tuple(round(float(height), 3) for height in islice(heights, matched))
        uncertain = _reviewed(source, "uncertain")
        wish = _Wish(positive[number], negative, random[number], uncertain, seed, at, judged[number])
        if wish.positive or wish.negative or wish.random or wish.judged.rejected:
            entries.append(_SlabEntry.of(source, wish, config, cache_dir))
    files = prepare("prepare slabs", entries, _SlabEntry.make, lambda _, file, __: file, preparation, progress)

    slabs = AnnotatedSlabs([file for file in files if file is not None])
    if not (slabs.labels == NONE).any():
        raise InputError(
            f"no slice without embolism in {len(sources)} studies: add studies with the label 'negative', or mark "
            "slices 'none'"
        )
    if 2 * wanted > len(slabs):
        logger.warning("%d slabs with embolism, but only %d without: add studies", wanted, len(slabs) - wanted)
    return slabs


@dataclass(frozen=True, eq=False)
class _Judged:
    """What readers' decisions on candidates add: label and target of slabs by slice, and slices that were missed."""

    rejected: Mapping[int, tuple[int, NDArray[np.int8]]] = field(default_factory=dict)
    missed: tuple[int, ...] = ()

    @classmethod
    def of(cls, source: StudySource, config: SlabConfig, not_outlined: bool) -> _Judged:
        annotation = source.annotation()
        if annotation is None:
            return cls()
        volume = read_volume(source.study.path)
        plane = crop_plane(volume, config) if config.pixel_mm else None
        rejected = {}
        for index, place in rejected_places(annotation, volume).items():
            if index in annotation.masks:  # attention outside of the outline is pressed away already
                continue
            state = annotation.state(index)
            free = source.study.label == "negative" or state == "none"
            target = np.full((config.grid, config.grid), NONE if free else UNKNOWN, np.int8)
            target[_covered_cells(place, config, plane)] = NONE
            label = NONE if free else EMBOLISM if state == "embolism" and not_outlined else UNKNOWN
            rejected[index] = label, target
        return cls(rejected, missed_slices(annotation, volume))

    def key(self) -> list[object]:
        """Identity; empty where there is nothing."""
        places = {index: [label, _sha256(target)] for index, (label, target) in self.rejected.items()}
        return [places, list(self.missed)] if places or self.missed else []


def _covered_cells(place: NDArray[np.bool_], config: SlabConfig, plane: CropPlane | None) -> NDArray[np.bool_]:
    """The cells of the attention map that a place covers by a quarter or more, at least one where it is in the crop.

    Not the wider target of an outline: the next cell may hold an embolism.
    """
    side = config.crop // config.grid
    shares = mask_crop(place, config, plane).reshape(config.grid, side, config.grid, side).mean(axis=(1, 3))
    cells: NDArray[np.bool_] = (shares > 0) & (shares >= min(0.25, float(shares.max())))
    return cells


@dataclass(frozen=True, eq=False)
class _Wish:
    """Which slabs of a study are wanted: targets by positive slice, negative slices, and how many random ones.

    ``heights`` are those of random ones as shares of the lung range; the others may lie anywhere in it.
    """

    positive: Mapping[int, NDArray[np.int8]]
    negative: Sequence[int]
    random: int
    uncertain: Sequence[int]
    seed: int
    heights: tuple[float, ...] = ()
    judged: _Judged = field(default_factory=_Judged)

    def known(self) -> dict[int, tuple[int, NDArray[np.int8]]]:
        """Label and target of the slices that a reader marked with embolism, or on which a candidate was rejected."""
        marked = {index: (EMBOLISM, target) for index, target in self.positive.items()}
        return {**marked, **self.judged.rejected}

    def key(self, config: SlabConfig) -> str:
        """Identity of the slabs that this wish gives for one image."""
        targets = {index: _sha256(target) for index, target in self.positive.items()}
        uncertain = self.uncertain if self.random else ()
        seed = self.seed if self.random else 0
        wish = [targets, *map(list, (self.negative, uncertain)), self.random, seed, *self.heights, *self.judged.key()]
        return hashlib.sha256(json.dumps([wish, asdict(config)]).encode()).hexdigest()


def _sha256(target: NDArray[np.int8]) -> str:
    return hashlib.sha256(target.tobytes()).hexdigest()


def _embolism_targets(source: StudySource, config: SlabConfig, not_outlined: bool) -> dict[int, NDArray[np.int8]]:
    """Targets of the slices marked "embolism", by slice index; all cells are unknown where nothing is outlined."""
    name = source.study.study
    indices = [
        reviewed.slice_index
        for reviewed in source.reviewed or ()
        if reviewed.outlined or (not_outlined and reviewed.state == "embolism")
    ]
    annotation = source.annotation() if indices else None
    if annotation is None:
        return {}
    if source.study.label == "negative":
        raise InputError(
            f"study {name}: its label is 'negative', but slice {indices[0]} is marked 'embolism': correct one of them"
        )
    targets = {}
    plane = crop_plane(read_volume(source.study.path), config) if config.pixel_mm else None
    for index in indices:
        if index not in annotation.masks:
            targets[index] = np.full((config.grid, config.grid), UNKNOWN, np.int8)
            continue
        target = attention_target(annotation.masks[index], config, plane).astype(np.int8)
        if target.any():
            targets[index] = target
        else:
            logger.warning("study %s: the mask on slice %d lies outside the centre crop, it is left out", name, index)
    return targets


def _reviewed(source: StudySource, state: str) -> list[int]:
    return [reviewed.slice_index for reviewed in source.reviewed or () if reviewed.state == state]


def _dealt(total: int, eligible: Sequence[bool], generator: np.random.Generator) -> list[int]:
    """``total`` dealt out evenly over the eligible, the remainder to randomly chosen ones."""
    shares = [0] * len(eligible)
    places = generator.permutation(np.flatnonzero(eligible))
    for order, place in enumerate(places.tolist()):
        shares[place] = total // len(places) + (order < total % len(places))
    return shares


@dataclass(frozen=True, eq=False)
class _SlabEntry(Entry):
    """The prepared slabs of one study."""

    wish: _Wish
    config: SlabConfig

    @classmethod
    def of(cls, source: StudySource, wish: _Wish, config: SlabConfig, cache_dir: Path) -> _SlabEntry:
        fields = [
            ("slab", "<f2", (config.slices_per_slab, config.crop, config.crop)),
            ("target", "i1", (config.grid, config.grid)),
            ("label", "i1"),
            ("slice", "<i4"),
            ("hard", "u1"),
        ]
        dtype = np.dtype(fields)
        nbytes = dtype.itemsize * (len(wish.known()) + len(wish.negative) + wish.random)
        return cls(source, cache_dir, wish.key(config), dtype, None, nbytes, wish, config)

    def make(self) -> PreparedFile:
        """The file, from the CT."""
        image, volume = image_of(self.source, self.folder)
        file = self.file(image)
        if holds(file.path, self.dtype, self.shape):
            return file
        volume = volume or read_volume(self.source.study.path)
        if annotation := self.source.annotation():
            annotation.check_belongs_to(volume)
        wish = self.wish
        negative = [*wish.negative, *_random_slices(volume, wish, int(self.key, 16))]
        with replacing(file.path) as temporary:
            nothing = np.full((self.config.grid, self.config.grid), NONE, np.int8)
            wanted = [*wish.known().items(), *((index, (NONE, nothing)) for index in negative)]
            records = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
                temporary, "w+", self.dtype, (len(wanted),)
            )
            for record, (index, (label, target)) in zip(records, wanted, strict=True):
                record["slab"] = slab_at(volume, index, self.config)
                record["target"] = target
                record["label"] = label
                record["slice"] = index
                record["hard"] = index in wish.judged.missed or index in wish.judged.rejected
            records.flush()
        return file


def _random_slices(volume: Volume, wish: _Wish, seed: int) -> list[int]:
    """Slices within the lung range of a negative study, none twice, none that is used or uncertain already."""
    if not wish.random:
        return []
    lung = lung_range(volume)
    taken = {*wish.negative, *wish.uncertain, *wish.judged.rejected}
    free = [index for index in range(lung.first, lung.last + 1) if index not in taken]
    chosen: list[int] = []
    for height in wish.heights[: len(free)]:
        place = lung.first + height * (lung.last - lung.first)
        chosen.append(free.pop(int(np.abs(np.array(free) - place).argmin())))
    anywhere = np.random.default_rng(seed).permutation(len(free))[: wish.random - len(chosen)]
    return sorted([*chosen, *(free[place] for place in anywhere)])


def _heights(sources: Sequence[StudySource], positive: Sequence[Mapping[int, object]], cache_dir: Path) -> list[float]:
    """Heights of the positive slices, from 0 at the lowest slice with lung to 1 at the highest."""
    annotated = [source for source, slices in zip(sources, positive, strict=True) if slices]
    lungs = iter(distributed.map_sharded(lambda source: lung_of(source, cache_dir), annotated))
    heights = []
    for slices in filter(None, positive):
        lung = next(lungs)
        span = max(lung.last - lung.first, 1)
        heights += [min(max((index - lung.first) / span, 0.0), 1.0) for index in slices]
    return heights
