"""The command and the environment that start a rank group, and the process itself.

`plan` is pure, so that `minserve check` prints exactly what a start would run.
"""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import minserve
from minserve.worker.processes import die_with

if TYPE_CHECKING:
    from collections.abc import Mapping

    from minserve.config.model import TorchrunConfig
    from minserve.worker.devices import Devices
    from minserve.worker.endpoints import Endpoints
    from minserve.worker.spec import ModelSpec

_open_files = resource.getrlimit(resource.RLIMIT_NOFILE)  # as the user set it, before the server raises its own


@dataclass(frozen=True, slots=True)
class Launch:
    """What to run.

    Attributes:
        added: the part of the environment that minserve sets; the rest is the server's own.
        warm: what the warm launcher forks in the command's place, if it can: torchrun with these arguments, without any a
            rank; None: it is not to be asked.
        patient: worth waiting until there is a warm launcher.
    """

    command: tuple[str, ...]
    added: Mapping[str, str]
    directory: Path
    warm: tuple[str, ...] | None = None
    patient: bool = False


def plan(
    spec: ModelSpec,
    endpoints: Endpoints,
    devices: Devices,
    run_directory: Path,
    incarnation: str,
    secret: str,
    environ: Mapping[str, str],
) -> Launch:
    """Builds the launch of one incarnation of a worker.

    Args:
        run_directory: this incarnation's own; holds the rendezvous file, torchrun's logs, the ranks' log pipes and
            the board.
        incarnation: unlike any other of this server; also the rendezvous id.
    """
    rank, python = ("-m", "minserve.rank"), spec.python or sys.executable
    parallel = spec.config.is_parallel
    if parallel:
        warm = (*_torchrun(spec.config.torchrun, spec.world_size, run_directory, incarnation), *rank)
        command = (python, "-m", "torch.distributed.run", *warm)
    else:
        warm, command = (), (python, "-u", *rank)
    added = {
        "MINSERVE_ENDPOINT": endpoints.prefix,
        "MINSERVE_BASE": str(endpoints.base),
        "MINSERVE_WORKER": incarnation,
        "MINSERVE_SECRET": secret,
        "MINSERVE_DIRECTORY": str(run_directory),
        "MINSERVE_LOG_LEVEL": "debug" if spec.debug else "info",
        "PYTHONPATH": _import_path(spec.model_dir, environ),
        "OMP_NUM_THREADS": str(spec.config.torchrun.omp_num_threads),
        **_interfaces(environ),
    }
    if not parallel:
        added |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    if spec.bare_log:
        added["MINSERVE_BARE_LOG"] = "1"
    if devices.mask is not None:
        added["CUDA_VISIBLE_DEVICES"] = devices.mask
    if spec.launcher == "torchrun" or spec.python or spec.config.torchrun.rdzv_backend == "static":
        return Launch(command, added, spec.model_dir)  # static: `torchrun` itself, not its agent, reads that
    return Launch(command, added, spec.model_dir, warm, patient=parallel or spec.launcher == "warm")


def _torchrun(options: TorchrunConfig, world_size: int, run_directory: Path, incarnation: str) -> list[str]:
    """torchrun's own options.

    The rendezvous is a file unless the YAML asks for another: with a tcp store torchrun listens on every interface, whatever
    address it is given, and unpickles what it reads there. The ranks' own store (MASTER_PORT) holds no pickle.
    """
    backend, endpoint = options.rdzv_backend, options.rdzv_endpoint
    conf = [options.rdzv_conf] if options.rdzv_conf else []
    if backend == "c10d" and endpoint is None:
        endpoint = str(run_directory / "rdzv")
        conf.insert(0, "store_type=file")
    arguments = ["--nnodes", "1", "--nproc-per-node", str(world_size), "--rdzv-backend", backend]
    if conf:
        arguments += ["--rdzv-conf", ",".join(conf)]
    if endpoint is not None:
        arguments += ["--rdzv-endpoint", endpoint]
    # Without a log directory every start leaves one in the temp folder. minserve owns the restarts.
    arguments += ["--rdzv-id", incarnation, "--local-addr", "127.0.0.1", "--max-restarts", "0"]
    arguments += ["--log-dir", str(run_directory / "elastic")]
    chosen = {
        "--monitor-interval": options.monitor_interval,
        "--node-rank": options.node_rank,
        "--master-addr": options.master_addr,
        "--master-port": options.master_port,
    }
    for flag, value in chosen.items():
        if value is not None:
            arguments += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return arguments


def _import_path(model_dir: Path, environ: Mapping[str, str]) -> str:
    """The `ts` package first, so that handlers find ours and not an installed torchserve's; then the model's own modules."""
    compat = Path(minserve.__file__).parent / "compat"
    parts = [str(compat), str(model_dir), environ.get("PYTHONPATH", "")]
    return os.pathsep.join(part for part in parts if part)


def _interfaces(environ: Mapping[str, str]) -> dict[str, str]:
    """On one node the collectives have no business on a network; a user who says otherwise is obeyed."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: loopback for name in names if loopback and not environ.get(name)}


def spawn(launch: Launch, environ: Mapping[str, str], inherited: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
    """Starts it, with its output on a non-blocking pipe and, if need be, some open files.

    Call it from the event loop's thread, which lives as long as the server, see `die_with`.
    """
    server = os.getpid()

    def before_exec() -> None:
        die_with(server)
        resource.setrlimit(resource.RLIMIT_NOFILE, _open_files)

    process = subprocess.Popen(
        launch.command,
        cwd=launch.directory,
        env={**environ, **launch.added},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C on the terminal is for the server, which then drains
        preexec_fn=before_exec,
        pass_fds=inherited,
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return process
