import logging
from pathlib import Path

import pytest

from minserve.errors import StartupError
from minserve.registry.store import Location, locate


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for name, file in (
        ("b", "handler.py"),
        ("a", "model-config.yaml"),
        ("notes", "readme.txt"),
        (".git", "handler.py"),
        ("__pycache__", "handler.py"),
    ):
        (tmp_path / "store" / name).mkdir(parents=True)
        (tmp_path / "store" / name / file).touch()
    (tmp_path / "store" / "handler.txt").touch()
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "store"


def shown(store: Path, wanted: list[str]) -> list[tuple[str, str | None]]:
    return [(str(location.path.relative_to(store.parent)), location.name) for location in locate(store, wanted)]


def test_every_model_directory_of_the_store_is_served_by_name(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert shown(store, ["all"]) == [("store/a", None), ("store/b", None)]
    assert caplog.messages == [f"{store}/notes: skipped, it has neither a model-config.yaml nor a handler.py"]


def test_a_link_in_the_store_is_served_under_its_own_name(store: Path) -> None:
    (store / "current").symlink_to(store / "b")
    assert ("store/current", None) in shown(store, ["all"])
    assert shown(store, ["current"]) == [("store/current", None)]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (["ALL"], [("store/a", None), ("store/b", None)]),
        (["b"], [("store/b", None)]),
        (["notes"], [("store/notes", None)]),  # whoever names it gets its errors
        (["x=a", "y=a"], [("store/a", "x"), ("store/a", "y")]),
        (["../elsewhere"], [("elsewhere", None)]),
        (["all", "x=../elsewhere"], [("store/a", None), ("store/b", None), ("elsewhere", "x")]),
        ([], []),
    ],
)
def test_models_can_be_named(store: Path, wanted: list[str], found: list[tuple[str, str | None]]) -> None:
    assert shown(store, wanted) == found


def test_a_location_may_be_absolute(store: Path) -> None:
    path = store.parent / "elsewhere"
    assert locate(store, [f"x={path}", str(path)]) == [Location(path, "x"), Location(path, None)]


@pytest.mark.parametrize("wanted", ["none", "x=none", "handler.txt", "x=/nowhere"])
def test_a_model_that_is_not_there_stops_the_start(store: Path, wanted: str) -> None:
    with pytest.raises(StartupError, match=f"^model {wanted}: no directory "):
        locate(store, ["a", wanted])


def test_a_store_that_is_not_there_stops_the_start(store: Path) -> None:
    with pytest.raises(StartupError, match=f"^model store {store}/none: no such directory$"):
        locate(store / "none", ["all"])


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_model_directory_given_as_the_store_is_told_apart(store: Path, name: str) -> None:
    with pytest.raises(StartupError, match="is itself a model directory"):
        locate(store / name, ["all"])
