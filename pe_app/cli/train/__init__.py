"""Verbs that train; their options are made from the settings that they train with, so these modules import torch."""

import typer

from pe_app.cli.machine import with_machine_options
from pe_app.cli.train.classifier import classifier
from pe_app.cli.train.encoder import encoder
from pe_app.cli.train.end_to_end import end_to_end

app = typer.Typer()
for verb in (encoder, classifier, end_to_end):
    app.command()(with_machine_options(verb))
