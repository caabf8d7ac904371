"""What convolution at points saves: ``python tests/measure/convolution_speed.py [--series FOLDER]``; not in the suite.

Layers of both stages by points and directly, in float32 and in bfloat16, forward and with both slopes; then the
detection of a DICOM series (by default a simulated one) either way. Told are ratios of the shortest of some runs, all
in one process and by turns, so that what else the machine does changes little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pe_app.common.memory import keep_freed_memory
from pe_app.ct.volume_io import read_volume
from pe_app.model.detector import Detector, default_model
from pe_app.model.winograd import choose, convolve
from pe_app.research.bench.measure import write_phantom_series

LAYERS = ((50, 512, 768, 24), (50, 192, 768, 12), (25, 512, 512, 24), (8, 512, 512, 24), (25, 256, 256, 24))
"""Images, channels, filters, side."""


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--series", type=Path)
    parser.add_argument("--repeats", type=int, default=8)
    given = parser.parse_args()
    keep_freed_memory()
    print("| layer | forward: float32 | bfloat16 | with both slopes: float32 | bfloat16 |\n|---|---|---|---|---|")
    for images, channels, filters, side in LAYERS:
        forward, learning = _ratios(images, channels, filters, side, given.repeats)
        ratios = " | ".join(f"{ratio:.2f}" for ratio in (*forward, *learning))
        print(f"| {images}, {channels} to {filters}, {side} x {side} | {ratios} |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if given.series is None:
            given.series = Path(folder, "series")
            write_phantom_series(given.series)
        _detections(given.series, given.repeats)


def direct(images: Tensor, kernel: Tensor) -> Tensor:
    """Torch's own."""
    return F.conv2d(images, kernel, padding=1)


def learn(way: Callable[[Tensor, Tensor], Tensor], images: Tensor, kernel: Tensor) -> Callable[[], None]:
    """Forward and both slopes."""
    images, kernel = (value.detach().requires_grad_() for value in (images, kernel))

    def run() -> None:
        results = way(images, kernel)
        results.backward(torch.ones_like(results))

    return run


def _ratios(images: int, channels: int, filters: int, side: int, repeats: int) -> tuple[list[float], list[float]]:
    pixels = torch.rand(images, channels, side, side).to(memory_format=torch.channels_last)
    kernel = torch.randn(filters, channels, 3, 3).to(memory_format=torch.channels_last)
    short = pixels.bfloat16(), kernel.bfloat16()
    with torch.inference_mode():
        forward = _seconds(
            [lambda: convolve(pixels, kernel), lambda: direct(pixels, kernel), lambda: direct(*short)], repeats
        )
    learning = _seconds(
        [learn(convolve, pixels, kernel), learn(direct, pixels, kernel), learn(direct, *short)], repeats
    )
    return [each / forward[0] for each in forward[1:]], [each / learning[0] for each in learning[1:]]


def _detections(series: Path, repeats: int) -> None:
    volume = read_volume(series)
    detectors = []
    for precision, by_points in (("float32", False), ("float32", True), ("auto", False), ("auto", True)):
        detector = Detector.load(model) if (model := default_model()) else Detector.untrained()
        detector = detector.with_precision(precision)  # type: ignore[arg-type]
        for network in (detector.encoder, detector.classifier):
            choose(network, by_points=by_points)
        detectors.append(detector)
    seconds = _seconds([lambda each=each: each.detect(volume) for each in detectors], max(2, repeats // 2))
    print("\n| a detection, read already | direct | at points |\n|---|---|---|")
    print(f"| float32 | {seconds[0]:.2f} s | {seconds[1]:.2f} s |")
    print(f"| as it runs | {seconds[2]:.2f} s | {seconds[3]:.2f} s |")


def _seconds(ways: list[Callable[[], object]], repeats: int) -> list[float]:
    """The shortest of each, by turns, after one run that warms up."""
    shortest = [float("inf")] * len(ways)
    for run in range(repeats + 1):
        for number, way in enumerate(ways):
            begin = time.perf_counter()
            way()
            if run:
                shortest[number] = min(shortest[number], time.perf_counter() - begin)
    return shortest


if __name__ == "__main__":
    main()
