"""How the server is reached: with which tokens, certificate and names; an unsafe door is refused.

Knows neither torch nor MONAI Label, so that a mistake is told at once.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from pe_app.common.errors import InputError
from pe_monailabel.server.access import TokenFile
from pe_monailabel.server.limits import UPLOAD_BYTES
from pe_monailabel.server.middleware import is_loopback


@dataclass(frozen=True)
class Door:
    """How the server is reached.

    Attributes:
        tokens: the token file; None asks for no tokens, which is for this machine only.
        certificate: with ``key``, makes it https.
        key: of the certificate, without a password.
        plain_http: whether other machines are served without https, because a proxy or a private network encrypts.
        allowed_hosts: names under which clients reach it, besides this machine's own and addresses.
        upload_bytes: the largest request with a file.
    """

    tokens: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    plain_http: bool = False
    allowed_hosts: tuple[str, ...] = ()
    upload_bytes: int = UPLOAD_BYTES

    def check(self, host: str) -> None:
        """Refuse a door that lets in whom it should not, where the server listens on ``host``.

        Raises:
            InputError: that says what is missing.
        """
        if self.tokens is None and not is_loopback(host):
            raise InputError(
                f"--host {host}: other machines are served with tokens only: make one with "
                "pe-app tokens add NAME --role ROLE, and name its file with --tokens"
            )
        if self.tokens is not None and not TokenFile(self.tokens).tokens():
            raise InputError(f"token file {self.tokens}: is empty: pe-app tokens add NAME --role ROLE --file FILE")
        if (self.certificate is None) != (self.key is None):
            raise InputError("--certificate and --key go together: name both files, or none")
        if self.certificate is None and not is_loopback(host) and not self.plain_http:
            raise InputError(
                f"--host {host}: tokens and images would cross the network readable by all: give --certificate "
                "and --key, or listen on 127.0.0.1 behind a proxy that speaks https, or give --plain-http where the "
                "network itself is encrypted"
            )
        if self.certificate is not None:
            try:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(self.certificate, self.key, password="")
            except (OSError, ValueError) as error:
                raise InputError(
                    f"--certificate {self.certificate}, --key {self.key}: cannot be used ({error}): both in PEM, the "
                    "key without a password"
                ) from error
