"""A small server of the REST contract on a loopback socket, with switches for everything that can go wrong."""

from __future__ import annotations

import hashlib
import json
import threading
import time
import uuid
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

MODEL = {"name": "starter", "version": "1.0", "sha256": "a" * 64, "trained": True, "date": "2026-11-02T08:00:00Z"}


class FakeServer:
    """``studies`` maps an id to what the server knows; the switches are plain attributes, to be set at any time."""

    def __init__(self) -> None:
        self.studies: dict[str, dict] = {}
        self.model = dict(MODEL)
        self.detection_steps = 5
        self.step_seconds = 0.05
        self.training: dict = {"encoder": None, "classifier": None, "running": False}
        self.requests: list[tuple[str, str]] = []
        self.jobs: dict[str, dict] = {}
        # switches
        self.slow_seconds = 0.0
        self.die_in_upload = False
        self.down = False
        self.token = ""
        self.app = "pe"  # "pe", "monailabel", "web"
        self.api = 1
        self.blinded = False
        handler = type("Handler", (_Handler,), {"fake": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def add_study(self, study: str, image: Path, size, spacing, schedule, attention=b"", detection=None, **row):
        """One study: its file, its (slices, rows, columns), and what a detection of it would answer."""
        sha256 = hashlib.sha256(study.encode()).hexdigest()
        self.studies[study] = {
            "row": {"study": study, "label": "", "probability": None, "model": None, "held_by": None,
                    "usable": True, "reason": "", **row},
            "image_path": image,
            "image": {"sha256": sha256, "size": list(size), "spacing_mm": list(spacing)},
            "schedule": [{"slice_index": k, "z_mm": z, "why": why} for k, z, why in schedule],
            "annotation": None, "label": b"", "tag": None, "revision": None,
            "attention": attention, "detects": detection, "detection": None, "versions": [],
        }  # fmt: skip

    def save(self, study: str, annotation: dict, label: bytes) -> dict:
        """A reader's save, as PUT /datastore/label does it."""
        known = self.studies[study]
        reviewed = {s["slice_index"] for s in annotation["slices"]}
        still_open = [s["slice_index"] for s in known["schedule"] if s["slice_index"] not in reviewed]
        revision = uuid.uuid4().hex[:8]
        known.update(annotation=annotation, label=label, revision=revision, tag="draft" if still_open else "final")
        known["versions"].append(annotation)
        return {"tag": known["tag"], "accepted": len(reviewed), "open": still_open, "revision": revision}

    def row(self, study: str) -> dict:
        known = self.studies[study]
        reviewed = {s["slice_index"] for s in (known["annotation"] or {}).get("slices", [])}
        done = sum(s["slice_index"] in reviewed for s in known["schedule"])
        labelled = "labelled" if known["row"].get("label_revision") and known["row"]["label"] else "not_started"
        state = "complete" if done == len(known["schedule"]) else "in_progress" if reviewed else labelled
        return {**known["row"], "state": state, "reviewed": done, "scheduled": len(known["schedule"]),
                "revision": known["revision"]}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments):
        pass

    def _handle(self):
        fake, parts = self.fake, urlsplit(self.path)
        fake.requests.append((self.command, parts.path))
        length = int(self.headers.get("Content-Length") or 0)
        if fake.down or (fake.die_in_upload and parts.path == "/datastore/label" and self.command == "PUT"):
            self.rfile.read(min(length, 200))
            self.close_connection = True
            self.connection.close()
            return None
        self.body = self.rfile.read(length)
        time.sleep(fake.slow_seconds)
        if fake.app == "web":
            return self._send(200, b"<html>It works</html>", "text/html")
        if fake.token and self.headers.get("Authorization") != f"Bearer {fake.token}":
            return self._json(401, {"detail": "a valid token is required"})
        self.query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        path = [unquote(part) for part in parts.path.strip("/").split("/")]
        named = path[:2] if path[0] in ("pe", "datastore") else path[:1]
        name = "_".join([self.command.lower(), *named])
        return getattr(self, name.replace("-", "_"), self._unknown)(path)

    do_GET = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

    def _send(self, status, body, kind, **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _json(self, status, data):
        self._send(status, json.dumps(data).encode(), "application/json")

    def _unknown(self, _path):
        self._json(404, {"detail": "Not Found"})

    def _parts(self) -> dict[str, bytes]:
        """The fields of a form, multipart or urlencoded."""
        kind = self.headers["Content-Type"]
        if kind.startswith("application/x-www-form-urlencoded"):
            return {key: value[0].encode() for key, value in parse_qs(self.body.decode()).items()}
        message = BytesParser(policy=HTTP).parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + self.body)
        parts = message.iter_parts()
        return {p.get_param("name", header="content-disposition"): p.get_payload(decode=True) for p in parts}

    # --- stock MONAI Label

    def get_info(self, _path):
        info = {
            "name": "MONAILabel",
            "models": {},
            "strategies": {s: {} for s in ("next_unreviewed", "most_uncertain", "random")},
        }
        if self.fake.app == "pe":
            info["pe"] = {
                "api": self.fake.api,
                "version": "0.1.0",
                "model": self.fake.model,
                "blinded": self.fake.blinded,
                "research_use_only": True,
            }
        self._json(200, info)

    def post_activelearning(self, _path):
        wanted = json.loads(self.body)
        reader = wanted["reader"]
        studies = [s for s in self.fake.studies if self.fake.row(s)["state"] != "complete"]
        studies = [s for s in studies if s not in wanted.get("skip", ())]
        if wanted.get("work") == "labels":
            studies = [s for s in studies if not self.fake.studies[s]["row"]["label"]]
        free = [s for s in studies if self.fake.studies[s]["row"]["held_by"] in (None, reader)]
        if not free:
            return self._json(200, {})
        self.fake.studies[free[0]]["row"]["held_by"] = reader
        return self._json(200, {"id": free[0], "slices": []})

    def post_infer(self, _path):
        known = self.fake.studies[self.query["image"]]
        job = json.loads(self._parts()["params"])["job"]
        state = self.fake.jobs.setdefault(job, {})
        total = self.fake.detection_steps
        for done in range(total):
            state.update(state="running", task="encode slabs", done=done, total=total, text="")
            time.sleep(self.fake.step_seconds)
            if state.get("cancelled"):
                return self._json(409, {"detail": "cancelled"})
        known["detection"] = {**known["detects"], "model": self.fake.model}
        known["row"].update(probability=known["detection"]["probability"], model=self.fake.model["version"])
        boundary = uuid.uuid4().hex
        parts = (
            ('name="params"', "application/json", json.dumps(known["detection"]).encode()),
            ('name="image"; filename="x.nrrd"', "application/octet-stream", known["attention"]),
        )
        body = b"".join(
            f"--{boundary}\r\nContent-Disposition: form-data; {name}\r\nContent-Type: {kind}\r\n\r\n".encode()
            + content
            + b"\r\n"
            for name, kind, content in parts
        )
        body += f"--{boundary}--\r\n".encode()
        return self._send(200, body, f"multipart/form-data; boundary={boundary}")

    def get_datastore_image(self, _path):
        path = self.fake.studies[self.query["image"]]["image_path"]
        disposition = f'attachment; filename="{path.name}"'
        self._send(200, path.read_bytes(), "application/octet-stream", Content_Disposition=disposition)

    def put_datastore_image(self, _path):
        info = json.loads(self._parts()["info"])
        row = self.fake.studies[self.query["image"]]["row"]
        if info.get("based_on") != row.get("label_revision"):
            names = ("label_reader", "label_time", "label_revision")
            known = {"pe_label": row["label"], **{name: row.get(name, "") for name in names}}
            return self._json(409, {"detail": "labelled meanwhile", "label": known})
        row.update(label=info["pe_label"], label_reader=info["reader"], label_revision=uuid.uuid4().hex[:8])
        return self._json(200, {"label": row["label"], "label_revision": row["label_revision"]})

    def get_datastore_label(self, _path):
        self._send(200, self.fake.studies[self.query["label"]]["label"], "application/octet-stream")

    def put_datastore_label(self, _path):
        study, parts = self.query["image"], self._parts()
        params = json.loads(parts["params"])
        known = self.fake.studies[study]
        if params["based_on"] != known["revision"]:
            detail = "a newer version was saved"
            return self._json(409, {"detail": detail, "revision": known["revision"], "annotation": known["annotation"]})
        return self._json(200, self.fake.save(study, params["annotation"], parts["label"]))

    def post_train(self, path):
        self.fake.training["running"] = True
        self._json(200, {"id": path[-1]})

    def delete_train(self, _path):
        self.fake.training["running"] = False
        self._json(200, {})

    # --- the /pe routes

    def get_pe_worklist(self, _path):
        self._json(200, {"studies": [self.fake.row(study) for study in self.fake.studies]})

    def get_pe_studies(self, path):
        known = self.fake.studies.get(path[2])
        if known is None:
            return self._json(404, {"detail": f"there is no study {path[2]}"})
        keys = ("image", "schedule", "annotation", "tag", "revision", "detection")
        details = {**self.fake.row(path[2]), **{key: known[key] for key in keys}}
        if self.fake.blinded and known["row"].get("label_reader") != self.query.get("reader"):
            details["detection"] = None
        return self._json(200, details)

    def post_pe_studies(self, path):
        row, reader = self.fake.studies[path[2]]["row"], json.loads(self.body)["reader"]
        if row["held_by"] not in (None, reader):
            return self._json(409, {"detail": f"study {path[2]} is being read by {row['held_by']}"})
        row["held_by"] = reader
        return self._json(200, {"reader": reader, "until": "2099-01-01T00:00:00Z"})

    def delete_pe_studies(self, path):
        row = self.fake.studies[path[2]]["row"]
        if row["held_by"] == json.loads(self.body)["reader"]:
            row["held_by"] = None
        self._json(200, {})

    def get_pe_jobs(self, path):
        job = self.fake.jobs.get(path[2])
        self._json(*((200, job) if job else (404, {"detail": "no such job"})))

    def delete_pe_jobs(self, path):
        self.fake.jobs.setdefault(path[2], {})["cancelled"] = True
        self._json(200, {})

    def get_pe_training(self, _path):
        self._json(200, self.fake.training)
