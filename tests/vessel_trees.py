"""A made-up patient's vessel masks: an artery that branches, a vein beside it, two lungs."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

SPACING_MM = (1.25, 0.7, 0.7)


def branching_masks() -> tuple[np.ndarray, np.ndarray]:
    """Labels (1 artery, 2 vein) and lungs, ``(64, 140, 200)``: the trunk of 7 mm radius becomes two of 5 mm."""
    z, y, x = np.ix_(*(np.arange(n) * step for n, step in zip((64, 140, 200), SPACING_MM, strict=True)))
    trunk = (np.hypot(y - 49, x - 70) < 7) & (z < 44)
    left, right = (
        (np.hypot(np.hypot(y - 49, (x - 70) - side * (z - 40) * 1.4), 0 * z) < 5) & (z >= 38) for side in (-1, 1)
    )
    labels = np.where(trunk | left | right, 1, 0)
    labels = np.where((np.hypot(y - 70, x - 70) < 6) & (labels == 0) & (z > 0), 2, labels)
    lungs = (((y - 49) / 40) ** 2 + ((np.abs(x - 70) - 38) / 25) ** 2 < 1) & (labels == 0) & (z > -1)
    return labels.astype(np.uint8), lungs.astype(np.uint8)


def write_masks(folder: Path, name: str) -> None:
    """Both masks as the vessel annotation of CAD-PE has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for array, ending in zip(branching_masks(), (".nii.gz", "_lungmask.nii.gz"), strict=True):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(SPACING_MM[::-1])
        sitk.WriteImage(image, str(folder / f"{name}{ending}"))
