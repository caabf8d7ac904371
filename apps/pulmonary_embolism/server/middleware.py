"""Every request passes here first, and every answer last.

request -> which route, which rule -> from where -> whose token, which role -> how large -> the app
answer <- a line in the audit log, headers <- the app
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pe_monailabel.server.access import Caller, Role, TokenFile
from pe_monailabel.server.audit import Audit
from pe_monailabel.server.limits import (
    FORM_BYTES,
    RETRY_SECONDS,
    UPLOAD_BYTES,
    UPLOADS_AT_ONCE,
    UPLOADS_OF_ONE,
    limited,
)
from pe_monailabel.server.permissions import LONGEST, Asked, Rule, asked
from pe_monailabel.server.possession import Possession
from pe_monailabel.server.temporary import TemporaryFolder

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
"""With every answer: no page of it runs, is framed or embedded, and no patient's data stay in a cache."""


class Guard:
    """The app behind its door.

    Attributes:
        tokens: who may come in; None admits everybody on this machine and nobody else.
        hosts: names besides this machine's under which the server is reached; None for no others, not even addresses.
        upload_bytes: the largest request with a file.
        audit: where it is written down.
        possession: of the folder, once it is this server's.
        temporary: where uploads are kept while they are checked.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._routes = routes
        self._uploads: Counter[str] = Counter()
        self.tokens: TokenFile | None = None
        self.hosts: frozenset[str] | None = None
        self.upload_bytes = UPLOAD_BYTES
        self.audit: Audit | None = None
        self.temporary: TemporaryFolder | None = None
        self.possession: Possession | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":  # there are none here
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = asked(scope, self._routes)
        state = scope.setdefault("state", {})
        status: int | None = None

        async def sealed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = list(message.get("headers", ()))
                own = {name for name, _ in given}
                message["headers"] = [*given, *(header for header in HEADERS if header[0] not in own)]
                await self._write_down(request, scope, status)
            await send(message)

        try:
            self._check_origin(scope)
            state["tokens"] = self.tokens
            state["caller"] = self._caller(scope, request.rule)
            body = limited(scope, receive, self.upload_bytes if request.rule.upload else FORM_BYTES)
            if request.rule.upload:
                self._check_uploads(state["caller"].name)
        except HTTPException as refusal:
            refused = JSONResponse({"detail": refusal.detail}, refusal.status_code, refusal.headers)
            await refused(scope, receive, sealed)
            return
        uploader = state["caller"].name
        if request.rule.upload:
            self._uploads[uploader] += 1
        if self.temporary is not None:
            self.temporary.ensure()
        try:
            await self._app(scope, body, sealed)
        finally:
            if request.rule.upload:
                self._uploads[uploader] -= 1
            if status is None:  # the connection broke, or the server stops
                await self._write_down(request, scope, None)

    def _check_uploads(self, reader: str) -> None:
        """Refuse more uploads at once than the server takes, or than one reader may send of them."""
        too_many = "too many uploads at once"
        if self._uploads.total() >= UPLOADS_AT_ONCE:
            raise HTTPException(429, f"{too_many}: try again", {"Retry-After": RETRY_SECONDS})
        if reader and self._uploads[reader] >= UPLOADS_OF_ONE:
            raise HTTPException(429, f"{too_many} from {reader}: try again", {"Retry-After": RETRY_SECONDS})

    def _check_origin(self, scope: Scope) -> None:
        """Refuse other machines where nobody proves anything, names not ours (DNS rebinding), and foreign web pages."""
        client = scope.get("client")
        headers = Headers(scope=scope)
        others = [name.strip() for name in headers.get("x-forwarded-for", "").split(",") if name.strip()]
        peers = [client[0]] if client is not None else []
        if self.tokens is None and not all(is_loopback(peer) for peer in (*peers, *others)):
            raise HTTPException(
                403,
                "without tokens this server answers programs on its own machine only: start it with --tokens, or "
                "reach it through SSH",
            )
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(_host_of(f"//{hosts[0]}")):
            raise HTTPException(
                403,
                "the request names another host than this server: use 127.0.0.1"
                + ("" if self.hosts is None else ", its address, or a name given to pe-app serve with --allow-host"),
            )
        spoken = scope.get("scheme", "http")
        schemes = {spoken, headers.get("x-forwarded-proto", spoken)}  # a proxy may speak https for this server
        own = {f"{scheme}://{hosts[0]}".lower() for scheme in schemes}
        foreign = any(value.lower() not in own for value in headers.getlist("origin"))
        if foreign or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise HTTPException(403, "requests from web pages of other servers are refused")

    def _is_ours(self, host: str) -> bool:
        """Loopback, an allowed name, or any address: a browser that was sent to an address knows its own page by it."""
        return is_loopback(host) or (self.hosts is not None and (host in self.hosts or _is_address(host)))

    def _caller(self, scope: Scope, rule: Rule) -> Caller:
        """Who asks, if that is enough for the rule."""
        if self.tokens is None:
            return Caller()
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        caller = self.tokens.find(token.strip()) if scheme.lower() == "bearer" else None
        if rule.role is None:
            return caller or Caller("", Role.READER)
        if caller is None:
            problem = "this token is not known here, or no longer" if token else "this server asks for a token"
            raise HTTPException(
                401,
                f"{problem}: an administrator issues one with pe-app tokens add NAME --role ROLE",
                {"WWW-Authenticate": 'Bearer realm="pe-app"' + (', error="invalid_token"' if token else "")},
            )
        scope["state"]["caller"] = caller  # a refusal is written down with the name
        if not caller.role.includes(rule.role):
            raise HTTPException(
                403, f"{caller.name} has the role {caller.role}, and this asks for the role {rule.role}"
            )
        return caller

    async def _write_down(self, request: Asked, scope: Scope, status: int | None) -> None:
        refused = status in (401, 403)
        if self.audit is None or not (refused or request.rule.does):
            return
        state = scope["state"]
        caller = state.get("caller")
        forwarded = Headers(scope=scope).get("x-forwarded-for", "")
        entry = {
            "who": caller.name if caller and caller.name else None,
            "from": scope["client"][0] if scope.get("client") else None,
            **({"forwarded_for": forwarded[:LONGEST]} if forwarded else {}),  # as the request claims
            "did": "refused" if refused else request.rule.does,
            "request": request.request,
            **request.about,
            "status": status,
        }
        if state.get("study"):  # the one that the server chose
            entry["study"] = state["study"]
        await self.audit.write(entry, refused=refused)


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _host_of(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""
