"""The verb compare: the paper's systems and others on one study list."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pe_app.cli.options import StudyList, fit_studies, progress_bars


def compare(
    studies: StudyList,
    out: Annotated[Path, typer.Option(help="Folder for models, comparison.csv, comparison.png and index.html.")],
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of every system.")] = 3,
    first_seed: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of the first training: several calls, each with seeds of its "
            "own, may fill the same folder at the same time.",
        ),
    ] = 0,
    systems: Annotated[
        str, typer.Option(help="Names with commas between; scenario3 is always among them.", show_default="all")
    ] = "",
    size: Annotated[
        Literal["full", "small"], typer.Option(help="The paper's, or small ones for two processor cores.")
    ] = "full",
    encoder_epochs: Annotated[int | None, typer.Option(min=1, help="Of stage I.", show_default="100, small 12")] = None,
    classifier_epochs: Annotated[
        int | None, typer.Option(min=1, help="Of stage II.", show_default="50, small 8")
    ] = None,
    matrix: Annotated[int, typer.Option(min=32, help="Small size: rows and columns of a slice.")] = 256,
    crop: Annotated[int, typer.Option(min=64, help="Small size: centre crop, a multiple of 64.")] = 192,
    slab_count: Annotated[int, typer.Option(min=2, help="Small size: slabs per study, an even number.")] = 16,
    synthetic: Annotated[bool, typer.Option(help="Record that every embolism is simulated or inserted.")] = False,
) -> None:
    """The paper's Table 1 and scenarios on a study list, and options beyond it. Resumes if interrupted."""
    from dataclasses import replace

    from pe_app.research.benchmark import read_truth_table
    from pe_app.research.comparison.page import summary, write_comparison
    from pe_app.research.comparison.run import compare as train_and_ask
    from pe_app.research.comparison.run import finished
    from pe_app.research.comparison.systems import SYSTEMS, Plan, choose_systems, small_plan

    plan = Plan() if size == "full" else small_plan(matrix, crop, slab_count)
    if encoder_epochs:
        plan = replace(plan, encoder=replace(plan.encoder, epochs=encoder_epochs))
    if classifier_epochs:
        plan = replace(plan, classifier=replace(plan.classifier, epochs=classifier_epochs))
    chosen = choose_systems([name.strip() for name in systems.split(",") if name.strip()])
    masks = studies.parent / "masks"
    try:
        with progress_bars() as progress:
            train_and_ask(
                fit_studies(studies),
                out,
                chosen,
                plan,
                range(first_seed, first_seed + seeds),
                masks if masks.is_dir() else None,
                synthetic,
                progress,
            )
    finally:  # what an interrupted call has finished is shown, too
        outcomes = finished(out)
        if outcomes:
            truth = read_truth_table(studies.parent / "truth.csv")
            typer.echo("\n".join(summary(write_comparison(outcomes, SYSTEMS, out, truth, synthetic))))
            typer.echo(f"Open {out / 'index.html'}. Research use only, not for diagnosis.")
