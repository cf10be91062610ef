"""A model validated: its files, its manifest, its configuration, every default resolved."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import minserve
from minserve.config.metrics import declared_metrics
from minserve.config.model import CONFIG_FILE, check_own_handler, read_model_config
from minserve.config.problems import Problem, describe_value, raise_errors
from minserve.errors import ConfigError
from minserve.registry.archive import ENDINGS, Manifest, extract, is_archive, read_manifest
from minserve.registry.numbers import resolve_numbers
from minserve.registry.registration import Registration
from minserve.registry.source import Source
from minserve.registry.store import Location
from minserve.worker.spec import ModelSpec

if TYPE_CHECKING:
    from minserve.config.model import ReadConfig
    from minserve.config.server import ServerOptions
    from minserve.registry.numbers import Numbers
    from minserve.worker.devices import Inventory

RUNTIMES = ("python", "python3")
_VERSION = re.compile(r"(?!\.{1,2}$)[^/{}\s]{1,64}")  # what a path of the REST API can name
_SHIPPED_HANDLERS = Path(minserve.__file__).parent / "compat" / "ts" / "torch_handler"


@dataclass(frozen=True, slots=True)
class ValidModel:
    """A model whose configuration has no error.

    Attributes:
        workers: the fewest.
        extracted: a folder with what was made for it, which goes with it: its archive's files, its virtual environment.
        requirements: its requirements file, if the archive's manifest names one.
    """

    spec: ModelSpec
    workers: int
    warnings: tuple[Problem, ...]
    source: Source = field(default_factory=lambda: Source(Location(Path())))
    extracted: Path | None = None
    requirements: Path | None = None


def validate_model(
    location: Location,
    options: ServerOptions,
    inventory: Inventory,
    registration: Registration | None = None,
    into: Path | None = None,
    *,
    strict: bool = False,
) -> ValidModel:
    """Reads a model directory or an archive and resolves every default.

    Args:
        registration: what was asked for; it goes before what the model says of itself.
        into: where an archive is extracted to: a folder that is not there yet. It is left to the caller.
        strict: nothing that TorchServe forgives is forgiven.

    Raises:
        ConfigError: with every error of its configuration.
    """
    if location.missing is not None:
        raise location.missing
    directory, manifest = _open(location, into)
    asked = registration or Registration(location.url or str(location.path))
    name = _name(location, registration, manifest)
    lenient = not strict and (options.lenient or bool(manifest.text))
    read = read_model_config(
        directory,
        name,
        config_file=_file_name(manifest.config_file) if manifest.text else CONFIG_FILE,
        lenient=lenient,
        check_handler=not (manifest.text or asked.handler or options.default_service_handler),
    )
    told = _Told(directory, manifest, asked, read)
    handler = _handler(told, options)
    raise_errors(
        [*_check_identity(location, manifest.version, told.runtime), *_check_handler(handler, directory, read)]
    )
    numbers = resolve_numbers(read, manifest.version, options, inventory, registration, lenient)
    requirements = _file_name(manifest.requirements_file)
    return ValidModel(
        _make_spec(told, handler, numbers, options),
        numbers.workers,
        (*read.warnings, *numbers.warnings),
        Source(location, registration),
        requirements=directory / requirements if requirements else None,
    )


@dataclass(frozen=True, slots=True)
class _Told:
    """What a model's files and whoever asked for it say."""

    directory: Path
    manifest: Manifest
    asked: Registration
    read: ReadConfig

    @property
    def runtime(self) -> str:
        return self.asked.runtime or self.manifest.runtime


def _make_spec(told: _Told, handler: str, numbers: Numbers, options: ServerOptions) -> ModelSpec:
    config, manifest = numbers.config, told.manifest
    return ModelSpec(
        name=told.read.name,
        version=manifest.version,
        model_dir=told.directory,
        config=config,
        yaml=told.read.yaml,
        world_size=numbers.world_size,
        response_timeout=config.response_timeout or options.default_response_timeout,
        startup_timeout=config.startup_timeout or options.default_startup_timeout,
        queue_limit=config.job_queue_size or options.job_queue_size,
        debug=options.log_level == "debug",
        bare_log=options.lenient,
        handler=handler,
        manifest=manifest.text,
        envelope=options.service_envelope or manifest.envelope or "",
        url=told.asked.url,
        runtime=told.runtime.lower(),
        limit_max_image_pixels=options.limit_max_image_pixels,
        decode_input=options.decode_input_request,
        launcher=config.minserve.launcher or options.launcher,
        metrics=declared_metrics(options.metrics_config, options.metrics_mode).for_ranks(),
    )


def _name(location: Location, registration: Registration | None, manifest: Manifest) -> str:
    name = (registration.name if registration is not None else None) or location.name or manifest.model_name
    if name is None and registration is not None and is_archive(location.path):
        raise ConfigError("Model name is not defined.")
    return name or location.file_name


def _handler(told: _Told, options: ServerOptions) -> str:
    """The registration's, the manifest's, the model directory's own, the server's default: the first that there is."""
    asked, manifest, config = told.asked, told.manifest, told.read.config
    own = config.minserve.handler
    if not manifest.text and (told.directory / config.minserve.handler_file).is_file():
        return asked.handler or own
    return asked.handler or manifest.handler or options.default_service_handler or own


def _open(location: Location, into: Path | None) -> tuple[Path, Manifest]:
    """The model's files, extracted if need be, and its manifest; one without a text where there is none."""
    directory = location.path
    if is_archive(directory):
        if into is None:
            raise ConfigError(f"{directory}: an archive, and there is no place to extract it to")
        directory = extract(directory, into)
    elif directory.is_file():
        raise ConfigError(f"{directory}: found a file, allowed: a model directory or an archive ({', '.join(ENDINGS)})")
    else:
        directory = _inner(directory)
    return directory, read_manifest(directory) or Manifest()


def _file_name(path: str | None) -> str | None:
    """The archiver puts every file at the top."""
    return Path(path).name if path else None


def _inner(directory: Path) -> Path:
    """A folder whose only content is another folder stands for that one, as with TorchServe."""
    try:
        entries = [entry for entry in directory.iterdir() if not entry.name.startswith(".")]
    except OSError:  # told later, with all else
        return directory
    return entries[0] if len(entries) == 1 and entries[0].is_dir() and entries[0].name != "MAR-INF" else directory


def _check_identity(location: Location, version: str, runtime: str | None) -> list[Problem]:
    problems = []
    if not _VERSION.fullmatch(version):
        allowed = "at most 64 characters, none of `/`, `{`, `}` and no blanks, and not `.` or `..`"
        problems.append(Problem(str(location.path), None, "modelVersion", describe_value(version), allowed))
    if runtime is not None and runtime.lower() not in RUNTIMES:
        allowed = " or ".join(RUNTIMES)
        problems.append(Problem(str(location.path), None, "runtime", describe_value(runtime), allowed))
    return problems


def _check_handler(handler: str, directory: Path, read: ReadConfig) -> list[Problem]:
    """A name without `.py` may be that of a shipped handler; what it is the ranks find out."""
    if handler == read.config.minserve.handler:
        return list(check_own_handler(read.config, read.document, directory))
    file = handler.partition(":")[0]
    path = PurePosixPath(file.replace("\\", "/"))
    allowed = "file.py or file.py:name inside the model, or the name of a shipped handler"
    if path.is_absolute() or ".." in path.parts or not file.strip():
        return [Problem(str(directory), None, "handler", describe_value(handler), allowed)]
    known = (directory / path, directory / path.name, _SHIPPED_HANDLERS / path)
    if path.suffix == ".py" and not any(one.is_file() for one in known):
        return [Problem(str(directory), None, "handler", f"{describe_value(handler)} and no such file", allowed)]
    return []
