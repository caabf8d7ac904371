"""Every version of every label: files written once and never changed, and one pointer to the version that counts.

A save writes the new files first and durably, then replaces the pointer ``current.json``. That replacement is the
save: killed before it, the former version stands; after it, the new one. Nothing here knows MONAI Label.

    FOLDER/<study>/<line>/<revision>.json, .seg.nrrd ...   the files of a version, if it has any
    FOLDER/<study>/<line>/<revision>.version               who, when, what: a Version
    FOLDER/<study>/<line>/current.json                     the Version that counts

A line is a sequence of versions of which the last counts: a study's annotation is one line, whatever its tag.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pe_app.common.files import replacing, write_durably

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Version:
    """One save of a label.

    Attributes:
        revision: names it; sorts by time within its line.
        previous: the revision before it, "" for the first.
        tag: MONAI Label's tag; "" for what is no label file.
        ext: ending of the label file; "" where there is none, as after a removal.
        annotated: whether a ``.json`` with reviewed slices belongs to it.
        info: what else was said with the save: time, reader, client, model seen, counts.
    """

    revision: str
    previous: str
    tag: str
    ext: str
    annotated: bool
    info: Mapping[str, object] = field(default_factory=dict)


class History:
    """The versions below one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def studies(self) -> tuple[str, ...]:
        """The studies that have a line."""
        return tuple(os.listdir(self._folder)) if self._folder.is_dir() else ()

    def lines(self, study: str) -> tuple[str, ...]:
        """The lines of a study that have a version."""
        folder = self._folder / study
        names = os.listdir(folder) if folder.is_dir() else []
        return tuple(sorted(name for name in names if (folder / name / "current.json").is_file()))

    def current(self, study: str, line: str) -> Version | None:
        """The version that counts; None before the first save."""
        return self._version(study, line, "current.json")

    def versions(self, study: str, line: str) -> Iterator[Version]:
        """The version that counts and those before it, newest first."""
        version = self.current(study, line)
        while version is not None:
            yield version
            version = self._version(study, line, f"{version.previous}.version") if version.previous else None

    def path(self, study: str, line: str, revision: str, ext: str) -> Path:
        """Where a file of a version lies."""
        return self._folder / study / line / f"{revision}{ext}"

    def next_revision(self, study: str, line: str) -> tuple[str, str]:
        """A name for the next version, and the revision before it."""
        current = self.current(study, line)
        previous = current.revision if current else ""
        number = int(previous.partition("-")[0] or 0) + 1
        return f"{number:06d}-{uuid.uuid4().hex[:8]}", previous

    def commit(self, study: str, line: str, version: Version) -> None:
        """Let a version count whose files are written; the caller holds the store's lock."""
        record = json.dumps(asdict(version), ensure_ascii=False, allow_nan=False)
        write_durably(self.path(study, line, version.revision, ".version"), record)
        write_durably(self._folder / study / line / "current.json", record)

    def _version(self, study: str, line: str, name: str) -> Version | None:
        """A version; where its file is damaged, the newest one before it that is not."""
        folder = self._folder / study / line
        try:
            return _read_version(folder / name)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            logger.exception("%s is damaged: the version before it counts", folder / name)
        limit = name if name.endswith(".version") else "~"
        for path in sorted(folder.glob("*.version"), reverse=True):
            if path.name < limit:
                try:
                    return _read_version(path)
                except (ValueError, TypeError):
                    continue
        return None


def show(source: Path, target: Path) -> None:
    """Let ``target`` hold what ``source`` holds, all or nothing; a copy, so that nobody can edit a version."""
    with suppress(FileNotFoundError):
        there, wanted = target.stat(), source.stat()
        if (there.st_size, there.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns):
            return
    with replacing(target) as temporary:
        shutil.copy2(source, temporary)


def _read_version(path: Path) -> Version:
    return Version(**json.loads(path.read_text(encoding="utf-8")))
