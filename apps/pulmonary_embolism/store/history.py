"""Every version of every label: files written once and never changed, and one pointer to the version that counts.

A save writes the new files first and durably, then replaces the pointer ``current.json``. That replacement is the
save: killed before it, the former version stands; after it, the new one. Nothing here knows MONAI Label.

    FOLDER/<study>/<line>/<revision>.json, .seg.nrrd ...   the files of a version, if it has any
    FOLDER/<study>/<line>/<revision>.version               who, when, what: a Version
    FOLDER/<study>/<line>/<revision>.note-<number>         what somebody remarked on it later: a Note
    FOLDER/<study>/<line>/current.json                     the Version that counts

A line is a sequence of versions of which the last counts: a study's annotation is one line, whatever its tag. Records
are of schema ``pe-version/1``: fields that this program does not know are ignored and kept; another major version is
refused by name, because what it means cannot be known.
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

from pe_app.common.errors import InputError
from pe_app.common.files import replacing, write_durably

logger = logging.getLogger(__name__)


SCHEMA = "pe-version/1"
"""Of the records; those without a schema are older and mean the same."""


class Damaged(Exception):  # noqa: N818 - a state of a file
    """A record that is not whole."""


class Unreadable(InputError):  # noqa: N818 - a state of a file
    """A record of a newer program, or nothing but damaged records."""


@dataclass(frozen=True)
class Version:
    """One save of a label.

    Attributes:
        revision: names it; its number grows with every save of the study, whatever the clock says.
        previous: the revision before it, "" for the first.
        tag: MONAI Label's tag; "" for what is no label file.
        ext: ending of the label file; "" where there is none, as after a removal.
        annotated: whether a ``.json`` with reviewed slices belongs to it.
        info: what else was recorded with the save: time, reader, client, model seen, counts.
        schema: of the record; "" for those that were written before they had one.
    """

    revision: str
    previous: str
    tag: str
    ext: str
    annotated: bool
    info: Mapping[str, object] = field(default_factory=dict)
    schema: str = SCHEMA

    @property
    def number(self) -> int:
        """Its place among the saves of the study."""
        return _number(self.revision)


@dataclass(frozen=True)
class Note:
    """A remark on a version, or an approval of it: added later, and never changed either.

    Attributes:
        reader: who made it; "" where nobody proved to be anyone.
        time: when, ISO 8601 in UTC.
        info: what was remarked, as the client sent it.
    """

    reader: str
    time: str
    info: Mapping[str, object]


class History:
    """The versions below one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def studies(self) -> tuple[str, ...]:
        """The studies that have a line."""
        return tuple(os.listdir(self._folder)) if self._folder.is_dir() else ()

    def lines(self, study: str) -> tuple[str, ...]:
        """The lines of a study that have a version, also where the pointer to it is lost."""
        folder = self._folder / study
        names = os.listdir(folder) if folder.is_dir() else []
        return tuple(sorted(name for name in names if self._has_version(folder / name)))

    def current(self, study: str, line: str) -> Version | None:
        """The version that counts; None before the first save.

        Where the pointer is lost or damaged, the newest record that can be read tells.

        Raises:
            Unreadable: if records are there, but none that this program can read.
        """
        folder = self._folder / study / line
        try:
            return read_version(folder / "current.json")
        except FileNotFoundError:
            pass
        except Damaged:
            logger.exception("%s is damaged: the newest version that can be read counts", folder / "current.json")
        return self._newest(folder, "~")

    def versions(self, study: str, line: str) -> Iterator[Version]:
        """The version that counts and those before it, newest first."""
        version = self.current(study, line)
        while version is not None:
            yield version
            version = self._before(study, line, version.previous) if version.previous else None

    def path(self, study: str, line: str, revision: str, ext: str) -> Path:
        """Where a file of a version lies."""
        return self._folder / study / line / f"{revision}{ext}"

    def next_revision(self, study: str, line: str) -> tuple[str, str]:
        """A name for the next version, numbered after every other of the study, and the revision before it."""
        current = self.current(study, line)
        folder = self._folder / study
        names = [path.name for path in folder.glob("*/[0-9]*.version")] if folder.is_dir() else []
        number = max(map(_number, names), default=0) + 1
        return f"{number:06d}-{uuid.uuid4().hex[:8]}", current.revision if current else ""

    def commit(self, study: str, line: str, version: Version) -> None:
        """Let a version count whose files are written; the caller holds the store's lock."""
        record = json.dumps(asdict(version), ensure_ascii=False, allow_nan=False)
        write_durably(self.path(study, line, version.revision, ".version"), record)
        write_durably(self._folder / study / line / "current.json", record)

    def notes(self, study: str, line: str, revision: str) -> tuple[Note, ...]:
        """The remarks on a version, in order."""
        folder = self._folder / study / line
        found = sorted(folder.glob(f"{revision}.note-*")) if folder.is_dir() else []
        notes = []
        for path in found:
            try:
                entry = json.loads(path.read_text(encoding="utf-8"))
                notes.append(Note(str(entry["reader"]), str(entry["time"]), dict(entry["info"])))
            except (ValueError, TypeError, KeyError):
                logger.exception("%s is damaged: it is left out", path)
        return tuple(notes)

    def add_note(self, study: str, line: str, revision: str, note: Note) -> None:
        """Add a remark; the caller holds the store's lock."""
        number = len(self.notes(study, line, revision)) + 1
        while (path := self.path(study, line, revision, f".note-{number:06d}")).exists():  # damaged ones keep theirs
            number += 1
        write_durably(path, json.dumps(asdict(note), ensure_ascii=False, allow_nan=False))

    def records(self) -> Iterator[tuple[str, str, Path]]:
        """Study, line and path of every record, as the disk has them."""
        for study in sorted(self.studies()):
            for path in sorted((self._folder / study).glob("*/[!.]*")):
                if path.suffix == ".version" or path.name == "current.json":
                    yield study, path.parent.name, path

    def _has_version(self, line: Path) -> bool:
        if (line / "current.json").is_file():
            return True
        return line.is_dir() and any(name.endswith(".version") and name[0] != "." for name in os.listdir(line))

    def _before(self, study: str, line: str, revision: str) -> Version | None:
        """A version by its name; where its record is damaged, the newest one before it that is not."""
        path = self.path(study, line, revision, ".version")
        try:
            return read_version(path)
        except FileNotFoundError:
            pass
        except Damaged:
            logger.exception("%s is damaged: the version before it is shown", path)
        try:
            return self._newest(path.parent, path.name)
        except Unreadable:
            return None

    def _newest(self, folder: Path, limit: str) -> Version | None:
        """The newest version below a name whose record can be read; None where there is no record at all."""
        found = sorted(folder.glob("[0-9]*.version"), reverse=True)
        for path in found:
            if path.name < limit:
                try:
                    return read_version(path)
                except Damaged:
                    continue
        if found or (folder / "current.json").exists():
            raise Unreadable(
                f"{folder}: none of its records of versions can be read: restore them from a backup (pe-app restore), "
                "or move the folder away to begin anew"
            )
        return None


def show(source: Path, target: Path) -> None:
    """Let ``target`` hold what ``source`` holds, all or nothing; a copy, so that nobody can edit a version."""
    with suppress(FileNotFoundError):
        there, wanted = target.stat(), source.stat()
        if (there.st_size, there.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns):
            return
    with replacing(target) as temporary:
        shutil.copy2(source, temporary)


def read_version(path: Path) -> Version:
    """A version from its file.

    Raises:
        Unreadable: if a newer program wrote it.
        Damaged: if it is not whole.
        FileNotFoundError: if it is not there.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        schema = str(record.get("schema", ""))
        if schema not in ("", SCHEMA) and schema.partition(".")[0] != SCHEMA:
            raise Unreadable(f"{path}: is of schema {schema!r}, which a newer program wrote: install that one again")
        known = {name: record[name] for name in ("revision", "previous", "tag", "ext", "annotated")}
        version = Version(**known, info=dict(record.get("info", {})), schema=schema)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Damaged(f"{path}: is damaged") from error
    return version


def _number(name: str) -> int:
    digits = name.partition("-")[0]
    return int(digits) if digits.isdecimal() else 0
