from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

import minserve
from minserve.rank import streaming
from minserve.rank.context import Context
from minserve.rank.failures import describe
from minserve.rank.inbox import Inbox
from minserve.rank.requests import RequestProcessor
from minserve.rank.streaming import Stream
from minserve.wire.frames import Kind
from tests.unit.rank.rig import FakeConnection, FakeSlot, new_context, requests

pytestmark = pytest.mark.usefixtures("ts_on_the_path")


@pytest.fixture
def ts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(minserve.__file__).parent / "compat")


def test_the_context_is_ours_under_torchserves_name() -> None:
    module = importlib.import_module("ts.context")
    assert module.Context is Context
    assert module.RequestProcessor is RequestProcessor


@pytest.mark.parametrize(("arguments", "code"), [(("bad input",), 500), (("bad input", 422), 422)])
def test_a_prediction_exception_has_torchserves_members(arguments: tuple[object, ...], code: int) -> None:
    error = importlib.import_module("ts.utils.util").PredictionException(*arguments)
    assert (error.message, error.error_code) == ("bad input", code)
    failure = describe(error, 0, 1)
    assert (failure.text, failure.status, failure.type_name) == ("bad input", code, "PredictionException")


def test_what_handlers_ask_of_the_package_has_an_answer() -> None:
    base = importlib.import_module("ts.torch_handler.base_handler")
    there = [getattr(base, f"{name}_AVAILABLE") for name in ("PT2", "PT230", "PROFILER", "XLA", "IPEX")]
    assert there == [True, True, True, False, False]
    assert importlib.import_module("ts").__version__ == "0.12.0"


def test_the_streaming_function_has_torchserves_signature() -> None:
    send = importlib.import_module("ts.handler_utils.utils").send_intermediate_predict_response
    signature = inspect.signature(send)
    assert list(signature.parameters) == ["ret", "req_id_map", "message", "code", "context"]
    signature.bind(["x"], {0: "id"}, "ok", 200)  # the context may be left out


def test_the_streaming_function_sends_on_the_current_stream_and_elsewhere_is_a_no_op(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send = importlib.import_module("ts.handler_utils.utils").send_intermediate_predict_response
    connection, context = FakeConnection(), new_context(*requests(b"", b""))
    stream = Stream(connection, Inbox(connection), FakeSlot(), context, 3, 2, 8, True, lambda refusal, seq: None)
    send(["nobody"], {0: "r0"}, "ok", 200, context)
    monkeypatch.setattr(streaming, "_current", stream)
    send(["a"], {1: "r1"}, "ok", 200, context)
    assert connection.answers(Kind.CHUNK) == [[(1, b"a")]]
    assert connection.log == [">CHUNK 3"]
