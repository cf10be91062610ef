"""The programs under measurement: started, awaited by a line that they print, ended with everything they started."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Self

import psutil

from tests.benchmarks.workspace import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from tests.benchmarks.workspace import Workspace

START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 45.0  # over minserve's drain and exit limits
POLL_S = 0.005
LOG_LINES = 15


class ProgramError(Exception):
    """A program did not do what the run needs of it."""


class Program:
    """One running program; a context manager that ends it.

    Args:
        command: the program and its arguments.
        more: environment beside the workspace's.
        folder: its working directory. Default: the repository.
        whole_group: the end's SIGTERM is for all of the process group: some launchers do not pass it on.

    Attributes:
        began: when it was started, by time.perf_counter().
    """

    def __init__(
        self,
        workspace: Workspace,
        name: str,
        command: Sequence[str],
        more: Mapping[str, str] | None = None,
        folder: Path = REPOSITORY,
        whole_group: bool = False,
    ) -> None:
        self._name = name
        self._whole_group = whole_group
        # A file, not a pipe: nobody reads on, once the program has said that it is up.
        self._output = workspace.new_folder(name) / "output"
        self.began = time.perf_counter()
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**workspace.environ, **(more or {})},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the run, which then ends its programs one after the other
            )

    @property
    def pid(self) -> int:
        """The program's own process."""
        return self._process.pid

    def say(self, line: str) -> None:
        """Writes a line to its stdin."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Waits until a line that it prints matches.

        Raises:
            ProgramError: it ended, or took too long. The message has the end of what it printed.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            ended = self._process.poll() is not None or time.monotonic() > deadline
            if match := re.search(pattern, self._output.read_text(errors="replace"), re.MULTILINE):
                return match
            if ended:
                raise ProgramError(f"{self._name} did not print {pattern!r} in time:\n{self.tail()}")
            time.sleep(POLL_S)

    def tail(self) -> str:
        """The last lines that it has printed."""
        return "\n".join(self._output.read_text(errors="replace").splitlines()[-LOG_LINES:])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        family = family_of(self.pid)  # torchrun's ranks outlive its SIGKILL
        try:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if self._whole_group else os.kill)(self.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_TIMEOUT_S)
        finally:
            self._process.kill()
            for process in family:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            self._process.wait()
            with contextlib.suppress(OSError):
                assert self._process.stdin is not None
                self._process.stdin.close()


def family_of(pid: int) -> list[psutil.Process]:
    """All that a process has started and that still runs."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []
