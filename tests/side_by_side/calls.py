"""One HTTP call, its answer, and what of an answer is compared."""

from __future__ import annotations

import base64
import http.client
import io
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TIMEOUT_S = 60.0
HEADERS = ("Content-Type", "Pragma", "Cache-Control", "Expires", "x-from-handler", "ts_stream_next")
# What no two servers have in common, or no two moments.
_VOLATILE = (
    (re.compile(r'"(startTime|memoryUsage|pid|id|gpuUsage)": ("[^"]*"|-?\d+)'), r'"\1": …'),
    (re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"), "<uuid>"),
    (re.compile(r'[Hh]ostname="[^"]*"'), 'hostname="…"'),
    (re.compile(r"(127\.0\.0\.1|localhost):\d+"), "<address>"),
)


@dataclass(frozen=True)
class Call:
    """What is asked. `{…}` in headers is filled from what the server's files say, see `servers.Running.secrets`."""

    name: str
    method: str
    path: str
    port: str = "inference"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    copies: Sequence[bytes] = ()
    """Bodies that are sent at the same time, instead of one."""
    only: str = ""
    """A pattern: of the answer's lines only those that match are compared."""
    until: int = 0
    """Asked again until this status comes, where the server needs its time."""


@dataclass(frozen=True)
class Answer:
    """What came back, with what is volatile taken out. `chunks` are the pieces of a chunked body."""

    status: int
    reason: str
    headers: dict[str, str]
    body: str
    chunks: int = 0


def send(host: str, port: int, call: Call, secrets: Mapping[str, str]) -> list[Answer]:
    """Sends a call, or its copies at the same time, and reads the answers.

    Raises:
        OSError, http.client.HTTPException: there is none.
    """
    headers = {name: value.format_map(secrets) for name, value in call.headers.items()}
    if not call.copies:
        return [_send(host, port, call, headers, call.body)]
    with ThreadPoolExecutor(len(call.copies)) as pool:
        waiting = [pool.submit(_send, host, port, call, headers, body) for body in call.copies]
        return [answer.result() for answer in waiting]


def _send(host: str, port: int, call: Call, headers: Mapping[str, str], body: bytes) -> Answer:
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request(call.method, call.path, body or None, dict(headers))
        response = connection.getresponse()
        chunked = response.getheader("Transfer-Encoding", "") == "chunked"
        pieces: list[bytes] = []
        while piece := response.read1():
            pieces.append(piece)
        content = b"".join(pieces)
        kept = {name: response.headers[name] for name in HEADERS if name in response.headers}
        return Answer(response.status, response.reason, kept, _shown(content, call.only), len(pieces) if chunked else 0)
    finally:
        connection.close()


def _shown(body: bytes, only: str) -> str:
    if body.startswith(b"PK"):  # as torch.save writes; the bytes differ from version to version
        import torch

        return f"torch.save {torch.load(io.BytesIO(body), weights_only=True).tolist()}"
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return f"base64 {base64.b64encode(body).decode()}"
    for pattern, replacement in _VOLATILE:
        text = pattern.sub(replacement, text)
    if only:
        text = "\n".join(sorted(line for line in text.splitlines() if re.search(only, line)))
    return text
