import json

import pytest

from minserve.wire.messages import RequestMeta
from tests.unit.frontend.rig import Rig

pytestmark = pytest.mark.asyncio

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def seen(rig: Rig) -> list[tuple[str, bytes]]:
    return [(name, body) for name, _, body in rig.lane.parts()]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/m/predict", []),
        ("/m/1.0/predict", []),
        ("/models/m/invoke", []),
        ("/invocations", []),  # there is but one model
        ("/m/predict?a=1&b=two%20words&a=%FF", [("a", b"\xff"), ("b", b"two words")]),
        ("/models/m/invoke?a=1", [("a", b"1")]),
        ("/invocations?model_name=m&a=", [("model_name", b"m"), ("a", b"")]),
    ],
)
@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_what_the_query_says_is_in_front_of_the_body(
    rig: Rig, method: str, path: str, fields: list[tuple[str, bytes]]
) -> None:
    from yarl import URL

    url = rig.inference.make_url("/").join(URL(path, encoded=True))
    async with rig.inference.session.request(method, url, data=b"x") as response:
        assert response.status == 200, await response.text()
    assert seen(rig) == [*fields, ("body", b"x")]
    meta: RequestMeta = rig.lane.requests[-1].meta
    assert (meta.operation, meta.url_path) == ("", "")


async def test_a_query_on_other_paths_is_dropped(rig: Rig) -> None:
    for path in ("/predictions/m?a=1", "/v1/models/m:predict?a=1", "/v2/models/m/infer?a=1"):
        async with rig.inference.post(path, data=b"x") as response:
            assert response.status == 200
        assert seen(rig) == [("body", b"x")]


async def test_of_two_fields_with_one_name_the_bodys_stands(rig: Rig) -> None:
    async with rig.inference.post("/m/predict?a=query&b=query", data=b"a=form&", headers=FORM) as response:
        assert response.status == 200
    assert seen(rig) == [("b", b"query"), ("a", b"form")]


async def test_sagemakers_model_is_named_by_the_query_or_the_form_where_there_are_several(rig: Rig) -> None:
    rig.add("other").attach(rig.lane)
    for path, data, headers in (
        ("/invocations?model_name=other", b"x", {}),
        ("/invocations", b"model_name=other", FORM),
        ("/invocations?model_name=other", b"model_name=m", FORM),  # the query is known before the body is read
    ):
        before = rig.registry.find("other").dispatcher._rate._weight
        async with rig.inference.post(path, data=data, headers=headers) as response:
            assert response.status == 200
        assert rig.registry.find("other").dispatcher._rate._weight > before
    async with rig.inference.post("/invocations", data=b"x") as response:
        assert response.status == 400
        assert json.loads(await response.text()) == {
            "code": 400,
            "type": "BadRequestException",
            "message": "Parameter model_name is required.",
        }
    assert rig.in_flight.used == 0


async def test_a_clients_deadline_holds_though_its_model_is_named_in_the_form(rig: Rig) -> None:
    rig.add("slow")
    headers = {**FORM, "x-request-timeout-ms": "20"}
    async with rig.inference.post("/invocations", data=b"model_name=slow", headers=headers) as response:
        assert response.status == 504


@pytest.mark.parametrize("path", ["/none/predict", "/models/none/invoke", "/invocations?model_name=none"])
async def test_a_model_that_is_not_there_is_a_404(rig: Rig, path: str) -> None:
    async with rig.inference.post(path, data=b"x") as response:
        assert response.status == 404
        assert json.loads(await response.text())["message"] == "Model not found: none"


async def test_a_query_with_too_many_fields_is_a_400(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minserve.frontend.body.MAX_FIELDS", 2)
    async with rig.inference.post("/m/predict?a=1&b=2&c=3", data=b"x") as response:
        assert response.status == 400
        assert "bad query" in json.loads(await response.text())["message"]
