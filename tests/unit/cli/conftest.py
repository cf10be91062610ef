"""What the tests of several verbs share."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from minserve.cli import app

Run = Callable[..., Result]


@pytest.fixture
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        "MINSERVE_RUNTIME_DIR": str(tmp_path_factory.mktemp("r")),  # servers that really run here are left alone
        "CUDA_VISIBLE_DEVICES": "",
        "MINSERVE_LOG_LEVEL": "",
        "TERM": "dumb",
    }


@pytest.fixture
def run(environ: dict[str, str]) -> Run:
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)), env=environ)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A model whose handler leaves a mark where it is loaded."""
    path = tmp_path / "store" / "m"
    path.mkdir(parents=True)
    (path / "handler.py").write_text(
        f"open({str(tmp_path / 'loaded')!r}, 'w')\ndef handle(data, context): return data\n"
    )
    (path / "model-config.yaml").write_text("parallelType: tp\ntorchrun: {nproc-per-node: 2, OMP_NUMBER_THREADS: 3}\n")
    return tmp_path / "store"


LIVE = """
import os, signal, sys
from minserve.worker.runtime import LiveServer, RuntimeDirectory
for number in map(int, sys.argv[1:]):
    signal.signal(number, signal.SIG_IGN)
runtime = RuntimeDirectory(os.environ)
runtime.tell(LiveServer(os.getpid(), "http://127.0.0.1:1", "http://127.0.0.1:2"))
print("up", flush=True)
signal.pause()
"""


@pytest.fixture
def live(environ: dict[str, str]) -> Iterator[Callable[..., int]]:
    """Starts a process that looks like a server and ignores these signals."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*ignored: signal.Signals) -> int:
        command = [sys.executable, "-c", LIVE, *(str(number.value) for number in ignored)]
        process = subprocess.Popen(command, env=os.environ | environ, stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        return process.pid

    yield start
    for process in processes:
        process.kill()
        process.communicate()
