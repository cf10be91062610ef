"""Archives as TorchServe's tools leave them behind, and a context for their handlers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minserve.rank.context import Context
from minserve.rank.requests import RequestProcessor

MODEL = """
import torch

class Rows(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2, bias=False)

    def forward(self, rows):
        return self.linear(rows)
"""
WEIGHTS = torch.tensor([[1.0, 0.0], [10.0, 1.0]])  # (a, b) becomes (a, 10 a + b)

MakeContext = Callable[..., Context]


class Times:
    """In place of the metrics: the names of what was timed."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def add_time(self, name: str, value: float, idx: int | None = None, unit: str = "ms") -> None:
        assert value >= 0
        self.names.append(name)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with the model file `rows.py`, its weights `rows.pt` and labels."""
    (tmp_path / "rows.py").write_text(MODEL)
    torch.save({"linear.weight": WEIGHTS}, tmp_path / "rows.pt")
    (tmp_path / "index_to_name.json").write_text(json.dumps({"0": "cat", "1": ["n1", "dog"]}))
    monkeypatch.delenv("ENABLE_TORCH_PROFILER", raising=False)
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if _lies_in(tmp_path, module)]:
        del sys.modules[name]


def _lies_in(folder: Path, module: object) -> bool:
    return str(getattr(module, "__file__", "")).startswith(str(folder))


@pytest.fixture
def make_context(archive: Path) -> MakeContext:
    """Makes a context in the middle of a batch: `files` of the manifest, headers and number of requests, the YAML."""

    def make(
        files: dict[str, str] | None = None, headers: dict[str, object] | None = None, count: int = 1, **yaml: Any
    ) -> Context:
        files = {"modelFile": "rows.py", "serializedFile": "rows.pt"} if files is None else files
        manifest = {"model": {"modelName": "m", "modelVersion": "2.0", **files}}
        metrics: Any = Times()
        context = Context("m", str(archive), manifest, count, None, "0", True, metrics, yaml)
        context.request_ids = {index: f"r{index}" for index in range(count)}
        context.request_processor = [RequestProcessor(headers or {}) for _ in range(count)]
        return context

    return make
