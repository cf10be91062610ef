"""What TorchServe forgives is a warning, and its value is used; what is dangerous or impossible stays an error."""

from pathlib import Path

import pytest

from minserve.config.lenient import settle_devices
from minserve.config.model import ModelConfig, ParallelType, ReadConfig, read_model_config
from minserve.errors import ConfigError

TP = "parallelType: tp\n"


def read(tmp_path: Path, text: str) -> ReadConfig:
    (tmp_path / "model-config.yaml").write_text(text)
    return read_model_config(tmp_path, "m", lenient=True, check_handler=False)


@pytest.mark.parametrize(
    ("text", "attribute", "value"),
    [
        ('batchSize: "4"', "batch_size", 1),
        ("batchSize: 4.0", "batch_size", 1),
        ("batchSize: true", "batch_size", 1),
        ("batchSize: 0", "batch_size", 1),
        ("batchSize: null", "batch_size", 1),
        ("BatchSize: 4", "batch_size", 1),
        ("maxBatchDelay: -1", "max_batch_delay", 100),
        ("responseTimeout: 0", "response_timeout", None),
        ("minWorkers: -3\nmaxWorkers: 2", "min_workers", 1),
        ("minWorkers: 3\nmaxWorkers: 2", "min_workers", None),
        ("minWorkers: 3\nmaxWorkers: 2", "max_workers", None),
        ("maxRetryTimeoutInSec: -5", "max_retry_timeout_in_sec", 0),
        ("maxRetryTimeoutInSec: no", "max_retry_timeout_in_sec", 300),
        ("deviceType: tpu", "device_type", None),
        ("deviceIds: [0, x]", "device_ids", None),
        ("parallelType: ep", "parallel_type", ParallelType.NONE),
        ("parallelType: tp", "parallel_type", ParallelType.NONE),
        (TP + "torchrun:", "parallel_type", ParallelType.NONE),
        (TP + "torchrun: 4", "parallel_type", ParallelType.NONE),
        ("useVenv: 1", "use_venv", False),
        ("batchSize: 2\nbatchSize: 3", "batch_size", 3),
        ("batchSize: 4\nhandler: {a: [}", "batch_size", 1),
        ("- batchSize", "batch_size", 1),
        ("batchSize: 4\nx: !!python/object:os.system {}", "batch_size", 1),
    ],
)
def test_what_torchserve_forgives(tmp_path: Path, text: str, attribute: str, value: object) -> None:
    found = read(tmp_path, text)
    assert getattr(found.config, attribute) == value
    assert found.warnings, "nothing is forgiven in silence"
    with pytest.raises(ConfigError):  # a model directory is judged strictly
        read_model_config(tmp_path, "m", check_handler=False)


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("torchrun: {nproc-per-node: 0}", 1),
        ('torchrun: {nproc-per-node: "2"}', 1),
        ("torchrun: {nproc_per_node: x}", 1),
        ("torchrun: {nproc-per-node: 2, node-rank: 1}", 2),
        ("torchrun: {nproc-per-node: 2}\nparallelLevel: 4", 2),
        ("torchrun: {nproc-per-node: 2}\nparallelLevel: -1", 2),
    ],
)
def test_the_number_of_ranks(tmp_path: Path, text: str, ranks: int) -> None:
    found = read(tmp_path, TP + text)
    assert found.config.world_size(0) == ranks
    assert found.warnings


def test_the_ranks_are_not_given_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    assert read(tmp_path, "a: [").yaml == b""
    assert read(tmp_path, "a: 1").yaml == b"a: 1"


def test_the_warning_says_what_is_used(tmp_path: Path) -> None:
    (warning,) = read(tmp_path, "x: {a: 1}\nbatchSize: 0").warnings
    assert warning.line == 2
    assert str(warning).endswith("batchSize: found 0 (an integer), allowed: an integer >= 1; 1 is used")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (TP + "torchrun: {nproc-per-node: 2}\nasyncCommunication: true", "asyncCommunication"),
        ("continuousBatching: true", "continuousBatching: found true"),
        (TP + "torchrun: {nproc-per-node: 2, nnodes: 2}", "torchrun.nnodes"),
        (TP + "torchrun: {nproc-per-node: 2, rdzv-endpoint: h:1}\nminWorkers: 2\nmaxWorkers: 2", "rdzv-endpoint"),
        ("batchSize: x\nminserve: {handler: ../../x.py}", "minserve.handler"),
        ("a: &a [x, x, x, x]\nb: " + "[" + ", ".join(["*a"] * 6000) + "]", "too many values"),
        ("x: " + "y" * 300_000, "a larger file"),
    ],
)
def test_what_is_dangerous_or_impossible_stays_an_error(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        read(tmp_path, text)


def test_a_manifest_without_a_config_file_means_none(tmp_path: Path) -> None:
    (tmp_path / "model-config.yaml").write_text("batchSize: 4")
    assert read_model_config(tmp_path, "m", config_file=None, check_handler=False).config.batch_size == 1
    (tmp_path / "other.yaml").write_text("batchSize: 5")
    assert read_model_config(tmp_path, "m", config_file="other.yaml", check_handler=False).config.batch_size == 5


@pytest.mark.parametrize(
    ("keys", "visible", "device_ids", "workers"),
    [
        ({"device_ids": (0, 5)}, 2, None, None),
        ({"device_ids": (0, 5)}, 0, (0, 5), None),
        ({"device_ids": (1,)}, 2, (1,), None),
        ({"parallel_type": ParallelType.TP, "parallel_level": 2, "min_workers": 3, "max_workers": 3}, 5, None, 2),
        ({"parallel_type": ParallelType.TP, "parallel_level": 2, "min_workers": 2, "max_workers": 2}, 4, None, 2),
        ({"parallel_type": ParallelType.TP, "parallel_level": 8, "min_workers": 1, "max_workers": 1}, 4, None, 1),
    ],
)
def test_what_the_devices_cannot_give(
    keys: dict[str, object], visible: int, device_ids: tuple[int, ...] | None, workers: int | None, tmp_path: Path
) -> None:
    document = read(tmp_path, "").document
    before = ModelConfig.model_validate(keys)
    config, warnings = settle_devices(before, visible, document)
    assert (config.device_ids, config.min_workers, config.max_workers) == (device_ids, workers, workers)
    assert bool(warnings) == (config != before)
