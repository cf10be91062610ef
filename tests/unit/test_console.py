import asyncio
import json

import pytest
import pytest_asyncio
from rich.console import Console

from minserve import console
from minserve.config.server import ServerOptions
from minserve.errors import ConfigError
from minserve.registry.models import ValidModel
from minserve.server import Server
from minserve.worker.reports import RankReport, WorkerReport
from minserve.worker.states import State
from tests.unit.frontend.rig import FakeSupervisor, Rig
from tests.unit.worker.specs import make_spec, until

pytestmark = pytest.mark.asyncio


def report(state: State, error: str = "", progress: str = "", ranks: int = 2) -> WorkerReport:
    seen = tuple(RankReport(rank, 100 + rank if rank else 0, f"unix:/w.{rank}", progress) for rank in range(ranks))
    return WorkerReport(0, state, 0.0, 3, None, 4711, seen, error, 0.0, ())


class Start:
    """A server that is starting, as far as the console looks at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("minserve.registry.making.Supervisor", FakeSupervisor)
        self.rig = Rig()
        self.server = Server(ServerOptions(), {})
        self.server.registry = self.rig.registry
        self.server.inference_url, self.server.management_url = "http://127.0.0.1:8080", "http://127.0.0.1:8081"

    def add(self, name: str, *reports: WorkerReport, ranks: int = 1) -> None:
        self.rig.registry.add(ValidModel(make_spec(ranks, name=name), 1, ()))
        self.set(name, *reports)

    def set(self, name: str, *reports: WorkerReport) -> None:
        self.rig.supervisor(name).reports = list(reports)


@pytest_asyncio.fixture
async def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    return Start(monkeypatch)


async def test_elsewhere_than_on_a_terminal_the_summary_comes_once_every_model_serves_or_has_failed(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    start.set("m", report(State.LOADING))
    start.add("tp", report(State.STARTING), ranks=2)
    watch = asyncio.create_task(console.watch_start(start.server))
    start.server.listening.set()
    start.set("m", report(State.FAILED, "m/0: rank 0 cannot load: no weights"))
    start.server.changed.set()
    await until(lambda: not start.server.changed.is_set())
    assert not watch.done()
    assert capsys.readouterr().out == ""
    start.set("tp", report(State.BUSY))
    start.server.changed.set()
    async with asyncio.timeout(10):
        await watch
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  m: not ready: m/0: rank 0 cannot load: no weights",
        "  tp: ready, 1 x 2 ranks",
        "inference   http://127.0.0.1:8080",
        "management  http://127.0.0.1:8081",
        "try         curl http://127.0.0.1:8080/predictions/tp -H 'Content-Type: text/plain' -d 'Hello, ranks!'",
    ]


async def test_without_a_model_that_serves_there_is_no_curl_to_try(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    start.set("m", report(State.FAILED, "no weights"))
    start.rig.registry.broken = {"bad": ConfigError("x")}
    start.server.listening.set()
    await console.watch_start(start.server)
    out = capsys.readouterr().out
    assert "  bad: its configuration is wrong, see above" in out
    assert "curl" not in out


async def test_on_a_terminal_the_load_of_every_rank_is_shown(
    start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start.set("m", report(State.LOADING, progress="weights 3 of 9"), report(State.FAILED, "boom", ranks=0))
    text = Console(width=120)
    text.print(console._load_table(start.server, 2.0))
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [
        ["m", "0", "LOADING", "0", "-", "weights 3 of 9"],
        ["m", "0", "LOADING", "1", "101", "weights 3 of 9"],
        ["m", "0", "FAILED", "-", "-", "boom"],
    ]


async def test_status_is_a_row_for_each_rank_and_one_for_a_worker_without(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = [{"rank": rank, "pid": 100 + rank, "endpoint": f"unix:/w.{rank}"} for rank in (0, 1)]
    worker = {"id": "0", "state": "READY", "restarts": 3, "ranks": ranks, "lastError": "rank 1 died"}
    console.print_status(
        "http://here:8081",
        [
            {"modelName": "m", "modelVersion": "1.0", "workers": [worker, {**worker, "id": "1", "ranks": []}]},
            {"modelName": "bad", "modelVersion": "1.0", "workers": [], "unhealthy": "no weights"},
        ],
    )
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert "http://here:8081" in out
    assert rows == [
        ["m", "1.0", "0", "READY", "0", "100", "unix:/w.0", "3", "rank 1 died"],
        ["", "", "", "", "1", "101", "unix:/w.1", "", ""],
        ["m", "1.0", "1", "READY", "-", "-", "-", "3", "rank 1 died"],
        ["bad", "", "", "UNHEALTHY", "", "", "", "", "no weights"],
    ]


async def test_status_takes_what_management_says_of_every_model_also_of_a_broken_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minserve.registry.making.Supervisor", FakeSupervisor)
    async with Rig() as rig:
        rig.supervisor().reports = [report(State.READY, progress="loaded")]
        rig.registry.broken = {"bad": ConfigError("model-config.yaml:3: batchSize")}
        described = []
        for name in ("m", "bad"):
            async with rig.management.get(f"/models/{name}/all") as response:
                described += json.loads(await response.text())
    console.print_status("http://here", described)
    assert "READY" in capsys.readouterr().out
