"""Verbs that train: encoder (stage I), classifier (stage II), and both end to end."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pe_app.cli.options import CacheLimit, StudyList, Workers, preparation, progress_bars, reading_ahead, tell_once

if TYPE_CHECKING:
    from pe_app.model.detector import ModelCard

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


class NegativeSlices(StrEnum):
    """Where slabs without embolism come from."""

    MIXED = "mixed"
    NEGATIVE_STUDIES = "negative_studies"
    MATCHED = "matched"


class Architecture(StrEnum):
    """Networks for stage I."""

    RESNET18 = "resnet18"
    DENSENET121 = "densenet121"


class NotOutlinedSlices(StrEnum):
    """What slices with embolism that is not outlined contribute."""

    BALANCED = "balanced"
    AS_LISTED = "as_listed"
    LEFT_OUT = "left_out"


class LearningRate(StrEnum):
    """How the learning rate goes from epoch to epoch."""

    CONSTANT = "constant"
    COSINE = "cosine"


Statistics = Annotated[
    bool, typer.Option("--fresh-statistics", help="Estimate batch normalisation's statistics anew every epoch.")
]


class PrecisionChoice(StrEnum):
    """Number format of the networks."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


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
    negative_slabs: Annotated[NegativeSlices, typer.Option(help="Negative slabs: half of them slices marked none; all "
                              "from negative studies; or from these at the heights of the positive slabs.")
                              ] = NegativeSlices.MIXED,
    not_outlined: Annotated[NotOutlinedSlices, typer.Option(help="Slices with embolism that is not outlined: as often "
                            "as outlined ones, each once, or not at all.")] = NotOutlinedSlices.BALANCED,
    flip: Annotated[bool, typer.Option(help="Augment: mirror left and right; the paper uses none.")] = False,
    shift_cells: Annotated[int, typer.Option(min=0, help="Augment: move by up to so many cells of 16 pixels.")] = 0,
    jitter_hu: Annotated[float, typer.Option(min=0, help="Augment: add an offset of up to so many HU.")] = 0.0,
    window_cells: Annotated[int, typer.Option(min=0, help="Learn from windows of so many cells of 16 pixels.")] = 0,
    schedule: Annotated[LearningRate, typer.Option(help="Of the learning rate.")] = LearningRate.CONSTANT,
    fresh_statistics: Statistics = False,
    start_from: Annotated[Path | None, typer.Option(help="Model to go on from; its shapes are used.")] = None,
    slab_spacing: SlabSpacing = SlabSpacing.LUNG,
    matrix: Annotated[int, typer.Option(min=32, help="Rows and columns every slice is resampled to.")] = 512,
    crop: Annotated[int, typer.Option(min=16, help="Centre crop, a multiple of 64.")] = 384,
    slab_count: Annotated[int, typer.Option(min=2, help="Slabs of a study.")] = 50,
    hu_window: Annotated[tuple[float, float], typer.Option(help="HU that become black and white; a narrow window shows "
                         "emboli in less time, and no lungs.")] = (-1024, 500),
    architecture: Architecture = Architecture.RESNET18,
    width: Annotated[int, typer.Option(min=1, help="Channels after the first convolution.")] = 64,
    filters: Annotated[int, typer.Option(min=1, help="Channels of stage II's states.")] = 96,
    serial: Annotated[bool, typer.Option(help="Stage II's descending direction reads the ascending one.")] = False,
    imagenet: Annotated[Path | None, typer.Option(help="Local ImageNet weights of ResNet18 to start from.")] = None,
    synthetic: Annotated[bool, typer.Option(help="Record that every embolism is simulated or painted.")] = False,
    precision: PrecisionChoice = PrecisionChoice.AUTO,
    seed: int = 0,
    run_dir: RunDir = None,
    cache: Annotated[Path | None, typer.Option(help="Prepared slabs. [default: in the run folder]")] = None,
    cache_limit: CacheLimit = "",
    workers: Workers = None,
) -> None:  # fmt: skip
    """Stage I: learn where to look, from the annotated slices of a study list. Goes on where it was interrupted.

    On several GPUs or machines: torchrun ... -m pe_app train encoder ...
    """
    from pe_app.common import distributed
    from pe_app.ct.slabs import SlabConfig
    from pe_app.model.losses import AttentionLoss
    from pe_app.model.slab_encoder import EncoderConfig
    from pe_app.model.study_classifier import ClassifierConfig
    from pe_app.studies import read_studies
    from pe_app.training.datasets import Augmentation
    from pe_app.training.stages import EncoderTraining, train_encoder

    slabs = SlabConfig(
        matrix=matrix, crop=crop, slab_count=slab_count, slab_spacing=slab_spacing.value, hu_window=hu_window
    )
    settings = EncoderTraining(
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        attention_weight=attention_weight,
        attention_loss=AttentionLoss(attention_kind.value, negatives.value),
        negative_slabs=negative_slabs.value,
        not_outlined=not_outlined.value,
        augment=flip or shift_cells > 0 or jitter_hu > 0 or window_cells > 0,
        augmentation=Augmentation(flip, shift_cells, jitter_hu, window_cells),
        schedule=schedule.value,
        fresh_statistics=fresh_statistics,
        precision=precision.value,
        workers=reading_ahead(workers),
        seed=seed,
    )
    network = EncoderConfig(slabs.slices_per_slab, width, attention_score.value, architecture.value)
    directions: Literal["parallel", "serial"] = "serial" if serial else "parallel"
    with distributed.joined(), progress_bars() as progress:
        trained = train_encoder(
            read_studies(studies),
            out,
            settings=settings,
            slabs=slabs,
            network=network,
            classifier=ClassifierConfig(network.feature_channels, slabs.grid, filters, directions),
            imagenet=imagenet,
            start_from=start_from,
            synthetic=synthetic,
            run_dir=run_dir,
            slabs_dir=cache,
            preparation=preparation(workers, cache_limit),
            progress=progress,
        )
    _tell_terms(trained.card)
    tell_once(f"Stage I published to {out}; train stage II with: pe-app train classifier --encoder {out} ...")


def classifier(
    studies: StudyList,
    encoder: Annotated[Path, typer.Option("--encoder", help="The model that 'train encoder' published.")],
    out: Out,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the studies.")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Studies a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of Adam.")] = 1e-4,
    schedule: Annotated[LearningRate, typer.Option(help="Of the learning rate.")] = LearningRate.CONSTANT,
    fresh_statistics: Statistics = False,
    pooled: Annotated[
        bool,
        typer.Option("--pooled", help="Weigh stage I's strongest cells by logistic regression: for few studies."),
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Features, as 'encode' makes them. [default: in the run folder]")
    ] = None,
    cache_limit: CacheLimit = "",
    workers: Workers = None,
    synthetic: Annotated[bool, typer.Option(help="Record that every embolism is simulated or painted.")] = False,
    precision: PrecisionChoice = PrecisionChoice.AUTO,
    seed: int = 0,
    run_dir: RunDir = None,
) -> None:
    """Stage II: learn what a whole study means, from study labels. Goes on where it was interrupted.

    On several GPUs or machines: torchrun ... -m pe_app train classifier ...
    """
    from pe_app.common import distributed
    from pe_app.studies import read_studies
    from pe_app.training.stages import ClassifierTraining, train_classifier

    settings = ClassifierTraining(
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        schedule=schedule.value,
        fresh_statistics=fresh_statistics,
        pooled=pooled,
        precision=precision.value,
        workers=reading_ahead(workers),
        seed=seed,
    )
    with distributed.joined(), progress_bars() as progress:
        trained = train_classifier(
            read_studies(studies),
            encoder,
            out,
            settings=settings,
            synthetic=synthetic,
            run_dir=run_dir,
            cache_dir=cache,
            preparation=preparation(workers, cache_limit),
            progress=progress,
        )
    _tell_terms(trained.card)
    tell_once(f"Model published to {out}; try it with: pe-app detect STUDY --model {out}")


def end_to_end(
    studies: StudyList,
    model: Annotated[Path, typer.Option("--model", help="The model that 'train classifier' published.")],
    out: Out,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the studies.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Studies a step.")] = 2,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of Adam.")] = 1e-5,
    gradient_slabs: Annotated[int, typer.Option(min=1, help="Slabs a study that carry the gradient.")] = 10,
    cache: Annotated[Path | None, typer.Option(help="Slabs of the studies. [default: in the run folder]")] = None,
    synthetic: Annotated[bool, typer.Option(help="Record that every embolism is simulated or painted.")] = False,
    precision: PrecisionChoice = PrecisionChoice.AUTO,
    seed: int = 0,
    run_dir: RunDir = None,
) -> None:
    """Both stages together, after stage II has converged; not in the paper. Goes on where it was interrupted."""
    from pe_app.common import distributed
    from pe_app.studies import read_studies
    from pe_app.training.fine_tuning import FineTuning, train_end_to_end

    settings = FineTuning(
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        gradient_slabs=gradient_slabs,
        precision=precision.value,
        seed=seed,
    )
    with distributed.joined(), progress_bars() as progress:
        trained = train_end_to_end(
            read_studies(studies),
            model,
            out,
            settings=settings,
            synthetic=synthetic,
            run_dir=run_dir,
            cache_dir=cache,
            progress=progress,
        )
    _tell_terms(trained.card)
    tell_once(f"Model published to {out}; hold it against {model} with: pe-app evaluate --model {model} {out} ...")


def _tell_terms(card: ModelCard) -> None:
    """What the data that a model learned from ask of whoever uses it."""
    if card.terms:
        kind = " This model is for non-commercial use only." if card.non_commercial else ""
        tell_once(f"Terms of use of the data it learned from: {'; '.join(card.terms)}.{kind}")
