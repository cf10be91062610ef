"""A multipart/form-data body, taken apart in memory (RFC 7578, RFC 2046 section 5.1).

aiohttp's reader works on a stream, a few kilobytes at a time. Here the whole body is there, within its limit, and the values
stay where they are.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import hdrs
from aiohttp.helpers import parse_mimetype
from aiohttp.http import HeadersParser
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.multipart import content_disposition_filename, parse_content_disposition

from minserve.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_BOUNDARY = 70  # characters, by RFC 2046
MAX_PADDING = 100  # white space behind a boundary
MAX_HEAD = 8192  # bytes of one part's headers


@dataclass(frozen=True, slots=True)
class FormPart:
    """One part: the field's name, the part's own content type or "", and its bytes, a view of the body."""

    name: str
    content_type: str
    value: memoryview


def parts_of(body: bytes, content_type: str) -> Iterator[FormPart]:
    """The parts of a form, in their order.

    Raises:
        BadRequest: the body is no form. The message says what is wrong with it.
    """
    delimiter = b"--" + _boundary(content_type)
    view = memoryview(body)
    at = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter) + 2
    if at == 1:
        raise _bad("the boundary of the Content-Type is not in it")
    while not body.startswith(b"--", at + len(delimiter)):
        head_at = _after_line(body, at + len(delimiter))
        head_end = body.find(b"\r\n\r\n", head_at - 2, head_at + MAX_HEAD)
        if head_end < 0:
            raise _bad(f"the headers of a part have no end, or are over {MAX_HEAD} bytes")
        end = body.find(b"\r\n" + delimiter, head_end + 2)
        if end < 0:
            raise _bad("there is no boundary at its end")
        name, kind = _read_head(body[head_at:head_end])
        yield FormPart(name, kind, view[head_end + 4 : end])  # empty when the next boundary is the line after the head
        at = end + 2


def _boundary(content_type: str) -> bytes:
    boundary = parse_mimetype(content_type).parameters.get("boundary", "")
    if not boundary:
        raise _bad("its Content-Type has no boundary")
    if len(boundary) > MAX_BOUNDARY or not boundary.isascii():
        raise _bad(f"a boundary has at most {MAX_BOUNDARY} characters, all ASCII")
    return boundary.encode()


def _after_line(body: bytes, at: int) -> int:
    """Where the line after a boundary starts."""
    end = body.find(b"\r\n", at, at + MAX_PADDING)
    if end < 0 or body[at:end].strip(b" \t"):
        raise _bad("there is something else behind a boundary")
    return end + 2


def _read_head(head: bytes) -> tuple[str, str]:
    """The name and content type that a part's headers tell."""
    try:
        headers, _ = HeadersParser(max_field_size=MAX_HEAD).parse_headers([*head.split(b"\r\n"), b""])
        with warnings.catch_warnings(action="ignore"):  # the answer is where a client looks, not our log
            _, parameters = parse_content_disposition(headers.get(hdrs.CONTENT_DISPOSITION))
            name = content_disposition_filename(parameters, "name")
    except (HttpProcessingError, ValueError) as error:
        what = " ".join(str(getattr(error, "message", error)).split())
        raise _bad(f"a part with bad headers ({what[:200]})") from None
    if not name:
        raise _bad("a part without a name")
    kind = headers.get(hdrs.CONTENT_TYPE, "")
    if kind.lower().startswith("multipart/"):
        raise _bad("a multipart inside a multipart")
    return name, kind


def _bad(what: str) -> BadRequest:
    return BadRequest(f"bad multipart body: {what}")
