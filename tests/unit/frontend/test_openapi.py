import inspect
import re
from collections.abc import AsyncIterator
from pathlib import Path
from types import MethodType
from typing import cast

import pytest
import pytest_asyncio
from aiohttp import hdrs, web
from openapi_spec_validator import OpenAPIV30SpecValidator

from minserve.frontend.app import combined_app, inference_app, management_app, metrics_app
from minserve.frontend.auth import KEY_FILE, Keys
from minserve.frontend.openapi import QUERIES, Description
from minserve.registry.models import Registry
from tests.unit.frontend.rig import OPTIONS, FakeSupervisor, Rig

pytestmark = pytest.mark.asyncio

FULL = OPTIONS.model_copy(update={"enable_model_api": True})


@pytest_asyncio.fixture
async def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setattr("minserve.registry.making.Supervisor", FakeSupervisor)
    return Rig().registry


@pytest_asyncio.fixture
async def locked(registry: Registry, tmp_path: Path) -> AsyncIterator[Rig]:
    async with Rig(FULL, Keys(tmp_path / KEY_FILE, 60)) as rig:
        yield rig


async def described(app: web.Application) -> dict[str, dict[str, dict[str, dict[str, object]]]]:
    """What the route says, without its way over HTTP."""
    (route,) = (r for r in app.router.routes() if r.method == hdrs.METH_OPTIONS and r.get_info().get("path") == "/")
    handler: object = inspect.unwrap(route.handler)
    assert isinstance(handler, MethodType)
    assert isinstance(handler.__self__, Description)
    description: object = handler.__self__.describe()
    return cast("dict[str, dict[str, dict[str, dict[str, object]]]]", description)


def routed(app: web.Application) -> set[str]:
    """The paths of an application, but for what it answers everywhere else."""
    paths = {resource.canonical.rstrip("/") or "/" for resource in app.router.resources()}
    return paths - {"/{path}", "*"}


async def test_descriptions_are_openapi_and_leave_out_no_route(registry: Registry, tmp_path: Path) -> None:
    keys = Keys(tmp_path / KEY_FILE, 60)
    operations = set()
    for app in (
        *(inference_app(registry, FULL), management_app(registry, FULL), metrics_app(registry, FULL)),
        combined_app(registry, FULL, keys),
    ):
        description = await described(app)
        OpenAPIV30SpecValidator(description).validate()
        assert description["paths"].keys() == routed(app)
        for path, methods in description["paths"].items():
            assert methods, path
            for operation in methods.values():
                assert re.fullmatch(r"[A-Z1-9].{5,}\.", str(operation["summary"])), (path, operation["summary"])
                operations.add(operation["operationId"])
    assert {"post_predictions_model", "post_models", "delete_models_model_version", "get_metrics"} <= operations


async def test_parameters_of_the_query_are_those_of_handlers_that_are_there(registry: Registry, tmp_path: Path) -> None:
    app = combined_app(registry, FULL, Keys(tmp_path / KEY_FILE, 60))
    handlers = {inspect.unwrap(route.handler).__qualname__ for route in app.router.routes()}
    assert QUERIES.keys() <= handlers


async def test_each_address_describes_itself(registry: Registry) -> None:
    async with Rig(FULL) as rig:
        for client, path in ((rig.inference, "/predictions/{model}"), (rig.management, "/models/{model}")):
            async with client.options("/") as by_options, client.get("/api-description") as by_get:
                description = await by_options.json()
                assert (by_options.status, by_get.status) == (200, 200)
                assert description == await by_get.json()
            (operation, *_) = description["paths"][path].values()
            assert operation["parameters"][0]["schema"] == {"type": "string", "enum": ["m"]}
            assert "security" not in operation


async def test_a_path_describes_itself_with_its_model(registry: Registry) -> None:
    async with Rig(FULL) as rig:
        for client, path, methods in (
            (rig.inference, "/predictions/m", {"post"}),
            (rig.management, "/models/m", {"get", "put", "delete"}),
        ):
            async with client.options(path) as response:
                description = await response.json()
                assert "OPTIONS" in response.headers["Allow"]
            OpenAPIV30SpecValidator(description).validate()
            assert description["paths"].keys() == {path}
            assert description["paths"][path].keys() == methods
        for client, path in ((rig.inference, "/predictions/none"), (rig.management, "/models/m/9")):
            async with client.options(path) as response:
                assert response.status == 404


async def test_where_keys_are_asked_for_models_are_not_named_to_whoever_asks(locked: Rig) -> None:
    async with locked.management.options("/") as response:
        description = await response.json()
    assert '"m"' not in str(description).replace("'", '"')
    assert description["paths"]["/models"]["get"]["security"] == [{"key": []}]
    assert "security" not in description["paths"]["/livez"]["get"]
    assert description["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path in ("/models/m", "/models/none"):
        async with locked.management.options(path) as response:
            assert response.status == 400
