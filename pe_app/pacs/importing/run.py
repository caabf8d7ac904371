"""The import itself: look at every file, choose one series a study, convert, list, report."""

from __future__ import annotations

import posixpath
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import astuple, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

from filelock import FileLock, Timeout

from pe_app.common.errors import InputError, UnfitStudy
from pe_app.common.files import write_durably
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.common.tables import table_text
from pe_app.common.worker_pool import Processes
from pe_app.ct.dicom_headers import SliceHeader, by_series, read_headers
from pe_app.ct.dicom_stack import in_order_of_choice, unsuitable
from pe_app.ct.lost_slices import NamedFile, lost_slices
from pe_app.ct.quality import CODES, QualityLimits, Reason
from pe_app.ct.source_series import read_source, source_path
from pe_app.pacs.importing.conversion import Converted, Job, convert_study
from pe_app.pacs.importing.dicomdir import is_dicomdir, missing_slices
from pe_app.pacs.importing.pseudonyms import Pseudonyms, identities_folder
from pe_app.pacs.importing.unpacking import SourceFile, find_files, is_archive, unpack
from pe_app.studies import Fitness, Study, read_studies, write_studies

Status = Literal["imported", "known", "left out", "failed"]
_ORDER: tuple[Status, ...] = get_args(Status)

Names = Literal["hash", "accession", "patient"]

FILES_AT_ONCE = 64
"""Headers that one process reads before it reports."""


@dataclass(frozen=True)
class ImportSettings:
    """How studies are imported.

    Attributes:
        study_list: CSV to make or extend; None for STUDIES/studies.csv.
        key_file: gives pseudonyms instead of identifiers; their true series are kept beside it.
        pseudonyms: under that key.
        workers: processes.
        limits: what a study must reach.
        names: what a study is called after: its accession number, its patient and day, or a hash of its identifiers.
    """

    study_list: Path | None = None
    key_file: Path | None = None
    pseudonyms: Pseudonyms | None = None
    workers: int = 1
    limits: QualityLimits = field(default_factory=QualityLimits)
    names: Names = "hash"


@dataclass(frozen=True)
class ImportLine:
    """What became of one series, or of one file that is none.

    Attributes:
        status: ``imported``; ``known`` from an earlier import; ``left out`` for another series of the study or because
            it cannot be a study's CT; ``failed`` where something is damaged.
        study: its id in the folder of studies; empty where there is none.
        patient, series, description: as in the headers; pseudonyms and nothing after de-identification.
        slices: images in the series.
        quality: ``fit``, ``warned`` or ``refused``, also of an earlier import; empty where the series was not taken.
        codes: of the quality gate's reasons, or why a series was left out; separated by blanks.
        reason: the same in words.
        source: the folder or archive.
    """

    status: Status
    study: str = ""
    patient: str = ""
    series: str = ""
    description: str = ""
    slices: int = 0
    quality: str = ""
    codes: str = ""
    reason: str = ""
    source: str = ""


COLUMNS = tuple(entry.name for entry in fields(ImportLine))


def import_studies(
    sources: Sequence[Path],
    studies: Path,
    settings: ImportSettings | None = None,
    progress: ProgressCallback = silent,
) -> tuple[ImportLine, ...]:
    """Convert the DICOM of folders, discs and archives into a folder of studies, one CT a study.

    Every study becomes STUDIES/<study>.nrrd (in STUDIES/volumes where a studies.csv lies beside such a folder) with the
    record of its series (``pe_app.ct.source_series``) and a line in the study list. A study is there as a whole or not
    at all, also after an interruption; studies that are there already are left alone, so that the same call goes on.

    Args:
        sources: folders, DICOMDIR files, single files, .zip and .tar archives.
        studies: made where missing.
        settings: how.
        progress: told after every file and study; may raise ``Cancelled``.

    Returns:
        A line for every series and every damaged file, also written to STUDIES/import.csv (of this call).

    Raises:
        InputError: if a source is not there, nothing in it is DICOM, the list is damaged, or another import is running.
    """
    settings = settings or ImportSettings()
    private = studies / ".pe"
    try:
        private.mkdir(parents=True, exist_ok=True)
        with FileLock(private / "import.lock", timeout=0), ExitStack() as stack:
            for left in private.glob("import-*"):  # by one that was killed
                shutil.rmtree(left)
            unpacked = stack.enter_context(tempfile.TemporaryDirectory(prefix="import-", dir=private))
            processes = stack.enter_context(Processes(settings.workers))
            return _Import(studies, settings, progress, processes).run(sources, Path(unpacked))
    except Timeout as error:
        raise InputError(f"{studies}: another import into this folder is running: wait for it to end") from error
    except OSError as error:
        raise InputError(f"{studies}: the import stopped ({error.strerror or error}); the same call goes on") from error


@dataclass(frozen=True)
class _Headers:
    headers: list[SliceHeader]
    damaged: list[tuple[Path, str]]


class _Import:
    def __init__(
        self, studies: Path, settings: ImportSettings, progress: ProgressCallback, processes: Processes
    ) -> None:
        self.studies = studies
        self.settings = settings
        self.progress = progress
        self.list = settings.study_list or studies / "studies.csv"
        in_volumes = (studies / "studies.csv").is_file() and (studies / "volumes").is_dir()  # as the server has it
        self.folder = studies / "volumes" if in_volumes else studies
        self.listed = read_studies(self.list) if self.list.exists() else ()
        self.processes = processes
        self.lines: list[ImportLine] = []
        self.damaged: list[SourceFile] = []
        self.added: list[Study] = []
        self.named: dict[str, str] = {}

    def run(self, sources: Sequence[Path], unpacked: Path) -> tuple[ImportLine, ...]:
        files = {file.path: file for file in self._files(sources, unpacked)}
        headers = self._headers(files)
        if not headers and not self.lines:
            raise InputError(f"{', '.join(map(str, sources))}: none of the {len(files)} files there is a DICOM image")
        try:
            self._convert(headers, files)
        finally:  # whatever was finished before an interruption is listed
            self._write_list()
            self._write_report()
        return tuple(self.lines)

    def _files(self, sources: Sequence[Path], unpacked: Path) -> Iterator[SourceFile]:
        found = [file for source in sources for file in find_files(source)]
        archives = [file for file in found if is_archive(file.path)]
        yield from (file for file in found if not is_archive(file.path))
        for number, file in enumerate(archives):
            self.progress(Progress("unpack", number, len(archives), file.name))
            try:
                yield from unpack(file.path, unpacked / str(number))
            except InputError as error:
                self.lines.append(ImportLine("failed", reason=str(error), source=str(file.path)))
            self.progress(Progress("unpack", number + 1, len(archives)))

    def _headers(self, files: Mapping[Path, SourceFile]) -> list[SliceHeader]:
        """Of all images; damaged files become lines."""
        paths = [path for path, file in files.items() if not is_dicomdir(file)]
        parts = [paths[start : start + FILES_AT_ONCE] for start in range(0, len(paths), FILES_AT_ONCE)]
        headers: list[SliceHeader] = []
        damaged: dict[Path, str] = {}
        done = 0
        self.progress(Progress("read headers", 0, len(paths)))
        for part, outcome in self.processes.run(_read_part, parts):
            done += len(part)
            self.progress(Progress("read headers", done, len(paths)))
            if isinstance(outcome, Exception):
                outcome = _Headers([], [(path, f"its header cannot be read: {outcome}") for path in part])
            headers += outcome.headers
            damaged |= dict(outcome.damaged)
        slices = {header.path for header in headers}
        named = [NamedFile(path, _folder_of(files[path]), posixpath.basename(files[path].name)) for path in paths]
        for lost in lost_slices(named, slices, damaged)[0]:
            file = files[lost.file.path]
            self.damaged.append(file)
            self.lines.append(ImportLine("failed", reason=f"{file.name}: {lost.reason}", source=str(file.root)))
        return headers

    def _convert(self, headers: Sequence[SliceHeader], files: Mapping[Path, SourceFile]) -> None:
        doubtful = self._doubtful_folders(headers, files)
        gone, unread = missing_slices(files.values())
        for directory, why in unread:
            self.lines.append(ImportLine("left out", reason=why, source=str(directory.root)))
        by_study: dict[tuple[str, str], list[SliceHeader]] = defaultdict(list)
        for header in headers:
            by_study[header.patient, header.study].append(header)
        jobs = []
        for (_, uid), slices in by_study.items():
            faults: dict[str, InputError | None] = {}
            series = by_series(slices)
            for name, members in series.items():
                folders = {_folder_of(files[one.path]) for one in members}
                if gone[name]:
                    text = f"the DICOMDIR lists {gone[name]} of its images that are not there: copy the disc again"
                    faults[name] = UnfitStudy("uneven_spacing", text)
                elif folders & doubtful:
                    faults[name] = InputError(
                        "a damaged file in its folder may belong to it: copy it again, or remove it"
                    )
                else:
                    faults[name] = unsuitable(members)
            usable = in_order_of_choice([series[name] for name in series if faults[name] is None])
            study = self._name(slices[0])
            path = self.folder / f"{study}.nrrd"
            taken = self._known(path, uid)
            for name, members in series.items():
                if faults[name] is not None:
                    self._add(members, files, "left out", study if usable else "", fault=faults[name])
            if taken:
                for members in usable:
                    is_it = taken in (members[0].series, self._uid(members[0].series))
                    fault = None if is_it else InputError("another series of the study was imported before")
                    self._add(members, files, "known" if is_it else "left out", study, fault=fault)
                self.added.append(self._study(study, path, slices[0]))
            elif path.exists():
                fault = InputError(f"{path.name} is there without a record that it came from this study: move it away")
                for members in usable:
                    self._add(members, files, "failed", study, fault=fault)
            elif usable:
                own = {one.path: files[one.path] for members in usable for one in members}
                jobs.append(
                    Job(
                        study,
                        path,
                        tuple(usable),
                        own,
                        self.settings.limits,
                        self.settings.pseudonyms,
                        self.settings.key_file,
                    )
                )
        self.progress(Progress("convert", 0, len(jobs)))
        for done, (job, outcome) in enumerate(self.processes.run(convert_study, jobs), start=1):
            self._note(job, outcome, files)
            self.progress(Progress("convert", done, len(jobs), job.study))

    def _note(self, job: Job, outcome: Converted | Exception, files: Mapping[Path, SourceFile]) -> None:
        """The lines of a study that a process has finished."""
        if isinstance(outcome, Exception):
            outcome = Converted(faults={job.candidates[0][0].series: InputError(f"cannot be converted: {outcome}")})
        for members in job.candidates:
            name = members[0].series
            if name == outcome.taken:
                self._add(members, files, "imported", job.study, reasons=outcome.reasons)
                self.added.append(self._study(job.study, job.path, members[0], outcome.reasons))
            else:
                fault = outcome.faults.get(name) or InputError("another series of the study was taken")
                told = outcome.taken or isinstance(fault, UnfitStudy)
                self._add(members, files, "left out" if told else "failed", job.study, fault=fault)

    def _add(
        self,
        members: Sequence[SliceHeader],
        files: Mapping[Path, SourceFile],
        status: Status,
        study: str,
        reasons: Sequence[Reason] = (),
        fault: InputError | None = None,
    ) -> None:
        """A series' line."""
        first = members[0]
        quality = _fitness(reasons) if status == "imported" else ""
        if fault is not None:
            reasons = [Reason(fault.code if isinstance(fault, UnfitStudy) else "", str(fault), True)]
        elif status == "known":  # what the list remembers of the import that took it
            listed = next((one for one in self.listed if one.study == study), None)
            if listed is not None:
                quality = listed.fitness
                reasons = [Reason(code, CODES.get(code, code), False) for code in listed.reasons.split()]
        self.lines.append(
            ImportLine(
                status,
                study,
                first.patient,
                first.series,
                first.description,
                len(members),
                quality,
                " ".join(dict.fromkeys(reason.code for reason in reasons if reason.code)),
                "; ".join(reason.message for reason in reasons),
                str(files[first.path].root),
            )
        )

    def _doubtful_folders(self, headers: Sequence[SliceHeader], files: Mapping[Path, SourceFile]) -> set[object]:
        """Folders of one study that hold a damaged file, which may be one of its slices."""
        studies: dict[object, set[str]] = defaultdict(set)
        for header in headers:
            studies[_folder_of(files[header.path])].add(header.study)
        return {folder for folder in map(_folder_of, self.damaged) if len(studies[folder]) == 1}

    def _known(self, path: Path, uid: str) -> str:
        """The series that an earlier import took of this study; empty where there was none."""
        record = None
        if path.exists():
            with suppress(InputError):  # a damaged record names nobody
                record = read_source(source_path(path))
        return record.series_uid if record and record.study_uid in (uid, self._uid(uid)) else ""

    def _study(self, study: str, path: Path, header: SliceHeader, reasons: Sequence[Reason] | None = None) -> Study:
        """A study as the list keeps it; ``reasons`` of the quality gate, None where an earlier import asked it."""
        pseudonyms = self.settings.pseudonyms
        accession, date = header.accession, header.date
        if pseudonyms:
            accession, date = pseudonyms.code("accession", accession), pseudonyms.date(header.patient, date)
        return Study(
            study,
            path,
            self._patient(header.patient),
            accession=accession,
            study_uid=self._uid(header.study),
            date=date,
            fitness="" if reasons is None else _fitness(reasons),
            reasons=" ".join(dict.fromkeys(reason.code for reason in reasons or ())),
        )

    def _name(self, header: SliceHeader) -> str:
        """A study's id: the one that the list has for it, or one that no other study has."""
        uid = self._uid(header.study)
        listed = next((one for one in self.listed if one.study_uid and one.study_uid == uid), None)
        if listed is not None and listed.path == self.folder / f"{listed.study}.nrrd":
            return listed.study
        hashed = self._hashed(header.patient, header.study)
        by_patient = f"{header.patient}_{header.date}".strip("_")
        wanted = header.accession if self.settings.names == "accession" else by_patient
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", wanted).strip("._-")[:64]
        if self.settings.names == "hash" or not plain:
            self.named.setdefault(hashed, header.study)
            return hashed
        for name in (plain, f"{plain}-{hashed.removeprefix('ct-')[:6]}"):
            path = self.folder / f"{name}.nrrd"
            free = not path.exists() and name not in {one.study for one in self.listed}
            if self.named.get(name, header.study) == header.study and (free or self._known(path, header.study)):
                self.named[name] = header.study
                return name
        return hashed

    def _hashed(self, patient: str, uid: str) -> str:
        if self.settings.pseudonyms is not None:
            return f"ct-{self.settings.pseudonyms.code('study', f'{patient} {uid}')[:12]}"
        return f"ct-{sha256(f'{patient} {uid}'.encode()).hexdigest()[:12]}"

    def _patient(self, patient: str) -> str:
        return self.settings.pseudonyms.code("patient", patient) if self.settings.pseudonyms else patient

    def _uid(self, uid: str) -> str:
        return self.settings.pseudonyms.uid(uid) if self.settings.pseudonyms else uid

    def _write_list(self) -> None:
        """Add what is not listed yet; lines that are there stay, and get what earlier imports did not keep."""
        found = {study.study: study for study in self.added}
        listed = tuple(_completed(study, found.get(study.study)) for study in self.listed)
        names, paths = {study.study for study in self.listed}, {study.path.resolve() for study in self.listed}
        new = [study for study in self.added if study.study not in names and study.path.resolve() not in paths]
        if new or listed != self.listed:
            write_studies((*listed, *new), self.list)

    def _write_report(self) -> None:
        self.lines.sort(key=lambda line: (_ORDER.index(line.status), line.study, line.series))
        report = self.studies / "import.csv"
        if self.settings.pseudonyms is not None and self.settings.key_file is not None:
            private = identities_folder(self.settings.key_file) / report.name
            write_durably(private, _table(self.lines))
            private.chmod(0o600)
            self.lines = [self._pseudonymous(line) for line in self.lines]
        write_durably(report, _table(self.lines))

    def _pseudonymous(self, line: ImportLine) -> ImportLine:
        """A line that tells nothing of who it is: reasons of files and headers may hold names, those of pixels not."""
        reason = line.reason
        if line.status != "imported" and reason:
            reason = CODES.get(line.codes, "see import.csv beside the key")
        return replace(
            line,
            patient=self._patient(line.patient),
            series=self._uid(line.series),
            description="",
            reason=reason,
            source="",
        )


def _fitness(reasons: Sequence[Reason]) -> Fitness:
    return "refused" if any(reason.refuses for reason in reasons) else "warned" if reasons else "fit"


def _completed(listed: Study, found: Study | None) -> Study:
    """A listed study with the identifiers that are empty in the list."""
    if found is None:
        return listed
    return replace(
        listed,
        accession=listed.accession or found.accession,
        study_uid=listed.study_uid or found.study_uid,
        date=listed.date or found.date,
    )


def _read_part(paths: Sequence[Path]) -> _Headers:
    """The headers of some files, and what is damaged."""
    found = _Headers([], [])
    for path in paths:
        try:
            found.headers.extend(read_headers(path))
        except (InputError, OSError) as error:
            found.damaged.append((path, str(error).removeprefix(f"{path.name}: ")))
    return found


def _folder_of(file: SourceFile) -> tuple[Path, str]:
    return file.root, posixpath.dirname(file.name)


def _table(lines: Sequence[ImportLine]) -> str:
    return table_text(COLUMNS, (astuple(line) for line in lines))
