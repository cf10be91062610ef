"""How long a batch usually takes."""

import pytest

from minserve.telemetry.meters import ModelMeters
from minserve.telemetry.metrics import Metrics
from minserve.worker.outstanding import Outstanding
from minserve.worker.timing import NEWEST, Timing
from tests.fakes import FakeClock
from tests.unit.worker.broadcasts import request

pytestmark = pytest.mark.asyncio


async def test_a_batch_takes_from_when_it_is_the_oldest_until_it_is_answered() -> None:
    clock = FakeClock()
    timing = Timing(ModelMeters(Metrics(), "m", "1.0", clock.time))
    one, two = (Outstanding(seq, [request(b"")]) for seq in (1, 2))
    for batch in (one, two):
        timing.sent(batch, clock.time())
    before = timing.batch_seconds
    assert before is None
    clock.advance(3.0)
    timing.answered(one, one.requests, clock.time())
    assert timing.batch_seconds == 3.0
    clock.advance(1.0)  # the second was written 4 s ago, and lay behind the first for 3
    timing.answered(two, two.requests, clock.time())
    assert timing.batch_seconds == pytest.approx(3.0 + NEWEST * (1.0 - 3.0))
    clock.advance(60.0)
    three = Outstanding(3, [request(b"")])
    timing.sent(three, clock.time())
    clock.advance(2.6)
    timing.answered(three, three.requests, clock.time())
    assert timing.batch_seconds == pytest.approx(2.6), "idle time is nobody's"
