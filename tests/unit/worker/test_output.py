import asyncio
import contextlib
import functools
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from minserve.worker import output
from minserve.worker.output import TAIL_LINES, Output, open_fifo
from tests.unit.worker.specs import until

pytestmark = pytest.mark.asyncio

Pipe = tuple[int, int]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError:  # the test, or the output, has done so
            continue


def has_lines(out: Output, count: int) -> bool:
    return len(out.tail) == count


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "minserve.output")
    return caplog


async def test_each_line_is_logged_with_model_worker_and_rank(pipe: Pipe, log: pytest.LogCaptureFixture) -> None:
    out = Output(pipe[0], "m/0 rank 1")
    os.write(pipe[1], b"one\ntwo\r\n\nno end")
    await until(lambda: has_lines(out, 3))
    assert log.messages == ["m/0 rank 1 | one", "m/0 rank 1 | two", "m/0 rank 1 | "]
    out.close()
    assert log.messages[3:] == ["m/0 rank 1 | no end"]
    assert list(out.tail) == ["one", "two", "", "no end"]


async def test_the_level_of_the_lines_can_change(pipe: Pipe, log: pytest.LogCaptureFixture) -> None:
    out = Output(pipe[0], "m/0 torchrun")
    out.level = logging.DEBUG
    os.write(pipe[1], b"what the ranks have said already\n")
    out.close()
    assert log.messages == []
    assert list(out.tail) == ["what the ranks have said already"]


@pytest.mark.parametrize("size", [1, 2, 3, 64])
async def test_lines_and_letters_split_over_reads_stay_whole(
    pipe: Pipe, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "READ_BYTES", size)
    out = Output(pipe[0], "m/0 rank 1")
    os.write(pipe[1], "größer\n\n漢字\n".encode())
    await until(lambda: has_lines(out, 3))
    assert list(out.tail) == ["größer", "", "漢字"]
    out.close()


async def test_bytes_that_are_no_utf_8_are_replaced_not_refused(pipe: Pipe) -> None:
    out = Output(pipe[0], "m/0 rank 1")
    os.write(pipe[1], b"caf\xe9 \xff\n")
    out.close()
    assert list(out.tail) == ["caf\ufffd \ufffd"]


async def test_a_line_without_end_is_logged_in_pieces_and_nothing_is_lost(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "READ_BYTES", 7)
    monkeypatch.setattr(output, "MAX_LINE_BYTES", 10)
    out = Output(pipe[0], "m/0 rank 1")
    text = "0123456789" * 10
    os.write(pipe[1], text.encode() + b"\nnext\n")
    await until(lambda: "next" in out.tail)
    *pieces, last = out.tail
    assert "".join(pieces) == text
    assert all(len(piece) < 10 + 7 + 1 for piece in pieces)
    assert last == "next"
    out.close()


async def test_the_last_lines_are_kept(pipe: Pipe) -> None:
    out = Output(pipe[0], "m/0 rank 1")
    os.write(pipe[1], b"".join(b"%d\n" % number for number in range(100)))
    out.close()
    assert list(out.tail) == [str(number) for number in range(100 - TAIL_LINES, 100)]


async def test_closing_reads_all_that_a_full_pipe_holds_and_may_be_done_twice(pipe: Pipe) -> None:
    out = Output(pipe[0], "m/0 rank 1")
    written = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            written += os.write(pipe[1], b"0123456789 12345\n"[: 17 if written else 4])
    out.catch_up()
    assert len(out.tail) == TAIL_LINES
    os.write(pipe[1], b"Traceback\nValueError: the end")
    out.close()
    out.close()
    out.catch_up()
    assert list(out.tail)[-2:] == ["Traceback", "ValueError: the end"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pipe[0])


async def test_a_pipe_without_writers_is_not_read_for_ever(pipe: Pipe) -> None:
    out = Output(pipe[0], "torchrun")
    os.write(pipe[1], b"bye")
    os.close(pipe[1])
    loop = asyncio.get_running_loop()
    reads = 0
    real = os.read

    def counted(fd: int, size: int) -> bytes:
        nonlocal reads
        reads += 1
        return real(fd, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "read", counted)
        await until(lambda: reads == 2)  # what is there, and the end
        for _ in range(5):
            await asyncio.sleep(0)
        assert reads == 2
    assert not loop.remove_reader(pipe[0])
    out.close()
    assert list(out.tail) == ["bye"]


async def test_a_writer_without_end_leaves_the_loop_its_turns(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "READ_BYTES", 2)
    out = Output(pipe[0], "m/0 rank 1")
    os.write(pipe[1], b"x\n" * TAIL_LINES)
    turns = 0
    async with asyncio.timeout(10):
        while len(out.tail) < TAIL_LINES:
            turns += 1
            await asyncio.sleep(0)
    assert turns >= TAIL_LINES - 1
    out.close()


async def test_a_burst_of_lines_is_one_event_of_the_log_and_loses_none(
    pipe: Pipe, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "BURST_LINES", 3)
    out = Output(pipe[0], "m/0 rank 1")
    os.write(pipe[1], b"1\n2\n3\n4\n")
    await until(lambda: has_lines(out, 4))
    assert log.messages == ["m/0 rank 1 | 1\nm/0 rank 1 | 2\nm/0 rank 1 | 3\nm/0 rank 1 | 4"]
    os.write(pipe[1], b"5\n6\n7\n")
    await until(lambda: has_lines(out, 7))
    assert log.messages[1:] == ["m/0 rank 1 | 5", "m/0 rank 1 | 6", "m/0 rank 1 | 7"]
    out.level = logging.DEBUG
    os.write(pipe[1], b"x\n" * 10)
    out.close()
    assert len(log.messages) == 4
    assert list(out.tail)[-1] == "x"


async def test_a_fifo_waits_for_its_rank_and_survives_its_going(tmp_path: Path) -> None:
    path = tmp_path / "output.0"
    path.write_text("left by an earlier incarnation")
    out = Output(open_fifo(path), "m/0 rank 0")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for count in (1, 2):
        writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        os.write(writer, b"line\n")
        os.close(writer)
        await until(functools.partial(has_lines, out, count))
    out.close()
