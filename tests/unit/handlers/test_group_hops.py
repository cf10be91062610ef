"""Over a group in memory. As with gloo a message is out once it is received, with what its memory has by then."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minserve.handlers.activations import DTYPES, HEADER_LENGTH, pack, pack_failure, unpack_failure
from minserve.handlers.group_hops import GroupInlet, GroupOutlet
from minserve.rank.failures import StageError
from minserve.rank.order import Ticket

CPU = torch.device("cpu")


class Work:
    def __init__(self, part: Tensor) -> None:
        self.part = part
        self.waited = False
        self.error: RuntimeError | None = None

    def wait(self) -> None:
        if self.error is not None:
            raise self.error
        self.waited = True


class MemoryGroup:
    """Its sends and receives, as torch.distributed has them."""

    def __init__(self) -> None:
        self.sent: defaultdict[int, deque[Work]] = defaultdict(deque)  # by the rank that they go to
        self.error: RuntimeError | None = None

    @property
    def group(self) -> dist.ProcessGroup:
        return cast("dist.ProcessGroup", self)

    def isend(self, part: Tensor, to: int, group: object) -> Work:
        assert group is self
        self.sent[to].append(Work(part))
        return self.sent[to][-1]

    def recv(self, room: Tensor, source: int, group: object) -> None:
        """What was sent to whoever: one end only sends, the other one only receives."""
        assert group is self
        if self.error is not None:
            raise self.error
        part = self.sent[source].popleft().part
        assert (part.dtype, part.shape) == (room.dtype, room.shape), "gloo would leave old bytes, or abort"
        room.copy_(part)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> MemoryGroup:
    made = MemoryGroup()
    monkeypatch.setattr(dist, "isend", made.isend)
    monkeypatch.setattr(dist, "recv", made.recv)
    return made


def ends(group: MemoryGroup) -> tuple[GroupOutlet, GroupInlet]:
    return GroupOutlet(1, group.group, CPU), GroupInlet(1, group.group, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_arrives_in_memory_of_its_own(group: MemoryGroup, dtype: torch.dtype) -> None:
    outlet, inlet = ends(group)
    whole = torch.tensor([[0, 1, 2], [3, 0, 5]]).to(dtype)
    sent = [whole, whole.t(), whole[:0], whole[0, 0], torch.ones(3)]
    outlet.send(pack(sent, CPU, Ticket(7, 2)))
    ticket, failed, tensors = inlet.receive()
    assert (ticket, failed, len(tensors)) == ((7, 2), False, 5)
    for one, other in zip(sent, tensors, strict=True):
        assert (other.dtype, other.shape) == (one.dtype, one.shape)
        assert torch.equal(other.to(torch.complex128), one.to(torch.complex128))


def test_messages_of_any_shapes_keep_their_order_and_nothing_is_sent_for_what_is_empty(group: MemoryGroup) -> None:
    outlet, inlet = ends(group)
    shapes = [(2, 3), (0, 5), (), (7,)]
    for seq, shape in enumerate(shapes, 1):
        outlet.send(pack([torch.full(shape, float(seq))], CPU, Ticket(seq, 1)))
    outlet.send(pack([], CPU, Ticket(5, 1)))
    assert [work.part.numel() for work in group.sent[1]] == [
        *(HEADER_LENGTH, 24, HEADER_LENGTH, HEADER_LENGTH, 4, HEADER_LENGTH, 28, HEADER_LENGTH)
    ]
    for seq, shape in enumerate(shapes, 1):
        (tensor,) = inlet.receive().tensors
        assert torch.equal(tensor, torch.full(shape, float(seq)))
    assert inlet.receive() == ((5, 1), False, ())
    assert not group.sent[1]


def test_it_copies_nothing_so_what_is_packed_for_it_must_be_a_copy(group: MemoryGroup) -> None:
    outlet, inlet = ends(group)
    assert not outlet.copies
    kept = torch.ones(3)
    outlet.send(pack([kept], CPU, Ticket(1, 1), copy=not outlet.copies))
    outlet.send(pack([kept], CPU, Ticket(2, 1), copy=False))
    kept.zero_()
    assert [inlet.receive().tensors[0].tolist() for _ in "12"] == [[1, 1, 1], [0, 0, 0]]


def test_a_failure_arrives_as_one(group: MemoryGroup) -> None:
    outlet, inlet = ends(group)
    outlet.send(pack_failure(StageError(2, "LookupError", "no ä", "model.py:3", (0,), 404), CPU, Ticket(3, 1)))
    ticket, failed, (described,) = inlet.receive()
    assert (ticket, failed) == ((3, 1), True)
    error = unpack_failure(described, (0,))
    assert (error.origin, error.type_name, error.text, error.status) == (2, "LookupError", "no ä", 404)


def test_to_wait_for_a_message_is_to_wait_for_all_its_parts(group: MemoryGroup) -> None:
    outlet, _ = ends(group)
    sending = outlet.send(pack([torch.ones(1), torch.ones(2)], CPU, Ticket(1, 1)))
    works = list(group.sent[1])
    assert [work.waited for work in works] == [False] * 3
    sending.wait()
    assert [work.waited for work in works] == [True] * 3


def test_a_broken_group_is_heard_of_where_somebody_waits(group: MemoryGroup) -> None:
    outlet, inlet = ends(group)
    sending = outlet.send(pack([torch.ones(1)], CPU, Ticket(1, 1)))
    group.error = group.sent[1][1].error = RuntimeError("[pair.cc:1] Connection closed by peer")
    for wait in (sending.wait, inlet.receive):
        with pytest.raises(RuntimeError, match="closed by peer"):
            wait()


def test_what_is_no_message_says_that_the_ranks_have_lost_step(group: MemoryGroup) -> None:
    _, inlet = ends(group)
    group.isend(torch.zeros(HEADER_LENGTH, dtype=torch.int64), 1, group)
    with pytest.raises(RuntimeError, match="out of step"):
        inlet.receive()


def test_whether_a_message_has_begun_to_come_cannot_be_told(group: MemoryGroup) -> None:
    assert ends(group)[1].ready is None
