import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from minserve.testing import StartFailed, until
from minserve.testing.running import RunningServer, running_server

# In the place of `minserve start`: tells its environment, starts a child that leaves its session, and does as it is told.
STAND_IN = """
import json, os, signal, subprocess, sys, time
store = sys.argv[sys.argv.index("--model-store") + 1]
orders = os.listdir(store)
told = {name: os.environ.get(name) for name in ("XDG_RUNTIME_DIR", "MINSERVE_RUNTIME_DIR", "TMPDIR", "EXTRA")}
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(json.dumps({**told, "child": child.pid}), flush=True)
if "fails" in orders:
    sys.exit("no model store")
if "deaf" in orders:
    count = []
    signal.signal(signal.SIGTERM, lambda *_: count.append(1) or (len(count) == 3 and os._exit(0)))
print("x inference on http://127.0.0.1:1, management on http://127.0.0.1:2\\nmanagement  there", flush=True)
while True:
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "minserve"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setenv("MINSERVE_RUNTIME_DIR", "/somewhere/else")


def child_of(server: RunningServer) -> int:
    until(lambda: '"child"' in server.log)
    found = re.search(r'"child": (\d+)', server.log)
    assert found
    return int(found[1])


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_server_has_its_own_folder_and_nothing_of_it_is_left() -> None:
    with running_server(lambda store: (store / "m").mkdir(), environ={"EXTRA": "1"}) as server:
        server.wait_until_started()
        child = child_of(server)
        assert (server.inference, server.management) == ("http://127.0.0.1:1", "http://127.0.0.1:2")
        assert f'"XDG_RUNTIME_DIR": "{server.runtime}"' in server.log
        assert f'"TMPDIR": "{server.runtime}/tmp", "EXTRA": "1"' in server.log
        assert '"MINSERVE_RUNTIME_DIR": null' in server.log
        assert runs(child)
    assert server.process.returncode is not None
    assert not runs(child)
    assert not server.runtime.exists()


def test_a_server_that_ends_at_once_is_told_with_its_last_words() -> None:
    with (
        running_server(lambda store: (store / "fails").mkdir()) as server,
        pytest.raises(StartFailed, match=r"the server exited with 1:\n(.*\n)*no model store"),
    ):
        server.wait_until_started()


def test_a_start_that_takes_too_long_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "minserve/__main__.py").write_text("import time; time.sleep(600)")
    with (
        running_server(lambda store: None) as server,
        pytest.raises(StartFailed, match=r"the server has not started within 0\.1 s"),
    ):
        server.wait_until_started(0.1)


def test_a_server_that_drains_for_long_is_hurried() -> None:
    with running_server(lambda store: (store / "deaf").mkdir()) as server:
        server.wait_until_started()
        assert server.stop(patience=0.05) == 0


def test_an_exception_leaves_nothing_either() -> None:
    children = []

    def fail() -> None:
        with running_server(lambda store: None) as server:
            children.append(child_of(server))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not runs(children[0])


def test_other_processes_are_left_alone() -> None:
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, "MINSERVE_TESTING": "/another"}) as other:
        with running_server(lambda store: None):
            pass
        assert other.poll() is None
        other.communicate()
    assert other.returncode == 0


def test_waiting_ends_with_the_condition_or_the_time() -> None:
    looks = iter([False, False, True])
    until(lambda: next(looks))
    with pytest.raises(AssertionError, match=r"not within 0\.05 s: the end of the world"):
        until(lambda: False, 0.05, "the end of the world")
