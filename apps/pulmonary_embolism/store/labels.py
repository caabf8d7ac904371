"""The labels of the studies: what is saved becomes a version of the history, what counts is laid into ``labels/``.

    STUDIES/.pe/history/                         every version of every label (``store.history``): the truth
    STUDIES/labels/<tag>/<study>.seg.nrrd .json  the labels that count, for people and stock clients

The only place that knows what tags mean: an annotation is a ``draft`` until every slice of the reading schedule is
reviewed, then ``final``. Both are one line of versions, so that at most one of them exists; every other tag is a line
of its own, and so is what is said of a study as a whole. Nothing here knows MONAI Label; callers hold the store's lock.
"""

from __future__ import annotations

import filecmp
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_mask
from pe_monailabel.store.checks import (
    LABEL_ENDINGS,
    check_inside,
    check_tag,
    finite_json,
    is_tag,
    painted_slices,
    read_grid,
    split_ending,
)
from pe_monailabel.store.history import History, Note, Version, show
from pe_monailabel.store.images import Images

logger = logging.getLogger(__name__)

DRAFT, FINAL = "draft", "final"

ANNOTATION_LINE = "annotation"
STUDY_LABEL_LINE = "study-label"
PAINTED = "from_label_map"
"""Marks an annotation made from a label map, by a client that knows no reviewed slices."""

COUNTS = ("accepted", "open", "reviewed")
"""What the store tells of an annotation to whom saved it."""
OWN = (*COUNTS, PAINTED, "embolism", "slices", "time", "ts", "image_sha256")
"""All of a version's info that the store itself records: no client can set it."""

PROVENANCE = ("reader", "client_id", "adopted", "annotation", "revision", "name")
"""What else of a version no later note changes."""

SEEN = ("client", "model_seen", "restored_from")
"""How a version came about: told with the versions, not with what counts now."""

_REVISION = re.compile(r"[0-9]{6,12}-[0-9a-f]{8}")


class Conflict(InputError):  # noqa: N818 - a state, not a fault
    """Somebody else saved in between: whoever saves must see what counts now."""

    def __init__(
        self,
        message: str,
        revision: str | None = None,
        annotation: dict[str, Any] | None = None,
        label: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.revision = revision
        self.annotation = annotation
        self.label = label


class Labels:
    """The labels of a studies folder."""

    def __init__(self, root: Path, history: History, images: Images) -> None:
        self._root = root
        self._folder = root / "labels"
        self._images = images
        self.history = history

    # What counts

    def annotation_path(self, study: str) -> Path | None:
        """The .json of the annotation that counts, in the history, where no later save changes it."""
        version = self.history.current(study, ANNOTATION_LINE)
        if version is None or not version.annotated:
            return None
        for ending in (version.ext, ".json"):
            self._present(study, ANNOTATION_LINE, version, ending)
        return self.history.path(study, ANNOTATION_LINE, version.revision, ".json")

    def _present(self, study: str, line: str, version: Version, ending: str) -> Path:
        path = self.history.path(study, line, version.revision, ending)
        if not path.is_file():
            raise InputError(
                f"study {study}: file {path.name} of version {version.revision} is missing from the history: restore "
                "it from a backup (pe-app restore), or another version (pe-app labels restore)"
            )
        return path

    def annotation_json(self, study: str) -> dict[str, Any] | None:
        """The annotation that counts as JSON, without its outlines."""
        path = self.annotation_path(study)
        return _annotation_json(path) if path else None

    def check_counts(self, study: str, line: str, based_on: object) -> None:
        """Refuse a save that was made from another version than the one that counts.

        Raises:
            Conflict: with what counts.
        """
        current = self.history.current(study, line)
        counts = current.revision if current and (current.ext or line == STUDY_LABEL_LINE) else None
        if based_on != counts:
            message = f"study {study} was saved by somebody else meanwhile: take over the changes and save again"
            raise self.conflict(message, study)

    def check_study_label_counts(self, study: str, label: str, reader: str, based_on: object) -> bool:
        """Refuse a study label that was given in sight of another version than the one that counts.

        Returns:
            Whether it counts already: sent again, because the first answer got lost.

        Raises:
            Conflict: with the label that counts.
        """
        current = self.history.current(study, STUDY_LABEL_LINE)
        if based_on == (current.revision if current else None):
            return False
        known = label_info(current)
        if current is not None and (label, reader) == (known["pe_label"], known["label_reader"]):
            return True
        words = f"{known['pe_label'] or 'without a label'} by {known['label_reader'] or 'another reader'}"
        raise Conflict(f"study {study} was labelled {words} meanwhile: decide and save again", label=known)

    def conflict(self, message: str, study: str) -> Conflict:
        """A conflict that shows the annotation that counts."""
        version = self.history.current(study, ANNOTATION_LINE)
        return Conflict(message, version.revision if version and version.ext else None, self.annotation_json(study))

    def may_be_painted_over(self, study: str) -> bool:
        """Whether a label map may become the next version: where there is no review, or only a painted one."""
        version = self.history.current(study, ANNOTATION_LINE)
        return version is None or not version.annotated or bool(version.info.get(PAINTED))

    def counts_already(self, study: str, annotation: SparseAnnotation) -> bool:
        """Whether an annotation is the one that counts."""
        path = self.annotation_path(study)
        current = SparseAnnotation.read(path) if path else None
        return (
            current is not None
            and current.to_json() == annotation.to_json()
            and all(bool((current.masks[index] == mask).all()) for index, mask in annotation.masks.items())
        )

    # New versions

    def write_annotation(self, study: str, ct: Path, annotation: SparseAnnotation, info: Mapping[str, Any]) -> None:
        """A new version of the annotation of a CT.

        Raises:
            InputError: if it belongs to another CT, or this one has no reading schedule.
        """
        facts = self._images.facts(study, ct)
        if not facts.schedule:
            raise InputError(f"study {study}: {facts.reason}")
        still_open = annotation.open_slices(facts.schedule)
        counts = (len(annotation.slices), list(still_open), len(facts.schedule) - len(still_open))
        own = {
            **dict(zip(COUNTS, counts, strict=True)),
            "embolism": any(reviewed.state == "embolism" for reviewed in annotation.slices),
            "slices": dict(Counter(reviewed.state for reviewed in annotation.slices)),
            "image_sha256": annotation.image_sha256,
        }
        tag = DRAFT if still_open else FINAL
        revision, previous = self._next_revision(study, ANNOTATION_LINE, tag)
        annotation.write(self.history.path(study, ANNOTATION_LINE, revision, ".json"), self._images.volume(ct))
        version = Version(revision, previous, tag, ".seg.nrrd", True, _dated({**info, **own}))
        self.history.commit(study, ANNOTATION_LINE, version)

    def write_file(self, study: str, tag: str, source: Path, ct: Path, info: Mapping[str, Any]) -> None:
        """A new version of a plain label of a CT."""
        line, ending = line_of(tag), split_ending(source.name)[1].lower()
        revision, previous = self._next_revision(study, line, tag)
        write_durably(self.history.path(study, line, revision, ending), source.read_bytes())
        info = {**info, "image_sha256": self._images.facts(study, ct).sha256}
        self.history.commit(study, line, Version(revision, previous, tag, ending, False, _dated(info)))

    def write_study_label(self, study: str, info: Mapping[str, Any]) -> Version:
        """A new version of the label of the study as a whole."""
        revisions = self._next_revision(study, STUDY_LABEL_LINE, "")
        version = Version(*revisions, "", "", False, _dated(info))
        self.history.commit(study, STUDY_LABEL_LINE, version)
        return version

    def remove(self, study: str, tag: str) -> None:
        """Take a label away from the clients: a version without files."""
        revisions = self._next_revision(study, line_of(tag), tag)
        self.history.commit(study, line_of(tag), Version(*revisions, tag, "", False, _dated({})))

    def add_note(self, study: str, tag: str, reader: str, info: Mapping[str, Any]) -> None:
        """Remark on the version that counts, or approve of it: an entry of its own, the version stays as it was."""
        current = self.history.current(study, line_of(tag))
        if current is not None:
            self.history.add_note(study, line_of(tag), current.revision, Note(reader, _now(), info))

    def info(self, study: str, tag: str, version: Version) -> dict[str, Any]:
        """What is recorded of a label, with what was remarked later, but for where it came from."""
        noted: dict[str, Any] = {}
        for note in self.history.notes(study, line_of(tag), version.revision):
            noted |= {name: value for name, value in note.info.items() if name not in (*OWN, *SEEN, *PROVENANCE)}
        info = {**version.info, **noted}
        if version.annotated and "image_sha256" not in info:  # of a former program
            path = self.history.path(study, line_of(tag), version.revision, ".json")
            info["image_sha256"] = _annotation_json(path)["image_sha256"] if path.is_file() else ""
        return info

    def _next_revision(self, study: str, line: str, tag: str) -> tuple[str, str]:
        for folder in (self.history.path(study, line, "", ""), self._folder / tag):  # before anything is written
            check_inside(folder, self._root)
        return self.history.next_revision(study, line)

    # All versions

    def versions(self, study: str) -> list[dict[str, Any]]:
        """Every save of a study, the latest first: its annotations, plain labels and study labels.

        Returns:
            Of each ``revision``, ``previous``, ``kind`` (annotation, label, study_label or removal), ``tag``,
            ``current``, ``reader``, ``time``, ``client``, ``model_seen``, ``restored_from``, ``source`` (of one taken
            over), ``slices`` (how many of each state; an annotation's), ``label`` (a study label's) and ``notes``
            (what was remarked later).
        """
        found = []
        for line in self.history.lines(study):
            latest = ""
            versions = tuple(self.history.versions(study, line))
            for version in reversed(versions):
                latest = max(latest, str(version.info.get("time", "")))  # a clock that was set back reorders nothing
                place = (1, version.number, "") if version.schema else (0, 0, latest)
                entry = self._described(study, line, version, current=version is versions[0])
                found.append((place, version.number, entry))
        return [entry for *_, entry in sorted(found, key=lambda one: one[:2], reverse=True)]

    def find(self, study: str, revision: str) -> tuple[str, Version] | None:
        """A version and its line; None if there is none of that name."""
        if _REVISION.fullmatch(revision):
            for line in self.history.lines(study):
                for version in self.history.versions(study, line):
                    if version.revision == revision:
                        return line, version
        return None

    def describe(self, study: str, line: str, version: Version) -> dict[str, Any]:
        """A version as ``versions`` tells it; an annotation's with ``annotation``."""
        current = self.history.current(study, line)
        counts = current is not None and current.revision == version.revision
        entry = self._described(study, line, version, current=counts)
        if version.annotated:
            entry["annotation"] = _annotation_json(self._present(study, line, version, ".json"))
        return entry

    def file(self, study: str, line: str, version: Version) -> Path | None:
        """The label file of a version, if it has one."""
        return self._present(study, line, version, version.ext) if version.ext else None

    def _described(self, study: str, line: str, version: Version, *, current: bool) -> dict[str, Any]:
        notes = [asdict(note) for note in self.history.notes(study, line, version.revision)]
        return {**_described(line, version, current=current), "notes": notes}

    # The folder ``labels/``

    def current(self, study: str) -> dict[str, Version]:
        """The versions that have a label file and count, by tag."""
        found = (self.history.current(study, line) for line in self.history.lines(study))
        return {version.tag: version for version in found if version and version.ext}

    def show(self, study: str) -> None:
        """Lay the versions that count into ``labels/``, take former ones away, set aside what no version holds."""
        wanted = set()
        lines = self.history.lines(study)
        for tag, version in self.current(study).items():
            for ending in (version.ext, ".json") if version.annotated else (version.ext,):
                target = self._folder / tag / f"{study}{ending}"
                check_inside(target.parent, self._root)
                source = self.history.path(study, line_of(tag), version.revision, ending)
                if not _is_shown(source, target) and self._is_foreign(study, tag, ending):
                    _set_aside(target, "no version in the history holds it")
                show(source, target)
                wanted.add(target)
        for tag in self._tags() if lines else ():
            for ending in (*LABEL_ENDINGS, ".json") if line_of(tag) in lines else ():
                stale = self._folder / tag / f"{study}{ending}"
                if stale in wanted or not stale.exists():
                    continue
                if self._is_foreign(study, tag, ending):
                    _set_aside(stale, "no version in the history holds it")
                else:
                    stale.unlink(missing_ok=True)

    def foreign(self, study: str) -> list[Path]:
        """Label files of a study in ``labels/`` that no version in the history holds."""
        lines = self.history.lines(study)
        return [
            self._folder / tag / f"{study}{ending}"
            for tag in sorted(self._tags(), key=lambda tag: tag == FINAL)
            for ending in LABEL_ENDINGS
            if self._is_foreign(study, tag, ending)
            or (line_of(tag) in lines and ending == ".seg.nrrd" and self._is_foreign(study, tag, ".json"))
        ]

    def _is_foreign(self, study: str, tag: str, ending: str) -> bool:
        """Whether there is a file in ``labels/`` that equals no version; a link counts as none."""
        file = self._folder / tag / f"{study}{ending}"
        if not file.is_file() or file.is_symlink():
            return False
        line = line_of(tag)
        versions = (self.history.path(study, line, version.revision, ending)
                    for version in self.history.versions(study, line))  # fmt: skip
        return not any(_is_shown(path, file) or _are_equal(path, file) for path in versions)

    def adopt(self, study: str, ct: Path, said: Mapping[str, Mapping[str, Any]]) -> None:
        """Take label files that somebody, or a stock server, laid into ``labels/`` into the history.

        So it is with those that are newer than a history that was restored. Those that cannot be read or lie on
        another grid are set aside; all stay where they are while the CT itself cannot be read.

        Args:
            study: the study.
            ct: its file.
            said: info of the labels by tag, as a stock server kept it in its index.
        """
        by_hand = self.foreign(study)
        if not by_hand:
            return
        with suppress(InputError):  # of the CT
            grid = read_grid(ct)
            for found in by_hand:
                tag = found.parent.name
                try:
                    self._adopt(study, ct, grid, tag, found, said.get(tag, {}))
                except InputError as error:
                    if not self._images.facts(study, ct).schedule:
                        raise
                    _set_aside(found, str(error), "damaged")

    def _adopt(self, study: str, ct: Path, grid: Volume, tag: str, found: Path, said: Mapping[str, Any]) -> None:
        info = {"adopted": True}
        with suppress(InputError):  # a stock server took anything
            info = {**finite_json(said), **info}
        beside = self._folder / tag / f"{study}.json"
        if found.name.endswith(".seg.nrrd") and beside.is_file():
            self.write_annotation(study, ct, SparseAnnotation.read(beside, self._images.volume(ct)), info)
        else:
            mask = read_mask(found, grid)
            if line_of(tag) == ANNOTATION_LINE:
                volume = self._images.volume(ct)
                self.write_annotation(study, ct, painted_slices(mask, volume, ""), {**info, PAINTED: True})
            else:
                self.write_file(study, tag, found, ct, info)

    def _tags(self) -> list[str]:
        """The tags that have a folder."""
        return [entry.name for entry in os.scandir(self._folder) if entry.is_dir() and is_tag(entry.name)]


def label_info(version: Version | None) -> dict[str, Any]:
    """Of a version of the study label, what the index and the clients show: the label, whose, when, and its name."""
    info = version.info if version else {}
    return {
        "pe_label": info.get("pe_label", ""),
        "label_reader": info.get("reader") or "",
        "label_time": info.get("time", ""),
        "label_revision": version.revision if version else None,
    }


def line_of(tag: str) -> str:
    """The line of versions that a tag belongs to.

    Raises:
        InputError: if the tag is no name.
    """
    check_tag(tag)
    return ANNOTATION_LINE if tag in (DRAFT, FINAL) else f"tag-{tag}"


def _described(line: str, version: Version, *, current: bool) -> dict[str, Any]:
    """A version as people and clients see it."""
    info = version.info
    if line == STUDY_LABEL_LINE:
        kind = "study_label"
    else:
        kind = "removal" if not version.ext else "annotation" if version.annotated else "label"
    return {
        "revision": version.revision,
        "previous": version.previous or None,
        "kind": kind,
        "tag": version.tag,
        "current": current,
        "reader": info.get("reader") or info.get("client_id") or "",
        "time": info.get("time", ""),
        "client": info.get("client", ""),
        "model_seen": info.get("model_seen"),
        "restored_from": info.get("restored_from"),
        "source": info.get("source"),
        "slices": info.get("slices"),
        "label": info.get("pe_label"),
    }


def _annotation_json(path: Path) -> dict[str, Any]:
    payload: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    payload.pop("mask_sha256", None)  # binds the two files to each other; a client's next save has other outlines
    return payload


def _dated(info: Mapping[str, Any]) -> dict[str, Any]:
    """Info with the time of the save, for people and as MONAI Label writes it."""
    return {**info, "time": _now(), "ts": int(time.time())}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is_shown(version: Path, file: Path) -> bool:
    """Whether a file is the copy of a version that ``show`` made, by size and time."""
    try:
        there, wanted = file.stat(), version.stat()
    except FileNotFoundError:
        return False
    return (there.st_size, there.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns)


def _are_equal(version: Path, file: Path) -> bool:
    try:
        return filecmp.cmp(version, file, shallow=False)
    except FileNotFoundError:
        return False


def _set_aside(file: Path, reason: str, word: str = "set-aside") -> None:
    """Move a file, and the slices that belong to it, out of the way of the labels; nothing of it is lost."""
    for path in (file, file.with_name(file.name.removesuffix(".seg.nrrd") + ".json")):
        if path.is_file() and (path == file or file.name.endswith(".seg.nrrd")):
            aside = path.with_name(f"{path.name}.{word}-{time.time_ns()}")
            os.replace(path, aside)
            logger.warning("%s: %s; it is set aside as %s", path, reason, aside.name)
