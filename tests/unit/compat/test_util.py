"""`ts.utils.util`, `import_class`, `timed` and the streamer for Hugging Face models."""

from __future__ import annotations

import collections
import importlib
import json
import queue
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from minserve.compat.ts.handler_utils.timer import timed
from minserve.compat.ts.handler_utils.utils import import_class
from minserve.compat.ts.utils import util
from tests.unit.compat.conftest import MakeContext


@pytest.mark.parametrize(
    ("content", "mapping"),
    [
        ({"0": "cat", "1": ["n1", "dog"]}, {"0": "cat", "1": "dog"}),
        ({"object_type_names": ["cat", "dog"]}, {"0": "cat", "1": "dog"}),
        ({}, {}),
    ],
)
def test_labels_come_in_three_forms(tmp_path: Path, content: object, mapping: dict[str, str]) -> None:
    file = tmp_path / "index_to_name.json"
    assert util.load_label_mapping(file) is None
    file.write_text(json.dumps(content))
    assert util.load_label_mapping(file) == mapping


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "must be an object"), ("{", "is not JSON"), ('{"3": 1}', "label of '3' must be"), ('{"3": []}', "'3'")],
)
def test_labels_of_another_form_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "labels.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        util.load_label_mapping(file)
    assert "labels.json" in str(caught.value)


def test_classes_become_labels() -> None:
    names = {"0": "cat", "1": "dog", "7": "cow"}
    assert util.map_class_to_label([[0.9, 0.1]]) == [{"0": 0.9, "1": 0.1}]
    assert util.map_class_to_label([[0.9, 0.1], [0.5, 0.5]], names, [[7, 0], [1, 0]]) == [
        {"cow": 0.9, "cat": 0.1},
        {"dog": 0.5, "cat": 0.5},
    ]
    with pytest.raises(KeyError):
        util.map_class_to_label([[1.0]], names, [[3]])
    with pytest.raises(TypeError, match="probabilities must be a list"):
        util.map_class_to_label(((0.9,),))
    with pytest.raises(TypeError, match="mapping must be a dict"):
        util.map_class_to_label([[0.9]], ["cat"])  # type: ignore[arg-type]


def test_the_classes_of_a_module_are_its_own() -> None:
    module = types.ModuleType("mine")
    exec("from collections import OrderedDict\nclass B(OrderedDict): pass\nclass A: pass\nx = 1", vars(module))
    assert [kind.__name__ for kind in util.list_classes_from_module(module)] == ["A", "B"]
    assert [kind.__name__ for kind in util.list_classes_from_module(module, collections.OrderedDict)] == ["B"]


def test_a_yaml_is_a_dict(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("handler: {x: 1}")
    (tmp_path / "b.yaml").touch()
    assert util.get_yaml_config(tmp_path / "a.yaml") == {"handler": {"x": 1}}
    assert util.get_yaml_config(tmp_path / "b.yaml") == {}


def test_a_function_that_goes_away_warns_its_callers() -> None:
    @util.deprecated("2.0", "elsewhere", FutureWarning)
    def old(value: int) -> int:
        return value + 1

    with pytest.warns(FutureWarning, match=r"old is deprecated in 2\.0 and moved to elsewhere") as caught:
        assert old(1) == 2
    assert caught[0].filename == __file__


def test_a_class_is_found_by_its_name() -> None:
    assert import_class("collections.OrderedDict") is collections.OrderedDict
    assert import_class("handlers.QueueHandler", "logging").__name__ == "QueueHandler"
    assert import_class("OrderedDict", "collections") is collections.OrderedDict
    for wrong in ("", "OrderedDict", "collections.Nothing", "no_such_module.A"):
        with pytest.raises(ImportError):
            import_class(wrong)


@pytest.mark.parametrize(("profile", "names"), [(True, ["ts_handler_step"]), (False, [])])
def test_a_timed_step_is_a_metric_where_the_yaml_says_so(
    make_context: MakeContext, profile: bool, names: list[str]
) -> None:
    class Steps:
        context: Any = None

        @timed
        def step(self, value: int, more: int = 0) -> int:
            """A step."""
            return value + more

    steps = Steps()
    assert steps.step(1, more=2) == 3  # no context yet
    steps.context = make_context(handler={"profile": profile})
    assert steps.step(1) == 1
    assert steps.context.metrics.names == names
    assert (Steps.step.__name__, Steps.step.__doc__) == ("step", "A step.")


# ── hf_batch_streamer ──

STREAMER = "minserve.compat.ts.handler_utils.hf_batch_streamer"


def test_the_streamer_without_transformers_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, STREAMER, raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Without(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="needs the package transformers"):
        importlib.import_module(STREAMER)


class _Without:
    """Finds that there is no transformers, installed or not."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")


def test_the_streamer_gives_the_texts_of_a_batch_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class TextIteratorStreamer:
        """Of transformers: a queue of texts."""

        def __init__(self, tokenizer: Any, skip_prompt: bool, timeout: float | None, **options: object) -> None:
            self._decode = tokenizer
            self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()

        def put(self, rows: list[int]) -> None:
            self._queue.put(self._decode(*rows))

        def end(self) -> None:
            self._queue.put(None)

        def __iter__(self) -> Any:
            return iter(self._queue.get, None)

    streamers: Any = types.ModuleType("transformers.generation.streamers")
    streamers.BaseStreamer, streamers.TextIteratorStreamer = object, TextIteratorStreamer
    for name in ("transformers", "transformers.generation"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, streamers.__name__, streamers)
    monkeypatch.delitem(sys.modules, STREAMER, raising=False)
    streamer = importlib.import_module(STREAMER).TextIteratorStreamerBatch(str, 2, skip_prompt=True)
    monkeypatch.delitem(sys.modules, STREAMER)
    streamer.put([1, 2])
    streamer.put([3, 4])
    streamer.streamers[1].put([5])
    with pytest.raises(ValueError, match="for 2 sequences and got 3"):
        streamer.put([1, 2, 3])
    streamer.end()
    assert list(streamer) == [
        [{"text": "1"}, {"text": "2"}],
        [{"text": "3"}, {"text": "4"}],
        [{"text": ""}, {"text": "5"}],
    ]
