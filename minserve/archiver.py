"""Makes archives of models: what torch-model-archiver does, and an archive of a model directory as it stands."""

from __future__ import annotations

import glob
import io
import json
import os
import re
import secrets
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath

import minserve
from minserve.config.model import CONFIG_FILE, read_model_config
from minserve.errors import ConfigError
from minserve.registry.manifest import MANIFEST, Manifest, read_manifest

FORMATS = {"default": ".mar", "zip-store": ".mar", "tgz": ".tar.gz", "no-archive": ""}
RUNTIMES = ("python", "python3")
SHIPPED_HANDLERS = ("base_handler", "text_classifier", "image_classifier", "object_detector", "image_segmenter")
REQUIREMENTS_FILE = "requirements.txt"
_FILE_KEYS = ("serializedFile", "modelFile", "requirementsFile", "configFile")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-.]*")
_WILDCARD = re.compile(r"[*?]|\[.*\]")
_LEFT_OUT = ("__pycache__", "__MACOSX")  # and folders whose name begins with a dot


@dataclass(frozen=True, slots=True)
class Order:
    """What to put into an archive: torch-model-archiver's flags, and a model directory.

    Attributes:
        directory: everything in it goes in, and what no flag says is read from it; None: the flags say it all.
        handler: a file, with or without its ending `.py`, and after a colon the name in it; or a shipped handler.
        extra_files: files, folders (of which the content goes in) and patterns, between commas.
    """

    directory: Path | None = None
    model_name: str | None = None
    handler: str | None = None
    version: str | None = None
    serialized_file: str | None = None
    model_file: str | None = None
    extra_files: str | None = None
    runtime: str | None = None
    export_path: Path = Path()
    archive_format: str = "default"
    force: bool = False
    requirements_file: str | None = None
    config_file: str | None = None


def make_archive(order: Order, warn: Callable[[str], None]) -> Path:
    """Makes an archive and returns its path.

    Raises:
        ConfigError: a file is missing, two have one name, the archive is there already, or it cannot be written.
    """
    if order.archive_format not in FORMATS:
        raise ConfigError(f"--archive-format: found {order.archive_format!r}, allowed: {', '.join(FORMATS)}")
    contents, manifest, model = _Contents(), None, {}
    if order.directory is not None:
        if not order.directory.is_dir():
            raise ConfigError(f"{order.directory}: no such folder")
        manifest = read_manifest(order.directory)
        model = _texts(manifest) if manifest is not None else _model_of_directory(order.directory, order)
    runtime = order.runtime or (manifest.runtime if manifest is not None else RUNTIMES[0])
    if runtime not in RUNTIMES:
        raise ConfigError(f"--runtime: found {runtime!r}, allowed: {', '.join(RUNTIMES)}")
    model |= _model_of_flags(order, contents, warn)
    for key, flag in (("modelName", "--model-name"), ("handler", "--handler"), ("modelVersion", "-v/--version")):
        if not model.get(key):
            raise ConfigError(f"{flag} is missing; it is needed unless a model directory is given")
    name = model["modelName"]
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--model-name: found {name!r}, allowed: letters, digits, `_`, `-`, `.`, the first no sign")
    target = order.export_path / f"{name}{FORMATS[order.archive_format]}"
    if order.directory is not None:
        for path, source in _walk(order.directory):
            if path != MANIFEST.as_posix() and source.resolve() != target.resolve():
                contents.add(path, source)
    for key in _FILE_KEYS:
        if key in model and model[key] not in contents.files:
            raise ConfigError(f"{order.directory}: the manifest's {key} is {model[key]}, and there is no such file")
    document = {
        "createdOn": datetime.now().strftime("%d/%m/%Y %H:%M:%S"),
        "runtime": runtime,
        "model": model,
        "archiverVersion": f"minserve {minserve.__version__}",
    }
    try:
        _write(target, order, contents.files, json.dumps(document, indent=2), name)
    except OSError as error:
        raise ConfigError(f"{error.filename or target}: cannot be archived: {error.strerror or error}") from None
    return target


class _Contents:
    """The files of an archive: their names in it, and where they come from."""

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}

    def add(self, name: str, source: Path, flag: str = "") -> None:
        if "\\" in name or not name.isprintable():
            raise ConfigError(
                f"{str(source)!r}: a backslash or a special character in a name is not allowed in an archive"
            )
        if not source.is_file():
            what = "is a folder, a file is needed" if source.is_dir() else "no such file"
            raise ConfigError(f"{flag}: {source}: {what}" if flag else f"{source}: neither a file nor a folder")
        other = self.files.setdefault(name, source)
        if not other.samefile(source):
            raise ConfigError(f"two files are to be called {name} in the archive: {other} and {source}")

    def add_file(self, path: str, flag: str) -> str:
        """A file that goes to the top; returns its name there."""
        source = Path(path)
        self.add(source.name, source, flag)
        return source.name


def _model_of_flags(order: Order, contents: _Contents, warn: Callable[[str], None]) -> dict[str, str]:
    """The manifest's `model`, in torch-model-archiver's order; collects the files."""
    model = {"modelName": order.model_name}
    if order.serialized_file:
        model["serializedFile"] = contents.add_file(order.serialized_file, "--serialized-file")
    if order.handler:
        model["handler"] = os.path.basename(order.handler)
        file = order.handler.partition(":")[0]
        if order.handler not in SHIPPED_HANDLERS:
            contents.add_file(_found(file if ".py" in file else f"{file}.py", order.directory), "--handler")
    if order.model_file:
        model["modelFile"] = contents.add_file(order.model_file, "--model-file")
    model["modelVersion"] = order.version
    if order.requirements_file:
        model["requirementsFile"] = contents.add_file(order.requirements_file, "--requirements-file")
    if order.config_file:
        model["configFile"] = contents.add_file(order.config_file, "--config-file")
    for item in (order.extra_files or "").split(","):
        for name, source in _extra(item.strip(), warn):
            contents.add(name, source)
    return {key: value for key, value in model.items() if value}


def _found(path: str, directory: Path | None) -> str:
    """A handler's file may be named as it is called in the model directory."""
    inside = directory / path if directory is not None else None
    return str(inside) if inside is not None and inside.is_file() and not os.path.exists(path) else path


def _model_of_directory(directory: Path, order: Order) -> dict[str, str]:
    """The manifest's `model` for a model directory that has none, by the names of its files."""
    read = read_model_config(directory, order.model_name, check_handler=order.handler is None)
    model = {"modelName": read.name, "handler": read.config.minserve.handler, "modelVersion": Manifest().version}
    usual = {"requirementsFile": REQUIREMENTS_FILE, "configFile": CONFIG_FILE}
    return model | {key: file for key, file in usual.items() if (directory / file).is_file()}


def _texts(manifest: Manifest) -> dict[str, str]:
    """What a manifest's `model` says, with keys that minserve does not know, too."""
    model = json.loads(manifest.text, parse_float=str, parse_int=str).get("model") or {}
    texts = {key: value for key, value in model.items() if isinstance(value, str)}
    return {"modelVersion": manifest.version, **texts}


def _extra(item: str, warn: Callable[[str], None]) -> Iterator[tuple[str, Path]]:
    if not item:
        return
    paths = sorted(glob.glob(item)) if _WILDCARD.search(item) and not os.path.exists(item) else [item]
    if not paths:
        warn(f"--extra-files: {item} matches no file")
    for path in map(Path, paths):
        if path.is_dir():
            yield from _walk(path)
        elif path.exists():
            yield path.name, path
        else:
            raise ConfigError(f"--extra-files: {path}: no such file")


def _walk(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[tuple[str, Path]]:
    """Every file below a folder, by its path in it. Links are followed, but not in circles."""
    here = folder.resolve()
    if here in above:
        raise ConfigError(f"{folder}: a link to a folder that it lies in")
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir():
            yield entry.name, entry
        elif entry.name not in _LEFT_OUT and not entry.name.startswith("."):
            for name, source in _walk(entry, (*above, here)):
                yield f"{entry.name}/{name}", source


def _write(target: Path, order: Order, files: Mapping[str, Path], manifest: str, name: str) -> None:
    """Writes the archive beside its place and moves it there: whoever looks there finds all of it or nothing."""
    if os.path.lexists(target):
        if not order.force:
            raise ConfigError(f"{target}: is there already; -f/--force writes it anew")
        if target.is_dir() != (order.archive_format == "no-archive"):
            raise ConfigError(f"{target}: a {'folder' if target.is_dir() else 'file'}, which --force does not replace")
        if target.is_dir():
            _check_replaceable(target, files)
    order.export_path.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    members = sorted((path, source) for path, source in files.items() if path != MANIFEST.as_posix())
    try:
        if order.archive_format == "no-archive":
            _write_folder(part, members, manifest)
            if target.is_dir():
                shutil.rmtree(target)
        elif order.archive_format == "tgz":
            _write_tar(part, members, manifest, name)
        else:
            method = zipfile.ZIP_STORED if order.archive_format == "zip-store" else zipfile.ZIP_DEFLATED
            _write_zip(part, members, manifest, method)
        part.replace(target)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)


def _check_replaceable(target: Path, files: Mapping[str, Path]) -> None:
    if not (target / MANIFEST).is_file():
        raise ConfigError(f"{target}: is no archive (it has no {MANIFEST}), so --force does not replace it")
    inside = next((source for source in files.values() if source.resolve().is_relative_to(target.resolve())), None)
    if inside is not None:
        raise ConfigError(
            f"{target}: cannot be replaced, {inside} in it is to be archived; choose another --export-path"
        )


def _write_folder(part: Path, members: list[tuple[str, Path]], manifest: str) -> None:
    for path, source in members:
        (part / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, part / path)
    (part / MANIFEST).parent.mkdir(parents=True, exist_ok=True)
    (part / MANIFEST).write_text(manifest, encoding="utf-8")


def _write_tar(part: Path, members: list[tuple[str, Path]], manifest: str, name: str) -> None:
    with tarfile.open(part, "x:gz", dereference=True) as archive:
        for path, source in members:
            entry = archive.gettarinfo(source, f"{name}/{path}")
            entry.type = tarfile.REGTYPE  # a second name of one file would be a link, which servers refuse
            entry.size = source.stat().st_size
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            with source.open("rb") as file:
                archive.addfile(entry, file)
        text = manifest.encode()
        entry = tarfile.TarInfo((PurePosixPath(name) / MANIFEST.as_posix()).as_posix())
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))


def _write_zip(part: Path, members: list[tuple[str, Path]], manifest: str, method: int) -> None:
    with zipfile.ZipFile(part, "x", method, strict_timestamps=False) as archive:
        for path, source in members:
            archive.write(source, path)
        archive.writestr(MANIFEST.as_posix(), manifest)
