"""Both trainings as a process of their own runs them: ``python -m pe_monailabel.tasks.training_process FOLDER``.

The folder says all that the process needs, so that it starts without MONAI Label, whose import takes longer than the
first steps. It works as long as its standard input is open: the server that started it closes it to stop it, and when
the server dies, however that happens, the system does. Where there are several GPUs, a process for each trains, started
and watched by this one as torchrun does it.

    FOLDER/request.json   a Request
    FOLDER/studies.csv    the studies, with labels and annotations as they were when the training was asked for
    FOLDER/log.txt        what the process says
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout

from pe_app.common import distributed
from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_app.common.progress import Cancelled, Progress, ProgressCallback
from pe_app.ct.slabs import SlabConfig
from pe_app.model.detector import Detector
from pe_app.model.losses import AttentionLoss
from pe_app.model.slab_encoder import EncoderConfig
from pe_app.model.study_classifier import ClassifierConfig
from pe_app.studies import Study, read_studies
from pe_app.training.datasets import Augmentation, Preparation, encoder_key
from pe_app.training.run import utc_now
from pe_app.training.stages import ClassifierTraining, EncoderTraining, train_classifier, train_encoder
from pe_monailabel.store.models import Models

logger = logging.getLogger(__name__)

KINDS: dict[str, tuple[type, ...]] = {
    "encoder": (EncoderTraining, SlabConfig, EncoderConfig, ClassifierConfig, AttentionLoss, Augmentation),
    "classifier": (ClassifierTraining,),
}
"""The dataclasses whose plain fields can be set in each training; what else a client sends is ignored."""

DERIVED = ("grid", "feature_channels")
"""Sizes of the classifier that follow from slabs and encoder."""

ALIKE: dict[type, dict[str, str]] = {
    ClassifierConfig: {"kind": "classifier_kind"},
    AttentionLoss: {"kind": "attention_loss"},
}
"""Fields of one name and different meaning: what clients call them."""

WINDOW = ("hu_low", "hu_high")
"""The two ends of the slabs' HU window, a setting each."""

STOPPED = 3
"""Exit status of a training that was asked to stop."""

PROCESSES = "PE_TRAINING_PROCESSES"
"""Environment variable: how many processes train together; by default one a GPU, and one where there is none."""

RESTARTS = 3
"""So often a training goes on from its last epoch after one of several processes ended."""

LAST_STEP_SECONDS = 600.0
"""A process whose step takes longer than that after it was asked to stop is ended; epochs that are done are kept."""

Settings = dict[str, Any]
"""Settings of a training by name: numbers, words, switches."""


@dataclass(frozen=True)
class Request:
    """What a training is to do.

    Attributes:
        stage: ``encoder`` or ``classifier``.
        settings: all of them.
        private: the store's own folder, where results go.
        start: the model that the server was started with.
    """

    stage: str
    settings: Settings
    private: str
    start: str | None

    def write(self, folder: Path) -> None:
        """Put it where the process looks."""
        write_durably(folder / "request.json", json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Request:
        """The request of a training's folder."""
        return cls(**json.loads((folder / "request.json").read_text(encoding="utf-8")))


def stage_settings(stage: str, said: Mapping[str, object]) -> Settings:
    """All settings of a training, with those that were said in place of the defaults.

    Raises:
        InputError: if one of them cannot be used.
    """
    plain: Settings = {"synthetic": False}
    for kind in KINDS[stage]:
        plain |= {
            _said(kind, f.name): f.default for f in fields(kind) if isinstance(f.default, (bool, int, float, str))
        }
    plain = {name: default for name, default in plain.items() if name not in DERIVED}
    if stage == "encoder":
        plain |= zip(WINDOW, SlabConfig().hu_window, strict=True)
    settings = {name: _like(default, said.get(name, default), name) for name, default in plain.items()}
    for kind in KINDS[stage]:
        _make(kind, settings)
    return settings


def encoder_to_start_from(private: Path, models: Models) -> Path | None:
    """Where stage II starts: what stage I published, else the encoder of the served model."""
    trained = private / "encoder.safetensors"
    return trained if trained.is_file() else models.path()


class Stop(Protocol):
    """A ``threading.Event``, or one that several processes share."""

    def is_set(self) -> bool:
        """Whether to stop at the next step."""


def train(folder: Path, stop: Stop) -> Detector:
    """Do what the folder's request says; the new model is served unless the present one is better or pinned.

    Raises:
        InputError: if the studies or settings cannot be used.
        Cancelled: at the next step after ``stop`` is set.
    """
    request = Request.read(folder)
    private = Path(request.private)
    models = Models(private / "models", Path(request.start) if request.start else None)

    def report(progress: Progress) -> None:
        if stop.is_set():
            raise Cancelled("stopped")

    studies = read_studies(folder / "studies.csv")
    if request.stage == "encoder":
        detector = _train_encoder(studies, request.settings, private, folder, report)
        # the new encoder needs a new classifier: a model whose stages are both trained stays until there is one
        if distributed.is_main() and not models.current().card.trained:
            models.publish(private / "encoder.safetensors")
        return detector
    encoder = encoder_to_start_from(private, models)
    if encoder is None:
        raise InputError("there is no trained encoder: train the encoder first")
    features = private / "features" / encoder_key(Detector.load(encoder))[:16]
    for other in features.parent.glob("*"):
        if other != features and distributed.is_main():  # of a former encoder; 30 MB a study
            shutil.rmtree(other, ignore_errors=True)
    detector = train_classifier(
        studies,
        encoder,
        folder / "model.safetensors",
        settings=_make(ClassifierTraining, _reading_ahead(request.settings)),
        synthetic=request.settings["synthetic"],
        run_dir=folder,
        cache_dir=features,
        preparation=Preparation(distributed.cores_per_process()),
        progress=report,
    )
    if distributed.is_main():
        models.publish(folder / "model.safetensors")
    return detector


def _train_encoder(
    studies: tuple[Study, ...], settings: Settings, private: Path, folder: Path, report: ProgressCallback
) -> Detector:
    parts = {"attention_loss": _make(AttentionLoss, settings), "augmentation": _make(Augmentation, settings)}
    return train_encoder(
        studies,
        private / "encoder.safetensors",
        settings=_make(EncoderTraining, {**_reading_ahead(settings), **parts}),
        slabs=_make(SlabConfig, settings),
        network=_make(EncoderConfig, settings),
        classifier=_make(ClassifierConfig, settings),
        synthetic=settings["synthetic"],
        run_dir=folder,
        preparation=Preparation(distributed.cores_per_process()),
        progress=report,
    )


def _reading_ahead(settings: Settings) -> Settings:
    """The settings with as many processes that read ahead as this machine has use for, unless some were asked for."""
    return {**settings, "workers": settings["workers"] or distributed.default_loader_workers()}


def tell_end(folder: Path, request: Request, state: str, text: str) -> None:
    """Let clients read how a training ended that could not say so itself, because it did not begin or was killed."""
    blank = {"task": f"train {request.stage}", "epoch": 0, "epochs": request.settings["epochs"], "done": 0, "total": 0}
    blank |= {"best_epoch": 0, "metrics": {}, "history": [], "updated": utc_now()}
    status = {**blank, **read_status(folder), "state": state, "text": text}
    write_durably(folder / "status.json", json.dumps(status))


def read_status(folder: Path) -> dict[str, Any]:
    """What a training says of itself; empty where it has not begun."""
    try:
        status: dict[str, Any] = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status


def _make(kind: type, settings: Settings) -> Any:
    """A dataclass with its settings; the sizes that follow from others are worked out."""
    names = {_said(kind, field.name): field.name for field in fields(kind)}
    chosen = {names[name]: value for name, value in settings.items() if name in names}
    try:
        if kind is SlabConfig:
            chosen["hu_window"] = tuple(settings[name] for name in WINDOW)
        if kind is ClassifierConfig:
            slabs, encoder = _make(SlabConfig, settings), _make(EncoderConfig, settings)
            chosen |= {"grid": slabs.grid, "feature_channels": encoder.feature_channels}
        return kind(**chosen)
    except ValueError as error:
        raise InputError(str(error)) from error


def _said(kind: type, name: str) -> str:
    """What clients call a field."""
    return ALIKE.get(kind, {}).get(name, name)


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


def _watch(stop: threading.Event) -> None:
    """Wait until standard input ends: whoever started this process closed it, or is gone."""
    with suppress(OSError):
        while os.read(sys.stdin.fileno(), 1):  # not sys.stdin.read: Python cannot end while a thread is in it
            pass
    stop.set()
    threading.Event().wait(LAST_STEP_SECONDS)
    os._exit(STOPPED)


def main(folder: Path) -> int:
    """Train; one training at a time in a store, also while that of a server that was killed does its last step."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    stop = threading.Event()
    threading.Thread(target=_watch, args=(stop,), name="watch the server", daemon=True).start()
    alone = FileLock(folder.parent / ".training")
    while not alone.is_locked:
        if stop.is_set():
            return STOPPED
        try:
            alone.acquire(timeout=1)
        except Timeout:
            logger.info("another training is doing its last step")
    count = int(os.environ.get(PROCESSES, "0")) or max(1, torch.cuda.device_count())
    return _train(folder, stop) if count == 1 else _train_together(folder, stop, count)


def _train(folder: Path, stop: Stop) -> int:
    """Train, and tell how that ended; the exit status."""
    try:
        detector = train(folder, stop)
    except Cancelled:
        logger.info("stopped: the same request goes on from here")
        return STOPPED
    except InputError as error:
        logger.error("%s", error)
        if distributed.is_main():
            tell_end(folder, Request.read(folder), "failed", str(error))
        return 1
    logger.info("model %s is published", detector.sha256)
    return 0


def _train_together(folder: Path, stop: threading.Event, count: int) -> int:
    """Train in several processes, which are started again when one of them ends before its time."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    stop_all = multiprocessing.get_context("spawn").Event()
    threading.Thread(target=lambda: stop.wait() and stop_all.set(), daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, distributed.cores_per_process() // count)))
    config = LaunchConfig(
        1, 1, count, run_id=folder.name, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=RESTARTS
    )
    try:
        codes: dict[int, int] = elastic_launch(config, _member)(str(folder), stop_all)
    except ChildFailedError as error:
        logger.error("%s", error)
        return 1
    return codes[0]


def _member(folder: str, stop: Stop) -> int:
    """One of several processes that train together."""
    with distributed.process_group():
        level = logging.INFO if distributed.is_main() else logging.ERROR
        logging.basicConfig(level=level, format="%(asctime)s %(message)s")
        return _train(Path(folder), stop)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
