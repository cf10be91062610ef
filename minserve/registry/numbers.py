"""Which number counts where several places name one: the registration, the model's YAML, the `models` option, a default.

TorchServe's order (torchserve.md 2.1, 5.1, 6), but for the time limits of a registration, which it ignores where there is a
YAML.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minserve.config.keys import ParallelType
from minserve.config.lenient import settle_devices
from minserve.config.problems import Problem, raise_errors
from minserve.worker.devices import check_devices, groups_that_fit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from minserve.config.keys import ModelConfig
    from minserve.config.model import ReadConfig
    from minserve.config.server import ServerOptions
    from minserve.registry.registration import Registration
    from minserve.worker.devices import Inventory

MOST_RANKS = 1000  # of the fewest workers of a model version; each is a process, and more were never meant
_OF_MODELS = {  # the `models` option: the key in it, and the attribute of the configuration
    "batchSize": "batch_size",
    "maxBatchDelay": "max_batch_delay",
    "responseTimeout": "response_timeout",
    "startupTimeout": "startup_timeout",
    "parallelLevel": "parallel_level",
}


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a model is served with.

    Attributes:
        config: its configuration with the numbers that count.
        world_size: ranks of a worker.
        workers: the fewest.
    """

    config: ModelConfig
    world_size: int
    workers: int
    warnings: tuple[Problem, ...]


def resolve_numbers(
    read: ReadConfig,
    version: str,
    options: ServerOptions,
    inventory: Inventory,
    registration: Registration | None,
    lenient: bool,
) -> Numbers:
    """Decides about all numbers of a model.

    Args:
        registration: None at the start of the server, where a model that names no number of workers gets some all the same.
        lenient: what the devices cannot give is a warning where TorchServe can live with it.

    Raises:
        ConfigError: there are too few devices, or too many workers.
    """
    configured = _configured(options, read.name, version)
    config = _asked_for(read.config, registration, configured)
    warnings: list[Problem] = []
    if lenient:
        config, warnings = settle_devices(config, len(inventory), read.document)
    world_size = config.world_size(len(inventory))
    raise_errors(check_devices(config, world_size, inventory, read.document))
    config, workers = _sized(config, options, inventory, registration, configured)
    fit = groups_that_fit(config, world_size, inventory)
    if fit is not None and workers > fit:  # TorchServe starts as many as fit, too
        found, allowed = f"{workers} workers of {world_size} device(s) each", f"at most {fit}"
        hint = f"{fit} are started, there are {len(inventory)} device(s)"
        warnings.append(Problem(read.document.file, None, "workers", found, allowed, hint, "warning"))
        config, workers = config.model_copy(update={"min_workers": fit, "max_workers": fit}), fit
    if max(workers, 1) * world_size > MOST_RANKS:
        found, allowed = f"{workers} of {world_size} rank(s) each", f"at most {MOST_RANKS} ranks together"
        raise_errors([Problem(read.document.file, None, "workers", found, allowed)])
    return Numbers(config, world_size, workers, tuple(warnings))


def _configured(options: ServerOptions, name: str, version: str) -> Mapping[str, int]:
    """What the `models` option says about a model version; TorchServe takes no notice of numbers below 1."""
    versions = options.models.get(name)
    values = versions.get(version) if isinstance(versions, dict) else None
    if not isinstance(values, dict):
        return {}
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, int) and not isinstance(value, bool) and value > 0
    }


def _asked_for(config: ModelConfig, registration: Registration | None, configured: Mapping[str, int]) -> ModelConfig:
    """The registration goes before the YAML, the YAML before the `models` option."""
    values: dict[str, object] = {
        attribute: configured[key]
        for key, attribute in _OF_MODELS.items()
        if key in configured and attribute not in config.model_fields_set
    }
    if registration is not None:
        given = {
            "batch_size": registration.batch_size,
            "max_batch_delay": registration.max_batch_delay,
            "response_timeout": registration.response_timeout,
            "startup_timeout": registration.startup_timeout,
        }
        values |= {attribute: value for attribute, value in given.items() if value is not None}
    return config.model_copy(update=values) if values else config


def _sized(
    config: ModelConfig,
    options: ServerOptions,
    inventory: Inventory,
    registration: Registration | None,
    configured: Mapping[str, int],
) -> tuple[ModelConfig, int]:
    """The fewest workers, with the configuration that says so, too.

    A registration's number counts unless the YAML has both minWorkers and maxWorkers, as with TorchServe.
    """
    asked = registration.initial_workers if registration is not None else None
    if asked is not None and (config.min_workers is None or config.max_workers is None):
        fewest, most = asked, max(asked, config.max_workers or 0)
    elif config.min_workers is None and config.max_workers is None and "minWorkers" in configured:
        fewest = configured["minWorkers"]
        most = max(fewest, configured.get("maxWorkers", 0))
    elif registration is not None:  # TorchServe starts none of a model that nobody gives a number
        return config, config.min_workers_or(options.default_workers_per_model or 0)
    else:
        return config, config.min_workers_or(_default_workers(config, options, inventory))
    return config.model_copy(update={"min_workers": fewest, "max_workers": most}), fewest


def _default_workers(config: ModelConfig, options: ServerOptions, inventory: Inventory) -> int:
    """How many workers a model gets that does not say: one a GPU for a single process, else one."""
    if options.default_workers_per_model is not None:
        return options.default_workers_per_model
    if config.is_parallel or config.parallel_type is ParallelType.CUSTOM or config.device_type == "cpu":
        return 1
    return max(1, len(config.device_ids or inventory.masks))
