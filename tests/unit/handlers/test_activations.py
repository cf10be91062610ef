from __future__ import annotations

import pytest
import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.testing._internal.two_tensor import TwoTensor

from minserve.handlers.activations import (
    DTYPES,
    HEADER_LENGTH,
    MAX_DIMS,
    MAX_TENSORS,
    Spec,
    pack,
    pack_failure,
    read_header,
    unpack_failure,
)
from minserve.handlers.tensor_memory import memory_of
from minserve.rank.failures import StageError
from minserve.rank.order import Ticket

CPU = torch.device("cpu")
TICKET = Ticket(7, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (1,) * MAX_DIMS])
def test_a_header_describes_its_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    header, payloads = pack([torch.zeros(shape).to(dtype)], CPU, TICKET)
    assert len(header) == HEADER_LENGTH
    ticket, failed, (spec,) = read_header(header)
    assert (ticket, failed, spec) == (TICKET, False, Spec(dtype, shape))
    assert sum(payload.numel() for payload in payloads) == spec.nbytes


def test_every_header_has_the_same_length() -> None:
    for count in range(MAX_TENSORS + 1):
        header, payloads = pack([torch.zeros(2)] * count, CPU, TICKET)
        assert len(header) == HEADER_LENGTH
        assert len(read_header(header).specs) == len(payloads) == count


@pytest.mark.parametrize("copy", [True, False])
def test_a_payload_is_a_copy_unless_the_hop_makes_one(copy: bool) -> None:
    activation = torch.ones(3)
    _, (payload,) = pack([activation], CPU, TICKET, copy=copy)
    activation.zero_()
    assert payload.view(torch.float32).tolist() == [float(copy)] * 3


def test_a_lazy_conjugate_is_resolved() -> None:
    conjugate = torch.tensor([1 + 2j]).conj()
    _, (payload,) = pack([conjugate], CPU, TICKET)
    assert payload.view(torch.complex64).tolist() == [1 - 2j]


def test_what_a_collective_has_yet_to_bring_is_waited_for() -> None:
    coming = AsyncCollectiveTensor(torch.arange(3.0))
    _, (payload,) = pack([coming], CPU, TICKET, copy=False)
    assert type(payload) is torch.Tensor
    assert torch.frombuffer(memory_of(payload), dtype=torch.float32).tolist() == [0, 1, 2]


def test_a_wrapper_without_memory_is_refused() -> None:
    with pytest.raises(TypeError, match="must return plain tensors, not TwoTensor"):
        pack([TwoTensor(torch.ones(3), torch.ones(3))], CPU, TICKET, copy=False)  # type: ignore[no-untyped-call]


def test_a_parameter_is_a_tensor_like_any_other() -> None:
    _, (payload,) = pack([torch.nn.Parameter(torch.ones(3))], CPU, TICKET, copy=False)
    assert payload.view(torch.float32).tolist() == [1, 1, 1]


def test_a_failure_arrives_with_all_it_says() -> None:
    failure = StageError(3, "LookupError", "no ä: " + "x" * 5000, "/a/b.py:12", (0, 1), 422)
    header, (payload,) = pack_failure(failure, CPU, TICKET)
    assert read_header(header).failed
    arrived = unpack_failure(payload, needs=(0, 1))
    assert (arrived.origin, arrived.type_name, arrived.place, arrived.needs) == (3, "LookupError", "/a/b.py:12", (0, 1))
    assert (arrived.text, arrived.status) == (failure.text, 422)


def test_what_is_no_header_says_that_the_ranks_have_lost_step() -> None:
    with pytest.raises(RuntimeError, match="out of step"):
        read_header([0] * HEADER_LENGTH)
