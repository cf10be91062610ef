"""Either server in a folder of its own: started by TorchServe's command line, asked, stopped, with its log at hand."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from minserve.testing import until
from tests.ports import free_ports
from tests.side_by_side import calls

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from tests.side_by_side.calls import Answer, Call
    from tests.side_by_side.lives import Life

DEADLINE_S = 180.0
PORTS = ("inference", "management", "metrics")


@dataclass
class Running:
    """A server that accepts."""

    folder: Path
    ports: Mapping[str, int]

    @property
    def secrets(self) -> dict[str, str]:
        """The keys of key_file.json, as `{inference}`, `{management}` and `{API}`."""
        file = self.folder / "key_file.json"
        if not file.exists():
            return {}
        return {kind: entry["key"] for kind, entry in json.loads(file.read_text()).items()}

    def ask(self, call: Call) -> list[Answer]:
        """Sends a call; again and again where it waits for a status."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            answers = calls.send("127.0.0.1", self.ports[call.port], call, self.secrets)
            if not call.until or answers[0].status == call.until or time.monotonic() > deadline:
                return answers
            time.sleep(0.2)

    def log(self) -> str:
        """Everything in its log files."""
        return "\n".join(
            f"== {file.name}\n{file.read_text(errors='replace')}" for file in sorted(self.folder.glob("logs/*.log"))
        )


@contextlib.contextmanager
def running(
    command: Sequence[str], environ: Mapping[str, str], folder: Path, store: Path, life: Life
) -> Iterator[Running]:
    """Starts a server for one life and stops it again.

    Args:
        command: what takes TorchServe's flags.
        folder: a new one; the server's working directory.
    """
    folder.mkdir()
    (folder / "tmp").mkdir()
    ports = dict(zip([*PORTS, "grpc_inference", "grpc_management"], free_ports(5), strict=True))
    properties = [f"{port}_address=http://127.0.0.1:{ports[port]}" for port in PORTS]
    properties += [f"grpc_{port}_port={ports[f'grpc_{port}']}" for port in ("inference", "management")]
    (folder / "config.properties").write_text("\n".join([*properties, *life.properties, ""]))
    environ = {**environ, "TEMP": str(folder / "tmp"), "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    arguments = ["--start", "--foreground", "--model-store", str(store), "--ts-config", "config.properties", "--ncs"]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [*command, *arguments, *life.arguments],
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    family = psutil.Process(process.pid)
    try:
        until(
            lambda: process.poll() is not None or "Model server started" in (folder / "output").read_text(),
            DEADLINE_S,
            f"{command[0]} to start",
        )
        if process.poll() is not None:
            raise RuntimeError(f"{' '.join(command)} has ended: {(folder / 'output').read_text()[-3000:]}")
        yield Running(folder, ports)
    finally:
        everyone = [family, *family.children(recursive=True)] if process.poll() is None else []
        if everyone:
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for one in everyone:
            with contextlib.suppress(psutil.Error):
                one.kill()
        process.wait()
