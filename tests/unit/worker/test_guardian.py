import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minserve.worker import guardian
from minserve.worker.guardian import Guardian


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "minserve-1"
    path.mkdir()
    (path / "worker.0").touch()
    return path


@pytest.fixture
def watching(directory: Path) -> Iterator[Guardian]:
    started = Guardian(directory)
    yield started
    started._process.kill()
    started._process.wait()
    if started._process.stdin is not None:
        started._process.stdin.close()


Start = Callable[[Path], subprocess.Popen[bytes]]


@pytest.fixture
def rank() -> Iterator[Start]:
    """Starts a process as a rank would: far from its parent, with its run directory in the environment."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(run_directory: Path) -> subprocess.Popen[bytes]:
        environ = {**os.environ, "MINSERVE_DIRECTORY": str(run_directory)}
        processes.append(subprocess.Popen(["sleep", "600"], env=environ, start_new_session=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def hang_up(watching: Guardian) -> None:
    """What the kernel does when the server is killed."""
    assert watching._process.stdin is not None
    watching._process.stdin.close()


def test_when_the_server_is_gone_all_that_its_ranks_have_started_is_killed_and_its_directory_removed(
    watching: Guardian, directory: Path, rank: Start
) -> None:
    mine = [rank(directory / "m1" / "0.r"), rank(directory / "m2" / "1.r")]
    others = rank(Path(f"{directory}2") / "m1" / "0.r")
    began = time.monotonic()
    hang_up(watching)
    assert [process.wait(30) for process in mine] == [-signal.SIGKILL] * 2
    assert watching._process.wait(30) == 0
    assert time.monotonic() - began < 10
    assert not directory.exists()
    assert others.poll() is None


def test_directories_that_go_with_it_are_removed_too_and_who_works_in_them_is_killed(
    directory: Path, rank: Start
) -> None:
    models = directory.with_name("minserve-1.models")
    models.mkdir()
    watching = Guardian(directory, models)
    pip = rank(models / "x1")
    hang_up(watching)
    assert pip.wait(30) == -signal.SIGKILL
    assert watching._process.wait(30) == 0
    assert not models.exists()


def test_what_was_just_being_started_is_found_too(watching: Guardian, directory: Path, rank: Start) -> None:
    hang_up(watching)
    assert rank(directory / "m1" / "0.r").wait(30) == -signal.SIGKILL


def test_a_server_that_says_farewell_is_trusted(watching: Guardian, directory: Path, rank: Start) -> None:
    process = rank(directory / "m1" / "0.r")
    watching.dismiss()
    assert watching._process.returncode == 0
    assert process.poll() is None
    assert directory.exists()


def test_it_leaves_the_signals_to_the_server(watching: Guardian) -> None:
    ignored = sum(1 << number - 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

    def mask() -> int:
        status = Path(f"/proc/{watching.pid}/status").read_text()
        return int(status.partition("SigIgn:")[2].split()[0], 16)

    deadline = time.monotonic() + 30
    while mask() & ignored != ignored:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert os.getsid(watching.pid) == watching.pid, "neither Ctrl-C nor what kills the server's group reaches it"


def test_it_holds_nothing_of_the_servers(directory: Path) -> None:
    with (directory / "worker.0").open() as file:
        os.set_inheritable(file.fileno(), True)
        watching = Guardian(directory)
    links = [os.readlink(path) for path in Path(f"/proc/{watching.pid}/fd").iterdir()]
    assert not [link for link in links if "worker.0" in link]
    assert os.readlink(f"/proc/{watching.pid}/cwd") == "/"
    watching.dismiss()


def test_one_that_somebody_has_stopped_does_not_hold_up_the_servers_end(
    watching: Guardian, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guardian, "FAREWELL_S", 0.1)
    os.kill(watching.pid, signal.SIGSTOP)
    watching.dismiss()
    assert watching._process.returncode == -signal.SIGKILL


def test_one_that_was_killed_is_no_error(watching: Guardian) -> None:
    os.kill(watching.pid, signal.SIGKILL)
    watching._process.wait()
    watching.dismiss()


def test_the_program_needs_nothing_but_the_standard_library() -> None:
    """`-S` leaves out site-packages, and with them minserve."""
    script = f"import sys; sys.argv = ['', '/nonexistent']; exec(open({guardian.__file__!r}).read())"
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], input=b"farewell", capture_output=True, timeout=30, check=False
    )
    assert (result.returncode, result.stderr) == (0, b"")
