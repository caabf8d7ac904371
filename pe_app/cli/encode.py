"""The verb that prepares what stage II learns from: encode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pe_app.cli.options import (
    EXIT_BAD_INPUT,
    CacheLimit,
    StudyList,
    Workers,
    echo_once,
    fit_studies,
    preparation,
    progress_bars,
)
from pe_app.common.errors import InputError


def encode(
    studies: StudyList,
    model: Annotated[Path, typer.Option("--model", help="Model whose trained encoder is used.")],
    cache: Annotated[Path, typer.Option("--cache", help="Folder of the features; several lists may share it.")],
    cache_limit: CacheLimit = "",
    workers: Workers = None,
) -> None:
    """Features of every study of a list, made once: what 'train classifier --cache' learns from.

    Resumes if interrupted; a study that cannot be used is reported at the end and stops no other.

    On several GPUs or machines: torchrun ... -m pe_app encode ...
    """
    from pe_app.common import distributed
    from pe_app.model.detector import Detector
    from pe_app.studies import missing
    from pe_app.training.datasets import encode_sources, encoder_key, feature_bytes, read_sources

    listed = fit_studies(studies)
    if gone := [path for path in missing(listed) if path in {study.path for study in listed}]:
        raise InputError(f"{studies}: {len(gone)} CTs are not there, the first is {gone[0]}: correct the study list")
    refused: list[InputError] = []
    with distributed.process_group(), progress_bars() as progress:
        detector = Detector.load(model)  # on the GPU of this process
        if detector.card.encoder is None:
            raise InputError(f"model {model}: its encoder is not trained: train stage I first")
        sources = read_sources(listed, annotations=False, progress=progress, cache_dir=cache)
        before = set(cache.glob(f"*-{encoder_key(detector)}.npy"))
        how = preparation(workers, cache_limit)
        files = encode_sources(detector, sources, cache, progress, how, refused.append)
        refusals = [error for each in distributed.all_gather(refused) for error in each]
    new = len({file.path for file in files} - before)
    size = feature_bytes(detector)
    for error in refusals:
        echo_once(f"pe-app: {error}")
    echo_once(
        f"{len(files)} of {len(listed)} studies are in {cache}, {new} of them new; {size / 1e6:.3g} MB per study, "
        f"{size * len(files) / 1e9:.3g} GB. Train with: pe-app train classifier --encoder {model} --cache {cache} ..."
    )
    if refusals:
        raise typer.Exit(EXIT_BAD_INPUT)
