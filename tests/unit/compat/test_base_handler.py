"""BaseHandler with archives of each kind: what it loads, how it answers, what it says when it cannot."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from minserve.compat.ts.torch_handler import base_handler, model_files, profiling
from minserve.compat.ts.torch_handler.base_handler import BaseHandler
from minserve.compat.ts.torch_handler.densenet_handler import DenseNetHandler
from minserve.compat.ts.utils.util import PredictionException
from minserve.rank.context import Context
from minserve.rank.loading import load_handler
from tests.unit.compat.conftest import WEIGHTS, MakeContext, Times

ROWS = [[1.0, 2.0], [3.0, 4.0]]
ANSWERS = [[1.0, 12.0], [3.0, 34.0]]

quiet_jit = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


class Linear(torch.nn.Module):
    """What the archive's model file has, for TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(WEIGHTS)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.weight.T


def loaded(context: Context) -> BaseHandler:
    handler = BaseHandler()
    handler.initialize(context)
    return handler


def script(path: Path) -> None:
    torch.jit.trace(Linear(), torch.ones(1, 2)).save(str(path))  # type: ignore[no-untyped-call]


# ── loading ──


def test_an_eager_model_answers_from_its_weights(make_context: MakeContext) -> None:
    context = make_context(count=2)
    handler = loaded(context)
    assert handler.handle(ROWS, context) == ANSWERS
    assert handler.initialized
    assert not handler.model.training
    assert handler.mapping == {"0": "cat", "1": "dog"}
    assert (handler.get_device(), handler.map_location) == (torch.device("cpu"), "cpu")
    times: Any = context.metrics
    assert times.names == ["HandlerTime"]


@quiet_jit
def test_torchscript_needs_no_model_file(archive: Path, make_context: MakeContext) -> None:
    script(archive / "ts.pt")
    context = make_context({"serializedFile": "ts.pt"})
    assert loaded(context).handle(ROWS, context) == ANSWERS


def test_a_checkpoint_that_is_more_than_weights_is_loaded_too(
    archive: Path, make_context: MakeContext, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"linear.weight": WEIGHTS, "_metadata": SimpleNamespace()}, archive / "rows.pt")
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError, match="_metadata"):
        loaded(make_context())  # torch then says what it has too much
    assert "rows.pt is more than weights" in caplog.text
    assert model_files.load_saved(str(archive / "rows.pt"))["_metadata"] == SimpleNamespace()


def test_a_model_file_may_have_the_name_of_another_module(archive: Path, make_context: MakeContext) -> None:
    (archive / "rows.py").rename(archive / "json.py")
    context = make_context({"modelFile": "json.py", "serializedFile": "rows.pt"})
    assert loaded(context).handle(ROWS, context) == ANSWERS
    assert sys.modules["json"] is json


@quiet_jit
@pytest.mark.parametrize(
    ("files", "kind", "text"),
    [
        ({}, RuntimeError, "neither modelFile nor serializedFile"),
        ({"modelFile": "absent.py"}, RuntimeError, "Missing the absent.py file"),
        ({"modelFile": "several.py"}, ValueError, "only one class as model definition in several.py, found One, Two"),
        ({"serializedFile": "rows.pt"}, RuntimeError, "rows.pt is not TorchScript"),
        ({"serializedFile": "rows.pth"}, RuntimeError, r"rows.pth must be TorchScript \(.pt\)"),
        ({"serializedFile": "rows.so"}, RuntimeError, "aot_compile: true"),
    ],
)
def test_what_cannot_be_loaded_is_told(
    archive: Path, make_context: MakeContext, files: dict[str, str], kind: type[Exception], text: str
) -> None:
    (archive / "several.py").write_text("class One: pass\nclass Two: pass\n")
    with pytest.raises(kind, match=text):
        loaded(make_context(files))


def test_onnx_without_its_package_is_told(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"m\.onnx needs the package onnxruntime"):
        loaded(make_context({"serializedFile": "m.onnx"}))


def test_onnx_is_a_session_on_this_ranks_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = ModuleType("onnxruntime")
    fake.SessionOptions = SimpleNamespace
    fake.InferenceSession = lambda path, sess_options, providers: (path, providers)
    fake.__spec__ = object()
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    assert model_files.load_onnx("m.onnx", torch.device("cpu")) == ("m.onnx", ["CPUExecutionProvider"])
    gpu = ("CUDAExecutionProvider", {"device_id": 3})
    assert model_files.load_onnx("m.onnx", torch.device("cuda:3")) == ("m.onnx", [gpu, "CPUExecutionProvider"])


def test_a_compiled_library_goes_to_torch(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._export, "aot_load", lambda path, device: lambda rows: rows @ WEIGHTS.T)
    context = make_context({"serializedFile": "m.so"}, pt2={"export": {"aot_compile": True}})
    assert loaded(context).handle(ROWS, context) == ANSWERS


def test_the_device_is_the_ranks_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert model_files.choose_device(1) == ("cuda", torch.device("cuda:1"))
    assert model_files.choose_device(None) == ("cpu", torch.device("cpu"))


# ── torch.compile ──


@pytest.mark.parametrize(
    ("pt2", "line"),
    [
        ("eager", "Compiled model with backend eager"),
        ({"backend": "eager", "dynamic": True}, "Compiled model with backend eager, dynamic True"),
        ({"compile": {"enable": True, "backend": "eager"}}, "Compiled model with backend eager"),
        ({"compile": {"enable": False, "backend": "eager"}}, None),
        ({"compile": {"backend": "eager"}}, None),
        ({"export": {"aot_compile": False}}, None),
        ({"compile": {"enable": True, "backend": "nope"}}, "nope is not a supported backend"),
        ({"compile": {"enable": True, "mode": "nope"}}, "Compiling model with backend inductor, mode nope has failed"),
    ],
)
def test_the_yaml_asks_for_torch_compile_and_the_log_says_which(
    make_context: MakeContext, caplog: pytest.LogCaptureFixture, pt2: Any, line: str | None
) -> None:
    before = repr(pt2)
    with caplog.at_level(logging.INFO):
        context = make_context(pt2=pt2)
        handler = loaded(context)
    compiled = line is not None and line.startswith("Compiled model with")
    assert hasattr(handler.model, "_orig_mod") == compiled
    assert line is None or line in caplog.text
    assert ("Compiled model" in caplog.text) == compiled
    assert repr(context.model_yaml_config["pt2"]) == before
    assert handler.handle(ROWS, context) == ANSWERS


def test_a_pt2_that_is_nothing_of_the_kind_is_refused(make_context: MakeContext) -> None:
    for pt2 in (3, {"compile": "yes"}):
        with pytest.raises(ValueError, match="should be"):
            loaded(make_context(pt2=pt2))


# ── answering ──


def test_a_description_is_the_handlers_own(make_context: MakeContext) -> None:
    class Described(BaseHandler):
        def describe_handle(self) -> Any:
            return {"classes": 2}

    context = make_context(headers={"describe": "True"})
    handler = Described()
    handler.initialize(context)
    assert handler.handle([{}], context) == [{"classes": 2}]
    plain = loaded(context)
    assert plain.handle([{}], context) == [None]


def test_an_explanation_is_captums(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    captum: Any = ModuleType("captum.attr")
    captum.IntegratedGradients = lambda model: SimpleNamespace(
        attribute=lambda rows, target, n_steps: model(rows)[:, target] * n_steps
    )
    monkeypatch.setitem(sys.modules, "captum", ModuleType("captum"))
    monkeypatch.setitem(sys.modules, "captum.attr", captum)

    class Rows(BaseHandler):
        def preprocess(self, data: Any) -> Any:
            return torch.tensor([row["body"] for row in data])

    context = make_context(headers={"explain": "True"})
    handler = Rows()
    handler.initialize(context)
    assert handler.handle([{"body": [1.0, 2.0]}], context) == [15.0]
    assert handler.explain
    assert handler.handle([{"body": [1.0, 2.0], "target": 1}], context) == [15.0 * 12]
    assert handler.handle([{"body": [1.0, 2.0], "target": bytearray(b"1")}], context) == [15.0 * 12]
    with pytest.raises(PredictionException, match="the number of a class"):
        handler.handle([{"body": [1.0, 2.0], "target": "cat"}], context)
    later = make_context(headers={"explain": "False"})
    assert handler.handle([{"body": [1.0, 2.0]}], later) == [[1.0, 12.0]]
    assert not handler.explain


def test_an_explanation_without_captum_says_what_is_missing(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'captum'", name="captum")

    monkeypatch.setattr("importlib.import_module", absent)
    context = make_context(headers={"explain": "True"})
    with pytest.raises(PredictionException, match="need the package captum") as caught:
        loaded(context).handle([[1.0, 2.0]], context)
    assert caught.value.error_code == 501


def test_a_profiled_batch_leaves_a_trace(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(profiling, "TRACES", str(tmp_path))
    monkeypatch.setenv("ENABLE_TORCH_PROFILER", "1")
    context = make_context(count=2)
    handler = loaded(context)
    handler.manifest = None  # of a handler with an initialize of its own
    with caplog.at_level(logging.INFO):
        assert handler.handle(ROWS, context) == ANSWERS
    (trace,) = (tmp_path / "m").iterdir()
    assert all(f'"{step}"' in trace.read_text() for step in ("preprocess", "inference", "postprocess"))
    assert "postprocess" in caplog.text


def test_the_yaml_asks_for_the_time_of_each_step(make_context: MakeContext) -> None:
    context = make_context(count=2, handler={"profile": True})
    loaded(context).handle(ROWS, context)
    times: Any = context.metrics
    steps = ["ts_handler_preprocess", "ts_handler_inference", "ts_handler_postprocess"]
    assert times.names == [*steps, "HandlerTime"]


def test_it_serves_by_its_name_inside_an_envelope(
    make_context: MakeContext, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(base_handler.__file__).parents[2])
    monkeypatch.chdir(archive)
    context = make_context()
    handler = load_handler(archive, "base_handler", context, "json", archive=True)
    answer = handler.handle([{"body": {"instances": ROWS}}], context)
    assert answer == [json.dumps({"predictions": ANSWERS})]


# ── densenet_handler ──


@quiet_jit
@pytest.mark.parametrize("files", [{"modelFile": "rows.py", "serializedFile": "rows.pt"}, {"serializedFile": "ts.pt"}])
def test_densenet_takes_and_gives_saved_tensors(
    archive: Path, make_context: MakeContext, files: dict[str, str]
) -> None:
    script(archive / "ts.pt")
    context = make_context(files, count=2)
    handler = DenseNetHandler()
    handler.initialize(context)
    data: list[dict[str, object]] = []
    for row in ROWS:
        torch.save(torch.tensor(row), buffer := io.BytesIO())
        data.append({"body": bytearray(buffer.getvalue())})
    assert [answer.tolist() for answer in handler.handle(data, context)] == [[row] for row in ANSWERS]
    assert isinstance(context.metrics, Times)


def test_densenet_unpickles_nothing_of_a_clients(make_context: MakeContext) -> None:
    context = make_context()
    handler = DenseNetHandler()
    handler.initialize(context)
    torch.save(SimpleNamespace(), buffer := io.BytesIO())
    with pytest.raises(Exception, match="Weights only load failed"):
        handler.handle([{"body": buffer.getvalue()}], context)
    with pytest.raises(RuntimeError, match=r"Missing the absent\.pt file"):
        handler.initialize(make_context({"serializedFile": "absent.pt"}))
