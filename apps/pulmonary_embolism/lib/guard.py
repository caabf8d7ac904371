"""Who may talk to the server: programs on this machine, and no web page that a browser on it shows."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class LoopbackOnly:
    """Refuses requests from other machines, for other host names (DNS rebinding), and from foreign web pages."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection."""
        refusal = _refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await JSONResponse({"detail": refusal}, status_code=403)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refusal(scope: Scope) -> str | None:
    client = scope.get("client")
    if client is not None and not is_loopback(client[0]):
        return "this server answers programs on its own machine only: reach it through an SSH tunnel"
    headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1 or not is_loopback(_host_of(f"//{hosts[0]}")):
        return "the request names another host than this machine: use 127.0.0.1"
    own = f"{scope.get('scheme', 'http')}://{hosts[0]}".lower()
    if any(value.lower() != own for name, value in headers if name == b"origin"):
        return "requests from web pages of other servers are refused"
    return None


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
