import pytest

from minserve.config.server import ServerOptions
from minserve.errors import ConfigError, ModelNotFound, ModelUnhealthy, ModelVersionNotFound
from minserve.registry.models import Registry, ValidModel
from minserve.worker.devices import Inventory
from tests.unit.frontend.rig import FakeRuntime, FakeSupervisor
from tests.unit.worker.groups import no_starter
from tests.unit.worker.specs import make_spec

TWO = Inventory(("0", "1"))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setattr("minserve.registry.making.Supervisor", FakeSupervisor)
    return Registry(FakeRuntime(), TWO, no_starter(), lambda: None)


@pytest.mark.asyncio
async def test_models_are_found_by_name_and_version(registry: Registry) -> None:
    for name in ("b", "a"):
        registry.add(ValidModel(make_spec(name=name), 1, ()))
    assert [model.spec.name for model in registry.models()] == ["a", "b"]
    assert registry.find("a").spec.name == "a"
    assert registry.find("a", "1.0") is registry.find("a")
    with pytest.raises(ModelVersionNotFound, match=r"Model version: 2.0 does not exist for model: a"):
        registry.find("a", "2.0")
    with pytest.raises(ModelNotFound, match="Model not found: c"):
        registry.find("c")


@pytest.mark.asyncio
async def test_a_broken_model_is_known_but_cannot_answer(registry: Registry) -> None:
    registry.broken = {"c": ConfigError("/secret/model-config.yaml:3: batchSize")}
    with pytest.raises(ModelUnhealthy) as caught:
        registry.find("c")
    assert "secret" not in str(caught.value)
    assert not caught.value.retryable


@pytest.mark.asyncio
async def test_in_the_place_of_torchserve_a_broken_model_is_none() -> None:
    registry = Registry(FakeRuntime(), TWO, no_starter(), lambda: None, ServerOptions(lenient=True))
    registry.broken = {"c": ConfigError("no")}
    with pytest.raises(ModelNotFound):
        registry.find("c")


@pytest.mark.asyncio
async def test_stopping_gives_each_model_its_own_time_to_drain(registry: Registry) -> None:
    spec = make_spec()
    registry.add(ValidModel(spec, 1, ()))
    await registry.stop()
    supervisor: object = registry.find("m").supervisor
    assert isinstance(supervisor, FakeSupervisor)
    assert supervisor.stopped == [spec.config.minserve.drain_timeout]
