"""The bases for PiPPy and DeepSpeed, with stand-ins for their libraries; RPC is torch's own, in one process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import rpc

from minserve.compat.ts.handler_utils.distributed import deepspeed, pt_pippy
from minserve.compat.ts.torch_handler.distributed.base_deepspeed_handler import BaseDeepSpeedHandler
from minserve.compat.ts.torch_handler.distributed.base_pippy_handler import BasePippyHandler
from minserve.compat.ts.utils.util import PredictionException
from minserve.rank.failures import StageError, describe
from tests.unit.compat.conftest import MakeContext


def far(value: int) -> int:
    if value < 0:
        raise ValueError("too little")
    return value * 2


class Doubles(BasePippyHandler):
    """Rank 0 has another rank do the work: here itself, over RPC."""

    def preprocess(self, data: Any) -> Any:
        if data == ["bad"]:
            raise PredictionException("not today", 422)
        return data

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        if data == ["lost"]:
            raise RuntimeError("eof (this error originated at tensorpipe/transport/uv/connection_impl.cc:132)")
        if data == ["full"]:
            raise MemoryError
        return [rpc.rpc_sync("worker0", far, args=(value,)) for value in data]

    def postprocess(self, data: Any) -> Any:
        return data


@pytest.fixture
def rank_0(monkeypatch: pytest.MonkeyPatch, make_context: MakeContext) -> Iterator[Doubles]:
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TP_SOCKET_IFNAME", "")  # so that it is put back
    monkeypatch.delenv("TP_SOCKET_IFNAME")
    handler = Doubles()
    handler.initialize(make_context(pippy={"rpc_timeout": 50}))
    yield handler
    handler.close()


@pytest.mark.filterwarnings("ignore:You are using a Backend:UserWarning")  # torch's RPC does
def test_rank_0_drives_and_its_failures_are_its_own(rank_0: Doubles, make_context: MakeContext) -> None:
    assert (rank_0.local_rank, rank_0.world_size, rank_0.get_device()) == (0, 1, torch.device("cpu"))
    settings: Any = rpc  # torch does not say that it exports them
    assert settings.get_rpc_timeout() == 50
    assert os.environ["TP_SOCKET_IFNAME"] == "lo"  # RPC listens there, too, and not to the outside
    context = make_context()
    assert rank_0.handle([3], context) == [6]
    with pytest.raises(StageError) as refused:
        rank_0.handle(["bad"], context)
    error = refused.value
    assert (error.type_name, error.text, error.status, error.needs) == ("PredictionException", "not today", 422, (0,))
    with pytest.raises(StageError) as raised:
        rank_0.handle([-1], context)
    assert (raised.value.type_name, raised.value.text) == ("ValueError", "on rank 0: ValueError('too little')")
    assert "Traceback" not in describe(raised.value, 0, 2).text
    with pytest.raises(RuntimeError, match="tensorpipe"):
        rank_0.handle(["lost"], context)
    with pytest.raises(MemoryError):
        rank_0.handle(["full"], context)


def test_the_other_ranks_answer_without_running_the_model(make_context: MakeContext) -> None:
    handler = Doubles()
    handler.local_rank = 1
    assert handler.handle(["bad", "lost"], make_context()) == [b"", b""]
    handler.close()  # it has joined nothing


# ── pt_pippy ──


def pipeline(**pippy: object) -> dict[str, Any]:
    return {"pippy": {"input_names": ["x"], "model_type": "plain", **pippy}, "handler": {"model_path": "/weights"}}


class Model:
    def __init__(self) -> None:
        self.training = True

    def eval(self) -> None:
        self.training = False

    def forward(self, x: object, scale: int = 3) -> None:
        pass


def test_a_pipeline_is_what_the_yaml_says(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    pippy: Any = ModuleType("pippy")
    pippy.split_into_equal_size = lambda stages: f"{stages} stages"

    def all_compile(model: object, **options: Any) -> tuple[str, None]:
        asked.append(options)
        return "driver", None

    pippy.all_compile = all_compile
    helpers: Any = ModuleType("pippy.hf")
    helpers.PiPPyHFTracer = lambda: "tracer"
    injected: list[object] = []
    helpers.inject_pipeline_forward = lambda model, driver: injected.append(driver)
    monkeypatch.setitem(sys.modules, "pippy", pippy)
    monkeypatch.setitem(sys.modules, "pippy.hf", helpers)
    model = Model()
    assert pt_pippy.get_pipeline_driver(model, 4, make_context(**pipeline(chunks=2))) == "driver"
    assert not model.training
    expected = {"num_ranks": 4, "num_chunks": 2, "split_policy": "4 stages", "concrete_args": {"scale": 3}}
    assert asked[0] | {**expected, "tracer": None, "index_filename": None} == asked[0]
    assert pt_pippy.get_pipeline_driver(model, 4, make_context(**pipeline(model_type="HF"))) is model
    assert (injected, asked[1]["tracer"], asked[1]["num_chunks"]) == (["driver"], "tracer", 1)


@pytest.mark.parametrize(
    ("yaml", "text"),
    [
        ({}, "Missing 'pippy' key"),
        ({"pippy": {}}, "Missing 'handler' key"),
        ({"pippy": {}, "handler": {}}, "Missing 'input_names' key in 'pippy'"),
        ({**pipeline(), "handler": {}}, "Missing 'model_path' key in 'handler'"),
        ({**pipeline(), "handler": {"model_path": "/w", "index_filename": "i.json"}}, "no file /w/i.json"),
    ],
)
def test_a_yaml_without_what_a_pipeline_needs_is_told(
    make_context: MakeContext, yaml: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        pt_pippy.get_pipeline_driver(Model(), 2, make_context(**yaml))


def test_a_pippy_that_is_absent_or_too_new_is_told(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pippy", ModuleType("pippy"))
    with pytest.raises(ImportError, match="have no all_compile"):
        pt_pippy.get_pipeline_driver(Model(), 2, make_context(**pipeline()))
    monkeypatch.setattr("importlib.import_module", _absent)
    with pytest.raises(ModuleNotFoundError, match=r"need the package torchpippy 0\.1"):
        pt_pippy.get_pipeline_driver(Model(), 2, make_context(**pipeline()))


def _absent(name: str) -> ModuleType:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


# ── deepspeed ──


def test_the_device_of_deepspeed_is_the_local_rank(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    handler = BaseDeepSpeedHandler()
    handler.initialize(make_context())
    assert handler.device == 2


def test_an_engine_is_what_the_yaml_says(
    archive: Path, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    (archive / "ds.json").touch()
    weights = archive / "weights" / "part"
    weights.mkdir(parents=True)
    for name in ("b.bin", "a.pt", "c.txt"):
        (weights / name).touch()
    asked: list[Any] = []

    def init_inference(model: object, **options: Any) -> str:
        asked.append((model, options))
        return "engine"

    fake: Any = SimpleNamespace(init_inference=init_inference)
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    yaml = {
        "handler": {"model_path": str(archive / "weights")},
        "deepspeed": {"config": "ds.json", "checkpoint": "checkpoints.json"},
    }
    assert deepspeed.get_ds_engine("model", make_context(**yaml)) == "engine"
    options = {"config": str(archive / "ds.json"), "base_dir": str(archive / "weights")}
    assert asked == [("model", {**options, "checkpoint": str(archive / "checkpoints.json")})]
    listed = json.loads((archive / "checkpoints.json").read_text())
    assert (listed["type"], listed["version"]) == ("ds_model", 1.0)
    assert listed["checkpoints"] == [str(weights / "a.pt"), str(weights / "b.bin")]
    yaml["deepspeed"] = {}
    assert deepspeed.get_ds_engine("model", make_context(**yaml)) == "engine"
    assert asked[1][1]["config"] is asked[1][1]["checkpoint"] is None


@pytest.mark.parametrize(
    ("yaml", "text"),
    [
        ({}, "m has no deepspeed config in model config yaml file"),
        ({"deepspeed": {}}, r"no handler\.model_path"),
        ({"deepspeed": {"config": "x.json"}, "handler": {"model_path": "/w"}}, r"no deepspeed config file .*/x\.json"),
    ],
)
def test_a_yaml_without_what_an_engine_needs_is_told(
    make_context: MakeContext, yaml: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        deepspeed.get_ds_engine("model", make_context(**yaml))


def test_deepspeed_that_is_absent_is_told(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.import_module", _absent)
    with pytest.raises(ModuleNotFoundError, match="needs the package deepspeed"):
        deepspeed.get_ds_engine("model", make_context(deepspeed={}, handler={"model_path": "/w"}))
