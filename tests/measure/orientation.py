"""How surely a misplaced mask of emboli is noticed: ``python tests/measure/orientation.py [STUDIES [MATRIX]]``.

Simulated studies with emboli of every size; their masks as they are, flipped along each axis, and shifted by 25 mm.
"""

import sys

import numpy as np

from pe_app.common.errors import InputError
from pe_app.phantom.scan import PhantomConfig, make_phantom
from pe_app.public_data.proof import check_fit, fit_of


def main(studies: int, matrix: int) -> None:
    """Print the figures of every study, and how many were refused."""
    refused = {"as it is": 0, "head and feet": 0, "front and back": 0, "left and right": 0, "shifted 25 mm": 0}
    for seed in range(studies):
        phantom = make_phantom(np.random.default_rng(seed), PhantomConfig(matrix, 2.5), positive=True)
        volume, mask = phantom.volume, phantom.emboli_mask.voxels
        pixels = round(25 / volume.spacing_mm[2])
        placed = [mask, *(np.flip(mask, axis) for axis in range(3)), np.roll(mask, pixels, 2)]
        for how, moved in zip(refused, placed, strict=True):
            fit = fit_of(moved, volume)
            try:
                check_fit(fit, how)
            except InputError:
                refused[how] += 1
            print(f"{seed:3} {how:15} {fit}", flush=True)
    for how, count in refused.items():
        print(f"{how}: refused in {count} of {studies} studies")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, int(sys.argv[2]) if len(sys.argv) > 2 else 256)
