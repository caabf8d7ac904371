"""How time and memory grow with the number of studies.

Run ``python tests/measure/growth.py [--studies N ...]``; not in the suite.

Small studies (32 slices of 64 x 64, 6 slabs, a narrow network), so that a thousand take minutes. Every step runs in a
process of its own with one thread; told are its processor time, so that what else the machine does changes little, and
its peak memory, beside that of a process that has only loaded the program.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS = ("load", "identify", "slabs", "epoch of stage I", "encode", "epoch of stage II")


def run(step: str, folder: Path) -> dict[str, float]:
    """Seconds and peak memory of one step, in this process; each goes on from what those before it have made."""
    import torch
    from small_studies import CLASSIFIER, ENCODER, SLABS

    from pe_app.common.progress import Progress
    from pe_app.model.detector import Detector
    from pe_app.studies import read_studies
    from pe_app.training.datasets import encode_sources, read_sources
    from pe_app.training.stages import (
        ClassifierTraining,
        EncoderTraining,
        prepared_slabs,
        split,
        train_classifier,
        train_encoder,
    )

    torch.set_num_threads(1)
    stage1 = EncoderTraining(epochs=1, precision="float32")
    stage2 = ClassifierTraining(epochs=1, precision="float32")
    studies = split(read_studies(folder / "studies.csv"), stage1)
    encoder, features = folder / "encoder.safetensors", folder / "features"
    shapes = {"slabs": SLABS, "network": ENCODER, "classifier": CLASSIFIER}

    clock = {"begin": time.process_time(), "end": 0.0}

    def watch(progress: Progress) -> None:
        """An epoch begins when the preparation ends."""
        clock["end" if progress.task.startswith("train") else "begin"] = time.process_time()

    def make_slabs() -> None:
        sources = read_sources(studies)
        for side in ("train", "validation"):
            prepared_slabs(sources, side, SLABS, stage1, folder / "slabs", lambda _: None)

    def encode() -> None:
        detector = Detector.load(encoder)
        detector = detector.with_precision("float32")
        encode_sources(detector, read_sources(studies, annotations=False), features)

    works: dict[str, Callable[[], object]] = {
        "load": lambda: None,
        "identify": lambda: read_sources(studies),
        "slabs": make_slabs,
        "epoch of stage I": lambda: train_encoder(
            studies, encoder, settings=stage1, slabs_dir=folder / "slabs", progress=watch, **shapes
        ),
        "encode": encode,
        "epoch of stage II": lambda: train_classifier(
            studies, encoder, folder / "model.safetensors", settings=stage2, cache_dir=features, progress=watch
        ),
    }
    clock["begin"] = time.process_time()
    works[step]()
    seconds = (clock["end"] or time.process_time()) - clock["begin"]
    return {"seconds": seconds, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}


def measure(count: int, folder: Path) -> dict[str, dict[str, float]]:
    """Every step for so many studies."""
    from small_studies import small_studies

    from pe_app.studies import write_studies

    write_studies(small_studies(folder, count), folder / "studies.csv")
    found = {}
    for step in STEPS:
        command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        found[step] = json.loads(done.stdout)
        print(f"{count} studies, {step}: {found[step]}", file=sys.stderr)
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(run(arguments.step, arguments.folder)))
        return
    rows = {}
    for count in arguments.studies:
        with tempfile.TemporaryDirectory() as folder:
            rows[count] = measure(count, Path(folder))
    print("| step |" + "".join(f" {count} studies |" for count in rows))
    print("|---|" + "---|" * len(rows))
    for step in STEPS[1:]:
        cells = (
            f"{found[step]['seconds']:.2f} s, {1000 * found[step]['seconds'] / count:.1f} ms a study, "
            f"{found[step]['megabytes']:.0f} MB"
            for count, found in rows.items()
        )
        print(f"| {step} | " + " | ".join(cells) + " |")
    print(f"\nThe program itself takes {max(found['load']['megabytes'] for found in rows.values()):.0f} MB.")


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    main()
