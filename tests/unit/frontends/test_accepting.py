"""Two that accept on one socket, in one event loop; connections that stay are shared out evenly."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import pytest
import pytest_asyncio

from minserve.frontends.accepting import Accepting
from minserve.frontends.shared import Shared
from tests.unit.worker.specs import until

pytestmark = pytest.mark.asyncio


class Process:
    """Counts the connections that it gets, as `SharedConnections` does."""

    def __init__(self, listener: socket.socket, shared: Shared, own: int) -> None:
        self._counts = shared.connections
        self._own = own
        self.accepting = Accepting(listener.dup(), self, shared.connections, own, None, 1.0)  # type: ignore[arg-type]

    def __call__(self) -> asyncio.Protocol:
        self._counts[self._own] += 1
        return asyncio.Protocol()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


@pytest_asyncio.fixture
async def shared(listener: socket.socket) -> AsyncIterator[Shared]:
    shared = Shared.create(2)
    processes = [Process(listener, shared, own) for own in (0, 1)]
    yield shared
    for process in processes:
        process.accepting.stop()


async def connect(listener: socket.socket, shared: Shared, clients: int, stack: ExitStack) -> None:
    there = sum(shared.connections) + clients
    for _ in range(clients):
        stack.enter_context(socket.create_connection(listener.getsockname()))
    await until(lambda: sum(shared.connections) >= there)


async def test_a_few_are_shared_out_evenly(listener: socket.socket, shared: Shared) -> None:
    with ExitStack() as stack:
        for _ in range(6):
            await connect(listener, shared, 1, stack)
        assert [*shared.connections] == [3, 3]


async def test_many_at_once_are_shared_out_nearly_evenly(listener: socket.socket, shared: Shared) -> None:
    with ExitStack() as stack:
        await connect(listener, shared, 64, stack)
        assert min(shared.connections) >= 26


async def test_one_that_has_more_takes_them_all_the_same_when_the_other_does_not(
    listener: socket.socket,
) -> None:
    shared = Shared.create(2)
    only = Process(listener, shared, 0)
    with ExitStack() as stack:
        await connect(listener, shared, 5, stack)
    only.accepting.stop()
    assert [*shared.connections] == [5, 0]
