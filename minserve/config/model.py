"""A model directory's configuration: read, validated as a whole, and free of contradictions."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minserve.config.keys import MinServeConfig, ModelConfig, ParallelType, TorchrunConfig
from minserve.config.lenient import forgive_file, settle_contradictions
from minserve.config.problems import Problem, describe_value, raise_errors
from minserve.config.schema import json_schema
from minserve.config.validate import validate
from minserve.config.yaml import YamlDocument, YamlPath, read_yaml

__all__ = [
    "MinServeConfig",
    "ModelConfig",
    "ParallelType",
    "ReadConfig",
    "TorchrunConfig",
    "json_schema",
    "read_model_config",
]

CONFIG_FILE = "model-config.yaml"
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-.]{0,254}")  # as long as a file's may be
_WITHOUT_EFFECT = ("useJobTicket",)
# A handler that is written for one of these would be served in another way than it expects: its answers would be wrong.
_NOT_YET = ("continuousBatching", "sequenceBatching")


@dataclass(frozen=True)
class ReadConfig:
    """What a model directory says.

    Attributes:
        name: the model's name, which is the folder's.
        config: the validated configuration.
        warnings: what is doubtful in it.
        document: the file, for later checks that want to name a line in it.
        yaml: the file's content, for the ranks; empty where there is none, and where nothing of it counts.
    """

    name: str
    config: ModelConfig
    warnings: tuple[Problem, ...]
    document: YamlDocument
    yaml: bytes = b""


def read_model_config(
    model_dir: Path,
    name: str | None = None,
    *,
    config_file: str | None = CONFIG_FILE,
    lenient: bool = False,
    check_handler: bool = True,
) -> ReadConfig:
    """Read and check the configuration of a model directory. Without a model-config.yaml every key has its default.

    Args:
        model_dir: the folder.
        name: the name to serve it under, None for the folder's.
        config_file: the file's name; None: nothing is read, every key has its default.
        lenient: what TorchServe forgives is a warning, see `lenient`.
        check_handler: the handler's file must be there.

    Raises:
        ConfigError: something is wrong. The message lists every error, one a line; the contradictions between keys are
            looked for once every key is fine by itself.
    """
    name = name or Path(os.path.abspath(model_dir)).name
    document = _read_document(model_dir, config_file)
    readable = document.data is not None
    if lenient:
        document = forgive_file(document)
    problems = [*_check_name(model_dir, name), *document.problems]
    raise_errors(problems if document.data is None else ())
    config, wrong = validate(document, document.data or {}, lenient=lenient)
    problems += wrong
    if config is not None and lenient:
        config, settled = settle_contradictions(config, document)
        problems += settled
    if config is not None and all(problem.severity == "warning" for problem in problems):
        problems += _check_parallelism(config, document)
        problems += _check_workers(config, document)
        problems += _check_torchrun(config, document)
        if check_handler:
            problems += check_own_handler(config, document, model_dir)
        problems += _switches_without_effect(document)
    problems.sort(key=lambda problem: problem.line or 0)
    raise_errors(problems)
    assert config is not None  # a value that fails validation is an error
    path = model_dir / (config_file or "")
    content = path.read_bytes() if readable and path.is_file() else b""
    return ReadConfig(name, config, tuple(problems), document, content)


def _read_document(model_dir: Path, config_file: str | None) -> YamlDocument:
    path = model_dir / (config_file or CONFIG_FILE)
    if not model_dir.is_dir():
        missing = Problem(str(model_dir), None, "", "no such directory", "a model directory")
        return YamlDocument(str(path), None, problems=(missing,))
    if config_file is None or (config_file == CONFIG_FILE and not os.path.lexists(path)):
        return YamlDocument(str(path), {})
    return read_yaml(path)


def _check_name(model_dir: Path, name: str) -> Iterator[Problem]:
    if not _MODEL_NAME.fullmatch(name):
        allowed = "at most 255 letters, digits, `_`, `-` and `.`, with a letter or a digit first"
        hint = "the folder's name is the model's name" if name == model_dir.name else ""
        yield Problem(str(model_dir), None, "model name", describe_value(name), allowed, hint)


def _check_parallelism(config: ModelConfig, document: YamlDocument) -> Iterator[Problem]:
    level, nproc = config.parallel_level, config.torchrun.nproc_per_node
    type_path: YamlPath = ("parallelType",)
    if config.parallel_type is ParallelType.NONE:
        for key in ("torchrun", "parallelLevel"):
            if document.data and document.data.get(key) is not None:
                yield document.problem(
                    (key,),
                    found=f"{key} without a parallelType",
                    allowed="with parallelType tp, pp, pptp or custom",
                    hint="it has no effect, the model runs as one plain process",
                    severity="warning",
                )
        return
    name = f'"{config.parallel_type}"'
    if config.is_parallel and level is None and nproc is None:
        yield document.problem(
            type_path,
            found=f"{name} and no number of ranks",
            allowed="together with torchrun.nproc-per-node or parallelLevel",
        )
    if level is not None and isinstance(nproc, int) and level != nproc:
        yield document.problem(
            ("parallelLevel",), found=str(level), allowed=f"{nproc}, as torchrun.nproc-per-node, or one of the two keys"
        )
    if nproc == "gpu" and level is None and config.device_type == "cpu":
        yield document.problem(
            _torchrun_path(document, "nproc-per-node"),
            found='"gpu" with deviceType cpu',
            allowed='an integer >= 1, or "auto"',
        )
    if config.is_parallel and config.async_communication:
        yield document.problem(
            ("asyncCommunication",),
            found=f"true with parallelType {name}",
            allowed="false",
            hint="ranks that answer in any order have no common order of requests",
        )
    places, ranks = config.minserve.in_flight, level or nproc
    if config.parallel_type is ParallelType.PP and isinstance(ranks, int) and places and 1 < places < ranks:
        yield document.problem(
            ("minserve", "inFlight"),
            found=str(places),
            allowed=f"1, at least {ranks}, or no inFlight",
            hint=f"fewer batches than the pipeline has stages leave some of the {ranks} ranks idle",
            severity="warning",
        )


def _check_workers(config: ModelConfig, document: YamlDocument) -> Iterator[Problem]:
    most = max(config.min_workers_or(1), config.max_workers_or(1))
    path: YamlPath = ("maxWorkers",) if config.max_workers == most else ("minWorkers",)
    if config.max_workers is not None and config.max_workers < config.min_workers_or(1):
        yield document.problem(
            ("maxWorkers",), found=str(config.max_workers), allowed=f"at least minWorkers, {config.min_workers}"
        )
    if most > 1 and config.torchrun.rdzv_endpoint is not None:
        yield document.problem(
            _torchrun_path(document, "rdzv-endpoint"),
            found=f"an endpoint for {most} workers",
            allowed=f"{path[0]} 1, or no rdzv-endpoint",
            hint="workers would meet each other's ranks there",
        )
    ranks = config.parallel_level or config.torchrun.nproc_per_node
    if most > 1 and config.is_parallel and ranks != 1:
        yield document.problem(
            path,
            found=f"{most} workers of a model with several ranks",
            allowed="any number, 1 is usual",
            hint="each worker is a whole group of ranks with devices of its own",
            severity="warning",
        )


def _check_torchrun(config: ModelConfig, document: YamlDocument) -> Iterator[Problem]:
    if config.torchrun.nnodes > 1:
        yield document.problem(
            ("torchrun", "nnodes"),
            found=str(config.torchrun.nnodes),
            allowed="1",
            hint="not yet: minserve runs one node",
        )
    if config.torchrun.node_rank:
        yield document.problem(
            _torchrun_path(document, "node-rank"),
            found=str(config.torchrun.node_rank),
            allowed="0",
            hint="not yet: minserve runs one node",
        )
    if config.torchrun.rdzv_id is not None:
        yield document.problem(
            _torchrun_path(document, "rdzv-id"),
            found=describe_value(config.torchrun.rdzv_id),
            allowed="no rdzv-id",
            hint="it has no effect, minserve makes a new id for each start of a worker",
            severity="warning",
        )


def check_own_handler(config: ModelConfig, document: YamlDocument, model_dir: Path) -> Iterator[Problem]:
    """The handler that the configuration names, or handler.py, must be there."""
    path = model_dir / config.minserve.handler_file
    if path.is_file():
        return
    if ("minserve", "handler") not in document.lines:
        yield Problem(str(path), None, "minserve.handler", "no such file", f"a handler file in {model_dir}")
    else:
        found = describe_value(config.minserve.handler)
        yield document.problem(("minserve", "handler"), found=found, allowed="an existing file", hint=f"no file {path}")


def _switches_without_effect(document: YamlDocument) -> Iterator[Problem]:
    for key in _WITHOUT_EFFECT:
        if document.data and document.data.get(key) is True:
            yield document.problem(
                (key,), found="true", allowed="true or false", hint="understood, not yet acted on", severity="warning"
            )
    for key in _NOT_YET:
        if document.data and document.data.get(key) is True:
            hint = "not yet: without it the handler's answers would be wrong"
            yield document.problem((key,), found="true", allowed="false", hint=hint)


def _torchrun_path(document: YamlDocument, key: str) -> YamlPath:
    """Return the path of a torchrun key as the file spells it."""
    underscored: YamlPath = ("torchrun", key.replace("-", "_"))
    return underscored if underscored in document.lines else ("torchrun", key)
