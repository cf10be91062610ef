"""The sockets that clients connect to: one for each address, bound before any rank starts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aiohttp import web

from minserve.config.addresses import Address, Role, parse_address
from minserve.errors import StartupError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable

    from minserve.config.server import ServerOptions

BACKLOG = 1024
PROBE_TIMEOUT_S = 1.0  # for a connection to a unix socket, which its server takes or refuses at once


@dataclass(frozen=True, slots=True)
class Place:
    """An address that the options name.

    Attributes:
        roles: what it is for; several where several addresses are the same.
        option: what chooses another.
    """

    roles: frozenset[Role]
    address: Address
    option: str


def places(options: ServerOptions) -> list[Place]:
    """Where to listen, in the order of `Role`. An address that inference and management share is one place.

    Raises:
        StartupError: metrics has the address of one of the others alone.
    """
    found: list[Place] = []
    for role in Role:
        if role is Role.METRICS and not options.enable_metrics_api:
            continue
        place = _place(options, role)
        free_port = not place.address.path and place.address.port == 0
        same = None if free_port else next((one for one in found if one.address == place.address), None)
        if same is None:
            found.append(place)
        elif role is Role.METRICS and len(same.roles) == 1:
            raise StartupError(
                f"{place.option}: found {place.address.url}, which {same.option} has, too; allowed: an address of its "
                "own, or one for inference, management and metrics"
            )
        else:
            found[found.index(same)] = replace(same, roles=same.roles | place.roles)
    return found


def _place(options: ServerOptions, role: Role) -> Place:
    text: str = getattr(options, f"{role}_address")
    if text:
        return Place(frozenset({role}), parse_address(text, role), f"{role}_address")
    port: int = getattr(options, f"{role}_port")
    return Place(frozenset({role}), Address(options.host, port), f"--{role}-port")


@dataclass
class Listener:
    """A bound socket.

    Attributes:
        address: with the port that it has got.
    """

    roles: frozenset[Role]
    address: Address
    socket: socket.socket
    _file: tuple[int, int] | None = field(default=None)

    async def serve(self, runner: web.AppRunner, context: ssl.SSLContext | None, handshake_timeout: float) -> None:
        """Accepts connections for a runner that is set up, which ends them."""
        await _Site(runner, self, context if self.address.tls else None, handshake_timeout).start()

    def close(self) -> None:
        """Closes the socket and removes its file, unless that is another server's by now."""
        self.socket.close()
        if self._file is not None:
            with contextlib.suppress(OSError):
                if _identity(self.address.path) == self._file:
                    os.unlink(self.address.path)
            self._file = None


def bind_all(wanted: Iterable[Place]) -> list[Listener]:
    """Binds all addresses or none.

    Raises:
        StartupError: one cannot be had. It names the option that chooses another.
    """
    listeners: list[Listener] = []
    with contextlib.ExitStack() as undo:
        for place in wanted:
            listener = _bind_unix(place) if place.address.path else _bind_tcp(place)
            undo.callback(listener.close)
            listeners.append(listener)
        undo.pop_all()
    return listeners


def _bind_tcp(place: Place) -> Listener:
    address = place.address
    listener = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        choose = "--host" if isinstance(error, socket.gaierror) and place.option.startswith("--") else place.option
        where = f"{address.host}:{address.port}"
        raise StartupError(f"cannot listen on {where}: {error.strerror}; {choose} chooses another") from None
    listener.setblocking(False)
    host, port = listener.getsockname()[:2]
    return Listener(place.roles, replace(address, host=host, port=port), listener)


def _bind_unix(place: Place) -> Listener:
    """Makes the socket's file, for this user alone: who may open it may do all that the server can."""
    path = place.address.path
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_dead(path)
        listener.bind(path)
        file = _identity(path)
        os.chmod(path, 0o600)  # before `listen`: until then every connection is refused
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise StartupError(f"cannot listen on unix:{path}: {reason}; {place.option} chooses another") from None
    listener.setblocking(False)
    return Listener(place.roles, place.address, listener, file)


def _remove_dead(path: str) -> None:
    """Removes the file of a server that has not lived to do it."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(0, "there is a file of that name, and it is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_TIMEOUT_S)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(0, "a server listens on it")


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


class _Site(web.SockSite):
    """aiohttp's own, with unix sockets under uvloop and a limit on TLS handshakes."""

    __slots__ = ("_handshake_timeout",)

    def __init__(
        self, runner: web.AppRunner, listener: Listener, context: ssl.SSLContext | None, handshake_timeout: float
    ) -> None:
        super().__init__(runner, listener.socket, ssl_context=context, backlog=BACKLOG)
        self._handshake_timeout = handshake_timeout

    async def start(self) -> None:
        await web.BaseSite.start(self)
        loop = asyncio.get_running_loop()
        manager = self._runner.server
        assert manager is not None
        if self._sock.family == socket.AF_UNIX:
            self._server = await loop.create_unix_server(manager, sock=self._sock, backlog=BACKLOG)
        else:
            self._server = await loop.create_server(
                manager,
                sock=self._sock,
                backlog=BACKLOG,
                ssl=self._ssl_context,
                ssl_handshake_timeout=self._handshake_timeout if self._ssl_context else None,
            )
