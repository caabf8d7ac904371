"""Results to an archive by STOW-RS: what it holds already is not sent again, what it refuses is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pe_app.common.errors import InputError
from pe_app.common.progress import ProgressCallback, silent
from pe_app.ct.dicom_files import read_header
from pe_app.pacs.dicomweb import Archive, Unavailable

ATTEMPTS = 2
"""For objects that an archive refuses while it takes others; a failing connection is tried again by the client."""


@dataclass(frozen=True)
class Sent:
    """What became of the files: stored now, or in the archive from an earlier send."""

    stored: tuple[Path, ...]
    known: tuple[Path, ...]


def send(archive: Archive, files: Sequence[Path], progress: ProgressCallback = silent) -> Sent:
    """Send result files of one study to an archive.

    The archive itself remembers what was sent: the same result has the same UIDs, so that a repeated send, also after
    one that failed half-way, adds what is missing and nothing twice.

    Raises:
        InputError: if the archive cannot be used (``Unavailable``: later it may), or refuses an object; says which.
    """
    uids, study = {}, ""
    for path in files:
        header = read_header(path, ["SOPInstanceUID", "StudyInstanceUID"], force=False)
        uids[path], study = str(header.SOPInstanceUID), str(header.StudyInstanceUID)
    held = _held(archive, study) if files else frozenset()
    known = [path for path in files if uids[path] in held]
    open_files = [path for path in files if path not in known]
    refused: dict[str, str] = {}
    for _ in range(ATTEMPTS):
        if open_files:
            outcome = archive.store(open_files, progress)
            refused = dict(outcome.failed)
            open_files = [path for path in open_files if uids[path] in refused]
    if open_files:
        reasons = "; ".join(f"{path.name}: {refused[uids[path]]}" for path in open_files)
        raise InputError(
            f"archive {archive.access.url}: did not take {len(open_files)} of {len(files)} objects ({reasons}): "
            "the same command sends what is missing"
        )
    return Sent(tuple(path for path in files if path not in known), tuple(known))


def _held(archive: Archive, study: str) -> frozenset[str]:
    """SOP Instance UIDs in the archive; none where it does not know the study, which some answer with 404."""
    try:
        return archive.instances(study)
    except Unavailable:
        raise
    except InputError:  # a wrong password is refused again by the store that follows
        return frozenset()
