"""The recipe of the model that ships, in three steps that each resume: ingredients, learning, publishing.

The model has never seen a real embolism, and its card says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

import pe_app
from pe_app.common.errors import InputError
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.ct.volume_io import image_from_volume, read_volume
from pe_app.model.detector import STARTER_MODEL, Detector, ModelCard, TrainingRecord
from pe_app.model.winograd import choose
from pe_app.phantom.trees import tree_names
from pe_app.research.starter.figures import figures
from pe_app.research.starter.ingredients import bright_vessels, on_grid, write_drawn, write_real
from pe_app.research.starter.lesson import LessonSettings, find_patients, flat_settings, learn
from pe_app.research.starter.publish import calibrated, prepared_pairs, seen_pairs, study_probability
from pe_app.research.starter.windows import SLICES, Patient, WindowSettings, WindowSource

KINDS = ("drawn", "real")
SETS = ("real_0", "real_1", "real_2", "small_0")
"""Sets of clots of each patient that calibrate or measure."""

POOL = 10
"""Batches to validate on, of each kind."""


def make_ingredients(
    data: Path,
    vessels: Path | None,
    enhanced: Sequence[Path],
    slices: Path | None,
    plain: Path | None,
    progress: ProgressCallback = silent,
) -> None:
    """What windows are cut from, on a grid of 2.5 x 0.7 x 0.7 mm: a folder of ``data`` for each patient.

    A patient takes a minute; one that is complete is left as it is.

    Args:
        data: gets the folders.
        vessels: folder of vessel trees, ``NAME.nii.gz`` with ``NAME_lungmask.nii.gz``.
        enhanced: enhanced chest CT.
        slices: folder of single enhanced slices.
        plain: folder of single slices without contrast.
        progress: shows which patient is being prepared.
    """
    work: list[tuple[str, str, Path]] = [("drawn", name, vessels) for name in tree_names(vessels)] if vessels else []
    work += [("real", path.name.partition(".")[0].replace("_", "-"), path) for path in enhanced]
    for kind, folder in (("slice", slices), ("plain", plain)):
        files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder else ()
        work += [(kind, path.stem.replace("_", "-"), path) for path in files]
    for index, (kind, name, path) in enumerate(work):
        progress(Progress("ingredients", index, len(work), name))
        if _complete(data / ("drawn" if kind == "drawn" else "real") / name):
            continue
        if kind == "drawn":
            write_drawn(path, name, data / "drawn")
        elif kind == "real":
            hu = on_grid(image_from_volume(read_volume(path)))
            write_real(name, hu, bright_vessels(hu), data / "real")
        else:
            _write_flat(name, path, kind == "slice", data / "real")
    progress(Progress("ingredients", len(work), len(work), ""))


def learn_starter(
    data: Path, run: Path, held_out: Sequence[str], start: Path = STARTER_MODEL, settings: LessonSettings | None = None,
    hours: float = 1000.0,
) -> None:  # fmt: skip
    """Stage I, cell by cell; the same call resumes.

    Args:
        data: of ``make_ingredients``.
        run: gets checkpoint, running mean of the weights and log.
        held_out: patients that are left out and validate.
        start: model whose stage I to begin with.
        settings: of the lesson.
        hours: stop with a checkpoint after so long.
    """
    torch.set_num_threads(1)
    settings = settings or LessonSettings()
    pools = {}
    for kind in KINDS:
        apart = [data / kind / name for name in held_out if _complete(data / kind / name)]
        if apart:
            windows = replace(WindowSettings(), varied=kind == "drawn", scale=(1.0, 1.0))
            source = WindowSource([Patient(path) for path in apart], settings.seed, windows)
            pools[kind] = [source.batch() for _ in range(POOL)]
    weights = Detector.load(start).encoder.cpu().state_dict()
    folders = [data / kind for kind in KINDS]
    learn(run, folders, list(held_out), weights, settings, pools, time.time() + 3600 * hours)


def publish_starter(
    data: Path, run: Path, out: Path, calibrate: Sequence[str], test: Sequence[str], start: Path = STARTER_MODEL,
    progress: ProgressCallback = silent,
) -> dict[str, tuple[float, float, float]]:  # fmt: skip
    """Calibrate on held-out patients, measure on others, and write the model in half precision.

    Returns:
        Every figure with its interval, as it stands in the model's card.

    Raises:
        InputError: if a patient has no ingredients.
    """
    former = Detector.load(start).card.encoder
    weights = torch.load(run / "mean.pt", weights_only=True)
    files = {
        side: prepared_pairs(data / "studies", [_patient(data, name) for name in names], SETS, progress)
        for side, names in (("calibrate", calibrate), ("test", test))
    }
    plain = Detector.untrained()
    encoder = plain.encoder
    choose(encoder, by_points=False)
    encoder.load_state_dict(weights)
    encoder = encoder.to(memory_format=torch.channels_last).eval()
    made = calibrated(weights, list(seen_pairs(encoder, files["calibrate"])))
    pairs = [pair.shifted(made.offset) for pair in seen_pairs(encoder, files["test"])]
    detector = made.detector
    measured = figures(pairs, lambda seen: study_probability(detector, seen), detector.decision.threshold)
    metrics = {
        name if part == "value" else f"{name}, {part}": value
        for name, values in measured.items()
        for part, value in zip(("value", "from", "to"), values, strict=True)
        if np.isfinite(value)
    }
    learned = find_patients([data / kind for kind in KINDS], [*calibrate, *test])
    record = TrainingRecord(
        studies=len(learned),
        positive=sum(bool(Patient(path).sets) for path in learned),
        annotated_slices=0,
        synthetic=True,
        epochs=1,
        best_epoch=1,
        seconds=_seconds(run),
        device="cpu",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        git_revision="",
        settings=flat_settings(LessonSettings()),
        metrics={},
        image_sha256=former.image_sha256 if former else (),
        patient_sha256=former.patient_sha256 if former else (),
    )
    stage_two = replace(
        record, studies=2 * made.pairs, positive=made.pairs, metrics=metrics, settings={"kind": "pooled"}, seconds=0.0
    )
    detector = replace(detector, card=ModelCard("starter", pe_app.__version__, record, stage_two))
    detector.save(out, half=True)
    return measured


def _complete(folder: Path) -> bool:
    return (folder / "places.npz").is_file()


def _patient(data: Path, name: str) -> Path:
    for kind in KINDS:
        if _complete(data / kind / name):
            return data / kind / name
    raise InputError(f"{data}: no ingredients of patient {name}: run 'ingredients' first")


def _seconds(run: Path) -> float:
    """Of training, over all resumes."""
    log = run / "log.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    later = [*entries[1:], {"seconds": 0}]
    return float(
        sum(one["seconds"] for one, then in zip(entries, later, strict=True) if then["seconds"] < one["seconds"])
    )


def _write_flat(name: str, path: Path, contrast: bool, out: Path) -> None:
    """One slice, five times: what passes through it is drawn out when windows are cut."""
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError:
        return  # a README beside the slices
    image.SetDirection(np.eye(3).ravel().tolist())
    hu = np.repeat(on_grid(image, max(1.0, image.GetSpacing()[2]))[:1], SLICES, 0)
    arteries = bright_vessels(hu) if contrast else None
    if arteries is None or arteries.any():
        write_real(name, hu, arteries, out)
