"""A copy of all that readers said and trainings made, taken while the server runs, and the way back.

    BACKUP.tar    backup.json (what is in it, with SHA-256), and the files by their places in the folder

CTs are not in it, nor what is made again from them: detections, prepared slabs, temporary files. Versions of labels and
models are never changed, so only the pointers to what counts are read while nobody saves; the rest is copied after it.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pe_app
from pe_app.common.errors import InputError
from pe_app.common.files import replacing
from pe_monailabel.store.history import Damaged, History, Unreadable, read_version
from pe_monailabel.store.studies import StudyStore

SCHEMA = "pe-backup/1"

POINTERS = (".pe/history/*/*/current.json", ".pe/models/served.json", "datastore_v2.json")
"""What changes with a save: read while nobody saves."""

KEPT = (
    *(".pe/history/*/*/*", ".pe/models/*.safetensors", ".pe/models/*.json", ".pe/encoder.safetensors", "studies.csv"),
    *("annotations/*", ".pe/fetches/*.json", ".pe/archive.json"),
)


@dataclass(frozen=True)
class Restored:
    """What ``restore`` did.

    Attributes:
        files: how many were missing and were brought back.
        kept: studies and lines whose present version is newer than the backup's, or another; it still counts.
    """

    files: int
    kept: tuple[str, ...]


def back_up(store: StudyStore, target: Path) -> int:
    """Write a backup; how many files it holds.

    Raises:
        InputError: if there is a file of that name.
    """
    if target.exists():
        raise InputError(f"{target}: is there already: choose another name")
    with store.lock:
        pointers = {path: path.read_bytes() for pattern in POINTERS for path in sorted(store.root.glob(pattern))}
        found = {path for pattern in KEPT for path in store.root.glob(pattern)}
        files = sorted(path for path in found - pointers.keys() if path.is_file() and not path.name.startswith("."))
    with replacing(target) as temporary, tarfile.open(temporary, "w") as tar:
        sums = {_name(store, path): hashlib.sha256(content).hexdigest() for path, content in pointers.items()}
        for path, content in pointers.items():
            _add(tar, _name(store, path), content)
        for path in files:
            with path.open("rb") as file:
                sums[_name(store, path)] = hashlib.file_digest(file, "sha256").hexdigest()
            tar.add(path, _name(store, path), recursive=False)
        made = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = {"schema": SCHEMA, "made": made, "program": pe_app.__version__, "files": sums}
        _add(tar, "backup.json", json.dumps(manifest, indent=1).encode())
    return len(sums)


def restore(backup: Path, folder: Path) -> Restored:
    """Bring back what is missing or damaged in a folder that no server serves; nothing that is newer is replaced.

    Raises:
        InputError: if the backup is damaged or no backup; then nothing is changed.
    """
    try:
        with tarfile.open(backup) as tar:
            manifest = _checked(tar, backup)
            history = History(folder / ".pe" / "history")
            count, kept = 0, []
            for name in manifest:
                target = folder / name
                if target.name == "current.json" and target.parent.parent.parent.name == "history":
                    continue
                if not target.is_file() or (target.suffix == ".version" and _is_damaged(target)):
                    count += _bring_back(tar, name, target)
            for name in manifest:  # the pointers last, when what they point to is there
                target = folder / name
                if target.name == "current.json" and target.parent.parent.parent.name == "history":
                    if not target.is_file() or _is_damaged(target):
                        count += _bring_back(tar, name, target)
                        continue
                    study, line = target.parent.parent.name, target.parent.name
                    wanted = json.loads(_content(tar, name))["revision"]
                    now = history.current(study, line)
                    if now is not None and now.revision != wanted:
                        kept.append(f"study {study}, {line}: {now.revision} counts, {wanted} in the backup")
    except (tarfile.TarError, OSError, KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{backup}: cannot be read as a backup ({error}): choose another one") from error
    return Restored(count, tuple(kept))


def _checked(tar: tarfile.TarFile, backup: Path) -> Mapping[str, str]:
    """The files of a backup whose content is what its list tells."""
    manifest = json.loads(_content(tar, "backup.json"))
    if manifest.get("schema") != SCHEMA:
        raise InputError(f"{backup}: is of schema {manifest.get('schema')!r}, not {SCHEMA}")
    files: dict[str, str] = manifest["files"]
    for name, sha256 in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
            raise InputError(f"{backup}: names a file outside the folder, {name!a}: it was not made by pe-app backup")
        member = tar.extractfile(name)
        if member is None or hashlib.file_digest(member, "sha256").hexdigest() != sha256:  # type: ignore[arg-type]
            raise InputError(f"{backup}: {name} in it is damaged: choose another backup")
    return files


def _bring_back(tar: tarfile.TarFile, name: str, target: Path) -> int:
    member = tar.extractfile(name)
    if member is None:
        raise KeyError(name)
    with replacing(target) as temporary, temporary.open("wb") as file:
        shutil.copyfileobj(member, file)
    return 1


def _content(tar: tarfile.TarFile, name: str) -> bytes:
    member = tar.extractfile(name)
    if member is None:
        raise KeyError(name)
    return member.read()


def _is_damaged(record: Path) -> bool:
    try:
        read_version(record)
    except Damaged:
        return True
    except Unreadable:
        return False
    return False


def _name(store: StudyStore, path: Path) -> str:
    return path.relative_to(store.root).as_posix()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
