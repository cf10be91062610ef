"""A request's body: read within its limits, then the parts that a handler sees (torchserve.md 1.2)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast
from urllib.parse import parse_qsl

from aiohttp import HttpVersion11, hdrs

from minserve.errors import BadRequest, BodyTooLarge, DeadlineExceeded, MinServeError
from minserve.frontend.errors import refusal
from minserve.frontend.multipart import parts_of
from minserve.wire.arena import SHARE_FROM
from minserve.wire.messages import Part

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from minserve.config.server import ServerOptions
    from minserve.frontend.admission import Share
    from minserve.frontend.connection import Connection
    from minserve.wire.arena import Arena
    from minserve.wire.messages import Buffer

MULTIPART = "multipart/form-data"
URL_ENCODED = "application/x-www-form-urlencoded"
MAX_FIELDS = 1000  # of a form; each costs far more memory than its bytes
MAX_NAMES = 65536  # characters of a form's names and types: they travel in a frame's meta, which is bounded


class BodyReader:
    """Reads bodies within the server's limits of size and time."""

    def __init__(self, options: ServerOptions) -> None:
        self._max_size = options.max_request_size
        self._timeout = options.body_timeout

    def take(self, request: web.Request, share: Share) -> bytes | None:
        """The body if it has arrived already, as small ones do, together with the head; else None.

        Raises:
            BodyTooLarge, Unavailable: it is over the limit, or the bytes in flight are.
        """
        content = request.content
        if not content.is_eof():
            return None
        self._check_size(content.total_bytes)
        share.grow(content.total_bytes)
        return content.read_nowait()

    async def read(self, request: web.Request, share: Share, deadline: float) -> bytes:
        """The body as it arrives.

        A length that the head declares is judged, and room made for it, before the body is read or asked for.

        Args:
            deadline: the request's, on the loop's clock. The server's time-out stands beside it.

        Raises:
            BodyTooLarge, Unavailable: it is over the limit, or the bytes in flight are.
            DeadlineExceeded: the request's own deadline came first.
            BadRequest: it stopped arriving (408), or it broke off.
        """
        chunks: list[bytes] = []
        await self._receive(request, share, deadline, chunks.append)
        return b"".join(chunks)

    async def read_into(self, arena: Arena, request: web.Request, share: Share, deadline: float) -> Buffer:
        """The same; a large body whose length is declared is put into the arena as it arrives, if that has room.

        Only for a body that is one part: of a form the bytes are wanted.
        """
        declared = request.content_length
        view = None
        if declared is not None and SHARE_FROM <= declared <= self._max_size:
            view = share.allocate(arena, 0, declared)
        if view is None:
            return await self.read(request, share, deadline)
        rest = view

        def put(chunk: bytes) -> None:
            nonlocal rest
            rest[: len(chunk)] = chunk
            rest = rest[len(chunk) :]

        await self._receive(request, share, deadline, put, view)
        return view

    async def _receive(
        self,
        request: web.Request,
        share: Share,
        deadline: float,
        take: Callable[[bytes], None],
        place: memoryview | None = None,
    ) -> None:
        declared = request.content_length
        if declared is not None:
            self._check_size(declared)
            share.grow(declared)
        await send_continue(request)
        limit = asyncio.get_running_loop().time() + self._timeout
        size, content = 0, request.content
        try:
            async with asyncio.timeout_at(min(limit, deadline)):
                while True:
                    if place is not None and size == content.total_bytes:  # all that the parser has had
                        await cast("Connection", request.protocol).receive(content, place[size:])
                    if not (chunk := await content.readany()):
                        break
                    size += len(chunk)
                    if declared is None:
                        self._check_size(size)
                        share.grow(len(chunk))
                    take(chunk)
        except TimeoutError:
            size = content.total_bytes
            have = f"{size} of its {declared} bytes" if declared is not None else f"{size} bytes and no end of it"
            error: MinServeError = (
                DeadlineExceeded(f"the request's deadline passed while its body was read; {have} had arrived")
                if deadline < limit
                else refusal(408, f"the body took longer than body_timeout ({self._timeout:g} s); {have} had arrived")
            )
            give_up_body(request, error)
            raise error from None

    def _check_size(self, size: int) -> None:
        if size > self._max_size:
            raise BodyTooLarge(f"the request body has {size} bytes, max_request_size allows {self._max_size}")


async def send_continue(request: web.Request) -> None:
    """Tells a client that waits for it to send its body. Only now: had it been refused, nothing need have been sent."""
    if request.version >= HttpVersion11 and not request.content.total_bytes and hdrs.EXPECT in request.headers:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # by which aiohttp sees whether an answer has begun


def give_up_body(request: web.BaseRequest, error: Exception) -> None:
    """No more of this body is read, and nothing that the connection brings after it: whoever waits for it gets the error."""
    request.protocol.close()  # after the answer, not before
    request.content.set_exception(error)
    request.content.feed_eof()  # or the answer would be followed by a wait for the rest


def split_body(body: Buffer, content_type: str) -> tuple[tuple[Part, ...], list[Buffer]]:
    """The parts of a body: one raw "body", or the fields of a form, of several with one name the last, as with TorchServe.

    Returns:
        The parts and their bytes, in the same order. An empty body is the one empty part "body".

    Raises:
        BadRequest: a form that does not parse.
    """
    plain = whole_type(content_type)
    if plain is not None:
        return (Part("body", plain, len(body)),), [body]
    kind = printable(content_type)
    form = bytes(body)  # which it is: of a form the bytes are read
    fields = _multipart(form, kind) if _bare(kind).lower() == MULTIPART else _url_encoded(form)
    size = sum(len(name) + len(kind) for name, (kind, _) in fields.items())
    if size > MAX_NAMES:
        raise BadRequest(f"bad form: names and types of {size} characters, at most {MAX_NAMES} are allowed")
    parts = tuple(Part(name, kind, len(value)) for name, (kind, value) in fields.items())
    return parts, [value for _, value in fields.values()]


def whole_type(content_type: str) -> str | None:
    """The type of a body that is one raw part; None: it is a form."""
    plain = _bare(printable(content_type))
    return None if plain.lower() in (MULTIPART, URL_ENCODED) else plain


def _bare(content_type: str) -> str:
    return content_type.partition(";")[0].strip()


def query_fields(query: str) -> dict[str, bytes]:
    """The fields of a query string, as bytes; of several with one name the last.

    Raises:
        BadRequest: there are too many.
    """
    try:
        return _fields(query.encode())
    except ValueError as error:
        raise BadRequest(f"bad query: {error}") from None


def printable(text: str) -> str:
    """Text from a client as text that can be encoded: aiohttp turns stray bytes into lone surrogates."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _url_encoded(body: bytes) -> dict[str, tuple[str, Buffer]]:
    # A last field without a `=` is none to TorchServe: JSON that `curl -d` has sent as a form gives no field at all.
    body = body if b"=" in body[body.rfind(b"&") + 1 :] else body[: body.rfind(b"&") + 1]
    try:
        return {name: ("", value) for name, value in _fields(body).items()}
    except ValueError as error:
        raise BadRequest(f"bad url-encoded body: {error}") from None


def _fields(encoded: bytes) -> dict[str, bytes]:
    text = encoded.decode("latin-1")  # a byte for a byte: what is not ASCII comes out as it went in
    pairs = parse_qsl(text, keep_blank_values=True, encoding="latin-1", max_num_fields=MAX_FIELDS)
    return {name.encode("latin-1").decode("utf-8", "replace"): value.encode("latin-1") for name, value in pairs}


def _multipart(body: bytes, content_type: str) -> dict[str, tuple[str, Buffer]]:
    fields: dict[str, tuple[str, Buffer]] = {}
    for count, part in enumerate(parts_of(body, content_type)):
        if count >= MAX_FIELDS:
            raise BadRequest(f"bad multipart body: more than {MAX_FIELDS} parts")
        # Of a plain field browsers and curl send no type, and TorchServe makes bytes of it.
        fields[printable(part.name)] = (printable(part.content_type), part.value)
    return fields
