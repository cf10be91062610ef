from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from minserve.rank import progress
from minserve.rank.loading import Handler, HandlerError, load_handler
from tests.unit.rank.rig import new_context


def load(model_dir: Path, source: str, reference: str = "handler.py", **others: str) -> Handler:
    """Writes the handler and its neighbours, and loads it."""
    for name, text in {reference.partition(":")[0]: source, **{f"{k}.py": v for k, v in others.items()}}.items():
        (model_dir / name).write_text(textwrap.dedent(text))
    return load_handler(model_dir, reference, new_context(model_dir=str(model_dir)))


def call(handler: Handler) -> object:
    return handler.handle([{"body": b"x"}], new_context())


ONE_CLASS = """
    class Model:
        def initialize(self, context):
            self.name = context.model_name
        def handle(self, data, context):
            return [self.name]
"""


def test_a_function_is_called_once_with_none_to_load(model_dir: Path) -> None:
    handler = load(
        model_dir,
        """
        calls = []
        def handle(data, context):
            calls.append(data)
            return calls
        """,
    )
    assert call(handler) == [None, [{"body": b"x"}]]


def test_a_class_is_made_and_initialised(model_dir: Path) -> None:
    assert call(load(model_dir, ONE_CLASS)) == ["m"]


def test_initialize_may_be_missing(model_dir: Path) -> None:
    assert call(load(model_dir, "class Model:\n    def handle(self, data, context): return len(data)")) == 1


TWO_CLASSES = """
    class A:
        def handle(self, data, context): return "A"
    class B:
        def handle(self, data, context): return "B"
    def by_name(data, context): return "function"
    class Useless: pass
"""


@pytest.mark.parametrize(("name", "result"), [("A", "A"), ("B", "B"), ("by_name", "function")])
def test_a_name_behind_the_file_chooses(model_dir: Path, name: str, result: str) -> None:
    assert call(load(model_dir, TWO_CLASSES, f"models.py:{name}")) == result


def test_helpers_beside_the_handler_do_not_count(model_dir: Path) -> None:
    source = """
        from typing import NamedTuple
        from dataclasses import dataclass
        from neighbour import Base
        class Point(NamedTuple):
            x: int
        @dataclass
        class Options:
            y: int = 0
        class Layer: pass
        class Model(Base): pass
        Alias = Model
        model = Model
    """
    neighbour = "class Base:\n    def handle(self, data, context): return 'base'"
    assert call(load(model_dir, source, neighbour=neighbour)) == "base"


def test_a_function_handle_wins_over_classes(model_dir: Path) -> None:
    source = "class Model:\n    def handle(self, data, context): return 1\ndef handle(data, context): return 2"
    assert call(load(model_dir, source)) == 2


@pytest.mark.parametrize(
    ("source", "reference", "message"),
    [
        ("x = 1", "handler.py", "must define a function `handle` or exactly one class .* found no class"),
        ("from pathlib import Path", "handler.py", "found no class"),
        (TWO_CLASSES, "handler.py", "exactly one class with a method `handle`; found A, B, Useless"),
        ("class A: pass\nclass B: pass", "handler.py", "found A, B"),
        ("class A: pass", "handler.py", r"class A in handler\.py has no method `handle`"),
        (TWO_CLASSES, "handler.py:Useless", "class Useless in handler.py has no method"),
        (TWO_CLASSES, "handler.py:C", r"handler\.py has no function or class C"),
        ("C = 3", "handler.py:C", "has no function or class C"),
        ("async def handle(data, context): return []", "handler.py", "async handlers are not supported"),
        ("async def handle(data, context): yield []", "handler.py", "async handlers are not supported"),
        ("class A:\n    async def handle(self, data, context): ...", "handler.py", "async handlers are not supported"),
        ("{}", "handler.json", "handler.json is not a Python file"),
    ],
)
def test_what_breaks_the_contract_is_told(model_dir: Path, source: str, reference: str, message: str) -> None:
    with pytest.raises(HandlerError, match=message):
        load(model_dir, source, reference)


def test_a_missing_file_is_named(model_dir: Path) -> None:
    with pytest.raises(HandlerError, match=f"there is no handler file {model_dir}/absent.py"):
        load_handler(model_dir, "absent.py", new_context())


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import no_such_module_anywhere", ModuleNotFoundError),
        ("def handle(:", SyntaxError),
        ("raise LookupError('at import')", LookupError),
        ("class M:\n    def __init__(self): raise LookupError('init')\n    def handle(self, d, c): ...", LookupError),
        (ONE_CLASS + "        other = int('x')", ValueError),
        ("class M:\n    def initialize(self, c): None.x\n    def handle(self, d, c): ...", AttributeError),
    ],
)
def test_an_error_of_the_authors_code_surfaces_as_itself(model_dir: Path, source: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        load(model_dir, source)


@pytest.mark.parametrize(
    "body",
    ["for row in data: pass", "data[0]", "len(data)", "data.get('x')", "b'x' + data", "import json; json.loads(data)"],
)
def test_a_function_that_knows_nothing_of_none_has_nothing_to_load(model_dir: Path, body: str) -> None:
    handler = load(model_dir, f"def handle(data, context):\n    if data: return ['ok']\n    {body}")
    assert call(handler) == ["ok"]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("raise RuntimeError('no weights')", RuntimeError),
        ("raise TypeError('two arguments, please')", TypeError),
        ("context.no_such_thing", AttributeError),
        ("open('/no/such/file')", FileNotFoundError),
        ("raise ValueError('NoneType')", ValueError),
        ("import sys; sys.exit(3)", SystemExit),
    ],
)
def test_a_real_error_of_a_functions_first_call_is_not_swallowed(
    model_dir: Path, body: str, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        load(model_dir, f"def handle(data, context):\n    {body}")


def test_a_generator_function_loads_without_running(model_dir: Path) -> None:
    handler = load(model_dir, "def handle(data, context):\n    assert data, 'ran'\n    yield ['1']")
    generator = call(handler)
    assert hasattr(generator, "send")


def test_the_module_runs_once_also_when_a_neighbour_imports_it(model_dir: Path) -> None:
    load(
        model_dir,
        """
        import sys
        sys.path_runs = getattr(sys, "path_runs", 0) + 1
        from neighbour import again
        def handle(data, context): return again
        """,
        neighbour="import handler\nagain = handler",
    )
    runs = sys.__dict__.pop("path_runs")
    assert runs == 1


def test_the_model_directory_is_working_directory_and_on_the_import_path(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    handler = load(
        model_dir,
        """
        import os
        import neighbour
        here = os.getcwd()
        def handle(data, context): return here, neighbour.x
        """,
        neighbour="x = 5",
    )
    assert call(handler) == (str(model_dir), 5)
    assert Path.cwd() == model_dir
    assert sys.path[0] == str(model_dir)


def test_a_handler_file_does_not_replace_a_module_of_its_name(model_dir: Path) -> None:
    source = "import json\ndef handle(data, context):\n    return [json.dumps(1)]"
    assert call(load(model_dir, source, "json.py")) == ["1"]
    assert hasattr(sys.modules["json"], "JSONDecoder")


def test_dataclasses_and_pickle_find_the_handlers_module(model_dir: Path) -> None:
    """They look into `sys.modules` under the class's `__module__`, also while the module is being run."""
    source = """
        from __future__ import annotations
        import pickle
        from dataclasses import dataclass
        from typing import ClassVar
        @dataclass
        class Point:
            n: ClassVar[int]
            x: int
        same = pickle.loads(pickle.dumps(Point(3)))
        def handle(data, context): return same.x
    """
    assert call(load(model_dir, source)) == 3


@pytest.mark.parametrize(
    "source",
    [
        "closed = []\ndef close(): closed.append(1)\ndef handle(data, context): return closed",
        """
        class Model:
            closed = []
            def close(self): self.closed.append(1)
            def handle(self, data, context): return self.closed
        """,
    ],
)
def test_close_is_the_handlers_own(model_dir: Path, source: str) -> None:
    handler = load(model_dir, source)
    assert call(handler) == []
    handler.close()
    assert call(handler) == [1]


def test_close_may_be_missing(model_dir: Path) -> None:
    load(model_dir, ONE_CLASS).close()


PROBES = """
    def handle(data, context): ...
    {}
    class Model:
        def handle(self, data, context): ...
        {}
"""


@pytest.mark.parametrize("reference", ["handler.py", "handler.py:Model"])
def test_a_probe_is_the_handlers_own(model_dir: Path, reference: str) -> None:
    source = PROBES.format("def probe(): return 'its own'", "def probe(self): return 'its own'")
    handler = load(model_dir, source, reference)
    assert handler.probe is not None
    assert handler.probe() == "its own"


@pytest.mark.parametrize("reference", ["handler.py", "handler.py:Model"])
@pytest.mark.parametrize("function", ["", "probe = None", "probe = 'text'"])
def test_a_probe_may_be_missing(model_dir: Path, reference: str, function: str) -> None:
    assert load(model_dir, PROBES.format(function, function), reference).probe is None


@pytest.mark.parametrize("reference", ["handler.py", "handler.py:Model"])
def test_what_is_called_probe_but_wants_arguments_is_the_authors_and_not_called(
    model_dir: Path, reference: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = PROBES.format("def probe(image): return 1 / 0", "def probe(self, image): return 1 / 0")
    assert load(model_dir, source, reference).probe is None
    assert "cannot be called without arguments: missing a required argument: 'image'" in caplog.text


def test_progress_says_that_the_handler_is_initialised(model_dir: Path) -> None:
    heard: list[str] = []
    progress.listen(lambda stage, done, total: heard.append(f"{stage} {done}/{total}"))
    load(
        model_dir,
        """
        from minserve.rank.progress import report_progress
        class Model:
            def initialize(self, context): report_progress("weights", 1, 2)
            def handle(self, data, context): return []
        """,
    )
    assert heard == ["initializing 0/0", "weights 1/2"]
