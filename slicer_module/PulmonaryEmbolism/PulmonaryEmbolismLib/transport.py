"""How a request is made, and its failure in one sentence for the reader. No Slicer, no Qt."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any, Callable, Optional
from urllib.parse import urlsplit

import requests

Report = Callable[..., None]
"""``report(text, done, total)``; raises to stop the work."""

CONNECT_SECONDS = 5.0
READ_SECONDS = 60.0


class ServerError(Exception):
    """A request that did not succeed, as a sentence for the reader. ``status`` is 0 when no answer came."""

    def __init__(self, sentence: str, status: int = 0) -> None:
        super().__init__(sentence)
        self.status = status

    @property
    def worth_retrying(self) -> bool:
        """Whether the same request may succeed later without anybody changing it."""
        return self.status == 0 or self.status in (401, 408, 429) or self.status >= 500


class Conflict(ServerError):
    """Another version was saved in between (409): the server's ``revision`` and ``annotation``."""

    def __init__(self, sentence: str, revision: Optional[str], annotation: Optional[dict]) -> None:
        super().__init__(sentence, 409)
        self.revision = revision
        self.annotation = annotation


class LabelConflict(ServerError):
    """Another reader labelled the study in between (409): what, who, and the version that counts."""

    def __init__(self, sentence: str, label: str, reader: str, revision: Optional[str]) -> None:
        super().__init__(sentence, 409)
        self.label = label
        self.reader = reader
        self.revision = revision


def normalised_address(text: str) -> str:
    """The address as typed, with ``http://`` where no scheme was given and nothing after host and port.

    Raises:
        ServerError: if there is no host in it, or the port is no number.
    """
    text = text.strip()
    if not text:
        raise ServerError("Enter the server's address, for example http://127.0.0.1:8000.")
    if "://" not in text:
        text = "http://" + text
    parts = urlsplit(text)
    try:
        port = parts.port
    except ValueError:
        raise ServerError(f"The port in {text} is not a number between 1 and 65535.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ServerError(f"{text} is not an address of a server; it looks like http://127.0.0.1:8000.")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{port}" if port else "")


class Transport:
    """Requests to one address with one token. Holds no connection and no state, so any thread may use it."""

    def __init__(self, address: str, token: str) -> None:
        self.address = normalised_address(address)
        self.token = token.strip()
        local = urlsplit(self.address).hostname in ("127.0.0.1", "localhost", "::1")
        self._proxies = {"http": None, "https": None} if local else None  # a hospital's proxy cannot reach loopback

    def json(self, method: str, path: str, **arguments: Any) -> dict:
        """The answer as an object of JSON."""
        response = self.request(method, path, **arguments)
        try:
            data = response.json()
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise ServerError(f"The server's answer to {path} cannot be understood; is it of the same version?", 500)
        return data

    def request(self, method: str, path: str, foreign: bool = False, **arguments: Any) -> requests.Response:
        """The answer, if it is one of success; ``foreign`` where another program may answer."""
        arguments.setdefault("timeout", (CONNECT_SECONDS, READ_SECONDS))
        try:
            response = requests.request(
                method,
                self.address + path,
                auth=self._authorise,
                proxies=self._proxies,
                allow_redirects=False,
                **arguments,
            )
        except requests.RequestException as error:
            raise ServerError(self._why(error, foreign)) from error
        if response.status_code >= 300:
            raise self._refusal(response, foreign)
        return response

    def _authorise(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """An auth of our own even without a token: it keeps requests from sending what a .netrc file holds."""
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request

    def _why(self, error: requests.RequestException, foreign: bool = False) -> str:
        """A failed connection as a sentence: what is wrong and what to try."""
        parts = urlsplit(self.address)
        where = parts.netloc
        text = str(error).lower()
        if isinstance(error, requests.exceptions.SSLError):
            if "certificate" in text:
                return (
                    f"The certificate of {where} could not be verified; ask your administrator for the certificate of "
                    "your hospital and name its file in the environment variable REQUESTS_CA_BUNDLE."
                )
            return f"The server at {where} does not speak https; try http://{where}."
        if isinstance(error, requests.exceptions.ConnectTimeout):
            return f"{where} does not answer; check the address, the network and the firewall."
        if isinstance(error, requests.exceptions.ReadTimeout):
            return f"The server at {where} accepted the request but did not answer in time; it may be overloaded."
        if any(word in text for word in ("name or service", "nameresolution", "getaddrinfo", "name resolution")):
            return f"No computer is known by the name {parts.hostname}; check the spelling of the address."
        if "refused" in text:
            return f"Nothing answers at {where}; is the server started (pe-app serve) and is the port right?"
        if any(word in text for word in ("reset", "aborted", "remotedisconnected", "badstatus", "incomplete")):
            hint = f"; if it uses encryption, try https://{where}" if foreign and parts.scheme == "http" else ""
            return f"The connection to {where} was closed before an answer came{hint}."
        return f"The server at {where} cannot be reached ({error.__class__.__name__})."

    def _refusal(self, response: requests.Response, foreign: bool) -> ServerError:
        """An answer of 300 and more as a sentence; the server's own where it gave one."""
        status = response.status_code
        try:
            data = response.json()
        except ValueError:
            data = {}
        data = data if isinstance(data, dict) else {}
        detail = data.get("detail")
        detail = detail if isinstance(detail, str) else ""
        if status < 400:
            target = response.headers.get("Location", "another address")
            return ServerError(f"The server at {self.address} redirects to {target}; enter that address.", status)
        if status == 400 and "https port" in response.text[:2000].lower():
            return ServerError(f"The server speaks https only; try {self.address.replace('http:', 'https:')}.", status)
        if status == 401:
            problem = "does not accept this token" if self.token else "asks for a token"
            return ServerError(f"The server {problem}; your administrator issues one with: pe-app tokens add NAME", 401)
        label = data.get("label")
        if status == 409 and isinstance(label, dict):
            found = (str(label.get(name) or "") for name in ("pe_label", "label_reader"))
            return LabelConflict(detail, *found, label.get("label_revision"))
        if status == 409 and ("revision" in data or "annotation" in data):
            return Conflict(detail or "A newer version is on the server.", data.get("revision"), data.get("annotation"))
        if (foreign and not detail) or detail == "Not Found":
            program = "another program" if foreign else "a server of another version"
            return ServerError(
                f"At {self.address} answers {program}, not this module's server; check the port.", status
            )
        return ServerError(detail or f"The server failed with status {status} ({response.reason}).", status)

    def download(self, response: requests.Response, path: Path, report: Report, text: str) -> Path:
        """The body as a file that appears when it is complete."""
        total = int(response.headers.get("Content-Length") or 0)
        temporary = path.with_name(f"{uuid.uuid4().hex}.part")
        done = 0
        try:
            with open(temporary, "wb") as out:
                for chunk in response.iter_content(1 << 20):
                    out.write(chunk)
                    done += len(chunk)
                    report(f"{text}, {done / 1e6:.0f} MB", done, total)
            if total and done != total and "Content-Encoding" not in response.headers:
                raise ServerError(f"The connection broke after {done} of {total} bytes; try again.")
            os.replace(temporary, path)
        except requests.RequestException as error:
            raise ServerError(self._why(error)) from error
        finally:
            response.close()
            if temporary.exists():
                temporary.unlink()
        return path
