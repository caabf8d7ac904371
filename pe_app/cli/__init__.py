"""The command line: every verb a person types. Bad input is one line and exit code 2, a refused study exit code 3.

One module a subject, each with its verbs; they import what they need when they run, so that ``--help`` and mistakes
answer at once.
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
from pe_app.cli.cohort import calibrate, compare, evaluate, label_reports, phantom
from pe_app.cli.demo import demo
from pe_app.cli.detecting import detect
from pe_app.cli.encoding import encode
from pe_app.cli.importing import import_
from pe_app.cli.options import EXIT_BAD_INPUT
from pe_app.cli.others import VerbsOfOthers
from pe_app.cli.public_data import import_dataset
from pe_app.cli.recipes import public
from pe_app.cli.results import export_bundle, export_seg, import_seg
from pe_app.cli.train import classifier, encoder, end_to_end
from pe_app.cli.watching import watch
from pe_app.common.errors import InputError
from pe_app.common.memory import keep_freed_memory

app = typer.Typer(
    name="pe-app",
    cls=VerbsOfOthers,
    help="Finding pulmonary embolism on chest CT with few annotations. Research use only, not for diagnosis.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipe_app = typer.Typer(no_args_is_help=True, help="From data to a model in one command.")
train_app = typer.Typer(no_args_is_help=True, help="Train stage I (encoder) or stage II (classifier).")

app.command()(detect)
train_app.command()(encoder)
train_app.command()(classifier)
train_app.command()(end_to_end)
app.add_typer(train_app, name="train")
app.command()(encode)
app.command("import")(import_)
app.command()(import_dataset)
recipe_app.command()(public)
app.add_typer(recipe_app, name="recipe")
app.command()(phantom)
app.command()(label_reports)
app.command()(evaluate)
app.command()(compare)
app.command()(calibrate)
app.command()(watch)
app.command()(import_seg)
app.command()(export_seg)
app.command()(export_bundle)
app.command()(demo)
app.command()(bench)


def main() -> None:
    """Run the command line."""
    keep_freed_memory()
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.getLogger("highdicom").setLevel(logging.WARNING)  # it tells of every attribute
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
