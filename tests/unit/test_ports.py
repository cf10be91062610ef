"""Test files run beside each other, and each server needs ports of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import ports
from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
ASK = "import sys; from tests.ports import free_ports; print(*free_ports(2), flush=True); sys.stdin.read()"


def test_whoever_asks_gets_ports_that_nobody_else_has() -> None:
    ours = free_ports(2)
    with subprocess.Popen(
        [sys.executable, "-c", ASK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as other:
        assert other.stdout is not None
        theirs = [int(port) for port in other.stdout.readline().split()]
        later = free_ports(2)
        other.communicate()
    assert len({*ours, *theirs, *later}) == 6


@pytest.mark.parametrize("clients", ["32768\t60999\n", "1024\t65535\n", "1024\t60999\n", "0\t65535\n"])
def test_there_are_ports_whatever_the_kernel_gives_to_clients(
    clients: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "CLIENTS", tmp_path / "range")
    ports.CLIENTS.write_text(clients)
    assert all(1024 < port < 65536 for port in free_ports(2))
