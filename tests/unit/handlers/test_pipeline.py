from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from minserve.handlers.pipeline import Pipeline
from minserve.rank.failures import is_collective


def test_a_single_process_is_one_stage_and_raises_what_the_stage_raises() -> None:
    pipeline = Pipeline(torch.device("cpu"))
    assert (pipeline.stage, pipeline.stages, pipeline.is_first, pipeline.is_last) == (0, 1, True, True)
    assert pipeline.share(6) == range(6)
    x = torch.ones(2)
    assert pipeline.run(lambda a: a, x) == (x,)
    with pytest.raises(ZeroDivisionError):
        pipeline.run(lambda a: a / (1 // 0), x)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6])
def test_every_layer_is_on_exactly_one_stage_and_they_are_dealt_out_evenly(stages: int) -> None:
    pipeline = Pipeline(torch.device("cpu"))
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
