"""`minserve.testing` on real ranks: what docs/testing.md promises to authors."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from minserve.testing import Group, StartFailed, StreamRefused, rank_group, until
from tests.integration.servers import MODELS, gone

MODEL = MODELS / "tested"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a file ends the wait of rank 1."""
    return tmp_path_factory.mktemp("release") / "now"


WINDOW = {"batchSize": 4, "maxBatchDelay": 50, "minserve": {"batching": "window"}}  # sure to fill when many ask at once


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The author's directory. Other files serve the one that it is copied from, and Python may leave its caches there."""
    directory = tmp_path_factory.mktemp("author") / "tested"
    directory.mkdir()
    shutil.copy(MODEL / "handler.py", directory)
    return directory


@pytest.fixture(scope="module")
def group(model: Path, release: Path) -> Iterator[Group]:
    with rank_group(model, nproc=2, config=WINDOW, environ={"RELEASE": str(release)}) as group:
        yield group


def test_a_handler_answers_on_real_ranks(group: Group) -> None:
    answer = group.predict(b"four")
    assert answer.status == 200
    assert answer.json == {"sum": 4 * 1 + 4 * 2, "batch": 1}
    assert answer.headers["content-length"] == str(len(answer.body))
    assert len(set(group.pids)) == 2
    assert group.events()[0]["kind"] == "ready"


def test_the_author_s_directory_is_not_written_to(group: Group, model: Path) -> None:
    group.predict("x")
    assert sorted(path.name for path in model.iterdir()) == ["handler.py"]


def test_requests_at_one_time_are_batched(group: Group) -> None:
    answers = group.predict_many(["x" * length for length in range(1, 41)])
    results = [answer.json for answer in answers]
    assert [result["sum"] for result in results if isinstance(result, dict)] == [3 * length for length in range(1, 41)]
    assert max(result["batch"] for result in results if isinstance(result, dict)) == 4


def test_a_stream_comes_chunk_by_chunk(group: Group) -> None:
    assert list(group.stream("count")) == [b"0 ", b"1 ", b"2 "]
    chunks = group.stream("bad")
    with pytest.raises(StreamRefused, match=r"503: .*ValueError: bad request"):
        next(chunks)


def test_an_error_is_an_answer(group: Group) -> None:
    answer = group.predict("bad")
    assert answer.status == 503
    assert re.search(r"tested/0, rank 0 \(pid \d+\): ValueError: bad request", answer.message)


def test_each_rank_has_its_log(group: Group) -> None:
    group.predict("x" * 17)
    for rank in (0, 1):
        until(lambda rank=rank: f"loading on rank {rank}" in group.log(rank))  # type: ignore[misc]
        assert f"loading on rank {1 - rank}" not in group.log(rank)
    assert "rank 1 | loading on rank 1" in group.log()


def test_a_stopped_rank_holds_an_answer_back_until_it_is_resumed(group: Group) -> None:
    group.inject("stop", rank=1)
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(group.predict, b"four")
        until(lambda: psutil.Process(group.pids[1]).status() == psutil.STATUS_STOPPED)
        until(lambda: group.server.states("tested") == ["BUSY"])
        stack = group.stacks(timeout=0.3)
        assert stack[1] == f"(no stack within 0.3 s: pid {group.pids[1]} is stopped)"
        assert not answer.done()
        group.inject("resume", rank=1)
        assert answer.result(20).status == 200


def test_an_exception_says_where_each_rank_stands(group: Group, release: Path) -> None:
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(group.predict, "wait")
        until(lambda: "in stuck_here" in group.stacks()[1])
        with pytest.raises(AssertionError) as raised, group.explaining():
            assert answer.done()
        release.touch()
        assert answer.result(20).status == 200
    (note,) = raised.value.__notes__
    before, rank_0, lines_0, rank_1, lines_1 = re.split(r"── rank \d, (last lines|stacks) ──\n", note)[::2]
    assert before.startswith("tested is BUSY; restarts: 0")
    assert "batch " in rank_0
    assert "all_reduce" in lines_0
    assert "batch " in rank_1
    assert re.search(r"handler.py\", line \d+ in stuck_here", lines_1)


@pytest.mark.parametrize(("fault", "name"), [("kill", "SIGKILL"), ("crash", "SIGSEGV"), ("terminate", "SIGTERM")])
def test_a_lethal_fault_is_survived_with_a_new_group(group: Group, fault: str, name: str) -> None:
    group.wait_ready()
    restarts, pids = group.restarts, group.pids
    group.inject(fault, rank=1)
    group.wait_ready()
    assert group.restarts == restarts + 1
    assert not set(pids) & set(group.pids)
    assert group.predict(b"four").status == 200
    died = [event for event in group.events() if event["kind"] == "rank-died"]
    assert died[-1]["rank"] == 1
    assert died[-1]["pid"] == pids[1]
    assert name in str(died[-1]["detail"]), died


def test_a_torchrun_that_is_killed_is_another(group: Group) -> None:
    group.wait_ready()
    restarts = group.restarts
    group.inject("kill-torchrun")
    group.wait_ready()
    assert group.restarts == restarts + 1
    assert group.predict(b"four").status == 200


def test_a_handler_that_cannot_load_is_told_with_rank_and_last_lines() -> None:
    with (
        pytest.raises(StartFailed, match=r"rank 1 .*FileNotFoundError: no weights for rank 1") as raised,
        rank_group(MODEL, nproc=2, environ={"NO_WEIGHTS": "1"}),
    ):
        pass
    assert "\n    loading on rank 1" in str(raised.value)


def test_a_wrong_configuration_is_told() -> None:
    with (
        pytest.raises(StartFailed, match=r"batchSize: found 0 .*allowed: an integer >= 1"),
        rank_group(MODEL, nproc=2, config={"batchSize": 0}),
    ):
        pass


def test_one_process_is_tested_the_same_way_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    model = tmp_path / "plain"
    model.mkdir()
    (model / "handler.py").write_text(
        "import subprocess\n"
        "def handle(data, context):\n"
        "    child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "    return [{'got': row['body'], 'child': child.pid} for row in data]\n"
    )
    with rank_group(model) as group:
        answer = group.predict({"a": 1}).json
        assert isinstance(answer, dict)
        assert answer["got"] == {"a": 1}
        assert psutil.pid_exists(answer["child"])
        (pid,) = group.pids
        processes = [psutil.Process(pid), psutil.Process(answer["child"])]
        group.inject("kill")
        group.wait_ready()
    assert gone(processes)
    assert not group.server.runtime.exists()


def test_the_examples_of_the_documentation_run(tmp_path: Path) -> None:
    blocks: dict[str, str] = {}
    for page in ("README.md", "docs/testing.md"):
        text = (REPOSITORY / page).read_text()
        blocks |= re.findall(r"```\w+\n# ([\w/.-]+)[^\n]*\n(.*?)```", text, re.DOTALL)
    for name in ("store/sum/handler.py", "store/sum/model-config.yaml", "test_sum.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(blocks[name])
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "-W", "error")
    command = [sys.executable, "-m", "pytest", *options, f"--basetemp={tmp_path / 'tmp'}", "test_sum.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "5 passed" in result.stdout
    assert sorted(path.name for path in (tmp_path / "store/sum").iterdir()) == ["handler.py", "model-config.yaml"]
