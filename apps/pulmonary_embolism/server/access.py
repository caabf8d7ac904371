"""Who may come in: tokens, one a reader, kept hashed in a file of their own; and what each role may do.

A token is 32 random bytes, so nobody guesses it and a plain SHA-256 of it gives nothing away: slow hashes and salts are
for passwords, which people choose. Whoever may write the token file may come in, so nobody but its owner may.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from filelock import FileLock

from pe_app.common.errors import InputError
from pe_app.common.files import replacing

logger = logging.getLogger(__name__)

SCHEMA = "pe-tokens/1"

_NAME = re.compile(r'(?! )[^|"\\]{1,64}(?<! )')
"""As an annotation takes it: the name goes with every slice that its reader reviews."""


class Role(StrEnum):
    """What a caller may do; each role may also do what those before it may."""

    READER = "reader"
    """Look at studies and labels, run detections."""
    ANNOTATOR = "annotator"
    """Save labels, study labels and CTs, hold studies."""
    ADMIN = "admin"
    """Train, choose models, restore and remove labels, run batches."""

    def includes(self, needed: Role) -> bool:
        """Whether this role may do what another one may."""
        return tuple(Role).index(self) >= tuple(Role).index(needed)


@dataclass(frozen=True)
class Caller:
    """Who makes a request; ``name`` is "" where no token is asked for and nobody proved to be anyone."""

    name: str = ""
    role: Role = Role.ADMIN


@dataclass(frozen=True)
class Token:
    """A token as the file keeps it: ``sha256`` of the words that only its reader has."""

    name: str
    role: Role
    sha256: str
    created: str


class TokenFile:
    """The tokens of a server. A change counts from the next request on; a damaged or missing file admits nobody."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: tuple[tuple[int, ...], tuple[Token, ...]] = ((), ())

    def tokens(self) -> tuple[Token, ...]:
        """All tokens, in the order in which they were added.

        Raises:
            InputError: if the file is not there, is damaged, or somebody else may write it.
        """
        try:
            status = self.path.stat()
            if os.name == "posix" and status.st_mode & 0o022:
                raise InputError(f"token file {self.path}: others may write it: chmod 600 {self.path}")
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if self._read[0] != stamp:
                content = json.loads(self.path.read_text(encoding="utf-8"))
                if content["schema"] != SCHEMA:
                    raise ValueError(f"schema {content['schema']!r} is not {SCHEMA}")
                found = tuple(Token(**{**entry, "role": Role(entry["role"])}) for entry in content["tokens"])
                self._read = (stamp, found)
        except (OSError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, InputError):
                raise
            reason = error.strerror if isinstance(error, OSError) else error
            message = f"token file {self.path}: cannot be read ({reason}): pe-app tokens add makes one"
            raise InputError(message) from error
        return self._read[1]

    def find(self, token: str) -> Caller | None:
        """Who has a token; compared with every entry in constant time."""
        digest = _sha256(token).encode()
        try:
            known = self.tokens()
        except InputError:
            logger.exception("nobody is admitted")
            return None
        found = [entry for entry in known if hmac.compare_digest(entry.sha256.encode(), digest)]
        return Caller(found[0].name, found[0].role) if found else None

    def add(self, name: str, role: str) -> str:
        """Issue a token; it is answered once and kept nowhere.

        Raises:
            InputError: if there is no such role, or the name cannot be used or has a token.
        """
        if role not in list(Role):
            raise InputError(f"{role!a} is no role: the roles are {', '.join(Role)}")
        if not _NAME.fullmatch(name) or not name.isprintable():
            raise InputError(f'{name!a} cannot name a reader: at most 64 printable characters without | " and \\')
        token = secrets.token_urlsafe(32)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        entry = Token(name, Role(role), _sha256(token), created)
        with self._changing() as known:
            if any(other.name == name for other in known):
                raise InputError(f"{name} has a token already: revoke it first (pe-app tokens revoke {name})")
            self._write((*known, entry))
        return token

    def revoke(self, name: str) -> None:
        """Let a token count no longer.

        Raises:
            InputError: if nobody has that name.
        """
        with self._changing() as known:
            left = tuple(entry for entry in known if entry.name != name)
            if len(left) == len(known):
                raise InputError(f"nobody named {name} has a token in {self.path}")
            self._write(left)

    @contextmanager
    def _changing(self) -> Iterator[tuple[Token, ...]]:
        """The tokens there are now, while nobody else changes them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock"), mode=0o600):
            yield self.tokens() if self.path.exists() else ()

    def _write(self, tokens: tuple[Token, ...]) -> None:
        content = {"schema": SCHEMA, "tokens": [asdict(entry) for entry in tokens]}
        with replacing(self.path) as temporary:
            temporary.touch(mode=0o600, exist_ok=False)
            temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
