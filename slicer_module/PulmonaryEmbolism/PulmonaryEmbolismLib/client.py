"""The requests to the server, each a function that answers or raises one sentence. No Slicer, no Qt.

Every function blocks: call them from a job, never from the main thread. Studies are named by the server's ids.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import uuid
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple
from urllib.parse import quote

import requests

from PulmonaryEmbolismLib.answers import Detection, Model, Row, Saved, Scheduled, Server, Study, as_text
from PulmonaryEmbolismLib.transport import CONNECT_SECONDS, Report, ServerError, Transport

API = 1
"""The version of the server's interface that this module speaks."""

DETECT_SECONDS = 3600.0
POLL_SECONDS = 0.5


class Client:
    """One server and one reader. Holds no connection and no state but these, so any thread may use it."""

    def __init__(self, address: str, token: str = "", reader: str = "") -> None:
        self._transport = Transport(address, token)
        self.address = self._transport.address
        self.token = self._transport.token
        self.reader = reader

    def connect(self) -> Server:
        """Who is there? Raises a sentence for each way in which it is not a server for this module."""
        response = self._transport.request("GET", "/info/", timeout=(CONNECT_SECONDS, 10.0), foreign=True)
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
        self.reader = as_text(pe.get("reader")) or self.reader  # whose token it is counts, not the name typed
        return Server(
            self.address,
            as_text(pe.get("version")),
            Model.from_json(pe.get("model")),
            tuple(info.get("strategies") or ()),
            pe.get("blinded") is True,
        )

    def worklist(self) -> Tuple[Row, ...]:
        """All studies of the server, as this reader may see them."""
        data = self._transport.json("GET", "/pe/worklist", params={"reader": self.reader})
        return tuple(Row.from_json(row) for row in data.get("studies") or ())

    def study(self, study: str) -> Study:
        """One study: its schedule, the current annotation, the last detection of the served model."""
        data = self._transport.json("GET", f"/pe/studies/{quote(study, safe='')}", params={"reader": self.reader})
        detection = data.get("detection")
        return Study(
            Row.from_json({**data, "study": data.get("study") or study}),
            data.get("image") or {},
            tuple(Scheduled.from_json(s) for s in data.get("schedule") or ()),
            data.get("annotation"),
            as_text(data.get("tag")),
            data.get("revision"),
            Detection.from_json(detection) if detection else None,
        )

    def lease(self, study: str) -> None:
        """Hold a study, so that others are told who reads it. Raises ``ServerError`` (409) if somebody else does."""
        self._transport.json("POST", f"/pe/studies/{quote(study, safe='')}/lease", json={"reader": self.reader})

    def release(self, study: str) -> None:
        """Let others have it."""
        self._transport.request("DELETE", f"/pe/studies/{quote(study, safe='')}/lease", json={"reader": self.reader})

    def next_study(self, strategy: str, work: str = "slices", skip: Sequence[str] = (), ahead: bool = False) -> str:
        """The id of the study that the server wants read next, or "" if there is none; the server leases it.

        Args:
            strategy: one of the server's.
            work: "slices", or "labels" for studies without one.
            skip: studies that are not wanted now.
            ahead: whether the reader is still at another study, which stays held.
        """
        wanted = {"reader": self.reader, "work": work, "skip": list(skip), "ahead": ahead}
        return as_text(self._transport.json("POST", f"/activelearning/{quote(strategy)}", json=wanted).get("id"))

    def download_image(self, study: str, sha256: str, cache: Path, report: Report) -> Path:
        """The study's CT as a file of the cache folder, which is fetched only once per content."""
        name = re.sub(r"[^0-9a-f]", "", sha256.lower())
        if name:
            for held in cache.glob(name + ".*"):
                if not held.name.endswith(".part"):
                    held.touch()
                    return held
        response = self._transport.request("GET", "/datastore/image", params={"image": study}, stream=True)
        suffix = _suffix(response)
        if not suffix:
            raise ServerError(f"The server sent study {study} in a format that this module does not read.")
        cache.mkdir(parents=True, exist_ok=True)
        path = cache / ((name or uuid.uuid4().hex) + suffix)
        return self._transport.download(response, path, report, f"Loading {study}")

    def download_label(self, study: str, tag: str, folder: Path, report: Report) -> Path:
        """The current mask of a study as a .seg.nrrd in ``folder``."""
        asked = {"label": study, "tag": tag, "reader": self.reader}
        response = self._transport.request("GET", "/datastore/label", params=asked, stream=True)
        folder.mkdir(parents=True, exist_ok=True)
        return self._transport.download(
            response, folder / f"{uuid.uuid4().hex}.seg.nrrd", report, "Loading the annotation"
        )

    def detect(self, study: str, folder: Path, report: Report) -> Tuple[Detection, Optional[Path]]:
        """Run the detection; ``report`` hears its progress. Attention volume None if the study was refused."""
        job = str(uuid.uuid4())
        answered = threading.Event()
        threading.Thread(target=self._watch, args=(job, answered, report), name="PE progress", daemon=True).start()
        try:
            response = self._transport.request(
                "POST",
                "/infer/detection",
                params={"image": study},
                data={"params": json.dumps({"job": job, "reader": self.reader})},
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
            data = self._transport.json(
                "PUT",
                "/datastore/label",
                params={"image": study, "tag": "draft"},
                data={"params": json.dumps(params, allow_nan=False)},
                files={"label": ("label.seg.nrrd", file, "application/octet-stream")},
                timeout=(CONNECT_SECONDS, 300.0),
            )
        open_slices = tuple(int(k) for k in data.get("open") or ())
        return Saved(as_text(data.get("tag")), int(data.get("accepted") or 0), open_slices, data.get("revision"))

    def put_study_label(self, study: str, label: str, based_on: Optional[str]) -> Optional[str]:
        """Label the whole study positive, negative or uncertain, "" takes the label back; the label's new version.

        Raises:
            LabelConflict: if the server holds a label other than ``based_on``.
        """
        info = {"pe_label": label, "based_on": based_on, "reader": self.reader}
        data = self._transport.json(
            "PUT", "/datastore/image/info", params={"image": study}, data={"info": json.dumps(info)}
        )
        return data.get("label_revision")

    def training(self) -> dict:
        """Both trainings' status: ``{"encoder", "classifier", "running"}``."""
        return self._transport.json("GET", "/pe/training")

    def start_training(self, stage: str) -> None:
        self._transport.request("POST", f"/train/{quote(stage)}", json={})

    def stop_training(self) -> None:
        self._transport.request("DELETE", "/train/")

    def _watch(self, job: str, answered: threading.Event, report: Report) -> None:
        """While a detection runs: pass its progress on; when ``report`` raises, tell the server to stop."""
        while not answered.wait(POLL_SECONDS):
            try:
                state = self._transport.json("GET", f"/pe/jobs/{job}", timeout=(CONNECT_SECONDS, 5.0))
            except ServerError:
                state = {}  # the job is not known yet, or the answer is late: the detection itself will tell
            words = [as_text(state.get("task")), as_text(state.get("text"))]
            text = "waiting" if state.get("state") == "waiting" else ": ".join(word for word in words if word)
            try:
                report(f"Detecting, {text or 'started'}", int(state.get("done") or 0), int(state.get("total") or 0))
            except Exception:
                with contextlib.suppress(ServerError):
                    self._transport.request("DELETE", f"/pe/jobs/{job}")
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
