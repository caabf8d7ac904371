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

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.ct.volume import Volume, axial_affine
from pe_app.ct.volume_io import read_volume, write_volume
from pe_app.phantom import Phantom, PhantomConfig, make_phantom

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / "apps" / "pulmonary_embolism"

SHAPE, SPACING_MM = (48, 96, 96), (5.0, 3.2, 3.2)
"""Of ``chest``."""


HOSTILE = """
from pathlib import Path
Path(__file__).with_name("executed").touch()
raise SystemExit("a module of the current folder was executed")
"""


def hostile_folder(folder: Path) -> Path:
    """A folder with modules named like ours and like those of research code; ``executed`` appears if one is run."""
    for name in ("lib/__init__.py", "main.py", "pe_monailabel.py", "pe_app.py", "monailabel.py", "torch.py"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HOSTILE)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A running ``pe-app serve``: its address, its folder, and the requests that the tests make.

    Args:
        studies: its folder.
        model: to start with.
        options: more of the command.
        source: what is served, if not the folder.
    """

    def __init__(self, studies: Path, model: Path, *options: str, source: str = "") -> None:
        self.studies = studies
        self.log = studies.parent / "server.log"
        self.current = hostile_folder(studies.parent / "current")
        port = str(free_port())
        self.address = f"http://127.0.0.1:{port}"
        program = [sys.executable, "-P", "-m", "pe_app", "serve", source or str(studies)]
        self._command = [*program, "--port", port, "--model", str(model), *options]
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, cwd=self.current, env=environment, stdout=log, stderr=log)
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
def running_server(studies: Path, model: Path, *options: str) -> Iterator[Server]:
    server = Server(studies, model, *options)
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


def chest(seed: int, emboli: int) -> tuple[Volume, Volume]:
    """A chest with a heart full of contrast and vessels in the lungs, and the mask of its emboli."""
    rng = np.random.default_rng((2026, seed))
    index = np.meshgrid(*(np.arange(count) - (count - 1) / 2 for count in SHAPE), indexing="ij")
    z, y, x = (axis * step for axis, step in zip(index, SPACING_MM, strict=True))
    x, y = x - rng.uniform(-10, 10), y - rng.uniform(-10, 10)
    wide, deep, tall = rng.uniform(0.9, 1.1, 3)
    hu = np.full(SHAPE, -1000.0)
    hu[(x / (140 * wide)) ** 2 + (y / (105 * deep)) ** 2 < 1] = 40
    for side in (-1, 1):
        lung = ((x - 75 * side * wide) / (52 * wide)) ** 2 + (y / (80 * deep)) ** 2 + 0.6 * (z / (100 * tall)) ** 2 < 1
        hu[lung] = -820
    hu[((x - 5) / 38) ** 2 + ((y + 10) / 42) ** 2 + (z / 75) ** 2 < 1] = rng.uniform(280, 420)
    for _ in range(12):
        vessel = (x - rng.choice((-1, 1)) * rng.uniform(50, 90)) ** 2 + (y - rng.uniform(-50, 50)) ** 2 < 49
        hu[vessel & (np.abs(z - rng.uniform(-70, 70)) < 25)] = rng.uniform(250, 400)
    mask = np.zeros(SHAPE, np.uint8)
    for _ in range(emboli):
        place = rng.choice((-1, 1)) * rng.uniform(55, 88), rng.uniform(-45, 45), rng.uniform(-60, 60)
        ball = (x - place[0]) ** 2 + (y - place[1]) ** 2 + (z - place[2]) ** 2 < rng.uniform(13, 16) ** 2
        hu[ball], mask[ball] = 800, 1
    hu += rng.normal(0, 20, SHAPE)
    volume = Volume(np.rint(hu).clip(-1024, 3000).astype(np.int16), axial_affine(SPACING_MM), f"chest {seed}")
    return volume, volume.with_voxels(mask)
