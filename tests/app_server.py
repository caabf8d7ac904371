"""The real server in a process of its own on a free loopback port, for the tests of the app."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import requests

from pe_app.annotation import SparseAnnotation
from pe_app.phantom import Phantom, PhantomConfig, make_phantom
from pe_app.volume_io import read_volume, write_volume

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / "apps" / "pulmonary_embolism"

START = """
import logging, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
from lib.server import serve
serve(Path(sys.argv[2]), "127.0.0.1", int(sys.argv[3]), Path(sys.argv[4]))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A running server: its address, its folder, and the requests that the tests make."""

    def __init__(self, studies: Path, model: Path) -> None:
        self.studies = studies
        self.log = studies.parent / "server.log"
        self.address = f"http://127.0.0.1:{free_port()}"
        self._command = [
            sys.executable,
            "-c",
            START,
            str(APP),
            str(studies),
            self.address.rpartition(":")[2],
            str(model),
        ]
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        for _ in range(400):
            if self.process.poll() is not None:
                break
            try:
                requests.get(f"{self.address}/info/", timeout=5)
                return
            except requests.ConnectionError:
                time.sleep(0.2)
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-3000:]}")

    def request(self, method: str, path: str, **arguments) -> requests.Response:
        return requests.request(method, self.address + path, timeout=60, **arguments)

    def json(self, method: str, path: str, **arguments) -> dict:
        answer = self.request(method, path, **arguments)
        assert answer.ok, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()


@contextmanager
def running_server(studies: Path, model: Path) -> Iterator[Server]:
    server = Server(studies, model)
    try:
        yield server
    finally:
        server.stop()


def write_phantoms(folder: Path, names: dict[str, bool], config: PhantomConfig) -> dict[str, Phantom]:
    """Phantoms by name, with emboli where the value is true, as files of a studies folder."""
    phantoms = {}
    for number, (name, positive) in enumerate(names.items()):
        phantoms[name] = make_phantom(np.random.default_rng((7, number)), config, positive=positive)
        write_volume(phantoms[name].volume, folder / f"{name}.nrrd")
    return phantoms


def review(
    path: Path, phantom: Phantom, slice_indices: list[int], folder: Path, reader: str = "ann"
) -> SparseAnnotation:
    """What a careful reader would say of these slices; its two files in ``folder``."""
    volume = read_volume(path)
    annotation = SparseAnnotation.from_mask(volume, phantom.emboli_mask, slice_indices, reader, "2026-11-02T08:00:00Z")
    annotation.write(folder / "annotation.json", volume)
    return annotation
