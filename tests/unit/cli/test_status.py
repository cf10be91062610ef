import json
import socket
from collections.abc import Callable

import pytest
from typer.testing import Result

from minserve.client import Client

Run = Callable[..., Result]


@pytest.fixture
def management(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A server with two pages of models; the URLs that were asked for."""
    asked: list[str] = []
    worker = {"id": "0", "state": "READY", "restarts": 0, "ranks": []}
    event = {"time": "2023", "worker": 0, "rank": None, "pid": 0, "kind": "restart", "detail": "in 1 s", "count": 2}

    def get(client: Client, path: str) -> object:
        asked.append(client.url + path)
        path = path.removeprefix("/models")
        if path.startswith("?"):
            page: dict[str, object] = {"models": [{"modelName": "a" if path.endswith("=0") else "b"}]}
            return page | ({"nextPageToken": "1"} if path.endswith("=0") else {})
        if path.endswith("/events?limit=5"):
            return {"schema": 1, "model": path.split("/")[1], "events": [event | {"model": path.split("/")[1]}]}
        return [{"modelName": path.split("/")[1], "modelVersion": "1.0", "workers": [worker]}]

    monkeypatch.setattr("minserve.cli.status._get", get)
    return asked


def test_status_shows_every_model_of_every_page(run: Run, management: list[str]) -> None:
    result = run("status", "--url", "http://there:9")
    assert result.exit_code == 0
    assert management == [
        "http://there:9/models?next_page_token=0",
        "http://there:9/models?next_page_token=1",
        "http://there:9/models/a/all",
        "http://there:9/models/a/1.0/events?limit=5",
        "http://there:9/models/b/all",
        "http://there:9/models/b/1.0/events?limit=5",
    ]
    assert [line.split("│")[1].strip() for line in result.stdout.splitlines() if "READY" in line] == ["a", "b"]


def test_status_as_json_is_what_management_says(run: Run, management: list[str]) -> None:
    described = json.loads(run("status", "--json", "--url", "http://there:9").stdout)
    assert [model["modelName"] for model in described] == ["a", "b"]
    assert [model["events"][0]["detail"] for model in described] == ["in 1 s", "in 1 s"]


def test_status_asks_the_server_that_runs_here(run: Run, management: list[str], live: Callable[..., int]) -> None:
    assert run("status").exit_code == 0
    live()
    assert run("status").exit_code == 0
    assert [url for url in management if url.endswith("=0")] == [
        "http://127.0.0.1:8081/models?next_page_token=0",
        "http://127.0.0.1:2/models?next_page_token=0",
    ]


def test_status_without_a_server_is_one_line_and_exit_1(run: Run) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: refused
        port = unused.getsockname()[1]
        result = run("status", "--url", f"http://127.0.0.1:{port}")
    assert result.exit_code == 1
    assert result.stderr == f"minserve: no answer from http://127.0.0.1:{port}: [Errno 111] Connection refused\n"
