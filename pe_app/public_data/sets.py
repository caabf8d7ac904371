"""The public sets by the names of the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pe_app.common.errors import InputError
from pe_app.public_data.cadpe import CADPE
from pe_app.public_data.found import PublicSet
from pe_app.public_data.fumpe import FUMPE
from pe_app.public_data.mask_pairs import mask_pairs
from pe_app.public_data.nnunet import nnunet
from pe_app.public_data.read import READ
from pe_app.public_data.rspect import RSPECT

NAMED = {data_set.name: data_set for data_set in (FUMPE, CADPE, READ, RSPECT)}
NAMES = (*NAMED, "nnunet", "masks")


def public_set(name: str, download: Path, pattern: str = "", terms: str = "") -> PublicSet:
    """A set by its name.

    Args:
        name: one of ``NAMES``.
        download: its folder; a set in nnU-Net's layout describes itself there.
        pattern: of ``masks``.
        terms: of use, of ``nnunet`` and ``masks``, which cannot know them.

    Raises:
        InputError: if the name is unknown, or an option is missing or of another set.
    """
    if name not in NAMES:
        raise InputError(f"unknown data set {name!r}; the data sets are {', '.join(NAMES)}")
    if bool(pattern) != (name == "masks"):
        raise InputError("--pattern belongs to 'masks', and 'masks' needs it: --pattern CT,MASK with {name} in both")
    if name in NAMED:
        if terms:
            raise InputError(f"--terms is for nnunet and masks; those of {name} are {NAMED[name].terms.terms!r}")
        return NAMED[name]
    data_set = nnunet(download) if name == "nnunet" else mask_pairs(pattern)
    return replace(data_set, terms=replace(data_set.terms, terms=terms)) if terms else data_set
