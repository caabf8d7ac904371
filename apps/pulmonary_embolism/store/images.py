"""What is known of each CT without reading it again: identity, reading schedule, or why it cannot be used.

Reading a CT takes seconds, so the last few stay in memory and the facts of all are kept on disk, keyed by the file's
times and size: a file that is replaced or still being copied is examined again.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

import pe_app
from pe_app.annotation.sparse import slice_schedule
from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_app.ct.quality import check_study
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_volume

logger = logging.getLogger(__name__)

VOLUMES_IN_MEMORY = 2
"""A CT of 512 x 512 x 800 takes 420 MB; two cover a reader and a detection at the same time."""

READ_AT_ONCE = 2
"""One that is examined in the background and one that a reader waits for."""

GONE = "the file is gone"


@dataclass(frozen=True)
class ImageFacts:
    """What the server must know of a CT to offer it.

    Attributes:
        sha256: identity of its voxels; "" when it cannot be read, and then the rest is empty, too.
        size: slices, rows, columns.
        spacing_mm: in the same order.
        schedule: the slices to review, every 10 mm.
        z_range_mm: where the first and the last slice lie.
        reason: why it cannot be used; "" for a usable CT.
    """

    sha256: str = ""
    size: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    schedule: tuple[int, ...] = ()
    z_range_mm: tuple[float, ...] = ()
    reason: str = ""

    def z_mm(self, slice_index: int) -> float:
        """Where a slice lies, LPS; slices are evenly spaced."""
        bottom, top = self.z_range_mm
        return round(bottom + (top - bottom) * slice_index / max(self.size[0] - 1, 1), 4)


class Images:
    """The CTs of a store: volumes and facts by file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._volumes: OrderedDict[tuple[object, ...], Volume] = OrderedDict()
        self._facts: dict[str, tuple[list[object], ImageFacts]] = {}
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(READ_AT_ONCE)

    def volume(self, path: Path) -> Volume:
        """The CT of a file.

        Raises:
            InputError: if it cannot be read.
        """
        held = self._held(path)
        if held is not None:
            return held
        with self._slots:
            held = self._held(path)  # whoever waited for the same CT
            if held is not None:
                return held
            key = _key(path)
            volume = read_volume(path)
            with self._lock:
                while len(self._volumes) >= VOLUMES_IN_MEMORY:
                    self._volumes.popitem(last=False)
                self._volumes[key] = volume
        return volume

    def _held(self, path: Path) -> Volume | None:
        key = _key(path)
        with self._lock:
            if key in self._volumes:
                self._volumes.move_to_end(key)
            return self._volumes.get(key)

    def facts(self, study: str, path: Path) -> ImageFacts:
        """The facts of a CT, examined now if nobody did before."""
        known = self.known_facts(study, path)
        if known is not None:
            return known
        stamp = _stamp(path)
        facts = self._examine(path)
        record = {"stamp": stamp, **asdict(facts)}
        try:
            write_durably(self._folder / f"{study}.json", json.dumps(record))
        except OSError:
            logger.exception("what is known of study %s is kept in memory only", study)
        self._facts[study] = (stamp, facts)
        return facts

    def known_facts(self, study: str, path: Path) -> ImageFacts | None:
        """The facts of a CT if it was examined as it is now; None otherwise."""
        try:
            stamp = _stamp(path)
        except OSError:
            return ImageFacts(reason=GONE)
        known = self._facts.get(study)
        if known is None or known[0] != stamp:
            known = self._recorded(study)
        if known and known[0] != stamp:
            self._facts.pop(study, None)
            return None
        return known[1] if known else None

    def last_facts(self, study: str) -> ImageFacts | None:
        """The facts of a CT as it was examined last, whether its file is still there or not."""
        known = self._facts.get(study) or self._recorded(study)
        return known[1] if known else None

    def _recorded(self, study: str) -> tuple[list[object], ImageFacts] | None:
        try:
            record = json.loads((self._folder / f"{study}.json").read_text(encoding="utf-8"))
            examined = record.pop("stamp")
            known = (examined, ImageFacts(**{name: _frozen(value) for name, value in record.items()}))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        self._facts[study] = known
        return known

    def remembered_facts(self, study: str) -> ImageFacts | None:
        """``known_facts`` of a CT that was usable when it was looked at last, without a look at the disk."""
        known = self._facts.get(study)
        return known[1] if known and not known[1].reason else None

    def _examine(self, path: Path) -> ImageFacts:
        try:
            volume = self._held(path)
            if volume is None:
                with self._slots:
                    volume = read_volume(path)  # not kept: thousands are examined while readers work on theirs
            schedule = slice_schedule(volume)
        except InputError as error:
            logger.warning("%s", error)
            return ImageFacts(reason=str(error))
        refused = [reason.message for reason in check_study(volume) if reason.refuses]
        z_mm = volume.slice_z_mm
        return ImageFacts(
            volume.sha256,
            volume.shape,
            volume.spacing_mm,
            tuple(int(index) for index in schedule),
            (float(z_mm[0]), float(z_mm[-1])),
            refused[0] if refused else "",
        )


def _key(path: Path) -> tuple[object, ...]:
    try:
        return (path, *_stamp(path))
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read: {error.strerror}") from error


def _stamp(path: Path) -> list[object]:
    """What changes when the file or this program does: also where a file of the same size and time took its place."""
    status = os.stat(path)
    return [path.name, status.st_mtime_ns, status.st_size, status.st_ctime_ns, pe_app.__version__]


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
