from collections.abc import Callable
from pathlib import Path

import pytest

from minserve.config.server import ServerOptions
from minserve.errors import ConfigError, ModelNotFound, ModelUnhealthy, ModelVersionNotFound
from minserve.registry.models import Registry, ValidModel, read_devices, validate_model
from minserve.registry.store import Location
from minserve.worker.devices import Inventory
from tests.unit.frontend.rig import FakeRuntime, FakeSupervisor
from tests.unit.worker.specs import make_spec

Validate = Callable[..., ValidModel]
TWO = Inventory(("0", "1"))


@pytest.fixture
def validate(tmp_path: Path) -> Validate:
    def validate(
        text: str | None, inventory: Inventory | None = None, name: str | None = None, **options: object
    ) -> ValidModel:
        path = tmp_path / "m"
        path.mkdir(exist_ok=True)
        (path / "handler.py").touch()
        if text is not None:
            (path / "model-config.yaml").write_text(text)
        server = ServerOptions.model_validate(options)
        return validate_model(Location(path, name), server, inventory or Inventory())

    return validate


# ── a model directory ──


def test_what_a_model_leaves_open_the_server_decides(validate: Validate, tmp_path: Path) -> None:
    model = validate(None, default_response_timeout=7.0, default_startup_timeout=8.0, job_queue_size=9)
    spec = model.spec
    assert (spec.name, spec.version, spec.model_dir, spec.yaml) == ("m", "1.0", tmp_path / "m", b"")
    assert (spec.response_timeout, spec.startup_timeout, spec.queue_limit, spec.world_size) == (7, 8, 9, 1)
    assert (model.workers, model.warnings, spec.debug) == (1, (), False)


def test_what_a_model_says_stands(validate: Validate) -> None:
    text = "responseTimeout: 1\nstartupTimeout: 2\njobQueueSize: 3\nminWorkers: 4\nmine: {a: 1}\n"
    model = validate(text, name="other", log_level="debug", default_workers_per_model=9)
    spec = model.spec
    assert (spec.name, spec.yaml) == ("other", text.encode())
    assert (spec.response_timeout, spec.startup_timeout, spec.queue_limit, model.workers) == (1, 2, 3, 4)
    assert spec.debug


@pytest.mark.parametrize(
    ("text", "inventory", "options", "workers"),
    [
        ("", TWO, {}, 2),  # one a GPU, as TorchServe's
        ("", Inventory(), {}, 1),
        ("deviceType: cpu", TWO, {}, 1),
        ("deviceIds: [1]", TWO, {}, 1),
        ("parallelType: tp\ntorchrun: {nproc-per-node: 2}", TWO, {}, 1),
        ("parallelType: custom\nparallelLevel: 2", TWO, {}, 1),
        ("", TWO, {"default_workers_per_model": 5}, 5),
        ("maxWorkers: 3", TWO, {"default_workers_per_model": 5}, 1),
        ("minWorkers: 3", TWO, {}, 3),
    ],
)
def test_the_number_of_workers(
    validate: Validate, text: str, inventory: Inventory, options: dict[str, object], workers: int
) -> None:
    assert validate(text, inventory, **options).workers == workers


@pytest.mark.parametrize(
    ("text", "inventory", "ranks"),
    [
        ("parallelType: tp\ntorchrun: {nproc-per-node: 4}", Inventory(), 4),
        ("parallelType: tp\nparallelLevel: 3", Inventory(), 3),
        ("parallelType: tp\ntorchrun: {nproc-per-node: gpu}", TWO, 2),
        ("parallelType: custom\nparallelLevel: 2", TWO, 1),
    ],
)
def test_the_number_of_ranks(validate: Validate, text: str, inventory: Inventory, ranks: int) -> None:
    assert validate(text, inventory).spec.world_size == ranks


@pytest.mark.parametrize(
    ("text", "inventory", "message"),
    [
        ("batchSize: true\nresponseTimeout: x", Inventory(), "(?s)batchSize.*responseTimeout"),
        ("parallelType: tp\nparallelLevel: 4", TWO, "at most 2 device"),
        ("deviceIds: [5]", TWO, "deviceIds"),
        ("parallelType: tp\ntorchrun: {nproc-per-node: gpu}", Inventory(), "nproc-per-node"),
    ],
)
def test_a_broken_model_lists_its_errors(validate: Validate, text: str, inventory: Inventory, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(text, inventory)


def test_warnings_come_with_the_model(validate: Validate) -> None:
    (warning,) = validate("batchsise: {}\nmine: 1").warnings
    assert "mine" in str(warning)


# ── the registry ──


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setattr("minserve.registry.models.Supervisor", FakeSupervisor)
    return Registry(FakeRuntime(), TWO, {}, lambda: None)


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
async def test_stopping_gives_each_model_its_own_time_to_drain(registry: Registry) -> None:
    spec = make_spec()
    registry.add(ValidModel(spec, 1, ()))
    await registry.stop()
    supervisor: object = registry.find("m").supervisor
    assert isinstance(supervisor, FakeSupervisor)
    assert supervisor.stopped == [spec.config.minserve.drain_timeout]


@pytest.mark.parametrize(
    ("environ", "mask"), [({}, None), ({"CUDA_VISIBLE_DEVICES": ""}, ""), ({"CUDA_VISIBLE_DEVICES": "1"}, "1")]
)
def test_the_inherited_mask_decides_what_the_server_may_use(
    environ: dict[str, str], mask: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minserve.registry.models.read_inventory", lambda given: Inventory((repr(given),)))
    assert read_devices(environ) == Inventory((repr(mask),))
