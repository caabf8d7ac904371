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
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pe_app.files import replacing, write_durably


@dataclass(frozen=True)
class Version:
    """One save of a label.

    Attributes:
        revision: names it; sorts by time within its line.
        previous: the revision before it, "" for the first.
        tag: MONAI Label's tag; "" for what is no label file.
        ext: ending of the label file; "" where there is none, as after a removal.
        annotated: whether a ``.json`` with reviewed slices belongs to it.
        info: what else was said with the save: time, reader, client, counts.
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
        try:
            return Version(**json.loads((self._folder / study / line / name).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None


def show(source: Path, target: Path) -> None:
    """Let ``target`` be the same file as ``source``, all or nothing; a copy where the file system has no links."""
    if target.exists() and os.path.samefile(source, target):
        return
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
