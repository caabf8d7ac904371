"""Optional parts of the installation: which packages each extra brings, and one line where they are missing."""

from __future__ import annotations

import re
from importlib import metadata

from pe_app.common.errors import InputError

EXTRAS = {"server": "the server for Slicer", "dicom": "results as DICOM objects", "tensorboard": "TensorBoard events"}
"""Extras of the package and what they are for."""


def missing_packages(extra: str) -> tuple[str, ...]:
    """Packages of an extra that are not installed, by the declaration of the installed package itself."""
    declared = metadata.requires("pe-app") or []
    of_extra = [line for line in declared if re.search(rf"""extra == ["']{extra}["']""", line)]
    names = [match[0] for line in of_extra if (match := re.match(r"[\w.-]+", line))]
    return tuple(name for name in names if not _installed(name))


def require_extra(extra: str) -> None:
    """Check that an extra is installed, before any work is done that would need it.

    Raises:
        InputError: naming what is missing and the command that installs it.
    """
    if gone := missing_packages(extra):
        raise InputError(
            f"{EXTRAS[extra]}: not installed here ({', '.join(gone)}): pip install 'pe-app[{extra}]', or in a checkout "
            f"pip install -e '.[{extra}]'"
        )


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True
