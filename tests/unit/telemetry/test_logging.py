import io
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minserve.telemetry.logging import LogFile, Writer, configure

Configure = Callable[..., Writer]


@pytest.fixture
def log() -> Iterator[Configure]:
    """`configure`, which changes what is the whole process's; it is put back."""
    root, ours = logging.getLogger(), logging.getLogger("minserve")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    writers: list[Writer] = []

    def start(*arguments: object) -> Writer:
        writers.append(configure(*arguments))  # type: ignore[arg-type]
        return writers[-1]

    yield start
    for writer in writers:
        writer.close()
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


class Blocked:
    """A reader that takes nothing until it is told to."""

    def __init__(self) -> None:
        self.writing = threading.Event()
        self.go_on = threading.Event()
        self.written: list[str] = []

    def __call__(self, text: str) -> None:
        self.writing.set()
        assert self.go_on.wait(30)
        self.written.append(text)

    def wait(self) -> None:
        assert self.writing.wait(30)


@pytest.fixture
def blocked() -> Iterator[Blocked]:
    reader = Blocked()
    yield reader
    reader.go_on.set()


# ── what is logged ──


@pytest.mark.parametrize(
    ("level", "shown"),
    [("debug", "debug info warning"), ("info", "info warning"), ("warning", "warning"), ("error", "")],
)
def test_the_level_is_minserves_own(log: Configure, level: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    writer = log(level)
    for name in ("debug", "info", "warning"):
        getattr(logging.getLogger("minserve.worker"), name)(f"ours: {name}")
        getattr(logging.getLogger("aiohttp"), name)(f"theirs: {name}")
    writer.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition("ours: ")[2] for line in lines if "ours" in line] == shown.split()
    assert [line.rpartition("theirs: ")[2] for line in lines if "theirs" in line] == ["warning"]


def test_lines_go_to_whatever_stderr_is_at_the_moment(log: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = log("info")
    live = io.StringIO()
    monkeypatch.setattr(sys, "stderr", live)
    logging.getLogger("minserve").info("above the table")
    writer.close()
    assert live.getvalue().endswith(" INFO    above the table\n")


def test_configuring_twice_does_not_double_the_lines(log: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    log("info")
    writer = log("info")
    logging.getLogger("minserve").info("once")
    writer.close()
    assert capsys.readouterr().err.count("once") == 1


def test_an_exception_is_told_with_its_traceback(log: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    writer = log("info")
    try:
        raise ValueError("the reason")
    except ValueError:
        logging.getLogger("minserve").exception("it failed")
    writer.close()
    *_, last = err = capsys.readouterr().err.splitlines()
    assert err[0].endswith("ERROR   it failed")
    assert last == "ValueError: the reason"


def test_a_clients_words_in_an_exception_are_no_line_of_the_log(
    log: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = log("info")
    logging.getLogger("minserve").error("no\r\n2026-11-25 00:00:00,000 INFO    forged")
    writer.close()
    assert capsys.readouterr().err.endswith("ERROR   no\\x0d\n  2026-11-25 00:00:00,000 INFO    forged\n")


def test_a_log_line_that_cannot_be_formatted_says_where_and_raises_nothing(
    log: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = log("info")
    logging.getLogger("minserve").info("%d ranks", "two")
    writer.close()
    err = capsys.readouterr().err
    assert "TypeError" in err
    assert "in the log line '%d ranks' ('two',)" in err


def test_pythons_warnings_are_part_of_the_log(log: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    writer = log("info")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)  # catch_warnings has put it back
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(False)
    writer.close()
    assert "DeprecationWarning: old" in capsys.readouterr().err


# ── nobody waits ──


def test_a_reader_that_takes_nothing_keeps_nobody_waiting_and_later_the_loss_is_told(blocked: Blocked) -> None:
    writer = Writer(blocked, limit=100)
    writer.log("first")
    blocked.wait()
    for number in range(50):
        writer.log(f"line {number:04}")
    writer.log("two\nmore")
    blocked.go_on.set()
    writer.close(30)
    kept = blocked.written[1:-1]
    assert blocked.written[0] == "first\n"
    assert kept == [f"line {number:04}\n" for number in range(len(kept))]
    assert 0 < len(kept) <= 10
    assert f" WARNING {50 - len(kept) + 2} log lines dropped: " in blocked.written[-1]


def test_once_there_is_room_again_lines_come_through_again(blocked: Blocked) -> None:
    writer = Writer(blocked, limit=10)
    writer.log("first")
    blocked.wait()
    writer.log("dropped, for it is too long")
    writer.log("kept")
    blocked.go_on.set()
    writer.close(30)
    assert [text for text in blocked.written if "dropped:" not in text] == ["first\n", "kept\n"]


def test_one_text_larger_than_the_limit_is_written_if_nothing_else_waits(blocked: Blocked) -> None:
    blocked.go_on.set()
    writer = Writer(blocked, limit=10)
    writer.log("x" * 1000)
    writer.close(30)
    assert blocked.written == ["x" * 1000 + "\n"]


def test_the_end_does_not_wait_for_a_reader_that_takes_nothing(blocked: Blocked) -> None:
    writer = Writer(blocked)
    writer.log("first")
    blocked.wait()
    writer.log("second")
    writer.close(0.01)
    writer.close(30)  # has been closed
    writer.log("later")
    blocked.go_on.set()
    writer._thread.join(30)
    assert blocked.written == ["first\n", "second\n"]


def test_a_reader_that_has_gone_is_no_error() -> None:
    gone = []

    def raises(text: str) -> None:
        gone.append(text)
        raise BrokenPipeError

    writer = Writer(raises)
    writer.log("one")
    writer.log("two")
    writer.close(30)
    assert gone == ["one\n", "two\n"]


# ── stdout, stderr ──


def test_what_is_said_goes_to_stdout(log: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    writer = log("info")
    writer.say("ready\nto serve")
    writer.close()
    assert capsys.readouterr() == ("ready\nto serve\n", "")


def in_a_child(script: str, **streams: int) -> int:
    """Runs Python with the given stdout and stderr; its exit code."""
    child = subprocess.Popen([sys.executable, "-c", script], **streams)  # type: ignore[call-overload]
    return int(child.wait(30))


FLOOD = """
import logging
from minserve.telemetry.logging import configure
writer = configure("info")
for number in range(2000):
    logging.getLogger("minserve").info("%s", "x" * 1000)
writer.say("said")
writer.close(0.2)
"""


@pytest.mark.parametrize("blocking", [True, False])
def test_a_process_whose_pipes_nobody_reads_ends_in_order(blocking: bool) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, blocking)
    try:
        assert in_a_child(FLOOD, stdout=writer, stderr=writer) == 0
        assert len(os.read(reader, 1 << 20)) > 40_000
    finally:
        os.close(reader)
        os.close(writer)


def test_a_pipe_that_others_have_made_non_blocking_loses_nothing() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    received = bytearray()

    def read() -> None:
        while data := os.read(reader, 65536):
            received.extend(data)

    thread = threading.Thread(target=read)
    thread.start()
    code = in_a_child(FLOOD.replace("0.2", "20"), stdout=writer, stderr=writer)
    os.close(writer)
    thread.join(30)
    os.close(reader)
    assert code == 0
    assert received.count(b"\n") == 2001
    assert received.endswith(b"said\n")


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-"])
def test_without_stdout_or_stderr_nothing_is_written_to_what_has_their_number(redirect: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    script = f"held = [open({str(victim)!r}, 'w') for _ in range(3)]\n{FLOOD}"
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-c", script]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30).returncode == 0
    assert victim.read_text() == ""


# ── a file ──


def test_the_log_can_go_to_a_file(log: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    path.write_text("of yesterday\n")
    writer = log("info", path)
    logging.getLogger("minserve").info("of today")
    writer.close()
    first, second = path.read_text().splitlines()
    assert first == "of yesterday"
    assert second.endswith("INFO    of today")
    assert capsys.readouterr() == ("", "")


def test_a_file_that_cannot_be_opened_is_an_error_of_the_caller(log: Configure, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        log("info", tmp_path / "none" / "log")


def test_a_full_file_is_set_aside_and_the_oldest_goes(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "log", 20, 2)
    for number in range(8):
        file.write(f"line {number:03}\n")  # 9 bytes: two fit
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "log": "line 006\nline 007\n",
        "log.1": "line 004\nline 005\n",
        "log.2": "line 002\nline 003\n",
    }


def test_what_the_file_held_before_counts(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("x" * 19)
    LogFile(tmp_path / "log", 20, 1).write("new\n")
    assert (tmp_path / "log").read_text() == "new\n"
    assert (tmp_path / "log.1").read_text() == "x" * 19


def test_size_0_never_sets_a_file_aside(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "log", 0, 1)
    for _ in range(10):
        file.write("x" * 100_000)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_what_is_no_plain_file_is_never_set_aside(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    file = LogFile(tmp_path / "log", 1, 1)
    file.write("one\n")
    file.write("two\n")
    assert os.read(reader, 100) == b"one\ntwo\n"
    os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_file_that_cannot_be_set_aside_is_written_on(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "log", 20, 1)
    (tmp_path / "log.1").mkdir()
    (tmp_path / "log.1" / "in the way").touch()
    for number in range(8):
        file.write(f"line {number:03}\n")
    assert (tmp_path / "log").read_text() == "".join(f"line {number:03}\n" for number in range(8))


def test_a_detached_servers_stderr_follows_to_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    script = f"""
import os
from pathlib import Path
from minserve.telemetry.logging import LogFile
file = LogFile(Path({str(path)!r}), 20, 1)
file.write("a line, long enough\\n")
file.write("the next\\n")
os.write(2, b"past the log\\n")
os.write(1, b"elsewhere\\n")
"""
    with path.open("ab") as stderr, (tmp_path / "out").open("wb") as stdout:
        assert in_a_child(script, stdout=stdout.fileno(), stderr=stderr.fileno()) == 0
    assert path.read_text() == "the next\npast the log\n"
    assert (tmp_path / "out").read_text() == "elsewhere\n"
