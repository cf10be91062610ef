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


class Output:
    """Reads one pipe on the event loop.

    Args:
        fd: the non-blocking read end; closed with the output.
        who: stands in front of each line: "model/worker rank 1".

    Attributes:
        tail: the last lines.
        level: the log level of the lines.
    """

    def __init__(self, fd: int, who: str) -> None:
        self._fd = fd
        self._who = who
        self._rest = b""
        self.level = logging.INFO
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._readable)

    def close(self) -> None:
        """Reads what is left, then closes the pipe."""
        if self._fd < 0:
            return
        self.catch_up()
        self._take(b"\n" if self._rest else b"")
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1

    def catch_up(self) -> None:
        """Reads what the pipe holds by now, without waiting for the loop. One read, for somebody may still be writing."""
        if self._fd >= 0:
            self._readable()

    def _readable(self) -> None:
        """One read. Not until the pipe is empty: a rank that prints without end must not hold up the loop."""
        try:
            data = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # every writer has closed it; a reader left in place would spin
            self._loop.remove_reader(self._fd)
            return
        self._take(data)

    def _take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            text = line.decode("utf-8", "replace").rstrip("\r")
            self.tail.append(text)
            logger.log(self.level, "%s | %s", self._who, text)


def open_fifo(path: Path) -> int:
    """Creates a FIFO and opens it for reading.

    Opened read-write, so that it is no end of file when no rank has it open yet, and a rank's open never blocks.
    """
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o600)
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
