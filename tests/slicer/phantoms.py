"""Small chests for the Slicer tests, written by pynrrd and nibabel, which the module under test does not use."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np

SHAPE = (48, 128, 128)
SPACING = (5.0, 2.6, 2.6)
CLOT_SLICE = 26


@functools.cache
def chest(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HU (slice, row, column), mask of the clot, and (slice, row, column) -> LPS mm."""
    rng = np.random.default_rng(seed)
    z, y, x = (((np.arange(n) - (n - 1) / 2) * s) for n, s in zip(SHAPE, SPACING, strict=True))
    z, y, x = z[:, None, None], y[None, :, None], x[None, None, :]
    hu = np.full(SHAPE, -1000.0)
    body = (x / 155) ** 2 + (y / 105) ** 2 < 1
    hu[np.broadcast_to(body, SHAPE)] = 45
    hu[np.broadcast_to(body & ((x / 148) ** 2 + (y / 98) ** 2 > 1), SHAPE)] = -95
    for side in (-1, 1):
        hu[((x - side * 72) / 55) ** 2 + (y / 78) ** 2 + (z / 112) ** 2 < 1] = -860
    hu[((x - 15) / 45) ** 2 + ((y + 25) / 42) ** 2 + ((z + 55) / 45) ** 2 < 1] = 290
    hu[np.broadcast_to((x / 17) ** 2 + ((y - 68) / 17) ** 2 < 1, SHAPE)] = 180
    hu[np.broadcast_to((np.hypot(x - 14, y - 40) < 12), SHAPE)] = 320
    hu[np.broadcast_to((np.hypot(x, y + 18) < 15), SHAPE) & (z > -40)] = 360
    for side in (-1, 1):
        reach = (side * x > 0) & (side * x < 92)
        hu[(np.hypot(y + 14, z - 12 - 0.12 * np.abs(x)) < 11) & reach] = 380
        hu[(np.hypot(x - side * 66 - 0 * z, y + 12 + 0.25 * z) < 7) & (z < 18) & (z > -80)] = 380
        for angle in np.linspace(-1.2, 1.2, 7):
            along = (np.abs(x) - 60) * np.cos(angle) + (y + 10) * np.sin(angle)
            off = np.hypot(-(np.abs(x) - 60) * np.sin(angle) + (y + 10) * np.cos(angle), z - 20 * angle)
            hu[(off < 4.2 - along * 0.03) & (along > 0) & (along < 60) & (side * x > 0)] = 360
    clot = (np.hypot(y + 15, z - 14) < 6.5) & (x > 26) & (x < 70)
    hu[clot] = 55
    hu += rng.normal(0, 15, SHAPE)
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = *SPACING, 1
    affine[:3, 3] = [-(n - 1) / 2 * s for n, s in zip(SHAPE[::-1], SPACING[::-1], strict=True)]
    affine[2, 3] -= 180
    return np.round(hu).astype(np.int16), clot, affine


@functools.cache
def chest_files(seed: int) -> tuple[bytes, bytes]:
    """The CT and the attention volume of a chest, as NRRD files."""
    hu, clot, affine = chest(seed)
    return nrrd_bytes(hu, affine), nrrd_bytes(*attention(clot, affine))


def nrrd_bytes(voxels: np.ndarray, affine: np.ndarray) -> bytes:
    """The array as a gzip NRRD in LPS, by pynrrd."""
    header = {
        "space": "left-posterior-superior",
        "space directions": affine[:3, [2, 1, 0]].T,
        "space origin": affine[:3, 3],
        "encoding": "gzip",
    }
    out = io.BytesIO()
    nrrd.write(out, voxels, header, index_order="C")
    return out.getvalue()


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    """The array as NIfTI, by nibabel: RAS, fastest axis first."""
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine[:, [2, 1, 0, 3]]
    nib.save(nib.Nifti1Image(voxels.transpose(), ras), path)
    return path


def attention(clot: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A coarse uint8 map that glows on the clot, and its affine: cells cover whole voxels."""
    cells = (24, 16, 16)
    block = tuple(n // c for n, c in zip(clot.shape, cells, strict=True))
    shape = tuple(v for pair in zip(cells, block, strict=True) for v in pair)
    share = clot.astype(float).reshape(shape).mean((1, 3, 5))
    glow = share / share.max()
    for axis in range(3):
        glow = np.maximum(glow, 0.45 * np.maximum(np.roll(glow, 1, axis), np.roll(glow, -1, axis)))
    step = np.diag([*block, 1.0])
    step[:3, 3] = [(b - 1) / 2 for b in block]
    return np.round(255 * glow / glow.max()).astype(np.uint8), affine @ step


def detection(clot: np.ndarray, affine: np.ndarray) -> dict:
    """What a model could say of that chest, schema pe-detection/1. Made up: no model spoke."""
    z = affine[2, 0] * np.arange(SHAPE[0]) + affine[2, 3]
    slabs = np.linspace(3, SHAPE[0] - 4, 40)
    probability = (
        0.05 + 0.88 * np.exp(-(((slabs - CLOT_SLICE) / 3.5) ** 2)) + 0.22 * np.exp(-(((slabs - 12) / 2.5) ** 2))
    )
    kji = np.argwhere(clot).mean(0)
    centre = affine[:3, :3] @ kji + affine[:3, 3]
    candidates = [
        {"rank": 1, "slice_index": CLOT_SLICE, "z_mm": z[CLOT_SLICE], "centre_lps_mm": centre.tolist(),
         "extent_mm": [48.0, 26.0, 20.0], "peak": 0.93, "slab_probability": 0.93},
        {"rank": 2, "slice_index": 12, "z_mm": z[12], "centre_lps_mm": [-60.0, 5.0, float(z[12])],
         "extent_mm": [24.0, 24.0, 10.0], "peak": 0.41, "slab_probability": 0.27},
    ]  # fmt: skip
    return {
        "schema": "pe-detection/1", "status": "analysed", "probability": 0.91, "threshold": 0.62, "positive": True,
        "reasons": [{"code": "demo_model", "message": "trained on phantoms only, has never seen a real embolism"}],
        "evidence": [{"slab": i, "z_mm": float(np.interp(s, range(SHAPE[0]), z)), "slice_index": round(float(s)),
                      "probability": float(p)} for i, (s, p) in enumerate(zip(slabs, probability, strict=True))],
        "candidates": candidates,
    }  # fmt: skip


def add_chest(server, study: str, folder: Path, seed: int = 0, step: int = 4, **row) -> None:
    """A chest on a fake server, with its schedule and what a detection would say."""
    _hu, clot, affine = chest(seed)
    ct, coarse = chest_files(seed)
    path = folder / f"{study}.nrrd"
    path.write_bytes(ct)
    z = affine[2, 0] * np.arange(SHAPE[0]) + affine[2, 3]
    schedule = [(k, float(z[k]), "schedule") for k in range(4, SHAPE[0] - 3, step)]
    if CLOT_SLICE not in [k for k, *_ in schedule]:
        schedule = sorted([*schedule, (CLOT_SLICE, float(z[CLOT_SLICE]), "suspicious")])
    server.add_study(study, path, SHAPE, SPACING, schedule, coarse, detection(clot, affine), **row)
