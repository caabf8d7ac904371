"""The verb that measures: bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pe_app.cli.options import progress_bars


def bench(
    series: Annotated[
        Path | None, typer.Argument(help="Folder of a DICOM series.", show_default="a simulated one")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
    device: Annotated[str, typer.Option(help="Of the networks: cpu, cuda, cuda:1.")] = "cpu",
    step: Annotated[list[str] | None, typer.Option(help="Measure this step only; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of a step; the shortest counts.")] = 3,
    memory: Annotated[bool, typer.Option("--memory", help="Also the memory of a detection of 600 slices.")] = False,
) -> None:
    """Seconds of every step, compared with a textbook implementation and the limit of this machine."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from pe_app.research.bench.measure import STEPS, measure_memory, run_bench

    with progress_bars() as progress:
        found = run_bench(series, torch.device(device), step or STEPS, repeats, progress)
    used = measure_memory() if memory else None
    if as_json:
        typer.echo(json.dumps({**found.to_json(), **({"memory": used} if used else {})}, indent=1))
        return
    table = Table("step", "seconds", "textbook", "limit", "times faster", "of the limit")
    for row in found.steps:
        values = row.to_json()
        table.add_row(
            row.step,
            *(_text(values[name], "{:.3f}") for name in ("seconds", "textbook_seconds", "limit_seconds")),
            _text(values["speedup"], "{:.1f}"),
            _text(values["of_limit"], "{:.0%}"),
        )
    Console().print(table)
    typer.echo(", ".join(f"{name} {value}" for name, value in found.machine.items()))
    ours = found.seconds("detection")
    for name in ("penet_stride24", "penet_stride1"):
        if ours and (other := found.seconds(name)):
            typer.echo(f"detection / {name}: {ours / other:.3f}")
    if used:
        typer.echo(f"memory of a detection of {used['slices']} slices: {used['above_idle_mb']:.0f} MB above idle")


def _text(value: object, pattern: str) -> str:
    return "" if value is None else pattern.format(value)
