from __future__ import annotations

import sys
from http import HTTPStatus
from types import SimpleNamespace

import pytest

from minserve.rank.failures import MAX_TEXT, MAX_TRACEBACK, StageError, describe, issued_collectives, place_of
from minserve.wire.frames import Kind
from minserve.wire.messages import Failure, pack

DISTRIBUTED = "/venv/torch/distributed/distributed_c10d.py"


class OutOfMemoryError(RuntimeError):
    """Stands for torch's."""


class AcceleratorError(RuntimeError):
    """Stands for torch's."""


class DistError(RuntimeError):
    """Stands for torch.distributed's."""


class DistNetworkError(DistError):
    pass


def caught(error: BaseException, filename: str = "/model/handler.py") -> BaseException:
    """The error as if it had been raised in line 2 of a file."""
    try:
        exec(compile("\nraise error", filename, "exec"), {"error": error})
    except BaseException as raised:
        return raised
    raise AssertionError


def test_an_error_is_described_by_type_text_and_place() -> None:
    failure = describe(caught(LookupError("no such token")), rank=1, world_size=3)
    assert failure == Failure(
        kind="own",
        type_name="LookupError",
        text="no such token",
        place="/model/handler.py:2",
        traceback=failure.traceback,
        origin=1,
        needs=(0, 1, 2),
        status=0,
    )
    assert failure.traceback.startswith("Traceback")
    assert failure.traceback.endswith("LookupError: no such token\n")


def test_the_same_error_on_two_ranks_has_the_same_type_and_place() -> None:
    one, two = (describe(caught(ValueError(f"shape of rank {rank}")), rank, 2) for rank in range(2))
    assert (one.type_name, one.place) == (two.type_name, two.place)


def test_the_place_is_the_innermost_frame() -> None:
    def inner() -> None:
        int("x")

    with pytest.raises(ValueError, match="invalid literal") as error:
        inner()
    assert place_of(error.value) == f"{__file__}:{inner.__code__.co_firstlineno + 1}"


def test_an_error_that_was_never_raised_has_no_place() -> None:
    assert place_of(ValueError()) == ""


def test_a_stage_error_tells_of_the_stage_that_raised_first() -> None:
    error = caught(StageError(3, "LookupError", "no such token", "/model/stage.py:9", (0, 1)))
    failure = describe(error, rank=0, world_size=4)
    assert (failure.kind, failure.type_name, failure.text) == ("own", "LookupError", "no such token")
    assert (failure.origin, failure.place, failure.needs) == (3, "/model/stage.py:9", (0, 1))
    assert "StageError" in failure.traceback


@pytest.mark.parametrize(
    ("error", "filename", "kind"),
    [
        (MemoryError(), "/m.py", "memory"),
        (OutOfMemoryError("CUDA out of memory, CUDA error"), "/m.py", "memory"),
        (AcceleratorError("an illegal access"), "/m.py", "device"),
        (RuntimeError("CUDA error: device-side assert triggered"), DISTRIBUTED, "device"),
        (DistError("timed out"), "/m.py", "collective"),
        (DistNetworkError("refused"), "/m.py", "collective"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), "/m.py", "collective"),
        (RuntimeError("NCCL communicator was aborted"), "/m.py", "collective"),
        (RuntimeError("Application timeout caused pair closure"), DISTRIBUTED, "collective"),
        (ValueError("raised on another rank"), "/venv/torch/distributed/rpc/internal.py", "own"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "/m.py", "own"),
        (ValueError("gloo is a fish"), "/m.py", "own"),
        (NotImplementedError("NCCL"), "/m.py", "own"),
    ],
)
def test_causes_are_told_from_victims(
    error: Exception, filename: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(OutOfMemoryError=OutOfMemoryError, AcceleratorError=AcceleratorError)
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setitem(sys.modules, "torch.distributed", SimpleNamespace(DistError=DistError))
    assert describe(caught(error, filename), 0, 2).kind == kind


def test_without_torch_every_error_is_the_handlers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delitem(sys.modules, "torch.distributed", raising=False)
    assert describe(caught(OutOfMemoryError("x")), 0, 1).kind == "own"
    assert "torch" not in sys.modules


def test_the_names_that_torch_has_today() -> None:
    import torch
    import torch.distributed

    assert describe(caught(torch.OutOfMemoryError("x")), 0, 2).kind == "memory"
    assert describe(caught(torch.distributed.DistBackendError("x")), 0, 2).kind == "collective"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (400, 400),
        (503, 503),
        (599, 599),
        (HTTPStatus.NOT_FOUND, 404),
        (200, 0),
        (600, 0),
        ("404", 0),
        (None, 0),
        (True, 0),
    ],
)
def test_the_status_is_the_errors_code_where_that_is_an_http_error(code: object, status: int) -> None:
    error = ValueError("x")
    setattr(error, "error_code", code)  # noqa: B010  # as PredictionException has it
    assert describe(error, 0, 1).status == status


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError


def test_a_text_that_cannot_be_had_does_not_hide_the_error() -> None:
    failure = describe(caught(Mute()), 0, 1)
    assert (failure.type_name, failure.place) == ("Mute", "/model/handler.py:2")
    assert "__str__ raised" in failure.text


@pytest.mark.parametrize("kind", [ValueError, KeyError, lambda text: StageError(0, "E", text, "", (0,))])
def test_a_text_with_a_lone_surrogate_can_be_sent(kind: type[Exception]) -> None:
    """A client puts one into JSON as \\ud800, or as a stray byte into a header; the handler says so in its error."""
    failure = describe(caught(kind("bad name: \ud800")), 0, 1)
    assert r"\ud800" in failure.text
    assert pack(Kind.ERROR, failure, seq=1)


def test_torchscripts_own_traceback_stays_in_the_log() -> None:
    text = (
        "The following operation failed in the TorchScript interpreter.\nTraceback of TorchScript, serialized code (most "
        'recent call last):\n  File "code/model.py", line 12, in forward\n    return torch.linear(x)\n'
        "           ~~~~ <--- HERE\n"
        "\nRuntimeError: shapes cannot be multiplied: 1x2\nand 3x2\n"
    )
    failure = describe(caught(RuntimeError(text)), 0, 1)
    assert failure.text == (
        "The following operation failed in the TorchScript interpreter: "
        "RuntimeError: shapes cannot be multiplied: 1x2\nand 3x2"
    )
    assert "<--- HERE" in failure.traceback


def test_long_texts_are_cut_where_they_tell_least() -> None:
    failure = describe(caught(ValueError("begin" + "x" * 10**6 + "end")), 0, 1)
    assert len(failure.text) == MAX_TEXT
    assert failure.text.startswith("begin")
    assert len(failure.traceback) <= MAX_TRACEBACK
    assert failure.traceback.endswith("end\n")


class Group:
    """Stands for torch's: it has issued `count` collectives. While it is asked the handler makes another group."""

    def __init__(self, count: int, groups: dict[object, None]) -> None:
        self.count = count
        self.groups = groups

    def _get_sequence_number_for_group(self) -> int:
        self.groups[object()] = None
        return self.count


def distributed(groups: dict[object, None], initialized: bool = True) -> SimpleNamespace:
    """Stands for torch.distributed."""
    c10d = SimpleNamespace(_world=SimpleNamespace(pg_map=groups))
    return SimpleNamespace(is_initialized=lambda: initialized, distributed_c10d=c10d)


def test_collectives_are_counted_over_all_groups_also_while_groups_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: dict[object, None] = {}
    groups |= {Group(3, groups): None, Group(4, groups): None}
    monkeypatch.setitem(sys.modules, "torch.distributed", distributed(groups))
    assert issued_collectives() == 7


@pytest.mark.parametrize(
    "module", [None, SimpleNamespace(), distributed({}, initialized=False), distributed({1: None})]
)
def test_where_torch_does_not_count_there_are_none(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be in the middle of its import, or of another version: the heartbeat asks at any time."""
    monkeypatch.setitem(sys.modules, "torch.distributed", module)
    assert issued_collectives() == 0
