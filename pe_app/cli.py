"""The command line: every verb a person types. Bad input is one line and exit code 2, a refused study exit code 3.

Commands import what they need when they run, so that ``--help`` and mistakes answer at once.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

import pe_app
from pe_app.errors import InputError
from pe_app.progress import Progress, ProgressCallback

EXIT_BAD_INPUT = 2
EXIT_REFUSED = 3

app = typer.Typer(
    name="pe-app",
    help="Finding pulmonary embolism on chest CT with few annotations. Research use only, not for diagnosis.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(no_args_is_help=True, help="Train stage I (encoder) or stage II (classifier).")
app.add_typer(train_app, name="train")

Model = Annotated[Path | None, typer.Option("--model", help="Model file; by default the starter model that ships.")]
StudyList = Annotated[Path, typer.Option("--studies", help="Study list: CSV of study, path, patient, label, ...")]
Out = Annotated[Path, typer.Option("--out", help="Where the trained model is published.")]
RunDir = Annotated[Path | None, typer.Option(help="Metrics, curves, checkpoints. [default: OUT without suffix + .run]")]


class SlabSpacing(StrEnum):
    """How the 5 slices of a stage II slab lie."""

    LUNG = "lung"
    PHYSICAL = "physical"


class Score(StrEnum):
    """Which score the attention explains."""

    DIFFERENCE = "difference"
    POSITIVE_LOGIT = "positive_logit"


class AttentionKind(StrEnum):
    """Attention loss of positive slabs."""

    CONTINUOUS_DICE = "continuous_dice"
    SOFT_DICE = "soft_dice"
    MSE = "mse"


class Negatives(StrEnum):
    """Attention loss of negative slabs."""

    SMOOTHED = "smoothed"
    MEAN = "mean"
    NONE = "none"


class PrecisionChoice(StrEnum):
    """Number format of the networks."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def main() -> None:
    """Run the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except InputError as error:
        typer.echo(f"pe-app: {error}", err=True)
        sys.exit(EXIT_BAD_INPUT)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(f"pe-app {pe_app.__version__}")
        raise typer.Exit


@app.command()
def detect(
    study: Annotated[Path, typer.Argument(help="DICOM folder, .nii, .nii.gz or .nrrd of one chest CT.")],
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="Folder for detection.json, attention.nrrd, review.png, "
                                                  "index.html. [default: ./STUDY-detection]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the detection as JSON.")] = False,
    series: Annotated[str | None, typer.Option(help="Series Instance UID, where the folder holds several.")] = None,
    full_resolution: Annotated[bool, typer.Option(help="Also write the attention on the CT's grid.")] = False,
) -> None:  # fmt: skip
    """Probability of embolism of one study, with the evidence and where to look."""
    from pe_app.detector import Detector, default_model
    from pe_app.result_files import verdict, write_result
    from pe_app.volume_io import read_volume

    volume = read_volume(study, series=series)
    chosen = model or default_model()
    detector = Detector.load(chosen) if chosen else Detector.untrained()
    with progress_bars() as progress:
        result = detector.detect(volume, progress)
    name = study.resolve().name
    folder = out or Path(f"{name.split('.')[0]}-detection")
    write_result(result, volume, folder, name, full_resolution=full_resolution)
    detection = result.detection
    if as_json:
        typer.echo(json.dumps(detection.to_json()))
    else:
        typer.echo(verdict(detection))
        for reason in detection.reasons:
            typer.echo(f"  {reason.code}: {reason.message}")
        for candidate in detection.candidates[:5]:
            typer.echo(
                f"  look at slice {candidate.slice_index} (z {candidate.z_mm:.0f} mm), "
                f"slab probability {candidate.slab_probability:.2f}"
            )
        typer.echo(f"Written to {folder}. Research use only, not for diagnosis.")
    if detection.status == "refused":
        raise typer.Exit(EXIT_REFUSED)


@train_app.command()
def encoder(
    studies: StudyList,
    out: Out,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the slabs.")] = 100,
    batch: Annotated[int, typer.Option(min=2, help="Slabs a step.")] = 48,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of Adam.")] = 1e-4,
    attention_weight: Annotated[float, typer.Option(min=0, help="Lambda: weight of the attention loss.")] = 1.0,
    attention_kind: AttentionKind = AttentionKind.CONTINUOUS_DICE,
    negatives: Negatives = Negatives.SMOOTHED,
    attention_score: Score = Score.DIFFERENCE,
    flip: Annotated[bool, typer.Option(help="Augment: mirror left and right; the paper uses none.")] = False,
    shift_cells: Annotated[int, typer.Option(min=0, help="Augment: move by up to so many cells of 16 pixels.")] = 0,
    jitter_hu: Annotated[float, typer.Option(min=0, help="Augment: add an offset of up to so many HU.")] = 0.0,
    slab_spacing: SlabSpacing = SlabSpacing.LUNG,
    matrix: Annotated[int, typer.Option(min=32, help="Rows and columns every slice is resampled to.")] = 512,
    crop: Annotated[int, typer.Option(min=16, help="Centre crop, a multiple of 64.")] = 384,
    slab_count: Annotated[int, typer.Option(min=2, help="Slabs of a study.")] = 50,
    width: Annotated[int, typer.Option(min=1, help="Channels after the first convolution.")] = 64,
    filters: Annotated[int, typer.Option(min=1, help="Channels of stage II's states.")] = 96,
    serial: Annotated[bool, typer.Option(help="Stage II's descending direction reads the ascending one.")] = False,
    imagenet: Annotated[Path | None, typer.Option(help="Local ImageNet weights of ResNet18 to start from.")] = None,
    synthetic: Annotated[bool, typer.Option(help="Record that every embolism is simulated or painted.")] = False,
    precision: PrecisionChoice = PrecisionChoice.AUTO,
    seed: int = 0,
    run_dir: RunDir = None,
) -> None:
    """Stage I: learn where to look, from the annotated slices of a study list. Goes on where it was interrupted."""
    from pe_app.datasets import Augmentation
    from pe_app.losses import AttentionLoss
    from pe_app.slab_encoder import EncoderConfig
    from pe_app.slabs import SlabConfig
    from pe_app.studies import read_studies
    from pe_app.study_classifier import ClassifierConfig
    from pe_app.training import EncoderTraining, train_encoder

    slabs = SlabConfig(matrix=matrix, crop=crop, slab_count=slab_count, slab_spacing=slab_spacing.value)
    settings = EncoderTraining(
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        attention_weight=attention_weight,
        attention_loss=AttentionLoss(attention_kind.value, negatives.value),
        augment=flip or shift_cells > 0 or jitter_hu > 0,
        augmentation=Augmentation(flip, shift_cells, jitter_hu),
        precision=precision.value,
        seed=seed,
    )
    network = EncoderConfig(slabs.slices_per_slab, width, attention_score.value)
    directions: Literal["parallel", "serial"] = "serial" if serial else "parallel"
    with progress_bars() as progress:
        train_encoder(
            read_studies(studies),
            out,
            settings=settings,
            slabs=slabs,
            network=network,
            classifier=ClassifierConfig(network.feature_channels, slabs.grid, filters, directions),
            imagenet=imagenet,
            synthetic=synthetic,
            run_dir=run_dir,
            progress=progress,
        )
    typer.echo(f"Stage I published to {out}; train stage II with: pe-app train classifier --encoder {out} ...")


@train_app.command()
def classifier(
    studies: StudyList,
    encoder: Annotated[Path, typer.Option("--encoder", help="The model that 'train encoder' published.")],
    out: Out,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the studies.")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Studies a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of Adam.")] = 1e-4,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Features of the studies. [default: in the run folder]")
    ] = None,
    synthetic: Annotated[bool, typer.Option(help="Record that every embolism is simulated or painted.")] = False,
    precision: PrecisionChoice = PrecisionChoice.AUTO,
    seed: int = 0,
    run_dir: RunDir = None,
) -> None:
    """Stage II: learn what a whole study means, from study labels. Goes on where it was interrupted."""
    from pe_app.studies import read_studies
    from pe_app.training import ClassifierTraining, train_classifier

    settings = ClassifierTraining(
        epochs=epochs, batch=batch, learning_rate=learning_rate, precision=precision.value, seed=seed
    )
    with progress_bars() as progress:
        train_classifier(
            read_studies(studies),
            encoder,
            out,
            settings=settings,
            synthetic=synthetic,
            run_dir=run_dir,
            cache_dir=cache_dir,
            progress=progress,
        )
    typer.echo(f"Model published to {out}; try it with: pe-app detect STUDY --model {out}")


@app.command()
def phantom(
    studies: Annotated[int, typer.Option(min=1, help="How many; every other one has emboli.")],
    out: Annotated[Path, typer.Option(help="Folder for volumes, masks, annotations and studies.csv.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same studies.")] = 0,
    matrix: Annotated[int, typer.Option(min=64, help="Rows and columns; 512 as scanners do, 128 for trials.")] = 512,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. [default: one a core]")] = None,
) -> None:
    """Simulated enhanced chest CT with emboli of known place, annotated as a reader would, and their study list."""
    import os

    from pe_app.phantom import PhantomConfig, write_phantom_studies

    with progress_bars() as progress:
        study_list = write_phantom_studies(
            out, studies, seed, PhantomConfig(matrix=matrix), progress, workers or os.cpu_count() or 1
        )
    typer.echo(f"Study list: {study_list}. Volumes to serve: {out / 'volumes'}")


@app.command("label-reports")
def label_reports(
    reports: Annotated[Path, typer.Argument(help="CSV with the columns study and report.")],
    out: Annotated[Path, typer.Option(help="CSV of study, label, deciding sentence, location, side, acuity.")],
    studies: Annotated[Path | None, typer.Option(help="Study list to fill in: labels that are there stay.")] = None,
) -> None:
    """Mine study labels from radiology reports: positive, negative or uncertain, with the sentence that decided."""
    from pe_app.report_labels import label_reports as write_labels
    from pe_app.report_labels import label_studies, read_labels
    from pe_app.studies import read_studies, write_studies

    with progress_bars() as progress:
        counts = write_labels(reports, out, progress)
    typer.echo(", ".join(f"{count} {label}" for label, count in counts.items()) + f": {out}")
    if studies:
        known = read_studies(studies)
        labelled = label_studies(known, read_labels(out))
        write_studies(labelled, studies)
        gained = sum(new.label != old.label for new, old in zip(labelled, known, strict=True))
        typer.echo(f"{gained} of {len(known)} studies of {studies} got a label")


@app.command()
def evaluate(
    studies: StudyList,
    out: Annotated[Path, typer.Option(help="Folder for metrics.json, predictions.csv, index.html and report.pdf.")],
    model: Model = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="More models to compare.")] = None,
    untrained_baseline: Annotated[bool, typer.Option("--untrained-baseline", help="Also let random weights look; "
                                                     "costs another pass.")] = False,
    allow_training_studies: Annotated[bool, typer.Option("--allow-training-studies", help="Do not refuse studies that "
                                                         "a model was trained on; the result says so.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of bootstrap intervals and pictures.")] = 0,
) -> None:  # fmt: skip
    """How good models are on the test studies of a list: AUC, operating points, calibration, where they look."""
    from pe_app.detector import default_model
    from pe_app.evaluation import EvaluationSettings
    from pe_app.evaluation import evaluate as judge
    from pe_app.evaluation_page import summary, write_evaluation
    from pe_app.studies import read_studies

    models = [path for path in (model or default_model(), *(more or ())) if path is not None]
    if not models:
        raise InputError("no model: give one or more with --model FILE [FILE]...")
    settings = EvaluationSettings(untrained_baseline, allow_training_studies, seed)
    masks = studies.parent / "masks"
    with progress_bars() as progress:
        evaluation = judge(read_studies(studies), models, out, masks, settings, progress)
        write_evaluation(evaluation, out, masks, progress)
    typer.echo("\n".join(summary(evaluation)))
    typer.echo(f"Open {out / 'index.html'}. Research use only, not for diagnosis.")


@app.command()
def serve(
    studies: Annotated[Path, typer.Argument(help="Folder of .nrrd, .nii.gz or .nii studies; labels are kept in it.")],
    host: Annotated[str, typer.Option(help="An address of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    model: Model = None,
) -> None:
    """The MONAI Label server for Slicer: detections, sparse annotations, active learning, training."""
    import pe_monailabel  # noqa: F401 - puts the app's own modules on the path
    from lib.server import serve as serve_studies

    serve_studies(studies, host, port, model)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the two studies and their pages.")] = Path("demo"),
    model: Model = None,
) -> None:
    """Two phantom studies, the real server, both detections with their pages."""
    from pe_app.demo import run_demo, summary

    with progress_bars() as progress:
        studies = run_demo(out, model, progress)
    for study in studies:
        typer.echo("\n".join(summary(study)))
    typer.echo(f"Open {out / 'index.html'}. Simulated studies; research use only, not for diagnosis.")


@contextmanager
def progress_bars() -> Iterator[ProgressCallback]:
    """A callback that shows one bar a task with the time left, on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Bar(*columns, console=Console(stderr=True)) as bar:

        def show(progress: Progress) -> None:
            if progress.task not in tasks:
                tasks[progress.task] = bar.add_task(progress.task, text="")
            bar.update(tasks[progress.task], completed=progress.done, total=progress.total, text=progress.text)

        yield show
