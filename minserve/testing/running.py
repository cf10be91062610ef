"""A `minserve start` in a process of its own, in a folder of its own, of which nothing is left afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import psutil

from minserve.testing.answers import Answer, call

START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 40.0
HURRY_S = 1.0
GONE_S = 5.0
SHORT = 40  # bytes of a folder's path below which a socket's address has room
LAST_CHARACTERS = 3000  # of a log, in an error


class StartFailed(Exception):
    """The server, or the rank group, did not come up. The message has the rank's reason and its last lines."""


def until(condition: Callable[[], object], timeout: float = 20.0, what: str = "") -> None:
    """Polls a condition until it holds.

    Raises:
        AssertionError: it does not in time.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what or condition}"
        time.sleep(0.02)


class RunningServer:
    """The server: its process, its log, what its HTTP says.

    Attributes:
        process: of `minserve start`.
        runtime: the folder of everything that it has.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path, runtime: Path) -> None:
        self.process = process
        self.runtime = runtime
        self._log = log

    @property
    def log(self) -> str:
        """All that it has logged, its ranks' lines among it."""
        return self._log.read_text(errors="replace")

    def wait_until_started(self, timeout: float = START_TIMEOUT_S) -> None:
        """Waits for the summary at the end of the start, whether the models are READY or have failed once.

        Raises:
            StartFailed: the server has ended, or is not so far in time.
        """
        deadline = time.monotonic() + timeout
        while "\nmanagement  " not in self.log:
            ended = self.process.poll() is not None
            if ended or time.monotonic() > deadline:
                what = f"exited with {self.process.returncode}" if ended else f"has not started within {timeout:g} s"
                raise StartFailed(f"the server {what}:\n{self.log[-LAST_CHARACTERS:]}")
            time.sleep(0.02)

    def _url(self, name: str) -> str:
        found = re.search(rf"{name} on (https?://[0-9.:]+\d|unix:[^\s,]+)", self.log)
        assert found, self.log
        return found[1]

    @cached_property
    def inference(self) -> str:
        """URL of /predictions."""
        return self._url("inference")

    @cached_property
    def management(self) -> str:
        """URL of /models."""
        return self._url("management")

    @cached_property
    def metrics(self) -> str:
        """URL of /metrics."""
        return self._url("metrics")

    def predict(
        self,
        model: str,
        body: bytes | str = b"",
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        method: str | None = None,
    ) -> Answer:
        """One prediction; text/plain unless the headers say otherwise."""
        return call(f"{self.inference}/predictions/{model}", body, headers, method, timeout)

    def predict_json(self, model: str, value: object, timeout: float = 60.0) -> Answer:
        """One prediction with a JSON body."""
        return self.predict(model, json.dumps(value), {"Content-Type": "application/json"}, timeout)

    def describe(self, model: str) -> dict[str, object]:
        """What /models/{model} says of its first version."""
        answer = call(f"{self.management}/models/{model}").json
        assert isinstance(answer, list), answer
        description: dict[str, object] = answer[0]
        return description

    def workers(self, model: str) -> list[dict[str, object]]:
        """The same of its workers."""
        workers = self.describe(model)["workers"]
        assert isinstance(workers, list)
        return workers

    def pids(self, model: str, worker: int = 0) -> list[int]:
        """The ranks' pids, in rank order."""
        ranks = self.workers(model)[worker]["ranks"]
        assert isinstance(ranks, list)
        return [rank["pid"] for rank in ranks]

    def states(self, model: str) -> list[object]:
        """The workers' states."""
        return [worker["state"] for worker in self.workers(model)]

    def wait_until_ready(self, model: str, restarts: int | None = None, timeout: float = 60.0) -> None:
        """Waits until the first worker is READY, after that many restarts."""

        def ready() -> bool:
            worker = self.workers(model)[0]
            return worker["state"] == "READY" and restarts in (None, worker["restarts"])

        until(ready, timeout, f"{model} READY")

    def restarts(self, model: str) -> int:
        """How often the first worker was started again."""
        restarts = self.workers(model)[0]["restarts"]
        assert isinstance(restarts, int)
        return restarts

    def family(self) -> list[psutil.Process]:
        """Every process that descends from the server."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, patience: float = END_TIMEOUT_S) -> int:
        """Ends it, and returns its exit code.

        Args:
            patience: seconds after which it is not to wait any longer for what is in flight.
        """
        if self.process.poll() is None:
            self.process.terminate()
        deadline = time.monotonic() + END_TIMEOUT_S
        wait = patience
        while time.monotonic() + wait < deadline:
            try:
                return self.process.wait(wait)
            except subprocess.TimeoutExpired:
                self.process.terminate()  # each signal after the first cuts one stage of the end short
                wait = HURRY_S
        return self.process.wait(max(0.0, deadline - time.monotonic()))


@contextmanager
def running_server(
    fill: Callable[[Path], None], options: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """Spawns a server, which has not started yet. At the end it is killed, and nothing of it is left.

    Args:
        fill: puts models into the model store, an empty folder.
        options: more for `minserve start`.
        environ: more for its environment.
    """
    temporary = tempfile.gettempdir()
    home = Path(tempfile.mkdtemp(prefix="ms", dir=temporary if len(os.fsencode(temporary)) < SHORT else "/tmp"))
    try:
        for folder in (home / "store", home / "tmp"):
            folder.mkdir()
        fill(home / "store")
        arguments = ["--model-store", str(home / "store"), "--inference-port", "0", "--management-port", "0"]
        arguments += ["--metrics-port", "0", *options]
        places = {"XDG_RUNTIME_DIR": str(home), "TMPDIR": str(home / "tmp")}
        mark = {"MINSERVE_TESTING": str(home)}
        log = home / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "minserve", "start", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**_without("MINSERVE_RUNTIME_DIR"), **places, **(environ or {}), **mark},
            )
        try:
            yield RunningServer(process, log, home)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            _end_all_with(mark)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _without(name: str) -> dict[str, str]:
    """The environment without what would take precedence over places of the server's own."""
    return {key: value for key, value in os.environ.items() if key != name}


def _end_all_with(mark: Mapping[str, str]) -> None:
    """Kills whatever has inherited these variables: ranks, and what handlers have started, whoever is its parent now."""
    killed = []
    for process in psutil.process_iter():
        try:
            if mark.items() <= process.environ().items():
                process.kill()
                killed.append(process)
        except (psutil.Error, OSError):  # not ours, or gone
            continue
    psutil.wait_procs(killed, timeout=GONE_S)
