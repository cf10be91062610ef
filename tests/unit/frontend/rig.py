"""The frontend over real HTTP on loopback, with models that answer in memory."""

import asyncio
import dataclasses
import inspect
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import MethodType, TracebackType
from typing import Self

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from minserve.config.server import ServerOptions
from minserve.dispatch.dispatcher import Dispatcher
from minserve.dispatch.request import Request
from minserve.errors import MinServeError
from minserve.frontend.admission import InFlightBytes
from minserve.frontend.app import inference_app, management_app, runner
from minserve.frontend.auth import Keys
from minserve.frontend.connections import Connections
from minserve.frontend.express import EXPRESS
from minserve.frontend.inference import Inference
from minserve.registry.models import Registry, ValidModel
from minserve.telemetry.events import EventLog
from minserve.wire.messages import Answer
from minserve.worker.devices import DeviceAllocator, Inventory
from minserve.worker.reports import WorkerReport
from minserve.worker.runtime import RuntimeDirectory
from minserve.worker.spec import ModelSpec
from minserve.worker.starter import Starter
from tests.unit.worker.groups import no_starter
from tests.unit.worker.specs import make_spec

MAX_BODY = 1000
OPTIONS = ServerOptions(max_request_size=MAX_BODY, max_in_flight_bytes=10 * MAX_BODY, max_response_size=2**30)

Client = TestClient[web.Request, web.Application]


def with_options(**changes: object) -> pytest.MarkDecorator:
    """Lets a test run with other options of the server."""
    return pytest.mark.parametrize("options", [OPTIONS.model_copy(update=changes)], indirect=True, ids=["options"])


class FakeSupervisor:
    """Starts nothing; tests set what it reports."""

    def __init__(
        self,
        spec: ModelSpec,
        count: int,
        directory: Path,
        dispatcher: Dispatcher,
        devices: DeviceAllocator,
        starter: Starter,
        events: EventLog,
        on_change: Callable[[], None],
    ) -> None:
        self.reports: list[WorkerReport] = []
        self.unhealthy: MinServeError | None = None
        self.not_ready: str | None = None
        self.stopped: list[float] = []
        self.resized: list[tuple[int, int]] = []
        self.starting: Exception | asyncio.Event | None = None  # what `started` raises or waits for
        self.replaced: list[tuple[ModelSpec, int]] = []
        self.replacing: Exception | asyncio.Event | None = None  # what the next `replace` raises or waits for

    def start(self) -> None:
        pass

    async def replace(self, spec: ModelSpec, count: int) -> None:
        if isinstance(self.replacing, Exception):
            raise self.replacing
        if self.replacing is not None:
            await self.replacing.wait()
        self.replaced.append((spec, count))

    async def resize(self, fewest: int, most: int) -> None:
        self.resized.append((fewest, most))

    async def started(self) -> None:
        if isinstance(self.starting, Exception):
            raise self.starting
        if self.starting is not None:
            await self.starting.wait()

    async def settled(self) -> None:
        pass

    async def stop(self, drain_timeout: float, refusal: MinServeError | None = None) -> None:
        self.stopped.append(drain_timeout)

    def report(self) -> list[WorkerReport]:
        return self.reports


class Lane:
    """A worker that hands each request to the test."""

    under_way = 0
    batch_seconds = None

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.handle: Callable[[Request], object] = echo

    def has_place(self, *, full: bool, ahead: int = 0) -> bool:
        return True

    def send(self, requests: list[Request]) -> None:
        for request in requests:
            self.requests.append(request)
            self.handle(request)

    def parts(self) -> list[tuple[str, str, bytes]]:
        """What the last request's handler would see."""
        request = self.requests[-1]
        assert [len(body) for body in request.bodies] == [part.length for part in request.meta.parts]
        return [
            (part.name, part.content_type, bytes(body))
            for part, body in zip(request.meta.parts, request.bodies, strict=True)
        ]


def echo(request: Request) -> None:
    body = b"".join(map(bytes, request.bodies))
    request.answer(Answer(0, len(body)), body)


class FakeRuntime(RuntimeDirectory):
    def __init__(self) -> None:
        self.models = Path("/nonexistent")

    def new_model_directory(self) -> Path:
        return Path("/nonexistent")

    def drop_model_directory(self, path: Path) -> None:
        pass


class Server(TestServer):
    """Runs the application as `minserve start` does."""

    def __init__(self, app: web.Application, options: ServerOptions = OPTIONS) -> None:
        super().__init__(app)
        self._options = options

    async def _make_runner(self, **kwargs: object) -> web.AppRunner:
        return runner(self.app, self._options)


class Raw:
    """A client of the inference port that sends bytes as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def reset(self) -> None:
        """Leaves as a process does that is killed with bytes it has not read: the other side is told so."""
        client = self.writer.get_extra_info("socket")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def answer(self) -> tuple[int, bytes, bytes]:
        """One answer with a length: status, head, body. An interim one counts as an answer without a body."""
        async with asyncio.timeout(10):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)
            body = await self.reader.readexactly(int(length[1]) if length else 0)
        return status_of(head), head, body

    async def final_answer(self) -> tuple[int, bytes, bytes]:
        """The answer behind any interim ones."""
        answer = await self.answer()
        while answer[0] == 100:
            answer = await self.answer()
        return answer

    async def rest_of_chunks(self) -> bytes:
        """What comes until the last chunk of an answer in chunks."""
        got = b""
        async with asyncio.timeout(10):
            while not (b"\r\n" + got).endswith(b"\r\n0\r\n\r\n"):
                received = await self.reader.read(2**20)
                assert received, "the connection has ended before the answer"
                got += received
        return got

    async def rest(self) -> bytes:
        """What comes until the server ends the connection."""
        async with asyncio.timeout(10):
            return await self.reader.read()


def status_of(head: bytes) -> int:
    match = re.match(rb"HTTP/1.[01] (\d+)", head)
    assert match, head
    return int(match[1])


class Rig:
    """Both applications over one registry. Model "m" is there from the start.

    For the connections of the inference port time passes only by `pass_time`.

    Args:
        express: requests may be carried past aiohttp.
    """

    def __init__(self, options: ServerOptions = OPTIONS, keys: Keys | None = None, express: bool = True) -> None:
        self._options = options
        self._express = express
        self._keys = keys
        self._now = 1000.0
        self.registry = Registry(FakeRuntime(), Inventory(), no_starter(), lambda: None, options)
        self.lane = Lane()
        self.add("m").attach(self.lane)

    def add(self, name: str, **changes: object) -> Dispatcher:
        spec = dataclasses.replace(make_spec(name=name, model_dir=Path(f"/models/{name}")), **changes)  # type: ignore[arg-type]
        self.registry.add(ValidModel(spec, 1, ()))
        return self.registry.find(name).dispatcher

    def supervisor(self, name: str = "m") -> FakeSupervisor:
        supervisor: object = self.registry.find(name).supervisor
        assert isinstance(supervisor, FakeSupervisor)
        return supervisor

    async def pass_time(self, seconds: float) -> None:
        """Looks at the connections, lets time pass, and looks again. What that has ended has ended then."""
        self.connections.look(self._now)
        self._now += seconds
        self.connections.look(self._now)
        for _ in range(10):
            await asyncio.sleep(0)

    @asynccontextmanager
    async def client(self, receive_buffer: int = 0) -> AsyncIterator[Raw]:
        """A connection to the inference port. With a `receive_buffer` little is taken from it that is not read."""
        client = socket.socket()
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self.inference.port))
        limit = receive_buffer or 2**16
        reader, writer = await asyncio.open_connection(sock=client, limit=limit)
        try:
            yield Raw(reader, writer)
        finally:
            writer.transport.abort()

    async def raw(self, data: bytes) -> tuple[int, bytes, bytes]:
        """Sends bytes to the inference port and reads until the server closes: status, head, rest."""
        async with self.client() as client:
            client.send(data)
            head, _, rest = (await client.rest()).partition(b"\r\n\r\n")
        return status_of(head), head, rest

    async def __aenter__(self) -> Self:
        self.inference = Client(await self.make_inference())
        self.management = Client(Server(management_app(self.registry, self._options, self._keys), self._options))
        await self.inference.start_server()
        await self.management.start_server()
        assert isinstance(self.inference.server, Server)
        assert self.inference.server.runner is not None
        server: object = self.inference.server.runner.server
        assert isinstance(server, Connections)
        self.connections = server
        self.in_flight = _in_flight(self.inference.server.app)
        self.connections._timer.cancel()
        return self

    async def make_inference(self) -> Server:
        """What answers on the inference port."""
        app = inference_app(self.registry, self._options, self._keys)
        if not self._express:
            del app[EXPRESS]
        return Server(app, self._options)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.inference.close()
        await self.management.close()


def _in_flight(app: web.Application) -> InFlightBytes:
    """What the routes of /predictions count."""
    resources = (resource for resource in app.router.resources() if resource.canonical.startswith("/predictions/"))
    predict: object = inspect.unwrap(next(iter(next(resources))).handler)
    assert isinstance(predict, MethodType)
    assert isinstance(predict.__self__, Inference)
    return predict.__self__.in_flight
