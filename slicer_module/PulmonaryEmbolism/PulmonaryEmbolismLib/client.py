"""The requests to the server, each a function that answers or raises one sentence. No Slicer, no Qt.

Every function blocks: call them from a job, never from the main thread. Studies are named by the server's ids; the
server's replies are read with defaults, so that a field that is missing or new breaks nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Tuple
from urllib.parse import quote, urlsplit

import requests

API = 1
"""The version of the server's interface that this module speaks."""

Report = Callable[..., None]
"""``report(text, done, total)``; raises to stop the work."""

CONNECT_SECONDS = 5.0
READ_SECONDS = 60.0
DETECT_SECONDS = 3600.0
POLL_SECONDS = 0.5


class ServerError(Exception):
    """A request that did not succeed, as a sentence for the reader. ``status`` is 0 when no answer came."""

    def __init__(self, sentence: str, status: int = 0) -> None:
        super().__init__(sentence)
        self.status = status

    @property
    def worth_retrying(self) -> bool:
        """Whether the same request may succeed later without anybody changing it."""
        return self.status == 0 or self.status in (401, 408, 429) or self.status >= 500


class Conflict(ServerError):
    """Another version was saved in between (409): the server's ``revision`` and ``annotation``."""

    def __init__(self, sentence: str, revision: Optional[str], annotation: Optional[dict]) -> None:
        super().__init__(sentence, 409)
        self.revision = revision
        self.annotation = annotation


# --- what the server says ----------------------------------------------------------------------------------------


def _number(value: Any) -> Optional[float]:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _text(value: Any) -> str:
    return "" if value is None else str(value)


@dataclass(frozen=True)
class Model:
    """Which weights are served or spoke."""

    name: str = ""
    version: str = ""
    sha256: str = ""
    trained: bool = False
    date: str = ""

    @classmethod
    def from_json(cls, data: Any) -> Model:
        data = data if isinstance(data, dict) else {}
        texts = {key: _text(data.get(key)) for key in ("name", "version", "sha256", "date")}
        return cls(trained=bool(data.get("trained")), **texts)

    def __str__(self) -> str:
        words = [self.name or "unnamed", self.version, f"({self.date[:10]})" if self.date else ""]
        return " ".join(word for word in words if word) + ("" if self.trained else ", untrained")


@dataclass(frozen=True)
class Server:
    """Who answered at the address."""

    address: str
    version: str
    model: Model
    strategies: Tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One line of the worklist."""

    study: str
    state: str = "not_started"
    reviewed: int = 0
    scheduled: int = 0
    label: str = ""
    probability: Optional[float] = None
    model: str = ""
    held_by: str = ""
    revision: Optional[str] = None
    usable: bool = True
    reason: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        return cls(
            study=_text(data["study"]),
            state=_text(data.get("state")) or "not_started",
            reviewed=int(data.get("reviewed") or 0),
            scheduled=int(data.get("scheduled") or 0),
            label=_text(data.get("label")),
            probability=_number(data.get("probability")),
            model=_text(data.get("model")),
            held_by=_text(data.get("held_by")),
            revision=data.get("revision"),
            usable=bool(data.get("usable", True)),
            reason=_text(data.get("reason")),
        )


@dataclass(frozen=True)
class Scheduled:
    """A slice that the server asks to be reviewed, and why: ``schedule`` or ``suspicious``."""

    slice_index: int
    z_mm: float
    why: str = "schedule"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scheduled:
        return cls(int(data["slice_index"]), float(data["z_mm"]), _text(data.get("why")) or "schedule")


@dataclass(frozen=True)
class Evidence:
    """One slab's word: where it lies and how probable an embolism is in it."""

    slice_index: int
    z_mm: float
    probability: float


@dataclass(frozen=True)
class Candidate:
    """A region of attention, ranked: where to look."""

    rank: int
    slice_index: int
    z_mm: float
    centre_lps_mm: Tuple[float, float, float]
    extent_mm: Tuple[float, float, float]
    peak: float
    slab_probability: Optional[float]


@dataclass(frozen=True)
class Detection:
    """What the model says of a study (schema pe-detection/1)."""

    status: str
    reasons: Tuple[str, ...]
    probability: Optional[float]
    threshold: Optional[float]
    evidence: Tuple[Evidence, ...]
    candidates: Tuple[Candidate, ...]
    model: Model

    @property
    def refused(self) -> bool:
        return self.status != "analysed"

    @classmethod
    def from_json(cls, data: Any) -> Detection:
        data = data if isinstance(data, dict) else {}
        evidence = [
            Evidence(int(e["slice_index"]), float(e.get("z_mm") or 0.0), float(e["probability"]))
            for e in data.get("evidence") or ()
            if _number(e.get("slice_index")) is not None and _number(e.get("probability")) is not None
        ]
        candidates = [
            Candidate(
                int(c.get("rank") or i + 1),
                int(c["slice_index"]),
                float(c.get("z_mm") or 0.0),
                _triple(c.get("centre_lps_mm")),
                _triple(c.get("extent_mm")),
                float(_number(c.get("peak")) or 0.0),
                _number(c.get("slab_probability")),
            )
            for i, c in enumerate(data.get("candidates") or ())
            if _number(c.get("slice_index")) is not None
        ]
        reasons = tuple(_text(r.get("message") or r.get("code")) for r in data.get("reasons") or ())
        return cls(
            _text(data.get("status")) or "refused",
            reasons,
            _number(data.get("probability")),
            _number(data.get("threshold")),
            tuple(sorted(evidence, key=lambda e: e.slice_index)),
            tuple(sorted(candidates, key=lambda c: c.rank)),
            Model.from_json(data.get("model")),
        )


def _triple(value: Any) -> Tuple[float, float, float]:
    x, y, z = ([float(n) for n in value or ()] + [0.0, 0.0, 0.0])[:3]
    return x, y, z


@dataclass(frozen=True)
class Study:
    """All that the server knows of one study."""

    row: Row
    image: Mapping[str, Any]
    schedule: Tuple[Scheduled, ...]
    annotation: Optional[dict]
    tag: str
    revision: Optional[str]
    detection: Optional[Detection]

    @property
    def sha256(self) -> str:
        return _text(self.image.get("sha256"))

    @property
    def size(self) -> Tuple[int, ...]:
        """Slices, rows, columns of the CT; empty if the server does not say."""
        return tuple(int(n) for n in self.image.get("size") or ())


@dataclass(frozen=True)
class Saved:
    """The server's receipt for an annotation."""

    tag: str
    accepted: int
    open_slices: Tuple[int, ...]
    revision: Optional[str]


# --- the requests ------------------------------------------------------------------------------------------------


def normalised_address(text: str) -> str:
    """The address as typed, with ``http://`` where no scheme was given and nothing after host and port.

    Raises:
        ServerError: if there is no host in it, or the port is no number.
    """
    text = text.strip()
    if not text:
        raise ServerError("Enter the server's address, for example http://127.0.0.1:8000.")
    if "://" not in text:
        text = "http://" + text
    parts = urlsplit(text)
    try:
        port = parts.port
    except ValueError:
        raise ServerError(f"The port in {text} is not a number between 1 and 65535.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ServerError(f"{text} is not an address of a server; it looks like http://127.0.0.1:8000.")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{port}" if port else "")


class Client:
    """One server and one reader. Holds no connection and no state but the address, so any thread may use it."""

    def __init__(self, address: str, token: str = "", reader: str = "") -> None:
        self.address = normalised_address(address)
        self.token = token.strip()
        self.reader = reader
        local = urlsplit(self.address).hostname in ("127.0.0.1", "localhost", "::1")
        self._proxies = {"http": None, "https": None} if local else None  # a hospital's proxy cannot reach loopback

    def connect(self) -> Server:
        """Who is there? Raises a sentence for each way in which it is not a server for this module."""
        response = self._request("GET", "/info/", timeout=(CONNECT_SECONDS, 10.0), foreign=True)
        try:
            info = response.json()
        except ValueError:
            info = None
        if not isinstance(info, dict) or "models" not in info:
            raise ServerError(f"Another program answers at {self.address}, not a MONAI Label server; check the port.")
        pe = info.get("pe")
        if not isinstance(pe, dict):
            name = info.get("name") or "another app"
            raise ServerError(
                f"The MONAI Label server at {self.address} runs {name}, not the pulmonary embolism app; "
                "start it with: pe-app serve STUDIES"
            )
        if pe.get("api") != API:
            newer = isinstance(pe.get("api"), int) and pe["api"] > API
            raise ServerError(
                f"The server (version {pe.get('version')}) speaks interface {pe.get('api')}, this module {API}; "
                + ("update this module." if newer else "update the server.")
            )
        return Server(
            self.address,
            _text(pe.get("version")),
            Model.from_json(pe.get("model")),
            tuple(info.get("strategies") or ()),
        )

    def worklist(self) -> Tuple[Row, ...]:
        """All studies of the server."""
        return tuple(Row.from_json(row) for row in self._json("GET", "/pe/worklist").get("studies") or ())

    def study(self, study: str) -> Study:
        """One study: its schedule, the current annotation, the last detection of the served model."""
        data = self._json("GET", f"/pe/studies/{quote(study, safe='')}")
        detection = data.get("detection")
        return Study(
            Row.from_json({**data, "study": data.get("study") or study}),
            data.get("image") or {},
            tuple(Scheduled.from_json(s) for s in data.get("schedule") or ()),
            data.get("annotation"),
            _text(data.get("tag")),
            data.get("revision"),
            Detection.from_json(detection) if detection else None,
        )

    def lease(self, study: str) -> None:
        """Hold a study, so that others are told who reads it. Raises ``ServerError`` (409) if somebody else does."""
        self._json("POST", f"/pe/studies/{quote(study, safe='')}/lease", json={"reader": self.reader})

    def release(self, study: str) -> None:
        """Let others have it."""
        self._request("DELETE", f"/pe/studies/{quote(study, safe='')}/lease", json={"reader": self.reader})

    def next_study(self, strategy: str) -> str:
        """The id of the study that the server wants read next, or "" if there is none; the server leases it."""
        return _text(self._json("POST", f"/activelearning/{quote(strategy)}", json={"reader": self.reader}).get("id"))

    def download_image(self, study: str, sha256: str, cache: Path, report: Report) -> Path:
        """The study's CT as a file of the cache folder, which is fetched only once per content."""
        name = re.sub(r"[^0-9a-f]", "", sha256.lower())
        if name:
            for held in cache.glob(name + ".*"):
                if not held.name.endswith(".part"):
                    held.touch()
                    return held
        response = self._request("GET", "/datastore/image", params={"image": study}, stream=True)
        suffix = _suffix(response)
        if not suffix:
            raise ServerError(f"The server sent study {study} in a format that this module does not read.")
        cache.mkdir(parents=True, exist_ok=True)
        path = cache / ((name or uuid.uuid4().hex) + suffix)
        return self._download(response, path, report, f"Loading {study}")

    def download_label(self, study: str, tag: str, folder: Path, report: Report) -> Path:
        """The current mask of a study as a .seg.nrrd in ``folder``."""
        response = self._request("GET", "/datastore/label", params={"label": study, "tag": tag}, stream=True)
        folder.mkdir(parents=True, exist_ok=True)
        return self._download(response, folder / f"{uuid.uuid4().hex}.seg.nrrd", report, "Loading the annotation")

    def detect(self, study: str, folder: Path, report: Report) -> Tuple[Detection, Optional[Path]]:
        """Run the detection; ``report`` hears its progress. Attention volume None if the study was refused."""
        job = str(uuid.uuid4())
        answered = threading.Event()
        threading.Thread(target=self._watch, args=(job, answered, report), name="PE progress", daemon=True).start()
        try:
            response = self._request(
                "POST",
                "/infer/detection",
                params={"image": study},
                data={"params": json.dumps({"job": job})},
                timeout=(CONNECT_SECONDS, DETECT_SECONDS),
            )
        finally:
            answered.set()
        params, image = _multipart(response)
        path = None
        if image is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{job}.nrrd"
            path.write_bytes(image)
        return Detection.from_json(params), path

    def put_annotation(
        self, study: str, annotation: dict, label: Path, based_on: Optional[str], report: Report
    ) -> Saved:
        """Save the reviewed slices; the server decides whether they are a draft or final.

        Raises:
            Conflict: if the server holds a version newer than ``based_on``.
        """
        report("Sending the annotation")
        params = {"annotation": annotation, "based_on": based_on, "reader": self.reader}
        with open(label, "rb") as file:
            data = self._json(
                "PUT",
                "/datastore/label",
                params={"image": study, "tag": "draft"},
                data={"params": json.dumps(params, allow_nan=False)},
                files={"label": ("label.seg.nrrd", file, "application/octet-stream")},
                timeout=(CONNECT_SECONDS, 300.0),
            )
        open_slices = tuple(int(k) for k in data.get("open") or ())
        return Saved(_text(data.get("tag")), int(data.get("accepted") or 0), open_slices, data.get("revision"))

    def put_study_label(self, study: str, label: str) -> None:
        """Say positive, negative or uncertain of the whole study."""
        self._request(
            "PUT", "/datastore/image/info", params={"image": study}, data={"info": json.dumps({"pe_label": label})}
        )

    def training(self) -> dict:
        """Both trainings' status: ``{"encoder", "classifier", "running"}``."""
        return self._json("GET", "/pe/training")

    def start_training(self, stage: str) -> None:
        self._request("POST", f"/train/{quote(stage)}", json={})

    def stop_training(self) -> None:
        self._request("DELETE", "/train/")

    # --- how a request is made

    def _json(self, method: str, path: str, **arguments: Any) -> dict:
        response = self._request(method, path, **arguments)
        try:
            data = response.json()
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise ServerError(f"The server's answer to {path} cannot be understood; is it of the same version?", 500)
        return data

    def _request(self, method: str, path: str, foreign: bool = False, **arguments: Any) -> requests.Response:
        arguments.setdefault("timeout", (CONNECT_SECONDS, READ_SECONDS))
        try:
            response = requests.request(
                method,
                self.address + path,
                auth=self._authorise,
                proxies=self._proxies,
                allow_redirects=False,
                **arguments,
            )
        except requests.RequestException as error:
            raise ServerError(self._why(error, foreign)) from error
        if response.status_code >= 300:
            raise self._refusal(response, foreign)
        return response

    def _authorise(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """An auth of our own even without a token: it keeps requests from sending what a .netrc file holds."""
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request

    def _why(self, error: requests.RequestException, foreign: bool = False) -> str:
        """A failed connection as a sentence: what is wrong and what to try."""
        parts = urlsplit(self.address)
        where = parts.netloc
        text = str(error).lower()
        if isinstance(error, requests.exceptions.SSLError):
            if "certificate" in text:
                return (
                    f"The certificate of {where} could not be verified; ask your administrator for the certificate of "
                    "your hospital and name its file in the environment variable REQUESTS_CA_BUNDLE."
                )
            return f"The server at {where} does not speak https; try http://{where}."
        if isinstance(error, requests.exceptions.ConnectTimeout):
            return f"{where} does not answer; check the address, the network and the firewall."
        if isinstance(error, requests.exceptions.ReadTimeout):
            return f"The server at {where} accepted the request but did not answer in time; it may be overloaded."
        if any(word in text for word in ("name or service", "nameresolution", "getaddrinfo", "name resolution")):
            return f"No computer is known by the name {parts.hostname}; check the spelling of the address."
        if "refused" in text:
            return f"Nothing answers at {where}; is the server started (pe-app serve) and is the port right?"
        if any(word in text for word in ("reset", "aborted", "remotedisconnected", "badstatus", "incomplete")):
            hint = f"; if it uses encryption, try https://{where}" if foreign and parts.scheme == "http" else ""
            return f"The connection to {where} was closed before an answer came{hint}."
        return f"The server at {where} cannot be reached ({error.__class__.__name__})."

    def _refusal(self, response: requests.Response, foreign: bool) -> ServerError:
        """An answer of 300 and more as a sentence; the server's own where it gave one."""
        status = response.status_code
        try:
            data = response.json()
        except ValueError:
            data = {}
        data = data if isinstance(data, dict) else {}
        detail = data.get("detail")
        detail = detail if isinstance(detail, str) else ""
        if status < 400:
            target = response.headers.get("Location", "another address")
            return ServerError(f"The server at {self.address} redirects to {target}; enter that address.", status)
        if status == 400 and "https port" in response.text[:2000].lower():
            return ServerError(f"The server speaks https only; try {self.address.replace('http:', 'https:')}.", status)
        if status == 401:
            problem = "does not accept this token" if self.token else "asks for a token"
            return ServerError(f"The server {problem}; your administrator issues one with: pe-app tokens add NAME", 401)
        if status == 409 and ("revision" in data or "annotation" in data):
            return Conflict(detail or "A newer version is on the server.", data.get("revision"), data.get("annotation"))
        if (foreign and not detail) or detail == "Not Found":
            program = "another program" if foreign else "a server of another version"
            return ServerError(
                f"At {self.address} answers {program}, not this module's server; check the port.", status
            )
        return ServerError(detail or f"The server failed with status {status} ({response.reason}).", status)

    def _download(self, response: requests.Response, path: Path, report: Report, text: str) -> Path:
        """The body as a file that appears when it is complete."""
        total = int(response.headers.get("Content-Length") or 0)
        temporary = path.with_name(f"{uuid.uuid4().hex}.part")
        done = 0
        try:
            with open(temporary, "wb") as out:
                for chunk in response.iter_content(1 << 20):
                    out.write(chunk)
                    done += len(chunk)
                    report(f"{text}, {done / 1e6:.0f} MB", done, total)
            if total and done != total and "Content-Encoding" not in response.headers:
                raise ServerError(f"The connection broke after {done} of {total} bytes; try again.")
            os.replace(temporary, path)
        except requests.RequestException as error:
            raise ServerError(self._why(error)) from error
        finally:
            response.close()
            if temporary.exists():
                temporary.unlink()
        return path

    def _watch(self, job: str, answered: threading.Event, report: Report) -> None:
        """While a detection runs: pass its progress on; when ``report`` raises, tell the server to stop."""
        while not answered.wait(POLL_SECONDS):
            try:
                state = self._json("GET", f"/pe/jobs/{job}", timeout=(CONNECT_SECONDS, 5.0))
            except ServerError:
                state = {}  # the job is not known yet, or the answer is late: the detection itself will tell
            words = [_text(state.get("task")), _text(state.get("text"))]
            text = "waiting" if state.get("state") == "waiting" else ": ".join(word for word in words if word)
            try:
                report(f"Detecting, {text or 'started'}", int(state.get("done") or 0), int(state.get("total") or 0))
            except Exception:
                with contextlib.suppress(ServerError):
                    self._request("DELETE", f"/pe/jobs/{job}")
                return


def _suffix(response: requests.Response) -> str:
    """The kind of image that the server sends, by the file name it names; never a path."""
    match = re.search(r"filename\*?=(?:utf-8'')?\"?([^\";]+)", response.headers.get("Content-Disposition", ""), re.I)
    name = match.group(1).lower() if match else ""
    return next((suffix for suffix in (".nii.gz", ".nii", ".nrrd") if name.endswith(suffix)), "")


def _multipart(response: requests.Response) -> Tuple[Dict[str, Any], Optional[bytes]]:
    """MONAI Label's reply to an inference: ``params`` as JSON and, if there is one, the image's bytes."""
    kind = response.headers.get("Content-Type", "")
    if kind.startswith("application/json"):
        return response.json(), None
    match = re.search(r'boundary="?([^";]+)', kind)
    if not match:
        raise ServerError("The server's answer to the detection cannot be understood; is it of the same version?", 500)
    params: Dict[str, Any] = {}
    image = None
    for part in response.content.split(b"--" + match.group(1).encode()):
        head, _, body = part.partition(b"\r\n\r\n")
        body = body[:-2] if body.endswith(b"\r\n") else body
        if b'name="params"' in head:
            params = json.loads(body)
        elif b'name="image"' in head:
            image = body
    return params, image
