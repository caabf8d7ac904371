"""Studies of 64 x 64 pixels that train in seconds: an ellipse of tissue, two lungs, and bright blobs for emboli."""

from pathlib import Path

import numpy as np

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.ct.slabs import SlabConfig
from pe_app.ct.volume import Volume, axial_affine
from pe_app.ct.volume_io import write_volume
from pe_app.model.slab_encoder import EncoderConfig
from pe_app.model.study_classifier import ClassifierConfig
from pe_app.studies import Study

SLABS = SlabConfig(matrix=64, crop=64, slab_count=6)
ENCODER = EncoderConfig(width=8)
CLASSIFIER = ClassifierConfig(feature_channels=64, grid=4, filters=4)
SLICES = 32
LUNG = range(4, SLICES - 4)
"""Slices with lung."""


def small_chest(seed: int, emboli: int) -> tuple[Volume, Volume]:
    """A CT and the mask of its emboli: balls of 400 HU in the lung, 2.5 x 5 x 5 mm voxels."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(np.arange(SLICES), np.arange(64), np.arange(64), indexing="ij")
    hu = np.full(z.shape, -1000.0)
    hu[((y - 32) / 26) ** 2 + ((x - 32) / 30) ** 2 < 1] = 40
    sides = [((y - 32) / 18) ** 2 + ((x - centre) / 11) ** 2 < 1 for centre in (18, 46)]
    hu[(sides[0] | sides[1]) & (z >= LUNG.start) & (z < LUNG.stop)] = -820
    mask = np.zeros(z.shape, np.uint8)
    for _ in range(emboli):
        column = rng.integers(12, 24) + rng.choice((0, 28))
        centre = rng.integers(8, SLICES - 8), rng.integers(22, 42), column
        ball = ((z - centre[0]) / 5) ** 2 + ((y - centre[1]) / 3) ** 2 + ((x - centre[2]) / 3) ** 2 < 1
        mask[ball], hu[ball] = 1, 400
    hu += rng.normal(0, 20, hu.shape)
    volume = Volume(np.rint(hu).clip(-1024, 3000).astype(np.int16), axial_affine((2.5, 5.0, 5.0)), f"chest {seed}")
    return volume, volume.with_voxels(mask)


def small_studies(folder: Path, count: int = 10, every: int = 3) -> tuple[Study, ...]:
    """Every other study has emboli and is annotated on every third slice; the others are label-only negatives."""
    folder.mkdir(parents=True, exist_ok=True)
    studies = []
    for number in range(count):
        positive = number % 2 == 0
        volume, mask = small_chest(number, emboli=3 if positive else 0)
        path, annotation = folder / f"{number}.nrrd", folder / f"{number}.json" if positive else None
        write_volume(volume, path)
        if annotation:
            SparseAnnotation.from_mask(volume, mask, range(LUNG.start, LUNG.stop, every), "reader").write(
                annotation, volume
            )
        label = "positive" if positive else "negative"
        studies.append(Study(f"study{number}", path, f"patient{number}", label, annotation))
    return tuple(studies)
