"""A benchmark with known truth, in which a network can learn the wrong thing and be found out.

Every patient has two studies, with and without emboli and alike in all else, so neither anatomy nor the height of a
slice tells them apart. In the training studies something irrelevant goes with the label: a lead on the chest, streaks
between lowered arms, dense rib lesions, or a sharp kernel. In the test studies it does not. A network that learned the
irrelevant thing does well in validation and is no better than chance in the test.
"""

from __future__ import annotations

import csv
import io
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pe_app.annotation.sparse import SparseAnnotation, slice_schedule
from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_app.common.progress import ProgressCallback, silent
from pe_app.ct.lungs import lung_range
from pe_app.ct.volume import PADDING_HU, Volume
from pe_app.ct.volume_io import write_volume
from pe_app.phantom.anatomy import Patient
from pe_app.phantom.emboli import BurdenName
from pe_app.phantom.scan import Phantom, PhantomConfig, make_phantom
from pe_app.phantom.studies import READ_AT, READER, made_in
from pe_app.studies import Label, Split, Study, write_studies

Nuisance = Literal["lead", "arms", "rib", "kernel"]
"""A lead on the chest, streaks between lowered arms, dense rib lesions, a sharp kernel."""

OWN_NOISE_HU = 6.0
"""Noise that a study does not share with its twin."""

TINY_MM3 = 500.0
"""The largest tiny embolus, a ball of 10 mm; or 8 voxels where those are more."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """What the benchmark consists of.

    Attributes:
        patients: each with one positive and one negative study.
        test_share: of the patients; of the others a fifth is for validation.
        annotated_share: of the patients not in the test whose studies a reader reviewed, both of them; the paper's was
            0.2 (section 3.1), which leaves too little of so few.
        review_every_mm: distance of reviewed slices; 10 in the paper, for the same reason less here.
        confounding: share of training and validation studies in which the irrelevant thing agrees with the label;
            0.5 in the test.
        burden: of the positive studies, but for the tiny ones.
        tiny_share: share of positive studies that show a single embolus, the smallest of a patient with emboli of every
            size and no larger than ``TINY_MM3``.
        matrix: rows and columns.
        spacing_mm: slice spacing; drawn as hospitals do where None.
    """

    patients: int = 150
    test_share: float = 0.4
    annotated_share: float = 0.5
    review_every_mm: float = 5.0
    confounding: float = 0.85
    burden: BurdenName = "large"
    tiny_share: float = 0.3
    matrix: int = 256
    spacing_mm: float | None = 2.5

    def __post_init__(self) -> None:
        shares = (self.test_share, self.annotated_share, self.confounding, self.tiny_share)
        if self.patients < 10 or not all(0 <= share <= 1 for share in shares):
            raise InputError(f"a benchmark needs at least 10 patients and shares from 0 to 1, got {self}")

    def split(self, patient: int) -> Split:
        """What a patient is for: the last ones for the test."""
        rest = self.patients - round(self.test_share * self.patients)
        if patient >= rest:
            return "test"
        return "validation" if patient >= rest - round(0.2 * rest) else "train"


@dataclass(frozen=True)
class Truth:
    """What is known of one study; a line of ``truth.csv``.

    Attributes:
        study: its id.
        nuisance: the irrelevant thing that it shows, or "".
        emboli: how many.
        smallest_mm3, largest_mm3: of them; 0 without emboli.
        tiny: whether only the smallest embolus was kept.
    """

    study: str
    nuisance: Nuisance | Literal[""]
    emboli: int
    smallest_mm3: float
    largest_mm3: float
    tiny: bool


def write_benchmark(
    out: Path,
    config: BenchmarkConfig | None = None,
    seed: int = 0,
    progress: ProgressCallback = silent,
    workers: int = 1,
) -> Path:
    """Write the benchmark and return its study list, splits filled.

    ``out`` gets studies.csv, truth.csv, volumes/ID.nrrd, masks/ID.nrrd and annotations/, as ``write_phantom_studies``
    writes them. The same seed gives the same files however many processes work; an interrupted call goes on.
    """
    config = config or BenchmarkConfig()
    for folder in ("volumes", "masks", "annotations", "truth"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    made = made_in(workers, partial(_write_twins, out, seed, config), config.patients, "simulate pairs", progress)
    studies = [study for number in range(config.patients) for study in made[number]]
    rows = [(out / "truth" / f"{study.study}.csv").read_text() for study in studies]
    header = ",".join(field.name for field in fields(Truth)) + "\n"
    write_durably(out / "truth.csv", header + "".join(rows))
    path = out / "studies.csv"
    write_studies(studies, path)
    return path


def read_truth_table(path: Path) -> dict[str, Truth]:
    """``truth.csv`` by study; empty where there is none."""
    if not path.is_file():
        return {}
    rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
    return {
        row["study"]: Truth(
            row["study"],
            row["nuisance"],  # type: ignore[arg-type]
            int(row["emboli"]),
            float(row["smallest_mm3"]),
            float(row["largest_mm3"]),
            row["tiny"] == "True",
        )
        for row in rows
    }


def add_nuisance(volume: Volume, kind: Nuisance, rng: np.random.Generator) -> Volume:
    """The CT with something in it that has nothing to do with emboli."""
    hu = volume.voxels.astype(np.float32)
    outside = volume.voxels == PADDING_HU
    match kind:
        case "lead":
            _add_leads(hu, volume, rng)
        case "arms":
            white = rng.standard_normal(hu.shape, dtype=np.float32)
            bars = ndimage.uniform_filter1d(white, max(hu.shape[2] // 6, 3), axis=2)
            hu += bars * (rng.uniform(16, 26) / bars.std()) * (hu > -950)
        case "rib":
            _add_rib_lesions(hu, volume, rng)
        case "kernel":
            hu += rng.uniform(0.6, 0.9) * (hu - ndimage.gaussian_filter(hu, (0, 1, 1)))
            white = rng.standard_normal(hu.shape, dtype=np.float32)
            fine = white - ndimage.gaussian_filter(white, (0, 1, 1))
            hu += fine * (rng.uniform(18, 28) / fine.std()) * (hu > -950)
    hu[outside] = PADDING_HU
    return volume.with_voxels(np.clip(np.rint(hu), PADDING_HU, 3071).astype(np.int16))


def _write_twins(out: Path, seed: int, config: BenchmarkConfig, number: int) -> tuple[Study, Study]:
    """Both studies of a patient, positive first; the negative one's volume is the last file written."""
    rng = np.random.default_rng((seed, number, 0))
    annotated = rng.random() < config.annotated_share and config.split(number) != "test"
    tiny = rng.random() < config.tiny_share
    patient = f"patient_{seed}_{number:04d}"
    studies = []
    for label in ("positive", "negative"):
        name = f"twin_{seed}_{number:04d}_{label[0]}"
        annotation = out / "annotations" / f"{name}.json" if annotated else None
        path = out / "volumes" / f"{name}.nrrd"
        studies.append(Study(name, path, patient, _LABELS[label], annotation, config.split(number)))
    if studies[1].path.exists():
        return studies[0], studies[1]

    with_emboli, without = _twins(seed, number, config, tiny)
    for study, phantom in zip(studies, (with_emboli, without), strict=True):
        positive = study.label == "positive"
        agrees = rng.random() < (0.5 if study.split == "test" else config.confounding)
        nuisance: Nuisance | Literal[""] = str(rng.choice(get_args(Nuisance))) if agrees == positive else ""  # type: ignore[assignment]
        voxels = phantom.volume.voxels.astype(np.float64) + rng.normal(0, OWN_NOISE_HU, phantom.volume.shape)
        voxels[phantom.volume.voxels == PADDING_HU] = PADDING_HU
        volume = phantom.volume.with_voxels(np.clip(np.rint(voxels), PADDING_HU, 3071).astype(np.int16))
        if nuisance:
            volume = add_nuisance(volume, nuisance, rng)
        if positive:
            write_volume(phantom.emboli_mask, out / "masks" / f"{study.study}.nrrd")
        if study.annotation:
            schedule = slice_schedule(volume, config.review_every_mm)
            SparseAnnotation.from_mask(volume, phantom.emboli_mask, schedule, READER, READ_AT).write(
                study.annotation, volume
            )
        sizes = [embolus.volume_mm3 for embolus in phantom.emboli] or [0.0]
        row = Truth(study.study, nuisance, len(phantom.emboli), round(min(sizes)), round(max(sizes)), positive and tiny)
        write_durably(out / "truth" / f"{study.study}.csv", ",".join(map(str, astuple(row))) + "\n")
        write_volume(volume, study.path)
    return studies[0], studies[1]


_LABELS: dict[str, Label] = {"positive": "positive", "negative": "negative"}


def _twins(seed: int, number: int, config: BenchmarkConfig, tiny: bool) -> tuple[Phantom, Phantom]:
    """The same patient, scan and noise with and without emboli."""
    patient = Patient.draw(np.random.default_rng((seed, number, 1)))
    phantom = PhantomConfig(config.matrix, config.spacing_mm, "mixed" if tiny else config.burden)
    attempt = 2
    while True:
        with_emboli = make_phantom(np.random.default_rng((seed, number, attempt)), phantom, True, patient)
        sizes = [embolus.volume_mm3 for embolus in with_emboli.emboli]
        largest_tiny = max(TINY_MM3, 8 * float(np.prod(with_emboli.volume.spacing_mm)))
        if sizes and (not tiny or min(sizes) <= largest_tiny):
            break
        attempt += 1  # all clots too small for these voxels, or none tiny
    without = make_phantom(np.random.default_rng((seed, number, attempt)), phantom, False, patient)
    return (_smallest_only(with_emboli, without) if tiny else with_emboli), without


def _smallest_only(with_emboli: Phantom, without: Phantom) -> Phantom:
    """The study with its smallest embolus and none of the others, which its twin's voxels replace."""
    sizes = [embolus.volume_mm3 for embolus in with_emboli.emboli]
    kept = int(np.argmin(sizes))
    numbers = with_emboli.emboli_mask.voxels
    mine = numbers == kept + 1
    near = ndimage.binary_dilation(mine, iterations=2) & ((numbers == 0) | mine)
    voxels = np.where(near, with_emboli.volume.voxels, without.volume.voxels)
    return Phantom(
        with_emboli.volume.with_voxels(voxels),
        with_emboli.emboli_mask.with_voxels(mine.astype(np.uint8)),
        (with_emboli.emboli[kept],),
        with_emboli.arteries,
    )


def _add_leads(hu: NDArray[np.float32], volume: Volume, rng: np.random.Generator) -> None:
    """Two wires on the skin in front, from the neck to the belly."""
    spacing, step, _ = volume.spacing_mm
    rows, columns = np.ogrid[: hu.shape[1], : hu.shape[2]]
    middle = hu.shape[2] / 2
    for side in (-1, 1):
        x_mm = side * rng.uniform(8, 40)
        swing_mm, length_mm, phase = rng.uniform(3, 12), rng.uniform(80, 200), rng.uniform(0, 6.3)
        for index in range(len(hu)):
            at = x_mm + swing_mm * np.sin(2 * np.pi * index * spacing / length_mm + phase)
            column = int(np.clip(round(middle + at / step), 0, hu.shape[2] - 1))
            tissue = np.flatnonzero(hu[index, :, column] > -300)
            if len(tissue):
                away = np.hypot(rows - (tissue[0] - 1.5 / step), columns - (middle + at / step)) * step
                wire = np.clip(1.5 - away / 1.6, 0, 1)
                hu[index] += wire * (2500 - hu[index])


def _add_rib_lesions(hu: NDArray[np.float32], volume: Volume, rng: np.random.Generator) -> None:
    """Dense balls in the ribs, 12 to 20 mm across, at the heights of the lung."""
    lung = lung_range(volume)
    z, y, x = (np.arange(size) * step for size, step in zip(hu.shape, volume.spacing_mm, strict=True))
    for _ in range(int(rng.integers(8, 14))):
        index = int(rng.integers(lung.first, lung.last + 1))
        body = ndimage.binary_fill_holes(ndimage.binary_opening(hu[index] > -300))
        depth = ndimage.distance_transform_edt(body, volume.spacing_mm[1:])
        bone = np.argwhere((hu[index] > 400) & (depth > 8) & (depth < 45))
        if not len(bone):
            continue
        row, column = bone[int(rng.integers(len(bone)))]
        away = np.sqrt(
            (z - z[index])[:, None, None] ** 2 + (y - y[row])[None, :, None] ** 2 + (x - x[column])[None, None] ** 2
        )
        lesion = np.clip((rng.uniform(6, 10) - away) / volume.spacing_mm[1] + 0.5, 0, 1)
        np.maximum(hu, hu + lesion * (1100 - hu), out=hu)
