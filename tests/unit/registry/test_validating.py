import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minserve.config.server import ServerOptions
from minserve.errors import ConfigError
from minserve.registry.registration import Registration
from minserve.registry.store import Location
from minserve.registry.validating import ValidModel, validate_model
from minserve.worker.devices import Inventory
from minserve.worker.spec import ModelSpec
from tests.unit.registry.archives import HANDLER, make_mar

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


# ── an archive ──

Read = Callable[..., ValidModel]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Makes an archive and reads it; options by name, then what its manifest says."""

    def read(
        options: dict[str, object] | None = None,
        asked: Registration | None = None,
        files: dict[str, str] | None = None,
        inventory: Inventory | None = None,
        file: str = "m.mar",
        name: str | None = None,
        **model: object,
    ) -> ValidModel:
        path = make_mar(tmp_path / file, files, **model)
        server = ServerOptions.model_validate(options or {})
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        return validate_model(Location(path, name), server, inventory or Inventory(), asked, tmp_path / "x")

    return read


def test_a_manifest_says_what_the_model_is(read: Read, tmp_path: Path) -> None:
    model = read(modelVersion="2.1", configFile="c.yaml", envelope="json", files={"c.yaml": "batchSize: 4"})
    spec = model.spec
    assert (spec.name, spec.version, spec.handler, spec.envelope) == ("m", "2.1", "h.py", "json")
    assert (spec.config.batch_size, spec.yaml, spec.runtime) == (4, b"batchSize: 4", "python")
    assert '"modelName": "m"' in spec.manifest
    assert spec.model_dir.is_relative_to(tmp_path / "x")
    assert (spec.model_dir / "h.py").read_text() == HANDLER
    assert spec.url == str(tmp_path / "m.mar")


@pytest.mark.parametrize(
    ("location", "asked", "manifest", "name"),
    [
        (None, None, "n", "n"),
        ("here", None, "n", "here"),
        (None, None, None, "re_s"),
        ("here", None, None, "here"),
        (None, "asked", "n", "asked"),
    ],
)
def test_the_name(read: Read, location: str | None, asked: str | None, manifest: str | None, name: str) -> None:
    registration = Registration("re-s.mar", asked) if asked else None
    assert read(asked=registration, name=location, file="re-s.mar", modelName=manifest).spec.name == name


def test_a_registration_of_an_archive_without_a_name_must_give_one(read: Read) -> None:
    with pytest.raises(ConfigError, match=r"^Model name is not defined\.$"):
        read(asked=Registration("m.mar"), modelName=None)


@pytest.mark.parametrize(
    ("asked", "options", "manifest", "handler"),
    [
        (None, {}, "h.py", "h.py"),
        (None, {}, "h.py:run", "h.py:run"),
        (None, {}, "image_classifier", "image_classifier"),
        (None, {"default_service_handler": "h.py:other"}, "h.py", "h.py"),
        (None, {"default_service_handler": "h.py:other"}, None, "h.py:other"),
        ("h.py:mine", {"default_service_handler": "h.py:other"}, "h.py", "h.py:mine"),
        ("some/where/h.py", {}, "h.py", "some/where/h.py"),
    ],
)
def test_the_handler(read: Read, asked: str | None, options: dict[str, object], manifest: str, handler: str) -> None:
    registration = Registration("m.mar", handler=asked) if asked else None
    assert read(options, registration, handler=manifest).spec.handler == handler


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"handler": "none.py"}, "handler: found .*none.py.* and no such file"),
        ({"handler": "../h.py"}, "handler: found"),
        ({"handler": "/etc/h.py"}, "handler: found"),
        ({"handler": None}, "minserve.handler: found no such file"),
        ({"runtime": "LSP"}, 'runtime: found "LSP" .a string., allowed: python or python3'),
        *(({"modelVersion": version}, "modelVersion: found") for version in ("a/b", "a b", "..", "{a}", "1" * 65)),
        ({"modelName": "a/b"}, "model name: found"),
    ],
)
def test_what_a_manifest_must_not_say(read: Read, model: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**model)


def test_the_servers_envelope_goes_before_the_manifests(read: Read) -> None:
    assert read({"service_envelope": "body"}, envelope="json").spec.envelope == "body"


def test_the_yaml_counts_only_if_the_manifest_names_it(read: Read) -> None:
    assert read(files={"model-config.yaml": "batchSize: 4"}).spec.config.batch_size == 1


def test_an_archive_is_forgiven_what_torchserve_forgives(read: Read) -> None:
    text = "batchSize: true\nBatchSize: 4\ndeviceIds: [0, 7]"
    model = read(configFile="c.yaml", files={"c.yaml": text}, inventory=TWO)
    assert (model.spec.config.batch_size, model.spec.config.device_ids) == (1, None)
    assert [warning.key for warning in model.warnings] == ["batchSize", "BatchSize", "deviceIds"]


def test_a_model_directory_is_forgiven_in_the_place_of_torchserve_alone(validate: Validate) -> None:
    assert validate("batchSize: true", lenient=True).spec.config.batch_size == 1


MODELS = {"m": {"1.0": {"batchSize": 2, "maxBatchDelay": 20, "responseTimeout": 22, "minWorkers": 2, "maxWorkers": 3}}}
YAML = "batchSize: 3\nmaxBatchDelay: 30\nresponseTimeout: 33\nminWorkers: 3\nmaxWorkers: 4\n"
ASKED = Registration("m.mar", None, None, None, 4, 40, 5, 44.0, 45.0)


def numbers(model: ValidModel) -> tuple[float, ...]:
    spec = model.spec
    most = spec.config.max_workers_or(model.workers)
    return spec.config.batch_size, spec.config.max_batch_delay, spec.response_timeout, model.workers, most


@pytest.mark.parametrize(
    ("models", "text", "asked", "expected"),
    [
        ({}, "", None, (1, 100, 120, 1, 1)),
        (MODELS, "", None, (2, 20, 22, 2, 3)),
        (MODELS, YAML, None, (3, 30, 33, 3, 4)),
        (MODELS, YAML, ASKED, (4, 40, 44, 3, 4)),  # of the workers the YAML has the last word, as with TorchServe
        (MODELS, "", ASKED, (4, 40, 44, 5, 5)),
        ({}, "maxWorkers: 7", ASKED, (4, 40, 44, 5, 7)),
        (MODELS, "", Registration("m.mar"), (2, 20, 22, 2, 3)),
        ({}, "", Registration("m.mar"), (1, 100, 120, 0, 0)),
        ({}, "minWorkers: 2", Registration("m.mar"), (1, 100, 120, 2, 2)),
        ({}, "", Registration("m.mar", initial_workers=0), (1, 100, 120, 0, 0)),
        ({"m": {"1.0": {"batchSize": 0, "minWorkers": -1, "maxBatchDelay": "x"}}}, "", None, (1, 100, 120, 1, 1)),
        ({"m": {"2.0": {"batchSize": 9}}}, "", None, (1, 100, 120, 1, 1)),
    ],
)
def test_a_registration_goes_before_the_yaml_and_that_before_the_servers_options(
    read: Read, models: dict[str, object], text: str, asked: Registration | None, expected: tuple[float, ...]
) -> None:
    model = read({"models": models}, asked, configFile="c.yaml", files={"c.yaml": text or "{}"})
    assert numbers(model) == expected


def test_what_the_ranks_are_to_know_of_the_servers_options(read: Read) -> None:
    spec: ModelSpec = read({"limit_max_image_pixels": False, "decode_input_request": False}).spec
    assert (spec.limit_max_image_pixels, spec.decode_input) == (False, False)


def test_a_folder_with_a_manifest_is_an_archive_that_lies_open(read: Read, tmp_path: Path) -> None:
    read(modelVersion="3")
    folder = (tmp_path / "x").rename(tmp_path / "open")
    (tmp_path / "outer").mkdir()
    folder.rename(tmp_path / "outer" / "inner")
    for path in (tmp_path / "outer", tmp_path / "outer" / "inner"):
        spec = validate_model(Location(path), ServerOptions(), Inventory()).spec
        assert (spec.name, spec.version, spec.model_dir) == ("m", "3", tmp_path / "outer" / "inner")


def test_whoever_checks_an_archive_is_told_what_is_forgiven_when_it_is_served(tmp_path: Path) -> None:
    path = make_mar(tmp_path / "m.mar", configFile="c.yaml", files={"c.yaml": "batchSize: true"})
    with pytest.raises(ConfigError, match="batchSize: found true"):
        validate_model(Location(path), ServerOptions(), Inventory(), into=tmp_path / "x", strict=True)


@pytest.mark.parametrize(("asked", "workers", "warned"), [(1, 1, 0), (2, 2, 0), (3, 2, 1)])
def test_no_more_groups_are_started_than_the_devices_are_enough_for(
    read: Read, asked: int, workers: int, warned: int
) -> None:
    files = {"c.yaml": "parallelType: tp\nparallelLevel: 2"}
    registration = Registration("m.mar", initial_workers=asked)
    model = read(None, registration, files, Inventory(("0", "1", "2", "3", "4")), configFile="c.yaml")
    assert numbers(model)[-2:] == (workers, workers)
    assert len(model.warnings) == warned


def test_a_models_ranks_are_told_which_metrics_are_declared(read: Read, tmp_path: Path) -> None:
    assert [metric["name"] for metric in json.loads(read().spec.metrics)] == ["HandlerTime", "PredictionTime"]
    (tmp_path / "metrics.yaml").write_text("model_metrics: {counter: [{name: Calls, unit: Count}]}")
    (calls,) = json.loads(read({"metrics_config": str(tmp_path / "metrics.yaml")}).spec.metrics)
    assert calls == {"name": "Calls", "type": "counter", "unit": "Count", "dimensions": []}
