"""What `minserve check` prints: the validated configuration and the exact launch of each worker."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from minserve.worker import launcher
from minserve.worker.devices import DeviceAllocator
from minserve.worker.endpoints import FIRST_PORT, LOOPBACK, Endpoints, unix_endpoints
from minserve.worker.runtime import runtime_root

if TYPE_CHECKING:
    from collections.abc import Mapping

    from minserve.registry.models import ValidModel
    from minserve.worker.devices import Inventory
    from minserve.worker.launcher import Launch


def describe_launches(model: ValidModel, inventory: Inventory, environ: Mapping[str, str]) -> str:
    """The text that `minserve check` prints.

    What only a start knows stands in capitals: PID, INCARNATION and SECRET.

    Raises:
        NoDevicesError: there are not enough devices for all workers.
        StartupError: there is no place for the runtime directory.
    """
    spec, allocator = model.spec, DeviceAllocator(inventory)
    directory = Path(runtime_root(environ)) / "minserve-PID" / "m1"
    values = json.loads(spec.config.model_dump_json(by_alias=True, exclude_none=True))
    lines = [
        f"{spec.name}: {spec.model_dir}",
        f"ranks: {spec.world_size}",
        f"workers: {model.workers}",
        f"responseTimeout: {spec.response_timeout:g} s",
        f"startupTimeout: {spec.startup_timeout:g} s",
        f"configuration: {json.dumps(values, indent=2)}",
    ]
    options = spec.config.minserve
    for number in range(model.workers):
        if options.socket_type == "unix":
            endpoints = unix_endpoints(directory, number, spec.world_size)
        else:
            first = options.port or FIRST_PORT
            endpoints = Endpoints(f"tcp:{LOOPBACK}:", first + number * spec.world_size, spec.world_size)
        devices = allocator.reserve(f"{spec.name}/{number}", spec.config, spec.world_size)
        launch = launcher.plan(spec, endpoints, devices, directory / f"{number}.r", "INCARNATION", "SECRET", environ)
        lines += ["", f"worker {number}:", "  endpoints:"]
        free = "" if options.socket_type == "unix" else "  (or the next free ones)"
        lines += [f"    rank {rank}: {address}{free}" for rank, address in enumerate(endpoints.addresses)]
        lines.append(f"  devices: {'none' if devices.mask is None else devices.mask}")
        lines.append(f"  directory: {launch.directory}")
        lines.append("  environment:")
        lines += [f"    {name}={shlex.quote(value)}" for name, value in sorted(launch.added.items())]
        lines.append(f"  launcher: {_launcher(launch)}")
        lines.append(f"  command: {shlex.join(launch.command)}")
    return "\n".join(lines)


def _launcher(launch: Launch) -> str:
    if launch.warm is None:
        return "none: the command is run"
    return "warm: forked to do what the command would" if launch.patient else "warm, once there is one"
