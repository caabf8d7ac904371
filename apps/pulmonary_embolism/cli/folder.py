"""The folder that is served, as the verbs on it open it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pe_app.common.errors import InputError
from pe_app.common.extras import require_extra

if TYPE_CHECKING:
    from pe_monailabel.store.models import Models
    from pe_monailabel.store.studies import StudyStore

CLIENT = "pe-app"
"""How a save of the command line is recorded."""

StudiesFolder = Annotated[Path, typer.Argument(help="The folder that is served.", show_default=False)]


def open_store(studies: Path) -> StudyStore:
    """The store of a folder, also while a server serves it.

    Raises:
        InputError: if there is no such folder.
    """
    require_extra("server")
    folder = _folder(studies)
    from pe_monailabel import compat  # noqa: F401 - before monailabel
    from pe_monailabel.store.studies import StudyStore

    return StudyStore(folder)


def open_models(studies: Path) -> Models:
    """The models of a folder, also while a server serves it.

    Raises:
        InputError: if there is no such folder.
    """
    require_extra("server")
    folder = _folder(studies)
    from pe_monailabel.store.models import Models

    return Models(folder / ".pe" / "models")


def _folder(studies: Path) -> Path:
    if not studies.is_dir():
        raise InputError(f"{studies}: there is no such folder")
    return studies.resolve()
