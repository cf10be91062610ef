"""A real server in a process of its own, on ports that it gets back after a kill. All it writes lies in one folder."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

import psutil

from tests.chaos.catalogue import Model, build_store
from tests.ports import free_ports

REPOSITORY = Path(__file__).parents[2]
SITE = Path(__file__).parent / "site"


class ChaosServer:
    """A `minserve start` of these models.

    Attributes:
        home: the folder of everything. Short, for the sockets' addresses must stay under 107 bytes.
        control: where ranks look for what they shall do while they start.
        generation: how many servers were started here; the processes of each have its number in their environment.
        pid: of the latest process.
        pids_seen: every process of the family that has ever been looked at; their names must not be left anywhere.
    """

    def __init__(self, models: tuple[Model, ...]) -> None:
        self.models = models
        self.home = Path(tempfile.mkdtemp(prefix="msc"))
        self.control = self.home / "control"
        self._runtime = self.home / "run"
        self._temporary = self.home / "tmp"
        for folder in (self.control, self._runtime, self._temporary):
            folder.mkdir()
        build_store(self.home / "store", models)
        self._ports = free_ports(2)
        self._log = self.home / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self.generation = 0
        self.pids_seen: set[int] = set()

    # ── its life ──

    def start(self) -> None:
        """Spawns it. Whether it listens and its models are READY is for the caller to see."""
        path = [str(SITE), os.environ.get("PYTHONPATH", ""), str(REPOSITORY)]
        inference, management = self._ports
        options = ("--inference-port", str(inference), "--management-port", str(management), "--metrics-port", "0")
        self.generation += 1
        environ = {
            **os.environ,
            "CHAOS_GENERATION": str(self.generation),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "CHAOS_CONTROL": str(self.control),
            "XDG_RUNTIME_DIR": str(self._runtime),
            "TMPDIR": str(self._temporary),
        }
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "minserve", "start", "--model-store", str(self.home / "store"), *options],
                cwd=self.home,  # not the repository: PYTHONPATH says which minserve is tested
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environ,
            )
        self.pids_seen.add(self._process.pid)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return None if self._process is None else self._process.poll()

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def terminate(self) -> None:
        """SIGTERM; it then drains."""
        assert self._process is not None
        self._process.terminate()

    def clean_up(self) -> None:
        """Ends whatever is left, and removes the folder."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.home, ignore_errors=True)

    # ── what it can be seen to have ──

    @property
    def inference(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def management(self) -> str:
        return f"http://127.0.0.1:{self._ports[1]}"

    @property
    def log_size(self) -> int:
        return self._log.stat().st_size

    def log_since(self, offset: int) -> str:
        """What it has logged behind that many bytes."""
        with self._log.open("rb") as log:
            log.seek(offset)
            return log.read().decode(errors="replace")

    def processes(self, generation: int | None = None) -> list[psutil.Process]:
        """Every rank, torchrun, helper and guardian that lives, whoever is its parent now: found by its environment.

        Args:
            generation: of which server; of all when it is None.
        """
        mark = f"CHAOS_CONTROL={self.control}".encode()
        found = []
        for process in psutil.process_iter():
            if self._process is not None and process.pid == self._process.pid:
                continue
            environ = environment(process.pid)
            if mark in environ and (generation is None or f"CHAOS_GENERATION={generation}".encode() in environ):
                found.append(process)
        self.pids_seen.update(process.pid for process in found)
        return found

    def strangers(self, agents: Collection[int]) -> list[str]:
        """Those of no worker, and not guardian or launcher. A rank's helpers have their worker's incarnation."""
        due = {_incarnation(pid) for pid in agents}
        launcher = f"MINSERVE_DIRECTORY={self._runtime}/minserve-{self.pid}/warm".encode()
        guardian = str(self._runtime / f"minserve-{self.pid}")
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                ours = guardian in words or launcher in environment(process.pid)
                if _incarnation(process.pid) not in due and not ours:
                    found.append(f"{process.pid} ({' '.join(words)[-80:]})")
        return found

    def zombies(self) -> list[int]:
        """Children of the server that it has not reaped."""
        found = []
        for child in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has been reaped just now
                if child.status() == psutil.STATUS_ZOMBIE:
                    found.append(child.pid)
        return found

    def wait_until_alone(self, timeout: float, generation: int | None = None) -> list[psutil.Process]:
        """Waits until none of a server's processes is left; those that still are."""
        deadline = time.monotonic() + timeout
        while (left := self.processes(generation)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left

    def files(self) -> list[str]:
        """What its runtime folder and its temp folder hold, and shared memory and temp files named after its processes."""
        own = [str(path) for folder in (self._runtime, self._temporary) for path in folder.rglob("*")]
        names = {str(pid) for pid in self.pids_seen}
        shared = [path for folder in (Path("/tmp"), Path("/dev/shm")) for path in folder.iterdir()]
        return own + [str(path) for path in shared if names & set(re.split(r"[^0-9]+", path.name))]


def environment(pid: int) -> list[bytes]:
    """What a process was started with; empty for one that has ended, or is not ours to look at."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _incarnation(pid: int) -> bytes:
    """The start of a worker that a process belongs to."""
    return next((entry for entry in environment(pid) if entry.startswith(b"MINSERVE_WORKER=")), b"")
