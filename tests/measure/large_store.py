"""How long /info/, the next study and a save take in a store of many studies.

Run ``python tests/measure/large_store.py 10000``.

Every study is a link to one small CT with facts and, for every other one, a detection of its own made up beside it:
what the server knows of 10,000 hospital studies, without their 2 TB.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from app_server import Server, running_server
from small_studies import CLASSIFIER, ENCODER, SLABS, small_chest

import pe_monailabel.compat  # noqa: F401 - before monailabel
from pe_app.annotation.sparse import SparseAnnotation
from pe_app.ct.volume_io import write_volume
from pe_app.model.detection import Detection, Evidence, ImageIdentity
from pe_app.model.detector import Detector

# isort: split
from pe_monailabel.store.images import Images

REQUESTS = 200


def write_large_store(folder: Path, count: int, model: Path) -> None:
    """A studies folder that was served before: CTs, what is known of them, and detections of every other one."""
    volume, _ = small_chest(1, emboli=2)
    write_volume(volume, folder / "study-00000.nrrd")
    images = Images(folder / ".pe" / "images")
    images.facts("study-00000", folder / "study-00000.nrrd")
    # so small a chest is refused; those that it stands for are not
    record = {**json.loads((folder / ".pe" / "images" / "study-00000.json").read_text()), "reason": ""}
    identity = Detector.load(model).identity
    rng = np.random.default_rng(0)
    (folder / ".pe" / "detections").mkdir()
    for number in range(count):
        name = f"study-{number:05d}"
        sha256 = hashlib.sha256(name.encode()).hexdigest() if number else record["sha256"]
        if number:
            os.link(folder / "study-00000.nrrd", folder / f"{name}.nrrd")
        known = {**record, "sha256": sha256, "stamp": [f"{name}.nrrd", *record["stamp"][1:]]}
        (folder / ".pe" / "images" / f"{name}.json").write_text(json.dumps(known))
        if number % 2:
            evidence = tuple(Evidence(slab, 3.0 * slab, slab, float(rng.random()), 0.5, None) for slab in range(50))
            image = replace(ImageIdentity.of(volume), sha256=sha256)
            detection = Detection("analysed", (), float(rng.random()), 0.5, evidence, (), image, identity)
            path = folder / ".pe" / "detections" / f"{sha256[:32]}-{identity.sha256[:32]}.json"
            path.write_text(json.dumps(detection.to_json()))


def save(server: Server, study: str, folder: Path) -> object:
    """A reader's save of two slices."""
    volume, mask = small_chest(1, emboli=2)
    annotation = SparseAnnotation.from_mask(volume, mask, (6, 10), "ann", "2026-11-02T08:00:00Z")
    annotation.write(folder / "annotation.json", volume)
    with (folder / "annotation.seg.nrrd").open("rb") as file:
        return server.json(
            "PUT",
            f"/datastore/label?image={study}",
            data={"params": json.dumps({"annotation": annotation.to_json(), "reader": "ann"})},
            files={"label": ("annotation.seg.nrrd", file)},
        )


def measure(server: Server, folder: Path, requests: int = REQUESTS) -> dict[str, list[float]]:
    """Seconds of each request by what was asked."""
    strategies = ("next_unreviewed", "most_uncertain", "disagreement", "random")
    asked = {
        "GET /info/": lambda number: server.json("GET", "/info/"),
        "POST /activelearning": lambda number: server.json(
            "POST", f"/activelearning/{strategies[number % 4]}", json={"reader": f"reader {number % 8}"}
        ),
        "PUT /datastore/label": lambda number: save(server, "study-00000", folder),
        "GET /pe/worklist": lambda number: server.json("GET", "/pe/worklist"),
    }
    seconds: dict[str, list[float]] = {}
    for what, ask in asked.items():
        for number in range(requests if what in ("GET /info/", "POST /activelearning") else max(requests // 10, 5)):
            begin = time.perf_counter()
            told = ask(number)
            seconds.setdefault(what, []).append(time.perf_counter() - begin)
            if what == "POST /activelearning" and not told:
                raise RuntimeError("there is a study to read, and none was chosen")
    return seconds


def main(count: int) -> None:
    """Build, serve, ask, print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model.safetensors"
        Detector.untrained(0, SLABS, ENCODER, CLASSIFIER).save(model)
        write_large_store(folder / "studies", count, model)
        begin = time.perf_counter()
        with running_server(folder / "studies", model) as server:
            print(f"{count} studies, the server answers after {time.perf_counter() - begin:.1f} s")
            begin = time.perf_counter()
            server.json("POST", "/activelearning/most_uncertain", json={"reader": "first"})
            print(f"first choice of a study {time.perf_counter() - begin:.2f} s")
            for what, seconds in measure(server, folder).items():
                p50, p95 = statistics.median(seconds), statistics.quantiles(seconds, n=20)[-1]
                print(f"{what:22} p50 {1000 * p50:7.1f} ms   p95 {1000 * p95:7.1f} ms   of {len(seconds)}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
