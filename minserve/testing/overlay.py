"""A model directory with another configuration, made of links: the author's own directory is never written to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from minserve.config.problems import raise_errors
from minserve.config.yaml import read_yaml

CONFIG_FILE = "model-config.yaml"

Config = Mapping[str, object]


def overlay(source: Path, target: Path, config: Config) -> None:
    """Makes `target` a model directory of the files of `source`, with this configuration."""
    _link(source, target)
    path = target / CONFIG_FILE
    path.unlink(missing_ok=True)
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False))


def read_config(source: Path) -> Config:
    """The model-config.yaml of a directory as it is, empty when there is none.

    Raises:
        FileNotFoundError: there is no such directory.
        ConfigError: it is no YAML.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such model directory")
    if not (source / CONFIG_FILE).exists():
        return {}
    document = read_yaml(source / CONFIG_FILE)
    raise_errors(document.problems)
    return document.data or {}


def configure(written: Config, nproc: int | None, parallel_type: str | None, changes: Config) -> Config:
    """What is written, for one rank group of `nproc` ranks, with the changes.

    Args:
        nproc, parallel_type: None leaves what is written.
        changes: as in model-config.yaml; maps are merged, None takes a key out.

    Raises:
        ValueError: a model of that type has no `nproc` ranks.
    """
    workers = {} if {"minWorkers", "maxWorkers"} & changes.keys() else {"minWorkers": 1, "maxWorkers": 1}
    config = _merge(written, workers)
    if parallel_type is not None:
        config["parallelType"] = parallel_type
    if nproc is not None:
        config = _merge(config, _ranks(str(config.get("parallelType") or "").lower(), nproc))
    return _merge(config, changes)


def _ranks(kind: str, nproc: int) -> Config:
    """The changes that give a model of a parallelType `nproc` ranks, whichever of its keys say otherwise."""
    if nproc < 1:
        raise ValueError(f"nproc: found {nproc}, allowed: an integer >= 1")
    if kind == "custom" and nproc > 1:
        raise ValueError(f"nproc: found {nproc}, allowed with parallelType custom, which is one process: 1")
    if kind in ("", "none", "custom") and nproc == 1:
        return {}
    kind = "tp" if kind in ("", "none") else kind
    torchrun = {"nproc-per-node": nproc, "nproc_per_node": None}
    return {"parallelType": kind, "parallelLevel": None, "torchrun": torchrun}


def _merge(config: Config, changes: Config) -> dict[str, object]:
    merged = dict(config)
    for key, value in changes.items():
        before = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            merged[key] = _merge(before if isinstance(before, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def _link(source: Path, target: Path) -> None:
    """Folders are made, files are links: Python writes its caches beside what it imports."""
    for folder, folders, files in os.walk(source):
        here = target / Path(folder).relative_to(source)
        here.mkdir(parents=True, exist_ok=True)
        for name in list(folders):
            if name in ("__pycache__", ".git"):
                folders.remove(name)
            elif os.path.islink(os.path.join(folder, name)):  # `walk` does not follow it, it may lead up
                (here / name).symlink_to(os.path.realpath(os.path.join(folder, name)))
        for name in files:
            (here / name).symlink_to(os.path.join(folder, name))
