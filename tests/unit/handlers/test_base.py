from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from minserve.handlers import BaseHandler, bad_request
from minserve.rank.context import Context


def context(**config: object) -> Context:
    statuses: dict[int, int] = {}
    types: dict[int, str] = {}
    fake = SimpleNamespace(
        model_yaml_config=config,
        statuses=statuses,
        types=types,
        set_response_status=lambda code, phrase, index: statuses.update({index: code}),
        set_response_content_type=lambda index, value: types.update({index: value}),
    )
    return cast("Context", fake)


class Doubler(BaseHandler):
    def load(self, context: Context) -> None:
        self.loaded_on = self.device

    def preprocess(self, data: list[dict[str, Any]]) -> torch.Tensor:
        return torch.tensor([row["body"] for row in data])

    def inference(self, inputs: torch.Tensor) -> torch.Tensor | None:
        assert torch.is_inference_mode_enabled()
        return None if self.rank == 1 else inputs * 2

    def postprocess(self, outputs: torch.Tensor) -> list[object]:
        return cast("list[object]", outputs.tolist())


def test_a_batch_passes_through_the_three_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    handler = Doubler()
    handler.initialize(context(deviceType="cpu"))
    assert (handler.rank, handler.local_rank, handler.world_size) == (0, 0, 1)
    assert handler.loaded_on == torch.device("cpu")
    assert handler.handle([{"body": 1}, {"body": 4}], context()) == [2, 8]
    handler.close()  # no group: nothing to leave


def test_a_rank_without_a_result_ends_before_postprocess() -> None:
    handler = Doubler()
    handler.rank = 1
    assert handler.handle([{"body": 1}], context()) is None


@pytest.mark.parametrize(
    ("device_type", "gpus", "local_rank", "device"),
    [("", 0, 1, "cpu"), ("", 2, 1, "cuda:1"), ("gpu", 2, 0, "cuda:0"), ("CPU", 2, 1, "cpu")],
)
def test_the_device_is_the_local_ranks_gpu_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, device_type: str, gpus: int, local_rank: int, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    handler = BaseHandler()
    handler.initialize(context(deviceType=device_type))
    assert handler.device == torch.device(device)


def test_too_few_gpus_say_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RuntimeError, match="only 1 can be seen: lower nproc-per-node"):
        BaseHandler().initialize(context())


def test_a_bad_request_sets_its_own_status_and_gives_minserves_error_body() -> None:
    batch = context()
    assert bad_request(batch, 3, "no") == {"code": 400, "type": "BadRequestException", "message": "no"}
    assert cast("Any", batch).statuses == {3: 400}
    assert cast("Any", batch).types == {3: "application/json"}
