"""The server's log: one line an event, on stderr or in a file. Nothing above DEBUG is written per request.

But for metrics, where metrics_mode sends them here.

A thread does the writing. Who reads the log may be slow or gone (a full pipe, a terminal on hold, a disk that hangs), and
the event loop must not wait for them: requests, time-outs and signals come first. Lines are lost then, and that is told.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import stat
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
MAX_WAITING = 4 * 1024 * 1024  # characters that wait to be written; what comes on top of them is dropped
FLUSH_S = 1.0

Sink = Callable[[str], None]

OUTPUT = "minserve.output"  # what ranks print, each line marked, colours and all
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
_LIKE_A_LINE = re.compile(r"\n(?=\d{4}-\d\d-\d\d)")


def one_record(text: str) -> str:
    """A record's text in which nothing passes for another record, or speaks to a terminal.

    What a handler says in an exception may be a client's words.
    """
    return _LIKE_A_LINE.sub("\n  ", text.translate(_CONTROLS))


def configure(level: str, file: Path | None = None, max_bytes: int = 0, files: int = 1) -> Writer:
    """Sets the level of minserve's own loggers; libraries, and Python's warnings, speak from WARNING on.

    Args:
        file: where the log goes instead of stderr.
        max_bytes: size at which the file is set aside for a new one; 0: never.
        files: how many of those set aside are kept.

    Raises:
        OSError: the file cannot be opened.
    """
    writer = Writer(_to_stderr if file is None else LogFile(file, max_bytes, files).write)
    logging.basicConfig(level=logging.WARNING, handlers=[_Handler(writer)], force=True)
    logging.captureWarnings(True)  # they would go to stderr, past the writer
    logging.getLogger("minserve").setLevel(level.upper())
    for metrics in ("ts_metrics", "model_metrics"):  # silent unless metrics_mode sends them here
        logging.getLogger(metrics).setLevel(logging.INFO)
    return writer


class Writer:
    """Writes texts one after the other in a thread of its own.

    Args:
        log: what writes the log's lines; may block.
        limit: characters that may wait.
    """

    def __init__(self, log: Sink, limit: int = MAX_WAITING) -> None:
        self._log = log
        self._limit = limit
        self._texts: deque[tuple[Sink, str]] = deque()
        self._waiting = 0
        self._dropped = 0
        self._closed = False
        self._changed = threading.Condition()
        # A daemon: the process must be able to end while a write blocks.
        self._thread = threading.Thread(target=self._run, name="minserve-log", daemon=True)
        self._thread.start()

    def log(self, text: str) -> None:
        """Adds lines to the log. Never waits; without room the lines are dropped and counted."""
        self.put(self._log, text)

    def say(self, text: str) -> None:
        """Prints lines to stdout, likewise."""
        self.put(to_stdout, text)

    def close(self, timeout: float = FLUSH_S) -> None:
        """Gives what waits `timeout` seconds to be written. The rest is lost, and so is what comes later."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)

    def put(self, sink: Sink, text: str) -> None:
        """Gives lines to a sink, likewise; a sink may block, and holds up the others then."""
        with self._changed:
            if self._closed:
                return
            if self._waiting and self._waiting + len(text) > self._limit:
                self._dropped += text.count("\n") + 1
                return
            self._waiting += len(text)
            self._texts.append((sink, f"{text}\n"))
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._texts and not self._closed:
                    self._changed.wait()
                if not self._texts:
                    return
                texts, self._texts = self._texts, deque()
                size = self._waiting
                if self._dropped:
                    texts.append((self._log, _notice(self._dropped)))
                    self._dropped = 0
            for sink, text in texts:
                with contextlib.suppress(OSError, ValueError):  # its reader has gone, its disk is full: nobody to tell
                    sink(text)
            with self._changed:
                self._waiting -= size  # not before: what a blocked write holds takes room, too


def _notice(dropped: int) -> str:
    text = f"{dropped} log lines dropped: they came faster than they could be written"
    return logging.Formatter(FORMAT).format(logging.LogRecord("", logging.WARNING, "", 0, text, None, None)) + "\n"


class _Handler(logging.Handler):
    """Formats in the caller's thread, where the exception is, and hands the text to the writer."""

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self._writer = writer
        self.setFormatter(logging.Formatter(FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            self._writer.log(text if record.name == OUTPUT else one_record(text))
        except Exception:  # the message does not fit its arguments; logging would tell stderr, and perhaps wait for it
            self._writer.log(f"{traceback.format_exc()}in the log line {record.msg!r} {record.args!r}")

    def close(self) -> None:
        self._writer.close()
        super().close()


class LogFile:
    """A file that is set aside when it has reached its size: FILE becomes FILE.1, FILE.1 becomes FILE.2, and so on.

    Not logging.handlers.RotatingFileHandler: at exit logging waits for the lock of each handler of its own, for ever when a
    write hangs.
    """

    def __init__(self, path: Path, max_bytes: int, files: int) -> None:
        self._path = os.path.abspath(path)
        self._max_bytes = max_bytes
        self._files = files
        self._open()

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        status = os.fstat(self._fd)
        self._size = status.st_size
        self._may_rotate = self._max_bytes > 0 and stat.S_ISREG(status.st_mode)

    def write(self, text: str) -> None:
        """Adds the text, to a new file if the present one would grow too large."""
        data = text.encode(errors="backslashreplace")
        if self._may_rotate and self._size and self._size + len(data) > self._max_bytes:
            self._size = 0  # also if it fails, so that it is not tried with each line
            with contextlib.suppress(OSError):  # the folder may be closed to us by now; the file is still open
                self._rotate()
        self._size += len(data)
        _write(self._fd, data)

    def _rotate(self) -> None:
        for number in range(self._files - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{self._path}.{number}", f"{self._path}.{number + 1}")
        os.rename(self._path, f"{self._path}.1")
        before = self._fd
        self._open()
        for fd in (1, 2):  # a detached server prints to its log file: what goes past the log shall not go to an old one
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(fd), os.fstat(before)):
                    os.dup2(self._fd, fd)
        os.close(before)


def _to_stderr(text: str) -> None:
    """To the descriptor: a thread that blocks in a write with the lock of `sys.stderr` would make Python's end abort.

    The live view on a terminal puts itself in the place of `sys.stderr` and keeps its table below the lines.
    """
    if sys.stderr is not sys.__stderr__:
        sys.stderr.write(text)
    elif sys.stderr is not None:  # None: started with it closed, and the descriptor may be anything by now
        _write(2, text.encode(errors="backslashreplace"))


def to_stdout(text: str) -> None:
    """The sink of what is printed."""
    if sys.stdout is not sys.__stdout__:
        sys.stdout.write(text)
    elif sys.stdout is not None:
        _write(1, text.encode(errors="backslashreplace"))


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:  # somebody who has the pipe or terminal, too, has made it so
            select.select([], [fd], [])
