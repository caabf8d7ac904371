"""The trainings that clients ask for: one at a time in a process of its own, the others wait, and all are written down.

    STUDIES/.pe/runs/tasks.json          what was asked for, and how it ended
    STUDIES/.pe/runs/<stage>-<number>/   one training (``pe_app.training.run``, ``tasks.training_process``)
    STUDIES/.pe/encoder.safetensors      what stage I published, where stage II starts
    STUDIES/.pe/models/                  what is served (``store.models``)

A training that was stopped, or whose server died, goes on with the next request, unless studies, annotations or
settings changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from monailabel.interfaces.tasks.train import TrainTask

from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_app.studies import write_studies
from pe_monailabel.server.limits import Busy
from pe_monailabel.store.models import Models
from pe_monailabel.store.studies import StudyStore
from pe_monailabel.tasks.training_process import (
    STOPPED,
    Request,
    Settings,
    encoder_to_start_from,
    read_status,
    stage_settings,
    tell_end,
)

logger = logging.getLogger(__name__)

KEPT_RUNS = 3
KEPT_TASKS = 100
WAITING_TASKS = 8
DETAILS = 20
"""Last lines of a training's log that clients see."""

STOP_SECONDS = 8.0
"""A process that was asked to stop is killed after that; a server that stops does not wait longer."""

DESCRIPTIONS = {"encoder": "Stage I, from annotated slices", "classifier": "Stage II, from study labels"}


class StageTask(TrainTask):
    """A training as MONAI Label describes it to clients."""

    def __init__(self, stage: str, private: Path, conf: Mapping[str, object]) -> None:
        super().__init__(DESCRIPTIONS[stage])
        self.stage = stage
        self._runs = private / "runs"
        self._conf = conf

    def config(self) -> Settings:
        """The settings that clients may change: the paper's, or those of the server's ``--conf``."""
        return self.settings({})

    def settings(self, said: Mapping[str, object]) -> Settings:
        """All settings, with those that were said in place of the defaults.

        Raises:
            InputError: if one of them cannot be used.
        """
        return stage_settings(self.stage, {**self._conf, **said})

    def stats(self) -> dict[str, Any]:
        """How far the last training is."""
        status = read_status(self.runs()[-1]) if self.runs() else {}
        if status.get("best_epoch"):  # under the name that the stock Slicer plugin shows
            status["best_metric"] = status["history"][status["best_epoch"] - 1].get("validation_accuracy")
        return status

    def runs(self) -> list[Path]:
        """The folders of the last trainings."""
        return sorted(self._runs.glob(f"{self.stage}-????"))

    def __call__(self, request: Mapping[str, object], datastore: StudyStore) -> dict[str, Any]:
        """Not how this app trains: see ``Trainings``."""
        raise InputError("a training is asked for with POST /train/encoder or /train/classifier")


@dataclass(frozen=True)
class Task:
    """A training that somebody asked for, under MONAI Label's names.

    Attributes:
        id: its name.
        status: SUBMITTED, RUNNING, DONE, ERROR, STOPPED (by a client) or INTERRUPTED (with the server).
        request: stage and settings, as they were asked for.
        start_ts: when it was asked for; local time.
        end_ts: when it ended.
        run: name of its folder; several tasks may go on in one.
        reader: who asked.
        details: last lines of its log.
    """

    id: str
    status: str
    request: Mapping[str, object]
    start_ts: str
    end_ts: str = ""
    run: str = ""
    reader: str = ""
    details: tuple[str, ...] = field(default_factory=tuple)


class Trainings:
    """The queue of trainings of a server."""

    def __init__(self, store: StudyStore, models: Models, stages: Callable[[], Mapping[str, StageTask]]) -> None:
        self._store = store
        self._models = models
        self._stages = stages
        self._path = store.private / "runs" / "tasks.json"
        self._tasks: dict[str, Task] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._worker: threading.Thread | None = None
        self._closed = False
        self._lock = threading.RLock()

    # What clients ask

    def submit(self, stage: str, said: Mapping[str, object], reader: str, *, enqueue: bool) -> Task:
        """Start a training, or let it wait for those before it.

        Raises:
            Busy: if one is running and this one may not wait, or too many wait.
        """
        with self._lock:
            waiting = [task for task in self._tasks.values() if task.status in ("SUBMITTED", "RUNNING")]
            if waiting and not enqueue:
                raise Busy("a training is running: wait for it, stop it, or ask with enqueue=true")
            if len(waiting) > WAITING_TASKS:
                raise Busy(f"{len(waiting)} trainings are waiting: ask again when some are done")
            task = Task(uuid.uuid4().hex, "SUBMITTED", {"model": stage, **said}, _now(), reader=reader)
            self._keep(task)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="trainings", daemon=True)
                self._worker.start()
            return task

    def tasks(self) -> list[Task]:
        """What was asked for, in order, by this server and those before it."""
        return [self._shown(task) for task in self._tasks.values()]

    def _shown(self, task: Task) -> Task:
        """As clients see it: the stock Slicer plugin takes the last of the details, so that there is always one."""
        return replace(task, details=self._details(task) or (task.status.lower(),))

    def running(self) -> Task | None:
        """The training that runs now."""
        return next((task for task in self.tasks() if task.status == "RUNNING"), None)

    def stop(self) -> Task | None:
        """End the training that runs, at its next step; what it has learned is kept."""
        with self._lock:
            task = next((task for task in self._tasks.values() if task.status == "RUNNING"), None)
            if task is None:
                return None
            stopped = replace(task, status="STOPPED", end_ts=_now())
            self._keep(stopped)
            if self._process is not None:
                threading.Thread(target=_end_process, args=(self._process,), daemon=True).start()
        return self._shown(stopped)

    # With the server

    def open(self) -> None:
        """Learn what ran before this server started; what had not ended then was interrupted."""
        try:
            said = json.loads(self._path.read_text(encoding="utf-8"))
            tasks = [Task(**{**entry, "details": tuple(entry["details"])}) for entry in said]
        except FileNotFoundError:
            tasks = []
        except (ValueError, TypeError, KeyError):
            aside = self._path.with_name(f"{self._path.name}.damaged-{uuid.uuid4().hex[:8]}")
            os.replace(self._path, aside)
            logger.exception("%s is damaged: it is set aside as %s", self._path, aside.name)
            tasks = []
        self._tasks = {task.id: task for task in tasks}
        self._interrupt()

    def close(self) -> None:
        """End what runs because the server ends."""
        with self._lock:
            self._closed = True
            self._interrupt()
            process = self._process
        if process is not None:
            _end_process(process)

    def _interrupt(self) -> None:
        for task in list(self._tasks.values()):
            if task.status in ("SUBMITTED", "RUNNING"):
                self._keep(replace(task, status="INTERRUPTED", end_ts=_now()))
                folder = self._path.parent / task.run
                if task.run and read_status(folder).get("state") == "running":
                    tell_end(folder, Request.read(folder), "interrupted", "the server ended; ask again to go on")

    # The thread that trains

    def _work(self) -> None:
        while True:
            with self._lock:
                task = next((task for task in self._tasks.values() if task.status == "SUBMITTED"), None)
                if task is None or self._closed:
                    self._worker = None
                    return
                task = replace(task, status="RUNNING")
                self._keep(task)
            try:
                self._run(task)
            except InputError as error:
                self._end(task, "ERROR", str(error))
            except Exception as error:
                logger.exception("a training cannot be run")
                self._end(task, "ERROR", f"the server failed: {type(error).__name__}")

    def _run(self, task: Task) -> None:
        """Prepare a run folder and train in it, in a process that ends with this one."""
        folder = self._prepare(task)
        task = replace(task, run=folder.name)
        with self._lock:
            if self._tasks[task.id].status != "RUNNING":  # stopped meanwhile
                return
            self._keep(task)
            with (folder / "log.txt").open("ab") as log:
                command = [sys.executable, "-P", "-m", "pe_monailabel.tasks.training_process", str(folder)]
                self._process = process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        code = process.wait()
        with self._lock:
            self._process = None
        if code == 0:
            self._end(task, "DONE")
        elif code != STOPPED and read_status(folder).get("state") in (None, "running"):
            text = f"its process ended with {code}; the last lines of {folder / 'log.txt'} may say why"
            tell_end(folder, Request.read(folder), "failed", text)
        if code != 0:
            self._end(task, "STOPPED" if code == STOPPED else "ERROR")

    def _prepare(self, task: Task) -> Path:
        """The folder of the last training if that ended early and was the same, else a new one."""
        stage = self._stages()[str(task.request["model"])]
        settings = stage.settings({name: value for name, value in task.request.items() if name != "model"})
        studies = self._store.studies()
        start = encoder_to_start_from(self._store.private, self._models) if stage.stage == "classifier" else None
        said = [
            settings,
            [[str(study), self._store.facts(study.study).sha256] for study in studies],
            hashlib.sha256(start.read_bytes()).hexdigest() if start else "",
        ]
        fingerprint = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        runs = stage.runs()
        if runs and read_status(runs[-1]).get("state") != "finished" and _text(runs[-1] / "sha256") == fingerprint:
            return runs[-1]
        number = int(runs[-1].name.rpartition("-")[2]) + 1 if runs else 1
        folder = self._path.parent / f"{stage.stage}-{number:04d}"
        write_studies(studies, folder / "studies.csv")
        first = str(self._models.start) if self._models.start else None
        Request(stage.stage, settings, str(self._store.private), first).write(folder)
        left_out = "".join(f"left out: study {study}: {reason}\n" for study, reason in self._store.left_out().items())
        write_durably(folder / "log.txt", left_out)
        write_durably(folder / "sha256", fingerprint)
        for old in stage.runs()[:-KEPT_RUNS]:
            shutil.rmtree(old, ignore_errors=True)
        return folder

    def _end(self, task: Task, status: str, detail: str = "") -> None:
        with self._lock:
            if self._tasks[task.id].status == "RUNNING":  # not stopped or interrupted already
                details = (detail,) if detail else self._details(task)
                self._keep(replace(task, status=status, end_ts=_now(), details=details))

    def _details(self, task: Task) -> tuple[str, ...]:
        if (task.end_ts and task.details) or not task.run:
            return task.details
        return tuple(_text(self._path.parent / task.run / "log.txt").splitlines()[-DETAILS:])

    def _keep(self, task: Task) -> None:
        tasks = {**self._tasks, task.id: task}
        self._tasks = dict(list(tasks.items())[-KEPT_TASKS:])
        try:
            write_durably(self._path, json.dumps([asdict(task) for task in self._tasks.values()], indent=1))
        except OSError:
            logger.exception("the list of trainings is kept in memory only")


def _end_process(process: subprocess.Popen[bytes]) -> None:
    """Close the input of a training's process, which stops at its next step; kill it if that takes too long."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def _now() -> str:
    return datetime.now().strftime("%Y-%m-%d %H:%M:%S")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
