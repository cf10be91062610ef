"""The end of a server, in order and not, in every state; and what must neither be left behind nor hold it up."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import psutil
import pytest

from tests.integration.servers import (
    DEMO_MODELS,
    GONE_S,
    MODELS,
    Answer,
    RunningServer,
    call,
    gone,
    server,
    state_of,
    until,
)

JSON = {"Content-Type": "application/json"}
SIGTERM, SIGINT, SIGHUP, SIGKILL = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """The model `helpers` as one plain process, which starts in a fraction of a second."""
    model = tmp_path / "single"
    shutil.copytree(MODELS / "helpers", model)
    (model / "model-config.yaml").write_text("maxBatchDelay: 0\nminserve: {backoff: [0], exitTimeout: 2}\n")
    return model


@contextmanager
def asking(running: RunningServer, model: str, *orders: dict[str, object]) -> Iterator[list[Answer]]:
    """Sends each order in a thread of its own, and waits until all are in flight; in the end, until all are answered."""
    answers: list[Answer] = []

    def ask(order: dict[str, object]) -> None:
        answers.append(running.predict_json(model, order))

    threads = [threading.Thread(target=ask, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    until(lambda: "BUSY" in running.states(model))
    yield answers
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def helpers(running: RunningServer) -> list[psutil.Process]:
    """What ranks have started and is still there, wherever in the tree of processes."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.name() == "sleep" and str(running.runtime) in process.environ().get("MINSERVE_DIRECTORY", ""):
                found.append(process)
        except psutil.Error:
            continue
    return found


def ends_soon(running: RunningServer) -> None:
    """Long before the 30 s of a drain are over, though the machine may be busy with another file's servers."""
    assert running.process.wait(15) == 0, running.log
    assert not list(running.runtime.glob("minserve-*"))


# ── signals ──


def test_a_server_that_was_told_to_stop_is_not_ready_and_serves_until_the_delay_is_over(
    single: Path, tmp_path: Path
) -> None:
    (tmp_path / "server.yaml").write_text("shutdown_delay: 3\n")
    with server(single, options=("--config", str(tmp_path / "server.yaml"))) as running:
        url = running.inference
        assert call(f"{url}/readyz").status == 200
        began = time.monotonic()
        running.process.terminate()
        until(lambda: call(f"{url}/readyz").status == 503)
        for _ in range(5):
            assert running.predict_json("single", {"do": "echo", "text": "still here"}).body == b"still here"
        ends_soon(running)
        assert time.monotonic() - began > 3


def test_a_second_signal_skips_the_delay_and_still_lets_finish_what_is_in_flight(single: Path, tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text("shutdown_delay: 600\n")
    with (
        server(single, options=("--config", str(tmp_path / "server.yaml"))) as running,
        asking(running, "single", {"do": "sleep", "seconds": 1}) as answers,
    ):
        running.process.terminate()
        until(lambda: "stopping in 600 s" in running.log)
        running.process.send_signal(SIGINT)
        ends_soon(running)
    assert [answer.status for answer in answers] == [200]


@pytest.mark.parametrize("second", [SIGTERM, SIGINT])
def test_a_second_signal_while_draining_answers_what_is_in_flight_and_ends_at_once(
    single: Path, second: signal.Signals
) -> None:
    (single / "model-config.yaml").write_text("maxBatchDelay: 0\nminserve: {exitTimeout: 30}\n")
    orders = [{"do": "sleep", "seconds": 600}] * 3  # one in flight, two in the queue
    with server(single) as running, asking(running, "single", *orders) as answers:
        running.process.terminate()
        until(lambda: len(answers) == 2, 5)  # refused
        assert "BUSY" in running.states("single") or "DRAINING" in running.states("single")
        running.process.send_signal(second)
        ends_soon(running)
    assert [answer.status for answer in answers] == [503] * 3


def test_a_terminal_that_closes_hurries_nobody(single: Path) -> None:
    before = signal.signal(SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which the server would obey
    try:
        with server(single) as running, asking(running, "single", {"do": "sleep", "seconds": 1}) as answers:
            for _ in range(3):
                running.process.send_signal(SIGHUP)
                time.sleep(0.1)  # each a signal of its own
            ends_soon(running)
    finally:
        signal.signal(SIGHUP, before)
    assert [answer.status for answer in answers] == [200]


def test_nohup_is_obeyed(single: Path) -> None:
    before = signal.signal(SIGHUP, signal.SIG_IGN)
    try:
        with server(single) as running:
            running.process.send_signal(SIGHUP)
            assert running.predict_json("single", {"do": "echo", "text": "still here"}).status == 200
            assert "stopping" not in running.log
    finally:
        signal.signal(SIGHUP, before)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("state", ["starting", "loading", "back-off", "idle", "stream"])
def test_signals_in_any_state_end_in_0_and_leave_nothing(state: str, count: int, single: Path, tmp_path: Path) -> None:
    config = single / "model-config.yaml"
    model = single
    if state == "back-off":
        config.write_text("maxRetryTimeoutInSec: 6000\nminserve: {backoff: [600]}\n")
        (single / "handler.py").write_text("raise ValueError('no weights')\n")
    elif state == "stream":
        config.write_text("maxBatchDelay: 0\nminserve: {drainTimeout: 1, exitTimeout: 2}\n")
    elif state in ("starting", "loading"):
        model = tmp_path / "waits"  # two ranks, one of which never loads
        shutil.copytree(MODELS / "waits", model)
        (model / "model-config.yaml").write_text("parallelType: tp\nparallelLevel: 2\n")
    with server(model, started=False) as running:
        chunks: list[bytes] = []
        reader = None
        if state == "stream":
            running.wait_until_started()
            reader = threading.Thread(target=read_stream, args=(running, chunks))
            reader.start()
        conditions: dict[str, Callable[[], object]] = {
            "starting": lambda: "inference on" in running.log,
            "loading": lambda: "weights 3 of 12" in running.log,
            "back-off": lambda: "restart in 600 s" in running.log,
            "idle": lambda: "\nmanagement  " in running.log,
            "stream": lambda: len(chunks) > 3,
        }
        until(conditions[state], 60)
        family = running.family()
        for number in (SIGTERM, SIGINT)[:count]:
            running.process.send_signal(number)
        ends_soon(running)
        until(lambda: gone(family), GONE_S)
        if reader is not None:
            reader.join(10)
            assert not reader.is_alive(), "a stream that was cut short has an end, too"


def read_stream(running: RunningServer, chunks: list[bytes]) -> None:
    body = json.dumps({"do": "stream", "chunks": 100_000}).encode()
    request = urllib.request.Request(f"{running.inference}/predictions/single", body, JSON)
    with contextlib.suppress(OSError, HTTPException), urllib.request.urlopen(request, timeout=60) as answer:
        while chunk := answer.readline():
            chunks.append(chunk)


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_a_signal_before_the_server_listens_ends_in_0(single: Path, number: signal.Signals) -> None:
    """From when the process has taken its signals over, SIGTERM last, which is the first that it does."""
    for moment in (0.0, 0.1, 0.2, 0.3, 0.4):
        with server(single, started=False) as running:
            until(lambda running=running: takes(running.process.pid, SIGTERM), 10)  # type: ignore[misc]
            time.sleep(moment)  # the moments are spread over the imports and the start
            running.process.send_signal(number)
            assert running.process.wait(10) == 0, running.log
            assert "Traceback" not in running.log


def takes(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) & 1 << number - 1)


def test_stop_now_does_not_wait_for_the_drain(single: Path) -> None:
    with server(single) as running, asking(running, "single", {"do": "sleep", "seconds": 600}) as answers:
        stopped = minserve("stop", running, "--now")
        assert stopped.stdout == f"minserve: stopped pid {running.process.pid}\n"
        ends_soon(running)
    assert [answer.status for answer in answers] == [503]


def minserve(verb: str, running: RunningServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "MINSERVE_RUNTIME_DIR": str(running.runtime)}
    command = [sys.executable, "-m", "minserve", verb, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, check=False)


# ── orphans ──


def test_what_a_rank_has_started_goes_with_its_group() -> None:
    with server(MODELS / "helpers") as running:
        assert running.predict_json("helpers", {"do": "helper"}).body == b"started"
        until(lambda: len(helpers(running)) == 4)
        first = helpers(running)
        os.kill(running.pids("helpers")[1], SIGKILL)
        running.wait_until_ready("helpers", restarts=1)
        until(lambda: gone(first), GONE_S, "the end of the first group's helpers")
        running.predict_json("helpers", {"do": "helper"})
        until(lambda: len(helpers(running)) == 4)
        second = helpers(running)
        assert running.stop() == 0
        until(lambda: gone(second), GONE_S, "the end of the second group's helpers")


def test_one_models_failure_leaves_the_helpers_of_another_alone(single: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(single, other)
    with server(single, other) as running:
        running.predict_json("single", {"do": "helper"})
        until(lambda: len(helpers(running)) == 2)
        mine = helpers(running)
        running.predict_json("other", {"do": "helper"})
        until(lambda: len(helpers(running)) == 4)
        os.kill(running.pids("other")[0], SIGKILL)
        until(lambda: len(helpers(running)) == 2, 5)
        running.wait_until_ready("other", restarts=1)
        assert set(helpers(running)) == set(mine)


def test_orphans_that_end_are_reaped(single: Path) -> None:
    with server(single) as running:
        for _ in range(5):
            running.predict_json("single", {"do": "helper", "seconds": 0.1})

        def zombies() -> list[psutil.Process]:
            children = psutil.Process(running.process.pid).children()
            return [child for child in children if state_of(child) == psutil.STATUS_ZOMBIE]

        until(zombies, 5, "orphans come to the server")
        until(lambda: not zombies(), 10, "and are reaped")
        assert running.restarts("single") == 0


@pytest.mark.parametrize("state", ["idle", "collective"])
def test_a_killed_server_leaves_no_process_and_no_file(state: str) -> None:
    with server(MODELS / "helpers") as running:
        running.predict_json("helpers", {"do": "helper"})
        until(lambda: len(helpers(running)) == 4)
        if state == "collective":
            threading.Thread(target=cut_off, args=(running,)).start()
            until(lambda: running.states("helpers") == ["BUSY"])
        everything = [*running.family(), *helpers(running)]
        assert len({process.pid for process in everything}) >= 8  # agent, ranks, helpers, guardian
        running.process.kill()
        running.process.wait()
        until(lambda: gone(everything), GONE_S, "the end of all")
        assert not list(running.runtime.glob("minserve-*"))


def cut_off(running: RunningServer) -> None:
    with pytest.raises(OSError, match=r"reset|closed|refused"):
        running.predict_json("helpers", {"do": "collective"})


@pytest.mark.parametrize("moment", [0.0, 0.4, 0.8])
def test_a_server_killed_while_ranks_start_leaves_no_helper(moment: float) -> None:
    with server(MODELS / "helpers", started=False, environ={"HELPERS_AT_LOAD": "1"}) as running:
        until(lambda: helpers(running), 60)
        time.sleep(moment)  # another rank starts its own about then
        everything = running.family()
        running.process.kill()
        running.process.wait()
        until(lambda: gone(everything) and not helpers(running), GONE_S, "the end of all")
        until(lambda: not list(running.runtime.glob("minserve-*")), GONE_S)


def may_unshare() -> bool:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


def sleepers(parent: psutil.Process) -> list[psutil.Process]:
    """Its children that sleep, also those that have ended and are not reaped yet."""
    found = []
    for child in parent.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child] * (child.name() == "sleep")
    return found


@pytest.mark.skipif(not may_unshare(), reason="a PID namespace needs rights that this user does not have")
def test_as_pid_1_it_reaps_serves_and_ends(single: Path) -> None:
    home = Path(tempfile.mkdtemp(prefix="ms"))
    (home / "store").mkdir()
    (home / "store" / "single").symlink_to(single)
    arguments = ["--model-store", str(home / "store"), "--inference-port", "0", "--management-port", "0"]
    arguments += ["--metrics-port", "0"]
    with (home / "log").open("wb") as log:
        namespace = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        process = subprocess.Popen(
            [*namespace, sys.executable, "-m", "minserve", "start", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "XDG_RUNTIME_DIR": str(home)},
        )
    running = RunningServer(process, home / "log", home)
    try:
        running.wait_until_started()
        (init,) = psutil.Process(process.pid).children()
        assert (home / "minserve-1").is_dir()
        running.predict_json("single", {"do": "helper", "seconds": 0.1})
        until(lambda: sleepers(init), 30)
        until(lambda: not sleepers(init), 30)
        os.kill(init.pid, SIGTERM)
        assert process.wait(30) == 0, running.log
        assert not list(home.glob("minserve-*"))
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(home)


# ── logs ──


def test_pipes_that_nobody_reads_hold_up_neither_requests_nor_the_end(single: Path) -> None:
    home = Path(tempfile.mkdtemp(prefix="ms"))
    (home / "store").mkdir()
    (home / "store" / "single").symlink_to(single)
    arguments = ["--model-store", str(home / "store"), "--inference-port", "0", "--management-port", "0"]
    arguments += ["--metrics-port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "minserve", "start", "--log-level", "debug", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "XDG_RUNTIME_DIR": str(home)},
    )
    note = home / f"minserve-{process.pid}" / "server.json"
    try:
        until(note.exists, 30)
        url = f"{json.loads(note.read_text())['inference']}/predictions/single"
        began = time.monotonic()
        for number in range(8):
            answer = call(url, json.dumps({"do": "print", "bytes": 1_000_000}), JSON)
            assert answer.body == b"printed", number
        assert time.monotonic() - began < 20
        assert psutil.Process(process.pid).memory_info().rss < 200_000_000
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()
        shutil.rmtree(home)


def test_a_rank_that_prints_without_end_starves_nobody_and_its_log_stays_bounded(single: Path, tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text("log_max_bytes: 1000000\nlog_files: 2\n")
    logs = tmp_path / "logs"
    logs.mkdir()
    options = ("--config", str(tmp_path / "server.yaml"), "--log-file", str(logs / "log"))
    with server(single, DEMO_MODELS / "echo", options=options, started=False) as running:
        note = running.runtime / f"minserve-{running.process.pid}" / "server.json"
        until(note.exists, 30)
        url = json.loads(note.read_text())["inference"]
        until(lambda: "echo: ready" in running.log, 30)  # the summary is on stdout
        assert call(f"{url}/predictions/single", '{"do": "print_for_ever"}', JSON).body == b"printing"
        until((logs / "log.2").exists, 30)
        slowest = 0.0
        for _ in range(50):
            began = time.monotonic()
            assert call(f"{url}/predictions/echo", "hello").body == b"hello"
            slowest = max(slowest, time.monotonic() - began)
        assert slowest < 2
        assert psutil.Process(running.process.pid).memory_info().rss < 200_000_000
        assert sorted(path.name for path in logs.iterdir()) == ["log", "log.1", "log.2"]
        assert all(path.stat().st_size <= 1_100_000 for path in logs.iterdir())
        running.process.terminate()
        assert running.process.wait(15) == 0
        assert "stopped" in (logs / "log").read_text()[-2000:]


# ── limits ──


def test_the_server_takes_all_descriptors_it_may_and_ranks_have_those_they_would(single: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = psutil.Process().num_fds() + 300  # which this process, whose they are, needs to start the server
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        with server(single) as running:
            limits = Path(f"/proc/{running.process.pid}/limits").read_text()
            assert int(limits.partition("Max open files")[2].split()[0]) == min(hard, 65536)
            assert running.predict_json("single", {"do": "limits"}).body == str(few).encode()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_descriptors_the_server_neither_spins_nor_dies(single: Path) -> None:
    with server(single) as running:
        process = psutil.Process(running.process.pid)
        few = process.num_fds() + 10
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (few, few))
        host, _, port = running.inference.removeprefix("http://").rpartition(":")
        clients = []
        for _ in range(100):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex((host, int(port)))
            clients.append(client)
        until(lambda: process.num_fds() >= few - 1, 5)
        before = sum(process.cpu_times()[:2])
        time.sleep(1)  # nothing is to happen in it
        assert sum(process.cpu_times()[:2]) - before < 0.5
        for client in clients:
            client.close()

        def answers() -> bool:
            try:
                return running.predict_json("single", {"do": "echo", "text": "again"}).body == b"again"
            except OSError:  # until it has noticed that the others have gone, it has no descriptor for this one
                return False

        until(answers, 10)


# ── the runtime directory ──


def test_a_runtime_directory_that_was_removed_is_made_anew_for_the_next_start(single: Path) -> None:
    with server(single) as running:
        (directory,) = running.runtime.glob("minserve-*")
        shutil.rmtree(directory)
        assert running.predict_json("single", {"do": "echo", "text": "goes on"}).body == b"goes on"
        os.kill(running.pids("single")[0], SIGKILL)
        running.wait_until_ready("single", restarts=1)
        assert running.predict_json("single", {"do": "echo", "text": "and on"}).body == b"and on"
        assert f"the runtime directory {directory} was removed" in running.log
        assert str(running.process.pid) in minserve("stop", running).stdout
        assert running.process.wait(10) == 0
        assert not directory.exists()
