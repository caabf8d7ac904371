"""A process that has imported the server and forks it: ``python -m campaign.zygote WORK``.

It reads commands, one JSON object a line, and answers each with a line. When its standard input ends, because the
campaign ended or was killed itself, it kills whatever it started and whatever that left behind, and removes WORK.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36

WRITES = {
    "os.rename": 1,
    "os.link": 1,
    "os.remove": 0,
    "os.mkdir": 0,
    "os.rmdir": 0,
    "shutil.move": 1,
    "os.truncate": 0,
}
"""Audit events that change a folder, and which of their arguments is the path that changes."""


class Steps:
    """Counts what the server does to the files below a folder, writes it down, and dies before a given step.

    A step is an open for writing, a sync, a rename, a link, a removal, a new folder. Python's audit hook is called
    before each, so that dying at step n + 1 is dying right after step n.
    """

    def __init__(self, folder: str, armed: str, die_at: int, trace: str) -> None:
        self._folder = folder
        self._armed = armed
        self._die_at = die_at
        self._trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if trace else -1
        self._count = 0
        self._counting = threading.RLock()
        self._fsync = os.fsync
        os.fsync = self._sync
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if isinstance(path, (str, bytes, os.PathLike)) and writes:
                self._step("open", os.fsdecode(path))
        elif event == "os.mkdir" and os.path.isdir(arguments[0]):
            return  # it exists: nothing will change
        elif event in WRITES:
            self._step(event, *(os.fsdecode(path) for path in arguments[: WRITES[event] + 1]))

    def _sync(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self._step("sync", path)
        self._fsync(descriptor)

    def _step(self, event: str, *paths: str) -> None:
        place = os.path.abspath(paths[-1])
        if not place.startswith(self._folder) or place.endswith(".lock") or "/.pe/tmp/" in place:
            return  # not what is kept
        if self._armed and not os.path.exists(self._armed):
            return
        with self._counting:
            self._count += 1
            if self._trace >= 0:
                os.write(self._trace, (json.dumps([event, *map(os.path.abspath, paths)]) + "\n").encode())
            if self._count == self._die_at:
                os.kill(os.getpid(), signal.SIGKILL)


def serve(argv: list[str], steps: dict[str, Any] | None) -> None:
    """What ``pe-app serve`` does."""
    from pe_app.cli import main

    if steps:
        Steps(**steps)
    sys.argv = ["pe-app", "serve", *argv]
    main()


def _fork(run: Callable[[], None], log: str, tmp: str, environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.environ.update(environment, TMPDIR=tmp)
        tempfile.tempdir = tmp
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _answer(command: dict[str, Any]) -> dict[str, Any]:
    if command["do"] == "serve":
        run = lambda: serve(command["argv"], command["steps"])  # noqa: E731
        return {"pid": _fork(run, command["log"], command["tmp"], command["environment"])}
    if command["do"] == "call":
        function = getattr(importlib.import_module(command["module"]), command["function"])
        run = lambda: function(*command["arguments"])  # noqa: E731
        return {"pid": _fork(run, command["log"], command["tmp"], {})}
    deadline = time.monotonic() + command["seconds"]
    while True:
        pid, status = os.waitpid(command["pid"], os.WNOHANG)
        if pid:
            return {"code": os.waitstatus_to_exitcode(status)}
        if time.monotonic() > deadline:
            return {"code": None}
        time.sleep(0.005)


def descendants(pid: int) -> list[int]:
    """The processes below a process, from /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, new = [], [pid]
    while new:
        new = [child for parent in new for child in parents.get(parent, ())]
        found += new
    return found


def _end(work: Path) -> None:
    for _ in range(50):
        left = descendants(os.getpid())
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        while left:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break
        if not descendants(os.getpid()):
            break
        time.sleep(0.05)
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in mounts:
        if Path(mount).is_relative_to(work):
            subprocess.run(["umount", "--lazy", mount], check=False)
    shutil.rmtree(work, ignore_errors=True)


def main(work: Path) -> None:
    """Answer commands until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the campaign's; this process ends with its input
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        for module in ("pe_monailabel.server.serving", "pe_app.training", "pe_app.model.detector"):
            importlib.import_module(module)
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)
    finally:
        _end(work)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
