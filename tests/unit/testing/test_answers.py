import contextlib
import re
import socket
import threading
from collections.abc import Iterator

import pytest

from minserve.testing.answers import Answer, Body, StreamBroken, StreamRefused, call, encode, stream


def read_request(connection: socket.socket) -> bytes:
    """All of it: to hang up with bytes unread would reset the connection, and the client would lose the answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    length = re.search(rb"content-length: (\d+)", data, re.IGNORECASE)
    body_at = data.index(b"\r\n\r\n") + 4
    while length and len(data) < body_at + int(length[1]):
        data += connection.recv(65536)
    return data


@contextlib.contextmanager
def answering(answer: bytes, asked: list[bytes] | None = None) -> Iterator[str]:
    """A server that sends one answer and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                data = read_request(connection)
                if asked is not None:
                    asked.append(data)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            thread.join()


def whole(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Type: text/x\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


def chunked(*chunks: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
        b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks
    )


@pytest.mark.parametrize(
    ("body", "data", "content_type"),
    [
        (b"\xff", b"\xff", "application/octet-stream"),
        ("é", b"\xc3\xa9", "text/plain; charset=utf-8"),
        ({"a": [1]}, b'{"a": [1]}', "application/json"),
        ([1, 2], b"[1, 2]", "application/json"),
        (1.5, b"1.5", "application/json"),
        (None, b"null", "application/json"),
    ],
)
def test_a_body_goes_as_what_it_is(body: Body, data: bytes, content_type: str) -> None:
    assert encode(body) == (data, content_type)


def test_an_answer_reads_itself() -> None:
    answer = Answer(400, {}, b'{"message": "\xc3\xa9"}')
    assert answer.text == '{"message": "é"}'
    assert answer.json == {"message": "é"}
    assert answer.message == "é"


@pytest.mark.parametrize("status", [200, 418, 503])
def test_a_status_is_no_exception_and_headers_do_not_mind_case(status: int) -> None:
    asked: list[bytes] = []
    with answering(whole(b"%d Any" % status, b"ok"), asked) as url:
        answer = call(url, b"body", {"X-A": "1"})
    assert (answer.status, answer.text, answer.headers["content-TYPE"]) == (status, "ok", "text/x")
    assert asked[0].startswith(b"POST / HTTP/1.1\r\n")
    assert b"Content-Type: text/plain\r\n" in asked[0]


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with answering(whole(b"200 OK", b"ok")) as url:
        assert call(url).text == "ok"


def test_a_stream_is_its_chunks() -> None:
    with answering(chunked(b"one", b"t" * 100_000, b"three") + b"0\r\n\r\n") as url:
        assert list(stream(url, b"body", {})) == [b"one", b"t" * 100_000, b"three"]


@pytest.mark.parametrize("rest", [b"", b"5\r\nthr", b"5\r\nthree"])
def test_a_stream_that_breaks_off_is_told_after_what_came(rest: bytes) -> None:
    with answering(chunked(b"one", b"two") + rest) as url:
        chunks = stream(url, b"body", {})
        assert [next(chunks), next(chunks)] == [b"one", b"two"]
        with pytest.raises(StreamBroken, match="the stream broke off"):
            list(chunks)


def test_an_answer_that_is_no_stream_is_one_chunk() -> None:
    with answering(whole(b"200 OK", b"all of it")) as url:
        assert list(stream(url, b"body", {})) == [b"all of it"]


def test_an_error_in_place_of_a_stream_is_told() -> None:
    with answering(whole(b"503 Any", b"no")) as url, pytest.raises(StreamRefused, match="503: no") as raised:
        next(stream(url, b"body", {}))
    assert raised.value.answer.status == 503
