from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.distributed as dist

from minserve.handlers.activations import HEADER_LENGTH, pack
from minserve.handlers.pipeline import Pipeline
from minserve.handlers.socket_hops import SocketInlet, SocketOutlet
from minserve.rank import streaming
from minserve.rank.failures import is_collective
from minserve.rank.order import Ticket
from tests.unit.handlers.wire import Wire
from tests.unit.rank.rig import Running

CPU = torch.device("cpu")


def test_a_single_process_is_one_stage_and_raises_what_the_stage_raises() -> None:
    pipeline = Pipeline(CPU)
    assert (pipeline.stage, pipeline.stages, pipeline.is_first, pipeline.is_last) == (0, 1, True, True)
    assert pipeline.share(6) == range(6)
    x = torch.ones(2)
    assert pipeline.run(lambda a: a, x) == (x,)
    with pytest.raises(ZeroDivisionError):
        pipeline.run(lambda a: a / (1 // 0), x)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6])
def test_every_layer_is_on_exactly_one_stage_and_they_are_dealt_out_evenly(stages: int) -> None:
    pipeline = Pipeline(CPU)
    pipeline.stages = stages
    shares = []
    for pipeline.stage in range(stages):
        shares.append(pipeline.share(6))
    assert [layer for share in shares for layer in share] == list(range(6))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_error_of_a_collective_is_told_from_one_of_the_stage() -> None:
    with pytest.raises(ValueError, match="process group has not been initialized") as collective:
        dist.all_reduce(torch.ones(1))
    with pytest.raises(RuntimeError) as own:
        torch.ones(2) @ torch.ones(3)
    assert is_collective(collective.value)
    assert is_collective(dist.DistBackendError("NCCL"))
    assert not is_collective(own.value)


def test_the_last_stage_takes_up_batches_however_many_results_the_first_one_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    activations, results = Wire(10**6), Wire()
    last = Pipeline(CPU)
    last.stages, last.stage, last.is_first, last.is_last = 2, 1, False, True
    last._inlet, last._outlet = SocketInlet(activations.socket, "rank 0"), SocketOutlet(results.socket, "rank 0")
    for seq in (1, 2, 3, 4):
        SocketOutlet(activations.socket, "rank 1").send(pack([torch.full((2,), seq)], CPU, Ticket(seq, 1)))
        batch = SimpleNamespace(seq=seq, runs=0, apart=0, at_end=None)
        monkeypatch.setattr(streaming, "_current", cast("streaming.Chunks", batch))
        Running(last.run, lambda x: x + 1).result()
    results.let(*[10**6] * 4)
    assert [results.next_blocked() for _ in range(4)] == [8 * HEADER_LENGTH + 16] * 4
