"""`minserve record` and `minserve replay`: what was seen in production is seen again, batch for batch."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minserve.recording import read_recording
from minserve.testing import Group, rank_group, until
from minserve.wire.recording import Header, Sent
from tests.integration.servers import MODELS

MODEL = MODELS / "tested"
MINSERVE = (sys.executable, "-m", "minserve")
BATCH = re.compile(r"batch (\d+) of (\d+): (\w{16})")


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    with rank_group(
        MODEL, nproc=2, config={"batchSize": 4, "maxBatchDelay": 20, "minserve": {"batching": "window"}}
    ) as group:
        yield group


@contextlib.contextmanager
def recording(group: Group, path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Records as long as the body runs, then until Ctrl-C."""
    command = [*MINSERVE, "record", group.name, str(path), "--url", group.server.management, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("recording tested/0, with"), line + process.stdout.read()
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(20)


def replay(path: Path, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Plays it into two ranks, which must leave nothing."""
    runtime = tmp_path / "r"
    runtime.mkdir(exist_ok=True)
    result = subprocess.run(
        [*MINSERVE, "replay", str(path), str(MODEL), "--nproc", "2", *options],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "MINSERVE_RUNTIME_DIR": str(runtime)},
    )
    assert os.listdir(runtime) == [], result
    return result


def digests(log: str, rank: int) -> list[tuple[int, str]]:
    """Size and digest of each batch that a rank has seen, in order."""
    lines = [line for line in log.splitlines() if f"rank {rank} | batch " in line]
    return [(int(match[2]), match[3]) for line in lines if (match := BATCH.search(line))]


def seqs(path: Path) -> list[int]:
    return [record.seq for record in read_recording(path)[0] if isinstance(record, Sent)]


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sockets' addresses have 107 bytes."""
    return tmp_path_factory.mktemp("r")


def test_what_was_recorded_under_load_is_played_with_the_same_batches_in_the_same_order(
    group: Group, short_path: Path
) -> None:
    path = short_path / "recording"
    before = {rank: len(digests(group.log(), rank)) for rank in (0, 1)}

    def seen_by(rank: int) -> list[tuple[int, str]]:
        return digests(group.log(), rank)[before[rank] :]

    with recording(group, path, "--bodies") as process:
        answers = group.predict_many([f"{number}".encode() * (number % 7 + 1) for number in range(100)])
        assert {answer.status for answer in answers} == {200}
        assert group.predict("bad").status == 503
        assert list(group.stream("count")) == [b"0 ", b"1 ", b"2 "]
        # What a rank prints comes to the log when it comes: the batches of all 102 requests must have.
        until(lambda: all(sum(size for size, _ in seen_by(rank)) == 102 for rank in (0, 1)))
        seen = {rank: seen_by(rank) for rank in (0, 1)}
        assert seen[0] == seen[1]
        until(lambda: len(seqs(path)) == len(seen[0]))
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stdout is not None
        assert process.stdout.read().strip() == f"batches recorded: {len(seen[0])}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    played = replay(path, short_path)
    assert digests(played.stderr, 0) == digests(played.stderr, 1) == seen[0]
    assert max(size for size, _ in seen[0]) == 4
    assert played.returncode == 1
    lines = played.stdout.splitlines()
    assert len(lines) == len(seen[0])
    failed = seqs(path)[-2]
    assert lines[-2].startswith(f"batch {failed}: 1 request, Prediction failed: tested/0, rank 0 (pid ")
    assert "): ValueError: bad request" in lines[-2]
    assert "recorded" not in played.stdout  # everything ended as it did then
    assert f"minserve: failed: batch {failed}\n" in played.stderr

    first = seqs(path)[0]
    again = replay(path, short_path, "--seq", f"{first + 1}:{first + 3}")
    assert again.returncode == 0, again
    assert digests(again.stderr, 1) == seen[1][1:4]
    assert again.stdout.splitlines()[-1] == "batches played: 3, all went well"


def test_a_crash_is_reproduced(group: Group, short_path: Path) -> None:
    path = short_path / "recording"
    group.wait_ready()
    restarts = group.restarts
    with recording(group, path, "--bodies"):
        assert [group.predict(body).status for body in (b"one", b"two")] == [200, 200]
        answer = group.predict(b"poison")
        assert answer.status == 503
        assert "rank 1 (pid " in answer.message
        until(lambda: group.restarts == restarts + 1)
        group.wait_ready()
        assert group.predict(b"three").status == 200
        until(lambda: len(seqs(path)) == 4)
    refused = replay(path, short_path)
    assert refused.returncode == 1
    assert "incarnation: found 2 lives of the worker, allowed, one of:" in refused.stderr
    lives = re.findall(r"^  (tested-0-\w+): batches (\d+) to (\d+)(.*)$", refused.stderr, re.MULTILINE)
    assert "1 failed, the last one with: tested/0: rank 1 (pid " in lives[0][3]
    played = replay(path, short_path, "--incarnation", lives[0][0])
    assert played.returncode == 1
    *well, crash = played.stdout.splitlines()
    assert [line.split(",")[1] for line in well] == [" ok", " ok"]
    assert re.match(rf"batch {lives[0][2]}: 1 request, tested/0: rank 1 \(pid \d+\) was killed by SIGSEGV", crash)
    assert f"minserve: failed: batch {lives[0][2]}; the ranks did not survive it: tested/0: rank 1" in played.stderr
    assert replay(path, short_path, "--incarnation", lives[1][0]).returncode == 0


def test_without_bodies_their_lengths_are_played(group: Group, short_path: Path) -> None:
    group.wait_ready()
    path = short_path / "recording"
    with recording(group, path):
        assert group.predict(b"secret", headers={"Authorization": "Bearer token"}).status == 200
        until(lambda: len(seqs(path)) == 1)
    assert b"secret" not in path.read_bytes()
    assert b"Bearer token" in path.read_bytes()  # as docs/testing.md warns
    played = replay(path, short_path)
    assert played.returncode == 0
    assert "the bodies were not recorded: zero bytes of the same lengths stand for them" in played.stderr
    assert len(digests(played.stderr, 0)) == 1


def test_a_worker_is_recorded_once_at_a_time_and_what_is_not_there_not_at_all(group: Group, short_path: Path) -> None:
    group.wait_ready()

    def told(model: str, *options: str) -> str:
        command = [*MINSERVE, "record", model, str(short_path / "other"), "--url", group.server.management, *options]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert result.returncode == 1
        return result.stderr

    with recording(group, short_path / "recording"):
        assert told("tested") == "minserve: tested/0 is being recorded already; a worker has one recording at a time\n"
    with recording(group, short_path / "next"):  # its place is free again
        pass
    assert told("tested", "--worker", "3") == "minserve: worker: found 3, allowed: 0\n"
    assert told("none") == "minserve: Model not found: none\n"
    assert sorted(os.listdir(short_path)) == ["next", "recording"]


def test_a_server_that_stops_ends_the_recording_and_says_so(short_path: Path) -> None:
    model = short_path / "plain"
    model.mkdir()
    (model / "handler.py").write_text("def handle(data, context): return ['ok' for row in data]\n")
    path = short_path / "recording"
    command = [*MINSERVE, "record", "plain", str(path)]
    with rank_group(model) as group:
        environ = {**os.environ, "MINSERVE_RUNTIME_DIR": str(group.server.runtime)}  # how it finds the server
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "recording plain/0, without bodies; Ctrl-C ends it\n"
            assert group.predict("x").text == "ok"
            assert group.server.stop() == 0
            assert process.wait(20) == 0
            ended = "batches recorded: 1; the server has ended the recording: plain/0 was stopped\n"
            assert process.stdout.read() == ended
    header, *_ = read_recording(path)[0]
    assert isinstance(header, Header)
    assert (header.who, header.world_size, header.bodies) == ("plain/0", 1, False)


def test_a_server_that_is_killed_is_told_and_what_came_is_kept(short_path: Path) -> None:
    model = short_path / "plain"
    model.mkdir()
    (model / "handler.py").write_text("def handle(data, context): return ['ok' for row in data]\n")
    path = short_path / "recording"
    with rank_group(model) as group:
        command = [*MINSERVE, "record", "plain", str(path), "--url", group.server.management]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert group.predict("x").text == "ok"
            until(lambda: path.exists() and len(seqs(path)) == 1)
            group.server.process.kill()
            assert process.wait(20) == 1
            assert process.stdout.read().startswith(f"minserve: {group.server.management}: ")
    assert seqs(path) == [1]
