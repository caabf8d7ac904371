"""The models of a store: each that was published is kept, one of them is served, and a former one can come back.

    STUDIES/.pe/models/<sha256>.safetensors   a model, checked before it was kept; never changed
    STUDIES/.pe/models/<sha256>.json          its name, version, date, and when it was kept
    STUDIES/.pe/models/served.json            which is served, which were before, and whether it is pinned

Nothing here knows MONAI Label: the server, a training in its own process and the command line use one folder at once.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock

from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_app.model.detection import ModelIdentity
from pe_app.model.detector import Detector, default_model
from pe_app.training.run import utc_now

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptModel:
    """A model of the store: which it is, when it was kept, and whether it is the one that is served."""

    model: ModelIdentity
    kept: str
    served: bool

    def to_json(self) -> dict[str, object]:
        """As clients see it."""
        return {**asdict(self.model), "kept": self.kept, "served": self.served}


@dataclass(frozen=True)
class Serving:
    """What is served.

    Attributes:
        models: SHA-256 of the models that were served one after another, the present one last; none while nothing was
            published and the server serves the model that it was started with.
        pinned: whether a published model is kept only, and not served.
    """

    models: tuple[str, ...] = ()
    pinned: bool = False


class Models:
    """The models in one folder; and the one that is served, in memory.

    Args:
        folder: ``.pe/models`` of the store.
        start: what is served until a model is published; by default the one that ships.
    """

    def __init__(self, folder: Path, start: Path | None = None) -> None:
        self._folder = folder
        self.start = start or default_model()
        self._lock = threading.Lock()
        self._serving: tuple[tuple[int, ...], Serving] = ((), Serving())
        self._loaded: tuple[tuple[object, ...], Detector] | None = None

    # What is served

    def current(self) -> Detector:
        """The detector to use now; whoever uses another one goes on with that.

        A model that cannot be loaded any more is passed over for the one before it.

        Raises:
            InputError: if the model that the server was started with cannot be loaded.
        """
        with self._lock:
            serving = self.serving()
            stamp = (serving.models, *(_stamp(self.start) if self.start and not serving.models else ()))
            if self._loaded is None or self._loaded[0] != stamp:
                self._loaded = (stamp, self._load(serving))
            return self._loaded[1]

    def serving(self) -> Serving:
        """What is served, as the disk says now."""
        path = self._folder / "served.json"
        try:
            stamp = _stamp(path)
            if self._serving[0] != stamp:
                said = json.loads(path.read_text(encoding="utf-8"))
                self._serving = (stamp, Serving(tuple(map(str, said["models"])), bool(said["pinned"])))
        except FileNotFoundError:
            self._serving = ((), Serving())
        except (ValueError, TypeError, KeyError):
            logger.exception("%s is damaged: what was served before goes on", path)
        return self._serving[1]

    def path(self) -> Path | None:
        """The file of the served model; None where nothing was published and none was given."""
        models = self.serving().models
        return self._file(models[-1]) if models else self.start

    def kept(self) -> tuple[KeptModel, ...]:
        """All models that were published here, the latest first."""
        served = self.serving().models[-1:]
        found = []
        for path in self._folder.glob("*.json"):
            if path.name != "served.json" and path.with_suffix(".safetensors").is_file():
                said = json.loads(path.read_text(encoding="utf-8"))
                kept = said.pop("kept")
                model = ModelIdentity(**said)
                found.append(KeptModel(model, kept, (model.sha256,) == served))
        return tuple(sorted(found, key=lambda entry: (entry.kept, entry.model.sha256), reverse=True))

    # What changes it

    def publish(self, path: Path) -> Detector:
        """Keep a model, and serve it from now on unless another one is pinned.

        Raises:
            InputError: if it is no model of this program; then nothing changes.
        """
        detector = Detector.load(path)
        with self._changing() as serving:
            models = serving.models
            if not models and self.start is not None:
                models = (self._keep(self.start, Detector.load(self.start)),)
            self._keep(path, detector)
            if models[-1:] != (detector.sha256,) and not serving.pinned:
                models = (*models, detector.sha256)
            self._write(replace(serving, models=models))
        return detector

    def pin(self, name: str = "") -> KeptModel:
        """Serve a kept model (the present one by default), and go on with it when others are published.

        Args:
            name: version, or the first characters of the SHA-256.

        Raises:
            InputError: if no kept model, or more than one, is called so.
        """
        with self._changing() as serving:
            sha256 = self._find(name).model.sha256 if name else self._served(serving)
            models = serving.models if serving.models[-1:] == (sha256,) else (*serving.models, sha256)
            self._write(Serving(models, pinned=True))
        return self._find(sha256)

    def unpin(self) -> None:
        """Let the next model that is published be served."""
        with self._changing() as serving:
            self._write(replace(serving, pinned=False))

    def rollback(self) -> KeptModel:
        """Serve the model that was served before; again, the one before that.

        Raises:
            InputError: if there was none.
        """
        with self._changing() as serving:
            if len(serving.models) < 2:
                raise InputError("no other model was served here before")
            models = serving.models[:-1]
            self._find(models[-1])
            self._write(replace(serving, models=models))
        return self._find(models[-1])

    def _load(self, serving: Serving) -> Detector:
        for sha256 in reversed(serving.models):
            try:
                detector = Detector.load(self._file(sha256))
                if detector.sha256 != sha256:
                    raise InputError(f"model {self._file(sha256)}: was changed since it was kept")
            except InputError:
                logger.exception("the model before it is served")
                continue
            return _told(detector)
        if self.start is None:
            logger.warning("there is no trained model: detections are random until one is trained or given")
            return Detector.untrained()
        return _told(Detector.load(self.start))

    def _find(self, name: str) -> KeptModel:
        kept = self.kept()
        found = [entry for entry in kept if entry.model.sha256.startswith(name) or entry.model.version == name]
        if not name or len(found) != 1:
            names = ", ".join(f"{entry.model.version} ({entry.model.sha256[:12]})" for entry in kept) or "none"
            problem = "several models are called" if found else "no model is called"
            raise InputError(f"{problem} {name!a}; the models kept here are: {names}")
        return found[0]

    def _served(self, serving: Serving) -> str:
        """The served model's name, which is kept if it is the one that the server was started with."""
        if serving.models:
            return serving.models[-1]
        if self.start is None:
            raise InputError("no model was published here yet")
        return self._keep(self.start, Detector.load(self.start))

    def _keep(self, path: Path, detector: Detector) -> str:
        """Copy a model into the folder, unless it is there."""
        file = self._file(detector.sha256)
        if not file.is_file():
            write_durably(file, path.read_bytes())
        record = file.with_suffix(".json")
        if not record.is_file():
            write_durably(record, json.dumps({**asdict(detector.identity), "kept": utc_now()}))
        return detector.sha256

    def _file(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.safetensors"

    @contextmanager
    def _changing(self) -> Iterator[Serving]:
        """What is served, while no other process changes it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._lock, FileLock(self._folder / ".lock"):
            yield self.serving()

    def _write(self, serving: Serving) -> None:
        path = self._folder / "served.json"
        write_durably(path, json.dumps(asdict(serving)))
        self._serving = (_stamp(path), serving)


def _told(detector: Detector) -> Detector:
    logger.info("model %s %s, SHA-256 %.12s, is served", detector.card.name, detector.card.version, detector.sha256)
    return detector


def _stamp(path: Path) -> tuple[int, ...]:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size, status.st_ino
