import dataclasses

import pytest

from minserve.worker.outstanding import Limits
from tests.unit.worker.specs import make_spec, model_config


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({}, Limits(None, 10, 50, 2, False, 10, None, 2**20)),
        (
            {"in_flight": 4, "first_batch_timeout": 3.0, "error_grace": 0.5, "reply_after": "all"},
            Limits(4, 10, 3, 0.5, True, 10, None, 2**20),
        ),
        (
            {"stall_timeout": 0.0, "stream_ahead": 2, "stream_buffer": 100},
            Limits(None, 10, 50, 2, False, 0, 2, 100),
        ),
        ({"reply_after": "rank0"}, Limits(None, 10, 50, 2, False, 10, None, 2**20)),
    ],
)
def test_limits_are_the_models_or_follow_from_its_response_timeout(options: dict[str, object], limits: Limits) -> None:
    assert make_spec(config=model_config(minserve=options)).limits == limits


def test_a_model_that_answers_in_any_order_has_its_queue_under_way_but_never_with_several_ranks() -> None:
    spec = make_spec(config=model_config(async_communication=True))
    assert (spec.asynchronous, spec.limits.in_flight, spec.limits.any_order) == (True, 100, True)
    few = make_spec(config=model_config(async_communication=True, minserve={"in_flight": 7}))
    assert few.limits.in_flight == 7
    several = make_spec(2, config=model_config("tp", async_communication=True))
    assert (several.asynchronous, several.limits.in_flight, several.limits.any_order) == (False, None, False)


@pytest.mark.parametrize(
    ("client_timeout", "options", "seconds"),
    [(0, {}, 20), (0, {"queue_timeout": 1.5}, 11.5), (1500, {"queue_timeout": 60.0}, 1.5)],
)
def test_a_requests_deadline(client_timeout: int, options: dict[str, object], seconds: float) -> None:
    config = model_config(minserve=options, client_timeout_in_mills=client_timeout)
    assert dataclasses.replace(make_spec(), config=config).request_timeout == seconds
