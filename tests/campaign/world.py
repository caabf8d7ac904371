"""One part's world: tiny studies, a tiny model, the server of a folder, and the requests that clients make."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import requests

from pe_app.ct.volume import Volume, axial_affine
from pe_app.ct.volume_io import read_volume, write_volume

TESTS = Path(__file__).resolve().parent.parent
SPACING_MM = (5.0, 5.0, 5.0)
SHAPE = (32, 64, 64)
STUDIES = tuple(f"study{number}" for number in range(8))
UP_SECONDS = 30.0
"""A start that takes longer is a refusal."""


@dataclass
class Row:
    """A line of the table at the end."""

    part: str
    what: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    figures: str = ""
    stock: str = ""

    def check(self, right: object, failure: str) -> bool:
        """Count one try; say what failed where it did."""
        self.tried += 1
        if not right:
            self.failures.append(failure)
        return bool(right)


class Zygote:
    """The preloaded process (``campaign.zygote``) and the commands to it."""

    def __init__(self, work: Path) -> None:
        self.work = work
        paths = (str(TESTS), os.environ.get("PYTHONPATH"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self._log = (work / "zygote.log").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "campaign.zygote", str(work)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment,
            start_new_session=True,  # Ctrl-C is for the campaign alone, which then closes the input
        )  # fmt: skip
        self._lock = threading.Lock()
        self.pid = self._process.pid
        self._read()

    def tell(self, **command: object) -> dict[str, Any]:
        """Send a command, give its answer."""
        with self._lock:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)  # still there: only its name went with the work folder
            raise RuntimeError(f"the preloaded process ended:\n{self._log.read().decode()[-3000:]}")
        return json.loads(line)

    def call(self, module: str, function: str, *arguments: object, seconds: float = 120) -> int | None:
        """Run a function in a fork; its exit code, None if it did not end in time and was killed."""
        log = str(self.work / "calls.log")
        pid = self.tell(do="call", module=module, function=function, arguments=arguments, log=log, tmp=str(self.work))
        code = self.wait(pid["pid"], seconds)
        if code is None:
            os.kill(pid["pid"], 9)
            self.wait(pid["pid"], 10)
        return code

    def wait(self, pid: int, seconds: float) -> int | None:
        """Exit code of a fork; None if it has not ended by then."""
        deadline = time.monotonic() + seconds
        while (code := self.tell(do="wait", pid=pid, seconds=0.0)["code"]) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return code

    def close(self) -> None:
        """End it: it kills all that is left and removes the work folder."""
        self._process.stdin.close()
        self._process.wait(300)  # seconds, but for a very busy machine
        self._log.close()


@contextmanager
def zygote_in(parent: Path) -> Iterator[Zygote]:
    """A preloaded process with a work folder below ``parent``; nothing of either is left afterwards."""
    parent.mkdir(parents=True, exist_ok=True)
    work = parent / f"pe-campaign-{os.getpid()}"
    work.mkdir()
    zygote = None
    try:
        zygote = Zygote(work)
        yield zygote
    finally:
        if zygote is not None:
            zygote.close()
        shutil.rmtree(work, ignore_errors=True)


def chest(seed: int) -> Volume:
    """A CT of 32 x 64 x 64 voxels that the program accepts: contrast, 120 mm of lung, tissue round it."""
    rng = np.random.default_rng((31, seed))
    z, y, x = np.meshgrid(*(np.arange(count) for count in SHAPE), indexing="ij")
    hu = np.full(SHAPE, -1000.0)
    hu[((y - 32) / 26) ** 2 + ((x - 32) / 30) ** 2 < 1] = 40
    for centre in (18, 46):
        hu[(((y - 32) / 18) ** 2 + ((x - centre) / 11) ** 2 < 1) & (z >= 4) & (z < 28)] = -820
    hu[((y - 30) / 9) ** 2 + ((x - 32) / 6) ** 2 < 1] = 320
    hu += rng.normal(0, 20, SHAPE)
    return Volume(np.rint(hu).clip(-1024, 3000).astype(np.int16), axial_affine(SPACING_MM), f"chest {seed}")


def template(zygote: Zygote) -> Path:
    """The folder with the studies and the model that every world starts from."""
    folder = zygote.work / "template"
    if not folder.is_dir():
        folder.mkdir()
        if zygote.call("campaign.world", "make_template", str(folder)) != 0:
            raise RuntimeError((zygote.work / "calls.log").read_text()[-3000:])
    return folder


def make_template(folder: str) -> None:
    """Write them; run in a fork, which has torch."""
    from small_studies import CLASSIFIER, ENCODER, SLABS

    from pe_app.model.detector import Detector

    for number, study in enumerate(STUDIES):
        write_volume(chest(number), Path(folder) / "studies" / f"{study}.nrrd")
    Detector.untrained(0, SLABS, ENCODER, CLASSIFIER).save(Path(folder) / "model.safetensors")


class World:
    """A studies folder and its server."""

    def __init__(self, zygote: Zygote, name: str, folder: Path | None = None) -> None:
        self.zygote = zygote
        self.folder = folder or zygote.work / name
        self.tmp = zygote.work / f"{name}-tmp"
        self.tmp.mkdir()
        shutil.copytree(template(zygote), self.folder, dirs_exist_ok=True)
        self.studies = self.folder / "studies"
        self.log = zygote.work / f"{name}.log"
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.pid = 0
        self.volumes: Mapping[str, Volume] = {}
        self.open = threading.Event()
        """Set while clients may work."""
        self._sessions = threading.local()

    def volume(self, study: str) -> Volume:
        """The CT of a study as its file has it."""
        if study not in self.volumes:
            self.volumes = {**self.volumes, study: read_volume(self.studies / f"{study}.nrrd")}
        return self.volumes[study]

    def spawn(self, steps: Mapping[str, object] | None = None, options: Sequence[str] = (), **environment: str) -> None:
        """Fork a server; it is not up yet."""
        argv = [str(self.studies), "--port", str(self.port), "--model", str(self.folder / "model.safetensors")]
        self.pid = self.zygote.tell(
            do="serve",
            argv=[*argv, *options],
            steps=steps,
            log=str(self.log),
            tmp=str(self.tmp),
            environment=environment,
        )["pid"]

    def wait_until_up(self) -> float | None:
        """Seconds until it answered; None if it ended or took too long."""
        begun = time.monotonic()
        while time.monotonic() - begun < UP_SECONDS:
            try:
                if requests.get(f"{self.address}/info/", timeout=UP_SECONDS).ok:
                    return time.monotonic() - begun
            except requests.RequestException:
                if not is_alive(self.pid):
                    return None
                time.sleep(0.01)
        return None

    def start(self, **steps: object) -> float:
        """Start the server, wait until it answers."""
        self.spawn(steps or None)
        seconds = self.wait_until_up()
        if seconds is None:
            raise RuntimeError(f"the server refused to start:\n{self.log.read_text()[-3000:]}")
        return seconds

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        if self.pid:
            if is_alive(self.pid):
                os.kill(self.pid, 9)
            self.zygote.wait(self.pid, 10)
            self.pid = 0

    def ended(self, seconds: float) -> int | None:
        """Exit code of a server that ends by itself; None if it does not."""
        code = self.zygote.wait(self.pid, seconds)
        if code is not None:
            self.pid = 0
        return code

    def request(self, method: str, path: str, timeout: float = 60, **arguments: Any) -> requests.Response:
        """One request."""
        if not hasattr(self._sessions, "session"):
            self._sessions.session = requests.Session()
            self._sessions.session.trust_env = False
            self._sessions.session.headers["Connection"] = "close"  # as the stock client: one connection a request
        return self._sessions.session.request(method, self.address + path, timeout=timeout, **arguments)

    def put_label(
        self, study: str, params: object, label: bytes, tag: str = "final", name: str = "label.seg.nrrd"
    ) -> requests.Response:
        """Save a label as clients do."""
        data = {"params": params if isinstance(params, str) else json.dumps(params)}
        query = {"image": study, "tag": tag}
        return self.request("PUT", "/datastore/label", params=query, data=data, files={"label": (name, label)})

    def schedule(self, study: str) -> list[int]:
        """The slices to review, as the server says."""
        entries = self.request("GET", f"/pe/studies/{study}").json()["schedule"]
        return [entry["slice_index"] for entry in entries if entry["why"] == "schedule"]

    def temporary(self) -> list[str]:
        """The files in the server's temporary folders: the process' own and the one in its store."""
        kept = self.studies / ".pe" / "tmp"
        return [str(path) for folder in (self.tmp, kept) for path in folder.rglob("*") if path.is_file()]

    def log_tail(self) -> str:
        """The end of the server's log, for failures."""
        return self.log.read_text(errors="replace")[-1500:] if self.log.is_file() else ""

    def close(self) -> None:
        """Stop the server; the folders stay until the campaign ends."""
        self.kill()


@contextmanager
def world_of(zygote: Zygote, name: str, folder: Path | None = None) -> Iterator[World]:
    """A world while the block runs."""
    world = World(zygote, name, folder)
    try:
        yield world
    finally:
        world.close()


def free_port() -> int:
    """A port nobody listens on, below the range from which connections take theirs."""
    import socket

    for port in np.random.default_rng().integers(20000, 32000, 200).tolist():
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(port)
    raise RuntimeError("no free port")


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
