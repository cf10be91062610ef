"""Starts real servers for integration tests, and makes sure that nothing of them stays behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

MODELS = Path(__file__).parent / "models"
DEMO_MODELS = Path(__file__).parents[2] / "configs" / "models"
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 40.0


def until(condition: Callable[[], object], timeout: float = 20.0, what: str = "") -> None:
    """Polls a condition until it holds, and fails when it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what or condition}"
        time.sleep(0.02)


@dataclass(frozen=True)
class Answer:
    """An HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> object:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """The message of an error."""
        answer = self.json
        assert isinstance(answer, dict)
        return str(answer["message"])


def call(
    url: str,
    body: bytes | str | None = None,
    headers: Mapping[str, str] | None = None,
    method: str | None = None,
    timeout: float = 60.0,
) -> Answer:
    """One HTTP request; an error status is an answer, too."""
    data = body.encode() if isinstance(body, str) else body
    request = urllib.request.Request(url, data, {"Content-Type": "text/plain", **(headers or {})}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return Answer(answer.status, dict(answer.headers), answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, dict(error.headers), error.read())


class RunningServer:
    """A `minserve start` in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, runtime: Path) -> None:
        self.process = process
        self.runtime = runtime
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until_started(self) -> None:
        """Waits for the summary at the end of the start."""
        until(
            lambda: "\nmanagement  " in self.log or self.process.poll() is not None, START_TIMEOUT_S, self.log[-3000:]
        )
        assert self.process.poll() is None, self.log

    def _url(self, name: str) -> str:
        found = re.search(rf"{name} on (http://[0-9.:]+\d)", self.log)
        assert found, self.log
        return found[1]

    @property
    def inference(self) -> str:
        return self._url("inference")

    @property
    def management(self) -> str:
        return self._url("management")

    def predict(self, model: str, body: bytes | str = b"", **options: object) -> Answer:
        return call(f"{self.inference}/predictions/{model}", body, **options)  # type: ignore[arg-type]

    def predict_json(self, model: str, value: object, **options: object) -> Answer:
        return self.predict(model, json.dumps(value), headers={"Content-Type": "application/json"}, **options)

    def describe(self, model: str) -> dict[str, object]:
        answer = call(f"{self.management}/models/{model}").json
        assert isinstance(answer, list)
        description: dict[str, object] = answer[0]
        return description

    def workers(self, model: str) -> list[dict[str, object]]:
        workers = self.describe(model)["workers"]
        assert isinstance(workers, list)
        return workers

    def pids(self, model: str, worker: int = 0) -> list[int]:
        """The ranks' pids, in rank order."""
        ranks = self.workers(model)[worker]["ranks"]
        assert isinstance(ranks, list)
        return [rank["pid"] for rank in ranks]

    def states(self, model: str) -> list[object]:
        return [worker["state"] for worker in self.workers(model)]

    def wait_until_ready(self, model: str, restarts: int | None = None, timeout: float = 60.0) -> None:
        """Waits until the first worker is READY, after that many restarts."""

        def ready() -> bool:
            worker = self.workers(model)[0]
            return worker["state"] == "READY" and restarts in (None, worker["restarts"])

        until(ready, timeout, f"{model} READY")

    def restarts(self, model: str) -> int:
        restarts = self.workers(model)[0]["restarts"]
        assert isinstance(restarts, int)
        return restarts

    def family(self) -> list[psutil.Process]:
        """Every process that descends from the server."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        """Drains and ends it; the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(END_TIMEOUT_S)


def gone(processes: list[psutil.Process]) -> bool:
    """Whether none of them runs any more. A zombie does not run: who its parent is, is not the test's affair."""
    return not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def server(
    *models: Path, options: tuple[str, ...] = (), environ: Mapping[str, str] | None = None, started: bool = True
) -> Iterator[RunningServer]:
    """A server of these model directories. At the end it is stopped, and nothing of it may be left."""
    home = Path(tempfile.mkdtemp(prefix="ms"))
    store = home / "store"
    store.mkdir()
    for model in models:
        (store / model.name).symlink_to(model)
    arguments = ["--model-store", str(store), "--inference-port", "0", "--management-port", "0", *options]
    log = home / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "minserve", "start", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "XDG_RUNTIME_DIR": str(home), **(environ or {})},
        )
    running = RunningServer(process, log, home)
    family: list[psutil.Process] = []
    try:
        if started:
            running.wait_until_started()
        yield running
        if process.poll() is None:
            family = running.family()
        assert running.stop() in (0, -signal.SIGKILL), running.log
        until(lambda: gone(family), 5.0, "the ranks' end")
        assert process.returncode or not list(home.glob("minserve-*")), "the runtime directory is left"
    finally:
        if process.poll() is None:
            family = running.family()
            process.kill()
            process.wait()
        for orphan in family:
            if orphan.is_running():
                orphan.kill()
        shutil.rmtree(home, ignore_errors=True)
