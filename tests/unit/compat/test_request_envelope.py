"""Request envelopes: what a handler gets of a platform's format, and what the client gets of its answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from minserve.compat.ts.torch_handler.request_envelope.base import BaseEnvelope
from minserve.compat.ts.torch_handler.request_envelope.body import BodyEnvelope
from minserve.compat.ts.torch_handler.request_envelope.json import JSONEnvelope
from minserve.compat.ts.torch_handler.request_envelope.kserve import KServeEnvelope
from minserve.compat.ts.torch_handler.request_envelope.kservev2 import KServev2Envelope
from minserve.compat.ts.utils.util import PredictionException
from tests.unit.compat.conftest import MakeContext

Data = list[dict[str, Any]]


class Echo:
    """A handler that gives back what it is given, as it is or as `answers`."""

    def __init__(self, answers: object = None) -> None:
        self.got: Any = None
        self._answers = answers

    def __call__(self, data: object, context: object) -> Any:
        self.got = data
        return data if self._answers is None else self._answers


def test_body_takes_the_body_out(make_context: MakeContext) -> None:
    handler = Echo()
    data = [{"body": 1}, {"data": "x"}, {"other": 2}]
    assert BodyEnvelope(handler).handle(data, make_context()) == handler.got == [1, "x", None]


def test_nothing_goes_through_as_it_is(make_context: MakeContext) -> None:
    handler = Echo(())
    assert JSONEnvelope(handler).handle(None, make_context()) == ()
    assert handler.got is None


def test_json_joins_the_instances_of_a_batch_and_parts_the_answers(make_context: MakeContext) -> None:
    handler = Echo(["A", "B", "C", "D"])
    data = [
        {"body": {"instances": [{"b64": "YQ=="}, {"x": {"b64": "Yg=="}, "y": 1}]}},
        {"data": bytearray(b'{"instances": [[1.5]]}')},
        {"instances": [3]},
    ]
    answers = JSONEnvelope(handler).handle(data, make_context())
    assert handler.got == [b"a", {"x": b"b", "y": 1}, [1.5], 3]
    assert answers == ['{"predictions": ["A", "B"]}', '{"predictions": ["C"]}', '{"predictions": ["D"]}']


@pytest.mark.parametrize("answers", [["A", "B"], ["A", "B", "C", "D"]])
def test_json_gives_no_request_the_answers_to_anothers_instances(make_context: MakeContext, answers: list[str]) -> None:
    """With one answer too few the second request's would be taken for the first one's."""
    data: Data = [{"body": {"instances": [1, 2]}}, {"body": {"instances": [3]}}]
    assert JSONEnvelope(Echo(answers)).handle(data, make_context(count=2)) == []
    assert JSONEnvelope(Echo(["A"])).handle(data[:1], make_context()) == ['{"predictions": ["A"]}']  # whose, is clear


def test_json_refuses_one_request_and_answers_the_others_of_its_batch(make_context: MakeContext) -> None:
    context, handler = make_context(count=3), Echo(["A", "B"])
    data: Data = [{"body": {"instances": [1]}}, {"body": "text"}, {"body": {"instances": [2]}}]
    first, refused, last = JSONEnvelope(handler).handle(data, context)
    assert handler.got == [1, 2]
    assert (first, last) == ('{"predictions": ["A"]}', '{"predictions": ["B"]}')
    assert refused["message"].startswith("the request is not JSON")
    assert [context.get_response_status(index)[0] for index in range(3)] == [200, 400, 200]


@pytest.mark.parametrize(("explain", "key"), [("False", "predictions"), ("True", "explanations")])
def test_kserve_says_what_the_answers_are(make_context: MakeContext, explain: str, key: str) -> None:
    handler = Echo([0.5, 0.25])
    context = make_context(headers={"explain": explain})
    for body in ({"instances": [1, 2]}, bytearray(b'{"instances": [1, 2]}')):
        assert KServeEnvelope(handler).handle([{"body": body}], context) == [{key: [0.5, 0.25]}]
        assert handler.got == [1, 2]


def test_kservev2_shapes_inputs_and_names_outputs(make_context: MakeContext) -> None:
    handler = Echo([[[1, 2], [3, 4]], ["a"], 0.5, True])
    inputs = [
        {"name": "x", "shape": [2, 2], "datatype": "INT64", "data": [1, 2, 3, 4]},
        {"name": "t", "shape": [1], "datatype": "BYTES", "data": ["hello"]},
    ]
    context = make_context()
    (answer,) = KServev2Envelope(handler).handle([{"body": {"id": "q", "inputs": inputs}}], context)
    assert [one["data"] for one in handler.got] == [[[1, 2], [3, 4]], "hello"]
    assert answer == {
        "id": "q",
        "model_name": "m",
        "model_version": "2.0",
        "outputs": [
            {"name": "x", "datatype": "INT64", "data": [1, 2, 3, 4], "shape": [4]},
            {"name": "t", "datatype": "BYTES", "data": ["a"], "shape": [1]},
            {"name": "output-2", "datatype": "FP64", "data": [0.5], "shape": [1]},
            {"name": "output-3", "datatype": "BOOL", "data": [True], "shape": [1]},
        ],
    }
    json.dumps(answer)
    body = json.dumps({"inputs": inputs}).encode()  # the id of the request before must not stay
    assert KServev2Envelope(handler).handle([{"body": body}], context)[0]["id"] == "r0"


@pytest.mark.parametrize("kind", [JSONEnvelope, KServeEnvelope, KServev2Envelope])
@pytest.mark.parametrize("body", [b"{", {"inputs": 1, "instances": "x"}, [1], "text", None])
def test_a_body_of_another_format_is_the_clients_error(
    make_context: MakeContext, kind: type[BaseEnvelope], body: object
) -> None:
    with pytest.raises(PredictionException) as caught:
        kind(Echo()).handle([{"body": body}], make_context())
    assert caught.value.error_code == 400


@pytest.mark.parametrize(
    ("envelope", "body"),
    [
        (JSONEnvelope, {"instances": [{"b64": "a"}]}),
        (JSONEnvelope, {"instances": [{"b64": 1}]}),
        (KServev2Envelope, {"inputs": [{"name": "x", "shape": [3], "datatype": "INT8", "data": [1]}]}),
        (KServev2Envelope, {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": []}]}),
        (KServev2Envelope, {"inputs": [{"name": "x", "data": [1]}]}),
        (KServev2Envelope, {"inputs": ["x"]}),
    ],
)
def test_a_value_that_cannot_be_read_is_the_clients_error(
    make_context: MakeContext, envelope: type[BaseEnvelope], body: object
) -> None:
    with pytest.raises(PredictionException) as caught:
        envelope(Echo()).handle([{"body": body}], make_context())
    assert caught.value.error_code == 400
