"""A DICOMweb archive: what series it holds (QIDO-RS), fetch one (WADO-RS), send results to it (STOW-RS).

Written on ``requests`` rather than on dicomweb-client, which keeps a whole series in memory and takes a truncated
answer for a short series. Here whatever an archive sends goes to disk as it comes and counts only when it is complete:
the closing boundary was seen, every part is an instance of the series asked for, and as many came as the archive says
it has.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from email.message import Message
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import requests
import urllib3
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from requests.auth import HTTPBasicAuth

from pe_app.common.errors import InputError
from pe_app.common.files import making_folder
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.ct.dicom_files import read_header
from pe_app.ct.dicom_headers import read_headers
from pe_app.ct.dicom_stack import arrange
from pe_app.ct.source_series import unlike_ct

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

log = logging.getLogger(__name__)

T = TypeVar("T")

CHUNK_BYTES = 1 << 17
MAX_JSON_BYTES = 64 << 20
"""A page of 500 series takes about 1 MB; what is far larger is no answer to a query."""
BATCH_BYTES = 32 << 20
"""Instances are sent together up to this size: few requests for many small ones, little memory for large ones."""

MIN_SLICES = 20
"""A series with fewer is a localizer, a dose sheet or a measurement of the contrast, and no chest."""

MAX_ENHANCED = 4
"""Instances that an enhanced CT of a chest has at most, each of many frames."""

_UID = re.compile(r"(?=.{1,64}$)[0-9]+(\.[0-9]+)*")
_RETURNED = ("00080020", "00080030", "00081030", "0008103E", "00100020", "00200011", "00201209")
_DUPLICATE = 0x0111
_FAILURES = {
    0x0110: "the archive failed at it",
    0x0117: "its UID is invalid",
    0x0122: "the archive does not take this kind of object",
    0x0124: "this user may not store it",
    0x0131: "the archive does not take this kind of object",
    0xA700: "the archive is full",
    0xA900: "it does not fit its SOP class",
    0xC000: "the archive cannot understand it",
}
"""Failure Reason (0008,1197), PS3.18 table 10.5.1-1 and PS3.4 annex B.2.3."""


class Unavailable(InputError):  # noqa: N818 - a state, not a fault
    """The archive is down, too slow or failing: the same call may work later."""


class _NotThere(InputError):  # noqa: N818 - a verdict, not a fault
    """404; ``listing`` tells that it may be an archive's word for an empty list, and not a page about addresses."""

    def __init__(self, message: str, *, listing: bool) -> None:
        super().__init__(message)
        self.listing = listing


class Incomplete(Unavailable):
    """The archive works, but a series of it did not come whole, after several attempts."""


@dataclass(frozen=True)
class Access:
    """How to reach an archive.

    Attributes:
        url: the DICOMweb root, as ``https://pacs.example/dicom-web``.
        user: for basic authentication; "" for none.
        password: of the user.
        ca: file of the certificates to trust, where the archive's is not signed by a public authority.
    """

    url: str
    user: str = ""
    password: str = field(default="", repr=False)
    ca: Path | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            parts.port  # noqa: B018 - raises where it is no number
        except ValueError as error:
            raise InputError(f"archive {self.url}: invalid address ({error})") from error
        if "@" in parts.netloc:
            raise InputError(
                f"archive {parts.scheme}://{parts.hostname}: user and password do not belong into the address, "
                "where others can read them: use --user, and PE_ARCHIVE_PASSWORD or --password-file"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InputError(f"archive {self.url}: expected an address as https://pacs.example/dicom-web")
        if self.ca is not None and not self.ca.is_file():
            raise InputError(f"--ca {self.ca}: there is no such file")
        object.__setattr__(self, "url", self.url.rstrip("/"))


@dataclass(frozen=True)
class Limits:
    """How long an archive is waited for.

    Attributes:
        connect_s: until it takes the connection.
        read_s: between two pieces of an answer.
        total_s: for one answer as a whole, so that a trickle does not hold everything up.
        waits_s: pauses before each further attempt after a failure that may pass.
        page: series asked for at a time.
    """

    connect_s: float = 10.0
    read_s: float = 60.0
    total_s: float = 1800.0
    waits_s: tuple[float, ...] = (1.0, 4.0, 16.0)
    page: int = 500


@dataclass(frozen=True)
class ArchiveSeries:
    """A CT series as the archive lists it; text is "" where it is not said.

    Attributes:
        study: Study Instance UID.
        series: Series Instance UID.
        patient: Patient ID.
        date: Study Date and Time, ``20260102101500``.
        description: of the series.
        study_description: of the study.
        number: Series Number; 0 where not said.
        instances: how many it has; 0 where not said.
    """

    study: str
    series: str
    patient: str = ""
    date: str = ""
    description: str = ""
    study_description: str = ""
    number: int = 0
    instances: int = 0


@dataclass(frozen=True)
class Stored:
    """What became of instances that were sent, by SOP Instance UID.

    Attributes:
        stored: in the archive now, also those that were there before.
        failed: not in the archive, each with the reason in words.
    """

    stored: tuple[str, ...]
    failed: Mapping[str, str]


class Archive:
    """The client of one archive; can be used from several threads. Connects when it is asked something.

    Every call raises ``Unavailable`` where the archive is down or failing, after a few attempts, and a plain
    ``InputError`` where another attempt would not help: password, certificate, an answer that makes no sense.
    """

    def __init__(self, access: Access, limits: Limits | None = None) -> None:
        self.access = access
        self._limits = limits or Limits()
        self._name = f"archive {access.url}"
        if access.user and access.url.startswith("http://") and urlsplit(access.url).hostname not in _THIS_MACHINE:
            log.warning("%s: the password travels unencrypted; use https", self._name)

    def series(self, query: Mapping[str, str] | None = None) -> tuple[ArchiveSeries, ...]:
        """The CT series that match.

        Args:
            query: by DICOM keyword: ``PatientID``, ``StudyDate`` (``20260101-20260131``), ``SeriesDescription`` with
                ``*`` for any text, ...

        Returns:
            Each once, in the archive's order.
        """
        asked = {"Modality": "CT", **(query or {}), "includefield": _RETURNED}
        found: dict[tuple[str, str], ArchiveSeries] = {}
        invalid = 0
        for item in self._pages("series", asked):
            if _text(item, "00080060") in ("CT", ""):  # not every archive heeds a filter
                one = self._listed(item)
                if one is None:
                    invalid += 1
                else:
                    found.setdefault((one.study, one.series), one)
        if invalid:
            log.warning(
                "%s: %d series with an invalid UID are left out of %d", self._name, invalid, invalid + len(found)
            )
        return tuple(found.values())

    def studies(self, query: Mapping[str, str] | None = None) -> dict[str, tuple[ArchiveSeries, ...]]:
        """Studies that hold a chest's worth of CT, in the order of their dates, each with its series, best first.

        Best are those with most slices, projections and maps last; of equal ones the first made, as in DICOM folders.

        Args:
            query: as for ``series``.
        """
        found: defaultdict[str, list[ArchiveSeries]] = defaultdict(list)
        small: defaultdict[str, list[ArchiveSeries]] = defaultdict(list)
        for one in sorted(self.series(query), key=lambda one: (one.date, one.study)):
            chest = one.instances >= MIN_SLICES or not one.instances
            (found if chest else small)[one.study].append(one)
        left = 0
        for study, series in small.items():
            many_frames = [one for one in series if study not in found and self._has_frames(one)]
            if many_frames:
                found[study] += many_frames
            left += len(series) - len(many_frames)
        if left:
            log.warning("%s: %d series of fewer than %d slices are left out", self._name, left, MIN_SLICES)
        return {study: tuple(sorted(series, key=_order_of_choice)) for study, series in found.items()}

    def _has_frames(self, one: ArchiveSeries) -> bool:
        """Whether a series of few instances may be an enhanced CT: their frames make a chest, or are not listed."""
        if one.instances > MAX_ENHANCED:
            return False
        where = f"studies/{_checked_uid(one.study)}/series/{_checked_uid(one.series)}/instances"
        frames = [_number(item, "00280008") for item in self._pages(where, {"includefield": "00280008"})]
        return bool(frames) and (not all(frames) or sum(frames) >= MIN_SLICES)

    def retrieve_study(
        self, series: Sequence[ArchiveSeries], folder: Path, progress: ProgressCallback = silent
    ) -> ArchiveSeries:
        """Fetch the first of a study's series that is one even axial stack, judged by its headers.

        Args:
            series: in order of choice, at least one.
            folder: made whole or not at all; must not be there.
            progress: as for ``retrieve``.

        Raises:
            InputError: why the first one cannot be used, if none can.
        """
        faults = []
        for one in series:
            self.retrieve(one, folder, progress)
            try:
                arrange([header for path in sorted(folder.iterdir()) for header in read_headers(path)])
            except InputError as fault:
                log.info("study %s: %s", one.study, fault)
                shutil.rmtree(folder)
                faults.append(fault)
            else:
                return one
        raise faults[0]

    def instances(self, study: str, series: str | None = None) -> frozenset[str]:
        """SOP Instance UIDs of what the archive holds of a study, or of one of its series."""
        where = f"studies/{_checked_uid(study)}" + (f"/series/{_checked_uid(series)}" if series else "")
        return frozenset(_text(item, "00080018") for item in self._pages(f"{where}/instances", {}))

    def retrieve(self, series: ArchiveSeries, folder: Path, progress: ProgressCallback = silent) -> None:
        """Fetch a series as it is stored, one ``.dcm`` an instance.

        Args:
            series: as the archive listed it.
            folder: made whole or not at all; must not be there.
            progress: called for every instance; may raise ``Cancelled``.
        """

        def attempt() -> None:
            path = f"studies/{_checked_uid(series.study)}/series/{_checked_uid(series.series)}"
            accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
            with making_folder(folder) as temporary, closing(self._open("GET", path, accept)) as response:
                self._receive(response, series, temporary, progress)

        self._persist(attempt)

    def store(self, instances: Sequence[Path], progress: ProgressCallback = silent) -> Stored:
        """Send DICOM files.

        Args:
            instances: the files; sent again, they are recognised by their UID.
            progress: called between batches; may raise ``Cancelled``.

        Raises:
            InputError: if a file is not DICOM, before any is sent; or if the archive as a whole cannot be used.
        """
        uids = {path: _instance_uid(path) for path in instances}
        stored: list[str] = []
        failed: dict[str, str] = {}
        for batch in _batches(instances):
            progress(Progress("send to the archive", len(stored) + len(failed), len(uids)))
            try:
                answer = self._persist(partial(self._send, batch))
            except InputError as error:
                raise type(error)(f"{error} ({len(stored)} of {len(uids)} instances were stored before)") from error
            taken, refused = _outcome(answer)
            for uid in (uids[path] for path in batch):
                if uid in taken:
                    stored.append(uid)
                else:
                    failed[uid] = refused.get(uid, "the archive does not confirm that it stored it")
        progress(Progress("send to the archive", len(uids), len(uids)))
        return Stored(tuple(stored), failed)

    # Asking

    def _persist(self, attempt: Callable[[], T]) -> T:
        for wait_s in self._limits.waits_s:
            try:
                return attempt()
            except Unavailable as error:
                log.info("%s; another attempt in %.0f s", error, wait_s)
                time.sleep(wait_s)
        return attempt()

    def _pages(self, path: str, asked: Mapping[str, str | Sequence[str]]) -> Iterator[Mapping[str, object]]:
        """Every item of a listing, from archives that page, that page less than asked, and that do not page."""
        seen: set[tuple[str, ...]] = set()
        while True:
            asked_now = {**asked, "limit": str(self._limits.page), "offset": str(len(seen))}
            page = self._persist(partial(self._listing, path, asked_now))
            before = len(seen)
            for item in page:
                key = tuple(_text(item, tag) for tag in ("0020000D", "0020000E", "00080018"))
                if key not in seen:
                    seen.add(key)
                    yield item
            if len(seen) == before and len(page) == self._limits.page:
                log.warning("%s: it lists the first %d only, ask for less of it", self._name, len(page))
            if len(seen) == before or len(page) > self._limits.page:
                return

    def _listing(self, path: str, asked: Mapping[str, str | Sequence[str]]) -> list[Mapping[str, object]]:
        try:
            with closing(self._open("GET", path, "application/dicom+json", params=asked)) as response:
                answer = [] if response.status_code == 204 else self._json(response)
        except _NotThere as error:  # no match: the standard's own words for it have changed, and so have archives
            if not error.listing:
                raise InputError(str(error)) from error
            return []
        if not isinstance(answer, list) or not all(isinstance(item, dict) for item in answer):
            raise self._nonsense("its list of series is no list of DICOM objects")
        return answer

    def _listed(self, item: Mapping[str, object]) -> ArchiveSeries | None:
        """A series of a listing; None where its UIDs are none, so that nothing could fetch it."""
        study, series = _text(item, "0020000D"), _text(item, "0020000E")
        if not _UID.fullmatch(study) or not _UID.fullmatch(series):
            log.warning("%s: it lists a series with the UIDs %.80r and %.80r", self._name, study, series)
            return None
        return ArchiveSeries(
            study,
            series,
            patient=_text(item, "00100020"),
            date=_text(item, "00080020") + _text(item, "00080030").partition(".")[0],
            description=_text(item, "0008103E"),
            study_description=_text(item, "00081030"),
            number=_number(item, "00200011"),
            instances=_number(item, "00201209"),
        )

    def _open(
        self,
        method: str,
        path: str,
        accept: str,
        params: Mapping[str, str | Sequence[str]] | None = None,
        body: tuple[bytes, str] | None = None,
    ) -> requests.Response:
        """An answer whose status says that it is one; its content is still to come."""
        access, limits = self.access, self._limits
        data, content_type = body or (None, None)
        try:
            response = requests.request(
                method,
                f"{access.url}/{path}",
                params=urlencode(
                    params or {}, doseq=True, safe="*?", quote_via=quote
                ),  # some read no %2A, nor + as space
                data=data,
                headers={"Accept": accept, **({"Content-Type": content_type} if content_type else {})},
                auth=HTTPBasicAuth(access.user.encode(), access.password.encode()) if access.user else None,
                verify=str(access.ca) if access.ca else True,
                timeout=(limits.connect_s, limits.read_s),
                allow_redirects=method == "GET",
                stream=True,
            )
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise self._broken(error) from error
        status = response.status_code
        if status == 404:
            listing = self._is_empty_list(response)
            response.close()
            text = f"{self._name}: it has no {path} (404): check the address, or the object was deleted"
            raise _NotThere(text, listing=listing)
        listed = method == "POST" and 400 <= status < 500 and status not in (401, 403, 404, 408, 413, 425, 429)
        if status < 300 or listed:  # archives answer a partly failed STOW-RS with 4xx and say which instances failed
            return response
        response.close()
        if status in (401, 403):
            who = f"user {access.user!r}" if access.user else "requests without a user"
            raise InputError(f"{self._name}: it refuses {who} ({status}): check --user and the password")
        if status in (408, 425, 429) or (status >= 500 and status != 501):
            raise Unavailable(f"{self._name}: it fails at the moment ({status} {response.reason})")
        where = f" to {response.headers['Location']}" if "Location" in response.headers else ""
        raise InputError(f"{self._name}: it answers {path} with {status} {response.reason}{where}: check the address")

    def _is_empty_list(self, response: requests.Response) -> bool:
        """Whether a 404 has no words, or words in DICOM JSON: archives answer so where nothing matches."""
        try:
            content = response.raw.read(1 << 16, decode_content=True)
        except (urllib3.exceptions.HTTPError, OSError):
            return False
        if not content.strip():
            return True
        try:
            json.loads(content)
        except ValueError:
            return False
        return "dicom+json" in response.headers.get("Content-Type", "")

    def _content(self, response: requests.Response) -> Iterator[bytes]:
        until = time.monotonic() + self._limits.total_s
        while True:
            try:
                chunk = response.raw.read1(CHUNK_BYTES, decode_content=True)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise self._broken(error) from error
            if not chunk:
                return
            if time.monotonic() > until:
                raise Unavailable(f"{self._name}: its answer took longer than {self._limits.total_s:.0f} s")
            yield chunk

    def _json(self, response: requests.Response) -> object:
        content = bytearray()
        for chunk in self._content(response):
            content += chunk
            if len(content) > MAX_JSON_BYTES:
                raise self._nonsense(f"its answer to a query is larger than {MAX_JSON_BYTES >> 20} MB")
        if not content.strip():  # as the standard says no match since it dropped 204
            return []
        try:
            return json.loads(bytes(content))
        except (ValueError, RecursionError) as error:
            kind = response.headers.get("Content-Type") or "unknown type"
            start = bytes(content[:60]).decode("utf-8", "replace")
            raise self._nonsense(f"expected DICOM JSON, got {len(content)} bytes of {kind}: {start!r}") from error

    # Receiving and sending

    def _receive(
        self, response: requests.Response, series: ArchiveSeries, folder: Path, progress: ProgressCallback
    ) -> None:
        kind = Message()
        kind["Content-Type"] = response.headers.get("Content-Type", "")
        boundary = kind.get_boundary()
        if kind.get_content_type() != "multipart/related" or not boundary:
            raise self._nonsense(f"expected a series as multipart/related, got {kind['Content-Type'] or 'no type'!r}")
        task = "fetch from the archive"

        def finished(path: Path) -> None:
            self._check_instance(path, series)
            progress(Progress(task, parts.count, max(parts.count, series.instances)))

        parts = _Parts(folder, finished)
        progress(Progress(task, 0, max(1, series.instances)))
        try:
            with closing(parts):
                parser = MultipartParser(boundary, parts.callbacks())
                for chunk in self._content(response):
                    parser.write(chunk)
        except FormParserError as error:
            raise self._nonsense(f"series {series.series} comes as a damaged multipart ({error})") from error
        if not parts.complete:
            raise Incomplete(
                f"{self._name}: series {series.series} was cut off after {parts.count} of "
                f"{series.instances or 'unknown'} instances"
            )
        if parts.count < max(1, series.instances):
            raise Incomplete(
                f"{self._name}: it sent {parts.count} instances of series {series.series}, "
                f"but lists {max(1, series.instances)}"
            )

    def _check_instance(self, path: Path, series: ArchiveSeries) -> None:
        try:
            header = read_header(path, ["SeriesInstanceUID"], force=False)
        except Exception as error:  # pydicom raises nearly anything on damaged bytes
            size = path.stat().st_size
            raise self._nonsense(f"a part of series {series.series}, {size} bytes, is not DICOM") from error
        if header.get("SeriesInstanceUID") != series.series:
            other = header.get("SeriesInstanceUID")
            raise self._nonsense(f"asked for series {series.series}, it sent an instance of {other}")

    def _send(self, batch: Sequence[Path]) -> Mapping[str, object]:
        boundary = uuid.uuid4().hex
        head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        body = b"".join(head + path.read_bytes() + b"\r\n" for path in batch) + f"--{boundary}--\r\n".encode()
        kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
        with closing(self._open("POST", "studies", "application/dicom+json", body=(body, kind))) as response:
            answer = self._json(response)
        if isinstance(answer, list) and len(answer) == 1:
            answer = answer[0]
        if not isinstance(answer, dict) or not {"00081198", "00081199"} & answer.keys():
            raise self._nonsense("its answer does not list which instances were stored")
        return answer

    # What went wrong

    def _broken(self, error: Exception) -> InputError:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return InputError(
                f"{self._name}: its certificate is not trusted: give the certificate of the hospital's authority "
                "with --ca FILE"
            )
        if isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)):
            return Unavailable(f"{self._name}: it does not answer within {self._limits.read_s:.0f} s")
        if isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)):
            return InputError(f"{self._name}: invalid address")
        if isinstance(error, requests.TooManyRedirects):
            return InputError(f"{self._name}: it redirects in a circle: check the address")
        return Unavailable(f"{self._name}: it cannot be reached, or the connection broke off")

    def _nonsense(self, what: str) -> InputError:
        return InputError(f"{self._name}: {what}; this is no answer of a DICOMweb archive: check the address")


_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


class _Parts:
    """The parts of a multipart answer as files, written while they come."""

    def __init__(self, folder: Path, finished: Callable[[Path], None]) -> None:
        self.count = 0
        self.complete = False
        self._folder = folder
        self._finished = finished
        self._file: BinaryIO | None = None

    def callbacks(self) -> MultipartCallbacks:
        """As the parser wants them."""
        return {
            "on_part_begin": self._begin,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._all,
        }

    def close(self) -> None:
        """Close the file of a part that was cut off."""
        if self._file is not None:
            self._file.close()

    def _begin(self) -> None:
        self._path = self._folder / f"{self.count + 1:05d}.dcm"
        self._file = self._path.open("wb")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])

    def _end(self) -> None:
        self.close()
        self.count += 1
        self._finished(self._path)

    def _all(self) -> None:
        self.complete = True


def _batches(instances: Sequence[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    size = 0
    for path in instances:
        size += path.stat().st_size
        if batch and size > BATCH_BYTES:
            yield batch
            batch, size = [], path.stat().st_size
        batch.append(path)
    if batch:
        yield batch


def _outcome(answer: Mapping[str, object]) -> tuple[frozenset[str], dict[str, str]]:
    """SOP Instance UIDs that are in the archive now, and those that are not with the reason."""
    taken = {_text(item, "00081155") for item in _items(answer, "00081199")}
    refused: dict[str, str] = {}
    for item in _items(answer, "00081198"):
        reason, uid = _number(item, "00081197"), _text(item, "00081155")
        if reason == _DUPLICATE:
            taken.add(uid)
        else:
            general = reason & 0xF000 if reason >= 0xC000 else reason & 0xFF00
            words = _FAILURES.get(reason) or _FAILURES.get(general) or "the archive refused it"
            refused[uid] = f"{words} (0x{reason:04X})"
    return frozenset(taken), refused


def _order_of_choice(series: ArchiveSeries) -> tuple[bool, int, int, str]:
    unlike = unlike_ct("", series.description) != ""
    return unlike, -series.instances, series.number, series.series


def _instance_uid(path: Path) -> str:
    try:
        header = read_header(path, ["SOPInstanceUID"], force=False)
        return _checked_uid(str(header.SOPInstanceUID))
    except Exception as error:  # pydicom raises nearly anything on damaged bytes
        raise InputError(f"{path}: it is not a DICOM instance, so it cannot be sent") from error


def _checked_uid(uid: str) -> str:
    if not _UID.fullmatch(uid):
        raise InputError(f"{uid[:80]!r} is not a DICOM UID")
    return uid


def _items(item: Mapping[str, object], tag: str) -> list[Mapping[str, object]]:
    """The values of an attribute in DICOM JSON that are objects: items of a sequence, names."""
    return [value for value in _values(item, tag) if isinstance(value, dict)]


def _text(item: Mapping[str, object], tag: str) -> str:
    return next((str(value).strip() for value in _values(item, tag) if isinstance(value, (str, int))), "")


def _number(item: Mapping[str, object], tag: str) -> int:
    """A whole number that is not negative; 0 where there is none."""
    text = _text(item, tag)
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def _values(item: Mapping[str, object], tag: str) -> list[object]:
    attribute = item.get(tag)
    values = attribute.get("Value") if isinstance(attribute, dict) else None
    return values if isinstance(values, list) else []
