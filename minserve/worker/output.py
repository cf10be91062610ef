"""What the ranks and torchrun print: always drained, marked with model, worker and rank, the last lines kept.

torchrun's ranks inherit one pipe and their lines mix in it, so each rank gets a pipe of its own: a FIFO in the runtime
directory that it puts in place of its stdout and stderr before it imports torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger("minserve.output")

TAIL_LINES = 20
READ_BYTES = 64 * 1024  # all that a pipe holds
MAX_LINE_BYTES = 64 * 1024  # a longer line is logged in pieces
PAUSE_S = (
    0.005  # between two reads: Python writes each line, and each line's end, by itself, and a read for each is dear
)
BURST_LINES = 50  # in one read; more of them are one event of the log, for a rank that prints without end


class Output:
    """Reads one pipe on the event loop.

    Args:
        fd: the non-blocking read end; closed with the output.
        who: stands in front of each line: "model/worker rank 1".
        keep: how many lines `tail` holds.

    Attributes:
        tail: the last lines.
        level: the log level of the lines.
    """

    def __init__(self, fd: int, who: str, keep: int = TAIL_LINES) -> None:
        self._fd = fd
        self._who = who
        self._rest = b""
        self.level = logging.INFO
        self.tail: deque[str] = deque(maxlen=keep)
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._loop.add_reader(fd, self._readable)

    def close(self) -> None:
        """Reads what is left, then closes the pipe."""
        if self._fd < 0:
            return
        self.catch_up()
        self._take(b"\n" if self._rest else b"")
        self._loop.remove_reader(self._fd)
        if self._pause is not None:
            self._pause.cancel()
        os.close(self._fd)
        self._fd = -1

    def catch_up(self) -> None:
        """Reads what the pipe holds by now, without waiting for the loop. One read, for somebody may still be writing."""
        if self._fd >= 0:
            self._read()

    def _readable(self) -> None:
        """One read, then a pause. Not until the pipe is empty: a rank that prints without end must not hold up the loop."""
        self._loop.remove_reader(self._fd)
        if self._read():
            self._pause = self._loop.call_later(PAUSE_S, self._loop.add_reader, self._fd, self._readable)

    def _read(self) -> bool:
        """One read. False at the end: every writer has closed the pipe, and a reader in place would spin."""
        try:
            data = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if data:
            self._take(data)
        return bool(data)

    def _take(self, data: bytes) -> None:
        *pieces, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            pieces.append(self._rest)
            self._rest = b""
        lines = [piece.decode("utf-8", "replace").rstrip("\r") for piece in pieces]
        self.tail.extend(lines)
        if len(lines) <= BURST_LINES:
            for line in lines:
                logger.log(self.level, "%s | %s", self._who, line)
        elif logger.isEnabledFor(self.level):
            # 64 KiB of short lines, each an event of its own, would hold up the loop for a third of a second.
            logger.log(self.level, "%s", "\n".join([f"{self._who} | {line}" for line in lines]))


def open_fifo(path: Path) -> int:
    """Creates a FIFO and opens it for reading.

    Opened read-write, so that it is no end of file when no rank has it open yet, and a rank's open never blocks.
    """
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o600)
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
