from __future__ import annotations

import contextlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from minserve.rank import coroutines, progress
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
        ("{}", "handler.json", "handler.json is not a Python file"),
    ],
)
def test_what_breaks_the_contract_is_told(model_dir: Path, source: str, reference: str, message: str) -> None:
    with pytest.raises(HandlerError, match=message):
        load(model_dir, source, reference)


def test_a_missing_file_is_named(model_dir: Path) -> None:
    with pytest.raises(HandlerError, match=f"there is no handler file {model_dir}/absent.py"):
        load_handler(model_dir, "absent.py", new_context())


def archived(model_dir: Path, reference: str, envelope: str = "") -> Handler:
    return load_handler(model_dir, reference, new_context(model_dir=str(model_dir)), envelope, archive=True)


@pytest.mark.parametrize(
    "reference",
    ["models.py", "models", "models:handle", "models.py:handle", "src/deep/models.py:handle", "src/models", "models:A"],
)
def test_a_manifest_names_its_handler_in_many_ways(model_dir: Path, reference: str) -> None:
    """Also a function that is not there, before exactly one class."""
    (model_dir / "models.py").write_text("class Model:\n    def handle(self, data, context): return 'ok'")
    assert call(archived(model_dir, reference)) == "ok"


def test_a_path_in_a_manifest_is_looked_for_as_it_is_first(model_dir: Path) -> None:
    (model_dir / "src").mkdir()
    for name in ("models.py", "src/models.py"):
        (model_dir / name).write_text(f"def handle(data, context): return {name!r}")
    assert call(archived(model_dir, "src/models.py")) == "src/models.py"
    assert call(archived(model_dir, "models:handle")) == "models.py"


@pytest.fixture
def shipped(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A `ts` package with a handler and two envelopes, in place of the real one."""
    root = tmp_path_factory.mktemp("compat")
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "ts"}
    for name in before:
        monkeypatch.delitem(sys.modules, name)
    for package in ("ts", "ts/torch_handler", "ts/torch_handler/request_envelope"):
        (root / package).mkdir()
        (root / package / "__init__.py").touch()
    sources = {
        "shipped_one": "class One:\n    def handle(self, data, context): return 'shipped'",
        "broken": "import no_such_module_anywhere",
        "request_envelope/wrap": """
            class Base: ...
            class WrapEnvelope(Base):
                def __init__(self, handle): self.inner = handle
                def handle(self, data, context): return ['<', self.inner(data, context), '>']
        """,
        "request_envelope/none": "class Wrap: ...",
    }
    for name, source in sources.items():
        (root / "ts/torch_handler" / f"{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(root)
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] == "ts"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.usefixtures("shipped")
def test_a_shipped_handler_is_found_by_name_unless_the_archive_has_a_file_of_it(model_dir: Path) -> None:
    assert call(archived(model_dir, "shipped_one")) == "shipped"
    assert call(load_handler(model_dir, "shipped_one", new_context())) == "shipped"
    (model_dir / "shipped_one.py").write_text("def handle(data, context): return 'own'")
    assert call(archived(model_dir, "shipped_one")) == "own"


@pytest.mark.usefixtures("shipped")
def test_a_handler_in_an_installed_package_is_found_by_name(model_dir: Path) -> None:
    (model_dir / "own").mkdir()
    (model_dir / "own/__init__.py").touch()
    (model_dir / "own/deep.py").write_text("def handle(data, context): return 'deep'")
    assert call(archived(model_dir, "own.deep:handle")) == "deep"


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("reference", ["absent", "absent.py", "no.such.module", "a b", "absent/../x", "handler.json"])
def test_a_handler_that_is_nowhere_is_told(model_dir: Path, reference: str) -> None:
    with pytest.raises(HandlerError, match=f"there is no handler {reference}: no file in"):
        archived(model_dir, reference)


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("reference", ["faulty", "faulty.py:handle", "broken", "pack.mod"])
def test_an_import_error_in_a_handler_is_told_as_itself(model_dir: Path, reference: str) -> None:
    """TorchServe looks for a shipped handler of that name then, and tells that there is none."""
    (model_dir / "faulty.py").write_text("import no_such_module_anywhere")
    (model_dir / "pack").mkdir()
    (model_dir / "pack/__init__.py").write_text("import no_such_module_anywhere")
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module_anywhere'"):
        archived(model_dir, reference)


@pytest.mark.usefixtures("shipped")
def test_an_envelope_is_around_the_handler(model_dir: Path) -> None:
    (model_dir / "models.py").write_text("def handle(data, context): return 'x'")
    assert call(archived(model_dir, "models", "wrap")) == ["<", "x", ">"]
    with pytest.raises(HandlerError, match="there is no request envelope 'absent'"):
        archived(model_dir, "models", "absent")
    with pytest.raises(HandlerError, match="must define exactly one class whose name ends in Envelope"):
        archived(model_dir, "models", "none")


ASYNC_CLASS = """
    import asyncio
    class Model:
        async def initialize(self, context):
            await asyncio.sleep(0)
            self.loop = asyncio.get_running_loop()
        async def handle(self, data, context):
            return [self.loop is asyncio.get_running_loop()]
"""


def test_an_async_initialize_is_waited_for_on_the_loop_that_serves(model_dir: Path) -> None:
    handler = load(model_dir, ASYNC_CLASS)
    assert coroutines.complete(call(handler)) == [True]


@pytest.mark.parametrize(
    ("body", "error"),
    [("return data[0]", None), ("raise LookupError('no weights')", LookupError), ("yield data", None)],
)
def test_an_async_function_loads_as_a_plain_one(model_dir: Path, body: str, error: type[Exception] | None) -> None:
    with pytest.raises(error) if error else contextlib.nullcontext():
        load(model_dir, f"async def handle(data, context):\n    {body}")


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
