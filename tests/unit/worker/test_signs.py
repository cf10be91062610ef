import os
from pathlib import Path

import pytest

from minserve.wire.board import Slot
from minserve.worker import signs
from minserve.worker.signs import look
from minserve.worker.site import Site
from tests.unit.worker.specs import make_spec

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize(
    ("states", "seen"), [(["S", "D"], "S"), (["D", "D"], "D"), (["D", "R"], "R"), (["S", "T"], "T"), (["S", ""], "")]
)
async def test_a_moment_in_the_kernel_is_no_sign(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, states: list[str], seen: str
) -> None:
    directory: Path = tmp_path_factory.mktemp("s")
    site = Site(make_spec(1), "m/0", 0, directory)
    site.open()
    slot = Slot(site.path / "board", 0)
    slot.received(7)
    slot.finished(6)
    coming = list(states)  # the list is the same one for each loop
    monkeypatch.setattr(signs, "process_state", lambda pid: coming.pop(0))
    (sign,) = await look(site, {0: os.getpid()}, [1.5])
    assert (sign.rank, sign.pid, sign.state, sign.silent) == (0, os.getpid(), seen, 1.5)
    assert (sign.vitals.received, sign.vitals.finished, sign.stack) == (7, 6, None)
    site.close()


async def test_of_a_group_that_is_gone_there_are_none(tmp_path: Path) -> None:
    assert await look(Site(make_spec(1), "m/0", 0, tmp_path), {0: os.getpid()}, []) == []
