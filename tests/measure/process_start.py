"""How long programs take until they work: ``python tests/measure/process_start.py``.

``monailabel start_server`` with an app that does nothing, ``pe-app serve`` and ``pe-app detect`` in turn; of the
servers until ``/info/`` answers, of ``detect`` the whole run on a study that it refuses at once, with 12 slices.
Shortest wall clock and processor time of some runs, and the ratio to the first.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import requests

from pe_app.cli.options import EXIT_REFUSED
from pe_app.research.bench.measure import write_phantom_series

TRIVIAL = """
from monailabel.interfaces.app import MONAILabelApp


class TrivialApp(MONAILabelApp):
    def __init__(self, app_dir, studies, conf):
        super().__init__(app_dir, studies, conf, "trivial", "does nothing", "1")

    def init_infers(self):
        return {}

    def init_trainers(self):
        return {}

    def init_strategies(self):
        return {}
"""
STOCK = """import sys, types
sys.modules["pydicom_seg"] = types.ModuleType("pydicom_seg")
from monailabel.main import Main
Main().run()"""
"""MONAI Label 0.8.5 does not start with pydicom 3 otherwise."""

BIN = Path(sys.executable).parent


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "trivial").mkdir()
        (folder / "trivial" / "main.py").write_text(TRIVIAL)
        (folder / "studies").mkdir()
        write_phantom_series(folder / "series", slices=12, matrix=64)
        stock = [sys.executable, "-c", STOCK, "start_server"]
        stock += ["--app", folder / "trivial", "--studies", folder / "studies"]
        ours = [BIN / "pe-app", "serve", folder / "studies"]
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(runs):
            found.setdefault("monailabel start_server", []).append(server_start(stock, folder))
            found.setdefault("pe-app serve", []).append(server_start(ours, folder))
            found.setdefault("pe-app detect", []).append(detect_start(folder))
    wall, cpu = (min(times) for times in zip(*found["monailabel start_server"], strict=True))
    print("| program | seconds | processor seconds | ratio | ratio of processor seconds |\n|---|---|---|---|---|")
    for name, times in found.items():
        seconds, busy = (min(kind) for kind in zip(*times, strict=True))
        print(f"| {name} | {seconds:.2f} | {busy:.2f} | {seconds / wall:.2f} | {busy / cpu:.2f} |")


def server_start(command: list[object], folder: Path) -> tuple[float, float]:
    """Wall clock until it answers, and its processor time until it is stopped."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before, begin = _busy(), time.perf_counter()
    with (folder / "log").open("wb") as log:
        words = [str(word) for word in [*command, "--port", port]]
        server = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        try:
            while True:
                if server.poll() is not None:
                    raise RuntimeError((folder / "log").read_text())
                try:
                    requests.get(f"http://127.0.0.1:{port}/info/", timeout=30).raise_for_status()
                    break
                except requests.ConnectionError:
                    time.sleep(0.02)
            seconds = time.perf_counter() - begin
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
            server.wait()
    return seconds, _busy() - before


def detect_start(folder: Path) -> tuple[float, float]:
    """Wall clock and processor time of a refusal."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    before, begin = _busy(), time.perf_counter()
    words = [BIN / "pe-app", "detect", folder / "series", "--out", folder / "out"]
    told = subprocess.run([str(word) for word in words], capture_output=True)
    if told.returncode != EXIT_REFUSED:
        raise RuntimeError(told.stderr.decode())
    return time.perf_counter() - begin, _busy() - before


def _busy() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
