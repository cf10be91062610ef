"""`minserve torchserve` as scripts call it: start, curl, scale, stop, and a start from the snapshot."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from minserve.torchserve.pidfile import PID_FILE
from tests.integration.servers import Answer, call, gone, until
from tests.ports import free_ports

HANDLER = """
def handle(data, context):
    return [row["body"].upper() for row in data] if data else None
"""
DEADLINE_S = 30.0


class Home:
    """A folder from which the command is called, with a model store and a temp folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tmp").mkdir()
        (folder / "store").mkdir()
        (folder / "handler.py").write_text(HANDLER)
        self.inference, self.management, self.metrics = free_ports(3)
        self.output = folder / "output"

    def configure(self, name: str, *more: str) -> None:
        ports = {"inference": self.inference, "management": self.management, "metrics": self.metrics}
        lines = [f"{port}_address=http://127.0.0.1:{number}" for port, number in ports.items()]
        (self.folder / name).write_text("\n".join([*lines, "default_workers_per_model=1", *more, ""]))

    def run(self, *arguments: str) -> int:
        """Runs the command; what it and its server print goes to one file, as in a shell script."""
        environ = {
            name: value for name, value in os.environ.items() if not name.startswith(("TS_", "LOG_", "METRICS_"))
        }
        temp = str(self.folder / "tmp")
        command = [sys.executable, "-P", "-m", "minserve", *arguments]
        with self.output.open("ab") as output:
            return subprocess.run(
                command,
                cwd=self.folder,
                env={**environ, "TMPDIR": temp, "XDG_RUNTIME_DIR": temp},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=60,
                check=False,
            ).returncode

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def pid(self) -> int | None:
        file = self.folder / "tmp" / PID_FILE
        return int(file.read_text()) if file.exists() else None

    def key(self, kind: str) -> dict[str, str]:
        key = json.loads((self.folder / "key_file.json").read_text())[kind]["key"]
        return {"Authorization": f"Bearer {key}"}

    def predict(self, model: str, headers: dict[str, str] | None = None) -> Answer:
        return call(f"http://127.0.0.1:{self.inference}/predictions/{model}", b"hello", headers, "POST")

    def manage(self, method: str, path: str, headers: dict[str, str] | None = None) -> Answer:
        return call(f"http://127.0.0.1:{self.management}{path}", None, headers, method)

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.inference)) == 0


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    assert (
        home.run(
            "archive",
            "--model-name",
            "shout",
            "--version",
            "1.0",
            "--handler",
            "handler.py",
            *("--export-path", "store"),
        )
        == 0
    )
    yield home
    pid = home.pid()
    home.run("torchserve", "--stop", "--foreground")
    if pid is not None:
        until(lambda: not psutil.pid_exists(pid) or gone([psutil.Process(pid)]), DEADLINE_S, "the server's end")


def test_a_server_is_started_scaled_stopped_and_started_again_from_its_snapshot(home: Home) -> None:
    home.configure("config.properties", "load_models=shout.mar", "enable_model_api=true")
    (home.folder / "queue.py").write_text("raise SystemExit('a module of the folder that it is started in')")
    assert home.run("torchserve", "--start", "--model-store=store") == 0
    until(lambda: "Model server started.\n" in home.said, DEADLINE_S, "the line that scripts wait for")
    pid = home.pid()
    assert pid is not None

    key = home.folder / "key_file.json"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    until(lambda: home.predict("shout", home.key("inference")).body == b"HELLO", DEADLINE_S, "an answer")
    assert home.predict("shout").status == 400
    assert home.manage("GET", "/models", home.key("inference")).status == 400

    before = home.said
    assert home.run("torchserve", "--start", "--model-store", "store") == 1
    assert "already running" in home.said.removeprefix(before)
    assert home.pid() == pid

    management = home.key("management")
    assert home.manage("PUT", "/models/shout?min_worker=2&synchronous=true", management).status == 200
    assert home.manage("POST", "/models?url=shout.mar&model_name=other&initial_workers=1", management).status == 200
    names = sorted(file.name[18:] for file in (home.folder / "logs" / "config").iterdir())
    assert names == ["snapshot.cfg", "snapshot.cfg", "startup.cfg"]

    assert home.run("torchserve", "--stop", "--foreground") == 0
    assert home.pid() is None
    assert not key.exists()
    assert not home.listens()
    logs = home.folder / "logs"
    assert re.search(
        r'/127\.0\.0\.1:\d+ "POST /predictions/shout HTTP/1\.1" 200 \d+$',
        (logs / "access_log.log").read_text(),
        re.MULTILINE,
    )
    assert "State change WORKER_STARTED -> WORKER_MODEL_LOADED" in (logs / "ts_log.log").read_text()
    assert "PredictionTime.ms:" in (logs / "model_metrics.log").read_text()

    (home.folder / "config.properties").unlink()
    assert home.run("torchserve", "--start", "--disable-token-auth") == 0
    until(lambda: home.predict("other").body == b"HELLO", DEADLINE_S, "the model that was registered")
    (shout,) = json.loads(home.manage("GET", "/models/shout").body)
    assert (shout["minWorkers"], shout["maxWorkers"]) == (2, 2)


def test_a_wrong_start_is_a_message_and_no_server(home: Home) -> None:
    home.configure("good.properties", "load_models=shout.mar")
    home.configure("bad.properties", "job_queue_size=many")
    wrong = {
        ("--ts-config", "missing.properties", "--model-store", "store"): "missing.properties",
        ("--model-store", "nowhere"): "nowhere",
        (): "Missing mandatory parameter --model-store",
        ("--ts-config", "bad.properties", "--model-store", "store"): "bad.properties:5: job_queue_size: found",
    }
    for arguments, message in wrong.items():
        before = home.said
        assert home.run("torchserve", "--start", *arguments) == 1
        assert message in home.said.removeprefix(before)
    with socket.create_server(("127.0.0.1", home.inference)):
        assert (
            home.run("torchserve", "--start", "--ncs", "--ts-config", "good.properties", "--model-store", "store") == 1
        )
    assert "cannot listen on" in home.said
    assert not home.listens()
    assert home.pid() is None


def test_a_stop_without_a_server_is_no_error_and_a_stale_pid_is_none(home: Home) -> None:
    assert home.run("torchserve", "--stop") == 0
    assert "not currently running" in home.said
    (home.folder / "tmp" / PID_FILE).write_text(str(os.getpid()))  # a process, but no server
    assert home.run("torchserve", "--stop") == 0
    assert home.said.count("not currently running") == 2
    (home.folder / "tmp" / PID_FILE).unlink()


def test_the_command_is_installed_where_one_asks_for_it(home: Home) -> None:
    assert home.run("torchserve", "--install-command", "bin") == 0
    result = subprocess.run(
        [home.folder / "bin" / "torchserve", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.startswith("TorchServe Version is 0.12.0")
    assert home.run("torchserve", "--install-command", "bin") == 0
    (home.folder / "bin" / "torchserve").write_text("#!/bin/sh\necho a real one\n")
    assert home.run("torchserve", "--install-command", "bin") == 1
    assert "is there already, and is not minserve's" in home.said
    assert "a real one" in (home.folder / "bin" / "torchserve").read_text()


def test_a_server_in_the_foreground_ends_in_0_when_it_is_told_to(home: Home) -> None:
    home.configure("config.properties", "load_models=shout.mar", "disable_token_authorization=true")
    with home.output.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "minserve", "torchserve", "--foreground", "--ncs", "--model-store", "store"],
            cwd=home.folder,
            env={**os.environ, "TMPDIR": str(home.folder / "tmp"), "XDG_RUNTIME_DIR": str(home.folder / "tmp")},
            stdout=output,
            stderr=output,
        )
    try:
        until(lambda: "Model server started.\n" in home.said, DEADLINE_S, "the start")
        assert home.pid() == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()
    assert home.pid() is None
    assert not (home.folder / "logs" / "config").exists()
