"""The recipe of the model that ships: twins with and without emboli, simulated and painted, both stages, figures.

``python -m pe_app.starter --work DIR --background CT[,ARTERIES] ... --slices FOLDER ... --out FILE``

Everything comes in twins: the same chest with emboli and without, the same slices of it marked. So nothing but the
emboli goes with the label: not the level of the slice, not the patient, not the scanner. Every step goes on where it
was interrupted. The model has never seen a real embolism, and its card says so.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import SimpleITK as sitk
import torch
import typer
from numpy.typing import NDArray
from scipy import ndimage

import pe_app
from pe_app.annotation import SparseAnnotation
from pe_app.cli.options import progress_bars
from pe_app.datasets import Augmentation
from pe_app.detection import find_candidates
from pe_app.detector import Detector, ModelCard
from pe_app.errors import InputError
from pe_app.lungs import lung_range
from pe_app.phantom import PhantomConfig, make_phantom, paint_emboli
from pe_app.phantom.painting import find_arteries
from pe_app.progress import Progress, ProgressCallback, silent
from pe_app.roc import auc
from pe_app.slab_encoder import normalised
from pe_app.slabs import study_slabs
from pe_app.studies import Split, Study, write_studies
from pe_app.training import ClassifierTraining, EncoderTraining, train_classifier, train_encoder
from pe_app.volume import PADDING_HU, Volume, axial_affine
from pe_app.volume_io import image_from_volume, read_mask, read_volume, volume_from_image, write_volume

log = logging.getLogger(__name__)

HIT_MM = 12.0
"""The attention's peak counts as a hit within this distance of an embolus: a cell of about 11 mm."""

CHEST_FIELD_MM = 340.0
"""A usual field of view."""

MARKED_SLICES = 12
"""At most so many slices of a twin pair are marked in each, evenly over all that show an embolus."""

SMALLEST_MARK_MM2 = 30.0
"""A slice that shows less of an embolus (a disc of 6 mm) is not marked: at first there is nothing to learn from it."""

PHANTOM_SPACINGS_MM = (1.25, 2.0, 2.5)
SINGLE_SLICE_SPACING_MM = 2.5
SINGLE_SLICE_COUNT = 28


changed = partial(Augmentation, flip=True, shift_cells=2, jitter_hu=30)
TWINS = EncoderTraining(twins=True, fresh_statistics=True, schedule="cosine", augment=True, seed=1)


@dataclass(frozen=True)
class Recipe:
    """How much of what goes into the starter model.

    Attributes:
        phantoms: simulated patients, each with emboli and without; every sixth validates.
        variations: of each real background, each with painted emboli and without; they train.
        slice_variations: of each real single slice, likewise; they teach stage I only. Every fourth slice validates.
        held_out: simulated patients, and variations of each held-out background, that are only looked at in the end.
        stages: stage I: what a clot is, on small windows and without attention; then where, on larger ones; then on
            whole slabs. Attention from the first step on teaches where clots usually are, and the twins stay alike.
        classifier: stage II.
    """

    phantoms: int = 36
    variations: int = 14
    slice_variations: int = 3
    held_out: int = 10
    seed: int = 2027
    stages: tuple[EncoderTraining, ...] = (
        replace(
            TWINS, epochs=36, batch=16, learning_rate=1e-3, attention_weight=0.0, augmentation=changed(window_cells=6)
        ),
        replace(
            TWINS, epochs=8, batch=6, learning_rate=3e-4, attention_weight=0.5, augmentation=changed(window_cells=12)
        ),
        replace(TWINS, epochs=2, batch=3, learning_rate=1e-4, attention_weight=0.5, augmentation=changed()),
    )
    classifier: ClassifierTraining = field(
        default_factory=lambda: ClassifierTraining(epochs=6, batch=4, learning_rate=3e-4, schedule="cosine", seed=1)
    )


@dataclass(frozen=True)
class Background:
    """A real enhanced CT to paint into, and its vessels."""

    name: str
    volume: Volume
    arteries: Volume

    @classmethod
    def read(cls, argument: str) -> Background:
        """From ``CT`` or ``CT,ARTERIES``; without arteries enhanced vessels are searched."""
        ct, _, arteries = argument.partition(",")
        volume = read_volume(ct)
        mask = read_mask(arteries, volume) if arteries else find_arteries(volume)
        return cls(Path(ct).resolve().parent.name, _on_a_chest(volume, PADDING_HU), _on_a_chest(mask, 0))


def _on_a_chest(volume: Volume, outside: int) -> Volume:
    """A cropped CT in a field of view as wide as a chest's, so that its pixels are as large as in other studies."""
    missing = [max(0, math.ceil((CHEST_FIELD_MM / step - count) / 2)) for step, count in
               zip(volume.spacing_mm[1:], volume.shape[1:], strict=True)]  # fmt: skip
    margins = ((0, 0), *((side, side) for side in missing))
    affine = volume.affine.copy()
    affine[:3, 3] = volume.to_lps_mm((0, -missing[0], -missing[1]))
    return Volume(np.pad(volume.voxels, margins, constant_values=outside), affine, volume.name)


def single_slices(folder: Path) -> list[Path]:
    """Files of a folder of single slices of different patients."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in (".dcm", ""))


def drawn_out(path: Path, rng: np.random.Generator) -> Background | None:
    """One slice as a short stack whose anatomy drifts from slice to slice; None where no vessel is found in it.

    Not a chest: its vessels all run along z. But its tissue, noise and scanner are those of another real patient.
    """
    image = sitk.ReadImage(str(path))
    plane = sitk.GetArrayFromImage(image)
    if plane.ndim == 3:
        plane = plane[0]
    plane = np.clip(plane, PADDING_HU, 3071).astype(np.float32)
    count, size = SINGLE_SLICE_COUNT, plane.shape
    drift = [_drift(rng, count, size, amplitude=rng.uniform(2, 5)) for _ in range(2)]
    rows, columns = np.meshgrid(*(np.arange(side, dtype=np.float32) for side in size), indexing="ij")
    stack = np.stack(
        [
            ndimage.map_coordinates(plane, (rows + down, columns + right), order=1, mode="nearest")
            for down, right in zip(*drift, strict=True)
        ]
    )
    spacing = (SINGLE_SLICE_SPACING_MM, *image.GetSpacing()[1::-1])
    voxels = np.rint(stack).astype(np.int16)
    volume = Volume(voxels, axial_affine(spacing, (0.0, 0.0, 0.0)), path.stem)
    try:
        arteries = find_arteries(volume)
        return Background(path.stem, volume, arteries) if arteries.voxels.any() else None
    except InputError as error:
        log.info("%s is not painted into: %s", path.name, error)
        return None


def _drift(rng: np.random.Generator, count: int, size: tuple[int, ...], amplitude: float) -> list[NDArray[np.float32]]:
    """Smooth displacements in pixels, one plane a slice, that change slowly along the stack."""
    coarse = ndimage.gaussian_filter(rng.standard_normal((count, 16, 16)), (3, 1.5, 1.5))
    coarse *= amplitude / max(float(coarse.std()), 1e-6)
    zoom = [side / 16 for side in size]
    return [ndimage.zoom(plane, zoom, order=1).astype(np.float32) for plane in coarse]


def varied(background: Background, rng: np.random.Generator) -> Background:
    """Another patient, nearly: bent, turned, scaled, moved; other contrast, kernel and noise.

    One real CT painted many times would teach its own anatomy; this takes some of that away, no more.
    """
    image = image_from_volume(background.volume)
    turn = sitk.Euler3DTransform()
    size = np.array(image.GetSize()) / 2
    turn.SetCenter(image.TransformContinuousIndexToPhysicalPoint(size.tolist()))
    turn.SetRotation(*np.deg2rad(rng.uniform((-4, -4, -10), (4, 4, 10))))
    turn.SetTranslation(rng.uniform((-15, -10, 0), (15, 10, 0)).tolist())
    scale = sitk.ScaleTransform(3, [*(rng.uniform(0.85, 1.15) for _ in range(2)), 1.0])
    scale.SetCenter(turn.GetCenter())
    bend = sitk.BSplineTransformInitializer(image, [4, 4, 4])
    bend.SetParameters(rng.normal(0, rng.uniform(1, 6), bend.GetNumberOfParameters()).tolist())
    all_three = sitk.CompositeTransform([turn, scale, bend])
    moved = sitk.Resample(image, image, all_three, sitk.sitkLinear, float(PADDING_HU), sitk.sitkFloat32)
    mask = image_from_volume(background.arteries)
    arteries = sitk.Resample(mask, mask, all_three, sitk.sitkNearestNeighbor)

    voxels = sitk.GetArrayFromImage(moved)
    inside = voxels > -1000
    bright = voxels > 120
    voxels[bright] = 120 + (voxels[bright] - 120) * rng.uniform(0.65, 1.35)
    sharpness = rng.uniform(-0.6, 0.9)
    blurred = ndimage.gaussian_filter(voxels, (0, 0.9, 0.9))
    voxels += sharpness * (voxels - blurred)  # below 0 as a soft kernel, above as a sharp one
    grain = ndimage.gaussian_filter(rng.standard_normal(voxels.shape, np.float32), (0, *2 * (rng.uniform(0.4, 0.9),)))
    voxels[inside] += rng.uniform(-15, 15) + (grain * (rng.uniform(2, 22) / grain.std()))[inside]
    volume = background.volume.with_voxels(np.clip(np.rint(voxels), PADDING_HU, 3071).astype(np.int16))
    return Background(background.name, volume, volume_from_image(arteries, "arteries"))


@dataclass(frozen=True)
class TwinSource:
    """What a pair of twins is made of.

    Attributes:
        name: of the pair.
        patient: both are of this patient, and so are other variations.
        make: gives the CT with emboli, the mask of the emboli, and the CT without.
        split: the side on which both stand.
        whole: whether it is a whole chest; stage II learns from these only.
    """

    name: str
    patient: str
    make: Callable[[], tuple[Volume, Volume, Volume]]
    split: Split
    whole: bool = True


@dataclass(frozen=True)
class _PhantomTwins:
    seed: tuple[int, ...]

    def __call__(self) -> tuple[Volume, Volume, Volume]:
        spacing = float(np.random.default_rng((*self.seed, 1)).choice(PHANTOM_SPACINGS_MM))
        config = PhantomConfig(spacing_mm=spacing)
        with_emboli, without = (
            make_phantom(np.random.default_rng(self.seed), config, positive) for positive in (True, False)
        )
        return with_emboli.volume, with_emboli.emboli_mask, without.volume


@dataclass(frozen=True)
class _PaintedTwins:
    background: Callable[[], Background | None]
    seed: tuple[int, ...]

    def __call__(self) -> tuple[Volume, Volume, Volume]:
        rng = np.random.default_rng(self.seed)
        source = self.background()
        if source is None:
            raise InputError("no vessel to paint into")
        background = varied(source, rng)
        painted = paint_emboli(background.volume, background.arteries, rng)
        return painted.volume, painted.emboli_mask, background.volume


@dataclass(frozen=True)
class _Read:
    argument: str

    def __call__(self) -> Background:
        return Background.read(self.argument)


@dataclass(frozen=True)
class _DrawnOut:
    path: Path
    seed: tuple[int, ...]

    def __call__(self) -> Background | None:
        return drawn_out(self.path, np.random.default_rng(self.seed))


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
    read = _Read(argument)
    return [
        TwinSource(f"{name}_{number:03d}", name, _PaintedTwins(read, (seed, number)), "train")
        for number in range(count)
    ]  # fmt: skip


def slice_twins(folder: Path, count: int, seed: int) -> list[TwinSource]:
    """Variations of single slices of real patients, every fourth patient for validation."""
    return [
        TwinSource(f"{path.stem}_{number}", path.stem,
                   _PaintedTwins(_DrawnOut(path, (seed, place, number)), (seed, 1000 * place + number)),
                   "validation" if place % 4 == 3 else "train", whole=False)
        for place, path in enumerate(single_slices(folder))
        for number in range(count)
    ]  # fmt: skip


def write_twins(source: TwinSource, out: Path) -> tuple[Study, ...]:
    """The pair's volumes, mask and marked slices, and their rows of the study list.

    None where no slice shows enough of an embolus to be marked: held-out figures are those of emboli that can be seen.
    """
    names = [f"{source.name}_{kind}" for kind in ("pe", "none")]
    volumes = [out / "volumes" / f"{name}.nii" for name in names]
    annotations = [out / "annotations" / f"{name}.json" for name in names]
    nothing_to_mark = out / "annotations" / f"{source.name}.nothing"
    if nothing_to_mark.exists():
        return ()
    if not annotations[1].exists():
        try:
            with_emboli, mask, without = source.make()
        except InputError as error:
            log.info("%s: %s", source.name, error)
            nothing_to_mark.touch()
            return ()
        pixel_mm2 = mask.spacing_mm[1] * mask.spacing_mm[2]
        shown = np.flatnonzero(np.count_nonzero(mask.voxels, axis=(1, 2)) * pixel_mm2 >= SMALLEST_MARK_MM2)
        if len(shown) == 0:
            nothing_to_mark.touch()
            return ()
        marked = shown[np.unique(np.linspace(0, len(shown) - 1, MARKED_SLICES).round().astype(int))].tolist()
        write_volume(mask, out / "masks" / f"{source.name}_pe.nii.gz")
        nothing = mask.with_voxels(np.zeros(mask.shape, np.uint8))
        for volume, truth, path, annotation in zip(
            (with_emboli, without), (mask, nothing), volumes, annotations, strict=True
        ):
            write_volume(volume, path)
            SparseAnnotation.from_mask(volume, truth, marked, "simulated reader").write(annotation, volume)
    return (
        Study(names[0], volumes[0], source.patient, "positive", annotations[0], source.split),
        Study(names[1], volumes[1], source.patient, "negative", annotations[1], source.split),
    )


def write_all(
    sources: Sequence[TwinSource], out: Path, progress: ProgressCallback = silent, workers: int = 2
) -> list[tuple[TwinSource, tuple[Study, ...]]]:
    """All pairs, in parallel processes; those that are there already are kept."""
    for folder in ("volumes", "masks", "annotations"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    done: dict[str, tuple[Study, ...]] = {}
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
        jobs = {pool.submit(write_twins, source, out): source for source in sources}
        for job in as_completed(jobs):
            done[jobs[job].name] = job.result()
            progress(Progress(f"make twins in {out.name}", len(done), len(sources), jobs[job].name))
    return [(source, done[source.name]) for source in sources if done[source.name]]


def _one_thread() -> None:
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def held_out_figures(
    detector: Detector, studies: Sequence[Study], masks: Path, prefix: str, progress: ProgressCallback
) -> dict[str, float]:
    """AUC with its DeLong interval, where the strongest slab's attention lies, and false candidates a study.

    The quality gate is left out: a background that shows the middle of a chest only would be refused.
    """
    truth, probabilities, hits, false = [], [], [], []
    for number, study in enumerate(studies):
        progress(Progress(f"look at held-out {prefix}", number, len(studies), study.study))
        volume = read_volume(study.path)
        slabs = study_slabs(volume, lung_range(volume), detector.slabs)
        features, slab_probability = detector.encode(slabs)
        truth.append(int(study.label == "positive"))
        probabilities.append(detector.classify(features))
        maps = normalised(torch.from_numpy(detector.attention(features))).numpy()
        grid = slabs.to_volume(maps)
        if study.label == "positive":
            mask = read_mask(masks / f"{study.study}.nii.gz", volume)
            emboli_mm = mask.to_lps_mm(np.argwhere(mask.voxels))
            strongest = int(slab_probability.argmax())
            row, column = np.unravel_index(int(maps[strongest].argmax()), maps[strongest].shape)
            peak_mm = grid.to_lps_mm((strongest, int(row), int(column)))
            away_mm = float(np.linalg.norm(emboli_mm - peak_mm, axis=1).min())
            hits.append(maps[strongest].max() > 0 and away_mm <= HIT_MM)
        else:
            false.append(len(find_candidates(maps, slab_probability, grid, slabs.slice_index.tolist())))
    area = auc(truth, probabilities)
    figures = {
        "studies": len(truth),
        "auc": area.value,
        "auc_low": area.low,
        "auc_high": area.high,
        "accuracy": float(np.mean((np.array(probabilities) >= 0.5) == np.array(truth))),
        "pointing": float(np.mean(hits)),
        "false_candidates": float(np.mean(false)),
    }
    return {f"held_out_{prefix}_{name}": value for name, value in figures.items()}


def main(
    work: Annotated[Path, typer.Option(help="Studies, runs and features; about 40 GB.")],
    out: Annotated[Path, typer.Option(help="The published model.")],
    background: Annotated[list[str], typer.Option(help="Enhanced CT to paint into: CT or CT,ARTERIES.")] = [],  # noqa: B006
    slices: Annotated[list[Path], typer.Option(help="Folder of enhanced single slices to paint into.")] = [],  # noqa: B006
    held_out: Annotated[list[str], typer.Option(help="Enhanced CT, painted and only looked at in the end.")] = [],  # noqa: B006
) -> None:
    """Make the studies, train both stages, measure on held-out studies, publish in half precision."""
    recipe = Recipe()
    with progress_bars() as progress:
        sources = phantom_twins(recipe.phantoms, recipe.seed, lambda number: number % 6 == 5)
        for number, argument in enumerate(background):
            sources += painted_twins(argument, recipe.variations, recipe.seed + 10 + number)
        for number, folder in enumerate(slices):
            sources += slice_twins(folder, recipe.slice_variations, recipe.seed + 30 + number)
        pairs = write_all(sources, work / "studies", progress)
        apart = {"phantoms": phantom_twins(recipe.held_out, recipe.seed + 1, lambda _: True)}
        for number, argument in enumerate(held_out):
            apart[f"painted_{number}"] = painted_twins(argument, recipe.held_out, recipe.seed + 50 + number)
        unseen = {
            name: [study for _, pair in write_all(twins, work / name, progress) for study in pair]
            for name, twins in apart.items()
        }

        whole = [study for source, pair in pairs if source.whole for study in pair]
        write_studies(whole, work / "studies.csv")
        # Without a label the slices of a study without emboli come from its marks only, at the levels of the emboli.
        marked = [replace(study, label="" if study.label == "negative" else study.label)
                  for _, pair in pairs for study in pair]  # fmt: skip
        encoder, both = None, work / "starter.safetensors"
        for number, settings in enumerate(recipe.stages, start=1):
            former, encoder = encoder, work / f"encoder_{number}.safetensors"
            train_encoder(marked, encoder, settings=settings, start_from=former, synthetic=True, progress=progress)
        if encoder is None:
            raise ValueError("a recipe needs a training of stage I")
        detector = train_classifier(
            whole, encoder, both, settings=recipe.classifier, synthetic=True, cache_dir=work / "features",
            progress=progress,
        )  # fmt: skip
        figures: dict[str, float] = {}
        for name, studies in unseen.items():
            figures |= held_out_figures(detector, studies, work / name / "masks", name, progress)
    if detector.card.classifier is None:
        raise ValueError("train_classifier returned a model without a record of stage II")
    record = replace(detector.card.classifier, metrics={**detector.card.classifier.metrics, **figures})
    detector.card = ModelCard("starter", pe_app.__version__, detector.card.encoder, record)
    detector.save(out, half=True)
    typer.echo(json.dumps(figures, indent=1))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    typer.run(main)
