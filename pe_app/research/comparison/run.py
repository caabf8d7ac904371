"""Training every system with every seed and asking it about the test studies; whatever is finished is kept."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from sklearn.metrics import roc_auc_score

from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.common.schema import read_as
from pe_app.ct.lungs import lung_range
from pe_app.ct.slabs import SlabConfig, study_slabs
from pe_app.ct.volume_io import read_volume
from pe_app.evaluation.localisation import CellTruth, cell_truth, pointing_game
from pe_app.evaluation.study_localisation import read_truth
from pe_app.model.detector import Detector
from pe_app.model.slab_encoder import EncoderConfig, normalised
from pe_app.model.study_classifier import ClassifierConfig
from pe_app.research.baselines.slab_pooling import maximum_of_slabs, mean_of_slabs
from pe_app.research.baselines.training import (
    cnn3d_probabilities,
    penet_probabilities,
    prepare_cnn3d,
    prepare_penet,
    train_cnn3d,
    train_penet,
)
from pe_app.research.comparison.systems import REFERENCE, SYSTEMS, Plan, System, core_studies
from pe_app.studies import Study
from pe_app.training.datasets import AnnotatedSlabs, StudySource, encode_sources, read_sources
from pe_app.training.fine_tuning import train_end_to_end
from pe_app.training.stages import (
    LABELS,
    SIDES,
    EncoderTraining,
    prepared_slabs,
    split,
    train_classifier,
    train_encoder,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What one system with one seed says of the test studies.

    Attributes:
        system, seed: which.
        studies, labels: the test studies and whether they are positive.
        probabilities: of each.
        pointing: whether the attention's maximum lies on an embolism, of positive studies with a mask; None otherwise.
        slab_auc: of the slab probabilities, slabs with embolism against those of negative studies; None without slabs.
        parameters: of the network or of both stages.
        training_studies: studies of both sides of the split that it learned from.
        seconds: spent on training it, shared stages included.
    """

    system: str
    seed: int
    studies: tuple[str, ...]
    labels: tuple[bool, ...]
    probabilities: tuple[float, ...]
    pointing: tuple[float | None, ...]
    slab_auc: float | None
    parameters: int
    training_studies: int
    seconds: float

    @classmethod
    def from_json(cls, payload: object) -> Outcome:
        """The outcome that ``asdict`` and JSON made."""
        return read_as(_OUTCOME, payload)


_OUTCOME = TypeAdapter(Outcome)


def compare(
    studies: Sequence[Study],
    out: Path,
    systems: Sequence[System] = SYSTEMS,
    plan: Plan | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    masks: Path | None = None,
    synthetic: bool = False,
    progress: ProgressCallback = silent,
) -> tuple[Outcome, ...]:
    """Train every system with every seed from one split and ask each about the test studies.

    The same call goes on where a former one was interrupted. Encoders that systems share are trained once; features
    are kept only as long as a system needs them.

    Args:
        studies: the list; some must be of split "test", other empty splits are filled.
        out: folder of the comparison.
        systems: rows, the reference among them.
        plan: shapes and trainings that all share.
        seeds: one training of each system with each; calls with different seeds, or with systems that share no encoder,
            may fill a folder at the same time.
        masks: folder of ``ID.nrrd``, emboli of whole studies.
        synthetic: recorded in the models: every embolism was simulated or inserted.
        progress: told after every step; may raise ``Cancelled``.

    Raises:
        InputError: if the test studies lack a label, or ``out`` holds another comparison.
    """
    plan = plan or Plan()
    filled = split(studies, EncoderTraining(validation_fraction=plan.encoder.validation_fraction))
    test = [study for study in filled if study.split == "test" and study.label in ("positive", "negative")]
    if min(sum(study.label == label for study in test) for label in ("positive", "negative")) < 2:
        raise InputError("a comparison needs at least 2 positive and 2 negative studies of split 'test' in the list")
    _check_same(out, filled, plan)

    outcomes = []
    total = len(systems) * len(seeds)
    for round_number, seed in enumerate(seeds):
        bench = _Bench(filled, test, out, seed, masks, synthetic, progress)
        for number, system in enumerate(systems):
            progress(Progress("compare", round_number * len(systems) + number, total, f"seed {seed}: {system.title}"))
            outcomes.append(bench.outcome(system, system.change(plan).seeded(seed)))
            bench.forget_features([system.change(plan).seeded(seed) for system in systems[number + 1 :]])
    progress(Progress("compare", total, total))
    return tuple(outcomes)


def finished(out: Path) -> tuple[Outcome, ...]:
    """All outcomes that a folder holds, by seed, whichever calls made them."""
    paths = sorted(out.glob("seed*/*/outcome.json"))
    outcomes = [Outcome.from_json(json.loads(path.read_text())) for path in paths]
    return tuple(sorted(outcomes, key=lambda outcome: outcome.seed))


class _Bench:
    """One seed: trains, asks, keeps."""

    def __init__(
        self,
        studies: Sequence[Study],
        test: Sequence[Study],
        out: Path,
        seed: int,
        masks: Path | None,
        synthetic: bool,
        progress: ProgressCallback,
    ) -> None:
        self._studies, self._test, self._out, self._seed = studies, test, out, seed
        self._masks, self._synthetic, self._progress = masks, synthetic, progress
        self._folder, self._cache = out / f"seed{seed}", out / "cache"
        self._test_sources: tuple[StudySource, ...] | None = None
        self._used: set[str] = set()

    def outcome(self, system: System, plan: Plan) -> Outcome:
        """What is kept of a system, or trained and asked now."""
        path = self._folder / system.name / "outcome.json"
        if path.is_file():
            return Outcome.from_json(json.loads(path.read_text()))
        match system.kind:
            case "PENet":
                outcome = self._penet(system, plan)
            case "3D CNN":
                outcome = self._cnn3d(system, plan)
            case _:
                outcome = self._two_stages(system, plan)
        write_durably(path, json.dumps(asdict(outcome), allow_nan=False))
        return outcome

    def forget_features(self, coming: Sequence[Plan]) -> None:
        """Delete the features that no coming system needs: 29.5 MB a study and encoder at full size.

        Those of other calls, which may fill the same folder with other systems, stay.
        """
        for name in self._used - {_encoder_name(plan) for plan in coming}:
            shutil.rmtree(self._folder / f"features-{name}", ignore_errors=True)

    def _two_stages(self, system: System, plan: Plan) -> Outcome:
        """Both stages, or stage I alone where slab probabilities are pooled."""
        self._used.add(_encoder_name(plan))
        encoder = self._folder / f"encoder-{_encoder_name(plan)}.safetensors"
        core = core_studies(self._studies)
        detector = train_encoder(
            core, encoder, settings=plan.encoder, slabs=plan.slabs, network=plan.network,
            classifier=_classifier_config(replace(plan, directions="parallel")), slabs_dir=self._cache / "slabs",
            synthetic=self._synthetic, progress=self._progress,
        )  # fmt: skip
        features = self._folder / f"features-{_encoder_name(plan)}"
        learned: Sequence[Study] = core
        if system.kind in ("two stages", "end to end"):
            learned = self._studies if plan.label_only else core
            name = system.name if system.kind == "two stages" else REFERENCE
            model = self._folder / name / "model.safetensors"
            detector = train_classifier(
                learned, encoder, model, settings=plan.classifier, network=_classifier_config(plan),
                synthetic=self._synthetic, cache_dir=features, progress=self._progress,
            )  # fmt: skip
            seconds = _seconds(detector)
            if system.kind == "end to end":
                detector = train_end_to_end(
                    learned, model, self._folder / system.name / "model.safetensors", settings=plan.fine_tuning,
                    synthetic=self._synthetic, cache_dir=self._cache / "studies", progress=self._progress,
                )  # fmt: skip
                seconds += detector.card.classifier.seconds if detector.card.classifier else 0.0
                features = self._folder / system.name / "features"
        else:
            seconds = _seconds(detector)
        asked = self._ask(detector, system, features)
        if system.kind == "end to end":
            shutil.rmtree(features)
        parameters = sum(value.numel() for value in detector.encoder.parameters())
        if system.kind in ("two stages", "end to end"):
            parameters += sum(value.numel() for value in detector.classifier.parameters())
        return self._made(system, asked, parameters, learned, seconds)

    def _penet(self, system: System, plan: Plan) -> Outcome:
        core = [study for study in core_studies(self._studies) if study.split in SIDES]
        sources = read_sources(core, progress=self._progress)
        train, validation = (
            prepared_slabs(sources, side, plan.slabs, plan.encoder, self._cache / "slabs", self._progress)
            for side in SIDES
        )
        planes = self._cache / "planes"
        run = self._folder / system.name / "run"
        epochs = self._epochs(plan, train, len(train) * plan.penet.slices)
        settings = plan.baseline(plan.window_batch, epochs)
        network = train_penet(sources, (train, validation), run, settings, plan.penet, planes, self._progress)
        files = prepare_penet(self._tested(), plan.penet, planes, self._progress)
        found = _Asked(penet_probabilities(network, files, self._progress))
        return self._made(system, found, sum(p.numel() for p in network.parameters()), core, _run_seconds(run))

    def _cnn3d(self, system: System, plan: Plan) -> Outcome:
        learned = [study for study in self._studies if study.split in SIDES]
        sources = read_sources(learned, annotations=False, progress=self._progress)
        planes = self._cache / "planes"
        run = self._folder / system.name / "run"
        core = [study for study in core_studies(self._studies) if study.split == "train"]
        slabs = prepared_slabs(
            read_sources(core, progress=self._progress), "train", plan.slabs, plan.encoder, self._cache / "slabs",
            self._progress,
        )  # fmt: skip
        epochs = self._epochs(plan, slabs, self._slices(plan))
        settings = plan.baseline(plan.study_batch, epochs)
        network = train_cnn3d(sources, run, settings, plan.cnn3d, plan.slabs, planes, self._progress)
        files = prepare_cnn3d(self._tested(), plan.slabs, planes, self._progress)
        found = _Asked(cnn3d_probabilities(network, files, self._progress))
        return self._made(system, found, sum(p.numel() for p in network.parameters()), learned, _run_seconds(run))

    def _epochs(self, plan: Plan, slabs: AnnotatedSlabs, slices: int) -> int:
        """So many epochs of ``slices`` slices as show a network what both stages together look at.

        Passes would not be fair: a window of PENet is shown round every slab, and holds five times its slices.
        """
        stage_one = plan.encoder.epochs * len(slabs) * plan.slabs.slices_per_slab
        stage_two = plan.classifier.epochs * self._slices(plan)
        return max(round((stage_one + stage_two) / slices), 1)

    def _slices(self, plan: Plan) -> int:
        """Slices of an epoch of stage II, and of the 3D CNN, that reads the same."""
        studies = sum(study.split == "train" and study.label in LABELS for study in self._studies)
        return studies * plan.slabs.slab_count * plan.slabs.slab_stride

    def _ask(self, detector: Detector, system: System, features: Path) -> _Asked:
        """The test studies through both stages, from features that are computed once for all who share an encoder."""
        sources = self._tested()
        truths = self._truths(detector.slabs)
        files = encode_sources(detector, sources, features, self._progress)
        probabilities: list[float] = []
        pointing: list[float | None] = []
        slab_truth, slab_scores = [], []
        for source, file, truth in zip(sources, files, truths, strict=True):
            encoded = torch.from_numpy(np.load(file.path)).to(detector.device)
            with torch.inference_mode():
                slabs = detector.encoder.logits(encoded.float()).softmax(1)[:, 1].double().cpu().numpy()
            match system.kind:
                case "mean of slabs":
                    probabilities.append(mean_of_slabs(slabs))
                case "maximum of slabs":
                    probabilities.append(maximum_of_slabs(slabs))
                case _:
                    probabilities.append(detector.classify(encoded))
            if truth is None:
                pointing.append(None)
                chosen = np.full(len(slabs), source.study.label == "negative")
                shows = np.zeros(len(slabs), bool)
            else:
                maps = normalised(torch.from_numpy(detector.attention(encoded))).numpy()
                pointing.append(pointing_game(maps * slabs[:, None, None], truth))
                shows = chosen = truth.positive_slabs
            slab_truth.append(shows[chosen])
            slab_scores.append(slabs[chosen])
        shown, scores = np.concatenate(slab_truth), np.concatenate(slab_scores)
        area = float(roc_auc_score(shown, scores)) if 0 < shown.sum() < len(shown) else None
        return _Asked(np.array(probabilities), tuple(pointing), area)

    def _tested(self) -> tuple[StudySource, ...]:
        if self._test_sources is None:
            self._test_sources = read_sources(self._test, annotations=False, progress=self._progress)
        return self._test_sources

    def _truths(self, slabs: SlabConfig) -> tuple[CellTruth | None, ...]:
        """Where the emboli of the test studies lie on the grid of the maps; computed once."""
        truths: list[CellTruth | None] = []
        for number, source in enumerate(self._tested()):
            self._progress(Progress("read the truth", number, len(self._test), source.study.study))
            known = source.study.label == "positive" and (self._masks or source.study.annotation)
            truths.append(self._truth(source, slabs) if known else None)
        return tuple(truths)

    def _truth(self, source: StudySource, slabs: SlabConfig) -> CellTruth | None:
        key = hashlib.sha256(json.dumps([source.files_sha256, asdict(slabs)]).encode()).hexdigest()
        path = self._cache / "truth" / f"{key}.json"
        if not path.is_file():
            volume = read_volume(source.study.path)
            truth = read_truth(source.study, volume, self._masks)
            payload = None
            if truth is not None:
                cells = np.zeros((slabs.slab_count, slabs.grid, slabs.grid), np.float32)
                grid = study_slabs(volume, lung_range(volume), slabs).to_volume(cells)
                found = cell_truth(grid, truth.mask, truth.reviewed)
                payload = {"embolism": np.argwhere(found.embolism).tolist(), "judged": found.judged.tolist()}
            write_durably(path, json.dumps(payload))
        payload = json.loads(path.read_text())
        if payload is None:
            return None
        embolism = np.zeros((slabs.slab_count, slabs.grid, slabs.grid), bool)
        embolism[tuple(np.array(payload["embolism"], dtype=int).reshape(-1, 3).T)] = True
        return CellTruth(embolism, np.array(payload["judged"], dtype=bool))

    def _made(
        self, system: System, asked: _Asked, parameters: int, learned: Sequence[Study], seconds: float
    ) -> Outcome:
        return Outcome(
            system.name,
            self._seed,
            tuple(study.study for study in self._test),
            tuple(study.label == "positive" for study in self._test),
            tuple(float(value) for value in asked.probabilities),
            asked.pointing or (None,) * len(self._test),
            asked.slab_auc,
            parameters,
            sum(study.split in SIDES for study in learned),
            seconds,
        )


@dataclass(frozen=True, eq=False)
class _Asked:
    probabilities: NDArray[np.float64]
    pointing: tuple[float | None, ...] = ()
    slab_auc: float | None = None


def _check_same(out: Path, studies: Sequence[Study], plan: Plan) -> None:
    """What is kept must have been made from the same list by the same plan."""
    rows = [
        (study.study, study.patient, study.label, study.split, study.annotation.name if study.annotation else "")
        for study in studies
    ]
    identity = {
        "studies": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "plan": json.loads(json.dumps(asdict(plan))),
    }
    path = out / "comparison.json"
    if not path.is_file():
        write_durably(path, json.dumps(identity, indent=1))
        return
    found = json.loads(path.read_text())
    for name, words in (("studies", "study list"), ("plan", "settings")):
        if found.get(name) != identity[name]:
            raise InputError(f"{out}: it holds a comparison of another {words}: choose another folder")


def _classifier_config(plan: Plan) -> ClassifierConfig:
    return ClassifierConfig(plan.network.feature_channels, plan.slabs.grid, plan.filters, plan.directions)


def _encoder_name(plan: Plan) -> str:
    """Systems whose stage I is the same share it."""
    parts: list[SlabConfig | EncoderConfig | EncoderTraining] = [plan.slabs, plan.network, plan.encoder]
    return hashlib.sha256(json.dumps([asdict(part) for part in parts]).encode()).hexdigest()[:12]


def _seconds(detector: Detector) -> float:
    return sum(record.seconds for record in (detector.card.encoder, detector.card.classifier) if record)


def _run_seconds(run: Path) -> float:
    """Time that a training took, from the metrics of its epochs."""
    history = json.loads((run / "status.json").read_text())["history"]
    return float(sum(metrics["seconds"] for metrics in history))
