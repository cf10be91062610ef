"""Ports for servers whose addresses must be known before they listen, or stay the same when they start again."""

from __future__ import annotations

import itertools
import socket
from pathlib import Path

CLIENTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, outside the range from which the kernel gives ports to clients, if there is an outside.

    They are the caller's until its process ends: no other test that asks gets one of them, in whatever process it runs.
    """
    low, high = map(int, CLIENTS.read_text().split())
    found: list[int] = []
    for port in itertools.chain(range(low - 1, 1024, -1), range(65535, high, -1), range(high, max(low, 1025) - 1, -1)):
        if _is_free(port) and _is_ours_from_now_on(port):
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"there are no {count} free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _is_ours_from_now_on(port: int) -> bool:
    """Holds the port's name, of which there is one on the machine. A file would stay behind when a run is killed."""
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(f"\0minserve-test-port-{port}")
    except OSError:
        name.close()
        return False
    name.detach()  # open until this process ends
    return True
