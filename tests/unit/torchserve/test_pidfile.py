import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest

from minserve.errors import StartupError
from minserve.torchserve.pidfile import PID_FILE, claimed, running_pid


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / PID_FILE


def test_of_two_servers_that_start_at_once_one_is_refused_and_leaves_the_file_alone(file: Path) -> None:
    file.write_text("1234567890 of an earlier server")
    with claimed():
        with pytest.raises(StartupError, match="already running"), claimed():
            pass
        assert file.read_text() == str(os.getpid())
        assert running_pid() == os.getpid()
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert not file.exists()
    with claimed():
        assert running_pid() == os.getpid()


def test_a_file_that_was_removed_just_before_the_lock_was_had_is_not_taken(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = fcntl.fcntl
    locks: list[int] = []

    def removed_before(descriptor: TextIO, command: int, lock: bytes) -> object:
        if not locks:
            file.unlink()
        locks.append(command)
        return control(descriptor, command, lock)

    monkeypatch.setattr("fcntl.fcntl", removed_before)
    with claimed():
        assert file.read_text() == str(os.getpid())
    assert len(locks) == 2


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_somebody_has_put_in_its_place_holds_up_nothing(file: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "link":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    assert running_pid() is None
    with pytest.raises(StartupError, match=f"{file}: .*; TMPDIR chooses another folder"), claimed():
        pass
    assert os.path.lexists(file)


@pytest.mark.parametrize(
    "text", ["", "-1", "0", "x", "9" * 100, str(2**31), pytest.param(str(os.getpid()), id="our own")]
)
def test_a_pid_of_no_server_is_none(file: Path, text: str) -> None:
    file.write_text(text)
    assert running_pid() is None


def test_an_old_pid_that_another_program_has_by_now_is_no_server_unless_it_is_a_torchserve(file: Path) -> None:
    for name, known in (("minserve torchserve", False), ("org.pytorch.serve.ModelServer", True)):
        with subprocess.Popen([sys.executable, "-c", "input()", *name.split()], stdin=subprocess.PIPE) as process:
            file.write_text(str(process.pid))
            assert running_pid() == (process.pid if known else None)
            process.communicate(b"\n")
        assert running_pid() is None
