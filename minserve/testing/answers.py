"""HTTP as a test wants it: a status is no exception, a stream is an iterator of its chunks."""

from __future__ import annotations

import http.client
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message

from multidict import CIMultiDict, CIMultiDictProxy

Body = bytes | str | int | float | bool | Sequence[object] | Mapping[str, object] | None
"""What a request may send: bytes, text, or a value that goes as JSON."""


@dataclass(frozen=True)
class Answer:
    """An HTTP answer. `headers` do not mind upper and lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body as UTF-8."""
        return self.body.decode()

    @property
    def json(self) -> object:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """The message of an error."""
        answer = self.json
        assert isinstance(answer, dict), self
        return str(answer["message"])


class StreamRefused(Exception):
    """A stream was asked for and an error came instead.

    Attributes:
        answer: that error.
    """

    def __init__(self, answer: Answer) -> None:
        try:
            text = answer.message
        except (ValueError, KeyError, AssertionError):  # it is the handler's own
            text = answer.text
        super().__init__(f"{answer.status}: {text}")
        self.answer = answer


class StreamBroken(Exception):
    """A stream broke off before its end. The server's log says why."""


def encode(body: Body) -> tuple[bytes, str]:
    """A body's bytes and its content type."""
    if isinstance(body, bytes):
        return body, "application/octet-stream"
    if isinstance(body, str):
        return body.encode(), "text/plain; charset=utf-8"
    return json.dumps(body).encode(), "application/json"


def call(
    url: str,
    body: bytes | str | None = None,
    headers: Mapping[str, str] | None = None,
    method: str | None = None,
    timeout: float = 60.0,
) -> Answer:
    """One HTTP request; text/plain unless the headers say otherwise. An error status is an answer, too."""
    data = body.encode() if isinstance(body, str) else body
    request = urllib.request.Request(url, data, {"Content-Type": "text/plain", **(headers or {})}, method=method)
    try:
        with _open(request, timeout) as response:
            return _answer(response.status, response.headers, response.read())
    except urllib.error.HTTPError as error:
        with error:
            return _answer(error.code, error.headers, error.read())


def stream(url: str, body: bytes, headers: Mapping[str, str], timeout: float = 60.0) -> Iterator[bytes]:
    """The chunks of an answer, each as it comes. The request goes out with the first `next`; closing hangs up.

    Args:
        timeout: seconds between two chunks.

    Raises:
        StreamRefused: the answer is an error.
        StreamBroken: the stream ended before its last chunk.
    """
    try:
        with _open(urllib.request.Request(url, body, dict(headers)), timeout) as response:
            if response.chunked:
                yield from _chunks(response.fp)
            else:
                yield response.read()
    except urllib.error.HTTPError as error:
        with error:
            refused = StreamRefused(_answer(error.code, error.headers, error.read()))
        raise refused from None
    except (http.client.HTTPException, ConnectionError, ValueError) as error:
        raise StreamBroken(f"{url}: the stream broke off: {error!r}") from None


def _chunks(connection: io.BufferedIOBase) -> Iterator[bytes]:
    """The chunks as the server made them; http.client gives them in other pieces.

    Raises:
        ConnectionError, ValueError: the last chunk is missing.
    """
    while size := int(connection.readline().partition(b";")[0], 16):
        chunk = connection.read(size)
        if len(chunk) < size:
            raise ConnectionError(f"{len(chunk)} of {size} bytes of a chunk")
        connection.readline()
        yield chunk


def _open(request: urllib.request.Request, timeout: float) -> http.client.HTTPResponse:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows nothing of our loopback
    response = direct.open(request, timeout=timeout)
    assert isinstance(response, http.client.HTTPResponse)
    return response


def _answer(status: int, headers: Message, body: bytes) -> Answer:
    return Answer(status, CIMultiDictProxy(CIMultiDict(headers.items())), body)
