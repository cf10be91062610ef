"""The errors of a model-config.yaml that TorchServe forgives, forgiven: each is a warning, and TorchServe's value is used.

For archives with a MANIFEST.json, and for servers that stand in for TorchServe (torchserve.md 5.1). Errors stay: a file that
is too large or expands to too much, whatever is wrong in the `minserve:` section, and what cannot work or did not work with
TorchServe either: asyncCommunication with several ranks, a fixed rendezvous for several workers, more than one node, too few
devices for one worker.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from minserve.config.keys import ModelConfig, ParallelType

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from minserve.config.problems import Problem
    from minserve.config.yaml import YamlDocument, YamlPath

# A number below the least counts as the least; any other wrong value as none.
_LEAST = {"minWorkers": 1, "batchSize": 1, "maxRetryTimeoutInSec": 0}
_RANKS = ("nproc-per-node", "nproc_per_node")
_OWN = "minserve"


def forgive_file(document: YamlDocument) -> YamlDocument:
    """A file that is no YAML counts as one without a key, unless it was refused because it is dangerous.

    Of a key that is there twice the last counts.
    """
    if document.dangerous:
        return document
    unread = "the model is served as if it had no configuration"
    problems = forgive_problems(document.problems, unread if document.data is None else "the last one is used")
    return dataclasses.replace(document, data=document.data or {}, problems=tuple(problems))


def forgive_problems(problems: Iterable[Problem], hint: str = "it has no effect") -> list[Problem]:
    """Errors as warnings, except those of the `minserve:` section."""
    return [
        problem if _is_own(problem.key) else dataclasses.replace(problem, severity="warning", hint=hint)
        for problem in problems
    ]


def forgive_values(values: dict[str, object], wrong: Mapping[YamlPath, Problem]) -> list[Problem] | None:
    """Takes out of `values` what is wrong. Returns the warnings; None if nothing can be forgiven any more."""
    warnings: list[Problem] = []
    for path, problem in wrong.items():
        key = str(path[0])
        if _is_own(key):
            continue
        value, hint = values.get(key), "it has no effect"
        if key == "torchrun" and len(path) > 1 and isinstance(value, dict):
            section = {name: other for name, other in value.items() if name != path[1]}
            if path[1] in _RANKS:
                section[path[1]], hint = 1, "1 is used"
            values[key] = section
        elif key in _LEAST and isinstance(value, int) and not isinstance(value, bool) and value < _LEAST[key]:
            values[key], hint = _LEAST[key], f"{_LEAST[key]} is used"
        else:
            values.pop(key, None)
        warnings.append(dataclasses.replace(problem, severity="warning", hint=hint))
    return warnings or None


def settle_contradictions(config: ModelConfig, document: YamlDocument) -> tuple[ModelConfig, list[Problem]]:
    """Keys that are fine by themselves and do not go together. Those that TorchServe can live with are changed."""
    changes: dict[str, object] = {}
    warnings: list[Problem] = []

    def change(path: YamlPath, found: str, allowed: str, hint: str, **values: object) -> None:
        changes.update(values)
        warnings.append(document.problem(path, found=found, allowed=allowed, hint=hint, severity="warning"))

    level, ranks = config.parallel_level, config.torchrun.nproc_per_node
    if config.is_parallel and level is None and ranks is None:
        change(
            ("parallelType",),
            found=f'"{config.parallel_type}" and no number of ranks',
            allowed="together with torchrun.nproc-per-node or parallelLevel",
            hint="the model runs as one plain process",
            parallel_type=ParallelType.NONE,
        )
    if config.is_parallel and level is not None and isinstance(ranks, int) and level != ranks:
        allowed = f"{ranks}, as torchrun.nproc-per-node"
        change(("parallelLevel",), str(level), allowed, f"{ranks} is used", parallel_level=None)
    fewest, most = config.min_workers, config.max_workers
    if fewest is not None and most is not None and most < fewest:
        allowed, hint = f"at least minWorkers, {fewest}", "neither has an effect"
        change(("maxWorkers",), str(most), allowed, hint, min_workers=None, max_workers=None)
    if config.torchrun.node_rank:
        torchrun = config.torchrun.model_copy(update={"node_rank": None})
        change(("torchrun",), f"node-rank {config.torchrun.node_rank}", "0", "it has no effect", torchrun=torchrun)
    return (config.model_copy(update=changes) if changes else config), warnings


def settle_devices(config: ModelConfig, visible: int, document: YamlDocument) -> tuple[ModelConfig, list[Problem]]:
    """What a machine with `visible` devices cannot give.

    A list with a device that is not there counts as none; of workers that are groups of ranks there are as many as fit.
    """
    warnings: list[Problem] = []
    if config.device_type == "cpu" or not visible:
        return config, warnings
    absent = [index for index in config.device_ids or () if index >= visible]
    if absent:
        found = f"{', '.join(map(str, absent))}, of {visible} visible device(s)"
        allowed, hint = f"ids from 0 to {visible - 1}", "the list has no effect"
        warnings.append(document.problem(("deviceIds",), found=found, allowed=allowed, hint=hint, severity="warning"))
        config = config.model_copy(update={"device_ids": None})
    if not config.is_parallel:
        return config, warnings
    fit = len(config.device_ids or range(visible)) // config.devices_per_worker(visible)
    fewest = config.min_workers_or(1)
    if 0 < fit < fewest:
        hint = f"{fit} is used"
        warnings.append(
            document.problem(
                ("minWorkers",), found=str(fewest), allowed=f"at most {fit}", hint=hint, severity="warning"
            )
        )
        config = config.model_copy(update={"min_workers": fit, "max_workers": fit})
    return config, warnings


def _is_own(key: str) -> bool:
    return key.partition(".")[0] == _OWN
