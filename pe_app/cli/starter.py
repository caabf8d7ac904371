"""The verbs of recipe starter: the model that ships, in three steps that each resume if interrupted.

    pe-app recipe starter ingredients DATA --vessels DIR --enhanced CT ... --slices DIR --plain DIR
    pe-app recipe starter learn DATA RUN --held-out NAME ...
    pe-app recipe starter publish DATA RUN OUT --calibrate NAME ... --test NAME ...

The model has never seen a real embolism, and its card says so.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import SimpleITK as sitk
import torch
import typer

import pe_app
from pe_app.cli.options import progress_bars
from pe_app.common.errors import InputError
from pe_app.ct.volume_io import image_from_volume, read_volume
from pe_app.model.detector import STARTER_MODEL, Detector, ModelCard, TrainingRecord
from pe_app.model.winograd import choose
from pe_app.phantom.trees import tree_names
from pe_app.research.starter.figures import figures
from pe_app.research.starter.ingredients import bright_vessels, on_grid, write_drawn, write_real
from pe_app.research.starter.lesson import LessonSettings, find_patients, flat_settings, learn
from pe_app.research.starter.publish import calibrated, prepared_pairs, seen_pairs, study_probability
from pe_app.research.starter.windows import SLICES, Patient, WindowSettings, WindowSource

app = typer.Typer(no_args_is_help=True, help="The model that ships, in three steps.")
KINDS = ("drawn", "real")
SETS = ("real_0", "real_1", "real_2", "small_0")
"""Sets of clots of each patient that calibrate or measure."""

POOL = 10
"""Batches to validate on, of each kind."""


@app.command()
def ingredients(
    data: Annotated[Path, typer.Argument(help="Gets a folder for each patient.")],
    vessels: Annotated[Path | None, typer.Option(help="Vessel trees: NAME.nii.gz and NAME_lungmask.nii.gz.")] = None,
    enhanced: Annotated[list[Path], typer.Option(help="Enhanced chest CT.")] = [],  # noqa: B006
    slices: Annotated[Path | None, typer.Option(help="Folder of single enhanced slices.")] = None,
    plain: Annotated[Path | None, typer.Option(help="Folder of single slices without contrast.")] = None,
) -> None:
    """What windows are cut from, on a grid of 2.5 x 0.7 x 0.7 mm; a patient takes a minute."""
    for name in tree_names(vessels) if vessels else ():
        if not _complete(data / "drawn" / name):
            typer.echo(name)
            write_drawn(vessels or Path(), name, data / "drawn")
    for path in enhanced:
        name = path.name.partition(".")[0].replace("_", "-")
        if not _complete(data / "real" / name):
            typer.echo(name)
            hu = on_grid(image_from_volume(read_volume(path)))
            write_real(name, hu, bright_vessels(hu), data / "real")
    for folder, contrast in ((slices, True), (plain, False)):
        for path in sorted(file for file in folder.rglob("*") if file.is_file()) if folder else ():
            name = path.stem.replace("_", "-")
            if not _complete(data / "real" / name):
                _write_flat(name, path, contrast, data / "real")


@app.command("learn")
def learn_cells(
    data: Annotated[Path, typer.Argument(help="Ingredients.")],
    run: Annotated[Path, typer.Argument(help="Gets checkpoint, running mean and log.")],
    held_out: Annotated[list[str], typer.Option(help="Patients that are left out and validate.")] = [],  # noqa: B006
    start: Annotated[Path, typer.Option(help="Model whose stage I to begin with.")] = STARTER_MODEL,
    steps: Annotated[int, typer.Option(min=1, help="Batches in all.")] = LessonSettings().steps,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = LessonSettings().learning_rate,
    hours: Annotated[float, typer.Option(min=0, help="Stop with a checkpoint after so long.")] = 1000.0,
) -> None:
    """Stage I, cell by cell. The same call resumes."""
    torch.set_num_threads(1)
    settings = replace(LessonSettings(), steps=steps, learning_rate=learning_rate)
    pools = {}
    for kind in KINDS:
        apart = [data / kind / name for name in held_out if _complete(data / kind / name)]
        if apart:
            windows = replace(WindowSettings(), varied=kind == "drawn", scale=(1.0, 1.0))
            source = WindowSource([Patient(path) for path in apart], settings.seed, windows)
            pools[kind] = [source.batch() for _ in range(POOL)]
    weights = Detector.load(start).encoder.cpu().state_dict()
    folders = [data / kind for kind in KINDS]
    learn(run, folders, held_out, weights, settings, pools, time.time() + 3600 * hours)


@app.command()
def publish(
    data: Annotated[Path, typer.Argument(help="Ingredients.")],
    run: Annotated[Path, typer.Argument(help="Of 'learn'.")],
    out: Annotated[Path, typer.Argument(help="The model to write.")],
    calibrate: Annotated[list[str], typer.Option(help="Patients to calibrate on.")],
    test: Annotated[list[str], typer.Option(help="Patients to measure on, in the end.")],
    start: Annotated[Path, typer.Option(help="Model that stage I began with.")] = STARTER_MODEL,
) -> None:
    """Calibrate on held-out patients, measure on others, and write the model in half precision."""
    former = Detector.load(start).card.encoder
    weights = torch.load(run / "mean.pt", weights_only=True)
    with progress_bars() as progress:
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
    typer.echo(json.dumps({name: [round(v, 3) for v in values] for name, values in measured.items()}, indent=1))


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
