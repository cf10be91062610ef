"""The frontend over real HTTP on loopback, with models that answer in memory."""

import asyncio
import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from minserve.dispatch.dispatcher import Dispatcher
from minserve.dispatch.request import Request
from minserve.errors import MinServeError
from minserve.frontend.app import inference_app, management_app, runner
from minserve.registry.models import Registry, ValidModel
from minserve.wire.messages import Answer
from minserve.worker.devices import DeviceAllocator, Inventory
from minserve.worker.runtime import RuntimeDirectory
from minserve.worker.spec import ModelSpec
from minserve.worker.worker import WorkerReport
from tests.unit.worker.specs import make_spec

MAX_BODY = 1000

Client = TestClient[web.Request, web.Application]


class FakeSupervisor:
    """Starts nothing; tests set what it reports."""

    def __init__(
        self,
        spec: ModelSpec,
        count: int,
        directory: Path,
        dispatcher: Dispatcher,
        devices: DeviceAllocator,
        environ: Mapping[str, str],
        on_change: Callable[[], None],
    ) -> None:
        self.reports: list[WorkerReport] = []
        self.unhealthy: MinServeError | None = None
        self.stopped: list[float] = []

    def start(self) -> None:
        pass

    async def stop(self, drain_timeout: float) -> None:
        self.stopped.append(drain_timeout)

    def report(self) -> list[WorkerReport]:
        return self.reports


class Lane:
    """A worker that hands each request to the test."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.handle: Callable[[Request], None] = echo

    def has_place(self) -> bool:
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
        self._models = 0

    def new_model_directory(self) -> Path:
        return Path("/nonexistent")


class Server(TestServer):
    """Runs the application as `minserve start` does."""

    async def _make_runner(self, **kwargs: object) -> web.AppRunner:
        return runner(self.app)


class Rig:
    """Both applications over one registry. Model "m" is there from the start."""

    def __init__(self) -> None:
        self.registry = Registry(FakeRuntime(), Inventory(), {}, lambda: None)
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

    async def raw(self, data: bytes) -> tuple[int, bytes, bytes]:
        """Sends bytes to the inference port and reads until the server closes: status, head, rest."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.inference.port)
        try:
            writer.write(data)
            async with asyncio.timeout(10):
                answer = await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()
        head, _, rest = answer.partition(b"\r\n\r\n")
        match = re.match(rb"HTTP/1.[01] (\d+)", head)
        assert match, answer
        return int(match[1]), head, rest

    async def __aenter__(self) -> Self:
        self.inference = Client(Server(inference_app(self.registry, MAX_BODY)))
        self.management = Client(Server(management_app(self.registry, MAX_BODY)))
        await self.inference.start_server()
        await self.management.start_server()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.inference.close()
        await self.management.close()
