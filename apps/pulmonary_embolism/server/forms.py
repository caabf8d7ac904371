"""Forms of few parts: each file of a form takes up to 1 MiB of memory before it goes to the disk, however small."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import Response

FILES = 1
FIELDS = 8
"""What any of our routes takes; a form with more is refused before it is read to its end."""


class BoundedRequest(Request):
    """A request whose form has at most ``FILES`` files and ``FIELDS`` fields."""

    async def _get_form(
        self, *, max_files: float = FILES, max_fields: float = FIELDS, max_part_size: int = 1 << 20
    ) -> FormData:
        return await super()._get_form(
            max_files=min(max_files, FILES), max_fields=min(max_fields, FIELDS), max_part_size=max_part_size
        )


class BoundedRoute(APIRoute):
    """A route that reads its form so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """How FastAPI answers it."""
        answer = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await answer(BoundedRequest(request.scope, request.receive))

        return bounded
