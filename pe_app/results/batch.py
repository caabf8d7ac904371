"""Many studies one after another: each result is kept as it comes, a bad study stops nothing, the next run goes on.

``OUT/results.jsonl`` holds a line for every study done and is what a later run reads; ``OUT/results.csv`` is the same
for a spreadsheet, ``OUT/index.html`` for a reader, and ``OUT/<study>/`` holds a study's own files.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import filelock
import pydicom

from pe_app.common.errors import InputError, UnfitStudy
from pe_app.common.files import append_durably, write_durably
from pe_app.common.progress import Cancelled, Progress, ProgressCallback, silent
from pe_app.common.schema import json_text
from pe_app.ct.dicom_headers import is_dicom
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import SUFFIXES, read_volume
from pe_app.model.detection import DETECTION
from pe_app.model.detector import DetectionResult, Detector
from pe_app.results.result_files import strongest_slices, write_result
from pe_app.results.worklist import Outcome as Outcome
from pe_app.results.worklist import worklist_page
from pe_app.studies import read_studies

log = logging.getLogger(__name__)

RESULTS = "results.jsonl"
TABLE = "results.csv"
PAGE = "index.html"
BEGUN = ".begun.json"
"""Studies that a run began and did not end: what the process died of may be among them."""

ENDINGS = 2
"""A study at which the process ended so often without a word is passed over."""

PAGE_SHARE = 0.05
"""Writing the worklist anew takes at most this share of the time; it is also written when there is nothing to do."""

COLUMNS = (
    *("study", "status", "probability", "positive", "message", "problem", "reasons", "place", "slice", "z_mm"),
    *("size_mm", "candidates", "extent_estimate_ml", "model", "version", "trained", "model_sha256", "image_sha256"),
    *("seconds", "date", "folder"),
)
"""Of results.csv; place, slice, z_mm and size_mm are the strongest candidate's."""

MAX_DEPTH = 12
"""Folders in folders: more is a loop of links."""

T = TypeVar("T")


@dataclass(frozen=True)
class BatchStudy:
    """A study to analyse.

    Attributes:
        study: its name, unique in the folder of results.
        path: what ``read_volume`` takes.
        series: SeriesInstanceUID, where the folder holds several.
        fingerprint: changes when the source does; "" takes names, sizes and times of the files at ``path``.
        error: why it could not be had: then nothing is read, and this is what became of it.
    """

    study: str
    path: Path
    series: str | None = None
    fingerprint: str = ""
    error: InputError | None = None


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


@dataclass(frozen=True)
class Found:
    """Studies among the paths that a person gave.

    Attributes:
        studies: in the order given, within a folder by name.
        said: what was taken as what, a line each.
        single: whether one study was given as such, and not a list or a folder of several.
    """

    studies: tuple[BatchStudy, ...]
    said: tuple[str, ...]
    single: bool


def find_studies(paths: Sequence[Path]) -> Found:
    """The studies that these files, folders and study lists hold.

    A folder that holds DICOM files is one study, also when its series lie in folders of their own; a folder with
    several DICOM studies (told by Study Instance UID), or with .nrrd, .nii or .nii.gz files, holds many. A folder with
    a studies.csv is that study list. Hidden files and folders of results are passed over. A path without any study
    is kept, so that reading it says what is wrong.

    Raises:
        InputError: if a study list cannot be read.
    """
    studies: list[BatchStudy] = []
    said = []
    for path in paths:
        listed = path / "studies.csv" if path.is_dir() else path
        if listed.suffix.lower() == ".csv" and listed.is_file():
            found = [BatchStudy(study.study, study.path) for study in read_studies(listed)]
            said.append(f"{path}: study list of {len(found)} studies")
        elif not path.is_dir():
            found = [BatchStudy(_stem(path), path)]
        else:
            places = _studies_below(path) or [(path, "")]
            found = [BatchStudy(_name(place, path), place) for place, _ in places]
            if [place for place, _ in places] == [path]:
                said.append(f"{path}: one study")
            else:
                names = [found[0].study, found[-1].study] if len(found) > 1 else [found[0].study]
                said.append(f"{path}: {len(found)} {'studies' if len(found) > 1 else 'file'}, {' to '.join(names)}")
                said += _shared_studies(path, places)
        studies += found
    single = len(paths) == 1 and [study.path for study in studies] == list(paths)
    return Found(_with_unique_names(studies), tuple(said), single)


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
        self.kept = _Kept(self.out)
        self.begun = _Begun(self.out / BEGUN)
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
        return replace(
            outcome,
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
        self.progress(Progress("studies", self.done, total, f"{self.known} known already" if self.known else ""))

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


class _Kept:
    """results.jsonl and results.csv: a line is added for every outcome, the last one of a study counts."""

    def __init__(self, out: Path) -> None:
        self._lines = out / RESULTS
        self._table = out / TABLE
        self._outcomes: dict[str, Outcome] = {}
        self._superseded = False
        content = self._lines.read_bytes() if self._lines.exists() else b""
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                payload = json.loads(line)
            except ValueError:  # torn by a power cut: its study is done again
                self._superseded = True
                continue
            try:
                outcome = Outcome.from_json(payload)
            except ValueError as error:
                raise InputError(f"{self._lines} line {number}: {error}: choose another --out") from error
            self._superseded |= outcome.study in self._outcomes
            self._outcomes[outcome.study] = outcome
        write_durably(self._table, _csv_lines([COLUMNS, *map(_cells, self._outcomes.values())]))

    def all(self) -> Mapping[str, Outcome]:
        """The outcomes of this run and those before, by study."""
        return self._outcomes

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome; it is on disk when this returns."""
        append_durably(self._lines, json_text(outcome.to_json()).encode() + b"\n")
        append_durably(self._table, _csv_lines([_cells(outcome)]))
        self._superseded |= outcome.study in self._outcomes
        self._outcomes = {**self._outcomes, outcome.study: outcome}  # the reading thread looks at it meanwhile

    def tidy(self) -> None:
        """One line a study in both files."""
        if self._superseded:
            lines = [json_text(outcome.to_json()) + "\n" for outcome in self._outcomes.values()]
            write_durably(self._lines, "".join(lines))
            write_durably(self._table, _csv_lines([COLUMNS, *map(_cells, self._outcomes.values())]))
            self._superseded = False


class _Begun:
    """Which studies were begun and not ended, on disk: at which of them an earlier process died, and how often."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._over = False
        self._entries: dict[str, tuple[str, int, bool]] = {}
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                for study, (fingerprint, endings, is_open) in found.items():
                    self._entries[study] = str(fingerprint), int(endings) + bool(is_open), False
            except (ValueError, TypeError, AttributeError):
                path.unlink()  # it is a help, not a result

    def endings(self, study: BatchStudy) -> int:
        """How often the process ended while it was at these files."""
        fingerprint, endings, _ = self._entries.get(study.study, ("", 0, False))
        return endings if fingerprint == study.fingerprint else 0

    def begin(self, study: BatchStudy) -> None:
        """It is being read from now on."""
        self._change(study, (study.fingerprint, self.endings(study), True))

    def end(self, study: BatchStudy) -> None:
        """It was ended well; one that was given up stays known."""
        if self._entries.get(study.study, ("", 0, False))[2]:
            self._change(study, None)

    def forgive(self) -> None:
        """The run ends knowingly: no study is to blame."""
        with self._lock:
            self._over = True
            self._entries = {study: (*entry[:2], False) for study, entry in self._entries.items() if entry[1]}
            if self._entries:
                write_durably(self._path, json.dumps(self._entries))
            else:
                self._path.unlink(missing_ok=True)

    def _change(self, study: BatchStudy, entry: tuple[str, int, bool] | None) -> None:
        with self._lock:
            if self._over:  # the reading thread is one study ahead when a run is stopped
                return
            kept = {name: value for name, value in self._entries.items() if name != study.study}
            self._entries = {**kept, study.study: entry} if entry else kept
            write_durably(self._path, json.dumps(self._entries))


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


def _cells(outcome: Outcome) -> tuple[object, ...]:
    """A line of results.csv."""
    detection = outcome.detection
    first = detection.candidates[0] if detection and detection.candidates else None
    extent = detection.extent_estimate if detection else None
    model = detection.model if detection else None
    return (
        *(outcome.study, outcome.status, detection.probability if detection else None),
        *(detection.positive if detection else None, outcome.message, outcome.problem),
        " ".join(reason.code for reason in detection.reasons) if detection else None,
        *((first.place, first.slice_index, first.z_mm, first.size_mm) if first else (None,) * 4),
        len(detection.candidates) if detection and detection.status == "analysed" else None,
        extent.volume_ml if extent else None,
        *((model.name, model.version, model.trained, model.sha256) if model else (None,) * 4),
        detection.image.sha256 if detection else None,
        *(outcome.seconds, outcome.date, outcome.folder),
    )


def _csv_lines(rows: Iterable[Iterable[object]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow([_cell(value) for value in row])
    return text.getvalue().encode()


def _cell(value: object) -> object:
    """A spreadsheet runs a text that begins like a formula: a study's name is no program."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


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
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        try:
            status = file.stat()
            digest.update(f"{file.relative_to(path.parent)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except OSError:  # reading it will say what is wrong
            digest.update(f"{file.name}\0?\n".encode())
    return digest.hexdigest()


def _studies_below(folder: Path, depth: int = 0) -> list[tuple[Path, str]]:
    """Folders and files that are a study each, with the Study Instance UID ("" for a file) where it is known."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:  # reading the study says what is wrong
        return []
    names = {entry.name for entry in entries}
    if depth > MAX_DEPTH or {"detection.json", RESULTS} & names:
        return []
    files = [entry for entry in entries if entry.is_file()]
    volumes = [file for file in files if file.name.lower().endswith(SUFFIXES)]
    plain = (file for file in files if file not in volumes and file.name.upper() != "DICOMDIR")
    dicom = next((file for file in plain if _is_dicom(file)), None)
    if dicom is not None:
        return [(folder, _study_uid(dicom))]
    below = [place for entry in entries if entry.is_dir() for place in _studies_below(entry, depth + 1)]
    uids = {uid for _, uid in below}
    if not volumes and len(uids) == 1 and "" not in uids:
        return [(folder, uids.pop())]  # series of one study
    return [(file, "") for file in volumes if not file.name.lower().endswith(".seg.nrrd")] + below


def _is_dicom(file: Path) -> bool:
    try:
        return is_dicom(file)
    except OSError:
        return False


def _study_uid(file: Path) -> str:
    """Study Instance UID of a DICOM file; its path where it cannot be told, which no other study has."""
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["StudyInstanceUID"], force=True)
        return str(header.get("StudyInstanceUID") or file)
    except Exception:  # pydicom raises nearly anything on damaged bytes; reading the study says what is wrong
        return str(file)


def _shared_studies(folder: Path, places: Sequence[tuple[Path, str]]) -> list[str]:
    """What to say of series that lie beside those of other studies."""
    count = Counter(uid for _, uid in places if uid)
    said = []
    for uid in (uid for uid in count if count[uid] > 1):
        names = ", ".join(place.relative_to(folder).as_posix() for place, of in places if of == uid)
        said.append(f"{names}: series of one study beside other studies; each is taken alone: pe-app import sorts them")
    return said


def _name(place: Path, root: Path) -> str:
    """A study's name: that of its file or folder, with the folders between it and the one that was given."""
    if place == root:
        return root.resolve().name
    relative = place.relative_to(root)
    return "_".join((*relative.parts[:-1], _stem(relative) if place.is_file() else relative.name))


def _stem(path: Path) -> str:
    suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")
    return path.name[: len(path.name) - len(suffix)] if suffix else path.resolve().name


def _with_unique_names(studies: Sequence[BatchStudy]) -> tuple[BatchStudy, ...]:
    """Studies of one name get the name of the folder above before it, then a number."""
    taken: set[str] = set()
    named = []
    count = Counter(study.study for study in studies)
    for study in studies:
        name = study.study
        if count[name] > 1:
            name = f"{study.path.resolve().parent.name}_{name}"
        unique, number = name, 2
        while unique in taken:
            unique, number = f"{name}_{number}", number + 1
        taken.add(unique)
        named.append(replace(study, study=unique))
    return tuple(named)
