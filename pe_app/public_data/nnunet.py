"""Any data set in nnU-Net's layout: ``imagesTr/NAME_0000.nii.gz``, ``labelsTr/NAME.nii.gz``, ``dataset.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pe_app.common.errors import InputError
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_mask as read_placed_mask
from pe_app.public_data.found import FoundStudy, PublicSet, Terms, volume_files
from pe_app.studies import LONGEST_WORD, Split

CHANNEL = "_0000"


def nnunet(download: Path) -> PublicSet:
    """The set that a folder's ``dataset.json`` describes, with the licence that it states.

    Raises:
        InputError: if there is no such file.
    """
    described = _description(download)
    name = str(described.get("name") or download.name)
    licence = str(described.get("licence") or described.get("license") or "")[:LONGEST_WORD]
    reference = str(described.get("reference") or "its own")
    terms = Terms(name, reference, reference, licence if licence.isprintable() else "")
    return PublicSet(_word(name), terms, find, read_mask)


def find(download: Path) -> Sequence[FoundStudy]:
    """A study for each image of one channel, ``imagesTs`` as the set's own test split.

    Raises:
        InputError: if it is not nnU-Net's layout, or the images have several channels.
    """
    described = _description(download)
    channels = described.get("channel_names") or described.get("modality") or {"0": "CT"}
    if not isinstance(channels, dict) or len(channels) != 1:
        raise InputError(f"{download / 'dataset.json'}: a CT has one channel, this set has {str(channels)[:60]}")
    name = _word(str(described.get("name") or download.name))
    found = []
    parts: tuple[tuple[str, str, Split], ...] = (("imagesTr", "labelsTr", ""), ("imagesTs", "labelsTs", "test"))
    for images, labels, split in parts:
        if not (download / images).is_dir():
            continue
        masks = volume_files(download / labels) if (download / labels).is_dir() else {}
        for stem, path in volume_files(download / images).items():
            if not stem.endswith(CHANNEL):
                raise InputError(f"{path}: images of nnU-Net end in {CHANNEL}; is this its raw layout?")
            one = stem.removesuffix(CHANNEL)
            found.append(FoundStudy(f"{name}-{one}", path, f"{name}-{one}", masks.get(one), split=split))
    if not found:
        raise InputError(f"{download}: holds no images in imagesTr; give the folder that dataset.json lies in")
    return found


def read_mask(path: Path, volume: Volume) -> NDArray[np.generic]:
    """The labels of embolism: the label named so, or all but the background.

    Raises:
        InputError: if the mask lies on another grid.
    """
    mask = read_placed_mask(path, volume).voxels
    labels = _description(path.parent.parent).get("labels")
    named = labels.items() if isinstance(labels, dict) else ()
    emboli = [value for name, value in named if "embol" in str(name).lower() and isinstance(value, int)]
    return np.where(np.isin(mask, emboli), mask, 0) if emboli else mask


def _description(folder: Path) -> dict[str, object]:
    path = folder / "dataset.json"
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: is not there; give the folder of a data set in nnU-Net's raw layout") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: copy it again") from error
    if not isinstance(payload, dict):
        raise InputError(f"{path}: must be a JSON object")
    return payload


def _word(name: str) -> str:
    """A name as studies and files can be called."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:60] or "nnunet"
