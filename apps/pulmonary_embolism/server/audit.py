"""Who did what and when: one JSON line for every request that touches studies, models or trainings.

Added durably before the answer is sent, and never changed; a file that is full is set aside under its time, and the
oldest go after ``KEPT_FILES``. Neither tokens nor what a request carried are written, and of its query only the names
of study, label and tag. Where no line can be written (a full disk), the request goes on: losing a label would be worse
than losing the line that tells of it, and the next line says how many are missing.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from anyio import CapacityLimiter, to_thread

from pe_app.common.files import append_durably

logger = logging.getLogger(__name__)

FILE_BYTES = 10 << 20
KEPT_FILES = 20
"""Beside the one being written; about a million lines in all."""

REFUSALS_A_MINUTE = 60
"""More are counted and not written: whoever knocks without a token must not push the others' lines out."""


class Audit:
    """A log in a file that only grows, written one line after another beside the event loop."""

    def __init__(self, path: Path, file_bytes: int = FILE_BYTES) -> None:
        self._path = path
        self._file_bytes = file_bytes
        self._one = CapacityLimiter(1)
        self._missing = 0
        self._refusals = (0, 0)

    async def write(self, entry: Mapping[str, object], *, refused: bool = False) -> None:
        """Add a line with the time; never raises for what the disk does."""
        if refused and self._too_many(int(time.monotonic() // 60)):
            self._missing += 1
        else:
            await to_thread.run_sync(self._write, entry, limiter=self._one)

    def _write(self, entry: Mapping[str, object]) -> None:
        now = datetime.now(UTC)
        missing = {"lines_missing": self._missing} if self._missing else {}
        line = {"time": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"), **entry, **missing}
        try:
            if not self._path.exists():
                self._path.touch(mode=0o600)
            append_durably(self._path, json.dumps(line).encode() + b"\n")
            self._missing = 0
            if self._path.stat().st_size >= self._file_bytes:
                self._set_aside(now)
        except OSError as error:
            if not self._missing:  # once, not for every request while the disk is full
                logger.error("%s: not written: %s", self._path, error.strerror)
            self._missing += 1

    def _set_aside(self, now: datetime) -> None:
        name = f"{self._path.stem}-{now:%Y%m%dT%H%M%S%f}Z{self._path.suffix}"
        os.replace(self._path, self._path.with_name(name))
        for old in sorted(self._path.parent.glob(f"{self._path.stem}-*{self._path.suffix}"))[:-KEPT_FILES]:
            old.unlink(missing_ok=True)

    def _too_many(self, minute: int) -> bool:
        count = self._refusals[1] + 1 if self._refusals[0] == minute else 1
        self._refusals = (minute, count)
        return count > REFUSALS_A_MINUTE
