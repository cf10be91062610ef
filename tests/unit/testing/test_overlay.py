from pathlib import Path

import pytest
import yaml

from minserve.config.model import read_model_config
from minserve.errors import ConfigError
from minserve.testing.overlay import Config, configure, overlay, read_config

ONE = {"minWorkers": 1, "maxWorkers": 1}


@pytest.mark.parametrize(
    ("written", "nproc", "parallel_type", "changes", "result"),
    [
        ({}, None, None, {}, {}),
        ({}, 1, None, {}, {}),
        ({}, 2, None, {}, {"parallelType": "tp", "torchrun": {"nproc-per-node": 2}}),
        ({}, 2, "pp", {}, {"parallelType": "pp", "torchrun": {"nproc-per-node": 2}}),
        ({"parallelType": "PP"}, 3, None, {}, {"parallelType": "pp", "torchrun": {"nproc-per-node": 3}}),
        ({"parallelType": "none"}, 2, None, {}, {"parallelType": "tp", "torchrun": {"nproc-per-node": 2}}),
        (
            {"parallelType": "tp", "parallelLevel": 4, "torchrun": {"nproc_per_node": 4, "max-restarts": 1}},
            *(2, None, {}),
            {"parallelType": "tp", "torchrun": {"max-restarts": 1, "nproc-per-node": 2}},
        ),
        ({"parallelType": "tp", "torchrun": None}, 1, None, {}, {"parallelType": "tp", "torchrun": {"nproc-per-node": 1}}),
        ({"parallelType": "custom"}, 1, None, {}, {"parallelType": "custom"}),
        ({"own": {"a": 1, "b": 2}}, None, None, {"own": {"b": 3}}, {"own": {"a": 1, "b": 3}}),
        ({"batchSize": 2}, None, None, {"batchSize": None, "own": {"a": 1}}, {"own": {"a": 1}}),
        ({}, 2, None, {"torchrun": {"nproc-per-node": 3}}, {"parallelType": "tp", "torchrun": {"nproc-per-node": 3}}),
    ],
)  # fmt: skip
def test_what_is_written_is_changed_as_a_test_asks(
    written: Config, nproc: int | None, parallel_type: str | None, changes: Config, result: Config
) -> None:
    assert configure(written, nproc, parallel_type, changes) == ONE | dict(result)


def test_a_group_is_one_worker_unless_a_test_asks_for_more() -> None:
    assert configure({"minWorkers": 3, "maxWorkers": 4}, None, None, {}) == ONE
    assert configure({"minWorkers": 3, "maxWorkers": 4}, None, None, {"minWorkers": 2}) == {
        "minWorkers": 2,
        "maxWorkers": 4,
    }


@pytest.mark.parametrize(
    ("written", "nproc", "message"),
    [
        ({}, 0, "nproc: found 0, allowed: an integer >= 1"),
        ({"parallelType": "custom"}, 2, "nproc: found 2, allowed with parallelType custom, which is one process: 1"),
    ],
)
def test_ranks_that_no_model_can_have_are_refused(written: Config, nproc: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(written, nproc, None, {})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model directory with all that one may hold."""
    path = tmp_path / "mine"
    for folder in ("package/inner", "weights", "package/__pycache__", ".git"):
        (path / folder).mkdir(parents=True)
    (path / "handler.py").write_text("def handle(data, context): return data\n")
    (path / "package/inner/code.py").write_text("x = 1\n")
    (path / "package/__pycache__/code.pyc").write_text("stale")
    (path / "up").symlink_to("..")
    (path / "alias").symlink_to("handler.py")
    (path / "model-config.yaml").write_text("batchSize: 2\nown: {a: 1}\n")
    return path


def test_an_overlay_has_the_files_and_another_configuration(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "store" / "mine"
    overlay(source, target, {"batchSize": 4, "own": {"a": 1}})
    assert (target / "handler.py").read_text() == (source / "handler.py").read_text()
    assert (target / "package/inner/code.py").resolve() == source / "package/inner/code.py"
    assert (target / "alias").read_text() == (source / "handler.py").read_text()
    assert (target / "up").resolve() == tmp_path
    assert (target / "weights").is_dir()
    assert yaml.safe_load((target / "model-config.yaml").read_text()) == {"batchSize": 4, "own": {"a": 1}}
    assert read_model_config(target).config.batch_size == 4


def test_nothing_that_python_or_a_model_writes_beside_itself_reaches_the_source(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "store" / "mine"
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*") if not path.is_symlink()}
    overlay(source, target, {})
    for folder in (target, target / "package", target / "package/inner"):
        (folder / "__pycache__").mkdir()
        (folder / "__pycache__" / "code.pyc").write_text("fresh")
    assert not (target / ".git").exists()
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*") if not path.is_symlink()} == before
    assert (source / "model-config.yaml").read_text() == "batchSize: 2\nown: {a: 1}\n"


def test_a_directory_without_a_configuration_gets_one(tmp_path: Path) -> None:
    source = tmp_path / "plain"
    source.mkdir()
    assert read_config(source) == {}
    overlay(source, tmp_path / "target", {"batchSize": 4})
    assert (tmp_path / "target/model-config.yaml").read_text() == "batchSize: 4\n"
    assert list(source.iterdir()) == []


def test_no_directory_and_no_yaml_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none: no such model directory"):
        read_config(tmp_path / "none")
    (tmp_path / "model-config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"model-config\.yaml:1: found broken YAML"):
        read_config(tmp_path)
