"""A frontend process: HTTP alone. Who it is and what it is to do comes over its standard input, a socket.

It ends when the server says so, and with the server. Signals leave it alone: they are for the server, which lets finish what
is in flight first, and whoever stops a service sends them to all of its processes.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from typing import TYPE_CHECKING

import uvloop

from minserve.config.server import ServerOptions
from minserve.frontend.tls import Identity, tls_context
from minserve.frontends.accepting import Accepting
from minserve.frontends.channel import Channel
from minserve.frontends.messages import Log, Start
from minserve.frontends.proxy import Proxy
from minserve.frontends.recorded import Measured
from minserve.frontends.shared import Shared
from minserve.frontends.site import Runner, application
from minserve.frontends.uplink import Uplink
from minserve.wire.frames import TO_FRONTEND, FrameReader, Kind
from minserve.wire.messages import unpack

if TYPE_CHECKING:
    from minserve.wire.frames import Frame

DESCRIPTORS = 3  # that come with the first byte, see `Member`
# As in the server: a hundred requests in flight are over a thousand objects and none of them garbage.
NEW_OBJECTS = 10_000


def main() -> None:
    """The whole life of the process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    channel = socket.socket(fileno=os.dup(0))
    _, descriptors, _, _ = socket.recv_fds(channel, 1, DESCRIPTORS)
    if len(descriptors) == DESCRIPTORS:  # else the server has gone
        listener, handing_over = (socket.socket(fileno=descriptor) for descriptor in descriptors[:2])
        start = _read_start(channel)
        if start is not None:
            uvloop.run(_serve(start, channel, listener, handing_over, Shared(descriptors[2])))


def _read_start(channel: socket.socket) -> Start | None:
    """The first frame; None if the server has gone."""
    reader = FrameReader(0, frozenset({Kind.START}))
    while count := channel.recv_into(reader.buffer()):
        for frame in reader.received(count):
            return unpack(Start, frame.meta)
    return None


async def _serve(
    start: Start, connection: socket.socket, listener: socket.socket, handing_over: socket.socket, shared: Shared
) -> None:
    loop = asyncio.get_running_loop()
    stop, lost = asyncio.Event(), asyncio.Event()

    def received(frame: Frame) -> None:
        if frame.kind is Kind.STOP:
            stop.set()
        elif frame.kind is Kind.GATHER:
            measured.tell(frame.seq)
        else:
            uplink.received(frame)

    def gone(reason: str) -> None:
        stop.set()
        lost.set()

    connection.setblocking(False)
    channel = Channel(TO_FRONTEND - {Kind.START}, received, gone)
    uplink, measured = Uplink(channel), Measured(channel)
    await loop.create_unix_connection(lambda: channel, sock=connection)
    logging.basicConfig(level=logging.WARNING, handlers=[_ToServer(channel)], force=True)
    logging.captureWarnings(True)
    logging.getLogger("minserve").setLevel(start.log_level)

    options = ServerOptions.model_validate_json(start.options)
    identity = Identity(start.certificate, start.key, start.source)
    context = tls_context(identity) if start.certificate else None
    app = application(uplink, measured, options, Proxy(handing_over), shared, start.number)
    runner = Runner(app, options, measured, shared, start.number)
    await runner.setup()
    assert runner.server is not None
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS)
    counts, own = shared.connections, start.number
    accepting = Accepting(listener, runner.server, counts, own, context, options.header_timeout)
    channel.send(Kind.OPEN)
    await stop.wait()
    accepting.stop()
    await runner.cleanup()
    measured.tell()
    channel.close()
    await lost.wait()


class _ToServer(logging.Handler):
    """Hands lines to the server, which writes them where its own go."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        self._channel.send(Kind.LOG, message=Log(record.name, record.levelno, text))
