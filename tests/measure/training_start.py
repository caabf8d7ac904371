"""How soon a training works after it was asked for: ``python tests/measure/training_start.py``.

The real server with small studies gets a request for stage I. Told is when its process first spoke (all imports are
done), and when every task that the run shows began and the first step of training was done.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from app_server import chest, running_server
from small_studies import CLASSIFIER, ENCODER

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.ct.slabs import SlabConfig
from pe_app.ct.volume_io import write_volume
from pe_app.model.detector import Detector

STUDIES = 6


def main() -> None:
    """Print the times."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = folder / "model.safetensors"
        Detector.untrained(0, SlabConfig(matrix=96, crop=64, slab_count=10), ENCODER, CLASSIFIER).save(model)
        pairs = [chest(number, emboli=3) for number in range(STUDIES)]
        for number, (volume, _) in enumerate(pairs):
            write_volume(volume, folder / "studies" / f"study{number}.nrrd")
        with running_server(folder / "studies", model) as server:
            for number, (volume, mask) in enumerate(pairs):
                annotation = SparseAnnotation.from_mask(volume, mask, range(8, 40, 4), "ann", "2026-11-02T08:00:00Z")
                annotation.write(folder / "annotation.json", volume)
                with (folder / "annotation.seg.nrrd").open("rb") as file:
                    server.json(
                        "PUT",
                        f"/datastore/label?image=study{number}&tag=final",
                        data={"params": json.dumps({"annotation": annotation.to_json(), "reader": "ann"})},
                        files={"label": ("annotation.seg.nrrd", file)},
                    )
            begin = time.perf_counter()
            settings = {"epochs": 1, "batch": 2, "width": ENCODER.width, "matrix": 96, "crop": 64, "slab_count": 10}
            server.json("POST", "/train/encoder", json=settings)
            print(f"{time.perf_counter() - begin:6.2f} s  the request is answered")
            status = folder / "studies" / ".pe" / "runs" / "encoder-0001" / "status.json"
            seen: set[str] = set()
            while True:
                if status.is_file():
                    said = json.loads(status.read_text())
                    stepped = " (a step is done)" if said["done"] and said["task"] == "train encoder" else ""
                    if (line := said["task"] + stepped) not in seen:
                        seen.add(line)
                        print(f"{time.perf_counter() - begin:6.2f} s  {line}")
                    if stepped or said["state"] != "running":
                        print(said["state"], said["text"])
                        break
                time.sleep(0.01)


if __name__ == "__main__":
    main()
