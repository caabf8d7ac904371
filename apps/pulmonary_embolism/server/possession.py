"""One server at a time on a folder of studies, also where the folder is a share and the servers are on other hosts.

    STUDIES/.pe/server.json   who serves, where, since when; touched every few seconds while that server lives

Locks of a file system do not reach over hosts and containers everywhere; a file that somebody keeps touching does. Its
age is told by the clock that stamps the files, so that the clocks of the hosts may differ.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from pe_app.common.errors import InputError
from pe_app.common.files import write_durably

logger = logging.getLogger(__name__)

BEAT_SECONDS = 3.0
STALE_SECONDS = 15.0
"""A server that has not touched its file for that long is gone; a start waits that long at most to see."""


@dataclass(frozen=True)
class Holder:
    """A server.

    Attributes:
        id: of this run of it.
        host: its name.
        machine: what tells machines and containers of one name apart, and one boot from the next.
        pid: of its process there.
        started: of that process, seconds since 1970, since numbers of processes come again.
        since: when it took the folder, for people.
    """

    id: str
    host: str
    machine: str
    pid: int
    started: float
    since: str

    @classmethod
    def of_this_process(cls) -> Holder:
        """The one that runs in this process."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        started = psutil.Process().create_time()
        return cls(uuid.uuid4().hex, socket.gethostname(), _machine(), os.getpid(), started, since)

    def is_gone(self) -> bool:
        """Whether it ended, as far as can be known at once: only of processes that this one could see."""
        if self.machine != _machine():
            return False
        try:
            process = psutil.Process(self.pid)
            return bool(process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.started) > 1)
        except psutil.NoSuchProcess:
            return True


class Possession:
    """The folder is this server's from ``take`` to ``give_back``.

    Args:
        path: of the file, ``.pe/server.json``.
        on_loss: called once if another server took the folder, because this one was stopped for too long.
    """

    def __init__(self, path: Path, on_loss: Callable[[], None]) -> None:
        self._path = path
        self._on_loss = on_loss
        self._own = Holder.of_this_process()
        self._end = threading.Event()

    def take(self) -> None:
        """Take the folder and keep it.

        Raises:
            InputError: if another server has it; names it.
        """
        deadline = time.monotonic() + STALE_SECONDS
        first = None
        while (found := self._read()) is not None:
            holder, touched = found
            if holder is None or holder.is_gone() or self._age(touched) > STALE_SECONDS:
                break
            if touched != (first or touched):
                raise InputError(
                    f"{self._path.parent.parent}: is served already, by process {holder.pid} on {holder.host} since "
                    f"{holder.since}: stop that server first"
                )
            first = first or touched
            if time.monotonic() > deadline:
                break
            time.sleep(BEAT_SECONDS / 10)
        self._write()
        threading.Thread(target=self._keep, name="keep the folder", daemon=True).start()

    def _write(self) -> None:
        """Show who has the folder; where the disk takes nothing, labels can be read all the same."""
        try:
            write_durably(self._path, json.dumps(asdict(self._own)))
        except OSError as error:
            logger.warning("%s: %s; another server would not notice this one", self._path, error.strerror)

    def give_back(self) -> None:
        """Let another server take the folder."""
        self._end.set()
        found = self._read()
        if found and found[0] == self._own:
            self._path.unlink(missing_ok=True)

    def _keep(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            found = self._read()
            if found is not None and found[0] is not None and found[0].id != self._own.id:
                logger.error("another server took this folder: %s on %s", found[0].pid, found[0].host)
                self._on_loss()
                return
            if found is None:
                self._write()
            else:
                with suppress(OSError):  # it is gone, and made anew next time
                    os.utime(self._path)

    def _read(self) -> tuple[Holder | None, int] | None:
        """Who holds the folder (None if that cannot be read), and when the file was touched."""
        try:
            touched = self._path.stat().st_mtime_ns
            holder = Holder(**json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return None, touched
        return holder, touched

    def _age(self, touched: int) -> float:
        """Seconds since then, by the clock that stamps the files; 0 where no file can be made."""
        probe = self._path.with_name(f".{uuid.uuid4().hex}.now")
        try:
            probe.touch()
            return (probe.stat().st_mtime_ns - touched) / 1e9
        except OSError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)


def holder_of(private: Path) -> str:
    """Who serves a folder now, in words; "" for nobody."""
    possession = Possession(private / "server.json", lambda: None)
    found = possession._read()
    if found is None or found[0] is None or found[0].is_gone() or possession._age(found[1]) > STALE_SECONDS:
        return ""
    return f"process {found[0].pid} on {found[0].host} since {found[0].since}"


def _machine() -> str:
    parts = []
    for path, read in (("/proc/sys/kernel/random/boot_id", Path.read_text), ("/proc/self/ns/pid", os.readlink)):
        try:
            parts.append(str(read(Path(path))).strip())
        except OSError:  # not Linux
            parts.append("")
    return f"{socket.gethostname()} {' '.join(parts)}"
