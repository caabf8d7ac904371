"""A DICOMweb archive as the studies: listed from it, fetched on first use, all that readers say kept in a folder here.

    FOLDER/<Study Instance UID>.nrrd   the CTs that were fetched, as in every folder of studies
    FOLDER/.pe/archive.json            the archive's last listing: with it the server starts while the archive is down
    FOLDER/.pe/fetches/<study>.json    what was fetched of a study and from which state of it, or why it cannot be used

MONAI Label's own DICOMweb datastore is not used: it downloads dcmqi when it starts, so that it does not start without
internet, takes any series for an image, asks the archive anew in requests while the whole server waits, keeps labels
as DICOM SEG in the archive only (what a draft is not), and lets the cache grow without end.

A study is one row, as everywhere: of its CT series, the one with most slices that is an axial volume is taken. Its id
is the Study Instance UID, which stays when further series of it arrive.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from monailabel.datastore.local import ImageLabelModel

from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.ct.source_series import source_path, write_source
from pe_app.ct.volume_io import read_volume, write_volume
from pe_app.pacs.dicomweb import Access, Archive, ArchiveSeries, Incomplete, Unavailable
from pe_app.studies import Study
from pe_monailabel.store.images import ImageFacts
from pe_monailabel.store.studies import StudyStore

logger = logging.getLogger(__name__)

ENDING = ".nrrd"
REFRESH_SECONDS = 60.0
"""Between two looks at what the archive holds."""
DOWN_SECONDS = 20.0
"""After the archive could not be reached, requests are told so at once for that long, instead of waiting each."""
INCOMPLETE_SECONDS = 600.0
"""A study that did not come whole is not fetched again for that long: others are chosen meanwhile."""
GRACE_SECONDS = 600.0
"""A CT that was used in the last minutes stays: somebody may be reading its file."""
CACHE_GB = 50.0
FETCHES_AT_ONCE = 2
PASSWORD = "PE_ARCHIVE_PASSWORD"


@dataclass(frozen=True)
class ArchiveSettings:
    """What to serve of which archive.

    Attributes:
        access: to the archive.
        query: by DICOM keyword: ``PatientID``, ``StudyDate``, ``SeriesDescription``, ...
        cache_gb: of CTs kept here; those with labels and annotations always stay.
    """

    access: Access
    query: Mapping[str, str] = field(default_factory=dict)
    cache_gb: float = CACHE_GB

    def conf(self) -> dict[str, str]:
        """As settings of the app, which every process of it reads; the password goes by the environment."""
        said = {
            "archive": self.access.url,
            "archive_user": self.access.user,
            "archive_ca": str(self.access.ca.resolve()) if self.access.ca else "",
            "archive_query": json.dumps(dict(self.query)),
            "archive_cache_gb": str(self.cache_gb),
        }
        os.environ[PASSWORD] = self.access.password
        return said

    @classmethod
    def from_conf(cls, conf: Mapping[str, str]) -> ArchiveSettings | None:
        """The settings that ``conf`` gave; None where a folder is served."""
        if "archive" not in conf:
            return None
        ca = conf.get("archive_ca")
        access = Access(
            conf["archive"], conf.get("archive_user", ""), os.environ.get(PASSWORD, ""), Path(ca) if ca else None
        )
        query = json.loads(conf.get("archive_query", "{}"))
        return cls(access, query, float(conf.get("archive_cache_gb", CACHE_GB)))


@dataclass(frozen=True)
class Fetched:
    """What became of a study's fetch.

    Attributes:
        state: of the study in the archive then: instances by series.
        series: the series that was taken; "" for none.
        reason: why none of them can be used; "" where one was.
    """

    state: Mapping[str, int]
    series: str
    reason: str = ""


def open_store(studies: str, conf: Mapping[str, str]) -> StudyStore:
    """The store that the app's settings ask for: a folder, or an archive with its folder here."""
    settings = ArchiveSettings.from_conf(conf)
    return ArchiveStore(studies, settings) if settings else StudyStore(studies)


class ArchiveStore(StudyStore):
    """A folder of studies whose CTs come from an archive when they are first used.

    Nothing but a fetch waits for the archive, and only for the study that somebody asked for. Whatever was fetched is
    served while the archive is down, and after the study was deleted from it.
    """

    def __init__(self, folder: str | Path, settings: ArchiveSettings) -> None:
        self.archive = Archive(settings.access)
        self._settings = settings
        self._listing_path = Path(folder).resolve() / ".pe" / "archive.json"
        self._series: dict[str, tuple[ArchiveSeries, ...]] = self._read_listing()
        self._fetching: dict[str, Progress] = {}
        self._turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._slots = threading.Semaphore(FETCHES_AT_ONCE)
        self._away: dict[str, tuple[float, str]] = {}  # of a study, or of the archive as ""
        super().__init__(folder)
        self._name_patients()

    # What the archive holds

    def follow(self) -> None:
        """Learn what the archive holds now, and from here on in the background.

        Raises:
            InputError: if the archive cannot be used; not where it is only down and was listed before.
        """
        shutil.rmtree(self.private / "fetching", ignore_errors=True)  # what a killed server left
        try:
            self.update()
        except Unavailable as error:
            if not self._listing_path.is_file():
                raise
            logger.warning("%s; the studies that were listed last are served", error)
        threading.Thread(target=self._follow, name="follow the archive", daemon=True).start()

    def update(self) -> None:
        """Ask the archive what it holds; the studies that came are listed from now on, those that went no longer.

        Raises:
            InputError: if it does not answer; what was known before stands.
        """
        now = self.archive.studies(self._settings.query)
        self._away.pop("", None)
        if now == self._series:
            return
        content = {study: [asdict(one) for one in series] for study, series in now.items()}
        write_durably(self._listing_path, json.dumps(content))
        with self.lock:
            came, went = len(now.keys() - self._series.keys()), len(self._series.keys() - now.keys())
            self._series = now
            self._name_patients()
            for study in now:
                self._forget_outdated(study)
            self.refresh()
        logger.info("%s: %d studies, %d new, %d gone", self.archive.access.url, len(now), came, went)

    def _follow(self) -> None:
        said = ""
        while True:
            time.sleep(REFRESH_SECONDS)
            try:
                self.update()
                said = ""
            except InputError as error:
                if str(error) != said:
                    logger.warning("%s; what was fetched is served", error)
                said = str(error)
            except Exception:
                logger.exception("the archive cannot be followed; another attempt in %.0f s", REFRESH_SECONDS)

    def _read_listing(self) -> dict[str, tuple[ArchiveSeries, ...]]:
        try:
            content = json.loads(self._listing_path.read_bytes())
            return {study: tuple(ArchiveSeries(**one) for one in series) for study, series in content.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError):
            logger.warning("%s is damaged: the archive is asked anew", self._listing_path)
            self._listing_path.unlink()
            return {}

    def _name_patients(self) -> None:
        """Let trainings split by patient."""
        for study, series in self._series.items():
            if study not in self._listed:
                self._listed[study] = Study(study, self._folder / f"{study}{ENDING}", patient=series[0].patient)

    # The store

    def entries(self) -> dict[str, ImageLabelModel]:
        """What the index says of each study; also after another program saw this folder without the archive."""
        if not self._series.keys() <= self._datastore.objects.keys():
            self.refresh()
        return super().entries()

    def check_study(self, image_id: str) -> None:
        """Refuse an id that neither the archive nor this folder has."""
        if image_id in self._series and image_id not in self._datastore.objects:
            self.refresh()
        super().check_study(image_id)

    def _image_files(self) -> list[str]:
        """Files that are here, and those that a fetch would make."""
        return sorted({*super()._image_files(), *(f"{study}{ENDING}" for study in self._series)})

    def _entry(self, image_id: str, ext: str, held: ImageLabelModel | None) -> ImageLabelModel:
        entry = super()._entry(image_id, ext, held)
        for series in self._series.get(image_id, ())[:1]:
            said = {"patient": series.patient, "date": series.date, "description": series.study_description}
            entry.image.info = {**entry.image.info, **{name: text for name, text in said.items() if text}}
        return entry

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """MONAI Label's info of a CT, which does not fetch it."""
        self.check_study(image_id)
        return {**self._datastore.objects[image_id].image.info, "path": str(self.image_path(image_id))}

    def known_facts(self, image_id: str) -> ImageFacts | None:
        """What is known of the CT without fetching or reading it."""
        if self.image_path(image_id).is_file():
            return super().known_facts(image_id)
        fetched = self._fetched(image_id)
        if fetched and fetched.reason:
            return ImageFacts(reason=fetched.reason)
        return self.images.last_facts(image_id)

    def facts(self, image_id: str) -> ImageFacts:
        """What is known of the CT; it is fetched and examined if nobody did."""
        try:
            return super().facts(image_id)
        except InputError as error:  # the next study is chosen instead
            return ImageFacts(reason=str(error))

    def not_examined(self, image_id: str) -> str:
        """What to tell of a CT that nobody looked at yet."""
        if self.image_path(image_id).is_file():
            return super().not_examined(image_id)
        fetching = self._fetching.get(image_id)
        if fetching is None:
            return "in the archive; fetched on first use"
        return f"being fetched from the archive: {fetching.done} of {fetching.total or 'unknown'} slices"

    def to_examine(self) -> list[str]:
        """CTs that are here and that nobody looked at yet: a look in the background does not fetch the archive."""
        return [study for study in super().to_examine() if self.image_path(study).is_file()]

    def to_train(self) -> list[str]:
        """Studies that somebody said something of; others are not fetched for a training."""
        return [study for study in super().to_train() if self._is_kept(study)]

    def have(self, image_id: str, progress: ProgressCallback = silent) -> None:
        """Let the CT be here.

        Raises:
            Unavailable: if the archive cannot be reached.
            InputError: if none of the study's series can be used.
        """
        path = self.image_path(image_id)
        if path.is_file():
            self._note_use(image_id)
            return
        with self._turns[image_id], self._slots:
            if not path.is_file():
                self._fetch(image_id, path, progress)
        self._note_use(image_id)
        self._make_room()

    def _note_use(self, study: str) -> None:
        used = self.private / "fetches" / f"{study}.used"
        with suppress(OSError):  # of a full disk: another CT goes first then
            used.parent.mkdir(exist_ok=True)
            used.touch()

    def _used(self, ct: Path) -> float:
        """When a CT was used last."""
        note = self.private / "fetches" / f"{ct.name.removesuffix(ENDING)}.used"
        with suppress(FileNotFoundError):
            return note.stat().st_mtime
        return ct.stat().st_mtime

    def _image_file(self, image_id: str) -> Path:
        self.check_study(image_id)
        self.have(image_id)
        return super()._image_file(image_id)

    # Fetching

    def _fetch(self, study: str, path: Path, progress: ProgressCallback) -> None:
        known = self._fetched(study)
        if known and known.reason:
            raise InputError(known.reason)
        for away in ("", study):
            until, said = self._away.get(away, (0.0, ""))
            if time.monotonic() < until:
                raise Unavailable(said)

        def report(fetching: Progress) -> None:
            self._fetching[study] = fetching
            progress(fetching)

        try:
            with self._counting(study):
                held = self.archive.studies({**self._settings.query, "StudyInstanceUID": study}).get(study, ())
                taken, reason = self._take(held, path, report)
        except Unavailable as error:
            alone = isinstance(error, Incomplete)
            seconds = INCOMPLETE_SECONDS if alone else DOWN_SECONDS
            self._away[study if alone else ""] = time.monotonic() + seconds, str(error)
            raise
        fetched = Fetched({one.series: one.instances for one in held}, taken, reason)
        write_durably(self._fetched_path(study), json.dumps(asdict(fetched)))
        if reason:
            raise InputError(reason)

    @contextmanager
    def _counting(self, study: str) -> Iterator[None]:
        self._fetching[study] = Progress("fetch from the archive", 0, 0)
        try:
            yield
        finally:
            del self._fetching[study]

    def _take(self, series: Sequence[ArchiveSeries], path: Path, progress: ProgressCallback) -> tuple[str, str]:
        """The series that was made the study's CT, or "" and why none was."""
        if not series:
            return "", f"study {path.name.removesuffix(ENDING)}: the archive has no CT series of it any longer"
        folder = self.private / "fetching" / series[0].study
        try:
            taken = self.archive.retrieve_study(series, folder, progress)
            volume = read_volume(folder)
            if volume.source is not None:
                write_source(replace(volume.source, image_sha256=volume.sha256), source_path(path))
            write_volume(volume, path)
        except Unavailable:
            raise
        except InputError as error:
            return "", str(error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return taken.series, ""

    def _fetched_path(self, study: str) -> Path:
        return self.private / "fetches" / f"{study}.json"

    def _fetched(self, study: str) -> Fetched | None:
        try:
            return Fetched(**json.loads(self._fetched_path(study).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    # Keeping

    def _is_kept(self, study: str) -> bool:
        """Whether somebody said something of a study, or the archive no longer has it."""
        return bool(study not in self._series or self._datastore.objects[study].labels or self.label(study))

    def _forget_outdated(self, study: str) -> None:
        """A study that grew since it was fetched is fetched again, unless somebody annotated it as it was."""
        fetched = self._fetched(study)
        state = {one.series: one.instances for one in self._series[study]}
        outdated = fetched is not None and any(fetched.state.get(uid, 0) < count for uid, count in state.items())
        if outdated and not (study in self._datastore.objects and self._is_kept(study)):
            self._fetched_path(study).unlink(missing_ok=True)
            (self._folder / f"{study}{ENDING}").unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Remove the CTs that were not used for longest, as far as the archive has them and nobody annotated them."""
        with self.lock:
            files = [self._folder / name for name in super()._image_files()]
            used = {path: self._used(path) for path in files}
            over = sum(path.stat().st_size for path in files) - self._settings.cache_gb * 1e9
            now = time.time()
            for path in sorted(files, key=lambda path: used[path]):
                study = path.name.removesuffix(ENDING)
                if over <= 0 or now - used[path] < GRACE_SECONDS:
                    return
                if study in self._series and not self._is_kept(study):
                    over -= path.stat().st_size
                    path.unlink()
