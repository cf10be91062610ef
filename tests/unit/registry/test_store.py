import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from minserve.errors import ModelNotFound, StartupError
from minserve.registry.download import remove_abandoned
from minserve.registry.store import Location, find_model, locate


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
    assert caplog.messages == [
        f"{store}/notes: skipped, it has neither a model-config.yaml nor a handler.py nor a MAR-INF/MANIFEST.json"
    ]


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that this user may not read, which the file system does not enforce where tests run as root."""
    folders: list[Path] = []
    stat, access = os.stat, os.access

    def refusing_stat(path: str | Path, **options: Any) -> os.stat_result:
        if any(folder in Path(os.fspath(path)).parents for folder in folders):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refusing_stat)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in folders and access(path, mode))
    return folders


def test_a_folder_that_may_not_be_read_stops_no_start(
    store: Path, locked: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A volume's lost+found is such a one."""
    locked.append(store / "notes")
    with caplog.at_level(logging.WARNING):
        assert shown(store, ["all"]) == [("store/a", None), ("store/b", None)]
    assert caplog.messages == [f"{store}/notes: skipped, this user may not read it"]


def test_a_store_that_may_not_be_read_is_an_error_that_says_so(store: Path, locked: list[Path]) -> None:
    locked.append(store)
    remove_abandoned(store)  # comes first at a start
    with pytest.raises(StartupError, match="store: this user may not read it"):
        locate(store, ["all"])


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
    assert locate(store, [f"x={path}", str(path)]) == [Location(path, "x", str(path)), Location(path, None, str(path))]


@pytest.mark.parametrize("wanted", ["none", "x=none", "handler.txt", "x=/nowhere"])
def test_a_model_that_is_not_there_stops_the_start(store: Path, wanted: str) -> None:
    with pytest.raises(StartupError, match=f"^model {wanted}: /.*: (no such directory or archive|is no archive)"):
        locate(store, ["a", wanted])


def test_in_the_place_of_torchserve_a_model_that_is_not_there_stops_nothing(store: Path) -> None:
    there, missing = locate(store, ["a", "x=none"], lenient=True)
    assert there.missing is None
    assert (missing.name, str(missing.missing)) == ("x", "Model not found at: none")


def test_a_store_that_is_not_there_stops_the_start(store: Path) -> None:
    with pytest.raises(StartupError, match=f"^model store {store}/none: no such directory$"):
        locate(store / "none", ["all"])


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_model_directory_given_as_the_store_is_told_apart(store: Path, name: str) -> None:
    with pytest.raises(StartupError, match="is itself a model directory"):
        locate(store / name, ["all"])


# ── archives ──


def test_archives_and_folders_with_a_manifest_are_models(store: Path) -> None:
    for name in ("c.mar", "d.tar.gz", "e.tgz", "f.model", "g.zip", "h.pt", ".i.mar"):
        (store / name).touch()
    (store / "j" / "MAR-INF").mkdir(parents=True)
    (store / "j" / "MAR-INF" / "MANIFEST.json").touch()
    names = ["a", "b", "c.mar", "d.tar.gz", "e.tgz", "f.model", "g.zip", "j"]
    assert [location.path.name for location in locate(store, ["all"])] == names
    assert shown(store, ["x=c.mar", "d.tar.gz"]) == [("store/c.mar", "x"), ("store/d.tar.gz", None)]


@pytest.mark.parametrize(
    ("file", "name"),
    [("res-net.50.mar", "res_net_50"), ("m.tar.gz", "m"), ("M.MAR", "M"), ("a b.tgz", "a_b"), ("m.other", "m.other")],
)
def test_a_file_that_says_no_name_has_its_own(file: str, name: str) -> None:
    assert Location(Path("/store", file)).file_name == name


def test_an_address_is_left_to_whoever_fetches_it(store: Path) -> None:
    url = "https://models.example/m.mar?a=b"
    assert locate(store, [url, f"x={url}"]) == [Location(Path(url), None, url), Location(Path(url), "x", url)]


# ── what a registration names ──


@pytest.mark.parametrize("url", ["c.mar", "/some/where/c.mar", "b", "{store}/b", "{store}/b/"])
def test_a_registration_names_something_in_the_store(store: Path, url: str) -> None:
    (store / "c.mar").touch()
    found = find_model(store, url.format(store=store), [])
    assert found == store / ("c.mar" if "c.mar" in url else "b")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "empty url"),
        ("../x.mar", "Relative path is not allowed in url: ../x.mar"),
        ("none.mar", "Model not found at: none.mar"),
        ("handler.txt", "Model not found at: handler.txt"),
        ("x" * 300, f"Model not found at: {'x' * 300}"),
        ("x\0.mar", "Model not found at: x\0.mar"),
        (".", "Model not found at: ."),
        ("/", "Given URL / does not match any allowed URL(s)"),
        ("{store}", "Given URL {store} does not match any allowed URL(s)"),
        ("{elsewhere}", "Given URL {elsewhere} does not match any allowed URL(s)"),
    ],
)
def test_what_is_not_there_or_not_allowed_is_said_with_torchserves_words(store: Path, url: str, message: str) -> None:
    elsewhere = store.parent / "elsewhere"
    with pytest.raises(ModelNotFound) as caught:
        find_model(store, url.format(elsewhere=elsewhere, store=store), ["https://.*"])
    assert str(caught.value) == message.format(elsewhere=elsewhere, store=store)


def test_a_folder_elsewhere_can_be_allowed(store: Path) -> None:
    elsewhere = store.parent / "elsewhere"
    assert find_model(store, str(elsewhere), [f"file://{store.parent}/.*"]) == elsewhere


def test_a_store_may_hold_handlers_beside_its_archives(store: Path) -> None:
    (store / "handler.py").touch()
    with pytest.raises(StartupError, match="is itself a model directory"):
        locate(store, ["all"])
    assert len(locate(store, ["a"], lenient=True)) == 1
    (store / "c.mar").touch()
    assert "c.mar" in [location.path.name for location in locate(store, ["all"])]
