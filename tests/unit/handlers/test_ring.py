from __future__ import annotations

import socket
import warnings
from collections.abc import Iterator
from typing import cast

import pytest
import torch
import torch.distributed as dist

from minserve.handlers import ring
from minserve.handlers.ring import accept_from

KEY = b"0123456789abcdef"


class Callers:
    """A listener. What each caller has said; None: it says nothing."""

    def __init__(self, *said: bytes | None) -> None:
        self.callers: list[socket.socket] = []
        self._said = iter(said)

    def accept(self) -> tuple[socket.socket, str]:
        said = next(self._said)
        ours, caller = socket.socketpair(socket.AF_UNIX)
        self.callers.append(caller)
        if said == b"":
            caller.shutdown(socket.SHUT_RDWR)
        elif said is not None:
            caller.sendall(said)
        return ours, ""


@pytest.fixture
def callers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callers]:
    monkeypatch.setattr(ring, "KEY_S", 0.01)
    callers = Callers(b"0123456789abcdeX", b"short", b"", None, KEY + b"hello")
    yield callers
    for caller in callers.callers:
        caller.close()


def test_whoever_does_not_show_the_key_is_refused(callers: Callers) -> None:
    with accept_from(cast("socket.socket", callers), KEY) as accepted:
        assert accepted.recv(5) == b"hello"
        assert not accepted.get_inheritable()
        *strangers, wanted = callers.callers
        for stranger in strangers:
            with pytest.raises(BrokenPipeError):
                stranger.sendall(b"more")
        wanted.sendall(b"more")


def test_who_does_not_come_is_not_waited_for_without_end() -> None:
    class Patience(Callers):
        def accept(self) -> tuple[socket.socket, str]:
            raise TimeoutError

    with pytest.raises(TimeoutError, match="the stage before this one has not connected in 60 s"):
        accept_from(cast("socket.socket", Patience()), KEY)


def test_no_socket_is_left_when_a_rank_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange(group: object, mine: bytes) -> list[bytes]:
        return [mine, bytes(ring.KEY_BYTES) + mine[ring.KEY_BYTES :]]  # it calls itself, with a wrong key

    monkeypatch.setattr(ring, "PATIENCE_S", 0.01)
    monkeypatch.setattr(ring, "_exchange", exchange)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(TimeoutError):
            ring._connect(cast("dist.ProcessGroup", None), 0)
    assert not caught


def test_two_ends_of_a_ring_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "_exchange", lambda group, mine: [mine, mine])
    to_next, from_last = ring._connect(cast("dist.ProcessGroup", None), 0)
    with to_next, from_last:
        to_next.sendall(b"hello")
        assert from_last.recv(9) == b"hello"


def test_ranks_exchange_bytes_whatever_the_default_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(cards: list[torch.Tensor], mine: torch.Tensor, group: object) -> None:
        for card in cards:
            card.copy_(mine)

    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_gather", gather)
    with torch.device("meta"):
        assert ring._exchange(cast("dist.ProcessGroup", None), b"\0\xffname") == [b"\0\xffname"] * 2
