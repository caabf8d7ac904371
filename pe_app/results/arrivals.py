"""Studies as they arrive, in a folder or in an archive: a stream for ``results.batch``, each once and when it is whole.

A study is whole when it has not changed for the settling time. ``OUT/watched.jsonl`` remembers which studies were
handed over in which state, so that a restart goes on; one that changes afterwards (late slices) is handed over again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Protocol

from pe_app.common.errors import InputError
from pe_app.common.files import append_durably
from pe_app.ct.dicom_files import read_header
from pe_app.ct.dicom_headers import is_dicom
from pe_app.ct.lost_slices import NamedFile, lost_slices
from pe_app.ct.volume_io import SUFFIXES
from pe_app.pacs.dicomweb import Archive, ArchiveSeries, Unavailable
from pe_app.results.find_studies import BatchStudy
from pe_app.results.outcome import Outcome

log = logging.getLogger(__name__)

LEDGER = "watched.jsonl"
STAGING = ".arriving"
ATTEMPTS = 3
"""A study that could not be had so often is reported; each attempt waits four times as long as the one before."""


@dataclass(frozen=True)
class WatchSettings:
    """When to look, and when a study is whole.

    Attributes:
        every_s: between two looks.
        settle_s: a study that did not change for so long is whole.
        retry_s: until a study is tried again that was analysed but not published, e.g. since an archive was down.
        once: handle what is there and end, instead of waiting for more.
    """

    every_s: float = 30.0
    settle_s: float = 60.0
    retry_s: float = 600.0
    once: bool = False


@dataclass(frozen=True)
class Arrival:
    """A study that is there, as it is now.

    Attributes:
        study: its name; Study Instance UID for DICOM.
        fingerprint: another one when the study has changed.
        order: those that arrived first are handled first.
        quiet_s: for how long it is known not to have changed.
    """

    study: str
    fingerprint: str
    order: tuple[float, str]
    quiet_s: float


class Source(Protocol):
    """Where studies arrive."""

    def look(self) -> Sequence[Arrival]:
        """What is there now.

        Raises:
            InputError: if it cannot be told.
        """

    def stage(self, arrival: Arrival, folder: Path) -> Path:
        """Where ``read_volume`` finds a study that the last look told of.

        Args:
            arrival: the study.
            folder: to put it into; is not there yet, and is removed afterwards.

        Raises:
            Unavailable: if it cannot be had at the moment.
            InputError: if it cannot be used.
        """


class WatchedFolder:
    """A folder, with those below it, into which scanners or people put DICOM files in any order, or .nrrd and .nii.

    DICOM files belong together by Study Instance UID, wherever they lie. Hidden files and folders are passed over, and
    so is a folder of results.
    """

    def __init__(self, folder: Path, results: Path) -> None:
        if not folder.is_dir():
            raise InputError(f"{folder}: there is no such folder")
        self._folder = folder
        self._results = results.resolve()
        self._known: dict[Path, tuple[tuple[int, int], str]] = {}
        self._files: Mapping[str, list[Path]] = {}

    def look(self) -> Sequence[Arrival]:
        """What lies there now."""
        files: defaultdict[str, list[Path]] = defaultdict(list)
        stamps: dict[Path, tuple[int, int]] = {}
        changed: dict[Path, float] = {}
        damaged: dict[Path, str] = {}
        slices: set[Path] = set()
        try:
            for path in self._visible(self._folder):
                try:
                    status = path.stat() if path.exists() else path.lstat()
                    stamps[path] = status.st_size, status.st_mtime_ns
                    changed[path] = max(status.st_mtime, status.st_ctime)  # copies may keep the time of the original
                    study = self._study_of(path, stamps[path])
                except OSError:  # moved away meanwhile
                    continue
                if study:
                    files[study].append(path)
                    slices |= set() if path.name.lower().endswith(SUFFIXES) else {path}
                elif study is None:
                    damaged[path] = "it is damaged"
        except OSError as error:
            raise Unavailable(f"{self._folder}: cannot be read ({error.strerror or error})") from error
        self._known = {path: known for path, known in self._known.items() if path in stamps}
        named = (NamedFile(path, path.parent, path.name) for path in stamps if not path.name.lower().endswith(SUFFIXES))
        lost, _ = lost_slices(named, slices, damaged)
        for path in (one.file.path for one in lost):  # to the studies it lies among, so that none is whole without it
            beside = [study for study, paths in files.items() if any(one.parent == path.parent for one in paths)]
            for study in beside or [path.name]:
                files[study].append(path)
        self._files = files
        now = time.time()
        return [self._arrival(study, stamps, changed, now) for study in files]

    def stage(self, arrival: Arrival, folder: Path) -> Path:
        """Links to the files of the study, so that others in the same folder are not mixed with it."""
        paths = self._files[arrival.study]
        if len(paths) == 1 and paths[0].name.lower().endswith(SUFFIXES):
            return paths[0]
        for path in paths:
            link = folder / path.relative_to(self._folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        return folder

    def _visible(self, folder: Path) -> Iterator[Path]:
        for path in folder.iterdir():
            if path.name.startswith("."):
                continue
            if path.is_dir():
                if path.resolve() not in (self._results, *folder.resolve().parents):  # links may lead in a circle
                    yield from self._visible(path)
            else:
                yield path

    def _study_of(self, path: Path, stamp: tuple[int, int]) -> str | None:
        """The study a file belongs to; "" for none, None where it is a damaged part of one."""
        known = self._known.get(path)
        if known is not None and known[0] == stamp:
            return known[1] or ""
        name = path.name.lower()
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
        if suffix:
            study = "" if name.endswith(".seg.nrrd") else path.name[: -len(suffix)]
        elif is_dicom(path):
            try:
                header = read_header(path, ["StudyInstanceUID", "Rows"])
                study = str(header.get("StudyInstanceUID") or "") if "Rows" in header else ""  # reports, DICOMDIR
            except Exception:  # pydicom raises nearly anything on damaged bytes
                return None
        else:
            study = ""
        self._known[path] = stamp, study
        return study

    def _arrival(
        self, study: str, stamps: Mapping[Path, tuple[int, int]], changed: Mapping[Path, float], now: float
    ) -> Arrival:
        paths = sorted(self._files[study])
        said = "".join(f"{path.relative_to(self._folder)}\0{stamps[path]}\n" for path in paths)
        last = max(changed[path] for path in paths)
        fingerprint = hashlib.sha256(said.encode("utf-8", "surrogateescape")).hexdigest()
        return Arrival(study, fingerprint, (last, study), now - last)


class WatchedArchive:
    """A DICOMweb archive; of each study the best CT series is fetched.

    Args:
        archive: to watch.
        query: by DICOM keyword.
        days: studies of so many days are looked at, today among them, unless the query says ``StudyDate``.
    """

    def __init__(self, archive: Archive, query: Mapping[str, str], days: int) -> None:
        self._archive = archive
        self._query = query
        self._days = days
        self._series: Mapping[str, tuple[ArchiveSeries, ...]] = {}

    def look(self) -> Sequence[Arrival]:
        """What the archive lists now."""
        since = date.today() - timedelta(days=self._days - 1)
        self._series = self._archive.studies({"StudyDate": f"{since:%Y%m%d}-", **self._query})
        return [self._arrival(number, series) for number, series in enumerate(self._series.values())]

    def stage(self, arrival: Arrival, folder: Path) -> Path:
        """The series, fetched."""
        self._archive.retrieve_study(self._series[arrival.study], folder)
        return folder

    def _arrival(self, number: int, series: Sequence[ArchiveSeries]) -> Arrival:
        state = sorted((one.series, one.instances) for one in series)
        fingerprint = hashlib.sha256(json.dumps(state).encode()).hexdigest()
        return Arrival(series[0].study, fingerprint, (number, series[0].study), 0.0)


RunBatch = Callable[[Iterator[BatchStudy]], Generator[Outcome, None, None]]


def watch(source: Source, out: Path, run: RunBatch, settings: WatchSettings) -> Generator[Outcome, None, None]:
    """Hand over every study that arrives, once, and yield what became of it.

    A source that fails is asked again at the next look; a study that cannot be had or read becomes an outcome with the
    reason and stops nothing.

    Args:
        source: where studies arrive.
        out: folder of results.
        run: ``run_batch`` over a stream of studies.
        settings: when to look.

    Raises:
        InputError: if the source cannot be used when it is looked at first; with ``once`` also if it is not available.
    """
    stream = _Stream(source, out, settings)
    try:
        with closing(run(stream.studies())) as outcomes:
            for outcome in outcomes:
                stream.done(outcome)
                yield outcome
    finally:
        stream.stop.set()


class _Stream:
    """The studies that arrive, in the thread that reads them; what became of them, in the caller's."""

    def __init__(self, source: Source, out: Path, settings: WatchSettings) -> None:
        self.stop = threading.Event()
        self._source = source
        self._settings = settings
        self._ledger = out / LEDGER
        self._staging = out / STAGING
        self._handed: dict[str, str] = {}
        self._seen: dict[str, tuple[str, float]] = {}
        self._again: dict[str, float] = {}
        self._attempts: dict[str, int] = {}

    def studies(self) -> Iterator[BatchStudy]:
        """Every study that is whole and was not handed over as it is; without end unless ``once``."""
        self._handed = _read_ledger(self._ledger)  # now: the folder of results is this run's alone
        shutil.rmtree(self._staging, ignore_errors=True)
        first, said = True, ""
        while not self.stop.is_set():
            try:
                open_ones = self._to_hand_over(self._source.look())
                said = ""
            except InputError as error:
                if (first and not isinstance(error, Unavailable)) or self._settings.once:
                    raise
                if str(error) != said:
                    log.warning("%s; it is looked at again every %.0f s", error, self._settings.every_s)
                open_ones, said = [], str(error)
            ready = [arrival for arrival in open_ones if self._is_whole(arrival)]
            for arrival in ready:
                if self.stop.is_set():
                    return
                study = self._staged(arrival)
                if study is not None:
                    yield study
                elif not self._settings.once:
                    break  # the whole source may be away: the next look tells
            if self._settings.once and (len(ready) == len(open_ones) or not first):
                return
            first = False
            self.stop.wait(self._settings.settle_s if self._settings.once else self._settings.every_s)

    def done(self, outcome: Outcome) -> None:
        """Remember a study that was handled; it is not handed over again as it is, but where its publishing failed."""
        shutil.rmtree(self._folder(outcome.study, outcome.fingerprint), ignore_errors=True)
        if outcome.problem:
            self._again[outcome.study] = time.monotonic() + self._settings.retry_s
            return
        self._again.pop(outcome.study, None)
        entry = {"study": outcome.study, "fingerprint": outcome.fingerprint, "status": outcome.status}
        append_durably(self._ledger, json.dumps(entry).encode() + b"\n")

    def _to_hand_over(self, arrivals: Sequence[Arrival]) -> list[Arrival]:
        now = time.monotonic()
        for arrival in arrivals:
            if self._seen.get(arrival.study, ("", 0.0))[0] != arrival.fingerprint:
                self._seen[arrival.study] = arrival.fingerprint, now
        again = dict(self._again)
        return sorted(
            (
                one
                for one in arrivals
                if (again[one.study] < now if one.study in again else self._handed.get(one.study) != one.fingerprint)
            ),
            key=lambda arrival: arrival.order,
        )

    def _is_whole(self, arrival: Arrival) -> bool:
        observed_s = time.monotonic() - self._seen[arrival.study][1]
        return max(arrival.quiet_s, observed_s) >= self._settings.settle_s

    def _staged(self, arrival: Arrival) -> BatchStudy | None:
        """The study for the batch; None where it cannot be had now."""
        folder = self._folder(arrival.study, arrival.fingerprint)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        error: InputError | None = None
        path = folder
        try:
            path = self._source.stage(arrival, folder)
        except Unavailable as fault:
            attempts = self._attempts[arrival.study] = self._attempts.get(arrival.study, 0) + 1
            if attempts < ATTEMPTS or self._settings.once:  # a later run tries again
                log.warning("study %s: %s; it is tried again", arrival.study, fault)
                self._again[arrival.study] = time.monotonic() + self._settings.every_s * 4**attempts
                return None
            error = fault
        except InputError as fault:
            error = fault
        self._attempts.pop(arrival.study, None)
        self._handed[arrival.study] = arrival.fingerprint
        self._again.pop(arrival.study, None)
        return BatchStudy(arrival.study, path, fingerprint=arrival.fingerprint, error=error)

    def _folder(self, study: str, fingerprint: str) -> Path:
        name = hashlib.sha256(f"{study}\0{fingerprint}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return self._staging / name


def _read_ledger(path: Path) -> dict[str, str]:
    """The state in which each study was handled last."""
    handled: dict[str, str] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            handled[entry["study"]] = entry["fingerprint"]
        except (ValueError, TypeError, KeyError):  # torn by a power cut: its study is handled again
            log.warning("%s: a line is damaged; its study is analysed again", path)
    return handled
