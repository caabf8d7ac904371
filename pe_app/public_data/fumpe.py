"""FUMPE: 35 patients, DICOM with MATLAB masks of all clots.

``CT_scans/PATnnn/*.dcm`` and ``GroundTruth/PATnnn.mat`` (MATLAB v5, ``Mask``, rows x columns x slices). The mask's
slices follow the names of the DICOM files; their positions may run the other way. Two patients have no embolism.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from pe_app.common.errors import InputError
from pe_app.ct.volume import Volume
from pe_app.public_data.found import FoundStudy, PublicSet, Terms, folder_of, natural
from pe_app.public_data.stored_order import from_stored

TERMS = Terms(
    "FUMPE: Ferdowsi University of Mashhad's PE dataset",
    "Masoudi et al., A new dataset of computed-tomography angiography images for computer-aided detection of pulmonary "
    "embolism, Scientific Data 5:180180, 2018, doi 10.1038/sdata.2018.180",
    "figshare, doi 10.6084/m9.figshare.c.4107803",
    "CC BY 4.0",
)


def find(download: Path) -> Sequence[FoundStudy]:
    """A study for each folder of images; one without a mask file is label-less.

    Raises:
        InputError: if the folders are not there.
    """
    images, masks = folder_of(download, "CT_scans"), folder_of(download, "GroundTruth")
    found = []
    for folder in sorted(entry for entry in images.iterdir() if entry.is_dir()):
        mask = masks / f"{folder.name}.mat"
        study = f"fumpe-{folder.name}"
        found.append(FoundStudy(study, folder, study, mask if mask.is_file() else None))
    return found


def read_mask(path: Path, volume: Volume) -> NDArray[np.generic]:
    """The mask, its slices put from the order of file names into that of positions.

    Raises:
        InputError: if it is damaged, holds no ``Mask``, or its size is not the series'.
    """
    from scipy.io import loadmat

    try:
        content = loadmat(path)
    except Exception as error:  # scipy raises nearly anything on damaged bytes
        raise InputError(f"{path.name}: cannot be read as a MATLAB file: copy it again") from error
    if "Mask" not in content or np.ndim(content["Mask"]) != 3:
        raise InputError(f"{path.name}: holds no three-dimensional 'Mask'; is it FUMPE's ground truth?")
    if volume.source is None:
        raise TypeError(f"{volume.name} was not read from DICOM")
    by_name = np.moveaxis(np.asarray(content["Mask"]), 2, 0)  # MATLAB's third axis is the slice
    names = [PurePosixPath(instance.file).name for instance in volume.source.instances]
    if len(by_name) != len(names):
        raise InputError(f"{path.name}: has {len(by_name)} slices, but the series {len(names)}: a file is missing")
    place = {name: number for number, name in enumerate(sorted(names, key=natural))}
    return from_stored(by_name[[place[name] for name in names]], volume, path.name)


FUMPE = PublicSet("fumpe", TERMS, find, read_mask)
