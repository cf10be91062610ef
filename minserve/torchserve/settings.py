"""What a start goes by: TorchServe's configuration file, found where TorchServe finds it, and the command line over it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minserve.config.properties import read_properties
from minserve.errors import StartupError
from minserve.registry.snapshots import newest

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from minserve.config.server import ServerOptions

CONFIG_FILE = "config.properties"


@dataclass(frozen=True)
class Settings:
    """What a start goes by.

    Attributes:
        properties: those of the configuration file and of the command line, for snapshots.
        snapshots: where they are kept; None: not at all.
        restored: the snapshot that is the configuration; None: it is none.
        warnings: what of the configuration has no effect.
    """

    options: ServerOptions
    properties: Mapping[str, str]
    snapshots: Path | None
    restored: Path | None
    logs: Path
    metrics: Path
    warnings: tuple[str, ...]


def read_settings(given: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """Finds the configuration as TorchServe does: TS_CONFIG_FILE, --ts-config, the newest snapshot, ./config.properties.

    Raises:
        ConfigError, StartupError: a file is not there, or something in it is wrong.
    """
    logs = Path(environ.get("LOG_LOCATION") or "logs")
    metrics = Path(environ.get("METRICS_LOCATION") or logs)
    snapshots = None if given.no_snapshots else logs / "config"
    chosen = environ.get("TS_CONFIG_FILE") or given.ts_config
    file = Path(chosen) if chosen else None
    if file is not None and not file.is_file():
        raise StartupError(f"--ts-config file not found: {file}")
    restored = newest(snapshots) if file is None and snapshots is not None else None
    file = file or restored
    if file is None and Path(CONFIG_FILE).is_file():
        file = Path(CONFIG_FILE)
    asked: dict[str, object] = {"access_log": True}
    if given.model_store is not None:
        asked["model_store"] = given.model_store
    if given.models is not None:
        asked["load_models"] = [name for item in given.models for name in item.split(",") if name]
    if given.no_tokens:
        asked["disable_token_authorization"] = True
    if given.enable_model_api:
        asked["enable_model_api"] = True
    frontends = environ.get("MINSERVE_FRONTENDS")
    if frontends:  # TorchServe has threads for this, and no key that means the same
        asked["frontends"] = int(frontends) if frontends.isdecimal() else frontends
    read = read_properties(file, asked, environ)
    if restored is not None and not read.options.model_snapshot:
        raise StartupError(f"{restored}: the newest snapshot holds no models; remove it, or use --no-config-snapshots")
    if not Path(read.options.model_store).is_dir():
        raise StartupError(f"--model-store directory not found: {read.options.model_store}")
    ignored = [
        name for name in ("log_config", "cpp_log_config", "plugins_path", "workflow_store") if getattr(given, name)
    ]
    warnings = [f"--{name.replace('_', '-')} has no effect here" for name in ignored]
    return Settings(read.options, read.properties, snapshots, restored, logs, metrics, (*read.warnings, *warnings))
