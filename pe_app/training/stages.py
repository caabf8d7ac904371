"""Both trainings: annotated slices become an encoder (stage I), labelled studies a classifier (stage II).

A training lives in a run folder. Everything random in an epoch comes from the seed and the epoch's number, so a run
that is interrupted anywhere and called again ends, on a CPU, with the same bits as one that was not. Called in each of
the processes that torchrun started (``distributed``), they train one model together and the main one publishes it.
Source: sections 2.2, 2.3 and 3.1 of the paper; [ours] marks what the paper leaves open.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from pe_app.common import distributed
from pe_app.common.device import Precision, autocast, best_device
from pe_app.common.errors import InputError
from pe_app.common.progress import ProgressCallback, silent
from pe_app.ct.slabs import SlabConfig
from pe_app.model.detector import Detector, ModelCard, TrainingRecord
from pe_app.model.losses import AttentionLoss, attention_loss, cell_loss
from pe_app.model.slab_encoder import EncoderConfig, SlabEncoder
from pe_app.model.study_classifier import ClassifierConfig, PooledClassifier
from pe_app.studies import Label, Split, Study, patient_sha256, split_studies
from pe_app.training.datasets import (
    IN_THIS_PROCESS,
    UNKNOWN,
    AnnotatedSlabs,
    Augmentation,
    NegativeSlabs,
    NotOutlined,
    Preparation,
    PreparedFile,
    SlabItem,
    StudyFeatures,
    StudyItem,
    StudySource,
    TwinSlabs,
    augmented,
    encode_sources,
    encoder_key,
    prepare_slabs,
    read_sources,
)
from pe_app.training.loop import ItemMetrics, Schedule, derived_seed, fit
from pe_app.training.run import TrainingRun, git_revision, utc_now

Decisions = Literal["learned", "ignored"]
"""What readers' decisions on candidates contribute: see ``EncoderTraining``."""

SIDES: tuple[Split, ...] = ("train", "validation")
LABELS: tuple[Label, ...] = ("negative", "positive")
"""Of stage II, in the order of their numbers."""


@dataclass(frozen=True)
class EncoderTraining:
    """How stage I is trained. The defaults are the paper's (section 3.1) unless marked [ours].

    Attributes:
        learning_rate: of Adam.
        batch: slabs per train step, over all processes.
        epochs: passes over the training slabs; the one with the highest validation accuracy is published.
        validation_fraction: share of patients kept for validation.
        attention_weight: lambda, the weight of the attention loss; 0 is the paper's scenario 2.
        attention_loss: which attention loss.
        negative_slabs: where slabs without embolism come from (``prepare_slabs``); ``"negative_studies"`` is the
            paper's way, ``"mixed"`` makes use of slices marked "none" [ours], ``"matched"`` takes away the height of a
            slab as a hint, ``"half_matched"`` does so for half of them and shows other levels, too [ours].
        not_outlined: what slices with embolism that is not outlined contribute; they teach classification alone.
            ``"balanced"``: an epoch's slabs with embolism are half outlined and half not, as far as that repeats no
            slab more than four times; ``"as_listed"``: each once; ``"left_out"``: nothing. They are left out, too,
            where windows are learnt from, since a window may not hold what is not outlined [ours].
        decisions: ``"learned"``: where a reader rejected a model's candidate, attention must not lie; these slabs, and
            those with an embolism that the model missed, are drawn twice as often. ``"ignored"``: as if no candidate
            had been shown [ours].
        augment: whether training slabs are changed at random; ``augmentation`` says how strongly [ours].
        augmentation: strengths, without effect where ``augment`` is off.
        schedule: of the learning rate: constant, or falling from epoch to epoch along half a cosine, which lets short
            trainings settle [ours].
        fresh_statistics: estimate the running statistics of batch normalisation anew over the training slabs at the end
            of every epoch, before validation: in short trainings they lag behind the weights [ours].
        twins: learn from pairs of the same chest with and without embolism, as simulations can give them
            (``TwinSlabs``), changed alike at random; a batch is then this many pairs [ours].
        precision: dtype of the network; weights stay float32 [ours].
        workers: processes that read slabs ahead, for each that trains; 0 reads in between, which two processor cores
            like best.
        seed: of first weights, split, draw of slabs, order and augmentation.
    """

    learning_rate: float = 1e-4
    batch: int = 48
    epochs: int = 100
    validation_fraction: float = 0.2
    attention_weight: float = 1.0
    attention_loss: AttentionLoss = field(default_factory=AttentionLoss)
    negative_slabs: NegativeSlabs = "mixed"
    not_outlined: NotOutlined = "balanced"
    decisions: Decisions = "learned"
    augment: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)
    schedule: Schedule = "constant"
    fresh_statistics: bool = False
    twins: bool = False
    precision: Precision = "auto"
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_settings(self)
        if self.negative_slabs not in get_args(NegativeSlabs):
            raise InputError(f"negative_slabs must be one of {', '.join(get_args(NegativeSlabs))}")
        if self.not_outlined not in get_args(NotOutlined):
            raise InputError(f"not_outlined must be one of {', '.join(get_args(NotOutlined))}")
        if self.decisions not in get_args(Decisions):
            raise InputError(f"decisions must be one of {', '.join(get_args(Decisions))}")
        if not 0 <= self.attention_weight < math.inf:
            raise InputError(f"attention_weight must be a number from 0 on, got {self.attention_weight}")


@dataclass(frozen=True)
class ClassifierTraining:
    """How stage II is trained. The defaults are the paper's (section 3.1) unless marked [ours].

    Attributes:
        learning_rate: of Adam.
        batch: studies per train step, over all processes.
        epochs: passes over the training studies; the one with the highest validation accuracy is published.
        validation_fraction: share of patients kept for validation.
        schedule: of the learning rate: constant, or falling from epoch to epoch along half a cosine [ours].
        fresh_statistics: estimate the running statistics of batch normalisation anew over the training studies at the
            end of every epoch, before validation [ours].
        pooled: weigh a few numbers of stage I's strongest cells by logistic regression (``PooledClassifier``) instead
            of training a ConvLSTM: for as few labelled studies as a ConvLSTM cannot learn from [ours]. Nothing but
            ``validation_fraction`` and ``seed`` then matters, there is one epoch.
        precision: dtype of the network; weights stay float32 [ours].
        workers: data loader workers, for each process that trains; 0 loads in between.
        seed: of first weights, split, order and dropout.
    """

    learning_rate: float = 1e-4
    batch: int = 32
    epochs: int = 50
    validation_fraction: float = 0.2
    schedule: Schedule = "constant"
    fresh_statistics: bool = False
    pooled: bool = False
    precision: Precision = "auto"
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_settings(self)


def train_encoder(
    studies: Sequence[Study],
    out: str | Path,
    *,
    settings: EncoderTraining | None = None,
    slabs: SlabConfig | None = None,
    network: EncoderConfig | None = None,
    classifier: ClassifierConfig | None = None,
    imagenet: str | Path | None = None,
    start_from: str | Path | None = None,
    synthetic: bool = False,
    run_dir: str | Path | None = None,
    slabs_dir: str | Path | None = None,
    preparation: Preparation = IN_THIS_PROCESS,
    device: torch.device | None = None,
    progress: ProgressCallback = silent,
) -> Detector:
    """Train stage I on the annotated and the negative studies of a list, and publish it with an untrained classifier.

    The same call goes on where a former one was interrupted, and returns the result of one that had finished.

    Args:
        studies: the list; splits that are filled are kept, "test" is not touched.
        out: the detector's file, written when the training is done; until then a former model stays.
        settings: of the training.
        slabs: how volumes become slabs.
        network: shape of the encoder.
        classifier: shape of the untrained classifier that ``train_classifier`` will train.
        imagenet: local file of ImageNet ResNet18 weights to start from, instead of random ones [ours].
        start_from: file of a detector whose encoder is trained on; its own slab settings and shapes are then used.
        synthetic: recorded in the model card: every embolism was simulated or inserted.
        run_dir: metrics, curves and checkpoint; ``out`` with the suffix ``.run`` by default.
        slabs_dir: prepared slabs, may be shared by runs; ``slabs`` in the run folder by default.
        preparation: of the slabs: in how many processes, and in how much space.
        device: the best one by default.
        progress: told after every step of the whole training; may raise ``Cancelled``.

    Raises:
        InputError: if a study cannot be used, there is too little to learn from, or the run folder is another's.
    """
    settings = settings or EncoderTraining()
    device = device or best_device()
    out = Path(out)
    imagenet, start_from = (Path(path) if path is not None else None for path in (imagenet, start_from))
    start = Detector.untrained(settings.seed, slabs, network, classifier)
    former_terms: tuple[str, ...] = ()
    if start_from is not None:
        former = Detector.load(start_from)
        start = Detector.untrained(settings.seed, former.slabs, former.encoder.config, former.classifier.config)
        start.encoder.load_state_dict(former.encoder.state_dict())
        former_terms = former.card.terms
    encoder = start.encoder
    if settings.attention_loss.kind == "cells" and not encoder.config.strongest_cells:
        raise InputError(
            "attention loss 'cells' asks each cell for the slab's own decision, which a mean over all cells is not: "
            "train a network with strongest_cells, e.g. 3"
        )
    if imagenet is not None:
        encoder.load_imagenet(imagenet)
    encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    usable = [study for study in split(studies, settings) if _for_encoder(study) and study.split in SIDES]
    with TrainingRun(run_folder(out, run_dir), "train encoder", settings.epochs, progress) as run:
        kept = Path(slabs_dir or run.folder / "slabs")
        sources = read_sources(usable, progress=run.report, cache_dir=kept)
        optimiser = torch.optim.Adam(encoder.parameters(), lr=settings.learning_rate)
        pretrained = hashlib.sha256(imagenet.read_bytes()).hexdigest() if imagenet else "none"
        former_weights = hashlib.sha256(start_from.read_bytes()).hexdigest() if start_from else "none"
        more = {"imagenet": pretrained, "start_from": former_weights, "synthetic": str(synthetic)}
        identity = training_identity(settings, network_shapes(start), sources, more)
        run.resume(identity, encoder, optimiser)
        run.keep_settings((settings, start.slabs, encoder.config, start.classifier.config))
        if not run.state.published:
            train, validation = (
                prepared_slabs(sources, side, start.slabs, settings, kept, run.report, preparation) for side in SIDES
            )
            check_apart(train.files, validation.files)

            together = 2 if settings.twins else 1
            unchanged = Augmentation(False, 0, 0.0, settings.augmentation.window_cells)

            def score(items: SlabItem, generator: torch.Generator | None) -> ItemMetrics:
                if settings.twins:
                    items = SlabItem(*(part.flatten(0, 1) for part in items))
                if settings.augment:
                    how = settings.augmentation if generator is not None else unchanged
                    same = torch.Generator().manual_seed(settings.seed)
                    items = augmented(items, how, start.slabs, generator or same, together)
                return score_slabs(encoder, items, settings)

            patients = {study.study: study.patient for study in usable}
            sides: tuple[Dataset[SlabItem], Dataset[SlabItem]] = (train, validation)
            order = partial(train.epoch_order, halves=settings.not_outlined == "balanced")
            if settings.twins:
                sides = TwinSlabs(train, patients), TwinSlabs(validation, patients)
            fit(run, encoder, optimiser, sides, score, settings, None if settings.twins else order)
            files = (*train.files, *validation.files)
            used = {**flat_settings(asdict(settings)), "imagenet": imagenet.name if imagenet else None}
            used["start_from"] = start_from.name if start_from else None
            record_json = training_record(run, used, sources, files, device, synthetic=synthetic, terms=former_terms)
            run.publish(record_json, encoder, optimiser)

        record = TrainingRecord.from_json(json.loads(run.state.published))
        encoder.load_state_dict(dict(run.state.best_weights))
        card = ModelCard(out.stem, record.date[:10], encoder=record)
        return published(Detector(encoder, start.classifier, start.slabs, card), device, out)


def train_classifier(
    studies: Sequence[Study],
    encoder: str | Path,
    out: str | Path,
    *,
    settings: ClassifierTraining | None = None,
    network: ClassifierConfig | None = None,
    synthetic: bool = False,
    run_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    preparation: Preparation = IN_THIS_PROCESS,
    device: torch.device | None = None,
    progress: ProgressCallback = silent,
) -> Detector:
    """Train stage II on the studies with the label positive or negative, over the frozen features of stage I.

    The same call goes on where a former one was interrupted, and returns the result of one that had finished.

    Args:
        studies: the list, best the same as for stage I: then both stages hold out the same patients.
        encoder: file of a detector with a trained encoder.
        out: the detector's file with both stages, written when the training is done.
        settings: of the training.
        network: shape of the classifier; by default as in the encoder's file.
        synthetic: recorded in the model card: every embolism was simulated or inserted.
        run_dir: metrics, curves and checkpoint; ``out`` with the suffix ``.run`` by default.
        cache_dir: features of the studies, 29.5 MB each; ``features`` in the run folder by default.
        preparation: of the features: in how many processes, and in how much space.
        device: the best one by default.
        progress: told after every step of the whole training; may raise ``Cancelled``.

    Raises:
        InputError: if a study cannot be used, there is too little to learn from, the encoder is untrained, or the run
            folder is another's.
    """
    settings = settings or ClassifierTraining()
    device = device or best_device()
    out = Path(out)
    base = Detector.load(encoder).with_precision(settings.precision)
    if base.card.encoder is None:
        raise InputError(f"model {encoder}: its encoder is not trained: train stage I first")
    network = replace(network or base.classifier.config, kind="pooled" if settings.pooled else "convlstm")
    if settings.pooled:
        settings = replace(settings, epochs=1, learning_rate=1e-30)  # the loop only measures: no weight moves by that
    start = Detector.untrained(settings.seed, base.slabs, base.encoder.config, network)
    classifier = start.classifier.to(device)

    usable = [study for study in split(studies, settings) if study.label in LABELS and study.split in SIDES]
    check_labels(usable)
    with TrainingRun(run_folder(out, run_dir), "train classifier", settings.epochs, progress) as run:
        kept = Path(cache_dir or run.folder / "features")
        sources = read_sources(usable, annotations=False, progress=run.report, cache_dir=kept)
        optimiser = torch.optim.Adam(classifier.parameters(), lr=settings.learning_rate)
        more = {"encoder": encoder_key(base), "synthetic": str(synthetic)}
        identity = training_identity(settings, network_shapes(start), sources, more)
        run.resume(identity, classifier, optimiser)
        run.keep_settings((settings,))
        if not run.state.published:
            files = encode_sources(base.to(device), sources, kept, run.report, preparation)
            train, validation = (labelled_studies(usable, files, side) for side in SIDES)
            check_apart(train.files, validation.files)
            if isinstance(classifier, PooledClassifier) and not run.state.history:
                classifier.read_cells_as(base.encoder)
                classifier.fit(*train.pooled_numbers(classifier))

            def score(items: StudyItem, _: torch.Generator | None) -> ItemMetrics:
                return score_studies(classifier, items, settings)

            fit(run, classifier, optimiser, (train, validation), score, settings)
            record_json = training_record(
                run, flat_settings(asdict(settings)), sources, files, device, synthetic=synthetic
            )
            run.publish(record_json, classifier, optimiser)

        record = TrainingRecord.from_json(json.loads(run.state.published))
        classifier.load_state_dict(dict(run.state.best_weights))
        card = ModelCard(out.stem, record.date[:10], encoder=base.card.encoder, classifier=record)
        return published(Detector(base.encoder, classifier, base.slabs, card), device, out)


def split(studies: Sequence[Study], settings: EncoderTraining | ClassifierTraining) -> tuple[Study, ...]:
    """The list with its splits filled, the studies of stage I first.

    So both stages hold out the same patients, whichever is trained, and stage I finds positive and negative studies on
    both sides where that is possible.
    """
    share, seed = settings.validation_fraction, settings.seed
    first = split_studies([study for study in studies if _for_encoder(study)], share, seed)
    decided = {study.study: study for study in first}
    return split_studies([decided.get(study.study, study) for study in studies], share, seed)


def score_slabs(encoder: SlabEncoder, items: SlabItem, settings: EncoderTraining) -> ItemMetrics:
    """How well the encoder judges and looks at a batch of slabs, with the graph for learning from ``loss``.

    ``loss = classification_loss + attention_weight * attention_loss`` (equation (4) of the paper) for every slab; the
    attention loss of a slab with embolism that is not outlined is 0 and left out of its mean.
    ``empty_maps`` and ``pointing`` (the map's maximum lies in the target) are those of slabs with embolism; pointing
    of the outlined ones.
    """
    device = encoder.fc.weight.device
    slabs = items.slab.to(device, memory_format=torch.channels_last, non_blocking=True)
    targets, labels = items.target.to(device), items.label.to(device)
    with autocast(device, settings.precision):
        encoded = encoder(slabs)
    maps = encoder.attention_map(encoded.features)
    classification = F.cross_entropy(encoded.logits, labels, reduction="none", ignore_index=UNKNOWN)
    if settings.attention_loss.kind == "cells":
        attention = cell_loss(encoder.cell_logits(encoded.features), targets, labels)
    else:
        attention = attention_loss(maps, targets, labels, settings.attention_loss)
    # a weight of 0 leaves the attention out of the graph: 0 times an infinite gradient would not be 0
    weighted = settings.attention_weight * attention if settings.attention_weight else 0.0

    flat = maps.detach().flatten(1)
    peak, place = flat.max(1)
    hit = (targets.flatten(1).gather(1, place[:, None])[:, 0] > 0) & (peak > 0)
    undefined = torch.full_like(peak, math.nan)
    outlined = (labels > 0) & (targets >= 0).flatten(1).all(1)
    return {
        "loss": classification + weighted,
        "classification_loss": classification,
        "attention_loss": torch.where((targets >= 0).flatten(1).any(1), attention, undefined),
        "pointing": torch.where(outlined, hit.to(peak.dtype), undefined),
        "empty_maps": torch.where(labels > 0, (peak == 0).to(peak.dtype), undefined),
        "logit": encoded.logits[:, 1] - encoded.logits[:, 0],
        "label": labels,
    }


def score_studies(network: nn.Module, items: StudyItem, settings: ClassifierTraining) -> ItemMetrics:
    """How well a network judges a batch of studies: ``loss`` is the binary cross-entropy of every study."""
    device = next(network.parameters()).device
    labels = items.label.to(device)
    with autocast(device, settings.precision):
        logit = network(items.features.to(device, torch.float32, non_blocking=True))
    loss = F.binary_cross_entropy_with_logits(logit, labels.to(logit.dtype), reduction="none")
    return {"loss": loss, "logit": logit, "label": labels}


def prepared_slabs(
    sources: Sequence[StudySource],
    side: Split,
    config: SlabConfig,
    settings: EncoderTraining,
    cache_dir: Path,
    progress: ProgressCallback,
    preparation: Preparation = IN_THIS_PROCESS,
) -> AnnotatedSlabs:
    """The slabs of one side of the split, drawn as the settings say (``prepare_slabs``)."""
    here = [source for source in sources if source.study.split == side]
    seed = derived_seed(settings.seed, "draw", side)
    windows = settings.augment and settings.augmentation.window_cells > 0
    also = settings.not_outlined != "left_out" and not windows
    judged = settings.decisions == "learned" and side == "train"  # the validation looks at what is known for sure
    negatives = settings.negative_slabs
    try:
        return prepare_slabs(here, config, cache_dir, seed, progress, negatives, preparation, also, judged)
    except InputError as error:
        raise InputError(f"{side} studies: {error}") from error


def labelled_studies(studies: Sequence[Study], files: Sequence[PreparedFile], side: Split) -> StudyFeatures:
    """The files of one side of the split with their studies' labels."""
    here = [
        (file, LABELS.index(study.label)) for study, file in zip(studies, files, strict=True) if study.split == side
    ]
    return StudyFeatures([file for file, _ in here], [label for _, label in here])


def _for_encoder(study: Study) -> bool:
    """Whether stage I can use a study: it has reviewed slices, or all of its slices are negative."""
    return study.annotation is not None or study.label == "negative"


def run_folder(out: Path, run_dir: str | Path | None) -> Path:
    """Where a training lives: beside its result, if nothing else is said."""
    if out.is_dir():  # better said now than after the training
        raise InputError(f"{out}: is a folder: name the file that the model is to be published to")
    return Path(run_dir or out.with_suffix(".run"))


def check_labels(studies: Sequence[Study]) -> None:
    """InputError unless both sides of the split hold both labels."""
    for side in SIDES:
        for label in LABELS:
            if not any(study.split == side and study.label == label for study in studies):
                raise InputError(
                    f"{side} studies: none of {sum(study.split == side for study in studies)} has the label "
                    f"'{label}': stage II needs both labels in training and validation; add studies, or set their split"
                )


def check_apart(train: Sequence[PreparedFile], validation: Sequence[PreparedFile]) -> None:
    """One CT under two names would make the validation worthless."""
    seen = {file.image_sha256: file.study for file in train}
    for file in validation:
        if file.image_sha256 in seen:
            raise InputError(
                f"study {file.study} in validation is the same CT as study {seen[file.image_sha256]} in train: list it "
                "once, or give both the same patient"
            )


def _check_settings(settings: EncoderTraining | ClassifierTraining) -> None:
    if min(settings.batch, settings.epochs) < 1 or settings.workers < 0 or not 0 < settings.learning_rate < math.inf:
        raise InputError(f"batch, epochs and learning_rate must be positive, workers not negative, got {settings}")
    if not 0 < settings.validation_fraction < 1:
        raise InputError(f"validation_fraction must lie between 0 and 1, got {settings.validation_fraction}")
    if settings.precision not in get_args(Precision):
        raise InputError(f"precision must be one of {', '.join(get_args(Precision))}, got {settings.precision!r}")


def training_identity(
    settings: EncoderTraining | ClassifierTraining,
    shapes: Mapping[str, Mapping[str, object]],
    sources: Sequence[StudySource],
    more: Mapping[str, str],
) -> dict[str, str]:
    """What must not change between a training and its continuation, in words or hashes."""
    rows = [
        (*map(str, (row.study, row.patient, row.label, row.split)), source.files_sha256, source.annotation_sha256)
        for source in sources
        for row in (source.study,)
    ]
    return {
        "training": type(settings).__name__,
        **{name: str(value) for name, value in flat_settings(asdict(settings)).items()},
        **{name: json.dumps(shape) for name, shape in shapes.items()},
        "studies": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        **more,
    }


def network_shapes(detector: Detector) -> dict[str, Mapping[str, object]]:
    """The settings that rebuild a detector's networks, by name."""
    return {
        "slabs": asdict(detector.slabs),
        "encoder shape": asdict(detector.encoder.config),
        "classifier shape": asdict(detector.classifier.config),
    }


def training_record(
    run: TrainingRun,
    settings: Mapping[str, str | int | float | bool | None],
    sources: Sequence[StudySource],
    files: Sequence[PreparedFile],
    device: torch.device,
    *,
    synthetic: bool,
    terms: Sequence[str] = (),
) -> str:
    """What the model card says of this training, as JSON; ``terms`` are those of a model that it started from."""
    studies = [source.study for source in sources]
    states = [[reviewed.state for reviewed in source.reviewed or ()] for source in sources]
    positive = [
        source.study.label == "positive" or "embolism" in seen for source, seen in zip(sources, states, strict=True)
    ]
    record = TrainingRecord(
        studies=len(sources),
        positive=sum(positive),
        annotated_slices=sum(state != "uncertain" for seen in states for state in seen),
        terms=tuple(sorted({*terms, *(f"{study.source}: {study.terms}" for study in studies if study.terms)})),
        not_outlined_slices=sum(reviewed.not_outlined for source in sources for reviewed in source.reviewed or ()),
        synthetic=synthetic,
        epochs=len(run.state.history),
        best_epoch=run.state.best_epoch,
        seconds=round(run.state.seconds, 1),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        date=utc_now(),
        git_revision=git_revision(),
        settings=settings,
        metrics={
            name: value
            for name, value in run.state.best.items()
            if name not in ("epoch", "waiting") and math.isfinite(value)
        },
        image_sha256=tuple(sorted({file.image_sha256 for file in files})),
        patient_sha256=tuple(sorted({patient_sha256(source.study) for source in sources if source.study.patient})),
    )
    return json.dumps(asdict(record))


def published(detector: Detector, device: torch.device, out: Path) -> Detector:
    """The detector, in its file: written, by the main process, unless the file holds it already."""

    def write() -> None:
        with suppress(InputError):
            if Detector.load(out).card == detector.card:  # down to the second of its date and every figure
                return
        detector.save(out)

    distributed.from_main(write)
    return detector.to(device)


def flat_settings(settings: Mapping[str, object], prefix: str = "") -> dict[str, str | int | float | bool | None]:
    """Settings within settings as one level: ``attention_loss.kind``."""
    flat: dict[str, str | int | float | bool | None] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(flat_settings(value, f"{prefix}{name}."))
        elif value is None or isinstance(value, (str, int, float)):
            flat[prefix + name] = value
        else:
            raise TypeError(f"setting {prefix}{name} must be a JSON scalar, got {value!r}")
    return flat
