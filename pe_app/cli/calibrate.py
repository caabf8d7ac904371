"""The verb calibrate: threshold and temperature of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pe_app.cli.options import StudyList, fit_studies, progress_bars


def calibrate(
    studies: StudyList,
    model: Annotated[Path, typer.Option("--model", help="A model with both stages trained.")],
    out: Annotated[Path, typer.Option(help="The calibrated model; may be the same file.")],
    sensitivity: Annotated[
        float | None,
        typer.Option(
            help="Sensitivity on the validation studies that the threshold is chosen for.",
            show_default="the threshold stays 0.5",
        ),
    ] = None,
) -> None:
    """Choose a model's temperature and threshold on the validation studies of a list and keep them in its file."""
    from pe_app.training.calibration import calibrate as choose

    with progress_bars() as progress:
        decision = choose(fit_studies(studies), model, out, sensitivity, progress)
    typer.echo(f"{out}: {decision}. Now measure on test studies: pe-app evaluate --model {out} ...")
