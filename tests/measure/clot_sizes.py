"""Sizes of simulated clots beside those of real ones: ``python tests/measure/clot_sizes.py VESSELS [--trees 6]``.

A table of the 5th, 25th, 50th, 75th and 95th percentile of volume, length (4 standard deviations along the long axis),
largest inscribed diameter, extent along z and clot of a patient. The real ones are 91 clots of 33 patients (FUMPE).
"""

import argparse
from pathlib import Path

import numpy as np
from scipy import ndimage

from pe_app.phantom.clots import Arteries, draw_clots
from pe_app.phantom.trees import read_tree, tree_names

REAL = {
    "volume, ml": (0.05, 0.35, 1.13, 5.3, 26.5), "length, mm": (9, 17, 31, 54, 109),
    "inscribed diameter, mm": (2.3, 4.7, 6.2, 9.4, 15.2), "extent along z, mm": (2.5, 8, 17, 39, 89),
    "clot of a patient, ml": (0.5, 3.1, 6.6, 18, 51),
}  # fmt: skip


def measured(arteries: Arteries, members: np.ndarray) -> tuple[float, float, float, float]:
    """Volume, length, inscribed diameter and extent along z of a clot."""
    voxels = arteries.voxels[members]
    places = voxels * arteries.spacing_mm
    spread = np.linalg.eigvalsh(np.cov(places.T))[-1] if len(places) > 3 else 0.0
    low = voxels.min(0) - 1
    mask = np.zeros(voxels.max(0) - low + 2, bool)
    mask[tuple((voxels - low).T)] = True
    inside = ndimage.distance_transform_edt(mask, sampling=arteries.spacing_mm).max()
    height = (np.ptp(voxels[:, 0]) + 1) * arteries.spacing_mm[0]
    return len(members) * arteries.voxel_ml, 4 * float(spread) ** 0.5, 2 * float(inside), float(height)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("vessels", type=Path)
    parser.add_argument("--trees", type=int, default=6)
    parser.add_argument("--sets", type=int, default=8)
    options = parser.parse_args()
    rng, clots, patients = np.random.default_rng(0), [], []
    names = tree_names(options.vessels)
    for name in names[:: max(1, len(names) // options.trees)][: options.trees]:
        tree = read_tree(options.vessels, name)
        arteries = Arteries.of(tree.arteries > 127, tree.spacing_mm)
        for _ in range(options.sets):
            found = [measured(arteries, clot.members) for clot in draw_clots(arteries, rng)]
            clots += found
            patients.append(sum(clot[0] for clot in found))
    columns = [*np.array(clots).T, np.array(patients)]
    print(f"{len(clots)} clots of {len(patients)} simulated patients, {options.trees} trees; real: 91 of 33 (FUMPE)")
    for (name, real), values in zip(REAL.items(), columns, strict=True):
        ours = " / ".join(f"{value:.3g}" for value in np.percentile(values, (5, 25, 50, 75, 95)))
        print(f"{name:24s} simulated {ours:40s} real {' / '.join(map(str, real))}")


if __name__ == "__main__":
    main()
