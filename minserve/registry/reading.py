"""From a source to a model that can be served: validated, its archive extracted, its packages installed."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from typing import TYPE_CHECKING

from minserve.errors import ConfigError
from minserve.registry.archive import is_archive
from minserve.registry.packages import install_requirements, make_venv
from minserve.registry.validating import validate_model

if TYPE_CHECKING:
    from pathlib import Path

    from minserve.config.server import ServerOptions
    from minserve.registry.source import Source
    from minserve.registry.validating import ValidModel
    from minserve.worker.devices import Inventory
    from minserve.worker.runtime import RuntimeDirectory


async def read_model(
    source: Source, options: ServerOptions, inventory: Inventory, runtime: RuntimeDirectory
) -> ValidModel:
    """Reads a model, and installs its packages where the server does that. Nothing is left when it fails.

    Raises:
        ConfigError: with every error of its archive, its manifest and its configuration.
        MinServeError: its packages could not be installed.
    """
    own = _own_folder(runtime) if is_archive(source.location.path) else None
    try:
        into = own / "model" if own is not None else None
        model = await asyncio.to_thread(validate_model, source.location, options, inventory, source.registration, into)
        if own is None and model.spec.config.use_venv:
            own = _own_folder(runtime)
        model = await _with_packages(model, options, own)
    except BaseException:
        await remove(own)
        raise
    return dataclasses.replace(model, source=source, extracted=own)


def _own_folder(runtime: RuntimeDirectory) -> Path:
    path = runtime.new_extraction()
    try:
        path.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be made, for the model's files: {error.strerror}") from None
    return path


async def _with_packages(model: ValidModel, options: ServerOptions, own: Path | None) -> ValidModel:
    """Makes the model's virtual environment and installs its packages, where that is asked for."""
    spec, python = model.spec, None
    if spec.config.use_venv and own is not None:
        python = await make_venv(spec.name, own / "venv")
        model = dataclasses.replace(model, spec=dataclasses.replace(spec, python=str(python)))
    if model.requirements is not None and options.install_py_dep_per_model:
        if own is None:
            raise ConfigError(
                f"{model.requirements}: packages are not installed into a folder of the store, which is nobody's to change; "
                "with useVenv: true the model gets an environment of its own"
            )
        into = spec.model_dir if python is None else None
        await install_requirements(spec.name, model.requirements, own, into, python)
    return model


async def discard(model: ValidModel) -> None:
    """Removes what was extracted for a model that is not served after all."""
    await remove(model.extracted)


async def remove(directory: Path | None) -> None:
    """Removes the folder of an archive's files, if there is one."""
    if directory is not None:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
