"""The verb train end-to-end: both stages together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pe_app.cli.options import Out, RunDir, StudyList, Synthetic, echo_once, echo_terms, fit_studies, progress_bars
from pe_app.cli.settings_options import with_settings_options
from pe_app.common import distributed
from pe_app.training.fine_tuning import FineTuning, train_end_to_end


@with_settings_options(skip=("workers", "pooled"))
def end_to_end(
    studies: StudyList,
    model: Annotated[Path, typer.Option("--model", help="The model that 'train classifier' published.")],
    out: Out,
    training: FineTuning = FineTuning(),
    synthetic: Synthetic = False,
    run_dir: RunDir = None,
    cache: Annotated[Path | None, typer.Option(help="Prepared slabs.", show_default="in the run folder")] = None,
) -> None:
    """Both stages together, after stage II has converged; not in the paper. Resumes if interrupted."""
    with distributed.process_group(), progress_bars() as progress:
        trained = train_end_to_end(
            fit_studies(studies),
            model,
            out,
            settings=training,
            synthetic=synthetic,
            run_dir=run_dir,
            cache_dir=cache,
            progress=progress,
        )
    echo_terms(trained.card)
    echo_once(f"Model published to {out}; compare it with {model}: pe-app evaluate --model {model} {out} ...")
