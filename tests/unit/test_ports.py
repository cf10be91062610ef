"""Test files run beside each other, and each server needs ports of its own."""

from __future__ import annotations

import subprocess
import sys

from tests.ports import free_ports

ASK = "import sys; from tests.ports import free_ports; print(*free_ports(2), flush=True); sys.stdin.read()"


def test_whoever_asks_gets_ports_that_nobody_else_has() -> None:
    ours = free_ports(2)
    with subprocess.Popen(
        [sys.executable, "-c", ASK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        theirs = [int(port) for port in other.stdout.readline().split()]
        later = free_ports(2)
        other.communicate()
    assert len({*ours, *theirs, *later}) == 6
