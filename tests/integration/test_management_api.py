"""The REST interface as clients of TorchServe use it, on one server: every path to a model, and what changes models."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from minserve.testing.running import RunningServer, running_server
from tests.integration.servers import GONE_S, Answer, call, gone, until

ECHO = """\
import json

def handle(data, context):
    if data is None:
        return None  # the call at the start
    headers = context.get_all_request_header(0)
    if headers.get("describe") == "True":
        return [{"task": "echo", "version": context.manifest["model"]["modelVersion"]}]
    seen = {name: value.decode() if isinstance(value, bytearray) else value for name, value in data[0].items()}
    kept = {name: headers[name] for name in ("explain", "url_path") if name in headers}
    return [json.dumps({"seen": seen, **kept, "version": context.manifest["model"]["modelVersion"]})]
"""
BROKEN = "raise ValueError('these weights are for another model')\n"
NO_WORKER = "has no worker to serve inference request. Please use scale workers API to add workers."
JSON = {"Content-Type": "application/json"}


def fill(store: Path) -> None:
    for file, name, version, handler in (
        ("echo.mar", "echo", "1.0", ECHO),
        ("echo-two.mar", "echo", "2.0", ECHO),
        ("failing.mar", "failing", "1.0", BROKEN),
    ):
        model = {"modelName": name, "modelVersion": version, "handler": "handler.py"}
        with zipfile.ZipFile(store / file, "w") as archive:
            archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model}))
            archive.writestr("handler.py", handler)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    config = tmp_path_factory.mktemp("config") / "server.yaml"
    config.write_text(json.dumps({"enable_model_api": True, "load_models": ["echo.mar"], "max_response_size": 1000}))
    with running_server(fill, ("--config", str(config))) as started:
        started.wait_until_started()
        yield started
        family = started.family()
        assert started.stop() == 0, started.log
        until(lambda: gone(family), GONE_S, "the ranks' end")
        log = started.log
        assert log.count("Traceback") == log.count("\nValueError: these weights"), log  # the handler's own


def manage(running: RunningServer, method: str, path: str, body: object = None) -> Answer:
    data, headers = (b"", {}) if body is None else (json.dumps(body).encode(), JSON)
    return call(f"{running.management}{path}", data, headers, method, 60.0)


def told(answer: Answer) -> tuple[int, object]:
    value = answer.json
    assert isinstance(value, dict)
    return answer.status, value.get("status", value.get("message"))


def ask(running: RunningServer, path: str, body: bytes = b"x", headers: dict[str, str] | None = None) -> object:
    answer = call(f"{running.inference}{path}", body, headers or {}, "POST", 60.0)
    assert answer.status == 200, answer.body
    return answer.json


def test_every_path_leads_to_the_handler_with_what_torchserve_gives_it(running: RunningServer) -> None:
    predicted, explained = {"explain": "False", "url_path": ""}, {"explain": "True", "url_path": ""}
    plain = {"seen": {"body": "x"}, "version": "1.0"}
    assert ask(running, "/predictions/echo?a=1") == {**plain, **predicted}
    assert ask(running, "/predictions/echo/1.0/v1/chat") == {**plain, **predicted, "url_path": "v1/chat"}
    assert ask(running, "/explanations/echo") == {**plain, **explained}
    instances = {"seen": {"body": {"instances": [1]}}, "version": "1.0"}
    body = b'{"instances": [1]}'
    assert ask(running, "/v1/models/echo:predict", body, JSON) == {**instances, **predicted}
    assert ask(running, "/v1/models/echo:explain", body, JSON) == {**instances, **explained}
    assert ask(running, "/v2/models/echo/infer", body, JSON) == {**instances, **predicted}
    query = {"seen": {"a": "1", "body": "x"}, "version": "1.0", **predicted}
    for path in ("/echo/predict?a=1", "/echo/1.0/predict?a=1", "/models/echo/invoke?a=1", "/invocations?a=1"):
        assert ask(running, path) == query, path
    large = call(f"{running.inference}/predictions/echo", b"x" * 1000, {}, "POST", 60.0)
    assert (large.status, "max_response_size allows 1000" in large.message) == (500, True)
    assert ask(running, "/predictions/echo") == {**plain, **predicted}


def test_a_model_describes_itself(running: RunningServer) -> None:
    answer = manage(running, "GET", "/models/echo?customized=true").json
    assert isinstance(answer, list)
    assert answer[0]["customizedMetadata"] == {"task": "echo", "version": "1.0"}
    assert answer[0]["workers"][0]["status"] == "READY"
    assert manage(running, "GET", "/v1/models/echo").json == {"name": "echo", "ready": True}


def test_a_model_that_cannot_be_loaded_is_gone_again(running: RunningServer) -> None:
    status, text = told(manage(running, "POST", "/models?url=failing.mar&initial_workers=1"))
    assert status == 500
    assert str(text).startswith("Failed to start workers for model failing version: 1.0: ")
    assert "these weights are for another model" in str(text)
    assert told(manage(running, "GET", "/models/failing")) == (404, "Model not found: failing")


def test_a_second_version_without_workers_gets_some(running: RunningServer) -> None:
    assert manage(running, "POST", "/models?url=echo-two.mar").status == 200
    refused = call(f"{running.inference}/predictions/echo/2.0", b"x", {}, "POST", 60.0)
    assert refused.status == 503
    assert refused.message.startswith(f'Model "echo" Version 2.0" {NO_WORKER}')
    status, text = told(manage(running, "GET", "/models/echo/2.0?customized=true"))
    assert (status, "to serve describe request" in str(text)) == (503, True)
    assert manage(running, "GET", "/v1/models/echo").json == {"name": "echo", "ready": True}
    assert told(manage(running, "PUT", "/models/echo/2.0?min_worker=1&synchronous=true")) == (
        200,
        "Workers scaled to 1 for model: echo, version: 2.0",
    )
    assert ask(running, "/predictions/echo/2.0") != ask(running, "/predictions/echo")
    assert manage(running, "PUT", "/models/echo/2.0/set-default").status == 200
    assert ask(running, "/predictions/echo/2.0") == ask(running, "/predictions/echo")
    assert told(manage(running, "DELETE", "/models/echo/1.0")) == (200, 'Model "echo" unregistered')
    assert told(manage(running, "PUT", "/models/echo?min_worker=0&synchronous=true")) == (
        200,
        "Workers scaled to 0 for model: echo",
    )
    assert call(f"{running.inference}/ping", b"", {}, "GET", 60.0).status == 200
    assert manage(running, "GET", "/v1/models/echo").json == {"name": "echo", "ready": False}


def test_a_registration_that_nobody_waits_for_comes_up(running: RunningServer) -> None:
    wanted = {"url": "echo.mar", "model_name": "later", "initial_workers": 1, "synchronous": False}
    assert told(manage(running, "POST", "/models", wanted)) == (202, "Processing worker updates...")
    until(lambda: manage(running, "GET", "/v1/models/later").json == {"name": "later", "ready": True})
    assert ask(running, "/invocations?model_name=later")
    names = [model["modelName"] for model in manage(running, "GET", "/models").json["models"]]  # type: ignore[index]
    assert names == ["echo", "later"]
    assert told(manage(running, "POST", "/models", wanted)) == (
        409,
        "Model version 1.0 is already registered for model later",
    )
