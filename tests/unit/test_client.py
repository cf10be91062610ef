import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from minserve.client import Client, NoAnswer

ANSWERS = {
    "/good": (200, b'{"a": 1}'),
    "/refused": (403, b'{"code": 403, "message": "not you"}'),
    "/lost": (502, b"<html>"),
    "/junk": (200, b"junk"),
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = ANSWERS.get(self.path) or (200, f'"{self.headers["Authorization"]}"'.encode())
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_json_of_an_address_whatever_the_proxy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert Client(url).get("/good", 10) == {"a": 1}


def test_the_token_goes_along_and_is_not_shown(url: str) -> None:
    assert Client(url, token="key").get("/headers", 10) == "Bearer key"
    assert Client(url).get("/headers", 10) == "None"
    assert "key" not in repr(Client(url, token="key"))


@pytest.mark.parametrize(
    ("path", "message"),
    [("/refused", ": not you$"), ("/lost", ": 502 Bad Gateway$"), ("/junk", "^no answer from .*: Expecting value")],
)
def test_an_answer_that_is_none(url: str, path: str, message: str) -> None:
    with pytest.raises(NoAnswer, match=message):
        Client(url).get(path, 10)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "https://127.0.0.1:1", "unix:/none/at/all"])
def test_nobody_there(url: str) -> None:
    with pytest.raises(NoAnswer, match=f"^no answer from {url}: .Errno"):
        Client(url).get("/", 10)
