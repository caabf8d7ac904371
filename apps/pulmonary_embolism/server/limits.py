"""How much one request may take: of the network, of the memory, of the processor.

What the header of an image promises is checked in ``pe_app.ct.volume_io``, before a voxel is decompressed.
"""

from __future__ import annotations

import asyncio
import threading
import time

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope

UPLOAD_BYTES = 1 << 30
"""Of a request with a file; 512 x 512 x 2000 voxels of a CT take that much without compression."""

FORM_BYTES = 4 << 20
"""Of any other request: settings, names, what is said of a study."""

UPLOADS_AT_ONCE = 16
"""More are sent away: each holds a thread while its file is read."""

UPLOADS_OF_ONE = 4
"""Of those, by one reader: whoever uploads slowly or never ends takes no place from the others."""

HEADER_SECONDS = 20.0
"""In which a request line and its headers must come."""

STALL_SECONDS = 30.0
"""A body of which nothing comes for that long is given up."""

SLOWEST = 16 << 10
"""Bytes per second that a body must come with on average, once ``STALL_SECONDS`` have passed."""

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
    """``receive`` that counts a body, declared or in chunks, and ends at ``limit`` bytes or where it comes too slowly.

    Raises:
        HTTPException: 413, at once if the request declares that it is larger, else while it is read; 408 if the body
            stalls.
    """
    too_large = HTTPException(413, f"the request is larger than {limit >> 20} MiB, which is the limit here")
    declared = Headers(scope=scope).get("content-length", "0")
    if not declared.isdecimal() or int(declared) > limit:
        raise too_large
    received = 0
    began = time.monotonic()
    complete = False
    too_slow = HTTPException(
        408, f"the request's body came too slowly (at least {SLOWEST >> 10} KiB per second are expected): send it again"
    )

    async def counted() -> Message:
        nonlocal received, complete
        if complete:  # whoever waits now, waits for the client to leave
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), STALL_SECONDS)
        except TimeoutError:
            raise too_slow from None  # an OSError as its cause would be taken for the disk's
        received += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if received > limit:
            raise too_large
        seconds = time.monotonic() - began
        if not complete and seconds > STALL_SECONDS and received < SLOWEST * (seconds - STALL_SECONDS):
            raise too_slow
        return message

    return counted
