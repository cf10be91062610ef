"""A frontend process and the server behind it, both in one event loop, with the sockets between them as they are."""

import asyncio
import socket
from types import TracebackType

from aiohttp import web

from minserve.frontend.app import inference_app, runner
from minserve.frontend.express import EXPRESS
from minserve.frontends.channel import Channel
from minserve.frontends.door import Door
from minserve.frontends.handover import Handover
from minserve.frontends.proxy import Proxy
from minserve.frontends.recorded import Measured
from minserve.frontends.shared import Shared
from minserve.frontends.site import Runner, application
from minserve.frontends.uplink import Uplink
from minserve.wire.frames import FROM_FRONTEND, TO_FRONTEND, Frame, Kind
from tests.unit.frontend.rig import Rig, Server


class BehindServer(Server):
    """Runs the application of a frontend process."""

    def __init__(self, app: web.Application, runner: Runner) -> None:
        super().__init__(app)
        self._behind = runner

    async def _make_runner(self, **kwargs: object) -> web.AppRunner:
        return self._behind


class Behind(Rig):
    """The rig with its inference port in a frontend process.

    Attributes:
        make_app: what the server has behind it.
    """

    make_app = staticmethod(inference_app)

    async def make_inference(self) -> Server:
        options = self._options
        self._server = runner(self.make_app(self.registry, options, self._keys), options)
        await self._server.setup()
        assert self._server.server is not None
        ours, theirs = socket.socketpair()
        handed_over, handing_over = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sockets = handed_over, handing_over
        self.handover = Handover(handed_over, self._server.server)
        self.server_end = await self._connect(ours, Channel(FROM_FRONTEND, self._to_door, lambda _: None))
        self.door = Door(self.registry, self._keys, self.server_end)
        self.channel = await self._connect(theirs, Channel(TO_FRONTEND, self._to_uplink, lambda _: None))
        self.uplink, self.measured = Uplink(self.channel), Measured(self.channel)
        self.shared = Shared.create(2)
        self.registry.metrics.gather = self._gather
        self._gathered = asyncio.Event()
        app = application(self.uplink, self.measured, options, Proxy(handing_over), self.shared, 0)
        if not self._express:
            del app[EXPRESS]
        return BehindServer(app, Runner(app, options, self.measured, self.shared, 0))

    async def _connect(self, end: socket.socket, channel: Channel) -> Channel:
        end.setblocking(False)
        await asyncio.get_running_loop().create_unix_connection(lambda: channel, sock=end)
        return channel

    def _to_door(self, frame: Frame) -> None:
        self.door.received(frame)
        if frame.kind is Kind.RECORDED and frame.seq:
            self._gathered.set()

    def _to_uplink(self, frame: Frame) -> None:
        if frame.kind is Kind.GATHER:
            self.measured.tell(frame.seq)
        else:
            self.uplink.received(frame)

    async def _gather(self) -> None:
        self._gathered.clear()
        self.server_end.send(Kind.GATHER, 1)
        await self._gathered.wait()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, error, traceback)
        self.handover.close()
        await self._server.cleanup()
        self._sockets[1].close()
        self.channel.abort()
        self.server_end.abort()
        await asyncio.sleep(0)
