import zipfile
from pathlib import Path

import pytest

from minserve.config.server import ServerOptions
from minserve.errors import ConfigError, PackagesFailed
from minserve.registry.reading import read_model
from minserve.registry.source import Source
from minserve.registry.store import Location
from minserve.worker.devices import Inventory
from tests.unit.registry.archives import make_mar, short_runtime


@pytest.mark.parametrize(
    ("venv", "install", "archived", "done"),
    [
        (False, False, True, []),
        (False, True, True, [("install", "model", None)]),
        (True, False, True, [("venv", "venv")]),
        (True, True, True, [("venv", "venv"), ("install", None, "/v/bin/python")]),
        (True, True, False, [("venv", "venv"), ("install", None, "/v/bin/python")]),
    ],
)
@pytest.mark.asyncio
async def test_packages_are_installed_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, venv: bool, install: bool, archived: bool, done: list[object]
) -> None:
    calls: list[object] = []

    async def make_venv(model: str, directory: Path) -> Path:
        calls.append(("venv", directory.name))
        return Path("/v/bin/python")

    async def install_requirements(
        model: str, requirements: Path, own: Path, into: Path | None = None, python: Path | None = None
    ) -> None:
        assert (requirements.name, own.parent) == ("requirements.txt", runtime.models)
        calls.append(("install", into and into.name, python and str(python)))

    monkeypatch.setattr("minserve.registry.reading.make_venv", make_venv)
    monkeypatch.setattr("minserve.registry.reading.install_requirements", install_requirements)
    source = packed(tmp_path, archived, venv)
    runtime = short_runtime(tmp_path)
    model = await read_model(source, options(install), Inventory(), runtime)
    assert calls == done
    assert model.spec.python == ("/v/bin/python" if venv else "")
    assert model.extracted is not None
    assert model.extracted.parent == runtime.models


@pytest.mark.asyncio
async def test_packages_do_not_go_into_a_folder_of_the_store(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"requirements.txt: packages are not installed into a folder of the store"):
        await read_model(packed(tmp_path, False, False), options(True), Inventory(), short_runtime(tmp_path))


@pytest.mark.asyncio
async def test_nothing_is_left_when_packages_cannot_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def install_requirements(*_: object) -> None:
        raise PackagesFailed("no")

    monkeypatch.setattr("minserve.registry.reading.install_requirements", install_requirements)
    runtime = short_runtime(tmp_path)
    with pytest.raises(PackagesFailed):
        await read_model(packed(tmp_path, True, False), options(True), Inventory(), runtime)
    assert not list(runtime.models.glob("x*"))


def options(install: bool) -> ServerOptions:
    return ServerOptions(install_py_dep_per_model=install)


def packed(folder: Path, archived: bool, venv: bool) -> Source:
    """A model with requirements, as an archive or as a folder."""
    files = {"c.yaml": f"useVenv: {str(venv).lower()}", "requirements.txt": "x==1"}
    path = make_mar(folder / "m.mar", files, configFile="c.yaml", requirementsFile="requirements.txt")
    if not archived:
        zipfile.ZipFile(path).extractall(path := folder / "m")
    return Source(Location(path))
