"""Verbs for many studies at once: phantom, label-reports, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pe_app.cli.options import Model, StudyList, progress_bars
from pe_app.errors import InputError


def phantom(
    studies: Annotated[int, typer.Option(min=1, help="How many; every other one has emboli.")],
    out: Annotated[Path, typer.Option(help="Folder for volumes, masks, annotations and studies.csv.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same studies.")] = 0,
    matrix: Annotated[int, typer.Option(min=64, help="Rows and columns; 512 as scanners do, 128 for trials.")] = 512,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. [default: one a core]")] = None,
) -> None:
    """Simulated enhanced chest CT with emboli of known place, annotated as a reader would, and their study list."""
    import os

    from pe_app.phantom import PhantomConfig, write_phantom_studies

    with progress_bars() as progress:
        study_list = write_phantom_studies(
            out, studies, seed, PhantomConfig(matrix=matrix), progress, workers or os.cpu_count() or 1
        )
    typer.echo(f"Study list: {study_list}. Volumes to serve: {out / 'volumes'}")


def label_reports(
    reports: Annotated[Path, typer.Argument(help="CSV with the columns study and report.")],
    out: Annotated[Path, typer.Option(help="CSV of study, label, deciding sentence, location, side, acuity.")],
    studies: Annotated[Path | None, typer.Option(help="Study list to fill in: labels that are there stay.")] = None,
) -> None:
    """Mine study labels from radiology reports: positive, negative or uncertain, with the sentence that decided."""
    from pe_app.report_labels import label_reports as write_labels
    from pe_app.report_labels import label_studies, read_labels
    from pe_app.studies import read_studies, write_studies

    with progress_bars() as progress:
        counts = write_labels(reports, out, progress)
    typer.echo(", ".join(f"{count} {label}" for label, count in counts.items()) + f": {out}")
    if studies:
        known = read_studies(studies)
        labelled = label_studies(known, read_labels(out))
        write_studies(labelled, studies)
        gained = sum(new.label != old.label for new, old in zip(labelled, known, strict=True))
        typer.echo(f"{gained} of {len(known)} studies of {studies} got a label")


def evaluate(
    studies: StudyList,
    out: Annotated[Path, typer.Option(help="Folder for metrics.json, predictions.csv, index.html and report.pdf.")],
    model: Model = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="More models to compare.")] = None,
    untrained_baseline: Annotated[bool, typer.Option("--untrained-baseline", help="Also let random weights look; "
                                                     "costs another pass.")] = False,
    allow_training_studies: Annotated[bool, typer.Option("--allow-training-studies", help="Do not refuse studies that "
                                                         "a model was trained on; the result says so.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of bootstrap intervals and pictures.")] = 0,
) -> None:  # fmt: skip
    """How good models are on the test studies of a list: AUC, operating points, calibration, where they look."""
    from pe_app.detector import default_model
    from pe_app.evaluation import EvaluationSettings
    from pe_app.evaluation import evaluate as judge
    from pe_app.evaluation_page import summary, write_evaluation
    from pe_app.studies import read_studies

    models = [path for path in (model or default_model(), *(more or ())) if path is not None]
    if not models:
        raise InputError("no model: give one or more with --model FILE [FILE]...")
    settings = EvaluationSettings(untrained_baseline, allow_training_studies, seed)
    masks = studies.parent / "masks"
    with progress_bars() as progress:
        evaluation = judge(read_studies(studies), models, out, masks, settings, progress)
        write_evaluation(evaluation, out, masks, progress)
    typer.echo("\n".join(summary(evaluation)))
    typer.echo(f"Open {out / 'index.html'}. Research use only, not for diagnosis.")
