"""Pipelines on real ranks: over sockets, as under one torchrun, and over the process group, as between hosts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minserve.handlers.activations import DTYPES
from minserve.handlers.mesh import build_mesh
from minserve.handlers.pipeline import Pipeline
from minserve.rank import streaming
from minserve.rank.failures import StageError
from tests.integration.handlers.group import run_group

CPU = torch.device("cpu")
Ranks = Callable[..., list[Any]]
SHAPES = [(1, 64), (4, 3), (1, 2, 5), (300, 200), (0, 8), (), (1,)]


@pytest.fixture(params=["sockets", "group"])
def ranks(request: pytest.FixtureRequest, tmp_path: Path) -> Ranks:
    """`run_group`, with either kind of hops."""
    return functools.partial(run_group, tmp_path, one_agent=request.param == "sockets")


def step(stage: int, x: Tensor) -> Tensor:
    return torch.tanh(x * (stage + 2) + stage)


def through_all(stages: int, x: Tensor) -> Tensor:
    for stage in range(stages):
        x = step(stage, x)
    return x


def send_shapes(rank: int) -> list[tuple[Tensor, ...] | None]:
    pipeline = Pipeline(CPU)
    torch.manual_seed(0)
    return [pipeline.run(lambda x: step(rank, x), torch.randn(shape)) for shape in SHAPES]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_any_shape_after_any_other_gives_the_result_of_one_process(ranks: Ranks, stages: int) -> None:
    first, *others = ranks(stages, send_shapes)
    torch.manual_seed(0)
    for shape, (result,) in zip(SHAPES, first, strict=True):
        assert torch.equal(result, through_all(stages, torch.randn(shape)))
    assert others == [[None] * len(SHAPES)] * (stages - 1)


def some_of_each_dtype() -> list[Tensor]:
    return [torch.tensor([[0, 1, 2], [3, 0, 5]]).to(dtype).t() for dtype in DTYPES]  # transposed: not contiguous


def send_dtypes(rank: int) -> list[tuple[Tensor, ...] | None]:
    pipeline = Pipeline(CPU)
    return [pipeline.run(lambda *xs: xs, x, x[:0], x[0, 0], torch.ones(5)) for x in some_of_each_dtype()]


def test_every_dtype_and_several_tensors_in_a_hop(ranks: Ranks) -> None:
    first, _ = ranks(2, send_dtypes)
    for sent, (whole, empty, scalar, other) in zip(some_of_each_dtype(), first, strict=True):
        assert (whole.dtype, whole.shape) == (sent.dtype, sent.shape)
        assert torch.equal(whole.to(torch.complex128), sent.to(torch.complex128))
        assert (empty.dtype, tuple(empty.shape)) == (sent.dtype, (0, 2))
        assert torch.equal(scalar.to(torch.complex128), sent[0, 0].to(torch.complex128))
        assert torch.equal(other, torch.ones(5))


def fail_then_work(rank: int, failing: int) -> tuple[Any, ...]:
    pipeline = Pipeline(CPU)

    def stage(x: Tensor) -> Tensor:
        if rank == failing and x.numel() == 1:
            raise LookupError(f"stage {rank} has no such thing: ä")
        return step(rank, x)

    outcomes: list[Any] = []
    for x in (torch.ones(1), torch.ones(3), torch.ones(1), torch.ones(2)):
        try:
            outcomes.append(pipeline.run(stage, x))
        except StageError as error:
            cause = type(error.__cause__).__name__
            outcomes.append((error.origin, error.type_name, error.text, error.place, error.needs, cause))
    return tuple(outcomes)


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_a_failing_stage_is_heard_by_all_later_ones_and_the_first_and_the_next_batch_is_right(
    ranks: Ranks, failing: int
) -> None:
    outcomes = ranks(4, fail_then_work, failing)
    for rank, (failed, worked, failed_again, worked_again) in enumerate(outcomes):
        if 0 < rank < failing:
            assert failed is None
        else:
            origin, type_name, text, place, needs, cause = failed
            assert (origin, type_name, text) == (failing, "LookupError", f"stage {failing} has no such thing: ä")
            assert place.rsplit(":", 1)[0] == __file__
            assert needs == (0,)
            assert cause == ("LookupError" if rank == failing else "NoneType")
        assert failed_again == failed
        if rank == 0:
            assert torch.equal(worked[0], through_all(4, torch.ones(3)))
            assert torch.equal(worked_again[0], through_all(4, torch.ones(2)))
        else:
            assert worked is worked_again is None


RUNS = 3


def fail_in_batches(rank: int, failing: int, pipelines: int) -> list[str]:
    """Each batch is several runs, of one pipeline or of two in turns, and fails in another one; the last in none."""
    made = [Pipeline(CPU) for _ in range(pipelines)]
    outcomes = []
    for seq in range(1, RUNS + 2):
        batch = SimpleNamespace(seq=seq, runs=0, apart=0, at_end=None)
        streaming.set_current(cast("streaming.Chunks", batch))

        def stage(x: Tensor, batch: SimpleNamespace = batch) -> Tensor:
            if rank == failing and batch.runs == batch.seq:
                raise LookupError(f"run {batch.runs}")
            return step(rank, x)

        try:
            outcome, result = "done", torch.ones(seq)
            for run in range(RUNS):
                (result,) = made[run % pipelines].run(stage, result) or (result,)
            if rank == 0:
                expected = torch.ones(seq)
                for _ in range(RUNS):
                    expected = through_all(4, expected)
                assert torch.equal(result, expected)
        except StageError as error:
            outcome = f"{error.text} of rank {error.origin}"
        if batch.at_end is not None:
            batch.at_end()
        outcomes.append(outcome)
    streaming.set_current(None)
    dist.barrier()  # a rank that ends takes along what is still on its way
    return outcomes


@pytest.mark.parametrize("pipelines", [1, 2])
@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_a_stage_in_front_of_the_one_that_fails_hears_of_it_where_it_waits_for_the_next_run(
    ranks: Ranks, failing: int, pipelines: int
) -> None:
    failed = [f"run {number} of rank {failing}" for number in range(1, RUNS + 1)]
    for rank, outcomes in enumerate(ranks(4, fail_in_batches, failing, pipelines)):
        if 0 < rank < failing:
            assert outcomes == [*failed[:-1], "done", "done"], "behind the last run there is nothing to hear"
        else:
            assert outcomes == [*failed, "done"]


def return_what_cannot_be_sent(rank: int, failing: int) -> list[str]:
    pipeline = Pipeline(CPU)
    bad: list[Any] = [torch.ones(2, 2).to_sparse(), torch.ones([1] * 9), [torch.ones(1)] * 9, 5, ["text"], None]
    told = []
    for outputs in bad:
        try:
            result = pipeline.run(lambda x, out=outputs: out if rank == failing else x, torch.ones(1))
            told.append(str(result))
        except StageError as error:
            told.append(error.type_name)
    return told


@pytest.mark.parametrize("failing", [0, 1])
def test_what_cannot_be_sent_is_a_failure_of_its_stage(ranks: Ranks, failing: int) -> None:
    expected = ["TypeError", "ValueError", "ValueError", "TypeError", "TypeError", "TypeError"]
    assert ranks(2, return_what_cannot_be_sent, failing) == [expected, expected]


class Stop(BaseException):
    """As minserve.Cancelled: not an Exception."""


def stop_in_the_last_stage(rank: int) -> str:
    def stage(x: Tensor) -> Tensor:
        if rank == 1:
            raise Stop
        return x

    try:
        Pipeline(CPU).run(stage, torch.ones(1))
    except BaseException as error:
        dist.destroy_process_group()  # rank 1's breaks the connection that rank 0 waits on
        return type(error).__name__
    return "nothing"


def test_neither_a_base_exception_nor_a_broken_group_becomes_a_stage_error(ranks: Ranks) -> None:
    broken, stopped = ranks(2, stop_in_the_last_stage)
    assert stopped == "Stop"
    assert broken in ("RuntimeError", "DistBackendError", "DistNetworkError")


def send_in_columns(rank: int) -> tuple[Any, ...]:
    mesh = build_mesh(CPU, tp=2)
    pipeline = Pipeline(CPU, mesh)
    column = mesh.get_local_rank("tp")
    result = pipeline.run(lambda x: step(pipeline.stage, x), torch.ones(3) * column)

    def fail(x: Tensor) -> Tensor:
        raise LookupError(f"column {column}")

    try:
        failure = pipeline.run(fail if pipeline.is_last else lambda x: x, torch.ones(1))
    except StageError as error:
        return result, error.text, error.origin, error.needs
    return result, failure


def test_in_a_mesh_each_column_returns_to_its_own_first_stage(ranks: Ranks) -> None:
    outcomes = ranks(4, send_in_columns)
    for column in (0, 1):
        result, text, origin, needs = outcomes[column]
        assert torch.equal(result[0], through_all(2, torch.ones(3) * column))
        assert (text, origin, needs) == (f"column {column}", 2 + column, (0, 1))
        assert outcomes[2 + column] == (None, f"column {column}", 2 + column, (0, 1))


def send_large(rank: int) -> list[Any]:
    """Several times what a socket takes at once; the stages return the same memory each time."""
    pipeline = Pipeline(CPU)
    kept = torch.empty(5_000_000)
    sizes = []
    for number in range(4):
        x = torch.full((kept.numel() >> number,), float(number))
        result = pipeline.run(lambda x: torch.add(x, 1, out=kept[: x.numel()]), x)
        sizes.append(None if result is None else (result[0].numel(), torch.equal(result[0], x + 3)))
    return sizes


def test_activations_larger_than_a_sockets_buffer(ranks: Ranks) -> None:
    assert ranks(3, send_large)[0] == [(5_000_000 >> number, True) for number in range(4)]


def name_ends(rank: int) -> list[str]:
    pipeline = Pipeline(CPU)
    return [type(end).__name__ for end in (pipeline._outlet, pipeline._inlet)]


@pytest.mark.parametrize(("one_agent", "kind"), [(True, "Socket"), (False, "Group")])
def test_sockets_are_for_ranks_that_one_agent_has_started(tmp_path: Path, one_agent: bool, kind: str) -> None:
    assert run_group(tmp_path, 2, name_ends, one_agent=one_agent) == [[f"{kind}Outlet", f"{kind}Inlet"]] * 2


def build_bad_mesh(rank: int) -> str:
    with pytest.raises(ValueError, match="2 ranks cannot be split into stages of 3"):
        build_mesh(CPU, tp=3)
    with pytest.raises(ValueError, match="1 layers cannot be split over 2 stages"):
        Pipeline(CPU).share(1)
    return str(Pipeline(CPU).share(5))


def test_impossible_splits_are_refused(ranks: Ranks) -> None:
    assert ranks(2, build_bad_mesh) == ["range(0, 2)", "range(2, 5)"]
