"""The verb train encoder: stage I."""

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
from pe_app.ct.slabs import SlabConfig
from pe_app.model.slab_encoder import EncoderConfig
from pe_app.model.study_classifier import ClassifierConfig
from pe_app.training.datasets import Augmentation
from pe_app.training.stages import EncoderTraining, train_encoder

UNCHANGED = Augmentation(flip=False, shift_cells=0, jitter_hu=0.0, window_cells=0)
"""The paper's: slabs are not changed at random, unless an option says how."""


@with_settings_options(skip=("augment", "workers", "feature_channels", "grid"))
def encoder(
    studies: StudyList,
    out: Out,
    training: EncoderTraining = EncoderTraining(augmentation=UNCHANGED),
    slabs: SlabConfig = SlabConfig(),
    network: EncoderConfig = EncoderConfig(),
    stage_two: ClassifierConfig = ClassifierConfig(),
    imagenet: Annotated[Path | None, typer.Option(help="Local ImageNet weights of ResNet18 to start from.")] = None,
    start_from: Annotated[Path | None, typer.Option(help="Model to continue from; its shapes are used.")] = None,
    synthetic: Synthetic = False,
    run_dir: RunDir = None,
    cache: Annotated[Path | None, typer.Option(help="Prepared slabs.", show_default="in the run folder")] = None,
    cache_limit: CacheLimit = "",
    workers: Workers = None,
) -> None:
    """Stage I: learn where to look, from the annotated slices of a study list. Resumes if interrupted.

    On several GPUs or machines: torchrun ... -m pe_app train encoder ...
    """
    settings = replace(
        training,
        augment=training.augmentation != UNCHANGED,
        workers=loader_workers(workers),
    )
    network = replace(network, slices_per_slab=slabs.slices_per_slab)
    with distributed.process_group(), progress_bars() as progress:
        trained = train_encoder(
            fit_studies(studies),
            out,
            settings=settings,
            slabs=slabs,
            network=network,
            classifier=replace(stage_two, feature_channels=network.feature_channels, grid=slabs.grid),
            imagenet=imagenet,
            start_from=start_from,
            synthetic=synthetic,
            run_dir=run_dir,
            slabs_dir=cache,
            preparation=preparation(workers, cache_limit),
            progress=progress,
        )
    echo_terms(trained.card)
    echo_once(f"Stage I published to {out}; train stage II with: pe-app train classifier --encoder {out} ...")
