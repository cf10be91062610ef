from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import javaproperties
import pytest

from minserve.errors import StartupError
from minserve.registry.models import Registry
from minserve.registry.registration import Registration
from minserve.registry.snapshots import Entry, Snapshots, newest, parse
from minserve.registry.source import Source
from minserve.registry.store import Location
from tests.unit.worker.specs import make_spec

STORE = Path("/models/store")
VALUES = {
    "defaultVersion": True,
    "marName": "echo.mar",
    "minWorkers": 2,
    "maxWorkers": 3,
    "batchSize": 4,
    "maxBatchDelay": 50,
    "responseTimeout": 60,
    "startupTimeout": 90,
    "runtimeType": "python",
}


def text_of(**changes: object) -> str:
    values = {key: value for key, value in {**VALUES, **changes}.items() if value is not None}
    return json.dumps({"name": "x", "modelCount": 1, "created": 1, "models": {"echo": {"1.0": values}}})


def registry() -> Registry:
    """Of two versions, as far as a snapshot looks at it."""
    served = [
        SimpleNamespace(
            spec=replace(make_spec(ranks, "echo"), version=version, url=url),
            workers=0 if version == "2.0" else 1,
            is_default=version == "1.0",
            source=Source(Location(STORE / url.partition("?")[0].rpartition("/")[2], "echo", url)),
        )
        for version, url, ranks in (("1.0", "echo.mar", 1), ("2.0", "https://models.example/echo-two.mar?key=x", 2))
    ]
    return cast("Registry", SimpleNamespace(models=lambda: served))


def test_a_snapshot_of_torchserves_is_read() -> None:
    asked = Registration("echo.mar", "echo", None, None, 4, 50, None, 60, 90)
    assert parse(text_of()) == [Entry(asked, "1.0", True, 2, 3)]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError"),
        (text_of(marName=None), "marName"),
        (text_of(minWorkers="2"), r"minWorkers is .+2.+ \(a string\)"),
        (text_of(minWorkers=-1), "minWorkers is -1 "),
        (text_of(minWorkers=10**9), r"minWorkers is 1000000000 \(an integer\), allowed: an integer from 0 to 1000"),
        (text_of(batchSize=True), r"batchSize is true \(a boolean\)"),
        (text_of(batchSize=0), "batchSize is 0 "),
        (text_of(responseTimeout=10**400), "responseTimeout is 1000"),
        ("[" * 200_000, "RecursionError"),
    ],
)
def test_a_snapshot_that_is_none_starts_nothing(text: str, why: str) -> None:
    with pytest.raises(StartupError, match=f"model_snapshot: found .*{why}"):
        parse(text)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    snapshots = Snapshots(
        tmp_path / "config", STORE, {"model_store": "a folder: ä", "load_models": "all"}, lambda: 1.25
    )
    snapshots.write(registry(), "startup")
    (file,) = (tmp_path / "config").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600, "keystore_pass may be in it"
    assert file == newest(tmp_path / "config")
    properties = javaproperties.loads(file.read_text("latin-1"))
    assert properties["model_store"] == "a folder: ä"
    first, second = parse(properties["model_snapshot"])
    assert (first.registration.url, first.version, first.is_default, first.fewest) == ("echo.mar", "1.0", True, 1)
    assert (second.registration.url, second.version, second.is_default, second.fewest) == (
        *("echo-two.mar", "2.0", False, 0),
    )
    assert '"parallelLevel": 2' in properties["model_snapshot"]
    assert json.loads(properties["model_snapshot"])["name"] == file.name


def test_the_newest_is_the_one_whose_name_says_so(tmp_path: Path) -> None:
    names = ("20250101000000000-startup.cfg", "20260101000000000-shutdown.cfg", "20250601000000000-snapshot.cfg")
    for name in (*names, "zzz.cfg", ".20270101000000000-snapshot.cfg"):
        (tmp_path / name).write_text("")
    os.utime(tmp_path / names[0])
    assert newest(tmp_path) == tmp_path / names[1]
    assert newest(tmp_path / "missing") is None


def test_a_folder_that_cannot_be_written_is_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config").write_text("a file")
    Snapshots(tmp_path / "config", STORE, {}).write(registry(), "snapshot")
    assert "no snapshot is written" in caplog.text
