"""A request's body as the parts that a handler sees: one raw "body", or the fields of a form (torchserve.md 1.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

import aiohttp
from aiohttp import hdrs

from minserve.errors import BadRequest, BodyTooLarge
from minserve.wire.messages import Part

if TYPE_CHECKING:
    from aiohttp import web

MULTIPART = "multipart/form-data"
URL_ENCODED = "application/x-www-form-urlencoded"
MAX_NAME = 1024  # characters; names travel in a frame's meta, which is bounded
MAX_FIELDS = 1000  # of a form; each costs far more memory than its bytes


async def read_parts(request: web.Request) -> tuple[tuple[Part, ...], list[bytes]]:
    """Reads the body.

    Returns:
        The parts and their bytes, in the same order. An empty body is the one empty part "body".

    Raises:
        BadRequest: a form that does not parse.
        BodyTooLarge: it is over the server's limit. aiohttp raises its own for a raw body.
    """
    kind = printable(request.headers.get(hdrs.CONTENT_TYPE, ""))
    mime = kind.partition(";")[0].strip().lower()
    if mime in (MULTIPART, URL_ENCODED):
        fields = await (_multipart(request) if mime == MULTIPART else _url_encoded(request))
        return tuple(Part(name, mime, len(value)) for name, mime, value in fields), [value for _, _, value in fields]
    body = await request.read()
    return (Part("body", kind, len(body)),), [body]


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME:
        raise BadRequest(f"bad form: a field name of {len(name)} characters, at most {MAX_NAME} are allowed")


def printable(text: str) -> str:
    """Text from a client as text that can be encoded: aiohttp turns stray bytes into lone surrogates."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


async def _url_encoded(request: web.Request) -> list[tuple[str, str, bytes]]:
    text = (await request.read()).decode("latin-1")  # a byte for a byte: what is not ASCII comes out as it went in
    try:
        pairs = parse_qsl(text, keep_blank_values=True, encoding="latin-1", max_num_fields=MAX_FIELDS)
    except ValueError as error:
        raise BadRequest(f"bad url-encoded body: {error}") from None
    for name, _ in pairs:
        _check_name(name)
    fields = {name.encode("latin-1").decode("utf-8", "replace"): value.encode("latin-1") for name, value in pairs}
    return [(name, "", value) for name, value in fields.items()]


async def _multipart(request: web.Request) -> list[tuple[str, str, bytes]]:
    """The parts by name; of several with one name the last wins, as with TorchServe."""
    fields: dict[str, tuple[str, bytes]] = {}
    room = request.client_max_size
    try:
        reader = await request.multipart()
        while (part := await reader.next()) is not None:
            if not isinstance(part, aiohttp.BodyPartReader):
                raise BadRequest("bad multipart body: a multipart inside a multipart")
            if not part.name:
                raise BadRequest("bad multipart body: a part without a name")
            _check_name(part.name)
            if len(fields) >= MAX_FIELDS:
                raise BadRequest(f"bad multipart body: more than {MAX_FIELDS} parts")
            value = await _read_part(part, room)
            room -= len(value)
            # Of a plain field browsers and curl send no type, and TorchServe makes bytes of it.
            fields[printable(part.name)] = (printable(part.headers.get(hdrs.CONTENT_TYPE, "")), value)
    except (ValueError, AssertionError, aiohttp.ClientError, aiohttp.http.HttpProcessingError) as error:
        raise BadRequest(f"bad multipart body: {error}") from None
    return [(name, kind, value) for name, (kind, value) in fields.items()]


async def _read_part(part: aiohttp.BodyPartReader, room: int) -> bytes:
    value = bytearray()
    while chunk := await part.read_chunk():
        value += chunk
        if len(value) > room:
            raise BodyTooLarge(f"the request body is over the limit (max_request_size) at part {part.name}")
    return bytes(value)
