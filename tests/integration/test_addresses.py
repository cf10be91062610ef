"""One server whose inference is https, with a certificate that it has made itself, and whose management is a unix socket."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from minserve.client import Client
from minserve.worker.runtime import LiveServer, live_servers
from tests.integration.servers import RunningServer, server

HANDLER = """
import os
from ts.handler_utils.utils import send_intermediate_predict_response


def handle(data, context):
    body = data and data[0]["body"]
    if body == "stream":
        for number in range(3):
            send_intermediate_predict_response([f"{number};"], context.request_ids, "OK", 200, context)
        return ["end"]
    if body == "environment":
        return [",".join(sorted(name for name in os.environ if name.endswith("_FOR_TEST")))]
    return [len(body)] if data else None
"""
OPTIONS = """
inference_address: https://localhost:0
management_address: unix:{folder}/management
blacklist_env_vars: SECRET_.*
number_of_gpu: 0
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Short: a unix address has 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="ms", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[RunningServer]:
    (folder / "echo").mkdir()
    (folder / "echo" / "handler.py").write_text(HANDLER)
    (folder / "echo" / "model-config.yaml").write_text("maxBatchDelay: 0\nminWorkers: 1\nmaxWorkers: 1\n")
    (folder / "server.yaml").write_text(OPTIONS.format(folder=folder))
    environ = {"SECRET_FOR_TEST": "x", "PUBLIC_FOR_TEST": "y"}
    with server(folder / "echo", options=("--config", str(folder / "server.yaml")), environ=environ) as running:
        yield running
        running.stop()
        assert not (folder / "management").exists(), "the socket's file goes with its server"


@pytest.fixture(scope="module")
def live(running: RunningServer) -> LiveServer:
    (live,) = live_servers({"MINSERVE_RUNTIME_DIR": str(running.runtime)})
    return live


@pytest.fixture
def link(running: RunningServer, live: LiveServer) -> Iterator[http.client.HTTPConnection]:
    link = Client(running.inference, live.certificate).connection(30)
    yield link
    link.close()


def ask(link: http.client.HTTPConnection, body: bytes | str) -> tuple[int, bytes]:
    link.request("POST", "/predictions/echo", body, {"Content-Type": "text/plain"})
    answer = link.getresponse()
    return answer.status, answer.read()


def test_requests_on_one_tls_connection(link: http.client.HTTPConnection) -> None:
    assert ask(link, "abc") == (200, b"3")
    assert ask(link, "x" * 5_000_000) == (200, b"5000000")
    assert ask(link, "stream") == (200, b"0;1;2;end")
    assert ask(link, "x" * 7_000_000)[0] == 413


def test_the_certificate_is_one_that_nobody_else_knows(running: RunningServer) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        ask(Client(running.inference).connection(30), "abc")


def test_no_http_on_the_port_of_https(running: RunningServer, link: http.client.HTTPConnection) -> None:
    port = int(running.inference.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as plain:
        plain.sendall(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"HTTP" not in plain.recv(1000)
    assert ask(link, "abc") == (200, b"3")


def test_a_tls_client_that_ends_its_direction_has_left(
    running: RunningServer, link: http.client.HTTPConnection
) -> None:
    link.request("POST", "/predictions/echo", "x" * 1000, {"Content-Type": "text/plain", "Content-Length": "2000"})
    assert isinstance(link.sock, ssl.SSLSocket)
    link.sock.unwrap().close()  # TLS's own goodbye, and the server's
    assert "eof_received" not in running.log, "asyncio warns of an answer that TLS does not know"


def test_what_is_blacklisted_does_not_reach_the_model(link: http.client.HTTPConnection) -> None:
    assert ask(link, "environment") == (200, b"PUBLIC_FOR_TEST")


def test_management_on_a_unix_socket(running: RunningServer, folder: Path) -> None:
    assert running.management == f"unix:{folder}/management"
    assert stat.S_IMODE((folder / "management").stat().st_mode) == 0o600
    assert Client(running.management).get("/models", 30) == {"models": [{"modelName": "echo", "modelUrl": "echo"}]}


def test_status_finds_it(running: RunningServer) -> None:
    command = [sys.executable, "-m", "minserve", "status", "--json"]
    environ = {**os.environ, "MINSERVE_RUNTIME_DIR": str(running.runtime)}
    result = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)
    assert result.returncode == 0, result.stderr
    assert [model["modelName"] for model in json.loads(result.stdout)] == ["echo"]


def test_a_client_that_has_ended_its_direction_of_a_unix_socket_gets_its_answer(
    folder: Path, running: RunningServer
) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(folder / "management"))
        client.sendall(b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert b"HTTP/1.1 200 OK" in answer
    assert b'"modelName": "echo"' in answer
