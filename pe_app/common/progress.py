"""How long work tells what it is doing, and how it is asked to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One report of a running task.

    Attributes:
        task: what is being done, in words a reader understands, e.g. ``encode slabs``.
        done: units finished.
        total: units in all.
        text: a detail worth showing, e.g. the last loss; may be empty.
    """

    task: str
    done: int
    total: int
    text: str = ""


ProgressCallback = Callable[[Progress], None]
"""Called between units of work. May raise ``Cancelled`` to stop the work there."""


class Cancelled(Exception):  # noqa: N818 - a request, not an error
    """Raised by a progress callback to stop the work; whatever was acknowledged before stays."""


def silent(progress: Progress) -> None:
    """The callback of those who do not watch."""
