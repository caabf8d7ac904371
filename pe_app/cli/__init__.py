"""The command line: every verb a person types. Bad input is one line and exit code 2, a refused study exit code 3.

One module per verb; each imports what it needs when it runs, so that ``--help`` and mistakes answer at once. The
verbs of ``train`` are loaded when one of them is asked for: their options are made from the settings they train with.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated

import typer

import pe_app
from pe_app.cli.bench import bench
from pe_app.cli.calibrate import calibrate
from pe_app.cli.compare import compare
from pe_app.cli.demo import demo
from pe_app.cli.detect import detect
from pe_app.cli.doctor import doctor
from pe_app.cli.encode import encode
from pe_app.cli.evaluate import evaluate
from pe_app.cli.export_bundle import export_bundle
from pe_app.cli.export_seg import export_seg
from pe_app.cli.import_ import import_
from pe_app.cli.import_dataset import import_dataset
from pe_app.cli.import_seg import import_seg
from pe_app.cli.label_reports import label_reports
from pe_app.cli.lazy import TrainGroup
from pe_app.cli.machine import with_machine_options
from pe_app.cli.options import EXIT_BAD_INPUT
from pe_app.cli.others import VerbsOfOthers
from pe_app.cli.phantom import phantom
from pe_app.cli.recipe import public
from pe_app.cli.starter import app as starter_app
from pe_app.cli.watch import watch
from pe_app.common.errors import InputError
from pe_app.common.memory import keep_freed_memory

DETECT, PREPARE, TRAIN, EVALUATE, EXCHANGE, INSTALLATION = (
    "Detect embolism",
    "Prepare studies",
    "Train",
    "Evaluate",
    "Exchange with other programs",
    "This installation",
)
"""Groups of verbs in --help, in this order."""

app = typer.Typer(
    name="pe-app",
    cls=VerbsOfOthers,
    help="Finding pulmonary embolism on chest CT with few annotations. Research use only, not for diagnosis.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(
    no_args_is_help=True, cls=TrainGroup, help="Train stage I (encoder), stage II (classifier), or both end to end."
)

recipe_app = typer.Typer(no_args_is_help=True, help="From data to a model in one command.")

app.command(rich_help_panel=DETECT)(with_machine_options(detect))
app.command(rich_help_panel=DETECT)(with_machine_options(watch))
app.command("import", rich_help_panel=PREPARE)(import_)
app.command(rich_help_panel=PREPARE)(import_dataset)
app.command(rich_help_panel=PREPARE)(label_reports)
app.command(rich_help_panel=PREPARE)(phantom)
app.add_typer(train_app, name="train", rich_help_panel=TRAIN)
app.command(rich_help_panel=TRAIN)(with_machine_options(encode))
recipe_app.command()(with_machine_options(public))
recipe_app.add_typer(starter_app, name="starter")
app.add_typer(recipe_app, name="recipe", rich_help_panel=TRAIN)
app.command(rich_help_panel=EVALUATE)(with_machine_options(evaluate))
app.command(rich_help_panel=EVALUATE)(with_machine_options(calibrate))
app.command(rich_help_panel=EVALUATE)(with_machine_options(compare))
app.command(rich_help_panel=EXCHANGE)(import_seg)
app.command(rich_help_panel=EXCHANGE)(export_seg)
app.command(rich_help_panel=EXCHANGE)(export_bundle)
app.command(rich_help_panel=INSTALLATION)(with_machine_options(doctor))
app.command(rich_help_panel=INSTALLATION)(with_machine_options(demo))
app.command(rich_help_panel=INSTALLATION)(bench)


def main() -> None:
    """Run the command line."""
    keep_freed_memory()
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.getLogger("highdicom").setLevel(logging.WARNING)  # it logs every attribute
    warnings.filterwarnings("ignore", "The string .* is unlikely to represent the intended person name")  # shows names
    try:
        app()
    except InputError as error:
        typer.echo(f"pe-app: {error}", err=True)
        sys.exit(EXIT_BAD_INPUT)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(f"pe-app {pe_app.__version__}")
        raise typer.Exit
