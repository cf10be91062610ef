"""The programs under measurement: started, awaited by a line that they print, ended with everything they started."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
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
LOG_LINES = 15


class ProgramError(Exception):
    """A program did not do what the run needs of it."""


class Program:
    """One running program; a context manager that ends it.

    Args:
        arguments: of this same Python.
        more: environment beside the workspace's.
    """

    def __init__(
        self, workspace: Workspace, name: str, arguments: Sequence[str], more: Mapping[str, str] | None = None
    ) -> None:
        self._name = name
        self._log = workspace.path / f"{name}.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=REPOSITORY,
                env={**workspace.environ, **(more or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for the run, which then ends its programs one after the other
            )

    @property
    def pid(self) -> int:
        """The program's own process."""
        return self._process.pid

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Reads what it prints up to a line that matches.

        Raises:
            ProgramError: it ended, or took too long. The message has the end of its log.
        """
        assert self._process.stdout is not None
        alarm = threading.Timer(START_TIMEOUT_S, self._process.kill)
        alarm.start()
        try:
            for line in self._process.stdout:
                if match := re.search(pattern, line):
                    return match
        finally:
            alarm.cancel()
        raise ProgramError(f"{self._name} ended before it printed {pattern!r}:\n{_tail(self._log)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(self.pid).children(recursive=True)  # torchrun's ranks outlive its SIGKILL
        self._process.terminate()
        try:
            self._process.wait(END_TIMEOUT_S)
        finally:
            self._process.kill()
            for process in family:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def start_minserve(workspace: Workspace, name: str, store: Path) -> Program:
    """A server of every model in the store. `wait_for_inference` tells when they are READY."""
    ports = ("--inference-port", "0", "--management-port", "0", "--metrics-port", "0")
    arguments = ("start", "--model-store", str(store), *ports)
    return Program(workspace, name, ("-m", "minserve", *arguments))


def wait_for_inference(server: Program) -> str:
    """The inference URL, once every model is READY.

    Raises:
        ProgramError: the server ended, or a model did not load.
    """
    match = server.wait_for(r"not ready: .*|^inference +(?P<url>\S+)")
    if match["url"] is None:
        raise ProgramError(match[0])
    return match["url"]


def start_bare(workspace: Workspace) -> Program:
    """The aiohttp application that minserve is measured against. It prints its URL."""
    return Program(workspace, "bare-aiohttp", ("-m", "tests.benchmarks.bare"))
