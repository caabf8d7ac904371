"""CAD-PE: 91 patients, NRRD images with reference standards in which every clot has a value of its own.

``images/001.nrrd`` with ``rs/0001RefStd.nrrd``; ids are 001 to 040 and like ``e0032``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pe_app.common.errors import InputError
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_mask as read_placed_mask
from pe_app.public_data.found import FoundStudy, PublicSet, Terms, folder_of, volume_files

TERMS = Terms(
    "CAD-PE challenge",
    "Gonzalez Serrano, CAD-PE, IEEE DataPort, 2019, doi 10.21227/9bw7-6823; Gonzalez et al., Computer Aided Detection "
    "for Pulmonary Embolism Challenge (CAD-PE), arXiv:2003.13440",
    "IEEE DataPort, doi 10.21227/9bw7-6823",
    "CC BY 4.0",
)

_ID = re.compile(r"([a-z]*)0*(\d+?)(?:refstd)?", re.IGNORECASE)


def find(download: Path) -> Sequence[FoundStudy]:
    """A study for each image.

    Raises:
        InputError: if the folders are not there, or two files have one id.
    """
    images, masks = _by_id(folder_of(download, "images")), _by_id(folder_of(download, "rs"))
    return [
        FoundStudy(f"cadpe-{letters}{number:03}", images[letters, number], f"cadpe-{letters}{number:03}",
                   masks.get((letters, number)))
        for letters, number in sorted(images)
    ]  # fmt: skip


def read_mask(path: Path, volume: Volume) -> NDArray[np.generic]:
    """The reference standard on the CT's grid; the number of its clot in each voxel."""
    return read_placed_mask(path, volume).voxels


def _by_id(folder: Path) -> dict[tuple[str, int], Path]:
    found: dict[tuple[str, int], Path] = {}
    for name, path in volume_files(folder).items():
        match = _ID.fullmatch(name)
        if match is None:
            continue
        key = match[1].lower(), int(match[2])
        if key in found:
            raise InputError(f"{folder}: {found[key].name} and {path.name} have one id: move one of them away")
        found[key] = path
    if not found:
        raise InputError(f"{folder}: holds no file like 001.nrrd; give the folder that the download was unpacked to")
    return found


CADPE = PublicSet("cadpe", TERMS, find, read_mask)
