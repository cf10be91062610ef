import dataclasses
import sys
from pathlib import Path

import pytest

import minserve
from minserve.checking import describe_launches
from minserve.registry.models import ValidModel
from minserve.worker.devices import Inventory, NoDevicesError
from minserve.worker.endpoints import FIRST_PORT
from tests.unit.worker.specs import make_spec, model_config

COMPAT = Path(minserve.__file__).parent / "compat"
EIGHT = Inventory(tuple("01234567"))


@pytest.fixture
def environ(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr("socket.if_nameindex", lambda: [(1, "lo")])
    return {"XDG_RUNTIME_DIR": str(tmp_path_factory.mktemp("r"))}


def describe(
    environ: dict[str, str], workers: int = 1, inventory: Inventory = EIGHT, options: dict[str, object] | None = None
) -> list[str]:
    config = model_config("tp", options, parallel_level=2)
    model = ValidModel(dataclasses.replace(make_spec(2), config=config), workers, ())
    return describe_launches(model, inventory, environ).splitlines()


def test_a_worker_is_described_with_all_that_a_start_would_run(environ: dict[str, str]) -> None:
    lines = describe(environ, inventory=Inventory(("4", "5")))
    directory = f"{environ['XDG_RUNTIME_DIR']}/minserve-PID/m1"
    assert lines[:5] == ["m: /models/m", "ranks: 2", "workers: 1", "responseTimeout: 10 s", "startupTimeout: 20 s"]
    assert lines[lines.index("worker 0:") :] == [
        "worker 0:",
        "  endpoints:",
        f"    rank 0: unix:{directory}/worker.0",
        f"    rank 1: unix:{directory}/worker.1",
        "  devices: 4,5",
        "  directory: /models/m",
        "  environment:",
        "    CUDA_VISIBLE_DEVICES=4,5",
        "    GLOO_SOCKET_IFNAME=lo",
        "    MINSERVE_BASE=0",
        f"    MINSERVE_DIRECTORY={directory}/0.r",
        f"    MINSERVE_ENDPOINT=unix:{directory}/worker.",
        "    MINSERVE_LOG_LEVEL=info",
        "    MINSERVE_SECRET=SECRET",
        "    MINSERVE_WORKER=INCARNATION",
        "    NCCL_SOCKET_IFNAME=lo",
        "    OMP_NUM_THREADS=1",
        f"    PYTHONPATH={COMPAT}:/models/m",
        "  launcher: warm: forked to do what the command would",
        f"  command: {sys.executable} -m torch.distributed.run --nnodes 1 --nproc-per-node 2 --rdzv-backend c10d "
        f"--rdzv-conf store_type=file --rdzv-endpoint {directory}/0.r/rdzv --rdzv-id INCARNATION "
        f"--local-addr 127.0.0.1 --max-restarts 0 --log-dir {directory}/0.r/elastic -m minserve.rank",
    ]


def test_each_worker_has_its_own_endpoints_and_devices(environ: dict[str, str]) -> None:
    lines = describe(environ, workers=2)
    assert [line.rpartition("/")[2] for line in lines if line.startswith("    rank ")] == [
        "worker.0",
        "worker.1",
        "worker.2",
        "worker.3",
    ]
    assert [line for line in lines if "devices:" in line] == ["  devices: 0,1", "  devices: 2,3"]


@pytest.mark.parametrize(("options", "first"), [({}, FIRST_PORT), ({"port": 31000}, 31000)])
def test_tcp_endpoints_are_the_ports_where_the_search_starts(
    environ: dict[str, str], options: dict[str, object], first: int
) -> None:
    lines = describe(environ, workers=2, options={"socket_type": "tcp", **options})
    assert [line for line in lines if line.startswith("    rank ")] == [
        f"    rank {rank}: tcp:127.0.0.1:{first + 2 * number + rank}  (or the next free ones)"
        for number in (0, 1)
        for rank in (0, 1)
    ]


def test_without_a_gpu_there_are_no_devices_and_no_mask(environ: dict[str, str]) -> None:
    lines = describe(environ, inventory=Inventory())
    assert "  devices: none" in lines
    assert not any("CUDA_VISIBLE_DEVICES" in line for line in lines)


def test_too_few_devices_for_all_workers_are_an_error(environ: dict[str, str]) -> None:
    with pytest.raises(NoDevicesError, match="m/1 needs 2 device"):
        describe(environ, workers=2, inventory=Inventory(("0", "1", "2")))
    assert list(Path(environ["XDG_RUNTIME_DIR"]).iterdir()) == [], "nothing is started or created"
