"""The one allocator of accelerators of a server: which devices each worker sees.

A worker of a parallel model owns its devices alone; single-process workers share what is left, as TorchServe's do.
Unlike TorchServe there is one account for all models, and an inherited CUDA_VISIBLE_DEVICES is mapped through.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minserve.config.keys import ModelConfig, ParallelType
from minserve.config.problems import Problem
from minserve.config.yaml import YamlDocument
from minserve.errors import MinServeError

logger = logging.getLogger(__name__)


class NoDevicesError(MinServeError):
    """A worker needs devices that others own, or that are not there. The message names the owners."""


@dataclass(frozen=True)
class Inventory:
    """The devices that the server may use; device k of the server is `masks[k]` in CUDA_VISIBLE_DEVICES.

    Attributes:
        masks: an index, a GPU UUID or a MIG UUID for each device, in CUDA's order.
    """

    masks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.masks)

    def first(self, most: int | None) -> Inventory:
        """At most so many of them; None: all."""
        return Inventory(self.masks[:most])


@dataclass(frozen=True)
class Devices:
    """What one worker sees. All its ranks get the same mask; LOCAL_RANK indexes it.

    Attributes:
        mask: its CUDA_VISIBLE_DEVICES; None: leave the variable alone.
        ids: the same devices as indices into the inventory.
    """

    mask: str | None = None
    ids: tuple[int, ...] = ()


def read_inventory(environ: Mapping[str, str]) -> Inventory:
    """Ask NVML for the machine's GPUs. Without a driver or its library the inventory is empty; never raises.

    Args:
        environ: what the server inherited; its CUDA_VISIBLE_DEVICES counts.
    """
    return Inventory(visible_devices(_gpu_uuids(), environ.get("CUDA_VISIBLE_DEVICES")))


def visible_devices(uuids: Sequence[str], cuda_visible_devices: str | None) -> tuple[str, ...]:
    """Return the entries of CUDA_VISIBLE_DEVICES that CUDA would honour on a machine with these GPUs.

    CUDA stops at the first entry that names no device, and shows none at all when one is repeated (CUDA Programming
    Guide, "CUDA Environment Variables"; torch.cuda.device_count counts so too).
    """
    if cuda_visible_devices is None:
        return tuple(str(index) for index in range(len(uuids)))
    visible: list[str] = []
    for entry in cuda_visible_devices.split(","):
        mask = entry.strip()
        if mask in visible:
            return ()
        if not _names_device(mask, uuids):
            break
        visible.append(mask)
    return tuple(visible) if uuids else ()


def check_devices(
    config: ModelConfig, world_size: int, inventory: Inventory, document: YamlDocument
) -> tuple[Problem, ...]:
    """Return the contradictions between a configuration and the devices there are; none for a model without a GPU."""
    if config.device_type == "cpu" or not inventory.masks:
        return ()
    there = len(inventory)
    absent = [index for index in config.device_ids or () if index >= there]
    if absent:
        found = f"{', '.join(map(str, absent))}, of {there} visible device(s)"
        return (document.problem(("deviceIds",), found=found, allowed=f"ids from 0 to {there - 1}"),)
    usable = len(config.device_ids or inventory.masks)
    per_worker = _devices_needed(config, world_size, inventory)
    workers = config.min_workers_or(1) if _is_exclusive(config, per_worker) else 1
    if workers * per_worker <= usable:
        return ()
    need = f"{workers} worker(s) of {per_worker} device(s) each"
    if config.device_ids is not None:
        found = f"{usable} id(s) for {need}"
        return (document.problem(("deviceIds",), found=found, allowed=f"at least {workers * per_worker} ids"),)
    allowed = f"at most {usable} device(s) in all, those that are visible"
    return (document.problem(("parallelType",), found=f'"{config.parallel_type}" with {need}', allowed=allowed),)


class DeviceAllocator:
    """Gives devices to workers and takes them back. Owners are the workers' names, as the messages show them.

    A device that a group of ranks (or a custom process with several devices) owns goes to nobody else. Single-process
    workers share the others in turn. The server lets groups choose first, for a device in use is no longer theirs to own.
    """

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._owned: dict[str, tuple[int, ...]] = {}
        self._shared: dict[str, int] = {}
        self._next_shared = 0

    def reserve(self, owner: str, config: ModelConfig, world_size: int) -> Devices:
        """Give a worker its devices. An owner that holds some already keeps them.

        Args:
            owner: the worker's name.
            config: its model's configuration.
            world_size: its number of ranks.

        Raises:
            NoDevicesError: too few are free.
        """
        if config.device_type == "cpu" or not self._inventory.masks:
            return Devices()
        if owner in self._owned:
            return self._devices(self._owned[owner])
        if owner in self._shared:
            return self._devices((self._shared[owner],))
        taken = {index for ids in self._owned.values() for index in ids}
        candidates = config.device_ids or range(len(self._inventory))
        free = [index for index in candidates if index < len(self._inventory) and index not in taken]
        need = _devices_needed(config, world_size, self._inventory)
        exclusive = _is_exclusive(config, need)
        if exclusive:
            shared = set(self._shared.values())
            free = [index for index in free if index not in shared]
        if len(free) < need:
            raise NoDevicesError(
                f"{owner} needs {need} device(s), {len(free)} of {len(candidates)} are free; {self._holders()}"
            )
        if exclusive:
            self._owned[owner] = tuple(free[:need])
            return self._devices(self._owned[owner])
        self._shared[owner] = self._pick_shared(free)
        return self._devices((self._shared[owner],))

    def release(self, owner: str) -> None:
        """Take a worker's devices back. An owner that holds none is fine."""
        self._owned.pop(owner, None)
        self._shared.pop(owner, None)

    def _pick_shared(self, free: Sequence[int]) -> int:
        # Round-robin among the least used: after some workers have gone, plain round-robin would pile up the rest.
        users = Counter(self._shared.values())
        count = len(self._inventory)
        chosen = min(free, key=lambda index: (users[index], (index - self._next_shared) % count))
        self._next_shared = (chosen + 1) % count
        return chosen

    def _devices(self, ids: tuple[int, ...]) -> Devices:
        return Devices(",".join(self._inventory.masks[index] for index in ids), ids)

    def _holders(self) -> str:
        holders = [f"{owner} owns {', '.join(map(str, ids))}" for owner, ids in self._owned.items()]
        holders += [f"{owner} uses {index}" for owner, index in self._shared.items()]
        return "; ".join(holders) or "no worker holds any"


def groups_that_fit(config: ModelConfig, world_size: int, inventory: Inventory) -> int | None:
    """How many groups of ranks of a model the machine's devices are enough for; None where that is no question."""
    if not config.is_parallel or config.device_type == "cpu" or not inventory.masks:
        return None
    return len(config.device_ids or inventory.masks) // world_size


def _devices_needed(config: ModelConfig, world_size: int, inventory: Inventory) -> int:
    return world_size if config.is_parallel else config.devices_per_worker(len(inventory))


def _is_exclusive(config: ModelConfig, need: int) -> bool:
    return config.is_parallel or (config.parallel_type is ParallelType.CUSTOM and need > 1)


def _names_device(mask: str, uuids: Sequence[str]) -> bool:
    if mask.startswith("MIG-"):
        return True  # which instances exist is left to CUDA: their UUIDs have two forms
    if mask.startswith("GPU-"):
        return sum(uuid.startswith(mask) for uuid in uuids) == 1  # CUDA takes any unambiguous beginning
    return mask.isascii() and mask.isdigit() and int(mask) < len(uuids)


def _gpu_uuids() -> tuple[str, ...]:
    try:
        import pynvml  # here, not above: a machine without the library still serves on CPU

        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            return tuple(str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles)
        finally:
            pynvml.nvmlShutdown()
    except Exception as error:  # whatever a driver's library throws, the server can serve on CPU
        logger.debug("no GPU inventory: %s", error)
        return ()
