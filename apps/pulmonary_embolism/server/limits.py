"""How much one request may take: of the network, of the memory, of the processor.

What the header of an image promises is checked in ``pe_app.ct.volume_io``, before a voxel is decompressed.
"""

from __future__ import annotations

import threading

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope

UPLOAD_BYTES = 1 << 30
"""Of a request with a file; 512 x 512 x 2000 voxels of a CT take that much without compression."""

FORM_BYTES = 4 << 20
"""Of any other request: settings, names, what is said of a study."""

UPLOADS_AT_ONCE = 16
"""More are sent away: each holds a thread while its file is read."""

READING = threading.Semaphore(2)
"""Held while an uploaded image is decompressed and checked: memory is taken by so many at once."""

DETECTION_SECONDS = 600.0
"""Of one detection, from its turn on; it is stopped at its next slab."""

RETRY_SECONDS = "10"
"""What a client is told to wait that is sent away."""


class Busy(Exception):  # noqa: N818 - a state, not a fault
    """Too many ask for the same at once."""


class TooLong(Exception):  # noqa: N818 - a state, not a fault
    """A detection took longer than it may."""


def limited(scope: Scope, receive: Receive, limit: int) -> Receive:
    """``receive`` that counts the body, declared or in chunks, and stops at ``limit`` bytes.

    Raises:
        HTTPException: 413, at once if the request says that it is larger, else while it is read.
    """
    too_large = HTTPException(413, f"the request is larger than {limit >> 20} MiB, which is the limit here")
    declared = Headers(scope=scope).get("content-length", "0")
    if not declared.isdecimal() or int(declared) > limit:
        raise too_large
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise too_large
        return message

    return counted
