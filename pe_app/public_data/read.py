"""READ: 40 patients, DICOM of two makers with NIfTI masks whose headers cannot be trusted.

``images/GE (DICOM files)/01GE``, ``images/TOSHIBA (DICOM files)/01TS`` and ``rs/01GE.nii.gz``. Arrays correspond index
by index, but the headers disagree on the direction of the slices, and the spacing of DICOM is the more precise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pe_app.common.errors import InputError
from pe_app.ct.volume import Volume
from pe_app.public_data.found import FoundStudy, PublicSet, Terms, folder_of, read_array, volume_files
from pe_app.public_data.stored_order import from_stored

TERMS = Terms(
    "READ: pulmonary embolism CTPA of two makers",
    "de Andrade et al., Pulmonary embolism segmentation dataset READ, 2023",
    "as its paper states",
    "CC0",
)


def find(download: Path) -> Sequence[FoundStudy]:
    """A study for each folder of images.

    Raises:
        InputError: if the folders are not there.
    """
    images, masks = folder_of(download, "images"), volume_files(folder_of(download, "rs"))
    folders = [
        study
        for maker in sorted(images.iterdir())
        if maker.is_dir() and "dicom" in maker.name.lower()
        for study in sorted(maker.iterdir())
        if study.is_dir()
    ]
    if not folders:
        raise InputError(f"{images}: holds no folder like 'GE (DICOM files)'; unpack the images, too")
    return [FoundStudy(f"read-{one.name}", one, f"read-{one.name}", masks.get(one.name)) for one in folders]


def read_mask(path: Path, volume: Volume) -> NDArray[np.generic]:
    """The mask, index by index: its slices rise with the positions of DICOM, whatever its header states.

    Raises:
        InputError: if it cannot be read or its size is not the series'.
    """
    return from_stored(read_array(path), volume, path.name)


READ = PublicSet("read", TERMS, find, read_mask)
