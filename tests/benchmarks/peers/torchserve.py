"""TorchServe with the same models as minserve, its logs at WARN: at its default it writes some 7 KB a request."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.benchmarks.peers.starting import wait_for_models
from tests.benchmarks.programs import Program, family_of
from tests.benchmarks.servers import LARGEST_BODY, Up
from tests.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.benchmarks.peers.environments import Environments
    from tests.benchmarks.workspace import Model, Workspace

TORCHSERVE = "TorchServe"
LEAST_DELAY_MS = 1  # a maxBatchDelay of 0 it takes for its default, 100
LOG_CONFIG = """\
<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="WARN">
  <Appenders><Console name="console"><PatternLayout pattern="%d %-5level %c - %m%n"/></Console></Appenders>
  <Loggers><Root level="WARN"><AppenderRef ref="console"/></Root></Loggers>
</Configuration>
"""
PROPERTIES = """\
inference_address=http://127.0.0.1:{0}
management_address=http://127.0.0.1:{1}
metrics_address=http://127.0.0.1:{2}
grpc_inference_port={3}
grpc_management_port={4}
disable_token_authorization=true
default_workers_per_model=1
max_request_size={limit}
max_response_size={limit}
load_models=all
"""


@contextlib.contextmanager
def torchserve(
    workspace: Workspace, environments: Environments, models: Sequence[Model], body: bytes = b'""'
) -> Iterator[Up]:
    """A server of these models, once each has answered.

    Args:
        body: what is sent to each until it answers.

    Raises:
        ProgramError: it cannot be had, or did not start.
    """
    bin_ = environments.bin("torchserve")
    folder = workspace.new_folder("ts")
    store = _archive(workspace.store(models, LEAST_DELAY_MS), folder / "archives", models)
    ports = free_ports(5)
    (folder / "config.properties").write_text(PROPERTIES.format(*ports, limit=LARGEST_BODY))
    (folder / "log4j2.xml").write_text(LOG_CONFIG)
    flags = ["--start", "--foreground", "--ncs", "--ts-config", "config.properties", "--log-config", "log4j2.xml"]
    command = [str(bin_ / "torchserve"), *flags, "--model-store", str(store)]
    environ = {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}  # where it looks for python and torchrun
    with Program(workspace, "torchserve", command, environ, folder, whole_group=True) as program:
        program.wait_for("Model server started")
        java = next((one.pid for one in family_of(program.pid) if one.name() == "java"), program.pid)
        up = Up(TORCHSERVE, f"http://127.0.0.1:{ports[0]}", java, program, f"http://127.0.0.1:{ports[1]}")
        wait_for_models(up, [model.name for model in models], body)
        yield up


def _archive(directories: Path, store: Path, models: Sequence[Model]) -> Path:
    """Archives of model directories; `minserve archive` makes them as torch-model-archiver does."""
    store.mkdir()
    for model in models:
        command = [sys.executable, "-m", "minserve", "archive", str(directories / model.name)]
        subprocess.run([*command, "--export-path", str(store)], check=True, capture_output=True)
    return store
