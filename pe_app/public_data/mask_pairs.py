"""A folder of CT and mask pairs, found by a pattern: ``images/{name}.nii.gz,masks/{name}.nii.gz``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pe_app.common.errors import InputError
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_mask as read_placed_mask
from pe_app.public_data.found import FoundStudy, PublicSet, Terms

TERMS = Terms("a folder of CT and mask pairs", "its own", "its own", "")
NAME = "{name}"


def mask_pairs(pattern: str) -> PublicSet:
    """The set of a pattern: where the CT and where the mask of a name lie, separated by a comma.

    Raises:
        InputError: if the pattern is no such pair.
    """
    parts = [part.strip() for part in pattern.split(",")]
    if len(parts) != 2 or any(part.count(NAME) != 1 for part in parts):
        raise InputError(f"--pattern {pattern!r}: expected two paths with {NAME}, images/{NAME}.nrrd,masks/{NAME}.nrrd")
    return PublicSet("masks", TERMS, partial(_find, ct=parts[0], mask=parts[1]), read_mask)


def _find(download: Path, ct: str, mask: str) -> Sequence[FoundStudy]:
    expression = re.compile(re.escape(ct).replace(re.escape(NAME), "(.+)"))
    found = []
    for path in sorted(download.glob(ct.replace(NAME, "*"))):
        match = expression.fullmatch(path.relative_to(download).as_posix())
        if match is None:
            continue
        name = match[1].replace("/", "-")
        own = download / mask.replace(NAME, match[1])
        if own != path:
            found.append(FoundStudy(name, path, "", own if own.is_file() else None))
    if not found:
        raise InputError(f"{download}: no file is like {ct}; correct --pattern")
    return [one for one in found if one.ct not in {other.mask for other in found}]


def read_mask(path: Path, volume: Volume) -> NDArray[np.generic]:
    """The mask on the CT's grid."""
    return read_placed_mask(path, volume).voxels
