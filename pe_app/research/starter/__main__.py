"""The recipe of the model that ships: twins with and without emboli, simulated and painted, both stages, figures.

``python -m pe_app.research.starter --work DIR --background CT[,ARTERIES] ... --slices FOLDER ... --out FILE``

Every step goes on where it was interrupted. The model has never seen a real embolism, and its card says so.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import pe_app
from pe_app.cli.options import progress_bars
from pe_app.model.detector import Detector, ModelCard
from pe_app.research.starter.cells import CellTraining, train_cells
from pe_app.research.starter.figures import held_out_figures
from pe_app.research.starter.twins import painted_twins, phantom_twins, slice_twins, write_all
from pe_app.studies import Study, write_studies
from pe_app.training.datasets import Augmentation
from pe_app.training.stages import ClassifierTraining, EncoderTraining, train_classifier, train_encoder

changed = partial(Augmentation, flip=True, shift_cells=2, jitter_hu=30)
TWINS = EncoderTraining(twins=True, fresh_statistics=True, schedule="cosine", augment=True, seed=1)
EVERYWHERE = replace(
    TWINS, twins=False, epochs=1, batch=6, learning_rate=1e-4, attention_weight=0.5, augmentation=changed()
)


@dataclass(frozen=True)
class Recipe:
    """How much of what goes into the starter model.

    Attributes:
        phantoms: simulated patients, each with emboli and without; every sixth validates.
        variations: of each real background, each with painted emboli and without; they train.
        slice_variations: of each real single slice, likewise; they teach stage I only. Every fourth slice validates.
        held_out: simulated patients, and variations of each held-out background, that are only looked at in the end.
        cells: what a clot looks like, before stage I.
        stages: stage I on twins: on windows, then on whole slabs.
        everywhere: stage I in the end, half of the slabs without emboli from anywhere in the lungs: twins are alike at
            the heights of emboli only, and say nothing of what lies above and below.
        classifier: stage II.
    """

    phantoms: int = 40
    variations: int = 16
    slice_variations: int = 4
    held_out: int = 10
    seed: int = 2027
    cells: CellTraining = field(default_factory=CellTraining)
    stages: tuple[EncoderTraining, ...] = (
        replace(
            TWINS, epochs=4, batch=6, learning_rate=3e-4, attention_weight=0.5, augmentation=changed(window_cells=12)
        ),
        replace(TWINS, epochs=2, batch=3, learning_rate=1e-4, attention_weight=0.5, augmentation=changed()),
    )
    everywhere: EncoderTraining = EVERYWHERE
    classifier: ClassifierTraining = field(
        default_factory=lambda: ClassifierTraining(
            epochs=2, batch=4, learning_rate=3e-5, schedule="cosine", fresh_statistics=True, evidence_start=True, seed=1
        )
    )


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
        pairs = write_all(sources, work / "studies", progress, painted_slabs=True)
        apart = {"phantoms": phantom_twins(recipe.held_out, recipe.seed + 1, lambda _: True)}
        for number, argument in enumerate(held_out):
            apart[f"painted_{number}"] = painted_twins(argument, recipe.held_out, recipe.seed + 50 + number)
        unseen = {
            name: [study for _, pair in write_all(twins, work / name, progress) for study in pair]
            for name, twins in apart.items()
        }

        whole = [study for source, pair in pairs if source.whole for study in pair]
        write_studies(whole, work / "studies.csv")
        marked = [_by_marks_only(study) for _, pair in pairs for study in pair]
        labelled = [study if source.whole else _by_marks_only(study) for source, pair in pairs for study in pair]
        many: dict[str, list[Path]] = {"train": [], "validation": []}
        for source in sources:
            slabs = work / "studies" / "slabs" / f"{source.name}.npy"
            if slabs.exists():
                many[source.split].append(slabs)
        encoder, both = work / "cells.safetensors", work / "starter.safetensors"
        train_cells(many["train"], many["validation"], encoder, recipe.cells, progress)
        for number, settings in enumerate(recipe.stages, start=1):
            former, encoder = encoder, work / f"encoder_{number}.safetensors"
            train_encoder(marked, encoder, settings=settings, start_from=former, synthetic=True, progress=progress)
        former, encoder = encoder, work / "encoder.safetensors"
        train_encoder(
            labelled, encoder, settings=recipe.everywhere, start_from=former, synthetic=True, progress=progress
        )
        _slices_apart_as_in_stage_one(encoder)
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


def _by_marks_only(study: Study) -> Study:
    """Without its label the slabs of a study without emboli come from its marks, at the levels of its twin's emboli."""
    return replace(study, label="" if study.label == "negative" else study.label)


def _slices_apart_as_in_stage_one(model: Path) -> None:
    """Slabs of whole studies get slices 2.5 mm apart: so stage I, which learned from those, says most of them."""
    detector = Detector.load(model)
    detector.slabs = replace(detector.slabs, slab_spacing="physical")
    detector.save(model)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    typer.run(main)
