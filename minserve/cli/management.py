"""Which server a command talks to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from minserve.cli.ending import fail

if TYPE_CHECKING:
    from minserve.client import Client

DEFAULT_MANAGEMENT_URL = "http://127.0.0.1:8081"


def find_management(url: str | None) -> Client:
    """The management address that was named, or that of the server that runs here. A server of ours is known by its note."""
    from minserve.client import Client
    from minserve.worker.runtime import live_servers

    servers = [one for one in live_servers(os.environ) if url in (None, one.management)]
    if len(servers) > 1:
        fail(f"several servers are running, choose one with --url: {', '.join(s.management for s in servers)}")
    if not servers:
        return Client(url or DEFAULT_MANAGEMENT_URL)
    return Client(servers[0].management, servers[0].certificate, servers[0].management_key())
