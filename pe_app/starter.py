"""The recipe of the model that ships: phantoms, emboli painted into real CT, both stages, figures on held-out studies.

``python -m pe_app.starter --work DIR --background CT[,ARTERIES] ... --out pe_app/models/starter.safetensors``

Every step goes on where it was interrupted. The model has never seen a real embolism, and its card says so.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import SimpleITK as sitk
import typer

import pe_app
from pe_app.annotation import SparseAnnotation, slice_schedule
from pe_app.cli.options import progress_bars
from pe_app.datasets import Augmentation
from pe_app.detector import Detector, ModelCard
from pe_app.phantom import PhantomConfig, paint_emboli, write_phantom_studies
from pe_app.progress import Progress, ProgressCallback, silent
from pe_app.roc import auc
from pe_app.studies import Label, Study, read_studies, write_studies
from pe_app.training import ClassifierTraining, EncoderTraining, train_classifier, train_encoder
from pe_app.volume import PADDING_HU, Volume
from pe_app.volume_io import image_from_volume, read_mask, read_volume, volume_from_image, write_volume

log = logging.getLogger(__name__)

HIT_MM = 12.0
"""The attention's peak counts as a hit within this distance of an embolus: a cell of about 11 mm."""


CHEST_FIELD_MM = 340.0
"""A usual field of view."""


@dataclass(frozen=True)
class Recipe:
    """How much of what goes into the starter model.

    Attributes:
        phantoms: phantom studies for training, about half with emboli.
        painted: studies made of each real background, half with emboli.
        held_out: phantom studies of another seed that are only looked at in the end.
        encoder: stage I.
        classifier: stage II.
    """

    phantoms: int = 100
    painted: int = 12
    held_out: int = 20
    seed: int = 2026
    encoder: EncoderTraining = field(
        default_factory=lambda: EncoderTraining(
            epochs=7,
            batch=8,
            learning_rate=3e-4,
            seed=1,
            augment=True,
            augmentation=Augmentation(flip=True, shift_cells=2, jitter_hu=25),
        )
    )
    classifier: ClassifierTraining = field(
        default_factory=lambda: ClassifierTraining(epochs=3, batch=2, learning_rate=3e-4, seed=1)
    )


@dataclass(frozen=True)
class Background:
    """A real enhanced CT to paint into, and a mask of its pulmonary arteries where there is one."""

    name: str
    volume: Volume
    arteries: Volume | None

    @classmethod
    def read(cls, argument: str) -> Background:
        """From ``CT`` or ``CT,ARTERIES``."""
        ct, _, arteries = argument.partition(",")
        volume = read_volume(ct)
        mask = read_mask(arteries, volume) if arteries else None
        return cls(Path(ct).resolve().parent.name, _on_a_chest(volume, PADDING_HU), mask and _on_a_chest(mask, 0))


def _on_a_chest(volume: Volume, outside: int) -> Volume:
    """A cropped CT in a field of view as wide as a chest's, so that its pixels are as large as in other studies."""
    missing = [max(0, math.ceil((CHEST_FIELD_MM / step - count) / 2)) for step, count in
               zip(volume.spacing_mm[1:], volume.shape[1:], strict=True)]  # fmt: skip
    margins = ((0, 0), *((side, side) for side in missing))
    affine = volume.affine.copy()
    affine[:3, 3] = volume.to_lps_mm((0, -missing[0], -missing[1]))
    return Volume(np.pad(volume.voxels, margins, constant_values=outside), affine, volume.name)


def varied(background: Background, rng: np.random.Generator) -> tuple[Volume, Volume | None]:
    """Another patient, nearly: turned by up to 8 degrees, scaled, moved, noisier, a little brighter or darker.

    One real CT painted many times would teach its own anatomy; this takes some of that away, no more.
    """
    image = image_from_volume(background.volume)
    turn = sitk.Euler3DTransform()
    size = np.array(image.GetSize()) / 2
    turn.SetCenter(image.TransformContinuousIndexToPhysicalPoint(size.tolist()))
    turn.SetRotation(*np.deg2rad(rng.uniform((-3, -3, -8), (3, 3, 8))))
    turn.SetTranslation(rng.uniform((-15, -10, 0), (15, 10, 0)).tolist())
    scale = sitk.ScaleTransform(3, [*(rng.uniform(0.9, 1.1) for _ in range(2)), 1.0])
    scale.SetCenter(turn.GetCenter())
    both = sitk.CompositeTransform([turn, scale])
    moved = sitk.Resample(image, image, both, sitk.sitkLinear, float(PADDING_HU), sitk.sitkFloat32)
    voxels = sitk.GetArrayFromImage(moved)
    inside = voxels > -1000
    voxels[inside] += rng.uniform(-15, 15) + rng.normal(0, rng.uniform(0, 15), voxels.shape)[inside]
    volume = background.volume.with_voxels(np.clip(np.rint(voxels), -1024, 3071).astype(np.int16))
    if background.arteries is None:
        return volume, None
    mask = image_from_volume(background.arteries)
    return volume, volume_from_image(sitk.Resample(mask, mask, both, sitk.sitkNearestNeighbor), "arteries")


def paint_studies(
    background: Background, out: Path, count: int, seed: int, progress: ProgressCallback = silent
) -> list[Study]:
    """Studies of one real patient, every other one with painted emboli, annotated every 10 mm."""
    studies = []
    for number in range(count):
        name = f"{background.name}_{number:03d}"
        progress(Progress(f"paint emboli into {background.name}", number, count))
        path, annotation = out / "volumes" / f"{name}.nrrd", out / "annotations" / f"{name}.json"
        positive = number % 2 == 0
        if not annotation.exists():
            rng = np.random.default_rng((seed, number))
            volume, arteries = varied(background, rng)
            mask = volume.with_voxels(np.zeros(volume.shape, np.uint8))
            if positive:
                painted = paint_emboli(volume, arteries, rng)
                volume, mask = painted.volume, painted.emboli_mask
            write_volume(volume, path)
            annotate_densely(volume, mask, annotation)
        label: Label = "positive" if positive else "negative"
        # Validation is left to the phantoms: two real patients cannot stand on both sides.
        studies.append(Study(name, path, background.name, label, annotation, split="train"))
    return studies


def annotate_densely(volume: Volume, mask: Volume, path: Path) -> None:
    """Mark the 10 mm schedule and, where the mask holds emboli, slices about 4 mm apart: the truth costs no reader."""
    every = max(1, round(4.0 / volume.spacing_mm[0]))
    drawn = np.flatnonzero(mask.voxels.any(axis=(1, 2)))[::every].tolist()
    reviewed = sorted({*slice_schedule(volume), *drawn})
    SparseAnnotation.from_mask(volume, mask, reviewed, "simulated reader").write(path, volume)


def densely_annotated(study: Study, masks: Path, folder: Path) -> Study:
    """A positive phantom with all that its mask knows; others as they are."""
    if study.label != "positive":
        return study
    annotation = folder / f"{study.study}.json"
    if not annotation.exists():
        volume = read_volume(study.path)
        annotate_densely(volume, read_mask(masks / f"{study.study}.nrrd", volume), annotation)
    return replace(study, annotation=annotation)


def held_out_figures(detector: Detector, studies: Path, progress: ProgressCallback) -> dict[str, float]:
    """AUC with its DeLong interval, and how often the strongest slab's attention lies on an embolus.

    ``studies`` is a phantom study list that no training saw; the truth is its masks.
    """
    truth, probabilities, hits = [], [], []
    listed = read_studies(studies)
    for number, study in enumerate(listed):
        progress(Progress("held-out studies", number, len(listed), study.study))
        detection = detector.detect(read_volume(study.path)).detection
        if detection.probability is None:
            log.warning("%s was refused: %s", study.study, [reason.code for reason in detection.reasons])
            continue
        truth.append(int(study.label == "positive"))
        probabilities.append(detection.probability)
        strongest = max(detection.evidence, key=lambda slab: slab.probability)
        if study.label == "positive":
            place = strongest.peak_lps_mm
            hits.append(place is not None and _distance_mm(studies, study, place) <= HIT_MM)
    area = auc(truth, probabilities)
    return {
        "held_out_studies": len(truth),
        "held_out_auc": area.value,
        "held_out_auc_low": area.low,
        "held_out_auc_high": area.high,
        "held_out_pointing": float(np.mean(hits)),
    }


def _distance_mm(studies: Path, study: Study, place: tuple[float, float, float]) -> float:
    """Millimetres from a place to the nearest voxel of an embolus."""
    mask = read_mask(studies.parent / "masks" / f"{study.study}.nrrd", read_volume(study.path))
    return float(np.linalg.norm(mask.to_lps_mm(np.argwhere(mask.voxels)) - place, axis=1).min())


def main(
    work: Annotated[Path, typer.Option(help="Studies, runs and features; about 12 GB.")],
    out: Annotated[Path, typer.Option(help="The published model.")],
    background: Annotated[list[str], typer.Option(help="Enhanced CT to paint into: CT or CT,ARTERIES.")] = [],  # noqa: B006
) -> None:
    """Make the studies, train both stages, measure on held-out phantoms, publish in half precision."""
    recipe = Recipe()
    with progress_bars() as progress:
        phantoms = write_phantom_studies(work / "phantoms", recipe.phantoms, recipe.seed, PhantomConfig(), progress, 2)
        held_out = write_phantom_studies(
            work / "held_out", recipe.held_out, recipe.seed + 1, PhantomConfig(), progress, 2
        )
        studies = [
            densely_annotated(study, work / "phantoms" / "masks", work / "annotations")
            for study in read_studies(phantoms)
        ]
        for number, argument in enumerate(background):
            source = Background.read(argument)
            studies += paint_studies(source, work / "painted", recipe.painted, recipe.seed + 10 + number, progress)
        write_studies(studies, work / "studies.csv")

        first, second = work / "encoder.safetensors", work / "starter.safetensors"
        train_encoder(studies, first, settings=recipe.encoder, synthetic=True, progress=progress)
        detector = train_classifier(
            studies, first, second, settings=recipe.classifier, synthetic=True, cache_dir=work / "features",
            progress=progress,
        )  # fmt: skip
        figures = held_out_figures(detector, held_out, progress)
    if detector.card.classifier is None:
        raise ValueError("train_classifier returned a model without a record of stage II")
    record = replace(detector.card.classifier, metrics={**detector.card.classifier.metrics, **figures})
    detector.card = ModelCard("starter", pe_app.__version__, detector.card.encoder, record)
    detector.save(out, half=True)
    typer.echo(json.dumps(figures, indent=1))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    typer.run(main)
