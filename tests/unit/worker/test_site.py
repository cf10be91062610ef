# ruff: noqa: ASYNC240  # looks at small folders, with nothing else on the loop

import asyncio
import os
import stat
from pathlib import Path

import pytest

from minserve.worker.agent_report import FirstFailure
from minserve.worker.blame import AGENT
from minserve.worker.output import TAIL_LINES
from minserve.worker.site import Site
from tests.unit.worker.agents import torchrun_says
from tests.unit.worker.specs import make_spec, model_config


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_everything_is_made_and_nothing_is_left(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    directory = tmp_path_factory.mktemp("s")
    descriptors = len(os.listdir("/proc/self/fd"))
    site = Site(make_spec(2, config=model_config("tp", {"socket_type": kind})), "m/1", 1, directory)
    endpoints = site.open()
    assert endpoints.count == len(site.listeners) == 2
    assert stat.S_IMODE(site.path.stat().st_mode) == 0o700  # a look
    assert site.board is not None
    assert site.board.read(1).heartbeat == 0
    with (site.path / "output.1").open("w") as pipe:
        pipe.write("no weights\nfor me\n")
    assert site.last_lines([1, AGENT]) == ("no weights", "for me")
    site.close()
    site.close()
    assert list(directory.iterdir()) == []
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.asyncio
async def test_a_report_of_torchrun_does_not_push_out_what_the_rank_has_said(tmp_path: Path) -> None:
    site = Site(make_spec(8), "m/0", 0, tmp_path)
    site.open()
    reader, writer = os.pipe2(os.O_NONBLOCK)
    site.read_agent(reader)
    words = [f"word {number}" for number in range(30)]
    os.write(
        writer, ("\n".join(words) + "\n" + torchrun_says(dict.fromkeys(range(8), -15) | {5: -9}, first=5)).encode()
    )
    os.close(writer)
    assert site.first_failure() == FirstFailure(5, 1005, -9)
    assert [line for line in site.last_lines([AGENT]) if line in words] == words[-TAIL_LINES + 1 :]
    site.close()


@pytest.mark.asyncio
async def test_what_an_earlier_life_has_left_is_replaced(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory: Path = tmp_path_factory.mktemp("s")
    (directory / "0.r").mkdir()
    (directory / "0.r" / "board").write_bytes(b"old")
    (directory / "worker.0").touch()
    site = Site(make_spec(1), "m/0", 0, directory)
    site.open()
    site.close()
    assert list(directory.iterdir()) == []


@pytest.mark.asyncio
async def test_before_it_is_open_there_is_nothing_to_close(tmp_path: Path) -> None:
    Site(make_spec(1), "m/0", 0, tmp_path).close()
    assert list(tmp_path.iterdir()) == []
