"""What is damaged in a folder that is served, and what it would cost: read only, also while a server runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.common.errors import InputError
from pe_monailabel.store.checks import IMAGE_ENDINGS, LABEL_ENDINGS, split_ending
from pe_monailabel.store.history import Damaged, History, Unreadable, Version, read_version


def find_damage(folder: Path) -> Iterator[str]:
    """A line for everything that is not as it should be: what, where, what it means."""
    private = folder / ".pe"
    for path in sorted(private.iterdir()) if private.is_dir() else ():
        if path.is_symlink():
            yield f"{path}: is a link: the server does not start until the folder or file itself is there"
    history = History(private / "history")
    yield from _records(history)
    images = folder / "volumes" if (folder / "studies.csv").is_file() and (folder / "volumes").is_dir() else folder
    studies = {split_ending(path.name, IMAGE_ENDINGS)[0] for path in images.iterdir() if _is_ct(path)}
    for study in sorted(history.studies()):
        if study not in studies:
            yield f"study {study}: has labels, but its CT is not in {images}: put it back under its name"
    for path in sorted((folder / "labels").glob("*/*")):
        if any(f".{word}-" in path.name for word in ("damaged", "set-aside")):
            yield f"{path}: was set aside, because no version held it or it was no label: look at it, and remove it"


def _records(history: History) -> Iterator[str]:
    lines: dict[tuple[str, str], list[Version]] = {}
    for study, line, record in history.records():
        try:
            version = read_version(record)
        except Unreadable as error:
            yield str(error)
        except Damaged:
            meaning = "the newest version that can be read counts" if record.name == "current.json" else "it is lost"
            yield f"{record}: is damaged: {meaning}, unless a backup has it"
        else:
            if record.name != "current.json":
                lines.setdefault((study, line), []).append(version)
    for (study, line), versions in lines.items():
        if not history.path(study, line, "current", ".json").is_file():
            yield f"study {study}, {line}: current.json is missing: the newest version that can be read counts"
        for version in versions:
            yield from _files(history, study, line, version)


def _files(history: History, study: str, line: str, version: Version) -> Iterator[str]:
    endings = (version.ext, ".json") if version.annotated else (version.ext,) if version.ext else ()
    missing = [ending for ending in endings if not history.path(study, line, version.revision, ending).is_file()]
    for ending in missing:
        yield f"study {study}, version {version.revision}: its file *{ending} is missing: it cannot be shown"
    if version.annotated and not missing:
        try:
            SparseAnnotation.read(history.path(study, line, version.revision, ".json"))
        except InputError as error:
            yield f"study {study}, version {version.revision}: {error}"


def _is_ct(path: Path) -> bool:
    name = path.name.lower()
    return name.endswith(IMAGE_ENDINGS) and not name.endswith(LABEL_ENDINGS[0]) and not name.startswith(".")
