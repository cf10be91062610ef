"""Starts and ends of real servers: what operators see when a load fails, and that an end leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.servers import DEMO_MODELS, GONE_S, MODELS, Answer, RunningServer, call, gone, server, until


@pytest.fixture
def two_workers(tmp_path: Path) -> Path:
    """echo-tp with two workers of two ranks."""
    model = tmp_path / "pair"
    shutil.copytree(DEMO_MODELS / "echo-tp", model)
    config = model / "model-config.yaml"
    config.write_text(config.read_text().replace("Workers: 1", "Workers: 2"))
    return model


def endpoints(running: RunningServer, model: str) -> list[str]:
    ranks = [worker["ranks"] for worker in running.workers(model)]
    return [rank["endpoint"] for group in ranks if isinstance(group, list) for rank in group]


@pytest.fixture(scope="module")
def never_ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Three models that cannot be started, each in its way and all at one time, beside one that serves."""
    late = tmp_path_factory.mktemp("late") / "late"
    shutil.copytree(DEMO_MODELS / "echo-tp", late)
    with (late / "model-config.yaml").open("a") as config:
        # Ranks that are forked may connect within that time.
        config.write("maxRetryTimeoutInSec: 0\nminserve: {acceptTimeout: 0.2, launcher: torchrun}\n")
    with server(MODELS / "badload", MODELS / "waits", late, DEMO_MODELS / "echo") as running:
        yield running


def test_a_load_that_fails_on_one_rank_is_told_and_given_up(never_ready: RunningServer) -> None:
    running = never_ready
    until(lambda: "unhealthy" in running.describe("badload"), 30, "the verdict")
    began = time.monotonic()
    answer = running.predict("badload", "x")
    assert time.monotonic() - began < 10.0  # refused, not queued
    assert answer.status == 503
    assert "rank 1" in answer.message
    assert "cannot load: FileNotFoundError: no weights for rank 1" in answer.message
    worker = running.workers("badload")[0]
    assert (worker["state"], worker["status"]) == ("FAILED", "UNLOADING")
    assert worker["restarts"] != 0
    assert "looking for weights" in str(worker["lastLines"])
    assert "badload/0 rank 1 | looking for weights" in running.log
    assert 'raise FileNotFoundError("no weights for rank 1")' in running.log  # the traceback
    assert call(f"{running.inference}/ping").status == 500
    assert running.predict("echo", "still here").body == b"still here"


def test_a_load_that_never_ends_is_ended_and_says_which_rank(never_ready: RunningServer) -> None:
    until(lambda: "unhealthy" in never_ready.describe("waits"), 60, "the verdict")
    reason = str(never_ready.describe("waits")["unhealthy"])
    assert re.search(r"not loaded within 20 s \(rank 1 \(pid \d+\): weights 3 of 12\)", reason)


def test_ranks_that_do_not_connect_in_time_are_named(never_ready: RunningServer) -> None:
    until(lambda: "unhealthy" in never_ready.describe("late"), 30, "the verdict")
    assert "rank 0, 1 did not connect within 0.2 s" in str(never_ready.describe("late")["unhealthy"])


def test_two_workers_of_two_ranks_have_four_endpoints(two_workers: Path) -> None:
    with server(two_workers) as running:
        until(lambda: running.states("pair") == ["READY", "READY"], 60)
        names = [endpoint.rpartition("/")[2] for endpoint in endpoints(running, "pair")]
        assert names == ["worker.0", "worker.1", "worker.2", "worker.3"]
        assert len({*running.pids("pair", 0), *running.pids("pair", 1)}) == 4


def test_tcp_endpoints_serve_as_well(two_workers: Path) -> None:
    with (two_workers / "model-config.yaml").open("a") as config:
        config.write("minserve: {socketType: tcp}\n")
    with server(two_workers) as running:
        until(lambda: running.states("pair") == ["READY", "READY"], 60)
        assert running.predict("pair", "over tcp").body == b"over tcp"
        ports = [int(endpoint.removeprefix("tcp:127.0.0.1:")) for endpoint in endpoints(running, "pair")]
        assert ports[1] == ports[0] + 1
        assert ports[3] == ports[2] + 1
        assert len(set(ports)) == 4
        large = os.urandom(3_000_000)
        answer = running.predict("pair", large, headers={"Content-Type": "application/octet-stream"})
        assert answer.body == large


def test_sigterm_lets_a_request_finish() -> None:
    with server(MODELS / "slow") as running:
        answers: list[Answer] = []
        thread = threading.Thread(target=lambda: answers.append(running.predict("slow", "1")))
        thread.start()
        until(lambda: "BUSY" in running.states("slow"))
        assert running.stop() == 0
        thread.join(10)
        assert answers[0].status == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_ends_in_0(number: signal.Signals) -> None:
    with server(MODELS / "waits", started=False) as running:
        until(lambda: "weights 3 of 12" in running.log, 90, "loading")
        family = running.family()
        running.process.send_signal(number)
        assert running.process.wait(10) == 0
        until(lambda: gone(family), GONE_S)


def test_sigterm_right_after_the_start_ends_in_0() -> None:
    with server(MODELS / "waits", started=False) as running:
        until(lambda: "inference on" in running.log, 90, "listening")
        running.process.terminate()
        assert running.process.wait(10) == 0


def test_a_killed_server_takes_its_ranks_along_and_the_next_one_starts() -> None:
    with server(MODELS / "faulty") as running:
        body = '{"do": "hang", "ranks": [1]}'  # rank 0 sits in the collective

        def cut_off() -> None:
            with pytest.raises(OSError, match=r"reset|closed|refused"):
                running.predict("faulty", body)

        thread = threading.Thread(target=cut_off)
        thread.start()
        until(lambda: running.states("faulty") == ["BUSY"])
        family = running.family()
        assert len(family) == 5  # the agent, two ranks, the warm launcher and the guardian
        running.process.kill()
        running.process.wait()
        thread.join(10)
        left = set(running.runtime.glob("minserve-*"))
        ports = ("--inference-port", running.inference.rpartition(":")[2])
        with server(DEMO_MODELS / "echo", options=ports, environ={"XDG_RUNTIME_DIR": str(running.runtime)}) as second:
            assert second.predict("echo", "hello").body == b"hello"
            until(lambda: gone(family), GONE_S, "the orphans' end, and the guardian's")
            assert not left & set(running.runtime.glob("minserve-*"))
            shutil.rmtree(running.runtime / "store")  # nothing but the store and the log may be left for the fixture


@pytest.mark.parametrize("moment", [0.3, 0.6, 0.9, 1.2])
def test_a_server_killed_in_the_middle_of_a_start_leaves_no_rank(moment: float) -> None:
    with server(DEMO_MODELS / "echo-tp", started=False) as running:
        until(lambda: "inference on" in running.log, 90, "listening")
        family: dict[int, psutil.Process] = {}
        deadline = time.monotonic() + moment  # the moments are spread over what torchrun and the ranks do at start
        while time.monotonic() < deadline:
            family |= {one.pid: one for one in running.family()}
        running.process.kill()
        running.process.wait()
        until(lambda: gone(list(family.values())), GONE_S, "the end of all")


def test_two_servers_of_one_user_do_not_meet() -> None:
    with server(DEMO_MODELS / "echo") as first:
        shared = {"XDG_RUNTIME_DIR": str(first.runtime)}
        with server(DEMO_MODELS / "echo", environ=shared) as second:
            assert first.predict("echo", "one").body == b"one"
            assert second.predict("echo", "two").body == b"two"
            stop = minserve("stop", first.runtime)
            assert stop.returncode == 1
            assert "--pid" in stop.stderr
            assert minserve("stop", first.runtime, "--pid", str(second.process.pid)).returncode == 0
            assert second.process.wait(10) == 0
        assert first.predict("echo", "one").body == b"one"


def minserve(verb: str, runtime: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minserve", verb, *arguments]
    environ = {**os.environ, "MINSERVE_RUNTIME_DIR": str(runtime)}  # servers that really run here are left alone
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, cwd=cwd, check=False)


def test_detached_start_status_and_stop(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    runtime = tmp_path_factory.mktemp("r")  # sockets' addresses have 107 bytes
    store = tmp_path / "store"
    store.mkdir()
    (store / "echo").symlink_to(DEMO_MODELS / "echo")
    ports = ["--inference-port", "0", "--management-port", "0", "--metrics-port", "0"]
    started = minserve("start", runtime, "--model-store", str(store), "--detach", *ports, cwd=tmp_path)
    assert started.returncode == 0, started.stderr
    pid = int(started.stdout.partition("pid ")[2].partition(",")[0])
    try:
        status = minserve("status", runtime, "--json")
        assert status.returncode == 0, status.stderr
        described = json.loads(status.stdout)
        assert [model["modelName"] for model in described] == ["echo"]
        until(lambda: "READY" in minserve("status", runtime).stdout)
        stopped = minserve("stop", runtime)
        assert (stopped.returncode, stopped.stdout) == (0, f"minserve: stopped pid {pid}\n")
        until(lambda: not psutil.pid_exists(pid))
    finally:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)
    assert "no server is running" in minserve("stop", runtime).stdout
