"""Options that several verbs share, exit codes, and the progress bars."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from pe_app.common.errors import InputError
from pe_app.common.progress import Progress, ProgressCallback, silent

if TYPE_CHECKING:
    from pe_app.model.detector import ModelCard
    from pe_app.pacs.dicomweb import Access
    from pe_app.studies import Study
    from pe_app.training.datasets import Preparation

EXIT_BAD_INPUT = 2
EXIT_REFUSED = 3
EXIT_INCOMPLETE = 4

Model = Annotated[Path | None, typer.Option("--model", help="Model file; by default the starter model that ships.")]
Out = Annotated[Path, typer.Option("--out", help="Where the trained model is published.")]
RunDir = Annotated[
    Path | None, typer.Option(help="Metrics, curves, checkpoints.", show_default="OUT without suffix + .run")
]
Synthetic = Annotated[bool, typer.Option("--synthetic", help="Record that every embolism is simulated or inserted.")]
StudyList = Annotated[Path, typer.Option("--studies", help="Study list: CSV of study, path, patient, label, ...")]


def fit_studies(path: Path) -> tuple[Study, ...]:
    """The studies of a list without those that the quality gate refused at their import, which are named.

    Raises:
        InputError: as ``read_studies``, or if none is left.
    """
    from pe_app.studies import read_studies, unfit

    studies = read_studies(path)
    left = unfit(studies)
    if left:
        names = ", ".join(f"{study.study} ({study.reasons})" if study.reasons else study.study for study in left[:10])
        more = f" and {len(left) - 10} more" if len(left) > 10 else ""
        typer.echo(f"{len(left)} of {len(studies)} studies are unfit and left out: {names}{more}", err=True)
    if left and len(left) == len(studies):
        raise InputError(f"{path}: none of its {len(studies)} studies is fit: see the reasons in the list")
    return tuple(study for study in studies if study not in left)


ArchiveUser = Annotated[
    str,
    typer.Option(
        "--user",
        envvar="PE_ARCHIVE_USER",
        help="User of the archive; the password is taken from PE_ARCHIVE_PASSWORD or --password-file.",
    ),
]
PasswordFile = Annotated[Path | None, typer.Option("--password-file", help="File whose first line is the password.")]
CaFile = Annotated[
    Path | None, typer.Option("--ca", help="Certificates to trust, where the archive's is the hospital's own.")
]

Patient = Annotated[str, typer.Option("--patient", help="Of an archive: only this Patient ID; * for any text.")]
Date = Annotated[str, typer.Option("--date", help="Of an archive: only studies of a day or days, 20260101-20260131.")]
Description = Annotated[
    str, typer.Option("--description", help="Of an archive: only series with this Series Description, *PE*.")
]


def archive_query(patient: str, date: str, description: str) -> dict[str, str]:
    """What to ask an archive for, by DICOM keyword.

    Raises:
        InputError: if the date is not a valid one.
    """
    if not re.fullmatch(r"|\d{8}|\d{8}-(\d{8})?|-\d{8}", date):
        raise InputError(f"--date {date}: expected a day, 20260101, or days, 20260101-20260131 or 20260101-")
    wanted = {"PatientID": patient, "StudyDate": date, "SeriesDescription": description}
    return {keyword: value for keyword, value in wanted.items() if value}


def archive_access(url: str, user: str, password_file: Path | None, ca: Path | None) -> Access:
    """How to reach an archive; its password never comes from the command line, which others on the machine can read.

    Raises:
        InputError: if the address is not valid, or there is a user without a password.
    """
    from pe_app.pacs.dicomweb import Access

    password = os.environ.get("PE_ARCHIVE_PASSWORD", "")
    if password_file is not None:
        try:
            password = password_file.read_text(encoding="utf-8").partition("\n")[0].rstrip("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--password-file {password_file}: it cannot be read ({error})") from error
    if user and not password:
        raise InputError(f"--user {user}: the password is missing: set PE_ARCHIVE_PASSWORD or give --password-file")
    return Access(url, user, password, ca)


Accept = Annotated[
    list[str] | None,
    typer.Option("--accept", help="Code of a refusal that becomes a warning, e.g. no_contrast; may be repeated."),
]
Refuse = Annotated[
    list[str] | None,
    typer.Option("--refuse", help="Code of a warning that becomes a refusal, e.g. lungs_cut; may be repeated."),
]
Limits = Annotated[Path | None, typer.Option("--limits", help="JSON file with other limits of the quality gate.")]


Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="Processes that prepare studies and load training data.",
        show_default="one per core; loading ahead for a GPU only",
    ),
]
CacheLimit = Annotated[
    str,
    typer.Option(
        "--cache-limit",
        help="Largest size of the folder of prepared files, 200GB "
        "or 2TB; a training that needs more is refused before it starts.",
        show_default="the size of the disk",
    ),
]


def preparation(workers: int | None, cache_limit: str) -> Preparation:
    """How missing files of a cache are made.

    Raises:
        InputError: if the limit is not a size.
    """
    from pe_app.common import distributed
    from pe_app.training.datasets import Preparation

    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])B", cache_limit, re.IGNORECASE)
    if cache_limit and not size:
        raise InputError(f"--cache-limit {cache_limit}: expected a size such as 500MB, 200GB or 2TB")
    limit = int(float(size[1]) * {"M": 1e6, "G": 1e9, "T": 1e12}[size[2].upper()]) if size else None
    return Preparation(workers or distributed.cores_per_process(), limit)


def loader_workers(workers: int | None) -> int:
    """Data loader workers of a training."""
    from pe_app.common import distributed

    return distributed.default_loader_workers() if workers is None else workers if workers > 1 else 0


def echo_once(text: str) -> None:
    """Print a line; of several processes that torchrun started only the first one does."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(text)


def echo_terms(card: ModelCard) -> None:
    """Print the terms of use of the data that a model learned from."""
    if card.terms:
        kind = " This model is for non-commercial use only." if card.non_commercial else ""
        echo_once(f"Terms of use of the data it learned from: {'; '.join(card.terms)}.{kind}")


@contextmanager
def progress_bars() -> Iterator[ProgressCallback]:
    """A callback that shows one bar per task with the time left, on standard error.

    Of several processes that torchrun started only the first one shows it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield silent
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    tasks: dict[str, TaskID] = {}
    # an hour: a unit may take minutes, and the time left is estimated from at least two of them
    with Bar(*columns, console=Console(stderr=True), speed_estimate_period=3600) as bar:

        def show(progress: Progress) -> None:
            if progress.task not in tasks:
                tasks[progress.task] = bar.add_task(progress.task, text="")
            bar.update(tasks[progress.task], completed=progress.done, total=progress.total, text=progress.text)

        yield show
