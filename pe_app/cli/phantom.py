"""The verb phantom: simulated studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pe_app.cli.options import progress_bars
from pe_app.common.errors import InputError


def phantom(
    out: Annotated[Path, typer.Option(help="Folder for volumes, masks, annotations and studies.csv.")],
    studies: Annotated[
        int | None,
        typer.Option(min=1, help="How many; every second one has emboli.", show_default="300 with --benchmark"),
    ] = None,
    benchmark: Annotated[
        bool,
        typer.Option(
            "--benchmark",
            help="Matched pairs with and without emboli, in which "
            "something irrelevant goes with the label in the training studies only.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same studies.")] = 0,
    matrix: Annotated[
        int | None,
        typer.Option(
            min=64,
            help="Rows and columns; 512 as scanners do, 128 for trials.",
            show_default="512, 256 with --benchmark",
        ),
    ] = None,
    spacing_mm: Annotated[
        float | None,
        typer.Option(
            min=0.3,
            max=10,
            help="Between slices.",
            show_default="drawn as hospitals do; 2.5 with --benchmark below 512",
        ),
    ] = None,
    burden: Annotated[
        Literal["mixed", "large"] | None,
        typer.Option(
            help="Emboli of every size, as a hospital sees them; or only large "
            "ones in central and lobar arteries, as a first check that a "
            "detector finds what nobody would miss.",
            show_default="mixed, large with --benchmark, whose share of tiny ones stays",
        ),
    ] = None,
    vessels: Annotated[
        Path | None,
        typer.Option(
            help="Folder of real patients' vessel masks, NAME.nii.gz (1 artery, 2 vein) and NAME_lungmask.nii.gz: "
            "studies of these trees, deformed at random, with clots of real size."
        ),
    ] = None,
    dicom: Annotated[
        bool, typer.Option("--dicom", help="Also write every study as DICOM in OUT/dicom, and OUT/reports.csv.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one per core")] = None,
) -> None:
    """Simulated enhanced chest CT with emboli of known place, annotated as a reader would, and their study list."""
    import os

    from pe_app.phantom import PhantomConfig, write_phantom_studies
    from pe_app.phantom.dicom import write_dicom_studies
    from pe_app.research.benchmark import BenchmarkConfig, write_benchmark
    from pe_app.studies import read_studies

    processes = workers or os.cpu_count() or 1
    if not benchmark and studies is None:
        raise InputError("--studies is missing: give how many, --studies 8, or --benchmark for the benchmark")
    if vessels and (benchmark or matrix or spacing_mm or burden):
        raise InputError("--vessels decides matrix, spacing and clots itself: leave out the options for them")
    with progress_bars() as progress:
        if benchmark:
            matrix = matrix or 256
            spacing = spacing_mm or (2.5 if matrix < 512 else None)
            config = BenchmarkConfig((studies or 300) // 2, burden=burden or "large", matrix=matrix, spacing_mm=spacing)
            study_list = write_benchmark(out, config, seed, progress, processes)
        else:
            made = PhantomConfig(matrix=matrix or 512, spacing_mm=spacing_mm, burden=burden or "mixed")
            study_list = write_phantom_studies(out, studies or 0, seed, made, progress, processes, vessels)
        if dicom:
            reports = write_dicom_studies(read_studies(study_list), out, progress)
    if dicom:
        typer.echo(f"DICOM to import: {out / 'dicom'}. Their reports, by accession number: {reports}")
    typer.echo(f"Study list: {study_list}. Volumes to serve: {out / 'volumes'}")
