"""Keyed pseudonyms: the same patient is the same one again, and nobody without the key can tell who."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from dataclasses import replace
from pathlib import Path

from pe_app.common.errors import InputError
from pe_app.ct.source_series import SourceSeries, unlike_ct

MIN_KEY_BYTES = 16
KEPT_TAGS = ("00080060", "00080070", "00081090", "00180015", "00180060", "00181210")
"""Modality, manufacturer, model, body part, KVP and kernel tell of the scan and not of the patient."""


class Pseudonyms:
    """HMAC-SHA256 of identifiers under one key: deterministic, and not to be guessed by trying patient numbers.

    Args:
        key: at least 16 bytes; whoever has it can find out who is who.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def code(self, kind: str, value: str) -> str:
        """20 hexadecimal digits (80 bits) that stand for an identifier; empty for an empty one."""
        return self._digest(kind, value).hex()[:20] if value else ""

    def uid(self, value: str) -> str:
        """A DICOM UID (below 2.25, as made of a UUID) that stands for another."""
        return f"2.25.{int.from_bytes(self._digest('uid', value)[:16], 'big')}" if value else ""

    def date(self, patient: str, day: str) -> str:
        """What stands for a day of one patient; of two patients nobody learns that they came on the same day."""
        return self.code("date", f"{patient} {day}") if patient and day else ""

    def source(self, source: SourceSeries) -> SourceSeries:
        """A source series without identifiers, names, dates and free text; what the quality gate needs stays."""
        facts = source.facts
        told = unlike_ct("", facts.description)  # its words are found again by unlike_ct
        return replace(
            source,
            patient_id=self.code("patient", source.patient_id),
            study_uid=self.uid(source.study_uid),
            series_uid=self.uid(source.series_uid),
            frame_of_reference_uid=self.uid(source.frame_of_reference_uid),
            instances=(),
            header={tag: value for tag, value in source.header.items() if tag in KEPT_TAGS},
            root="",
            facts=replace(facts, description=told),
            pseudonyms=True,
        )

    def _digest(self, kind: str, value: str) -> bytes:
        return hmac.digest(self._key, f"{kind}\0{value}".encode(), hashlib.sha256)


def read_key(path: Path, studies: Path, *, make: bool = True) -> bytes:
    """The key of a file; a new one is made where there is none, if ``make``.

    Raises:
        InputError: if the file lies in the folder of studies, is too short, or cannot be read or written.
    """
    if path.resolve().is_relative_to(studies.resolve()):
        raise InputError(f"{path}: the key must not lie in {studies}, it would be given away with the studies")
    try:
        if make and not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
                file.flush()
                os.fsync(file.fileno())
        key = path.read_bytes().strip()
    except OSError as error:
        raise InputError(f"{path}: the key cannot be read or made: {error.strerror}") from error
    if len(key) < MIN_KEY_BYTES:
        raise InputError(f"{path}: a key has at least {MIN_KEY_BYTES} bytes, this one has {len(key)}")
    return key


def identities_folder(key_file: Path) -> Path:
    """Where the true source series of pseudonymous studies lie, beside the key; for its owner's eyes only."""
    folder = key_file.with_name(f"{key_file.name}.sources")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
