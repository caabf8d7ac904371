"""The verb train classifier: stage II."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pe_app.cli.options import (
    CacheLimit,
    Out,
    RunDir,
    StudyList,
    Synthetic,
    Workers,
    echo_once,
    echo_terms,
    fit_studies,
    loader_workers,
    preparation,
    progress_bars,
)
from pe_app.cli.settings_options import with_settings_options
from pe_app.common import distributed
from pe_app.training.stages import ClassifierTraining, train_classifier


@with_settings_options(skip=("workers",))
def classifier(
    studies: StudyList,
    encoder: Annotated[Path, typer.Option("--encoder", help="The model that 'train encoder' published.")],
    out: Out,
    training: ClassifierTraining = ClassifierTraining(),
    synthetic: Synthetic = False,
    run_dir: RunDir = None,
    cache: Annotated[
        Path | None, typer.Option(help="Features, as 'encode' makes them.", show_default="in the run folder")
    ] = None,
    cache_limit: CacheLimit = "",
    workers: Workers = None,
) -> None:
    """Stage II: learn the study probability, from study labels alone. Resumes if interrupted.

    On several GPUs or machines: torchrun ... -m pe_app train classifier ...
    """
    with distributed.process_group(), progress_bars() as progress:
        trained = train_classifier(
            fit_studies(studies),
            encoder,
            out,
            settings=replace(training, workers=loader_workers(workers)),
            synthetic=synthetic,
            run_dir=run_dir,
            cache_dir=cache,
            preparation=preparation(workers, cache_limit),
            progress=progress,
        )
    echo_terms(trained.card)
    echo_once(f"Model published to {out}; try it with: pe-app detect STUDY --model {out}")
