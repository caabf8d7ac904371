"""Options that several verbs share, exit codes, and the progress bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from pe_app.progress import Progress, ProgressCallback

EXIT_BAD_INPUT = 2
EXIT_REFUSED = 3

Model = Annotated[Path | None, typer.Option("--model", help="Model file; by default the starter model that ships.")]
StudyList = Annotated[Path, typer.Option("--studies", help="Study list: CSV of study, path, patient, label, ...")]


@contextmanager
def progress_bars() -> Iterator[ProgressCallback]:
    """A callback that shows one bar a task with the time left, on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Bar(*columns, console=Console(stderr=True)) as bar:

        def show(progress: Progress) -> None:
            if progress.task not in tasks:
                tasks[progress.task] = bar.add_task(progress.task, text="")
            bar.update(tasks[progress.task], completed=progress.done, total=progress.total, text=progress.text)

        yield show
