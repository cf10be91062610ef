from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minserve.handlers.activations import DTYPES, HEADER_LENGTH, Outgoing, pack
from minserve.handlers.hops import Message
from minserve.handlers.socket_hops import SocketInlet, SocketOutlet
from minserve.rank.failures import is_collective
from minserve.rank.order import Ticket
from minserve.rank.threads import HOP_THREAD
from tests.unit.handlers.wire import Wire
from tests.unit.rank.rig import Running

CPU = torch.device("cpu")
HEADER_BYTES = 8 * HEADER_LENGTH
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        yield ours, theirs


def message(number: int, *tensors: Tensor) -> Outgoing:
    return pack(tensors, CPU, Ticket(number, 1), copy=False)


def received(wire: Wire) -> Message:
    return SocketInlet(wire.socket, "stage 0").receive()


def outlet(wire: Wire) -> SocketOutlet:
    return SocketOutlet(wire.socket, "rank 1")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_arrives_in_memory_of_its_own(pair: Pair, dtype: torch.dtype) -> None:
    whole = torch.tensor([[0, 1, 2], [3, 0, 5]]).to(dtype)
    sent = [whole, whole.t(), whole[:0], whole[0, 0], torch.ones(3)]
    SocketOutlet(pair[0], "rank 1").send(pack(sent, CPU, Ticket(7, 2), copy=False)).wait()
    ticket, failed, tensors = SocketInlet(pair[1], "rank 0").receive()
    assert (ticket, failed, len(tensors)) == ((7, 2), False, 5)
    for one, other in zip(sent, tensors, strict=True):
        assert (other.dtype, other.shape) == (one.dtype, one.shape)
        assert torch.equal(other.to(torch.complex128), one.to(torch.complex128))


def test_a_message_without_tensors_arrives(pair: Pair) -> None:
    SocketOutlet(pair[0], "rank 1").send(message(1)).wait()
    assert SocketInlet(pair[1], "rank 0").receive() == ((1, 1), False, ())


@pytest.mark.parametrize("room", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + 4004])
def test_what_is_not_taken_at_once_goes_on_while_the_memory_is_used_again(room: int) -> None:
    wire, activation, other = Wire(room), torch.arange(1000), torch.ones(3)
    sending = outlet(wire).send(message(1, activation, other))
    activation.zero_()
    other.zero_()
    while wire.next_blocked() > 777:
        wire.let(777)
    wire.let(777)
    sending.wait()
    ticket, _, (first, second) = received(wire)
    assert (ticket.seq, first.tolist(), second.tolist()) == (1, list(range(1000)), [1, 1, 1])
    assert not wire.taken


def test_later_messages_queue_behind_one_that_waits_and_the_thread_ends_with_the_last() -> None:
    wire = Wire(100)
    out = outlet(wire)
    sendings = [out.send(message(number, torch.full((number,), number))) for number in (1, 2, 3)]
    wire.room = 10**6  # from now on it would take all, but those in front come first
    sendings.append(out.send(message(4, torch.full((4,), 4))))
    lasting = [Running(sending.wait) for sending in sendings]
    for number, length in ((1, HEADER_BYTES + 8 - 100), (2, HEADER_BYTES + 16), (3, HEADER_BYTES + 24)):
        assert wire.next_blocked() == length
        wire.let(length)
        lasting[number - 1].result()
    assert wire.next_blocked() == HEADER_BYTES + 32
    sender = next(thread for thread in threading.enumerate() if thread.name == HOP_THREAD)
    wire.let(HEADER_BYTES + 32)
    lasting[3].result()
    sender.join(60)
    assert not sender.is_alive()
    out.send(message(5, torch.full((5,), 5))).wait()
    arrived = [received(wire) for _ in range(5)]
    assert [(one.ticket.seq, one.tensors[0].tolist()) for one in arrived] == [(n, [n] * n) for n in (1, 2, 3, 4, 5)]


def test_whoever_waits_hears_that_the_other_end_is_gone() -> None:
    wire = Wire(100)
    out = outlet(wire)
    sendings = [out.send(message(number, torch.ones(3))) for number in (1, 2)]
    wire.next_blocked()
    wire.let(300)
    wire.next_blocked()
    wire.let(BrokenPipeError())
    for sending in sendings:
        with pytest.raises(dist.DistNetworkError, match="the connection to rank 1 is closed") as gone:
            sending.wait()
        assert is_collective(gone.value)


def test_sending_to_an_end_that_is_closed_is_an_error_of_the_group(pair: Pair) -> None:
    pair[1].close()
    with pytest.raises(dist.DistNetworkError, match="the connection to rank 1 is closed") as gone:
        SocketOutlet(pair[0], "rank 1").send(message(1, torch.ones(3)))
    assert is_collective(gone.value)


@pytest.mark.parametrize("came", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 11])
def test_an_end_in_the_middle_of_a_message_is_an_error_of_the_group(pair: Pair, came: int) -> None:
    wire = Wire(came)
    wire.let(10**6)
    outlet(wire).send(message(1, torch.ones(3))).wait()
    pair[0].sendall(wire.taken[:came])
    pair[0].close()
    with pytest.raises(dist.DistNetworkError, match="the connection to rank 0 is closed") as gone:
        SocketInlet(pair[1], "rank 0").receive()
    assert is_collective(gone.value)


def test_a_reset_is_one_too(pair: Pair) -> None:
    pair[1].sendall(b"what the other end has not read when it goes")
    pair[0].close()
    with pytest.raises(dist.DistNetworkError):
        SocketInlet(pair[1], "rank 0").receive()


def test_what_is_no_message_says_that_the_ranks_have_lost_step(pair: Pair) -> None:
    pair[0].sendall(bytes(HEADER_BYTES))
    with pytest.raises(RuntimeError, match="out of step"):
        SocketInlet(pair[1], "rank 0").receive()


def test_without_memory_for_the_rest_the_other_end_is_not_left_with_half_a_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(*arguments: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    wire = Wire(100)
    outgoing = message(1, torch.ones(3))
    monkeypatch.setattr(torch.Tensor, "clone", no_memory)
    with pytest.raises(RuntimeError, match="can't allocate"):
        outlet(wire).send(outgoing)
    assert wire.taken.endswith(b"shut down")


def test_nothing_follows_half_a_message_whatever_the_thread_came_to() -> None:
    wire = Wire(100)
    sending = outlet(wire).send(message(1, torch.ones(3)))
    wire.next_blocked()
    wire.let(MemoryError())
    with pytest.raises(dist.DistNetworkError) as gone:
        sending.wait()
    assert isinstance(gone.value.__cause__, MemoryError)
    assert wire.taken.endswith(b"shut down")


def test_what_comes_lies_in_the_memory_of_the_cpu_whatever_the_default_device_is(pair: Pair) -> None:
    SocketOutlet(pair[0], "rank 1").send(message(1, torch.ones(3))).wait()
    with torch.device("meta"):
        (tensor,) = SocketInlet(pair[1], "rank 0").receive().tensors
    assert (tensor.device, tensor.tolist()) == (CPU, [1, 1, 1])


def test_a_time_limit_that_a_library_has_set_for_all_sockets_does_not_count(pair: Pair) -> None:
    for end in pair:
        end.settimeout(0.001)
    SocketOutlet(pair[0], "rank 1"), SocketInlet(pair[1], "rank 0")
    assert [end.gettimeout() for end in pair] == [None, None]
