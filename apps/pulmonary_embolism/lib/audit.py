"""Who did what and when: one JSON line for every request that touches studies, models or trainings.

Appended and never changed; a file that is full is set aside under its time, and the oldest go after ``KEPT_FILES``.
Neither tokens nor what a request carried are written, and of its query only the names of study, label and tag.
A line is written before the answer is sent, but not synced: a crash of the machine can take the last seconds, one of
the server none. Where no line can be written (a full disk), the request goes on: losing a label would be worse than
losing the line that tells of it, and the next line says how many are missing.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

logger = logging.getLogger(__name__)

FILE_BYTES = 10 << 20
KEPT_FILES = 20
"""Beside the one being written; about a million lines in all."""

REFUSALS_A_MINUTE = 60
"""More are counted and not written: whoever knocks without a token must not push the others' lines out."""


class Audit:
    """An append-only log in a file; used from one thread."""

    def __init__(self, path: Path, file_bytes: int = FILE_BYTES) -> None:
        self._path = path
        self._file_bytes = file_bytes
        self._missing = 0
        self._torn = False
        self._minute = (0, 0)

    def write(self, entry: Mapping[str, object], *, refused: bool = False) -> None:
        """Append a line with the time; never raises for what the disk does."""
        now = datetime.now(UTC)
        if refused and self._too_many(int(time.monotonic() // 60)):
            self._missing += 1
            return
        missing = {"lines_missing": self._missing} if self._missing else {}
        line = {"time": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"), **entry, **missing}
        try:
            self._append(json.dumps(line).encode() + b"\n")
            self._missing = 0
        except OSError as error:
            if not self._missing:
                logger.error("%s: not written: %s", self._path, error.strerror)
            self._missing += 1

    def _too_many(self, minute: int) -> bool:
        count = self._minute[1] + 1 if self._minute[0] == minute else 1
        self._minute = (minute, count)
        return count > REFUSALS_A_MINUTE

    def _append(self, line: bytes) -> None:
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            line = b"\n" + line if self._torn else line
            written = os.write(file, line)
            self._torn = written < len(line)  # a disk that became full in mid-line; the next one begins anew
            full = os.fstat(file).st_size >= self._file_bytes
        finally:
            os.close(file)
        if self._torn:
            raise OSError(None, "the disk is full")
        if full:
            self._set_aside()

    def _set_aside(self) -> None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
        os.replace(self._path, self._path.with_name(f"{self._path.stem}-{stamp}{self._path.suffix}"))
        for old in sorted(self._path.parent.glob(f"{self._path.stem}-*{self._path.suffix}"))[:-KEPT_FILES]:
            old.unlink(missing_ok=True)
