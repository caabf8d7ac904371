"""Detections on request: the served model, one study at a time, with progress, cancelling and a memory of results."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from monailabel.interfaces.tasks.batch_infer import BatchInferTask
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_app.common.progress import Cancelled, Progress, ProgressCallback
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import image_from_volume, write_volume
from pe_app.model.detection import CANDIDATE_THRESHOLD, Detection, ModelIdentity
from pe_monailabel.server.limits import DETECTION_SECONDS, Busy, TooLong
from pe_monailabel.store.images import ImageFacts
from pe_monailabel.store.models import Models
from pe_monailabel.store.studies import StudyStore

logger = logging.getLogger(__name__)

WAITING_DETECTIONS = 16
"""More requests than this are sent away: each holds a thread while it waits."""

REMEMBERED_JOBS = 500

SERVER_PID = "PE_SERVER_PID"
"""Environment variable that tells a batch which process it works for."""


@dataclass(frozen=True)
class Job:
    """Where a detection is; ``state`` is waiting, running, done, failed or cancelled."""

    state: str = "waiting"
    task: str = ""
    done: int = 0
    total: int = 0
    text: str = ""


class Jobs:
    """The detections that run, wait, or ended lately, by the name that the client chose.

    Attributes:
        seconds: a detection that runs longer is stopped at its next step.
    """

    def __init__(self, seconds: float = DETECTION_SECONDS) -> None:
        self.seconds = seconds
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._cancelled: set[str] = set()
        self._owners: dict[str, str] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> Job | None:
        """Where a job is."""
        return self._jobs.get(name)

    def owner(self, name: str) -> str:
        """Who asked for a job; "" for nobody that is known."""
        return self._owners.get(name, "")

    def cancel(self, name: str) -> bool:
        """Ask a job to stop; False if there is none of that name under way."""
        with self._lock:
            job = self._jobs.get(name)
            under_way = job is not None and job.state in ("waiting", "running")
            if under_way:
                self._cancelled.add(name)
            return under_way

    def cancel_all(self) -> None:
        """Ask every job to stop, since the server does."""
        for name in list(self._jobs):
            self.cancel(name)

    @contextmanager
    def job(self, name: str, owner: str = "") -> Iterator[ProgressCallback]:
        """A reader's job while the block runs: the callback that takes its progress and ends it if it was cancelled."""
        with self._lock:
            known = self._jobs.get(name)
            if known is not None and known.state in ("waiting", "running"):
                raise InputError(f"job {name!r} is running: choose another name")
            under_way = sum(job.state in ("waiting", "running") for job in self._jobs.values())
            if under_way > WAITING_DETECTIONS:
                raise Busy(f"{under_way} detections are waiting: ask again in a minute")
            self._jobs[name] = Job()
            self._owners[name] = owner
            while len(self._jobs) > REMEMBERED_JOBS:
                self._owners.pop(self._jobs.popitem(last=False)[0], None)

        started: float | None = None

        def report(progress: Progress) -> None:
            nonlocal started
            if name in self._cancelled:
                raise Cancelled("cancelled")
            if progress.total and started is None:  # its turn has come
                started = time.monotonic()
            if started is not None and time.monotonic() - started > self.seconds:
                raise TooLong(f"the detection was stopped: it took longer than {self.seconds:g} s")
            state = "waiting" if progress.total == 0 else "running"
            self._jobs[name] = Job(state, progress.task, progress.done, progress.total, progress.text)

        try:
            yield report
            self._jobs[name] = replace(self._jobs[name], state="done")
        except BaseException as error:
            state = "cancelled" if isinstance(error, Cancelled) else "failed"
            self._jobs[name] = replace(self._jobs[name], state=state, text=str(error))
            raise
        finally:
            self._cancelled.discard(name)


@dataclass(frozen=True)
class Summary:
    """A detection in short, for lists of thousands: both probabilities, model, status, codes of its reasons."""

    probability: float | None
    strongest_slab: float | None
    model: str
    status: str
    reasons: tuple[str, ...]


class Detections:
    """What the served model says of the studies; each result is kept under the hashes of voxels and model."""

    def __init__(self, store: StudyStore, models: Models, jobs: Jobs) -> None:
        self._store = store
        self._models = models
        self._jobs = jobs
        self._folder = store.private / "detections"
        self._turn = threading.Semaphore(1)
        self._shown: dict[str, ModelIdentity] = {}
        self._listed: tuple[int, frozenset[str]] = (0, frozenset())
        self._summaries: dict[str, Summary] = {}

    @property
    def model(self) -> ModelIdentity:
        """The model that is served now."""
        return self._models.current().identity

    def known(self, study: str) -> Detection | None:
        """What the served model said of a study; None if it was not asked yet."""
        facts = self._store.known_facts(study)
        if facts is None or not facts.sha256:
            return None
        path = self._path(facts.sha256, self.model.sha256)
        try:
            return _read_detection(path, *_stamp(path))
        except FileNotFoundError:
            return None

    def show(self, study: str) -> Detection | None:
        """What the served model said of a study, for a client to see."""
        detection = self.known(study)
        if detection is not None:
            self._shown[study] = detection.model
        return detection

    def shown(self, study: str) -> ModelIdentity | None:
        """The model that a client saw last on a study; after a restart, the served one if it has seen the study."""
        if study in self._shown:
            return self._shown[study]
        known = self.known(study)
        return known.model if known else None

    def look(self) -> str:
        """Notice what other processes detected; answers the served model's SHA-256, for ``summary``."""
        changed = _changed(self._folder)
        if changed != self._listed[0]:
            self._listed = (changed, frozenset(os.listdir(self._folder)) if changed else frozenset())
        return self.model.sha256

    def summary(self, facts: ImageFacts | None, model_sha256: str) -> Summary | None:
        """What a model said of a CT, by the last ``look``; quick."""
        if facts is None or not facts.sha256:
            return None
        name = f"{facts.sha256[:32]}-{model_sha256[:32]}.json"
        known = self._summaries.get(name)
        if known is None and name in self._listed[1]:
            said = json.loads((self._folder / name).read_text(encoding="utf-8"))
            strongest = max((slab["probability"] for slab in said["evidence"]), default=None)
            model = f"{said['model']['name']} {said['model']['version']}"
            codes = tuple(reason["code"] for reason in said["reasons"])
            known = Summary(said["probability"], strongest, model, said["status"], codes)
            self._summaries[name] = known
        return known

    def detect(self, study: str, job: str = "", owner: str = "") -> tuple[Detection, Path | None]:
        """The detection of a study and the file of its attention volume (None if refused), computed if need be.

        Raises:
            InputError: if the CT cannot be read.
            Cancelled: if the job was cancelled.
            Busy: if too many are waiting.
        """
        with self._jobs.job(job or uuid.uuid4().hex, owner) as report:
            kept = self._kept(study)
            if kept is not None:  # it waits for nobody
                return kept
            self._store.have(study, report)  # others detect while this one is fetched
            with self._my_turn(report):
                report(Progress("read the study", 0, 1))
                volume = self._store.volume(study)
                detector = self._models.current()
                path = self._path(volume.sha256, detector.sha256)
                attention = path.with_suffix(".nrrd")
                if not path.is_file():
                    result = detector.detect(volume, report)
                    if result.attention is not None:
                        write_volume(result.attention, attention)
                    write_durably(path, json.dumps(result.detection.to_json(), allow_nan=False))
                detection = _read_detection(path, *_stamp(path))
                self._shown[study] = detection.model
                return detection, attention if detection.status == "analysed" else None

    def _kept(self, study: str) -> tuple[Detection, Path | None] | None:
        """What was detected before by the served model, and the file of its attention volume."""
        detection = self.known(study)
        if detection is None:
            return None
        attention = self._path(detection.image.sha256, self.model.sha256).with_suffix(".nrrd")
        if detection.status == "analysed" and not attention.is_file():
            return None
        self._shown[study] = detection.model
        return detection, attention if detection.status == "analysed" else None

    @contextmanager
    def _my_turn(self, report: ProgressCallback) -> Iterator[None]:
        """One detection at a time; those that wait can be cancelled."""
        while not self._turn.acquire(timeout=0.2):
            report(Progress("wait for another detection", 0, 0))
        try:
            yield
        finally:
            self._turn.release()

    def _path(self, image_sha256: str, model_sha256: str) -> Path:
        return self._folder / f"{image_sha256[:32]}-{model_sha256[:32]}.json"


class DetectionTask(InferTask):
    """Infer ``detection``: the attention volume on its coarse grid, and the Detection's JSON."""

    def __init__(self, store: StudyStore, detections: Detections) -> None:
        super().__init__(
            InferType.OTHERS, ["embolism"], 3, "Probability of pulmonary embolism, and where to look (attention)"
        )
        self.store = store
        self.detections = detections

    def is_valid(self) -> bool:
        """Whether clients are offered it."""
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, object]]:
        """A temporary file, which the caller removes, and the Detection's JSON."""
        study = request["image"]
        detection, attention = self.detections.detect(
            study, str(request.get("job") or ""), str(request.get("reader") or "")
        )
        volume = None if attention else self.store.volume(study)
        with _result_file() as result:
            self.write(result, study, attention, volume)
        return str(result), detection.to_json()

    def write(self, result: Path, study: str, attention: Path | None, volume: Volume | None) -> None:
        """Write the file that goes to the client; of a refused study an empty map over the whole CT."""
        if attention is not None:
            shutil.copyfile(attention, result)
        elif volume is not None:
            corners = volume.affine @ np.diag([*(max(count - 1, 1) for count in volume.shape), 1])
            write_volume(Volume(np.zeros((2, 2, 2), np.uint8), corners), result)


class CandidatesTask(DetectionTask):
    """Infer ``candidates``: where to look as a label map on the CT's grid, for the stock Slicer plugin."""

    def __init__(self, store: StudyStore, detections: Detections) -> None:
        super().__init__(store, detections)
        self.type = InferType.SEGMENTATION
        self.labels = {"suspicious": 1}
        self.description = "Places to look at for pulmonary embolism, as a label map; not an outline of the embolus"

    def write(self, result: Path, study: str, attention: Path | None, volume: Volume | None) -> None:
        """Voxels whose attention, weighted with the slab's probability, reaches the threshold of a candidate."""
        volume = volume or self.store.volume(study)
        voxels = np.zeros(volume.shape, np.uint8)
        if attention is not None:
            coarse = sitk.ReadImage(str(attention), sitk.sitkFloat32)
            fine = sitk.Resample(coarse, image_from_volume(volume), sitk.Transform(), sitk.sitkLinear, 0.0)
            voxels = (sitk.GetArrayViewFromImage(fine) >= 255 * CANDIDATE_THRESHOLD).astype(np.uint8)
        write_volume(volume.with_voxels(voxels), result)


class BatchDetection(BatchInferTask):
    """Batch inference that also runs without a GPU, where the stock one divides by zero; one study after another."""

    def __call__(self, request: Mapping[str, Any], datastore: StudyStore, infer: Any) -> dict[str, Any]:
        """Ask for the detection of many studies; ends with its server, before the next study."""

        def while_the_server_lives(*arguments: Any, **options: Any) -> Any:
            server = os.environ.get(SERVER_PID)
            if server and int(server) not in (os.getpid(), os.getppid()):
                os._exit(1)  # what was found is kept; the stock loop would go on over any error
            return infer(*arguments, **options)

        one_device = {**request, "device": "cpu", "multi_gpu": False, "max_workers": 1}
        result: dict[str, Any] = super().__call__(one_device, datastore, while_the_server_lives)
        return result


@contextmanager
def _result_file() -> Iterator[Path]:
    """A temporary file that stays only if the block ends well."""
    handle, name = tempfile.mkstemp(suffix=".nrrd", prefix="pe-")
    os.close(handle)
    try:
        yield Path(name)
    except BaseException:
        os.unlink(name)
        raise


@lru_cache(maxsize=4096)
def _read_detection(path: Path, *_stamp: object) -> Detection:
    return Detection.from_json(json.loads(path.read_text(encoding="utf-8")))


def _changed(folder: Path) -> int:
    """When a folder changed last; 0 where it is not there."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
