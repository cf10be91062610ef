import dataclasses
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import minserve
from minserve.config.model import ModelConfig
from minserve.worker.devices import Devices
from minserve.worker.endpoints import Endpoints
from minserve.worker.launcher import Launch, plan, spawn
from minserve.worker.spec import Launcher
from tests.unit.worker.specs import make_spec, model_config

COMPAT = str(Path(minserve.__file__).parent / "compat")
RUN = Path("/run/minserve-9/m1/0.r")
ENVIRONMENT = {
    "MINSERVE_ENDPOINT": "unix:/run/minserve-9/m1/worker.",
    "MINSERVE_BASE": "4",
    "MINSERVE_WORKER": "m-0-abcd",
    "MINSERVE_SECRET": "s3cret",
    "MINSERVE_DIRECTORY": str(RUN),
    "MINSERVE_LOG_LEVEL": "info",
    "PYTHONPATH": f"{COMPAT}:/models/m",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


@pytest.fixture(autouse=True)
def interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.if_nameindex", lambda: [(2, "eth0"), (1, "lo")])


def launch_of(
    config: ModelConfig,
    ranks: int = 1,
    devices: Devices | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    debug: bool = False,
) -> Launch:
    spec = dataclasses.replace(make_spec(ranks, config=config), debug=debug)
    endpoints = Endpoints("unix:/run/minserve-9/m1/worker.", 4, ranks)
    return plan(spec, endpoints, devices or Devices(), RUN, "m-0-abcd", "s3cret", environ or {})


def torchrun_command(ranks: int, rendezvous: str, more: str = "") -> tuple[str, ...]:
    options = (
        f"--nnodes 1 --nproc-per-node {ranks} {rendezvous} --rdzv-id m-0-abcd --local-addr 127.0.0.1 --max-restarts 0 "
        f"--log-dir {RUN}/elastic {more} -m minserve.rank"
    )
    return (sys.executable, "-m", "torch.distributed.run", *options.split())


FILE_STORE = f"--rdzv-backend c10d --rdzv-conf store_type=file --rdzv-endpoint {RUN}/rdzv"


@pytest.mark.parametrize(("parallel_type", "ranks"), [("tp", 2), ("pp", 3), ("pptp", 8), ("tp", 1)])
def test_a_parallel_model_is_started_by_torchrun_with_a_file_as_its_rendezvous(parallel_type: str, ranks: int) -> None:
    launch = launch_of(model_config(parallel_type), ranks)
    assert launch.command == torchrun_command(ranks, FILE_STORE)
    assert launch.added == ENVIRONMENT, "RANK and the rest are torchrun's to set"
    assert launch.directory == Path("/models/m")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_with_an_environment_of_its_own_is_started_by_that(ranks: int) -> None:
    spec = dataclasses.replace(make_spec(ranks), python="/venv/bin/python")
    launch = plan(spec, Endpoints("unix:/run/w.", 0, ranks), Devices(), RUN, "i", "s", {})
    assert launch.command[0] == "/venv/bin/python"


@pytest.mark.parametrize("parallel_type", ["", "custom"])
def test_any_other_model_is_one_plain_process_that_looks_like_a_rank(parallel_type: str) -> None:
    launch = launch_of(model_config(parallel_type, torchrun={"nproc_per_node": 4}))
    assert launch.command == (sys.executable, "-u", "-m", "minserve.rank")
    assert launch.added == ENVIRONMENT | ALONE


@pytest.mark.parametrize(
    ("torchrun", "rendezvous", "more"),
    [
        ({"rdzv_endpoint": "localhost:29400"}, "--rdzv-backend c10d --rdzv-endpoint localhost:29400", ""),
        (
            {"rdzv_endpoint": "localhost:29400", "rdzv_conf": "timeout=9"},
            "--rdzv-backend c10d --rdzv-conf timeout=9 --rdzv-endpoint localhost:29400",
            "",
        ),
        (
            {"rdzv_backend": "static", "rdzv_endpoint": "localhost:0", "master_addr": "127.0.0.1", "master_port": 99},
            "--rdzv-backend static --rdzv-endpoint localhost:0",
            "--master-addr 127.0.0.1 --master-port 99",
        ),
        ({"rdzv_backend": "etcd"}, "--rdzv-backend etcd", ""),
        (
            {"rdzv_conf": "timeout=9,last_call_timeout=3"},
            f"--rdzv-backend c10d --rdzv-conf store_type=file,timeout=9,last_call_timeout=3 --rdzv-endpoint {RUN}/rdzv",
            "",
        ),
        ({"monitor_interval": 0.5}, FILE_STORE, "--monitor-interval 0.5"),
        ({"monitor_interval": 5.0, "node_rank": 0}, FILE_STORE, "--monitor-interval 5 --node-rank 0"),
        ({"max_restarts": 7, "rdzv_id": "mine"}, FILE_STORE, ""),  # restarts and ids are minserve's
    ],
)
def test_the_torchrun_map_is_obeyed(torchrun: dict[str, object], rendezvous: str, more: str) -> None:
    assert launch_of(model_config("tp", torchrun=torchrun), 2).command == torchrun_command(2, rendezvous, more)


@pytest.mark.parametrize(
    ("config", "devices", "environ", "debug", "changed"),
    [
        (
            model_config("tp"),
            Devices("2,5", (2, 5)),
            {"CUDA_VISIBLE_DEVICES": "0,1"},
            False,
            {"CUDA_VISIBLE_DEVICES": "2,5"},
        ),
        (model_config("tp"), Devices(), {"CUDA_VISIBLE_DEVICES": "0,1"}, False, {}),
        (model_config("tp"), Devices(), {"PYTHONPATH": "/a:/b"}, False, {"PYTHONPATH": f"{COMPAT}:/models/m:/a:/b"}),
        (model_config("tp", torchrun={"OMP_NUMBER_THREADS": 3}), Devices(), {}, False, {"OMP_NUM_THREADS": "3"}),
        (model_config("tp"), Devices(), {"OMP_NUM_THREADS": "64"}, False, {}),
        (model_config("tp"), Devices(), {}, True, {"MINSERVE_LOG_LEVEL": "debug"}),
        (model_config("tp"), Devices(), {"GLOO_SOCKET_IFNAME": "eth0"}, False, {"GLOO_SOCKET_IFNAME": None}),
        (
            model_config("tp"),
            Devices(),
            {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "eth0"},
            False,
            {"NCCL_SOCKET_IFNAME": None},
        ),
    ],
)
def test_the_environment(
    config: ModelConfig, devices: Devices, environ: dict[str, str], debug: bool, changed: dict[str, str | None]
) -> None:
    """None stands for: the server's own variable is left as it is."""
    expected = {name: value for name, value in (ENVIRONMENT | changed).items() if value is not None}
    assert launch_of(config, 2, devices, environ, debug=debug).added == expected


def test_without_a_loopback_interface_the_collectives_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.if_nameindex", lambda: [(2, "eth0")])
    assert not {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} & launch_of(model_config("tp"), 2).added.keys()


@pytest.mark.parametrize(
    ("parallel_type", "launcher", "python", "torchrun", "warm", "patient"),
    [
        ("tp", "", "", {}, True, True),
        ("tp", "warm", "", {"rdzv_endpoint": "localhost:29400"}, True, True),
        ("tp", "torchrun", "", {}, False, False),
        ("tp", "warm", "/venv/bin/python", {}, False, False),
        ("tp", "warm", "", {"rdzv_backend": "static"}, False, False),
        ("", "", "", {}, True, False),
        ("custom", "warm", "", {}, True, True),
        ("", "torchrun", "", {}, False, False),
    ],
)
def test_what_the_warm_launcher_may_do_in_the_commands_place(
    parallel_type: str, launcher: Launcher, python: str, torchrun: dict[str, object], warm: bool, patient: bool
) -> None:
    config = model_config(parallel_type, torchrun=torchrun)
    spec = dataclasses.replace(make_spec(2, config=config), launcher=launcher, python=python)
    launch = plan(spec, Endpoints("unix:/run/w.", 0, 2), Devices(), RUN, "i", "s", {})
    assert launch.patient == patient
    assert launch.warm == ((launch.command[3:] if parallel_type == "tp" else ()) if warm else None)


# ── the process ──


def test_a_spawned_process_has_its_directory_its_environment_and_a_session_of_its_own(tmp_path: Path) -> None:
    script = (
        "import os, sys; print(os.getcwd(), os.environ['A'], os.environ['B'], os.environ.get('HOME'),"
        " os.getsid(0) == os.getpid(), repr(sys.stdin.read()), flush=True); print('on stderr', file=sys.stderr)"
    )
    process = spawn(Launch((sys.executable, "-S", "-c", script), {"A": "ours"}, tmp_path), {"A": "theirs", "B": "kept"})
    with process:
        assert process.stdout is not None
        assert not os.get_blocking(process.stdout.fileno())
        assert process.wait(timeout=30) == 0
        assert process.stdout.read().decode().splitlines() == [f"{tmp_path} ours kept None True ''", "on stderr"]


def test_a_spawned_process_dies_with_the_server_also_when_that_is_killed() -> None:
    code = (
        "import os, pathlib, signal\n"
        "from minserve.worker.launcher import Launch, spawn\n"
        "child = spawn(Launch(('sleep', '600'), {}, pathlib.Path('/')), os.environ)\n"
        "print(child.pid, flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        child = os.pidfd_open(int(server.stdout.readline()))
        server.kill()
    ended = select.poll()
    ended.register(child, select.POLLIN)
    assert ended.poll(30_000), "it has outlived the server"
    os.close(child)
