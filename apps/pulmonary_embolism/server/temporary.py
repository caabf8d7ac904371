"""Where this server puts temporary files: beside the studies, where there is room for a CT, unlike in memory.

STUDIES/.pe/tmp/<process>-<run>/.made-by-pe-app   marks what may be removed when the process that made it is gone
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import uuid
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

_OURS = re.compile(r"([0-9]+)-[0-9a-f]{8}\.pe-app")


class TemporaryFolder:
    """The folder of this process for temporary files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.pe-app"

    def use(self) -> None:
        """Use it from now on; what servers left that were killed is removed, and nothing that they did not make."""
        self._folder.mkdir(exist_ok=True)
        for left in self._folder.iterdir():
            ours = _OURS.fullmatch(left.name)
            if ours is None or left.is_symlink():
                logger.warning("%s: was not made by this program; it stays", left)
            elif not psutil.pid_exists(int(ours[1])):
                shutil.rmtree(left, ignore_errors=True)
        self.ensure()
        tempfile.tempdir = str(self._own)

    def ensure(self) -> None:
        """Make it again if somebody removed it."""
        self._own.mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        """Take it away because the server ends."""
        tempfile.tempdir = None
        shutil.rmtree(self._own, ignore_errors=True)
