"""Many studies one after another: each result is kept as it comes, a bad study stops nothing, the next run resumes.

``OUT/results.jsonl`` holds one line per study done and is what a later run reads; ``OUT/results.csv`` is the same
for a spreadsheet, ``OUT/index.html`` for a reader, and ``OUT/<study>/`` holds a study's own files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import filelock

from pe_app.common.errors import InputError, UnfitStudy
from pe_app.common.files import files_below, write_durably
from pe_app.common.progress import Cancelled, Progress, ProgressCallback, silent
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_volume
from pe_app.model.detection import DETECTION
from pe_app.model.detector import DetectionResult, Detector
from pe_app.results.find_studies import BatchStudy
from pe_app.results.ledger import BEGUN, TABLE, Begun, Ledger
from pe_app.results.outcome import RESULTS, Outcome
from pe_app.results.pictures import strongest_slices
from pe_app.results.result_files import write_result
from pe_app.results.worklist_page import worklist_page

log = logging.getLogger(__name__)

PAGE = "index.html"
ENDINGS = 2
"""A study at which the process ended so often without a word is passed over."""
PAGE_SHARE = 0.05
"""Writing the worklist anew takes at most this share of the time; it is also written when there is nothing to do."""
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Finished:
    """A study whose files are written: what ``publish`` gets.

    Attributes:
        study: which one.
        folder: with its detection.json, index.html and the others.
        volume: the CT.
        result: what the model said.
    """

    study: BatchStudy
    folder: Path
    volume: Volume
    result: DetectionResult


def run_batch(
    studies: Iterable[BatchStudy],
    detector: Detector,
    out: Path,
    *,
    total: int = 0,
    full_resolution: bool = False,
    publish: Callable[[Finished], None] | None = None,
    published_as: str = "",
    progress: ProgressCallback = silent,
) -> Generator[Outcome, None, None]:
    """Analyse studies and yield what became of each, as soon as its results are on disk.

    What an earlier run did with the same files (or voxels), model, limits and options is not done again. While the
    networks look at a study, the next one is read in a thread, one ahead and no more, so that memory stays flat.

    Args:
        studies: may come slowly and without end; iterated in the reading thread.
        detector: the model.
        out: folder of all results; one run at a time.
        total: how many studies there will be, where that is known.
        full_resolution: also write each attention on its CT's grid.
        publish: called with every finished study that was read, before its line is written; what it raises becomes
            the outcome's ``problem``, and the next run does the study again.
        published_as: what ``publish`` does; a study that was published otherwise is done again.
        progress: told of every study and of the steps within; ``Cancelled`` stops the batch, what is done stays.

    Raises:
        InputError: if another run writes to ``out``, or results cannot be written there: nothing else stops it.
        Cancelled: from ``progress``.
    """
    batch = _Batch(detector, out, total, full_resolution, publish, published_as, progress)
    with batch.alone():
        yield from batch.run(iter(studies))


@dataclass(frozen=True, eq=False)
class _Opened:
    """A study on its way: how far the reading thread came with it."""

    study: BatchStudy
    volume: Volume | None = None
    read_seconds: float = 0.0
    known: Outcome | None = None
    error: Exception | None = None
    alone: bool = False


class _Batch:
    """One run over studies."""

    def __init__(
        self,
        detector: Detector,
        out: Path,
        total: int,
        full_resolution: bool,
        publish: Callable[[Finished], None] | None,
        published_as: str,
        progress: ProgressCallback,
    ) -> None:
        self.detector = detector
        self.out = out
        self.total = total
        self.full_resolution = full_resolution
        self.publish = publish
        self.published_as = published_as
        self.progress = progress
        self.done = 0
        self.known = 0
        self.given: set[str] = set()
        self.page_is_old = True
        self.page_seconds = 0.0
        self.page_time = 0.0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The folder of results, with no other run in it."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.out / ".lock", timeout=0, thread_local=False)
            lock.acquire()
        except filelock.Timeout as error:
            raise InputError(f"{self.out}: another run is writing results there: wait for it or use --out") from error
        except OSError as error:
            raise InputError(f"{self.out}: cannot be a folder of results ({error.strerror or error})") from error
        try:
            yield
        finally:
            lock.release()

    def run(self, studies: Iterator[BatchStudy]) -> Iterator[Outcome]:
        """One outcome after another."""
        self.kept = Ledger(self.out)
        self.begun = Begun(self.out / BEGUN)
        try:
            yield from self._outcomes(studies)
        except (OSError, _Unwritable) as error:
            raise InputError(
                f"{self.out}: results cannot be written ({error}): what is done stays; make room and start again, it "
                "goes on there"
            ) from error
        except BaseException:  # stopped from outside: the page shows what there is
            self._write_page()
            raise
        finally:
            self.begun.forgive()

    def _outcomes(self, studies: Iterator[BatchStudy]) -> Iterator[Outcome]:
        upcoming = _in_thread(lambda: self.open_next(studies))
        while (opened := self._waited_for(upcoming)) is not None:
            if not opened.alone:
                upcoming = _in_thread(lambda: self.open_next(studies))
            begin = time.monotonic()
            outcome = self._outcome(opened)
            if not outcome.known:
                outcome = replace(outcome, seconds=round(opened.read_seconds + time.monotonic() - begin, 2))
            if not outcome.known or outcome.fingerprint != self.kept.all()[outcome.study].fingerprint:
                self.kept.add(replace(outcome, known=False))
            self.begun.end(opened.study)
            self._count(outcome)
            yield outcome
            if opened.alone:
                upcoming = _in_thread(lambda: self.open_next(studies))
        self.kept.tidy()
        self._write_page()

    def open_next(self, studies: Iterator[BatchStudy]) -> _Opened | None:
        """The next study, read; in the reading thread."""
        study = next(studies, None)
        if study is None:
            return None
        study = replace(study, fingerprint=study.fingerprint or _fingerprint(study.path))
        known = self.kept.all().get(study.study)
        if known is not None and known.fingerprint == study.fingerprint and self._still_holds(known, study):
            return _Opened(study, known=known)
        if self.begun.endings(
            study
        ):  # it may have ended the process: alone, so that no other study is suspected with it
            return _Opened(study, alone=True)
        self.begun.begin(study)
        return self._read(_Opened(study))

    def _read(self, opened: _Opened) -> _Opened:
        begin = time.monotonic()
        try:
            if opened.study.error is not None:
                raise opened.study.error
            volume = read_volume(opened.study.path, series=opened.study.series)
            return replace(opened, volume=volume, read_seconds=time.monotonic() - begin)
        except UnfitStudy as error:
            return replace(opened, error=UnfitStudy(error.code, _without_path(str(error), opened.study)))
        except Exception as error:  # the study's fault, whatever it is
            return replace(opened, error=error)

    def _outcome(self, opened: _Opened) -> Outcome:
        study = opened.study
        if opened.known is not None:
            return replace(opened.known, known=True)
        if opened.alone:
            endings = self.begun.endings(study)
            if endings >= ENDINGS:
                return self._failed(
                    opened,
                    f"the program ended {endings} times while it was at this study, of memory or a damaged file; it is "
                    f"passed over. To try again, delete {BEGUN} in the folder of results",
                )
            self.begun.begin(study)
            opened = self._read(opened)
        if isinstance(opened.error, InputError) and not isinstance(opened.error, UnfitStudy):
            return self._failed(opened, str(opened.error))
        try:
            if isinstance(opened.error, UnfitStudy):
                return self._finished(opened, DetectionResult(self.detector.refuse_unread(opened.error), None))
            if opened.volume is None:
                raise opened.error or ValueError("a study was neither read nor refused")
            kept = self.kept.all().get(study.study)
            if kept is not None and self._still_holds(kept, study, opened.volume):
                return replace(kept, fingerprint=study.fingerprint, known=True)
            return self._finished(opened, self.detector.detect(opened.volume, self.progress))
        except (Cancelled, _Unwritable):
            raise
        except InputError as error:
            return self._failed(opened, str(error))
        except Exception as error:
            log.exception("study %s", study.study)
            return self._failed(opened, f"the program failed at this study ({type(error).__name__}: {error})")

    def _finished(self, opened: _Opened, result: DetectionResult) -> Outcome:
        """Files, then publishing, then the line: what the line says is there."""
        folder = _folder_name(opened.study.study)
        place = self.out / folder
        try:
            write_result(result, opened.volume, place, opened.study.study, full_resolution=self.full_resolution)
        except (OSError, InputError) as error:  # never the study's fault
            raise _Unwritable(str(error)) from error
        detection, problem = result.detection, ""
        if self.publish is not None and opened.volume is not None:
            try:
                self.publish(Finished(opened.study, place, opened.volume, result))
            except Cancelled:
                raise
            except Exception as error:
                words = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
                problem = _without_path(words, opened.study)
        refusals = [reason.message for reason in detection.reasons if reason.refuses]
        return self._stamped(
            opened,
            Outcome(
                opened.study.study,
                detection.status,
                _without_path("; ".join(refusals), opened.study),
                detection,
                problem,
                folder,
                strongest_slices(detection, opened.volume) if opened.volume is not None else (),
            ),
        )

    def _failed(self, opened: _Opened, message: str) -> Outcome:
        return self._stamped(opened, Outcome(opened.study.study, "failed", _without_path(message, opened.study)))

    def _stamped(self, opened: _Opened, outcome: Outcome) -> Outcome:
        source = opened.volume.source if opened.volume is not None else None
        patient, accession, study_date = source.patient_study if source else ("", "", "")
        return replace(
            outcome,
            patient=patient,
            accession=accession,
            study_date=study_date,
            fingerprint=opened.study.fingerprint,
            settings=self._settings(opened.study),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _still_holds(self, kept: Outcome, study: BatchStudy, volume: Volume | None = None) -> bool:
        """Whether an outcome of an earlier run is what this one would find; with a volume, of the same voxels."""
        return (
            kept.detection is not None
            and not kept.problem
            and kept.settings == self._settings(study)
            and (self.out / kept.folder / "detection.json").is_file()
            and (volume is None or kept.detection.image.sha256 == volume.sha256)
        )

    def _settings(self, study: BatchStudy) -> str:
        """What a result depends on beside the voxels."""
        values = {
            "schema": str(DETECTION),
            "model": self.detector.sha256,
            "limits": asdict(self.detector.limits),
            "series": study.series,
            "full_resolution": self.full_resolution,
            "published_as": self.published_as,
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def _count(self, outcome: Outcome) -> None:
        self.given.add(outcome.study)
        if outcome.known:
            self.known += 1
        else:
            self.done += 1
        self.page_is_old = True
        if time.monotonic() - self.page_time > self.page_seconds / PAGE_SHARE:
            self._write_page()
        self._report()

    def _report(self) -> None:
        """Studies of this run: what an earlier one did would make the time left look short."""
        total = max(self.total - self.known, self.done)
        self.progress(Progress("studies", self.done, total, f"{self.known} unchanged, skipped" if self.known else ""))

    def _waited_for(self, upcoming: Future[T]) -> T:
        """The next study; if there is none for a moment, the page is brought up to date."""
        self._report()
        wait([upcoming], timeout=1)
        if not upcoming.done() and self.page_is_old:
            self._write_page()
        return upcoming.result()

    def _write_page(self) -> None:
        begin = time.monotonic()
        outcomes = list(self.kept.all().values())
        waiting = max(0, self.total - len(self.given)) if self.total else 0
        write_durably(self.out / PAGE, worklist_page(outcomes, self.out, len(outcomes) + waiting))
        self.page_time = time.monotonic()
        self.page_seconds = self.page_time - begin
        self.page_is_old = False


class _Unwritable(Exception):  # noqa: N818 - not the study's fault: stops the batch
    """A study's files could not be written."""


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """Work in a thread of its own that never keeps the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="read ahead").start()
    return future


def _without_path(message: str, study: BatchStudy) -> str:
    """A message without the way to the files, which may name the patient."""
    for path in (study.path, study.path.resolve()):
        if len(path.parts) > 1:
            message = message.replace(str(path), study.study).replace(f"{path.parent}/", "")
    return message


def _folder_name(study: str) -> str:
    """A study's name as that of a folder: the same name where it can be, and never two studies' alike."""
    safe = re.sub(r"[^\w.-]", "_", study)[:80].lstrip(".")
    if safe == study and safe not in (RESULTS, TABLE, PAGE):
        return safe
    return f"{safe}-{hashlib.sha256(study.encode()).hexdigest()[:8]}"


def _fingerprint(path: Path) -> str:
    """SHA-256 over names, sizes and times of the files at a path; nothing is opened."""
    files = files_below(path) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        try:
            status = file.stat()
            digest.update(f"{file.relative_to(path.parent)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except OSError:  # reading it will say what is wrong
            digest.update(f"{file.name}\0?\n".encode())
    return digest.hexdigest()
