import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from minserve.errors import WorkerFailed
from minserve.worker.endpoints import LOOPBACK, Endpoints, close_all, listen_tcp, listen_unix, unix_endpoints

RUN = Path("/run/m1")


@contextmanager
def closing(listeners: list[socket.socket]) -> Iterator[list[socket.socket]]:
    try:
        yield listeners
    finally:
        close_all(listeners)


def accepts(address: str) -> bool:
    kind = socket.AF_UNIX if address.startswith("unix:") else socket.AF_INET
    place: str | tuple[str, int] = address.removeprefix("unix:")
    if kind == socket.AF_INET:
        place = (LOOPBACK, int(address.rpartition(":")[2]))
    with socket.socket(kind, socket.SOCK_STREAM) as client:
        return client.connect_ex(place) == 0


def free_run(count: int) -> int:
    """The first of some consecutive free ports."""
    for base in range(41000, 60000, count):
        with ExitStack() as stack:
            try:
                for port in range(base, base + count):
                    stack.enter_context(socket.socket()).bind((LOOPBACK, port))
            except OSError:
                continue
            return base
    raise AssertionError("no free ports")


def test_two_workers_of_two_ranks_have_worker_0_to_worker_3() -> None:
    names = [name for slot in (0, 1) for name in unix_endpoints(RUN, slot, 2).addresses]
    assert names == [f"unix:/run/m1/worker.{index}" for index in range(4)]


@pytest.mark.parametrize(
    ("endpoints", "text"),
    [
        (Endpoints("unix:/run/m1/worker.", 4, 1), "unix:/run/m1/worker.4"),
        (Endpoints("tcp:127.0.0.1:", 29500, 4), "tcp:127.0.0.1:29500 … 29503"),
    ],
)
def test_endpoints_in_words(endpoints: Endpoints, text: str) -> None:
    assert str(endpoints) == text


def test_unix_listeners_are_there_before_any_rank_and_gone_when_closed(tmp_path: Path) -> None:
    endpoints = unix_endpoints(tmp_path, 1, 3)
    with closing(listen_unix(endpoints)) as listeners:
        assert all(map(accepts, endpoints.addresses))
        assert not any(listener.getblocking() for listener in listeners)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["worker.3", "worker.4", "worker.5"]
    assert list(tmp_path.iterdir()) == []
    close_all(listeners)


def test_a_socket_that_a_killed_incarnation_left_is_replaced(tmp_path: Path) -> None:
    endpoints = unix_endpoints(tmp_path, 0, 1)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "worker.0"))
    with closing(listen_unix(endpoints)):
        assert accepts(endpoints.addresses[0])


def test_tcp_takes_consecutive_ports_behind_one_that_is_taken() -> None:
    first = free_run(8)
    with socket.socket() as taken:
        taken.bind((LOOPBACK, first + 2))
        endpoints, listeners = listen_tcp(4, first)
        with closing(listeners):
            assert endpoints == Endpoints(f"tcp:{LOOPBACK}:", first + 3, 4)
            assert [listener.getsockname() for listener in listeners] == [(LOOPBACK, first + 3 + k) for k in range(4)]
            assert all(map(accepts, endpoints.addresses))


def test_two_workers_get_ports_one_behind_the_other() -> None:
    first = free_run(4)
    one, listeners = listen_tcp(2, first)
    with closing(listeners):
        two, others = listen_tcp(2, first)
        close_all(others)
    assert (one.base, two.base) == (first, first + 2)


def test_without_enough_ports_the_error_says_so() -> None:
    with pytest.raises(WorkerFailed, match=r"no 3 consecutive free ports on 127.0.0.1 from 65534 on"):
        listen_tcp(3, 65534)


def test_another_failure_than_a_taken_port_is_no_reason_to_look_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_socket(*arguments: object) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("minserve.worker.endpoints.socket.socket", no_socket)
    with pytest.raises(WorkerFailed, match="Too many open files"):
        listen_tcp(2, 41000)
