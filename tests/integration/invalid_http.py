"""The corpus of bad requests: files of `http_invalid/`, one attack each.

A file says in comments (`#`) why it is there and what is expected. All other lines are the bytes to send, without the line
ends of the file: `\\r`, `\\n`, `\\t`, `\\xNN` and `\\\\` stand for bytes, `{TEXT*COUNT}` for TEXT that often, and `{length}`
for the number of bytes behind the head.

    # expect: STATUS CONNECTION [eof]

STATUS is that of the only answer, `none` for no answer at all. CONNECTION is `close` if the server must end the connection,
`any` if the client does when it has the answer. With `eof` the client ends its direction after the last byte.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

CORPUS = Path(__file__).parent / "http_invalid"
ANSWER_TIMEOUT_S = 10.0
_REPEATED = re.compile(r"\{([^{}]*)\*(\d+)\}")
_ESCAPED = re.compile(rb"\\(r|n|t|\\|x[0-9a-f]{2})")
_PLAIN = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"\\": b"\\"}


@dataclass(frozen=True)
class BadRequest:
    """One attack and what it must lead to."""

    name: str
    data: bytes
    status: int | None
    closes: bool
    half_closed: bool


def corpus() -> list[BadRequest]:
    """All files, by name."""
    return [read_file(path) for path in sorted(CORPUS.glob("*.http"))]


def read_file(path: Path) -> BadRequest:
    """One file."""
    lines = path.read_text("ascii").splitlines()
    (expected,) = (line.removeprefix("# expect: ").split() for line in lines if line.startswith("# expect: "))
    assert expected[1] in ("close", "any"), path
    assert expected[2:] in ([], ["eof"]), path
    return BadRequest(
        path.stem,
        _bytes_of("".join(line for line in lines if not line.startswith("#"))),
        None if expected[0] == "none" else int(expected[0]),
        expected[1] == "close",
        expected[2:] == ["eof"],
    )


def _bytes_of(text: str) -> bytes:
    while _REPEATED.search(text):
        text = _REPEATED.sub(lambda match: match[1] * int(match[2]), text)
    data = _ESCAPED.sub(
        lambda match: _PLAIN.get(match[1]) or bytes.fromhex(match[1][1:].decode()), text.encode("ascii")
    )
    return data.replace(b"{length}", b"%d" % len(data.partition(b"\r\n\r\n")[2]))


def send(address: tuple[str, int], bad: BadRequest) -> tuple[bytes, bool]:
    """All that the server answers to it, and whether the connection has ended then."""
    with socket.create_connection(address, timeout=ANSWER_TIMEOUT_S) as client:
        answer = b""
        try:
            client.sendall(bad.data)
            if bad.half_closed:
                client.shutdown(socket.SHUT_WR)
        except ConnectionError:
            pass  # it would not even hear it out; the answer has come all the same
        try:
            while not bad.closes and not _whole(answer):
                answer += _receive(client)
            if not bad.closes:
                client.shutdown(socket.SHUT_WR)
            while True:
                answer += _receive(client)
        except (EOFError, ConnectionResetError):
            return answer, True
        except TimeoutError:
            return answer, False


def _receive(client: socket.socket) -> bytes:
    received = client.recv(65536)
    if not received:
        raise EOFError
    return received


def _whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)
    return bool(end) and length is not None and len(body) >= int(length[1])
