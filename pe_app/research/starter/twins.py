"""Twins: the same chest with emboli and without, the same slices of both marked.

So nothing but the emboli goes with the label: not the level of the slice, not the patient, not the scanner.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.common.errors import InputError
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import write_volume
from pe_app.phantom import PhantomConfig, make_phantom, paint_emboli
from pe_app.research.starter.backgrounds import Background, drawn_out, single_slices, varied, whole_chest
from pe_app.research.starter.cells import write_painted_slabs
from pe_app.studies import Split, Study

log = logging.getLogger(__name__)

MARKED_SLICES = 12
"""At most so many slices of a twin pair are marked in each, evenly over all that show an embolus."""

SMALLEST_MARK_MM2 = 30.0
"""A slice that shows less of an embolus (a disc of 6 mm) is not marked: at first there is nothing to learn from it."""

PAINTINGS = 6
"""So often emboli are painted anew where no slice shows enough of one."""

PHANTOM_SPACINGS_MM = (1.25, 2.0, 2.5)


@dataclass(frozen=True, eq=False)
class Twins:
    """A pair.

    Attributes:
        with_emboli: the CT.
        emboli: their mask on its grid.
        without: the same CT without them.
        arteries: mask of its arteries, in which a clot can lie.
    """

    with_emboli: Volume
    emboli: Volume
    without: Volume
    arteries: Volume

    @property
    def shown(self) -> NDArray[np.intp]:
        """The slices that show enough of an embolus."""
        pixel_mm2 = self.emboli.spacing_mm[1] * self.emboli.spacing_mm[2]
        return np.flatnonzero(np.count_nonzero(self.emboli.voxels, axis=(1, 2)) * pixel_mm2 >= SMALLEST_MARK_MM2)


@dataclass(frozen=True)
class TwinSource:
    """What a pair of twins is made of.

    Attributes:
        name: of the pair.
        patient: both are of this patient, and so are other variations.
        make: gives the pair.
        split: the side on which both stand.
        whole: whether it is a whole chest; stage II learns from these only.
    """

    name: str
    patient: str
    make: Callable[[], Twins]
    split: Split
    whole: bool = True


@dataclass(frozen=True)
class _PhantomTwins:
    seed: tuple[int, ...]

    def __call__(self) -> Twins:
        spacing = float(np.random.default_rng((*self.seed, 1)).choice(PHANTOM_SPACINGS_MM))
        config = PhantomConfig(spacing_mm=spacing)
        with_emboli, without = (
            make_phantom(np.random.default_rng(self.seed), config, positive) for positive in (True, False)
        )
        return Twins(with_emboli.volume, with_emboli.emboli_mask, without.volume, without.arteries)


@dataclass(frozen=True)
class _PaintedTwins:
    background: Callable[[], Background | None]
    seed: tuple[int, ...]

    def __call__(self) -> Twins:
        rng = np.random.default_rng(self.seed)
        source = self.background()
        if source is None:
            raise InputError("no vessel to paint into")
        background = varied(source, rng)
        for _ in range(PAINTINGS):
            painted = paint_emboli(background.volume, background.arteries, rng)
            twins = Twins(painted.volume, painted.emboli_mask, background.volume, background.arteries)
            if len(twins.shown):
                break
        return twins


def _single(path: Path, seed: tuple[int, ...]) -> Background | None:
    return drawn_out(path, np.random.default_rng(seed))


def phantom_twins(count: int, seed: int, validating: Callable[[int], bool]) -> list[TwinSource]:
    """Simulated patients."""
    return [
        TwinSource(f"phantom_{seed}_{number:03d}", f"phantom_{seed}_{number:03d}", _PhantomTwins((seed, number)),
                   "validation" if validating(number) else "train")
        for number in range(count)
    ]  # fmt: skip


def painted_twins(argument: str, count: int, seed: int) -> list[TwinSource]:
    """Variations of one real patient; on one side of the split."""
    name = Path(argument.partition(",")[0]).resolve().parent.name
    read = partial(whole_chest, argument)
    return [
        TwinSource(f"{name}_{number:03d}", name, _PaintedTwins(read, (seed, number)), "train")
        for number in range(count)
    ]  # fmt: skip


def slice_twins(folder: Path, count: int, seed: int) -> list[TwinSource]:
    """Variations of single slices of real patients, every fourth patient for validation."""
    return [
        TwinSource(f"{path.stem}_{number}", path.stem,
                   _PaintedTwins(partial(_single, path, (seed, place, number)), (seed, 1000 * place + number)),
                   "validation" if place % 4 == 3 else "train", whole=False)
        for place, path in enumerate(single_slices(folder))
        for number in range(count)
    ]  # fmt: skip


def write_twins(source: TwinSource, out: Path, painted_slabs: bool = False) -> tuple[Study, ...]:
    """The pair's volumes, mask and marked slices, and their rows of the study list.

    None where no slice shows enough of an embolus to be marked: held-out figures are those of emboli that can be seen.

    Args:
        source: the pair.
        out: folder with a folder for volumes, masks, annotations and slabs each.
        painted_slabs: also slabs of the chest with many clots in it (``cells``).
    """
    names = [f"{source.name}_{kind}" for kind in ("pe", "none")]
    volumes = [out / "volumes" / f"{name}.nii" for name in names]
    annotations = [out / "annotations" / f"{name}.json" for name in names]
    nothing_to_mark = out / "annotations" / f"{source.name}.nothing"
    if nothing_to_mark.exists():
        return ()
    if not annotations[1].exists():
        try:
            twins = source.make()
            if painted_slabs:
                rng = np.random.default_rng(int.from_bytes(source.name.encode()))
                write_painted_slabs(twins.without, twins.arteries, rng, out / "slabs" / f"{source.name}.npy")
        except InputError as error:
            log.info("%s: %s", source.name, error)
            nothing_to_mark.touch()
            return ()
        shown = twins.shown
        if len(shown) == 0:
            nothing_to_mark.touch()
            return ()
        marked = shown[np.unique(np.linspace(0, len(shown) - 1, MARKED_SLICES).round().astype(int))].tolist()
        write_volume(twins.emboli, out / "masks" / f"{source.name}_pe.nii.gz")
        nothing = twins.emboli.with_voxels(np.zeros(twins.emboli.shape, np.uint8))
        for volume, truth, path, annotation in zip(
            (twins.with_emboli, twins.without), (twins.emboli, nothing), volumes, annotations, strict=True
        ):
            write_volume(volume, path)
            SparseAnnotation.from_mask(volume, truth, marked, "simulated reader").write(annotation, volume)
    return (
        Study(names[0], volumes[0], source.patient, "positive", annotations[0], source.split),
        Study(names[1], volumes[1], source.patient, "negative", annotations[1], source.split),
    )


def write_all(
    sources: Sequence[TwinSource],
    out: Path,
    progress: ProgressCallback = silent,
    workers: int = 2,
    painted_slabs: bool = False,
) -> list[tuple[TwinSource, tuple[Study, ...]]]:
    """All pairs (``write_twins``), in parallel processes; those that are there already are kept."""
    for folder in ("volumes", "masks", "annotations", "slabs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    done: dict[str, tuple[Study, ...]] = {}
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
        jobs = {pool.submit(write_twins, source, out, painted_slabs): source for source in sources}
        for job in as_completed(jobs):
            done[jobs[job].name] = job.result()
            progress(Progress(f"make twins in {out.name}", len(done), len(sources), jobs[job].name))
    return [(source, done[source.name]) for source in sources if done[source.name]]


def _one_thread() -> None:
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
