"""A folder of simulated studies as a hospital would hand them over: volumes, reader's annotations, study list."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from pe_app.annotation.sparse import SparseAnnotation, slice_schedule
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.common.worker_pool import Processes
from pe_app.ct.volume_io import write_volume
from pe_app.phantom.anatomy import Patient
from pe_app.phantom.scan import PhantomConfig, make_phantom
from pe_app.phantom.tree_studies import make_tree_phantom
from pe_app.phantom.trees import tree_names
from pe_app.studies import Label, Study, write_studies

Made = TypeVar("Made")

READER, READ_AT = "simulated reader", "2026-01-01T00:00:00Z"
"""Who reviewed the slices, and when: fixed, so that the same seed gives the same files."""

ANNOTATED_POSITIVE, ANNOTATED_NEGATIVE = 0.6, 0.3
"""Shares of studies that the reader annotated; the others are label-only."""

SECOND_STUDY = 0.15
"""Share of studies that belong to the patient of the study before."""


def write_phantom_studies(
    out: Path,
    studies: int,
    seed: int,
    config: PhantomConfig | None = None,
    progress: ProgressCallback = silent,
    workers: int = 1,
    vessels: Path | None = None,
) -> Path:
    """Write simulated studies, every other one with emboli, and return their study list.

    ``out`` gets studies.csv, volumes/ID.nrrd, masks/ID.nrrd (the truth of positive studies, numbered emboli) and, for
    a part of the studies, annotations/ID.json with ID.seg.nrrd: a slice every 10 mm, as a reader would mark them.
    The same seed gives the same files however many processes work; studies that are there already are kept, so an
    interrupted call goes on.

    Args:
        out: made where missing.
        studies: how many.
        seed: of everything.
        config: matrix, spacing, how much clot.
        progress: told after every study; may raise ``Cancelled``.
        workers: processes.
        vessels: folder of real patients' vessel masks (``trees``): studies are of these trees, bent anew, at 2.5 mm and
            0.7 mm, with clots of real size; matrix, spacing and burden of ``config`` then play no part.

    Raises:
        InputError: if ``vessels`` holds no patient, or one that cannot be used.
    """
    trees = tree_names(vessels) if vessels else ()
    config = config or PhantomConfig()
    for folder in ("volumes", "masks", "annotations"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    make = partial(_write_study, out, seed=seed, config=config, vessels=vessels, trees=trees)
    listed = made_in(workers, make, studies, "simulate studies", progress)
    path = out / "studies.csv"
    write_studies([listed[number] for number in range(studies)], path)
    return path


def made_in(
    workers: int, make: Callable[[int], Made], count: int, task: str, progress: ProgressCallback
) -> dict[int, Made]:
    """``make(number)`` for 0 to ``count - 1`` by number, made in so many processes; the first failure is raised."""
    made: dict[int, Made] = {}
    progress(Progress(task, 0, count))
    with Processes(min(workers, count)) as processes:
        for number, result in processes.run(make, range(count)):
            if isinstance(result, Exception):
                raise result
            made[number] = result
            progress(Progress(task, len(made), count))
    return made


def _write_study(
    out: Path, number: int, seed: int, config: PhantomConfig, vessels: Path | None, trees: tuple[str, ...]
) -> Study:
    """Make one study; its last file is the volume, so that a study with a volume is complete."""
    name = f"phantom_{seed}_{number:04d}"
    rng = np.random.default_rng((seed, number))
    positive = number % 2 == 0
    label: Label = "positive" if positive else "negative"
    annotated = rng.random() < (ANNOTATED_POSITIVE if positive else ANNOTATED_NEGATIVE)
    # a tree is a patient: the studies go round the trees, so that each comes with emboli and without
    tree = trees[number // 2 % len(trees)] if trees else None
    patient_number = _patient_number(seed, number)
    path, mask_path = out / "volumes" / f"{name}.nrrd", out / "masks" / f"{name}.nrrd"
    annotation = out / "annotations" / f"{name}.json" if annotated else None
    if not path.exists():
        if vessels and tree:
            phantom = make_tree_phantom(vessels, tree, rng, positive)
        else:
            patient = Patient.draw(np.random.default_rng((seed, patient_number, 1)))
            phantom = make_phantom(rng, config, positive=positive, patient=patient)
        if positive:
            write_volume(phantom.emboli_mask, mask_path)
        if annotation:
            schedule = slice_schedule(phantom.volume)
            reviewed = SparseAnnotation.from_mask(phantom.volume, phantom.emboli_mask, schedule, READER, READ_AT)
            reviewed.write(annotation, phantom.volume)
        write_volume(phantom.volume, path)
    return Study(name, path, tree or f"patient_{seed}_{patient_number:04d}", label, annotation)


def _patient_number(seed: int, number: int) -> int:
    """The patient of a study: now and then the one of the study before."""
    second = number > 0 and np.random.default_rng((seed, number, 2)).random() < SECOND_STUDY
    return number - 1 if second else number
