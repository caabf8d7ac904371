"""The verb evaluate: models judged on test studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pe_app.cli.options import Model, StudyList, fit_studies, progress_bars
from pe_app.common.errors import InputError


def evaluate(
    studies: StudyList,
    out: Annotated[Path, typer.Option(help="Folder for metrics.json, predictions.csv and index.html.")],
    model: Model = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="More models to compare.")] = None,
    untrained_baseline: Annotated[
        bool, typer.Option("--untrained-baseline", help="Also evaluate random weights; costs another pass.")
    ] = False,
    allow_training_studies: Annotated[
        bool,
        typer.Option(
            "--allow-training-studies",
            help="Do not refuse studies that a model was trained on; the result carries a warning.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of bootstrap intervals and pictures.")] = 0,
) -> None:
    """How good models are on the test studies of a list: AUC, operating points, calibration, where they look."""
    from pe_app.evaluation.evaluate import EvaluationSettings
    from pe_app.evaluation.evaluate import evaluate as judge
    from pe_app.evaluation.report import summary, write_evaluation
    from pe_app.model.detector import default_model

    models = [path for path in (model or default_model(), *(more or ())) if path is not None]
    if not models:
        raise InputError("no model: give one or more with --model FILE [FILE]...")
    settings = EvaluationSettings(untrained_baseline, allow_training_studies, seed)
    masks = studies.parent / "masks"
    with progress_bars() as progress:
        evaluation = judge(fit_studies(studies), models, out, masks, settings, progress)
        write_evaluation(evaluation, out, masks, progress)
    typer.echo("\n".join(summary(evaluation)))
    typer.echo(f"Open {out / 'index.html'}. Research use only, not for diagnosis.")
