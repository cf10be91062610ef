import os
from collections.abc import Callable
from pathlib import Path

import pytest

from minserve.worker import fingerprint as module
from minserve.worker.fingerprint import fingerprint, read_fingerprint

Change = Callable[[Path], object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m"
    (path / "weights").mkdir(parents=True)
    (path / "handler.py").write_text("1")
    (path / "weights" / "a.bin").write_text("12345")
    (path / "link").symlink_to("handler.py")
    return path


def touch(path: Path) -> None:
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: touch(model / "handler.py"),
        lambda model: touch(model / "weights" / "a.bin"),
        lambda model: (model / "weights" / "a.bin").write_text("1234567"),
        lambda model: (model / "new.py").touch(),
        lambda model: (model / "handler.py").unlink(),
        lambda model: (model / "handler.py").rename(model / "serve.py"),
        lambda model: ((model / "link").unlink(), (model / "link").symlink_to("weights")),
    ],
)
def test_what_changes_a_model_changes_its_fingerprint(model: Path, change: Change) -> None:
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda model: None,
        lambda model: (model / "handler.py").read_text(),
        lambda model: (model / "handler.py~").touch(),
        lambda model: (model / ".handler.py.swp").touch(),
    ],
)
def test_what_does_not_change_a_model_does_not(model: Path, change: Change) -> None:
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) == before


def test_what_python_leaves_beside_a_module_does_not(model: Path) -> None:
    before = fingerprint(model)
    (model / "__pycache__").mkdir()
    (model / "__pycache__" / "handler.cpython-311.pyc").touch()
    assert fingerprint(model) == before


def test_links_are_not_followed_but_the_directory_may_be_one(model: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (model / "out").symlink_to(outside)
    (model / "round").symlink_to(model)
    before = fingerprint(model)
    (outside / "new").touch()
    assert fingerprint(model) == before
    (tmp_path / "current").symlink_to(model)
    assert fingerprint(tmp_path / "current") == before


def test_a_directory_that_is_gone_has_one_too(model: Path, tmp_path: Path) -> None:
    assert fingerprint(tmp_path / "none") != fingerprint(model)


def test_a_huge_directory_is_not_read_to_its_end(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_FILES", 1)
    before = fingerprint(model)
    touch(model / "weights" / "a.bin")
    assert fingerprint(model) == before
    touch(model / "handler.py")
    assert fingerprint(model) != before


@pytest.mark.asyncio
async def test_it_is_read_off_the_loop(model: Path) -> None:
    assert await read_fingerprint(model) == fingerprint(model)


def test_an_archive_is_judged_by_itself(tmp_path: Path) -> None:
    archive = tmp_path / "m.mar"
    assert fingerprint(archive) == fingerprint(tmp_path / "none")
    archive.write_bytes(b"1")
    before = fingerprint(archive)
    assert before == fingerprint(archive)
    touch(archive)
    assert fingerprint(archive) != before
