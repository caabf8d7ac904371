"""The verbs of recipe starter: the model that ships, in three steps that each resume if interrupted.

pe-app recipe starter ingredients DATA --vessels DIR --enhanced CT ... --slices DIR --plain DIR
pe-app recipe starter learn DATA RUN --held-out NAME ...
pe-app recipe starter publish DATA RUN OUT --calibrate NAME ... --test NAME ...
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pe_app.cli.options import progress_bars

app = typer.Typer(no_args_is_help=True, help="The model that ships, in three steps.")
Ingredients = Annotated[Path, typer.Argument(metavar="DATA", help="Ingredients: a folder for each patient.")]
Start = Annotated[Path | None, typer.Option("--start", help="Model whose stage I to begin with; by default the starter "
                                            "model that ships.")]  # fmt: skip


@app.command()
def ingredients(
    data: Ingredients,
    vessels: Annotated[Path | None, typer.Option(help="Vessel trees: NAME.nii.gz and NAME_lungmask.nii.gz.")] = None,
    enhanced: Annotated[list[Path] | None, typer.Option(help="Enhanced chest CT; may be given several times.")] = None,
    slices: Annotated[Path | None, typer.Option(help="Folder of single enhanced slices.")] = None,
    plain: Annotated[Path | None, typer.Option(help="Folder of single slices without contrast.")] = None,
) -> None:
    """What windows are cut from, on a grid of 2.5 x 0.7 x 0.7 mm; a patient takes a minute."""
    from pe_app.research.starter.recipe import make_ingredients

    with progress_bars() as progress:
        make_ingredients(data, vessels, enhanced or [], slices, plain, progress)


@app.command()
def learn(
    data: Ingredients,
    run: Annotated[Path, typer.Argument(help="Gets checkpoint, running mean and log.")],
    held_out: Annotated[list[str] | None, typer.Option(help="A patient that is left out and validates.")] = None,
    start: Start = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Batches in all.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Of AdamW.")] = None,
    hours: Annotated[float, typer.Option(min=0, help="Stop with a checkpoint after so long.")] = 1000.0,
) -> None:
    """Stage I, cell by cell. The same call resumes."""
    from pe_app.model.detector import STARTER_MODEL
    from pe_app.research.starter.lesson import LessonSettings
    from pe_app.research.starter.recipe import learn_starter

    settings = LessonSettings()
    if steps is not None:
        settings = replace(settings, steps=steps)
    if learning_rate is not None:
        settings = replace(settings, learning_rate=learning_rate)
    learn_starter(data, run, held_out or [], start or STARTER_MODEL, settings, hours)


@app.command()
def publish(
    data: Ingredients,
    run: Annotated[Path, typer.Argument(help="Of 'learn'.")],
    out: Annotated[Path, typer.Argument(help="The model to write.")],
    calibrate: Annotated[list[str], typer.Option(help="A patient to calibrate on.")],
    test: Annotated[list[str], typer.Option(help="A patient to measure on, in the end.")],
    start: Start = None,
) -> None:
    """Calibrate on held-out patients, measure on others, and write the model in half precision."""
    from pe_app.model.detector import STARTER_MODEL
    from pe_app.research.starter.recipe import publish_starter

    with progress_bars() as progress:
        measured = publish_starter(data, run, out, calibrate, test, start or STARTER_MODEL, progress)
    typer.echo(json.dumps({name: [round(v, 3) for v in values] for name, values in measured.items()}, indent=1))
