import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from minserve.wire.frames import HEADER, Kind, encode, header
from minserve.wire.messages import Answers, Hello, pack
from minserve.worker.acceptor import MAX_STRANGERS, Acceptor, Arrival, Expected
from minserve.worker.endpoints import Endpoints, close_all, listen_tcp, listen_unix, unix_endpoints
from tests.unit.worker.specs import until

pytestmark = pytest.mark.asyncio

SECRET = "the incarnation's secret"
RANKS = 3


def hello(
    rank: int,
    pid: int = 0,
    secret: str = SECRET,
    worker: str = "m-0-abcd",
    world_size: int = RANKS,
    local_rank: int | None = None,
) -> bytes:
    local = rank if local_rank is None else local_rank
    return pack(Kind.HELLO, Hello(rank, local, world_size, pid or 100 + rank, worker, secret))


class Setup:
    """An acceptor, and clients that connect to it."""

    def __init__(self, endpoints: Endpoints, listeners: list[socket.socket]) -> None:
        self.endpoints = endpoints
        self.listeners = listeners
        self.order: list[int] = []
        self.clients: list[socket.socket] = []
        expected = Expected(RANKS, "m-0-abcd", SECRET)
        self.acceptor = Acceptor(listeners, expected, lambda arrival: self.order.append(arrival.hello.pid))
        self.run: asyncio.Task[Sequence[Arrival]] | None = None

    def client(self, rank: int, data: bytes) -> socket.socket:
        """Connects to the endpoint of a rank, which works at once as long as the backlog has room, and says something."""
        address = self.endpoints.addresses[rank]
        kind = socket.AF_UNIX if address.startswith("unix:") else socket.AF_INET
        client = socket.socket(kind, socket.SOCK_STREAM)
        self.clients.append(client)
        if kind == socket.AF_UNIX:
            client.connect(address.removeprefix("unix:"))
        else:
            client.connect(("127.0.0.1", int(address.rpartition(":")[2])))
        client.sendall(data)
        client.setblocking(False)
        return client

    async def all_arrive(self) -> Sequence[Arrival]:
        async with asyncio.timeout(10):
            arrivals = await (self.run or self.acceptor.run())
        for arrival in arrivals:
            arrival.socket.close()
        return arrivals


@pytest_asyncio.fixture(params=["unix", "tcp"])
async def setup(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Setup]:
    if request.param == "unix":
        endpoints = unix_endpoints(tmp_path, 0, RANKS)
        listeners = listen_unix(endpoints)
    else:
        endpoints, listeners = listen_tcp(RANKS, 42000)
    setup = Setup(endpoints, listeners)
    yield setup
    if setup.run is not None:
        setup.run.cancel()
        await asyncio.gather(setup.run, return_exceptions=True)
    for client in setup.clients:
        client.close()
    close_all(listeners)


async def closed(client: socket.socket) -> bool:
    """Whether the other end is closed; waits for it."""
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionResetError):  # closed with bytes of ours unread
            return await asyncio.get_running_loop().sock_recv(client, 1) == b""
    return True


async def test_all_ranks_arrive_in_whatever_order_and_come_out_in_rank_order(setup: Setup) -> None:
    for rank in (2, 0, 1):
        setup.client(rank, hello(rank))
    arrivals = await setup.all_arrive()
    assert [arrival.hello.pid for arrival in arrivals] == [100, 101, 102]
    assert sorted(setup.order) == [100, 101, 102]
    assert setup.acceptor.missing == []


async def test_the_listeners_close_behind_the_last_rank(setup: Setup) -> None:
    for rank in range(RANKS):
        setup.client(rank, hello(rank))
    await setup.all_arrive()
    for rank in range(RANKS):
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            setup.client(rank, hello(rank))
    if setup.endpoints.prefix.startswith("unix:"):
        assert os.listdir(Path(setup.endpoints.prefix.removeprefix("unix:")).parent) == []


async def test_without_all_ranks_a_time_limit_ends_it_and_says_who_is_missing(setup: Setup) -> None:
    clients = [setup.client(rank, hello(rank)) for rank in (0, 2)]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(setup.acceptor.run(), 0.1)
    assert setup.acceptor.missing == [1]
    for client in clients:
        assert await asyncio.get_running_loop().sock_recv(client, HEADER.size) == encode(Kind.MEMORY)
        assert await closed(client), "those that came are let go"
    with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
        setup.client(1, hello(1))


IMPOSTORS = [
    (lambda: hello(1, secret="guessed"), "wrong secret"),
    (lambda: hello(1, secret=""), "wrong secret"),
    (lambda: hello(1, worker="m-0-old"), "belongs to m-0-old with 3 ranks"),
    (lambda: hello(1, world_size=4), "belongs to m-0-abcd with 4 ranks"),
    (lambda: hello(0), "is rank 0 (local rank 0), which has another endpoint"),
    (lambda: hello(1, local_rank=0), "is rank 1 (local rank 0), which has another endpoint"),
    (lambda: hello(7), "is rank 7 (local rank 7), which has another endpoint"),
    (lambda: b"\xff" * 5000, "not a minserve frame"),
    (lambda: b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "not a minserve frame"),
    (lambda: encode(Kind.HELLO, meta=b"\xc1"), "bad Hello message"),
    (lambda: encode(Kind.HELLO, meta=b"\x92\x01\x02"), "bad Hello message"),
    (lambda: pack(Kind.REPLY, Answers(())), "frame kind 5 is not allowed"),
    (lambda: header(Kind.HELLO, 0, 2**31, 0), "frame meta of 2147483648 bytes"),
    (lambda: header(Kind.HELLO, 0, 10, 2**40), "frame body of"),
    (lambda: hello(1) + b"\0", "bytes behind HELLO"),
]


@pytest.mark.parametrize(("says", "reason"), IMPOSTORS, ids=[reason[:24] for _, reason in IMPOSTORS])
async def test_an_impostor_is_closed_and_logged_and_the_rank_gets_in(
    setup: Setup, says: Callable[[], bytes], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    setup.run = asyncio.create_task(setup.acceptor.run())
    impostor = setup.client(1, says())
    assert await closed(impostor)
    assert f"m-0-abcd: closed a connection on the endpoint of rank 1: {reason}" in caplog.text
    for rank in range(RANKS):
        setup.client(rank, hello(rank))
    assert [arrival.hello.pid for arrival in await setup.all_arrive()] == [100, 101, 102]


async def test_a_second_connection_for_a_rank_is_closed_and_the_first_stays(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    setup.run = asyncio.create_task(setup.acceptor.run())
    setup.client(0, hello(0))
    await until(lambda: 0 not in setup.acceptor.missing)
    second = setup.client(0, hello(0, pid=666))
    assert await closed(second)
    assert "second connection for rank 0, pid 666" in caplog.text
    for rank in (1, 2):
        setup.client(rank, hello(rank))
    assert [arrival.hello.pid for arrival in await setup.all_arrive()] == [100, 101, 102]
    assert 666 not in setup.order


@pytest.mark.parametrize("said", [b"", hello(1)[:10], hello(1)[:-1]])
async def test_one_that_says_nothing_or_half_a_hello_delays_no_rank(setup: Setup, said: bytes) -> None:
    stranger = setup.client(1, said)
    for rank in range(RANKS):
        setup.client(rank, hello(rank))
    await setup.all_arrive()
    assert await closed(stranger), "it goes when the listeners do"


@pytest.mark.parametrize("said", [b"", hello(1)[:10], hello(1)[:-1]])
async def test_one_that_says_nothing_or_half_a_hello_is_closed_after_a_while(
    setup: Setup, said: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("minserve.worker.acceptor.HELLO_TIMEOUT_S", 0.05)
    setup.run = asyncio.create_task(setup.acceptor.run())
    assert await closed(setup.client(1, said))
    assert "endpoint of rank 1: no HELLO within 0.05 s" in caplog.text
    assert not setup.run.done()


async def test_one_that_hangs_up_is_logged(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    setup.client(1, hello(1)[:10]).close()
    setup.client(1, b"").close()
    for rank in range(RANKS):
        setup.client(rank, hello(rank))
    await setup.all_arrive()
    assert caplog.text.count("closed before HELLO") == 2


async def test_a_hello_may_come_in_pieces(setup: Setup) -> None:
    setup.run = asyncio.create_task(setup.acceptor.run())
    for rank in (0, 2):
        setup.client(rank, hello(rank))
    slow = setup.client(1, b"")
    for byte in hello(1):
        await asyncio.get_running_loop().sock_sendall(slow, bytes([byte]))
        await asyncio.sleep(0)
    await setup.all_arrive()


async def test_more_silent_strangers_than_are_let_in_at_once_only_delay_the_rank(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minserve.worker.acceptor.HELLO_TIMEOUT_S", 0.05)
    setup.run = asyncio.create_task(setup.acceptor.run())
    for _ in range(MAX_STRANGERS + 8):
        setup.client(0, b"")
        await asyncio.sleep(0)
    for rank in range(RANKS):
        setup.client(rank, hello(rank))
    await setup.all_arrive()
