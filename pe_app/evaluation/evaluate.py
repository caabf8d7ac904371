"""How good are models on studies they have never seen? Every study is detected once; all figures come from that.

Detections are appended to a file as they are made, so that an interrupted evaluation goes on; whatever needs the truth
(labels, masks, reviewed slices) is computed anew every time, since readers go on too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pe_app.common.errors import InputError
from pe_app.common.progress import Cancelled, Progress, ProgressCallback, silent
from pe_app.ct.lungs import lung_range
from pe_app.ct.slabs import SlabConfig, study_slabs
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_volume
from pe_app.evaluation.localisation import (
    CellTruth,
    FrocPoint,
    cell_truth,
    centred_gaussian,
    froc,
    mean_mask,
)
from pe_app.evaluation.predictions import Analysis, PredictionFile
from pe_app.evaluation.roc import (
    Auc,
    AucDifference,
    Calibration,
    OperatingPoint,
    at_specificity,
    auc,
    calibration,
    compare_aucs,
    operating_point,
    proportion,
)
from pe_app.evaluation.study_localisation import (
    FROC_DISTANCES_MM,
    Look,
    StudyLocalisation,
    StudyTruth,
    localise,
    read_truth,
)
from pe_app.model.detector import Decision, Detector, ModelCard
from pe_app.studies import Study, patient_sha256

logger = logging.getLogger(__name__)

SPECIFICITIES = (0.8, 0.9, 0.95)
"""Specificities at which sensitivity is stated."""

SPACING_STEPS_MM = (1.0, 2.0, 3.0)
"""Bounds between the strata of slice spacing."""

MEAN_MASK_STUDIES = 100
"""So many training studies tell where emboli usually lie; more only cost time."""

MODEL, GAUSSIAN, MEAN_MASK, UNTRAINED = "model", "centred Gaussian", "mean training mask", "untrained network"

Status = Literal["analysed", "refused", "unreadable", "failed", "duplicate"]


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated beside the necessary.

    Attributes:
        untrained_baseline: also detect every study with random weights of the same size, the third baseline.
        allow_training_studies: evaluate on studies that a model was trained on; the result says so loudly.
        seed: of the bootstrap and of the choice of pictures.
        resamples: bootstrap samples of studies.
    """

    untrained_baseline: bool = False
    allow_training_studies: bool = False
    seed: int = 0
    resamples: int = 1000


@dataclass(frozen=True)
class Cohort:
    """The studies of a list that can be judged.

    Attributes:
        studies: labelled positive or negative, in the list's order.
        listed: studies in the list.
        split: ``test`` where the list marks any study so and only these are taken, else "" for all.
        uncertain: left out (of that split) because their label is uncertain.
        unknown: left out because they have no label.
    """

    studies: tuple[Study, ...]
    listed: int
    split: Literal["test", ""]
    uncertain: int
    unknown: int


@dataclass(frozen=True, eq=False)
class Prediction:
    """What one model made of one study.

    Attributes:
        study: its row of the list.
        status: only ``analysed`` studies enter the figures.
        reason: why it was not analysed, or why its mask was not used; "" where all went well.
        image_sha256: of its voxels; "" where the study was not read.
        probability: None unless analysed.
        slice_spacing_mm: None where the study was not read.
        weak_contrast: whether the quality check found its contrast weak.
        localisation: by system: the model and the baselines; empty unless analysed.
    """

    study: Study
    status: Status
    reason: str = ""
    image_sha256: str = ""
    probability: float | None = None
    slice_spacing_mm: float | None = None
    weak_contrast: bool = False
    localisation: Mapping[str, StudyLocalisation] = field(default_factory=dict)

    @property
    def positive(self) -> bool:
        """The label."""
        return self.study.label == "positive"


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class FrocCurve:
    """FROC at one distance."""

    distance_mm: float
    points: tuple[FrocPoint, ...]


@dataclass(frozen=True)
class Localisation:
    """Where a system looks, over all studies. None where there is nothing to judge it on.

    Attributes:
        system: the model or a baseline.
        studies: positive studies with a mask.
        slabs: their slabs with embolism.
        pointing_study, key_slice_hit_3: shares of these studies, with Wilson intervals.
        pointing_slab, energy_inside: means over the slabs; intervals by bootstrap over studies.
        froc: one curve a distance, on ``froc_studies`` with ``emboli`` emboli in all.
        map_mass_negatives: mean attention on negative studies, lower is better.
    """

    system: str
    studies: int
    slabs: int
    pointing_study: Estimate | None
    pointing_slab: Estimate | None
    energy_inside: Estimate | None
    key_slice_hit_3: Estimate | None
    froc: tuple[FrocCurve, ...]
    froc_studies: int
    emboli: int
    map_mass_negatives: Estimate | None


@dataclass(frozen=True)
class Sensitivity:
    """The operating point that reaches a specificity with the highest sensitivity."""

    specificity: float
    point: OperatingPoint


@dataclass(frozen=True)
class Discrimination:
    """How well probabilities tell positive from negative studies."""

    auc: Auc
    operating_point: OperatingPoint
    at_specificity: tuple[Sensitivity, ...]
    calibration: Calibration


@dataclass(frozen=True)
class Stratum:
    """A part of the studies; ``discrimination`` is None with fewer than 2 studies of either kind."""

    group: str
    name: str
    studies: int
    positive: int
    discrimination: Discrimination | None


@dataclass(frozen=True, eq=False)
class ModelEvaluation:
    """Everything found about one model.

    Attributes:
        file: the model file.
        name: how page and tables call it, unique among the evaluated models.
        card: who it is.
        sha256: of the file.
        decision: its threshold and temperature.
        predictions: one a study of the cohort.
        discrimination: None with fewer than 2 analysed studies of either kind.
        strata: by slice spacing, contrast and label source (reviewed slices, or a study label alone), where several are
            known.
        localisation: the model first, then the baselines.
        training_studies: evaluated studies that it was trained on; empty unless that was allowed.
        notes: in words, what could not be computed and why, and what to keep in mind.
    """

    file: Path
    name: str
    card: ModelCard
    sha256: str
    decision: Decision
    predictions: tuple[Prediction, ...]
    discrimination: Discrimination | None
    strata: tuple[Stratum, ...]
    localisation: tuple[Localisation, ...]
    training_studies: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def analysed(self) -> tuple[Prediction, ...]:
        """The studies that enter the figures."""
        return tuple(prediction for prediction in self.predictions if prediction.status == "analysed")

    @property
    def truth(self) -> NDArray[np.bool_]:
        """``(analysed,)``, the labels."""
        return np.array([prediction.positive for prediction in self.analysed], dtype=bool)

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """``(analysed,)``."""
        return np.array([prediction.probability for prediction in self.analysed], dtype=np.float64)


@dataclass(frozen=True)
class Comparison:
    """Two models on the studies that both analysed; None with fewer than 2 of either kind."""

    first: str
    second: str
    studies: int
    difference: AucDifference | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of ``evaluate``."""

    cohort: Cohort
    settings: EvaluationSettings
    models: tuple[ModelEvaluation, ...]
    comparisons: tuple[Comparison, ...]


def evaluate(
    studies: Sequence[Study],
    models: Sequence[str | Path],
    out: str | Path,
    masks: str | Path | None = None,
    settings: EvaluationSettings | None = None,
    progress: ProgressCallback = silent,
) -> Evaluation:
    """Judge models on the test studies of a list (or on all labelled ones where none is marked as test).

    Args:
        studies: the list; its training split, where masks are known, gives the mean mask.
        models: model files, each another one.
        out: detections are kept in ``out/predictions.jsonl`` and not made again.
        masks: folder of ``ID.nrrd``, the emboli of whole studies; a study without one there is judged on its
            annotation's reviewed slices.
        settings: options.
        progress: told after every step; may raise ``Cancelled``, and the next call goes on.

    Raises:
        InputError: if no study can be judged, a model is given twice, or a study was used to train a model.
    """
    settings = settings or EvaluationSettings()
    paths, out, masks = [Path(model) for model in models], Path(out), Path(masks) if masks is not None else None
    cohort = choose_cohort(studies)
    detectors = [Detector.load(path) for path in paths]
    identities = [detector.sha256 for detector in detectors]
    if len(set(identities)) < len(identities):
        raise InputError("the same model is given twice: name every model file once")
    images, failures = _identify(cohort.studies, progress)
    leaks = [_training_studies(detector, cohort.studies, images) for detector in detectors]
    if not settings.allow_training_studies:
        _refuse_training_studies(leaks, paths)

    store = PredictionFile(out / "predictions.jsonl")
    training = [study for study in studies if study.split == "train" and study.label == "positive"]
    configs = {detector.slabs for detector in detectors}
    priors = {config: _mean_masks(training, config, masks, progress) for config in configs}
    systems = [_System(detector, store, priors[detector.slabs], settings.untrained_baseline) for detector in detectors]
    found: list[list[Prediction]] = [[] for _ in systems]
    total = len(cohort.studies) * len(systems)
    for number, study in enumerate(cohort.studies):
        opened = _OpenStudy(study, masks)
        for place, system in enumerate(systems):
            done = number * len(systems) + place
            if study.study in failures:
                prediction = failures[study.study]
            else:
                report = _inside("detect", done, total, study.study, progress)
                prediction = system.predict(opened, images[study.study], report)
            found[place].append(prediction)
    progress(Progress("detect", total, total))

    evaluations = tuple(
        _summary(path, name, detector, tuple(predictions), leak, settings)
        for path, name, detector, predictions, leak in zip(paths, _names(paths), detectors, found, leaks, strict=True)
    )
    pairs = tuple(_compare(first, second) for first, second in combinations(evaluations, 2))
    return Evaluation(cohort, settings, evaluations, pairs)


def choose_cohort(studies: Sequence[Study]) -> Cohort:
    """The studies to judge: of split ``test`` where any are marked, labelled positive or negative.

    Raises:
        InputError: if there is none.
    """
    split: Literal["test", ""] = "test" if any(study.split == "test" for study in studies) else ""
    taken = [study for study in studies if not split or study.split == split]
    labelled = tuple(study for study in taken if study.label in ("positive", "negative"))
    if not labelled:
        where = "of split 'test' " if split else ""
        raise InputError(f"none of the {len(taken)} studies {where}is labelled positive or negative: fill in labels")
    uncertain = sum(study.label == "uncertain" for study in taken)
    return Cohort(labelled, len(studies), split, uncertain, len(taken) - len(labelled) - uncertain)


class _OpenStudy:
    """A study whose CT and truth are read when first needed, and once."""

    def __init__(self, study: Study, masks: Path | None) -> None:
        self.study = study
        self._masks = masks
        self.note = ""

    @cached_property
    def volume(self) -> Volume:
        return read_volume(self.study.path)

    @cached_property
    def truth(self) -> StudyTruth | None:
        known = self._masks is not None and (self._masks / f"{self.study.study}.nrrd").is_file()
        if self.study.label != "positive" or not (known or self.study.annotation):
            return None
        try:
            return read_truth(self.study, self.volume, self._masks)
        except (InputError, OSError) as error:
            self.note = f"mask not used: {error}"
            return None


class _System:
    """A model with its baselines."""

    def __init__(
        self, detector: Detector, store: PredictionFile, prior: NDArray[np.float64] | None, untrained: bool
    ) -> None:
        self._detector, self._store = detector, store
        config = detector.slabs
        self._priors = {GAUSSIAN: centred_gaussian((config.slab_count, config.grid, config.grid))}
        if prior is not None:
            self._priors[MEAN_MASK] = prior
        self._untrained: Detector | None = None
        if untrained:
            random = Detector.untrained(0, config, detector.encoder.config, detector.classifier.config)
            self._untrained = random.to(detector.device)

    def predict(self, opened: _OpenStudy, image_sha256: str, progress: ProgressCallback) -> Prediction:
        """What the model and its baselines make of one study; whatever goes wrong is the study's, not the run's."""
        try:
            analysis = self._analysis(self._detector, opened, image_sha256, progress)
            detection, maps, grid = analysis.detection, analysis.maps, analysis.grid
            spacing = detection.image.spacing_mm[0]
            if maps is None or grid is None:
                reason = "; ".join(f"{entry.code}: {entry.message}" for entry in detection.reasons if entry.refuses)
                return Prediction(opened.study, "refused", reason, image_sha256, slice_spacing_mm=spacing)
            looks = {MODEL: Look.of_model(detection, maps, grid)}
            looks |= {name: Look.of_prior(prior, grid) for name, prior in self._priors.items()}
            if self._untrained:
                random = self._analysis(self._untrained, opened, image_sha256, progress)
                if random.maps is not None:
                    looks[UNTRAINED] = Look.of_model(random.detection, random.maps, grid)
            localisation = {name: localise(look, opened.study, opened.truth) for name, look in looks.items()}
        except Cancelled:
            raise
        except (ValueError, OSError, RuntimeError) as error:
            logger.warning("%s: not analysed: %s", opened.study.study, error)
            return Prediction(opened.study, "failed", str(error), image_sha256)
        weak = any(entry.code == "weak_contrast" for entry in detection.reasons)
        return Prediction(
            opened.study, "analysed", opened.note, image_sha256, detection.probability, spacing, weak, localisation
        )

    def _analysis(
        self, detector: Detector, opened: _OpenStudy, image_sha256: str, progress: ProgressCallback
    ) -> Analysis:
        kept = self._store.get(detector.sha256, image_sha256)
        return kept or self._store.add(detector.detect(opened.volume, progress))


def _identify(
    studies: Sequence[Study], progress: ProgressCallback
) -> tuple[Mapping[str, str], Mapping[str, Prediction]]:
    """SHA-256 of every study's voxels; and the studies that cannot be read or are another one's copy.

    Before any detection, so that a study of the training set is noticed at once and not after hours.
    """
    images: dict[str, str] = {}
    failures: dict[str, Prediction] = {}
    first: dict[str, str] = {}
    for number, study in enumerate(studies):
        progress(Progress("identify the studies", number, len(studies), study.study))
        try:
            sha256 = read_volume(study.path).sha256
        except (ValueError, OSError, RuntimeError) as error:
            failures[study.study] = Prediction(study, "unreadable", str(error))
            continue
        twin = first.setdefault(sha256, study.study)
        if twin != study.study:
            reason = f"the same image as study {twin}; counted once"
            failures[study.study] = Prediction(study, "duplicate", reason, sha256)
        images[study.study] = sha256
    progress(Progress("identify the studies", len(studies), len(studies)))
    return images, failures


def _training_studies(detector: Detector, studies: Sequence[Study], images: Mapping[str, str]) -> tuple[str, ...]:
    """Studies whose image, or another study of whose patient, the model was trained on."""
    records = [record for record in (detector.card.encoder, detector.card.classifier) if record is not None]
    seen = {sha256 for record in records for sha256 in record.image_sha256}
    patients = {sha256 for record in records for sha256 in record.patient_sha256}
    return tuple(
        study.study for study in studies if images.get(study.study) in seen or patient_sha256(study) in patients
    )


def _refuse_training_studies(leaks: Sequence[tuple[str, ...]], models: Sequence[Path]) -> None:
    for leak, model in zip(leaks, models, strict=True):
        if leak:
            others = f" and {len(leak) - 1} more" if len(leak) > 1 else ""
            raise InputError(
                f"study {leak[0]}{others}: model {model.name} was trained on this image or patient, so its figures "
                "would flatter it: mark other studies as test in the study list, or give --allow-training-studies to "
                "see them anyway"
            )


def _mean_masks(
    training: Sequence[Study], config: SlabConfig, masks: Path | None, progress: ProgressCallback
) -> NDArray[np.float64] | None:
    """The mean mask of the training studies whose emboli are known; None where there are none."""
    known: list[CellTruth] = []
    for number, study in enumerate(training):
        if len(known) == MEAN_MASK_STUDIES:
            break
        progress(Progress("mean training mask", number, len(training), study.study))
        try:
            opened = _OpenStudy(study, masks)
            if opened.truth is not None:
                slabs = study_slabs(opened.volume, lung_range(opened.volume), config)
                cells = np.zeros((config.slab_count, config.grid, config.grid), np.float32)
                known.append(cell_truth(slabs.to_volume(cells), opened.truth.mask, opened.truth.reviewed))
        except (ValueError, OSError, RuntimeError) as error:
            logger.warning("%s: not in the mean training mask: %s", study.study, error)
    if training:
        progress(Progress("mean training mask", len(training), len(training)))
    return mean_mask(known) if known else None


def _summary(
    file: Path,
    name: str,
    detector: Detector,
    predictions: tuple[Prediction, ...],
    training_studies: tuple[str, ...],
    settings: EvaluationSettings,
) -> ModelEvaluation:
    analysed = [prediction for prediction in predictions if prediction.status == "analysed"]
    systems = list(dict.fromkeys(system for prediction in analysed for system in prediction.localisation))
    localisation = tuple(_localisation(system, analysed, settings) for system in systems)
    threshold = detector.decision.threshold
    figures = _discrimination(analysed, threshold)
    notes = _notes(analysed, figures, localisation)
    card, sha256 = detector.card, detector.sha256
    return ModelEvaluation(
        file,
        name,
        card,
        sha256,
        detector.decision,
        predictions,
        figures,
        _strata(analysed, threshold),
        localisation,
        training_studies,
        notes,
    )


def _discrimination(analysed: Sequence[Prediction], threshold: float) -> Discrimination | None:
    truth = np.array([prediction.positive for prediction in analysed], dtype=bool)
    if truth.sum() < 2 or (~truth).sum() < 2:
        return None
    scores = np.array([prediction.probability for prediction in analysed], dtype=np.float64)
    return Discrimination(
        auc(truth, scores, patients=_patients(analysed)),
        operating_point(truth, scores, threshold),
        tuple(Sensitivity(wanted, at_specificity(truth, scores, wanted)) for wanted in SPECIFICITIES),
        calibration(truth, scores),
    )


def _patients(analysed: Sequence[Prediction]) -> list[str] | None:
    """Patients of the studies, where some have several studies and there are at least two patients."""
    known = [prediction.study.patient or f"study {prediction.study.study}" for prediction in analysed]
    return known if 1 < len(set(known)) < len(known) else None


def _strata(analysed: Sequence[Prediction], threshold: float) -> tuple[Stratum, ...]:
    groups: dict[str, dict[str, list[Prediction]]] = {"slice spacing": {}, "contrast": {}, "label source": {}}
    for prediction in sorted(analysed, key=lambda prediction: prediction.slice_spacing_mm or 0.0):
        spacing = _spacing_stratum(prediction.slice_spacing_mm or 0.0)
        groups["slice spacing"].setdefault(spacing, []).append(prediction)
        contrast = "weak (by the quality check)" if prediction.weak_contrast else "good (by the quality check)"
        groups["contrast"].setdefault(contrast, []).append(prediction)
        kind = "study label and reviewed slices" if prediction.study.annotation else "study label only"
        groups["label source"].setdefault(kind, []).append(prediction)
    groups.update(_attribute_groups(analysed))
    return tuple(
        Stratum(
            group, name, len(members), sum(member.positive for member in members), _discrimination(members, threshold)
        )
        for group, parts in groups.items()
        if len(parts) > 1 or group == "slice spacing"
        for name, members in parts.items()
    )


def _attribute_groups(analysed: Sequence[Prediction]) -> dict[str, dict[str, list[Prediction]]]:
    """The studies by the attributes of the list; none for what it does not know.

    What describes an embolism splits the positive studies, each part against all negative ones.
    """
    groups: dict[str, dict[str, list[Prediction]]] = {}
    negative = [prediction for prediction in analysed if not prediction.positive]
    for heading, attribute, of_emboli in _ATTRIBUTE_GROUPS:
        parts: dict[str, list[Prediction]] = {}
        for prediction in analysed:
            study = prediction.study
            value = study.source if attribute == "source" else str(getattr(study.attributes, attribute))
            if prediction.positive or not of_emboli:
                parts.setdefault(value or "not known", []).append(prediction)
        if set(parts) - {"not known"}:
            alike = negative if of_emboli else []
            groups[heading] = {value: [*parts[value], *alike] for value in sorted(parts)}
    return groups


_ATTRIBUTE_GROUPS = (
    ("data set", "source", False),
    ("central embolism", "central", True),
    ("side of the embolism", "side", True),
    ("acute or chronic", "chronicity", True),
    ("RV/LV ratio", "rv_lv", True),
    ("image quality (by the list)", "quality", False),
    ("mimics", "mimic", False),
)
"""Heading, attribute of the study list, whether it describes an embolism."""


def _spacing_stratum(spacing_mm: float) -> str:
    place = int(np.searchsorted(SPACING_STEPS_MM, round(spacing_mm, 3)))
    if place == 0:
        return f"up to {SPACING_STEPS_MM[0]:g} mm"
    if place == len(SPACING_STEPS_MM):
        return f"above {SPACING_STEPS_MM[-1]:g} mm"
    return f"above {SPACING_STEPS_MM[place - 1]:g} to {SPACING_STEPS_MM[place]:g} mm"


def _localisation(system: str, analysed: Sequence[Prediction], settings: EvaluationSettings) -> Localisation:
    found = [prediction.localisation[system] for prediction in analysed]
    masked = [entry for entry in found if entry.pointing is not None]
    hits = [entry.pointing for entry in masked if entry.pointing is not None]
    keys = [float(entry.key_slice) for entry in masked if entry.key_slice is not None]
    outcomes = [entry.candidates for entry in found if entry.candidates is not None]
    emboli = sum(len(outcome[0].embolus_scores) for outcome in outcomes)
    curves = tuple(
        FrocCurve(
            distance, froc([outcome[k] for outcome in outcomes], seed=settings.seed, resamples=settings.resamples)
        )
        for k, distance in enumerate(FROC_DISTANCES_MM)
        if emboli
    )
    return Localisation(
        system=system,
        studies=len(masked),
        slabs=sum(len(entry.energy) for entry in masked),
        pointing_study=_share(hits),
        pointing_slab=_clustered_mean([entry.pointing_slabs for entry in masked], settings),
        energy_inside=_clustered_mean([entry.energy for entry in masked], settings),
        key_slice_hit_3=_share(keys),
        froc=curves,
        froc_studies=len(outcomes) if emboli else 0,
        emboli=emboli,
        map_mass_negatives=_clustered_mean(
            [np.array([entry.mass]) for entry in found if entry.mass is not None], settings
        ),
    )


def _share(hits: Sequence[float]) -> Estimate | None:
    """Share of hits with its Wilson interval; ties count in parts, for the interval they are rounded."""
    if not hits:
        return None
    interval = proportion(round(sum(hits)), len(hits))
    return Estimate(sum(hits) / len(hits), interval.low, interval.high)


def _clustered_mean(values: Sequence[NDArray[np.float64]], settings: EvaluationSettings) -> Estimate | None:
    """Mean over all values; 95% interval by resampling whole studies, because slabs of one study are alike."""
    sums, counts = np.array([part.sum() for part in values]), np.array([len(part) for part in values])
    if counts.sum() == 0:
        return None
    rng = np.random.default_rng(settings.seed)
    weights = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), settings.resamples)
    totals = weights @ counts
    means = (weights @ sums)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high))


def _notes(
    analysed: Sequence[Prediction], figures: Discrimination | None, localisation: Sequence[Localisation]
) -> tuple[str, ...]:
    positive = sum(prediction.positive for prediction in analysed)
    negative = len(analysed) - positive
    counts = f"{positive} positive and {negative} negative studies were analysed"
    notes = []
    if figures is None:
        notes.append(f"{counts}: AUC, operating points and calibration need at least 2 of either kind.")
    elif min(positive, negative) < 20:
        notes.append(f"Only {counts}: DeLong intervals of so few are too narrow; do not rely on them.")
    patients = {prediction.study.patient for prediction in analysed}
    if len(analysed) > 1 and len(patients) == 1 and "" not in patients:
        notes.append(
            f"All {len(analysed)} studies are of one patient: intervals are those of this patient's studies and say "
            "nothing about another one."
        )
    elif 1 < len(patients) < len(analysed):
        notes.append(
            f"The {len(analysed)} studies are of {len(patients)} patients: AUC intervals take that into account "
            "(Obuchowski); those of accuracy, sensitivity and specificity do not and are too narrow."
        )
    own = next((entry for entry in localisation if entry.system == MODEL), None)
    if own is None or own.studies == 0:
        notes.append("No mask of a positive study is known: where the model looks could not be judged.")
    elif not own.froc:
        notes.append("Only single slices are outlined: FROC needs masks of whole studies (a folder masks/ID.nrrd).")
    if own is not None and own.studies and not any(entry.system == MEAN_MASK for entry in localisation):
        notes.append("No study of split 'train' with a known mask: there is no mean training mask to compare with.")
    if own is not None and 0 < own.studies < positive:
        notes.append(f"Where the model looks is judged on the {own.studies} of {positive} positive studies with masks.")
    unused = [prediction.study.study for prediction in analysed if prediction.reason]
    if unused:
        notes.append(f"The masks of {len(unused)} studies could not be used: {', '.join(unused[:10])}.")
    return tuple(notes)


def _compare(first: ModelEvaluation, second: ModelEvaluation) -> Comparison:
    """Paired over the studies that both analysed."""
    other = {prediction.study.study: prediction.probability for prediction in second.analysed}
    shared = [prediction for prediction in first.analysed if prediction.study.study in other]
    if _discrimination(shared, first.decision.threshold) is None:
        return Comparison(first.name, second.name, len(shared), None)
    difference = compare_aucs(
        [prediction.positive for prediction in shared],
        np.array([prediction.probability for prediction in shared], dtype=np.float64),
        np.array([other[prediction.study.study] for prediction in shared], dtype=np.float64),
        patients=_patients(shared),
    )
    return Comparison(first.name, second.name, len(shared), difference)


def _names(models: Sequence[Path]) -> list[str]:
    """File names without ending; with their folder, or a number, where these are alike."""
    names = [path.stem for path in models]
    if len(set(names)) < len(names):
        names = [f"{path.resolve().parent.name}/{path.stem}" for path in models]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, start=1)]
    return names


def _inside(task: str, done: int, total: int, study: str, progress: ProgressCallback) -> ProgressCallback:
    """Reports of one study's detection as part of the whole task."""
    return lambda part: progress(Progress(task, done, total, f"{study}: {part.task} {part.done}/{part.total}"))
