import functools
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minserve.archiver import Order, make_archive
from minserve.cli import app
from minserve.config.model import read_model_config
from minserve.errors import ConfigError
from minserve.registry.archive import extract, read_manifest

Make = Callable[..., Path]


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> Make:
    """Makes archives in `out`, in a folder with some files."""
    for name, text in {
        "handler.py": "def handle(data, context): ...\n",
        "other.py": "x = 1\n",
        "model.py": "class Model: ...\n",
        "weights.pt": "\0" * 5000,
        "index.json": "{}",
        "requirements.txt": "numpy\n",
        "config.yaml": "minWorkers: 1\n",
        "extra/a.txt": "a",
        "extra/sub/b.txt": "b",
        "extra/.git/config": "no",
        "extra/__pycache__/a.pyc": "no",
        "extra/sub/.hidden": "a file may begin with a dot",
        "m/handler.py": "def handle(data, context): ...\n",
        "m/model-config.yaml": "minWorkers: 1\nminserve: {handler: 'handler.py:handle'}\n",
        "m/requirements.txt": "numpy\n",
        "m/lib/deep.py": "x = 1\n",
        "m/.git/config": "no",
    }.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    monkeypatch.chdir(tmp_path / "in")
    return lambda **order: make_archive(Order(**{"export_path": tmp_path / "out", **order}), warnings.append)


FLAGS = {
    "model_name": "m",
    "handler": "handler.py",
    "version": "2.0",
    "serialized_file": "weights.pt",
    "model_file": "./model.py",
    "extra_files": "index.json, extra,",
    "requirements_file": "requirements.txt",
    "config_file": "config.yaml",
}
MEMBERS = {
    *("handler.py", "weights.pt", "model.py", "index.json", "a.txt", "sub/b.txt", "sub/.hidden"),
    *("requirements.txt", "config.yaml", "MAR-INF/MANIFEST.json"),
}


def members(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("kind", "name"), [("default", "m.mar"), ("zip-store", "m.mar"), ("tgz", "m.tar.gz"), ("no-archive", "m")]
)
def test_every_format_has_the_same_files_and_can_be_read(kind: str, name: str, make: Make, tmp_path: Path) -> None:
    archive = make(archive_format=kind, **FLAGS)
    assert archive == tmp_path / "out" / name
    assert os.listdir(tmp_path / "out") == [name]
    model = archive if kind == "no-archive" else extract(archive, tmp_path / "x")
    assert members(model) == MEMBERS
    assert (model / "weights.pt").read_text() == "\0" * 5000
    manifest = read_manifest(model)
    assert manifest is not None
    document = json.loads(manifest.text)
    assert (*document, document["runtime"]) == ("createdOn", "runtime", "model", "archiverVersion", "python")
    assert document["model"] == {
        "modelName": "m",
        "serializedFile": "weights.pt",
        "handler": "handler.py",
        "modelFile": "model.py",
        "modelVersion": "2.0",
        "requirementsFile": "requirements.txt",
        "configFile": "config.yaml",
    }
    if name.endswith(".mar"):
        with zipfile.ZipFile(archive) as file:
            stored = file.getinfo("weights.pt").compress_type == zipfile.ZIP_STORED
        assert stored is (kind == "zip-store")
    if kind == "tgz":
        with tarfile.open(archive) as tar:
            assert {path.split("/")[0] for path in tar.getnames()} == {"m"}


def test_a_model_directory_is_all_that_is_needed(make: Make, tmp_path: Path) -> None:
    model = extract(make(directory=Path("m")), tmp_path / "x")
    assert members(model) == {
        *("handler.py", "lib/deep.py", "model-config.yaml", "requirements.txt", "MAR-INF/MANIFEST.json")
    }
    manifest = read_manifest(model)
    assert manifest is not None
    assert (manifest.model_name, manifest.version, manifest.handler) == ("m", "1.0", "handler.py:handle")
    assert (manifest.config_file, manifest.requirements_file) == ("model-config.yaml", "requirements.txt")
    assert read_model_config(model).config.min_workers == 1


def test_flags_go_before_what_a_model_directory_says(make: Make, tmp_path: Path) -> None:
    order = {
        "model_name": "n",
        "version": "3",
        "handler": "other",
        "serialized_file": "weights.pt",
        "runtime": "python3",
    }
    archive = make(directory=Path("m"), **order)
    manifest = read_manifest(extract(archive, tmp_path / "x"))
    assert archive.name == "n.mar"
    assert manifest is not None
    assert (manifest.model_name, manifest.version, manifest.handler, manifest.runtime) == ("n", "3", "other", "python3")
    assert (tmp_path / "x" / "other.py").is_file()
    assert (tmp_path / "x" / "weights.pt").is_file()


def test_an_archive_directory_keeps_its_manifest(make: Make, tmp_path: Path) -> None:
    folder = make(archive_format="no-archive", **FLAGS)
    again = make(directory=folder, version="2.1")
    first, second = read_manifest(folder), read_manifest(extract(again, tmp_path / "x"))
    assert first is not None
    assert second is not None
    assert json.loads(second.text)["model"] == json.loads(first.text)["model"] | {"modelVersion": "2.1"}
    (folder / "weights.pt").unlink()
    with pytest.raises(ConfigError, match=r"the manifest's serializedFile is weights\.pt, and there is no such file"):
        make(directory=folder, force=True)


@pytest.mark.parametrize(
    ("handler", "file"),
    [
        ("handler", "handler.py"),
        ("handler.py", "handler.py"),
        ("handler:handle", "handler.py"),
        ("handler.py:handle", "handler.py"),
        ("m/handler.py", "handler.py"),
        ("image_classifier", None),
    ],
)
def test_a_handler_is_named_as_with_torch_model_archiver(
    handler: str, file: str | None, make: Make, tmp_path: Path
) -> None:
    model = extract(make(model_name="m", handler=handler, version="1"), tmp_path / "x")
    assert members(model) == {"MAR-INF/MANIFEST.json", *filter(None, [file])}
    manifest = read_manifest(model)
    assert manifest is not None
    assert manifest.handler == handler.rpartition("/")[2]


def test_extra_files_may_be_patterns(make: Make, tmp_path: Path, warnings: list[str]) -> None:
    archive = make(model_name="m", handler="base_handler", version="1", extra_files="*.py,*.none,extra/[a-c].txt")
    assert members(extract(archive, tmp_path / "x")) == {
        *("handler.py", "other.py", "model.py", "a.txt", "MAR-INF/MANIFEST.json")
    }
    assert warnings == ["--extra-files: *.none matches no file"]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({**FLAGS, "handler": "absent"}, "--handler: absent.py: no such file"),
        ({**FLAGS, "serialized_file": "absent.pt"}, "--serialized-file: absent.pt: no such file"),
        ({**FLAGS, "model_file": "extra"}, "--model-file: extra: is a folder, a file is needed"),
        ({**FLAGS, "extra_files": "index.json,absent"}, "--extra-files: absent: no such file"),
        ({**FLAGS, "extra_files": "m/handler.py"}, "two files are to be called handler.py in the archive"),
        ({**FLAGS, "model_name": "a b"}, "--model-name: found 'a b'"),
        ({**FLAGS, "model_name": "../m"}, "--model-name: found '../m'"),
        ({**FLAGS, "model_name": None}, "--model-name is missing"),
        ({**FLAGS, "version": None}, "-v/--version is missing"),
        ({**FLAGS, "handler": None}, "--handler is missing"),
        (
            {**FLAGS, "archive_format": "rar"},
            "--archive-format: found 'rar', allowed: default, zip-store, tgz, no-archive",
        ),
        ({**FLAGS, "runtime": "LSP"}, "--runtime: found 'LSP', allowed: python, python3"),
        ({"directory": Path("absent")}, "absent: no such folder"),
        ({"directory": Path("extra")}, "no such file, allowed: a handler file in extra"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(
    order: dict[str, object], message: str, make: Make, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        make(**order)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_link_in_a_circle_is_named(make: Make) -> None:
    (Path("m") / "lib" / "up").symlink_to("..")
    with pytest.raises(ConfigError, match="m/lib/up: a link to a folder that it lies in"):
        make(directory=Path("m"))


def test_links_are_followed_since_archives_have_none(make: Make, tmp_path: Path) -> None:
    (Path("m") / "weights.pt").symlink_to("../weights.pt")
    (Path("m") / "again.pt").hardlink_to("weights.pt")
    model = extract(make(directory=Path("m"), archive_format="tgz"), tmp_path / "x")
    assert {(model / name).read_text() for name in ("weights.pt", "again.pt")} == {"\0" * 5000}


@pytest.mark.parametrize("kind", ["default", "no-archive"])
def test_an_archive_that_is_there_is_replaced_when_asked_for(kind: str, make: Make, tmp_path: Path) -> None:
    first = make(archive_format=kind, **FLAGS)
    with pytest.raises(ConfigError, match="is there already; -f/--force writes it anew"):
        make(archive_format=kind, **FLAGS)
    again = make(archive_format=kind, force=True, **{**FLAGS, "extra_files": None})
    assert again == first
    model = again if kind == "no-archive" else extract(again, tmp_path / "x")
    assert "a.txt" not in members(model)


def test_force_removes_no_folder_that_is_not_an_archive(make: Make) -> None:
    order = {**FLAGS, "export_path": Path(), "archive_format": "no-archive", "force": True}
    with pytest.raises(ConfigError, match="is no archive"):
        make(**order)
    folder = make(archive_format="no-archive", **FLAGS)
    with pytest.raises(ConfigError, match="in it is to be archived"):
        make(directory=folder, archive_format="no-archive", force=True)
    assert members(folder) == MEMBERS


def test_an_archive_in_its_own_directory_does_not_go_into_itself(make: Make, tmp_path: Path) -> None:
    make(directory=Path("m"), export_path=Path("m"))
    archive = make(directory=Path("m"), export_path=Path("m"), force=True)
    assert "m.mar" not in members(extract(archive, tmp_path / "x"))


def test_an_archive_that_cannot_be_written_leaves_nothing(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match="out: cannot be archived: File exists"):
        make(**FLAGS)


def test_the_command_takes_torch_model_archivers_flags(make: Make, tmp_path: Path) -> None:
    flags = "--model-name=m --handler handler.py -v 2.0 --extra-files index.json -r requirements.txt -c config.yaml"
    run = functools.partial(CliRunner().invoke, app, env={"TERM": "dumb"})
    command = ["archive", *flags.split(), "--export-path", str(tmp_path / "out"), "--archive-format", "zip-store"]
    result = run(command)
    assert (result.exit_code, result.stdout.strip()) == (0, str(tmp_path / "out" / "m.mar"))
    manifest = read_manifest(extract(tmp_path / "out" / "m.mar", tmp_path / "x"))
    assert manifest is not None
    assert (manifest.version, manifest.requirements_file, manifest.config_file) == (
        *("2.0", "requirements.txt", "config.yaml"),
    )
    refused = run(command)
    assert refused.exit_code == 1
    assert "is there already" in refused.stderr
    assert run([*command, "-f"]).exit_code == 0
