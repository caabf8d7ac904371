"""Both stages and their settings as one file, and the way from a volume to a detection.

The file is safetensors: loading it runs no code. Its metadata hold the dimensions of the networks, the slab settings
and the model card, so that a file rebuilds its own detector and says where it comes from.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor, nn

import pe_app
from pe_app.common.device import Precision, autocast, best_device
from pe_app.common.errors import InputError, UnfitStudy
from pe_app.common.files import write_durably
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.common.schema import read_as
from pe_app.ct.lungs import find_lungs, lung_range
from pe_app.ct.quality import QualityLimits, Reason, check_study, judged
from pe_app.ct.slabs import SlabConfig, Slabs, study_slabs
from pe_app.ct.volume import Volume
from pe_app.model.candidate_places import place_candidates
from pe_app.model.detection import Detection, Evidence, ImageIdentity, ModelIdentity, estimate_extent, find_candidates
from pe_app.model.slab_encoder import EncoderConfig, SlabEncoder, normalised
from pe_app.model.study_classifier import Classifier, ClassifierConfig, build_classifier

FORMAT = "pe-detector/1"
METADATA = "detector"
"""The entry of the file's metadata that holds all settings and the card, as JSON."""

THRESHOLD = 0.5
"""A study is positive from this probability on (section 2.3 of the paper)."""

SLABS_AT_ONCE = 10
"""Slabs that pass the encoder together: bounds the memory and is how often progress is told."""

STARTER_MODEL = Path(__file__).parents[1] / "weights" / "starter.safetensors"
"""The model that ships with the program; it has never seen a real embolism."""


@dataclass(frozen=True)
class TrainingRecord:
    """What one stage was trained on, with what, when, and how well it did on its validation studies.

    Attributes:
        studies: studies in training and validation.
        positive: how many of them are positive.
        annotated_slices: slices that a reader marked (stage I).
        terms: of use of the data sets it learned from, ``rspect: non-commercial``; empty for a hospital's own studies.
        not_outlined_slices: those of them with embolism that nobody outlined: they taught what to call, not where to
            look.
        synthetic: True when every embolism was painted or simulated.
        epochs: epochs trained; ``best_epoch`` is the published one.
        seconds: time spent, over all resumes; on ``device``.
        date: when it was published, ISO 8601 UTC.
        git_revision: of the program, empty where unknown.
        settings: every setting that differs from nothing: learning rate, batch, losses, seed.
        metrics: validation figures of the published epoch.
        image_sha256: voxels of every study used, so that nobody evaluates on them.
        patient_sha256: of the ids of their patients, for the same purpose; empty where patients are unknown.
    """

    studies: int
    positive: int
    annotated_slices: int
    synthetic: bool
    epochs: int
    best_epoch: int
    seconds: float
    device: str
    date: str
    git_revision: str
    settings: Mapping[str, str | int | float | bool | None]
    metrics: Mapping[str, float]
    image_sha256: tuple[str, ...]
    patient_sha256: tuple[str, ...] = ()
    not_outlined_slices: int = 0
    terms: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, payload: object) -> TrainingRecord:
        """The record that ``asdict`` and JSON made, now or before patients were kept.

        Raises:
            InputError: naming the first value that is not as it must be.
        """
        return read_as(_TRAINING_RECORD, payload)


_TRAINING_RECORD = TypeAdapter(TrainingRecord)


@dataclass(frozen=True)
class ModelCard:
    """Who this model is. A stage whose record is None has random weights.

    Attributes:
        name: e.g. ``starter``.
        version: of the training, e.g. a date; free text.
        encoder: stage I's training.
        classifier: stage II's training.
    """

    name: str = "untrained"
    version: str = "0"
    encoder: TrainingRecord | None = None
    classifier: TrainingRecord | None = None

    @property
    def trained(self) -> bool:
        """Whether both stages are trained."""
        return self.encoder is not None and self.classifier is not None

    @property
    def date(self) -> str:
        """When the later stage was published; empty for an untrained model."""
        return max((record.date for record in (self.encoder, self.classifier) if record), default="")

    @property
    def terms(self) -> tuple[str, ...]:
        """Terms of use of all data sets that it learned from; they bind whoever uses or passes on the model."""
        records = [record for record in (self.encoder, self.classifier) if record]
        return tuple(sorted({terms for record in records for terms in record.terms}))

    @property
    def non_commercial(self) -> bool:
        """Whether one of these data sets forbids commercial use, and so of the model."""
        return any("non-commercial" in terms.lower() for terms in self.terms)

    def reasons(self) -> tuple[Reason, ...]:
        """What a reader must know of this model before looking at its numbers."""
        if self.encoder is None or self.classifier is None:
            stage = "Neither stage" if self.encoder is None else "Stage II, the study probability,"
            state = "is trained" if self.encoder is None else "is not trained"
            message = f"{stage} {state} in model '{self.name}': its numbers are random, not for clinical use."
            return (Reason("untrained_model", message, refuses=False),)
        if self.encoder.synthetic or self.classifier.synthetic:
            message = (
                f"Model '{self.name}' was trained on simulated and inserted emboli only; it has never seen a real "
                "embolism. It shows how the program works and where to start training; "
                "its numbers are not a clinical result."
            )
            return (Reason("demo_model", message, refuses=False),)
        return ()


@dataclass(frozen=True)
class Decision:
    """How stage II's logit becomes a probability, and when a study counts as positive.

    Attributes:
        temperature: the logit is divided by it (Guo et al. 2017); 1 leaves it as it is.
        threshold: a study is positive from this probability on.
        sensitivity: share of the positive validation studies that the threshold was chosen to find; None for the
            paper's 0.5.
        studies: labelled validation studies that temperature and threshold were chosen on; 0 for none.
        positive: how many of them are positive.
    """

    temperature: float = 1.0
    threshold: float = THRESHOLD
    sensitivity: float | None = None
    studies: int = 0
    positive: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf") or not 0 <= self.threshold <= 1:
            raise ValueError(f"a temperature above 0 and a threshold from 0 to 1 are needed, got {self}")

    def __str__(self) -> str:
        if not self.studies:
            return ""
        chosen = f" for sensitivity {self.sensitivity:g}" if self.sensitivity is not None else ""
        on = f"{self.studies} validation studies, {self.positive} positive"
        return f"threshold {self.threshold:.3g}{chosen}, temperature {self.temperature:.3g}, chosen on {on}"


@dataclass(frozen=True, eq=False)
class DetectionResult:
    """A detection and its attention volume.

    Attributes:
        detection: the numbers.
        attention: uint8 from 0 to 255 on the coarse grid (50 x 24 x 24): each slab's map divided by its maximum, times
            the slab's probability, so that a quiet slab stays dark [ours]; None when the study was refused.
        maps: ``(slabs, grid, grid)`` float32, each slab's map divided by its maximum and by nothing else: what
            attention is judged on; None when the study was refused or the detection came over the network.
    """

    detection: Detection
    attention: Volume | None
    maps: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class Detector:
    """Stage I, stage II and the slab settings: everything from a volume to a detection.

    Frozen, since its file's hash is the key of caches and ledgers: ``dataclasses.replace`` with other slabs, card or
    decision gives another detector with an identity of its own.

    Attributes:
        encoder: stage I.
        classifier: stage II.
        slabs: how volumes become slabs.
        card: where the weights come from.
        limits: which studies are refused.
        precision: number format of stage I; stage II judges in float32.
        decision: how stage II's logit is read.
    """

    encoder: SlabEncoder
    classifier: Classifier
    slabs: SlabConfig = field(default_factory=SlabConfig)
    card: ModelCard = field(default_factory=ModelCard)
    limits: QualityLimits = field(default_factory=QualityLimits)
    precision: Precision = "auto"
    decision: Decision = field(default_factory=Decision)

    @classmethod
    def untrained(
        cls,
        seed: int = 0,
        slabs: SlabConfig | None = None,
        encoder: EncoderConfig | None = None,
        classifier: ClassifierConfig | None = None,
    ) -> Detector:
        """Random weights, for training and for tests; every detection of it says so."""
        slabs = slabs or SlabConfig()
        encoder = encoder or EncoderConfig(slices_per_slab=slabs.slices_per_slab)
        classifier = classifier or ClassifierConfig(feature_channels=8 * encoder.width, grid=slabs.grid)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(SlabEncoder(encoder), build_classifier(classifier), slabs)

    @classmethod
    def load(cls, path: str | Path) -> Detector:
        """A detector from its file, on the best device, ready to detect.

        Raises:
            InputError: if the file is missing, broken, of another format, or its weights do not fit its settings.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
            weights = safetensors.torch.load(content)
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"model {path}: cannot be read ({error}): give a .safetensors file of this program") from (
                error
            )
        detector = _from_metadata(path, metadata)
        for name in sorted(weights):
            if not name.startswith(("encoder.", "classifier.")):
                raise InputError(f"model {path}: weight {name} belongs to neither stage: export the model again")
        for stage, network in (("encoder", detector.encoder), ("classifier", detector.classifier)):
            own = {name[len(stage) + 1 :]: value for name, value in weights.items() if name.startswith(f"{stage}.")}
            _load_weights(path, stage, network, own)
        detector.__dict__["sha256"] = hashlib.sha256(content).hexdigest()
        return detector.to(best_device())

    def save(self, path: str | Path, *, half: bool = False) -> None:
        """Write the detector as one file, all or nothing; a reader sees the former file or this one.

        Args:
            path: where; an existing file is replaced.
            half: keep matrices in float16, half the size; vectors (biases, normalisation) stay float32.
        """
        content = self._serialised(half)
        write_durably(Path(path), content)
        self.__dict__["sha256"] = hashlib.sha256(content).hexdigest()

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file that holds this detector."""
        return hashlib.sha256(self._serialised(half=False)).hexdigest()

    @property
    def identity(self) -> ModelIdentity:
        """How a detection names this model; a decision of its own is told with the version."""
        version = ", ".join(word for word in (self.card.version, str(self.decision)) if word)
        return ModelIdentity(self.card.name, version, self.sha256, self.card.trained, self.card.date)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.encoder.parameters()).device

    def to(self, device: torch.device) -> Detector:
        """Move both networks, in evaluation mode and the memory order that convolutions like best."""
        self.encoder.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.classifier.to(device).eval()
        return self

    def with_limits(self, limits: QualityLimits) -> Detector:
        """The same model with other limits: they are the user's and not part of its file."""
        return self._same_file(replace(self, limits=limits))

    def with_precision(self, precision: Precision) -> Detector:
        """The same model in another number format of stage I, which is not part of its file."""
        return self._same_file(replace(self, precision=precision))

    def _same_file(self, other: Detector) -> Detector:
        if "sha256" in self.__dict__:
            other.__dict__["sha256"] = self.sha256
        return other

    def detect(self, volume: Volume, progress: ProgressCallback = silent) -> DetectionResult:
        """What this model says of a CT.

        Args:
            volume: the CT in HU (``read_volume``).
            progress: told after every step; may raise ``Cancelled``.

        Returns:
            A detection with status ``analysed``, or ``refused`` with the reasons and no probability.
        """
        seconds: dict[str, float] = {}
        begin = time.perf_counter()
        progress(Progress("check the study", 0, self.slabs.slab_count))
        with _timed(seconds, "quality"):
            lungs = find_lungs(volume)
            reasons = (*judged(self.card.reasons(), self.limits), *check_study(volume, self.limits, lungs))
        if any(reason.refuses for reason in reasons):
            return DetectionResult(self._refused(ImageIdentity.of(volume), reasons, seconds), None)

        with _timed(seconds, "prepare"):
            slabs = study_slabs(volume, lung_range(volume, lungs), self.slabs)
        with _timed(seconds, "encode"):
            features, slab_probability = self.encode(slabs, progress)
        with _timed(seconds, "classify"):
            progress(Progress("judge the study", self.slabs.slab_count, self.slabs.slab_count))
            probability = self.classify(features)
        with _timed(seconds, "attention"):
            raw = self.attention(features)
            detection_maps = self.maps(features)
            evidence = _evidence(slabs, raw, slab_probability)
            grid = slabs.to_volume(detection_maps)
            # a study is never positive without a place to look at
            positive = probability >= self.decision.threshold
            found = find_candidates(
                detection_maps, slab_probability, grid, slabs.slice_index.tolist(), at_least_one=positive
            )
            candidates = place_candidates(found, volume, lungs)
            extent = estimate_extent(detection_maps, slab_probability, grid)
            weighted = np.rint(255 * detection_maps * slab_probability[:, None, None]).astype(np.uint8)
        seconds["total"] = time.perf_counter() - begin
        detection = Detection(
            "analysed",
            reasons,
            probability,
            self.decision.threshold,
            evidence,
            candidates,
            ImageIdentity.of(volume),
            self.identity,
            seconds,
            extent,
        )
        return DetectionResult(detection, slabs.to_volume(weighted), detection_maps)

    @torch.inference_mode()
    def encode(self, slabs: Slabs, progress: ProgressCallback = silent) -> tuple[Tensor, NDArray[np.float32]]:
        """Stage I on every slab of a study.

        Returns:
            Features ``(slabs, channels, grid, grid)`` in float16 and slab probabilities ``(slabs,)``.
        """
        self.encoder.eval()
        features, probabilities = [], []
        count = len(slabs.pixels)
        for start in range(0, count, SLABS_AT_ONCE):
            progress(Progress("look at every slab", start, count))
            batch = torch.from_numpy(slabs.pixels[start : start + SLABS_AT_ONCE].copy()).to(self.device)
            with autocast(self.device, self.precision):
                encoded = self.encoder(batch.contiguous(memory_format=torch.channels_last))
            features.append(encoded.features.half())
            probabilities.append(encoded.logits.float().softmax(dim=1)[:, 1])
        return torch.cat(features), torch.cat(probabilities).cpu().numpy()

    @torch.inference_mode()
    def classify(self, features: Tensor) -> float:
        """Stage II: the study's probability from the features of its slabs ``(slabs, channels, grid, grid)``."""
        self.classifier.eval()
        # in float32: a stage II that begins from evidence is steep, and bfloat16 moved its probability by up to 0.018
        logit = self.classifier(features[None].to(self.device, torch.float32))
        return float((logit / self.decision.temperature).sigmoid()[0])

    @torch.inference_mode()
    def attention(self, features: Tensor) -> NDArray[np.float32]:
        """Un-normalised attention maps ``(slabs, grid, grid)`` of features ``(slabs, channels, grid, grid)``."""
        # a slab at a time stays in the processor's cache
        maps = torch.cat([self.encoder.attention_map(slab[None].float()) for slab in features])
        values: NDArray[np.float32] = maps.cpu().numpy()
        return values

    @torch.inference_mode()
    def maps(self, features: Tensor) -> NDArray[np.float32]:
        """Maps ``(slabs, grid, grid)`` from 0 to 1 that times the slab's probability say where to look.

        The attention map divided by its own maximum. Where the strongest cells decide (``strongest_cells``) attention
        is read through the decision itself: each cell's own probability over that of the slab's strongest one, in the
        same order as attention.
        """
        if not self.encoder.config.strongest_cells:
            return normalised(torch.from_numpy(self.attention(features))).numpy()
        maps = torch.cat([self.encoder.cell_logits(slab[None].float()).sigmoid() for slab in features])
        return normalised(maps).cpu().numpy()

    def refuse_unread(self, error: UnfitStudy) -> Detection:
        """The refusal of a study whose files are whole but make no CT that could be looked at."""
        nothing = ImageIdentity((0, 0, 0), (0.0, 0.0, 0.0), "")
        return self._refused(nothing, (*self.card.reasons(), Reason(error.code, str(error), refuses=True)), {})

    def _refused(self, image: ImageIdentity, reasons: tuple[Reason, ...], seconds: Mapping[str, float]) -> Detection:
        return Detection("refused", reasons, None, self.decision.threshold, (), (), image, self.identity, seconds)

    def _serialised(self, half: bool) -> bytes:
        weights = {}
        for stage, network in (("encoder", self.encoder), ("classifier", self.classifier)):
            for name, value in network.state_dict().items():
                kept = value.detach().cpu().contiguous()
                is_matrix = kept.is_floating_point() and kept.ndim > 1
                weights[f"{stage}.{name}"] = kept.half() if half and is_matrix else kept
        settings = {
            "format": FORMAT,
            "program": f"pe-app {pe_app.__version__}",
            "slabs": asdict(self.slabs),
            "encoder": asdict(self.encoder.config),
            "classifier": asdict(self.classifier.config),
            "card": asdict(self.card),
            "decision": asdict(self.decision),
        }
        # one entry: safetensors writes several in random order, and the same detector must be the same bytes
        metadata = {METADATA: json.dumps(settings)}
        content: bytes = safetensors.torch.save(weights, metadata)
        return content


def default_model() -> Path | None:
    """The model that ships with the program, or None in a copy without one."""
    return STARTER_MODEL if STARTER_MODEL.is_file() else None


def _evidence(slabs: Slabs, raw: NDArray[np.float32], slab_probability: NDArray[np.float32]) -> tuple[Evidence, ...]:
    grid = slabs.to_volume(raw)
    entries = []
    for slab, probability in enumerate(slab_probability):
        peak = float(raw[slab].max())
        row, column = np.unravel_index(int(raw[slab].argmax()), raw[slab].shape)
        x, y, z = (float(value) for value in grid.to_lps_mm((slab, int(row), int(column))))
        place = (x, y, z) if peak > 0 else None
        z_mm, slice_index = float(slabs.z_mm[slab]), int(slabs.slice_index[slab])
        entries.append(Evidence(slab, z_mm, slice_index, float(probability), peak, place))
    return tuple(entries)


def _from_metadata(path: Path, metadata: Mapping[str, str]) -> Detector:
    """Networks of the file's own dimensions, without memory for weights yet: a lying header costs nothing."""
    try:
        settings = json.loads(metadata.get(METADATA, "{}"))
        found = settings.get("format")
        if found != FORMAT:
            raise InputError(f"format {found!r}, expected {FORMAT}: not a model of this program")
        slabs, card = settings["slabs"], settings["card"]
        slabs["hu_window"] = tuple(slabs["hu_window"])
        for stage in ("encoder", "classifier"):
            card[stage] = TrainingRecord.from_json(card[stage]) if card[stage] else None
        with torch.device("meta"):
            return Detector(
                SlabEncoder(EncoderConfig(**settings["encoder"])),
                build_classifier(ClassifierConfig(**settings["classifier"])),
                SlabConfig(**slabs),
                ModelCard(**card),
                decision=Decision(**settings.get("decision", {})),
            )
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"model {path}: its settings cannot be used ({error}): export it again") from error


def _load_weights(path: Path, stage: str, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise InputError(
                f"model {path}: {stage} weight {name} is {given.get(name)}, its settings require {expected.get(name)}"
            )
    full = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    if not all(bool(value.isfinite().all()) for value in full.values()):
        raise InputError(f"model {path}: {stage} holds weights that are not finite: train or export it again")
    network.load_state_dict(full, assign=True)


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - begin
