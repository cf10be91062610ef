from __future__ import annotations

import os
import socket
import struct
from typing import cast

import pytest

from minserve.handlers.ring import accept_from


class Caller:
    """A connection of some process."""

    def __init__(self, pid: int, uid: int) -> None:
        self._credentials = struct.pack("3i", pid, uid, 0)
        self.closed = False

    def getsockopt(self, level: int, option: int, length: int) -> bytes:
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_PEERCRED)
        return self._credentials[:length]

    def close(self) -> None:
        self.closed = True


class Listener:
    def __init__(self, *callers: Caller) -> None:
        self._callers = iter(callers)

    def accept(self) -> tuple[Caller, str]:
        return next(self._callers), ""


def test_another_process_or_user_is_refused() -> None:
    strangers = [Caller(4711, os.getuid()), Caller(7, os.getuid() + 1)]
    wanted = Caller(7, os.getuid())
    listener = cast("socket.socket", Listener(*strangers, wanted))
    assert accept_from(listener, 7) is cast("object", wanted)
    assert all(stranger.closed for stranger in strangers)
    assert not wanted.closed


def test_the_kernel_tells_who_a_caller_is() -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as caller:
        listener.bind(b"")
        listener.listen()
        caller.connect(listener.getsockname())
        with accept_from(listener, os.getpid()) as accepted:
            caller.sendall(b"hello")
            assert accepted.recv(5) == b"hello"
            assert not accepted.get_inheritable()


def test_who_does_not_come_is_not_waited_for_without_end() -> None:
    class Patience(Listener):
        def accept(self) -> tuple[Caller, str]:
            raise TimeoutError

    with pytest.raises(OSError):  # noqa: PT011  # a TimeoutError is one
        accept_from(cast("socket.socket", Patience()), 7)
