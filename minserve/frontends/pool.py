"""The frontend processes of a server: started, asked what they have measured, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from minserve.frontend.connections import SHUTDOWN_TIMEOUT_S
from minserve.frontends.door import Door
from minserve.frontends.member import Member
from minserve.frontends.messages import Start
from minserve.frontends.shared import Shared

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping
    from pathlib import Path

    from aiohttp import web

    from minserve.config.server import ServerOptions
    from minserve.frontend.auth import Keys
    from minserve.frontend.tls import Identity
    from minserve.registry.models import Registry

GATHER_TIMEOUT_S = 1.0  # for a process that is stopped, or busy; what it has measured is told later
END_TIMEOUT_S = SHUTDOWN_TIMEOUT_S + 1.0
# Of no meaning to a process that does HTTP alone: large, or secret.
_NOT_TOLD = {"models", "model_snapshot", "load_models", "keystore_pass"}


class Frontends:
    """All of them.

    Args:
        listener: what clients connect to.
        server: makes a protocol for each connection of a request that is no prediction.
        identity: of a listener with TLS.
        directory: the server's, by which a guardian knows what belongs to it.
    """

    def __init__(
        self,
        options: ServerOptions,
        registry: Registry,
        keys: Keys | None,
        listener: socket.socket,
        server: web.Server,
        identity: Identity | None,
        directory: Path,
        environ: Mapping[str, str],
    ) -> None:
        self._registry = registry
        shared = Shared.create(options.frontends)
        told = options.model_dump_json(exclude=_NOT_TOLD)
        certificate = (identity.certificate, identity.key, identity.source) if identity is not None else (b"", b"", "")
        level = logging.getLogger("minserve").getEffectiveLevel()
        mark = {"MINSERVE_DIRECTORY": str(directory / "frontends")}  # see worker/guardian.py
        self._members = [
            Member(
                *(Start(number, told, *certificate, level), listener, shared),
                *(lambda channel: Door(registry, keys, channel), server, {**environ, **mark}),
            )
            for number in range(options.frontends)
        ]
        registry.metrics.in_flight = lambda: sum(shared.in_flight)
        registry.metrics.gather = self.gather

    async def start(self) -> None:
        """Starts them, and waits until they accept clients.

        Raises:
            StartupError: one has ended before that.
        """
        await asyncio.gather(*(member.start() for member in self._members))

    async def gather(self) -> None:
        """Has all that they have measured added to the server's metrics."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GATHER_TIMEOUT_S):
                await asyncio.gather(*(member.gather() for member in self._members))

    async def close(self) -> None:
        """Lets each of them finish what is in flight, and end."""
        for member in self._members:
            member.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_TIMEOUT_S):
                for member in self._members:
                    await member.ended.wait()
        self.kill()

    def kill(self) -> None:
        """Ends them at once."""
        for member in self._members:
            member.kill()
