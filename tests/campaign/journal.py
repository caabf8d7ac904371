"""What the clients saved, what was acknowledged, and whether all of it is there.

Every save has content of its own. For each line (one annotation, one plain label, one study label) the journal knows
when a save was sent and when it ended: with an answer, or with a broken connection. What the server shows must be a
save that no acknowledged one followed, and every acknowledged annotation must be among the versions on disk. The files
are read with pynrrd and json, not with the program.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import nrrd
import numpy as np

from campaign.world import STUDIES, World

Kind = Literal["annotation", "label", "study label", "label info"]

HEADER = """NRRD0004
type: uint8
dimension: 3
space: left-posterior-superior
sizes: {columns} {rows} {slices}
space directions: ({dx},0,0) (0,{dy},0) (0,0,{dz})
kinds: domain domain domain
endian: little
encoding: gzip
space origin: ({x},{y},{z})

"""


@dataclass(eq=False)
class Save:
    """One save of a client, from its sending to its end."""

    kind: Kind
    study: str
    content: str
    sent: float
    ended: float = float("inf")
    acknowledged: bool = False
    refused: bool = False


@dataclass
class Journal:
    """All saves of all clients of a world."""

    world: World
    saves: list[Save] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def sent(self, kind: Kind, study: str, content: str) -> Save:
        """Note a save before it goes out."""
        save = Save(kind, study, content, time.monotonic())
        with self.lock:
            self.saves.append(save)
        return save

    def acknowledged(self) -> list[Save]:
        """The saves that the server said it has."""
        return [save for save in self.saves if save.acknowledged]

    def wrong(self) -> list[str]:
        """What is lost or reverted, by what the running server shows now."""
        index = self.index()
        found = []
        lines: dict[tuple[Kind, str], list[Save]] = {}
        for save in self.saves:
            lines.setdefault((save.kind, save.study), []).append(save)
        for (kind, study), saves in lines.items():
            shown = self.shown(kind, study, index)
            kept = [save for save in saves if save.acknowledged]
            right = not kept if shown is None else False
            for save in saves:
                if save.content == shown and not save.refused:
                    right = not any(later.sent > save.ended for later in kept)
            if not right:
                last = max(kept, key=lambda save: save.ended, default=None)
                found.append(f"{kind} of {study}: shows {shown}, last acknowledged {last and last.content}")
        return found

    def missing_versions(self) -> list[str]:
        """Acknowledged annotations that are not among the versions on disk."""
        found = []
        for study in {save.study for save in self.saves}:
            folder = self.world.studies / ".pe" / "history" / study / "annotation"
            kept = set()
            for path in folder.glob("*.json"):
                if path.name != "current.json" and not path.name.startswith("."):  # unfinished ones of killed servers
                    annotation = json.loads(path.read_text())
                    label = path.with_name(path.name.replace(".json", ".seg.nrrd")).read_bytes()
                    kept.add(annotation_content(annotation["slices"], label))
            for save in self.acknowledged():
                if (save.kind, save.study) == ("annotation", study) and save.content not in kept:
                    found.append(f"the version {save.content} of {study} is not kept")
        return found

    def index(self) -> Mapping[str, Any]:
        """MONAI Label's index as clients get it."""
        return self.world.request("GET", "/datastore/?output=all").json()["objects"]

    def shown(self, kind: Kind, study: str, index: Mapping[str, Any] | None = None) -> str | None:
        """What counts now by what a client gets: the content of a save; None where there is nothing."""
        entry = (index or self.index())[study]
        if kind == "study label":
            return entry["image"]["info"].get("client_info", {}).get("note")
        if kind == "label info":
            return entry["labels"].get("reviewed", {}).get("info", {}).get("segmentationMeta", {}).get("comment")
        tags = ("second",) if kind == "label" else ("draft", "final")
        tag = next((tag for tag in tags if tag in entry["labels"]), None)
        if tag is None:
            return None
        answer = self.world.request("GET", "/datastore/label", params={"label": study, "tag": tag})
        if not answer.ok:
            return f"{answer.status_code} {answer.text}"
        try:
            _voxels(answer.content)
        except (nrrd.NRRDError, EOFError, OSError, zlib.error) as error:
            return f"a damaged file of {len(answer.content)} bytes: {error}"
        if kind == "label":
            return label_content(answer.content)
        info = self.world.request("GET", "/datastore/label/info", params={"label": study, "tag": tag}).json()
        slices = info.get("annotation", info.get("info", {}).get("annotation", {})).get("slices", [])
        return annotation_content(slices, answer.content)


class Client(threading.Thread):
    """One of the people at work: saves, reads, asks for detections and trainings until told to stop."""

    def __init__(self, number: int, journal: Journal, rng: np.random.Generator, schedules: Mapping[str, list[int]]):
        super().__init__(name=f"client{number}", daemon=True)
        self.journal = journal
        self.world = journal.world
        self.rng = rng
        self.schedules = schedules
        self.stopped = threading.Event()
        self.turn = threading.Lock()
        self.think_seconds = 0.0
        self.count = 0
        self.unexpected: list[str] = []
        self.seconds: list[float] = []
        self.only_studies = tuple(schedules)
        self.weights = {
            "annotation": 12,
            "label": 3,
            "study label": 3,
            "label info": 2,
            "read": 4,
            "infer": 3,
            "next": 1,
        }

    def run(self) -> None:
        """Work until stopped; wait where the server is down."""
        names = list(self.weights)
        shares = np.array([self.weights[name] for name in names], float)
        while not self.stopped.is_set():
            self.stopped.wait(self.think_seconds * self.rng.random())
            self.world.open.wait(0.05)
            with self.turn:
                if self.world.open.is_set():
                    action = names[self.rng.choice(len(names), p=shares / shares.sum())]
                    with suppress(OSError):  # requests' exceptions are; the server is gone
                        self.act(action, str(self.rng.choice(self.only_studies)))

    def act(self, action: str, study: str) -> None:
        """One action; a connection that breaks is the server's death, any other answer must fit."""
        world = self.world
        self.count += 1
        mark = f"{self.name}-{self.count}"
        if action == "annotation":
            self.annotate(study)
        elif action == "label":
            label = label_file(world, study, self.rng.integers(1, 200, 6).tolist())
            self.save("label", study, label_content(label), world.put_label, study, {"by": mark}, label, "second")
        elif action == "study label":
            info = json.dumps({"pe_label": str(self.rng.choice(["positive", "negative"])), "note": mark})
            query = {"image": study}
            self.save(
                "study label",
                study,
                mark,
                world.request,
                "PUT",
                "/datastore/image/info",
                params=query,
                data={"info": info},
            )
        elif action == "label info":
            said = {"info": json.dumps({"segmentationMeta": {"status": "approved", "comment": mark}})}
            query = {"label": study, "tag": "reviewed"}
            self.save("label info", study, mark, world.request, "PUT", "/datastore/label/info", params=query, data=said)
        elif action == "read":
            path = ("/pe/worklist", f"/pe/studies/{study}", "/info/", "/datastore/?output=all")[self.rng.integers(4)]
            self.expect(world.request("GET", path), 200)
        elif action == "infer":
            model = ("detection", "candidates")[self.rng.integers(2)]
            self.expect(world.request("POST", f"/infer/{model}", params={"image": study}), 200, 429)
        elif action == "next":
            self.expect(world.request("POST", "/activelearning/next_unreviewed", json={"reader": self.name}), 200)
        elif action == "train":
            settings = {"epochs": 2, "batch": 2, "matrix": 64, "crop": 64, "slab_count": 6, "width": 8, "filters": 4}
            self.expect(world.request("POST", "/train/encoder", json={**settings, "synthetic": True}), 200, 429)

    def annotate(self, study: str) -> None:
        """Review some slices of a study, now and then on top of what counts, as the Slicer module does."""
        schedule = self.schedules[study]
        count = int(self.rng.integers(1, len(schedule) + 1))
        chosen = sorted(self.rng.choice(schedule, count, replace=False).tolist())
        seconds = f"{self.count // 1000 % 60:02d}.{self.count % 1000:03d}000"
        params, label = annotation(self.world, study, chosen, self.name, seconds, self.rng)
        if self.rng.random() < 0.3:
            params["based_on"] = self.world.request("GET", f"/pe/studies/{study}").json()["revision"]
        content = annotation_content(params["annotation"]["slices"], label)
        self.save("annotation", study, content, self.world.put_label, study, params, label)

    def save(self, kind: Kind, study: str, content: str, send: Any, *arguments: Any, **more: Any) -> None:
        """Send a save and note how it ended."""
        save = self.journal.sent(kind, study, content)
        try:
            answer = send(*arguments, **more)
            save.refused = not answer.ok
            save.acknowledged = answer.ok
        finally:
            save.ended = time.monotonic()
        self.seconds.append(save.ended - save.sent)
        self.expect(answer, 200, 409)

    def expect(self, answer: Any, *statuses: int) -> None:
        """Keep an answer that does not fit for the report."""
        if answer.status_code not in statuses:
            self.unexpected.append(
                f"{answer.request.method} {answer.request.path_url}: {answer.status_code} {answer.text[:200]}"
            )


@contextmanager
def clients_at_work(journal: Journal, count: int, rng: np.random.Generator) -> Iterator[list[Client]]:
    """So many clients while the block runs; they work whenever the world is open."""
    schedules = {study: journal.world.schedule(study) for study in STUDIES}
    for study in STUDIES:
        journal.world.put_label(study, {}, label_file(journal.world, study, [1]), "reviewed").raise_for_status()
    clients = [Client(number, journal, child, schedules) for number, child in enumerate(rng.spawn(count))]
    for client in clients:
        client.start()
    try:
        yield clients
    finally:
        for client in clients:
            client.stopped.set()
        for client in clients:
            client.join(90)


def pause(clients: Sequence[Client]) -> None:
    """Close the world and wait until nobody has a request under way."""
    clients[0].world.open.clear()
    for client in clients:
        with client.turn:
            pass


def annotation(
    world: World, study: str, slices: Sequence[int], reader: str, seconds: str, rng: np.random.Generator
) -> tuple[dict[str, Any], bytes]:
    """Params and label file of a review of these slices, outlines and states drawn."""
    volume = world.volume(study)
    voxels = np.zeros(volume.shape, np.uint8)
    entries = []
    for index in slices:
        state = str(rng.choice(["embolism", "none", "uncertain"]))
        if state == "embolism":
            row, column = rng.integers(8, 50, 2)
            voxels[index, row : row + rng.integers(1, 6), column : column + rng.integers(1, 6)] = 1
        entries.append(
            {
                "slice_index": int(index),
                "z_mm": float(volume.slice_z_mm[index]),
                "state": state,
                "reader": reader,
                "time": f"2026-11-02T08:00:{seconds}Z",
            }
        )
    image = {"sha256": volume.sha256, "size": list(volume.shape), "spacing_mm": list(volume.spacing_mm)}
    params = {"annotation": {"schema": "pe-annotation/1", "image": image, "slices": entries}, "reader": reader}
    return params, nrrd_bytes(world, study, voxels)


def label_file(world: World, study: str, values: Sequence[int]) -> bytes:
    """A plain label map whose first voxels tell it from others."""
    voxels = np.zeros(world.volume(study).shape, np.uint8)
    voxels[3, 3, : len(values)] = values
    return nrrd_bytes(world, study, voxels)


def nrrd_bytes(world: World, study: str, voxels: np.ndarray) -> bytes:
    """A label map on a study's grid as a client writes it."""
    volume = world.volume(study)
    (slices, rows, columns), (dz, dy, dx) = voxels.shape, volume.spacing_mm
    x, y, z = volume.affine[:3, 3]
    header = HEADER.format(slices=slices, rows=rows, columns=columns, dx=dx, dy=dy, dz=dz, x=x, y=y, z=z)
    return header.encode() + gzip.compress(np.ascontiguousarray(voxels).tobytes(), 1)


def label_content(label: bytes) -> str:
    """The identity of a label file's voxels."""
    return hashlib.sha256(_voxels(label).tobytes()).hexdigest()[:12]


def annotation_content(slices: Sequence[Mapping[str, Any]], label: bytes) -> str:
    """The identity of an annotation: its first words for people, its slices and outlines for comparing."""
    exact = [(s["slice_index"], round(float(s["z_mm"]), 3), s["state"], s["reader"], s["time"]) for s in slices]
    digest = hashlib.sha256(json.dumps(sorted(exact)).encode() + (_voxels(label) > 0).tobytes()).hexdigest()[:12]
    who = f"{slices[0]['reader']} {slices[0]['time'][-10:]}" if slices else "empty"
    return f"{who} {len(slices)} slices {digest}"


def _voxels(label: bytes) -> np.ndarray:
    file = io.BytesIO(label)
    return nrrd.read_data(nrrd.read_header(file), file)
