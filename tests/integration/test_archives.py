"""Archives of every kind in one server: served from the start, registered, switched, scaled and unregistered."""

from __future__ import annotations

import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from minserve.testing.running import RunningServer, running_server
from tests.integration.servers import GONE_S, Answer, call, gone, until

HANDLER = """\
import sys
import time

class Versioned:
    def initialize(self, context):
        self.version = context.manifest["model"]["modelVersion"]

    def handle(self, data, context):
        if data[0]["body"] == "slow":
            time.sleep(0.5)
        return [(sys.prefix if data[0]["body"] == "prefix" else self.version).encode()] * len(data)
"""
PLAIN = "def handle(data, context):\n    return [b'plain'] * len(data)\n"


def members(version: str, **model: object) -> dict[str, str]:
    model = {"modelName": "m", "handler": "h.py", "modelVersion": version, **model}
    return {"MAR-INF/MANIFEST.json": json.dumps({"runtime": "python", "model": model}), "h.py": HANDLER}


def fill(store: Path) -> None:
    for version in ("1.0", "2.0"):
        with zipfile.ZipFile(store / f"m-{version}.mar", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in {**members(version, configFile="c.yaml"), "c.yaml": "BatchSize: 7"}.items():
                archive.writestr(name, text)
    with tarfile.open(store / "t.tar.gz", "w:gz") as archive:
        for name, text in members("1.5", modelName="t").items():
            entry = tarfile.TarInfo(f"t/{name}")  # the archiver puts a folder around everything
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    files = {**members("1.7", modelName="open", configFile="c.yaml"), "c.yaml": "useVenv: true"}
    for name, text in files.items():
        (store / "open" / name).parent.mkdir(parents=True, exist_ok=True)
        (store / "open" / name).write_text(text)
    (store / "junk.mar").write_bytes(b"PK\x03\x04 junk")
    (store / "plain").mkdir()
    (store / "plain" / "handler.py").write_text(PLAIN)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    config = tmp_path_factory.mktemp("config") / "server.yaml"
    config.write_text(json.dumps({"enable_model_api": True, "load_models": ["m-1.0.mar", "plain", "junk.mar"]}))
    with running_server(fill, ("--config", str(config))) as started:
        started.wait_until_started()
        yield started
        family = started.family()
        assert started.stop() == 0, started.log
        until(lambda: gone(family), GONE_S, "the ranks' end")
        assert not list(started.runtime.rglob("minserve-*")), "a directory is left"


def manage(running: RunningServer, method: str, path: str) -> Answer:
    return call(f"{running.management}/models{path}", b"", {}, method, 60.0)


def status(answer: Answer) -> tuple[int, object]:
    value = answer.json
    assert isinstance(value, dict)
    return answer.status, value.get("status", value.get("message"))


def extracted(running: RunningServer) -> int:
    return len(list((running.runtime / "tmp").glob("minserve-*.models/x*")))


def test_what_is_there_from_the_start(running: RunningServer) -> None:
    assert running.predict("m").body == running.predict("m/1.0").body == b"1.0"
    assert running.predict("plain").body == b"plain"
    described = running.describe("m")
    assert (described["modelVersion"], described["modelUrl"], described["batchSize"]) == ("1.0", "m-1.0.mar", 1)
    assert "junk is not served: " in running.log
    assert "BatchSize" in running.log, "what is forgiven is told"
    assert "Traceback" not in running.log
    assert extracted(running) == 1


def test_every_kind_can_be_registered(running: RunningServer) -> None:
    for url, name, version in (("t.tar.gz", "t", "1.5"), ("open", "open", "1.7")):
        text = (
            f'Model "{name}" Version: {version} registered with 0 initial workers. Use scale workers API to add workers'
        )
        assert status(manage(running, "POST", f"?url={url}")) == (200, f"{text} for the model.")
        refused = running.predict(name)
        assert refused.status == 503
        assert f'Model "{name}" has no worker to serve inference request.' in refused.message
    assert status(manage(running, "PUT", "/open?min_worker=1&synchronous=true"))[0] == 200
    assert running.predict("open").body == b"1.7"
    prefix = Path(running.predict("open", "prefix").body.decode())
    assert prefix.name == "venv", "an environment of its own, that sees minserve and torch all the same"
    assert prefix.exists()
    for name in ("t", "open"):
        assert manage(running, "DELETE", f"/{name}").status == 200
        assert running.predict(name).status == 404
    assert extracted(running) == 1
    assert not prefix.exists()
    assert (running.runtime / "store" / "open" / "h.py").exists()


def test_an_archive_that_is_none_is_refused_with_its_reason(running: RunningServer) -> None:
    answer = manage(running, "POST", "?url=junk.mar")
    assert answer.status == 400
    assert "junk.mar" in answer.message
    assert extracted(running) == 1


def test_another_version_takes_over_without_a_failed_request(running: RunningServer) -> None:
    answers: list[Answer] = []
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            answers.append(running.predict("m", "slow" if len(answers) % 4 == 0 else "go"))

    clients = [threading.Thread(target=load) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        text = 'Model "m" Version: 2.0 registered with 1 initial workers'
        assert status(manage(running, "POST", "?url=m-2.0.mar&initial_workers=1")) == (200, text)
        assert running.predict("m/2.0").body == b"2.0"
        assert running.predict("m").body == b"1.0"
        assert extracted(running) == 2
        old = [psutil.Process(pid) for pid in running.pids("m/1.0")]
        refused = manage(running, "DELETE", "/m/1.0")
        assert (refused.status, refused.message) == (403, "Cannot remove default version for model m")
        assert manage(running, "PUT", "/m/2.0/set-default").status == 200
        assert status(manage(running, "DELETE", "/m/1.0")) == (200, 'Model "m" unregistered')
        assert gone(old)
        assert extracted(running) == 1
        until(lambda: answers[-1].body == b"2.0")
    finally:
        over.set()
        for client in clients:
            client.join()
    assert {answer.status for answer in answers} == {200}
    assert {answer.body for answer in answers} == {b"1.0", b"2.0"}
    assert running.predict("m/1.0").status == 404
