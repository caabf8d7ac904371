"""The whole product in one command: two phantom studies, the real server, both detections as a client gets them."""

from __future__ import annotations

import html
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from urllib.parse import quote

import numpy as np
import requests
import SimpleITK as sitk
from requests_toolbelt import MultipartDecoder

from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_volume, volume_from_image, write_volume
from pe_app.model.detection import NOTICE, Detection
from pe_app.model.detector import DetectionResult
from pe_app.phantom import PhantomConfig, make_phantom
from pe_app.results.result_files import write_result
from pe_app.results.words import verdict

SEEDS = (2026, 2035)
"""Of the study with emboli and of the one without. The starter learned from chests round real vessel trees and gets
about half of the drawn chests without emboli right; the second one is among these (see the model card)."""

SERVER_START_S = 180.0
DETECTION_S = 300.0


@dataclass(frozen=True)
class DemoStudy:
    """What the demo found in one of its studies, beside the truth.

    Attributes:
        name: of the study and its folder.
        emboli_mm: places of the simulated emboli, LPS mm; empty without emboli.
        detection: what the server answered.
    """

    name: str
    emboli_mm: tuple[tuple[float, float, float], ...]
    detection: Detection

    def nearest_embolus_mm(self) -> float | None:
        """Distance from the strongest slab's attention peak to the nearest embolus' centre; None without either."""
        peaks = [(slab.probability, slab.peak_lps_mm) for slab in self.detection.evidence if slab.peak_lps_mm]
        if not peaks or not self.emboli_mm:
            return None
        _, strongest = max(peaks)
        return float(np.linalg.norm(np.subtract(self.emboli_mm, strongest), axis=1).min())


def run_demo(out: Path, model: Path | None = None, progress: ProgressCallback = silent) -> tuple[DemoStudy, ...]:
    """Make two phantom studies, serve them, ask for both detections, write a folder with a page for each.

    Args:
        out: made where missing; index.html links the studies' pages.
        model: model file; by default the one that ships.
        progress: told between the steps.
    """
    volumes = out / "volumes"
    emboli = {}
    for number, (name, positive) in enumerate((("phantom_with_emboli", True), ("phantom_without_emboli", False))):
        progress(Progress("make phantom studies", number, 2, name))
        phantom = make_phantom(np.random.default_rng(SEEDS[number]), PhantomConfig(spacing_mm=2.0), positive=positive)
        write_volume(phantom.volume, volumes / f"{name}.nrrd")
        emboli[name] = tuple(embolus.centre_lps_mm for embolus in phantom.emboli)
    studies = []
    progress(Progress("start the server", 0, 2))
    with running_server(volumes, out / "server.log", model) as address:
        for number, name in enumerate(emboli):
            progress(Progress("ask for detections", number, 2, name))
            result = request_detection(address, name)
            write_result(result, read_volume(volumes / f"{name}.nrrd"), out / name, name)
            studies.append(DemoStudy(name, emboli[name], result.detection))
    progress(Progress("ask for detections", 2, 2))
    write_durably(out / "index.html", _index_page(studies))
    return tuple(studies)


@contextmanager
def running_server(studies: Path, log: Path, model: Path | None = None) -> Iterator[str]:
    """The real server on a free loopback port; its address once it answers.

    Raises:
        InputError: if it stops or does not answer in time; the log says why.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pe_app", "serve", str(studies), "--port", str(port)]
    command += ["--model", str(model)] if model else []
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_it_answers(address, server, log)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def request_detection(address: str, study: str) -> DetectionResult:
    """Ask a server for a study's detection: the JSON and the attention volume of one multipart answer.

    Raises:
        InputError: with the server's own sentence, if it refuses.
    """
    answer = requests.post(f"{address}/infer/detection?image={quote(study)}", timeout=DETECTION_S)
    if answer.status_code != 200:
        raise InputError(f"the server did not detect {study}: {answer.status_code} {answer.text[:300]}")
    if answer.headers["content-type"].startswith("application/json"):
        return DetectionResult(Detection.from_json(answer.json()), None)
    parts = {}
    for part in MultipartDecoder.from_response(answer).parts:
        header = Message()
        header["content-disposition"] = part.headers[b"Content-Disposition"].decode()
        parts[header.get_param("name", header="content-disposition")] = part
    return DetectionResult(Detection.from_json(json.loads(parts["params"].text)), _volume_of(parts["image"].content))


def summary(study: DemoStudy) -> list[str]:
    """The lines that the demo prints of a study: the model's word, the truth, where to look."""
    truth = f"{len(study.emboli_mm)} simulated emboli" if study.emboli_mm else "no embolus"
    lines = [study.name, f"  {verdict(study.detection)}; truth: {truth}"]
    for candidate in study.detection.candidates[:3]:
        place = ", ".join(f"{value:.0f}" for value in candidate.centre_lps_mm)
        lines.append(f"  candidate at slice {candidate.slice_index} (z {candidate.z_mm:.0f} mm), L P S {place} mm")
    distance = study.nearest_embolus_mm()
    if distance is not None:
        lines.append(f"  strongest attention lies {distance:.0f} mm from the nearest simulated embolus")
    return lines


def _volume_of(content: bytes) -> Volume:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attention.nrrd"
        path.write_bytes(content)
        return volume_from_image(sitk.ReadImage(str(path)), "attention")


def _wait_until_it_answers(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SERVER_START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise InputError(f"the server stopped with exit code {server.returncode}: see {log}")
        try:
            if requests.get(f"{address}/info/", timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.3)
    raise InputError(f"the server did not answer within {SERVER_START_S:.0f} s: see {log}")


def _index_page(studies: list[DemoStudy]) -> str:
    rows = "".join(
        f"<h2>{html.escape(study.name)}</h2><a href='{quote(study.name)}/index.html'>"
        f"<img src='{quote(study.name)}/review.png' alt='the study and its strongest slices'></a>"
        f"<pre>{html.escape(chr(10).join(summary(study)[1:]))}</pre>"
        for study in studies
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Demo</title><style>"
        "body { background: #14181d; color: #e8ecf0; font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; "
        "margin: 2rem auto; padding: 0 1rem; } b { color: #ff6b5e; } h2 { font-size: 1.1rem; margin-top: 2rem; } "
        "img { width: 100%; } pre { white-space: pre-wrap; }</style></head><body><h1>Two phantom studies"
        f"</h1><p><b>{html.escape(NOTICE)}</b> The studies are simulated. A picture leads to its study's "
        f"page.</p>{rows}</body></html>\n"
    )
