"""Both trainings as MONAI Label tasks: from the store's annotations and labels to the model that is served.

MONAI Label runs a task in a process of its own; the server reads from the run folder how far it is. A run that was
stopped, or whose server died, goes on with the next request, unless studies, annotations or settings changed.

    STUDIES/.pe/runs/<stage>-<number>/   one training (``pe_app.training_run``)
    STUDIES/.pe/encoder.safetensors      what stage I published, where stage II starts
    STUDIES/.pe/model.safetensors        what is served
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lib.infer import ServedDetector
from lib.store import StudyStore
from monailabel.interfaces.tasks.train import TrainTask

from pe_app.datasets import encoder_key
from pe_app.detector import Detector
from pe_app.errors import InputError
from pe_app.files import write_durably
from pe_app.losses import AttentionLoss
from pe_app.progress import Cancelled, Progress
from pe_app.slab_encoder import EncoderConfig
from pe_app.slabs import SlabConfig
from pe_app.studies import Study
from pe_app.study_classifier import ClassifierConfig
from pe_app.training import ClassifierTraining, EncoderTraining, train_classifier, train_encoder
from pe_app.training_run import utc_now

logger = logging.getLogger(__name__)

SERVER_PID = "PE_SERVER_PID"
"""Environment variable that tells a task which process it works for."""

KEPT_RUNS = 3

DERIVED = ("grid", "feature_channels")
"""Sizes of the classifier that follow from slabs and encoder."""

Settings = dict[str, Any]
"""Settings of a training by name: numbers, words, switches."""


class StageTask(TrainTask):
    """What both trainings share: settings from the request, the run folder, and an end with the server."""

    stage: str
    kinds: tuple[type, ...]
    """The dataclasses whose plain fields can be set; what else a client sends is ignored."""

    def __init__(self, description: str, served: ServedDetector, private: Path, conf: Mapping[str, object]) -> None:
        super().__init__(description)
        self.served = served
        self.private = private
        self._conf = conf

    def config(self) -> Settings:
        """The settings that clients may change: the paper's, or those of the server's ``--conf``."""
        return self.settings({})

    def settings(self, said: Mapping[str, object]) -> Settings:
        """All settings, with those that were said in place of the defaults.

        Raises:
            InputError: if one of them cannot be used.
        """
        given = {**self._conf, **said}
        plain: Settings = {"synthetic": False}
        for kind in self.kinds:
            plain |= {f.name: f.default for f in fields(kind) if isinstance(f.default, (bool, int, float, str))}
        plain = {name: default for name, default in plain.items() if name not in DERIVED}
        settings = {name: _like(default, given.get(name, default), name) for name, default in plain.items()}
        for kind in self.kinds:
            _make(kind, settings)
        return settings

    def stats(self) -> dict[str, Any]:
        """How far the last training is."""
        runs = self._runs()
        try:
            status: dict[str, Any] = json.loads((runs[-1] / "status.json").read_text(encoding="utf-8")) if runs else {}
        except (FileNotFoundError, ValueError):
            return {}
        if status.get("best_epoch"):  # under the name that the stock Slicer plugin shows
            status["best_metric"] = status["history"][status["best_epoch"] - 1].get("validation_accuracy")
        return status

    def __call__(self, request: Mapping[str, object], datastore: StudyStore) -> dict[str, Any]:
        """Train, in the task's own process; answers which model was published."""
        settings = self.settings(request)
        studies = datastore.studies()
        folder = self._run_folder(settings, [(study, datastore.facts(study.study).sha256) for study in studies])
        try:
            detector = self.train(studies, settings, folder)
        except InputError as error:
            self._tell_failure(folder, settings, str(error))
            raise
        logger.info("%s: model %s is published", self.stage, detector.sha256)
        return {"name": detector.card.name, "version": detector.card.version, "sha256": detector.sha256}

    @abstractmethod
    def train(self, studies: tuple[Study, ...], settings: Settings, folder: Path) -> Detector:
        """Train and publish."""

    def starts_from(self) -> Path | None:
        """A model file that the training starts from."""
        return None

    def _tell_failure(self, folder: Path, settings: Settings, text: str) -> None:
        """Let clients read why a training did not even begin; one that began says so itself."""
        blank = {"task": f"train {self.stage}", "epoch": 0, "epochs": settings["epochs"], "done": 0, "total": 0}
        blank |= {"best_epoch": 0, "metrics": {}, "history": [], "updated": utc_now()}
        status = {**blank, **self.stats(), "state": "failed", "text": text}
        write_durably(folder / "status.json", json.dumps(status))

    def _run_folder(self, settings: Settings, studies: list[tuple[Study, str]]) -> Path:
        """The folder of the last training if that ended early and was the same, else a new one."""
        start = self.starts_from()
        start_sha256 = hashlib.sha256(start.read_bytes()).hexdigest() if start else ""
        request = json.dumps([settings, [[str(study), sha256] for study, sha256 in studies], start_sha256])
        fingerprint = hashlib.sha256(request.encode()).hexdigest()
        runs = self._runs()
        number = 1
        if runs:
            if self.stats().get("state") != "finished" and _text(runs[-1] / "request.sha256") == fingerprint:
                return runs[-1]
            number = int(runs[-1].name.rpartition("-")[2]) + 1
        folder = self.private / "runs" / f"{self.stage}-{number:04d}"
        write_durably(folder / "request.sha256", fingerprint)
        for old in self._runs()[:-KEPT_RUNS]:
            shutil.rmtree(old, ignore_errors=True)
        return folder

    def _runs(self) -> list[Path]:
        return sorted((self.private / "runs").glob(f"{self.stage}-????"))


class EncoderTask(StageTask):
    """Train ``encoder``: stage I, from the annotated slices.

    The new encoder needs a new classifier, so a detector whose stages are both trained stays until stage II is trained,
    too; before there is such a one, the new encoder is served at once.
    """

    stage = "encoder"
    kinds = (EncoderTraining, SlabConfig, EncoderConfig, ClassifierConfig, AttentionLoss)

    def train(self, studies: tuple[Study, ...], settings: Settings, folder: Path) -> Detector:
        """Train stage I."""
        detector = train_encoder(
            studies,
            self.private / "encoder.safetensors",
            settings=_make(EncoderTraining, {**settings, "attention_loss": _make(AttentionLoss, settings)}),
            slabs=_make(SlabConfig, settings),
            network=_make(EncoderConfig, settings),
            classifier=_make(ClassifierConfig, settings),
            synthetic=settings["synthetic"],
            run_dir=folder,
            progress=_while_the_server_lives,
        )
        if not self.served.current().card.trained:
            detector.save(self.served.published)
        return detector


class ClassifierTask(StageTask):
    """Train ``classifier``: stage II, from the study labels; then both stages are served."""

    stage = "classifier"
    kinds = (ClassifierTraining,)

    def starts_from(self) -> Path | None:
        """What stage I published, else the encoder of the served model."""
        trained = self.private / "encoder.safetensors"
        return trained if trained.is_file() else self.served.path

    def train(self, studies: tuple[Study, ...], settings: Settings, folder: Path) -> Detector:
        """Train stage II."""
        encoder = self.starts_from()
        if encoder is None:
            raise InputError("there is no trained encoder: train the encoder first")
        features = self.private / "features" / encoder_key(Detector.load(encoder))[:16]
        for other in features.parent.glob("*"):
            if other != features:  # of a former encoder; 30 MB a study
                shutil.rmtree(other, ignore_errors=True)
        return train_classifier(
            studies,
            encoder,
            self.served.published,
            settings=_make(ClassifierTraining, settings),
            synthetic=settings["synthetic"],
            run_dir=folder,
            cache_dir=features,
            progress=_while_the_server_lives,
        )


def _make(kind: type, settings: Settings) -> Any:
    """A dataclass with its settings; the sizes that follow from others are worked out."""
    names = {field.name for field in fields(kind)}
    chosen = {name: value for name, value in settings.items() if name in names}
    try:
        if kind is ClassifierConfig:
            slabs = _make(SlabConfig, settings)
            chosen |= {"grid": slabs.grid, "feature_channels": 8 * settings["width"]}
        return kind(**chosen)
    except ValueError as error:
        raise InputError(str(error)) from error


def _like(default: object, value: object, name: str) -> Any:
    """A setting as a client sent it, perhaps as text, as the kind of value that it is."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[str(value).lower()]
        if isinstance(default, str):
            return str(value)
        number = float(value)  # type: ignore[arg-type]
        if not math.isfinite(number) or (isinstance(default, int) and number != int(number)):
            raise ValueError
        return type(default)(number)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{name}: expected a value like {default!r}, got {value!r}") from error


def _while_the_server_lives(progress: Progress) -> None:
    """The callback of a task: a training does not outlive its server; the next one goes on where it stopped."""
    server = os.environ.get(SERVER_PID)
    if server and int(server) not in (os.getpid(), os.getppid()):
        raise Cancelled("the server is gone")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
