import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from minserve.config.model import ModelConfig, ParallelType, ReadConfig, json_schema, read_model_config
from minserve.config.validate import validate
from minserve.config.yaml import parse_yaml
from minserve.errors import ConfigError

SCHEMA_COPY = Path(__file__).parents[3] / "configs" / "model-config.schema.json"

Read = Callable[[str], ReadConfig]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model_1.0"
    folder.mkdir()
    (folder / "handler.py").touch()
    return folder


@pytest.fixture
def read(model_dir: Path) -> Read:
    def read_text(text: str) -> ReadConfig:
        (model_dir / "model-config.yaml").write_text(text)
        return read_model_config(model_dir)

    return read_text


def errors_of(read: Read, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text)
    return [
        line.rpartition("/")[2] if "minserve.handler" not in line else line for line in str(caught.value).split("\n")
    ]


def test_without_a_yaml_everything_has_its_default(model_dir: Path) -> None:
    result = read_model_config(model_dir)
    assert result.name == "my-model_1.0"
    assert result.warnings == ()
    config = result.config
    assert config == ModelConfig()
    assert (config.batch_size, config.max_batch_delay, config.max_retry_timeout_in_sec) == (1, 100, 300)
    assert (config.response_timeout, config.startup_timeout, config.job_queue_size) == (None, None, None)
    assert (config.minserve.accept_timeout, config.minserve.error_grace, config.minserve.handler) == (
        30,
        2,
        "handler.py",
    )
    assert config.minserve.backoff == (0, 1, 2, 3, 5, 8, 13, 21, 34, 55)


EVERY_KEY = """
minWorkers: 1
maxWorkers: 1
batchSize: 8
maxBatchDelay: 0
responseTimeout: 0.5
startupTimeout: 300
deviceType: GPU
deviceIds: [3, 1]
parallelType: Tp
parallelLevel: 2
torchrun:
  nnodes: 1
  nproc-per-node: 2
  rdzv-backend: c10d
  rdzv-endpoint: localhost:29400
  rdzv-conf: timeout=60,read_timeout=5
  monitor-interval: 5
  node-rank: 0
  master-addr: localhost
  master-port: 29500
  max-restarts: 0
  OMP_NUMBER_THREADS: 4
maxRetryTimeoutInSec: 0
clientTimeoutInMills: 1500
jobQueueSize: 10
useJobTicket: false
continuousBatching: false
sequenceBatching: false
sequenceMaxIdleMSec: 1
sequenceTimeoutMSec: 2
maxSequenceJobQueueSize: 3
maxNumSequence: 4
asyncCommunication: false
useVenv: false
minserve:
  handler: handler.py:MyHandler
  acceptTimeout: 5
  inFlight: 2
  batching: window
  socketType: tcp
  port: 9000
  queueTimeout: 1.5
  firstBatchTimeout: 600
  errorGrace: 0
  replyAfter: all
  drainTimeout: 0
  exitTimeout: 1
  stablePeriod: 2
  backoff: [0.1, 2]
  stallTimeout: 0
  streamAhead: 4
  streamBuffer: 1000
  streamStallTimeout: 3
  retryInFlight: 1
  probeInterval: 5
  scaleUpWait: 0.5
  scaleDownIdle: 10
  launcher: warm
  bodies: view
  sharedMemory: 0
  spinMicros: 50
  scheduling: batch
  predictOn: all
handler: {model_path: weights, profile: true}
pippy: {chunks: 1}
pt2: inductor
"""


def test_every_key_is_understood(read: Read) -> None:
    result = read(EVERY_KEY)
    assert result.warnings == ()
    config = result.config
    assert (config.device_type, config.device_ids, config.parallel_type) == ("gpu", (3, 1), ParallelType.TP)
    assert (config.max_batch_delay, config.response_timeout) == (0, 0.5)
    assert (config.torchrun.nproc_per_node, config.torchrun.omp_num_threads) == (2, 4)
    assert config.torchrun.rdzv_conf == "timeout=60,read_timeout=5"
    assert (config.sequence_max_idle_m_sec, config.sequence_timeout_m_sec) == (1, 2)
    assert (config.minserve.handler_file, config.minserve.backoff) == ("handler.py", (0.1, 2))


def test_the_test_above_covers_the_schema() -> None:
    schema = json.loads(json.dumps(json_schema()))
    values = yaml.safe_load(EVERY_KEY)
    assert schema["properties"].keys() <= values.keys()
    for name in ("torchrun", "minserve"):
        definition = schema["$defs"][schema["properties"][name]["$ref"].rpartition("/")[2]]
        assert definition["properties"].keys() - {"rdzv-id"} == values[name].keys()


def test_torchrun_keys_are_spelled_with_dashes_or_underscores(read: Read) -> None:
    config = read("parallelType: tp\ntorchrun: {nproc_per_node: 2, rdzv_conf: a=b, OMP_NUM_THREADS: 3}\n").config
    assert (config.torchrun.nproc_per_node, config.torchrun.rdzv_conf, config.torchrun.omp_num_threads) == (2, "a=b", 3)


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("", ""),
        ('""', ""),
        ("null", ""),
        ("none", ""),
        ("None", ""),
        ("PP", "pp"),
        ("pptp", "pptp"),
        ("Custom", "custom"),
    ],
)
def test_parallel_type_in_any_case(read: Read, word: str, kind: str) -> None:
    assert read(f"parallelType: {word}\nparallelLevel: 1\n").config.parallel_type is ParallelType(kind)


def test_a_section_without_keys_is_empty(read: Read) -> None:
    assert read("minserve:\n  # acceptTimeout: 5\ntorchrun:\n").config == ModelConfig()


NOT_YET = "not yet: without it the handler's answers would be wrong"
INTEGER = "an integer >= 1"
POSITIVE = "a number of seconds > 0"
NOT_NEGATIVE = "a number of seconds >= 0"
BAD_VALUES = [
    ("minWorkers: 0", "minWorkers", "0 (an integer)", INTEGER),
    ('minWorkers: "4"', "minWorkers", '"4" (a string)', INTEGER),
    ("maxWorkers: 4.0", "maxWorkers", "4.0 (a float)", INTEGER),
    ("batchSize: 3000000000", "batchSize", "3000000000 (an integer)", INTEGER + " and <= 2147483647"),
    ("batchSize: true", "batchSize", "true (a boolean)", INTEGER),
    ("batchSize: [1]", "batchSize", "[1] (a list)", INTEGER),
    ("batchSize: {a: 1}", "batchSize", "a map", INTEGER),
    ("batchSize:", "batchSize", "null", INTEGER + "; or leave the key out"),
    ("responseTimeout:", "responseTimeout", "null", POSITIVE + "; or leave the key out"),
    ("batchSize: 2026-01-02", "batchSize", "2026-01-02 (a date)", INTEGER),
    ("maxBatchDelay: -1", "maxBatchDelay", "-1 (an integer)", "an integer >= 0"),
    ("maxBatchDelay: 0.5", "maxBatchDelay", "0.5 (a float)", "an integer >= 0"),
    ("responseTimeout: 0", "responseTimeout", "0 (an integer)", POSITIVE),
    ("responseTimeout: true", "responseTimeout", "true (a boolean)", POSITIVE),
    ("startupTimeout: .inf", "startupTimeout", "inf (a float)", POSITIVE),
    ("startupTimeout: 2m", "startupTimeout", '"2m" (a string)', POSITIVE),
    ("deviceType: tpu", "deviceType", '"tpu" (a string)', 'one of "cpu", "gpu", in any case'),
    ("deviceIds: []", "deviceIds", "[] (a list)", "a list of different integers >= 0, not empty"),
    ("deviceIds: 0", "deviceIds", "0 (an integer)", "a list of different integers >= 0, not empty"),
    ("deviceIds: [0, 0]", "deviceIds", "[0, 0] (a list)", "a list of different integers >= 0, not empty"),
    ("deviceIds: [0, true]", "deviceIds[1]", "true (a boolean)", "a list of different integers >= 0, not empty"),
    ("deviceIds: [0, -1]", "deviceIds[1]", "-1 (an integer)", "a list of different integers >= 0, not empty"),
    (
        "parallelType: tpp",
        "parallelType",
        '"tpp" (a string)',
        'one of "", "none", "tp", "pp", "pptp", "custom", in any case',
    ),
    (
        "parallelType: 1",
        "parallelType",
        "1 (an integer)",
        'one of "", "none", "tp", "pp", "pptp", "custom", in any case',
    ),
    ("parallelLevel: 0", "parallelLevel", "0 (an integer)", INTEGER),
    ("torchrun: 2", "torchrun", "2 (an integer)", "a map"),
    ("torchrun: {nnodes: '1:2'}", "torchrun.nnodes", '"1:2" (a string)', INTEGER),
    ("torchrun: {nproc-per-node: 0}", "torchrun.nproc-per-node", "0 (an integer)", INTEGER + ' or "gpu" or "auto"'),
    ("torchrun: {nproc_per_node: cpu}", "torchrun.nproc_per_node", '"cpu" (a string)', INTEGER + ' or "gpu" or "auto"'),
    (
        "torchrun: {nproc-per-node: true}",
        "torchrun.nproc-per-node",
        "true (a boolean)",
        INTEGER + ' or "gpu" or "auto"',
    ),
    ("torchrun: {rdzv-endpoint: ''}", "torchrun.rdzv-endpoint", '"" (a string)', "a string, not empty"),
    ("torchrun: {rdzv-conf: fast}", "torchrun.rdzv-conf", '"fast" (a string)', "key=value pairs, separated by commas"),
    ("torchrun: {master-port: 65536}", "torchrun.master-port", "65536 (an integer)", "an integer from 1 to 65535"),
    ("torchrun: {max-restarts: -1}", "torchrun.max-restarts", "-1 (an integer)", "an integer >= 0"),
    ("torchrun: {OMP_NUM_THREADS: 0}", "torchrun.OMP_NUM_THREADS", "0 (an integer)", INTEGER),
    ("maxRetryTimeoutInSec: -1", "maxRetryTimeoutInSec", "-1 (an integer)", NOT_NEGATIVE),
    ("clientTimeoutInMills: 0.5", "clientTimeoutInMills", "0.5 (a float)", "an integer >= 0"),
    ("jobQueueSize: 0", "jobQueueSize", "0 (an integer)", INTEGER),
    ("useJobTicket: 1", "useJobTicket", "1 (an integer)", "true or false"),
    ('continuousBatching: "true"', "continuousBatching", '"true" (a string)', "true or false"),
    ("continuousBatching: true", "continuousBatching", "true", f"false; {NOT_YET}"),
    ("sequenceBatching: true", "sequenceBatching", "true", f"false; {NOT_YET}"),
    ("minserve: [1]", "minserve", "[1] (a list)", "a map"),
    ("minserve: {acceptTimeout: 0}", "minserve.acceptTimeout", "0 (an integer)", POSITIVE),
    ("minserve: {inFlight: 0}", "minserve.inFlight", "0 (an integer)", INTEGER),
    ("minserve: {socketType: UNIX}", "minserve.socketType", '"UNIX" (a string)', '"unix" or "tcp"'),
    ("minserve: {port: 0}", "minserve.port", "0 (an integer)", "an integer from 1 to 65535"),
    ("minserve: {errorGrace: -1}", "minserve.errorGrace", "-1 (an integer)", NOT_NEGATIVE),
    ("minserve: {replyAfter: rank1}", "minserve.replyAfter", '"rank1" (a string)', '"rank0" or "all"'),
    ("minserve: {backoff: []}", "minserve.backoff", "[] (a list)", "a list of seconds >= 0, not empty"),
    ("minserve: {backoff: [1, -1]}", "minserve.backoff[1]", "-1 (an integer)", "a list of seconds >= 0, not empty"),
]


@pytest.mark.parametrize(("text", "key", "found", "allowed"), BAD_VALUES, ids=[row[0] for row in BAD_VALUES])
def test_a_bad_value(read: Read, text: str, key: str, found: str, allowed: str) -> None:
    expected = f"model-config.yaml:2: {key}: found {found}, allowed: {allowed}"
    assert errors_of(read, f"# a comment\n{text}\n") == [expected]


@pytest.mark.parametrize(
    "handler",
    ["/abs/handler.py", "../handler.py", "a/../handler.py", "handler", "handler.py:", "handler.py:a.b", "a:b.py"],
)
def test_a_bad_handler(read: Read, handler: str) -> None:
    (error,) = errors_of(read, f'minserve:\n  handler: "{handler}"\n')
    assert (
        f'model-config.yaml:2: minserve.handler: found "{handler}" (a string), allowed: file.py or file.py:name'
        in error
    )


def test_a_handler_in_a_folder(read: Read, model_dir: Path) -> None:
    (model_dir / "src").mkdir()
    (model_dir / "src" / "serve.py").touch()
    assert read("minserve: {handler: src/serve.py:Handler}").config.minserve.handler_file == "src/serve.py"


def test_a_missing_handler_names_the_file(read: Read, model_dir: Path) -> None:
    (error,) = errors_of(read, "minserve:\n  handler: other.py:f\n")
    assert error.endswith(
        f'model-config.yaml:2: minserve.handler: found "other.py:f" (a string), allowed: an existing file; '
        f"no file {model_dir}/other.py"
    )
    (model_dir / "handler.py").unlink()
    (error,) = errors_of(read, "batchSize: 1\n")
    assert (
        error == f"{model_dir}/handler.py: minserve.handler: found no such file, allowed: a handler file in {model_dir}"
    )


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("BatchSize: 3", "BatchSize", "batchSize"),
        ("batch_size: 3", "batch_size", "batchSize"),
        ("batch-size: 3", "batch-size", "batchSize"),
        ("minWorker: 3", "minWorker", "minWorkers"),
        ("deviceId: [3]", "deviceId", "deviceIds"),
        ("Torchrun: {nnodes: 1}", "Torchrun", "torchrun"),
        ("MinServe: {inFlight: 1}", "MinServe", "minserve"),
        ("torchrun: {nproc-per-nodes: 2}", "torchrun.nproc-per-nodes", "nproc-per-node"),
        ("torchrun: {max_restart: 2}", "torchrun.max_restart", "max-restarts"),
        ("torchrun: {OMP_NUMBER_THREAD: 2}", "torchrun.OMP_NUMBER_THREAD", "OMP_NUMBER_THREADS"),
        ("minserve: {accept_timeout: 2}", "minserve.accept_timeout", "acceptTimeout"),
        ("minserve: {inflight: 2}", "minserve.inflight", "inFlight"),
    ],
)
def test_a_misspelled_key(read: Read, text: str, key: str, meant: str) -> None:
    expected = f"model-config.yaml:1: {key}: found an unknown key, allowed: {meant}; did you mean {meant}?"
    assert errors_of(read, text) == [expected]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("max_length: 3", ["max_length: found an unknown key", "only the handler sees it"]),
        ("labels: [a, b]", ["labels: found an unknown key"]),
        ("raw: 3", ["raw: found an unknown key"]),
        ("acceptTimeout: 3", ["acceptTimeout: found an unknown key", "did you mean minserve: {acceptTimeout: ...}?"]),
        (
            "minserve: {turboMode: 3}",
            ["minserve.turboMode: found an unknown key", "one of acceptTimeout, backoff"],
        ),
        ("minserve: {1: 3}", ["minserve.1: found an unknown key"]),
        (
            "{parallelType: tp, torchrun: {nproc-per-node: 2, standalone: true}}",
            ["torchrun.standalone: found an unsupported parameter", "master-addr"],
        ),
        (
            "{parallelType: tp, torchrun: {nproc-per-node: 2, rdzv_id: 7}}",
            ["torchrun.rdzv_id: found 7 (an integer)", "minserve makes a new id"],
        ),
        ("torchrun: {nproc-per-node: 2}", ["torchrun: found torchrun without a parallelType", "one plain process"]),
        ("parallelLevel: 2", ["parallelLevel: found parallelLevel without a parallelType"]),
        ("{parallelType: tp, parallelLevel: 2, minWorkers: 2}", ["minWorkers: found 2 workers", "1 is usual"]),
        ("{parallelType: tp, parallelLevel: 2, maxWorkers: 3}", ["maxWorkers: found 3 workers", "1 is usual"]),
        (
            "{parallelType: pp, parallelLevel: 4, minserve: {inFlight: 3}}",
            ["minserve.inFlight: found 3", "1, at least 4", "stages"],
        ),
        ("useJobTicket: true", ["useJobTicket: found true", "understood, not yet acted on"]),
    ],
)
def test_a_warning(read: Read, text: str, parts: list[str]) -> None:
    (warning,) = read(f"\n\n{text}\n").warnings
    assert warning.severity == "warning"
    for part in ["model-config.yaml:3: ", *parts]:
        assert part in str(warning)


@pytest.mark.parametrize(
    "text",
    [
        "mine: {a: 1}",
        "handler: {a: 1}",
        "deepspeed: {config: x.json}",
        "micro_batching: {}",
        "pt2: inductor",
        "batch: {a: 1}",
    ],
)
def test_the_authors_sections_give_no_warning_and_stay_untouched(read: Read, text: str) -> None:
    result = read(text)
    assert result.warnings == ()
    assert result.document.data == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("parallelType: tp", ['1: parallelType: found "tp" and no number of ranks', "nproc-per-node or parallelLevel"]),
        (
            "parallelType: pp\nparallelLevel: 4\ntorchrun: {nproc-per-node: 2}",
            ["2: parallelLevel: found 4, allowed: 2"],
        ),
        (
            "parallelType: custom\nparallelLevel: 4\ntorchrun: {nproc-per-node: 2}",
            ["2: parallelLevel: found 4, allowed: 2"],
        ),
        ("minWorkers: 3\nmaxWorkers: 2", ["2: maxWorkers: found 2, allowed: at least minWorkers, 3"]),
        (
            "parallelType: tp\nparallelLevel: 2\nasyncCommunication: true",
            ['3: asyncCommunication: found true with parallelType "tp", allowed: false'],
        ),
        (
            "parallelType: tp\nmaxWorkers: 2\ntorchrun:\n  nproc-per-node: 2\n  rdzv_endpoint: localhost:1",
            ["5: torchrun.rdzv_endpoint: found an endpoint for 2 workers, allowed: maxWorkers 1"],
        ),
        (
            "parallelType: tp\nminWorkers: 2\ntorchrun:\n  nproc-per-node: 2\n  rdzv-endpoint: localhost:1",
            ["5: torchrun.rdzv-endpoint: found an endpoint for 2 workers, allowed: minWorkers 1"],
        ),
        (
            "parallelType: tp\ntorchrun:\n  nproc-per-node: 2\n  nnodes: 2",
            ["4: torchrun.nnodes: found 2, allowed: 1; not yet: minserve runs one node"],
        ),
        (
            "parallelType: tp\ntorchrun:\n  nproc-per-node: 2\n  node_rank: 1",
            ["4: torchrun.node_rank: found 1, allowed: 0; not yet: minserve runs one node"],
        ),
        (
            "parallelType: tp\ndeviceType: CPU\ntorchrun:\n  nproc-per-node: gpu",
            ['4: torchrun.nproc-per-node: found "gpu" with deviceType cpu, allowed: an integer >= 1, or "auto"'],
        ),
        (
            "torchrun:\n  nproc-per-node: 2\n  nproc_per_node: 2",
            ["3: torchrun.nproc_per_node: found a second spelling of nproc-per-node, allowed: one of the two"],
        ),
    ],
)
def test_a_contradiction(read: Read, text: str, parts: list[str]) -> None:
    (error,) = errors_of(read, text)
    for part in parts:
        assert part in f"{error}"


def test_all_errors_at_once_in_the_files_order(read: Read) -> None:
    text = (
        "minWorker: 1\nbatchSize: 0\nbatchSize: true\nminserve: {inFlight: x}\ntorchrun: {nnodes: 0, max-restart: 1}\n"
    )
    errors = errors_of(read, text)
    assert [error.partition(" found")[0] for error in errors] == [
        "model-config.yaml:1: minWorker:",
        "model-config.yaml:3: batchSize:",
        "model-config.yaml:3: batchSize:",
        "model-config.yaml:4: minserve.inFlight:",
        "model-config.yaml:5: torchrun.max-restart:",
        "model-config.yaml:5: torchrun.nnodes:",
    ]


def test_all_contradictions_at_once(read: Read) -> None:
    assert len(errors_of(read, "parallelType: tp\nminWorkers: 3\nmaxWorkers: 2\nasyncCommunication: true\n")) == 3


def test_a_broken_yaml_is_the_only_error(read: Read) -> None:
    (error,) = errors_of(read, "a: 1\nb: [\n")
    assert error.startswith("model-config.yaml:3: found broken YAML")


def test_the_message_starts_with_the_files_path(read: Read, model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{model_dir}/model-config\.yaml:1: batchSize: "):
        read("batchSize: 0")


@pytest.mark.parametrize("name", ["-model", ".hidden", "my model", "modèle", "a+b"])
def test_a_bad_model_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "handler.py").touch()
    with pytest.raises(ConfigError, match="the folder's name is the model's name"):
        read_model_config(tmp_path / name)


def test_the_name_of_a_relative_path(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_dir)
    assert read_model_config(Path(".")).name == "my-model_1.0"


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent: found no such directory"):
        read_model_config(tmp_path / "absent")


def test_a_yaml_that_is_a_broken_link(model_dir: Path) -> None:
    (model_dir / "model-config.yaml").symlink_to("absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_model_config(model_dir)


@pytest.mark.parametrize(
    ("text", "workers"),
    [("", (4, 4)), ("minWorkers: 2", (2, 2)), ("maxWorkers: 3", (1, 3)), ("{minWorkers: 2, maxWorkers: 3}", (2, 3))],
)
def test_numbers_of_workers(read: Read, text: str, workers: tuple[int, int]) -> None:
    config = read(text).config
    assert (config.min_workers_or(4), config.max_workers_or(4)) == workers


@pytest.mark.parametrize(
    ("text", "devices", "world_size", "per_worker"),
    [
        ("{}", 8, 1, 1),
        ("parallelLevel: 4", 8, 1, 1),
        ("parallelType: custom", 8, 1, 1),
        ("{parallelType: custom, parallelLevel: 4}", 8, 1, 4),
        ("{parallelType: custom, torchrun: {nproc-per-node: 4}}", 8, 1, 4),
        ("{parallelType: tp, parallelLevel: 4}", 8, 4, 4),
        ("{parallelType: tp, torchrun: {nproc-per-node: 4}}", 0, 4, 4),
        ("{parallelType: tp, torchrun: {nproc-per-node: gpu}}", 8, 8, 8),
        ("{parallelType: tp, deviceIds: [1, 2], torchrun: {nproc-per-node: gpu}}", 8, 2, 2),
        ("{parallelType: tp, torchrun: {nproc-per-node: auto}}", 8, 8, 8),
    ],
)
def test_world_size(read: Read, text: str, devices: int, world_size: int, per_worker: int) -> None:
    config = read(text).config
    assert (config.world_size(devices), config.devices_per_worker(devices)) == (world_size, per_worker)


@pytest.mark.parametrize("text", ["", "deviceIds: [0]\n", "deviceType: cpu\n"])
def test_auto_without_a_gpu_is_a_rank_for_each_core(read: Read, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    config = read(f"{text}parallelType: tp\ntorchrun: {{nproc-per-node: auto}}\n").config
    assert config.world_size(8 if config.device_type == "cpu" else 0) == 6


def test_gpu_without_a_gpu_is_an_error(read: Read) -> None:
    config = read("{parallelType: tp, torchrun: {nproc-per-node: gpu}}").config
    with pytest.raises(ConfigError, match="allowed without a GPU"):
        config.world_size(0)


def test_the_schema_and_its_copy_are_in_sync() -> None:
    expected = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    assert SCHEMA_COPY.read_text() == expected, "run: minserve schema > configs/model-config.schema.json"


def test_the_schema_describes_every_key() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert "additionalProperties" not in schema
    assert "raw" not in schema["properties"]
    for section in (schema, *schema["$defs"].values()):
        for key, value in section["properties"].items():
            assert len(value["description"]) > 10, key


KEYS = st.sampled_from([*yaml.safe_load(EVERY_KEY), "mine"])
VALUES = st.none() | st.booleans() | st.integers(-2, 9) | st.floats(allow_nan=False) | st.text(max_size=4)
SECTION = st.dictionaries(st.sampled_from(["nproc-per-node", "nproc_per_node", "inFlight", "backoff", "x"]), VALUES)


@given(st.dictionaries(KEYS, VALUES | st.lists(VALUES, max_size=3) | SECTION))
def test_a_config_or_an_error_whatever_the_values(values: dict[str, object]) -> None:
    document = parse_yaml(yaml.safe_dump(values).encode(), "model-config.yaml")
    config, problems = validate(document, document.data or {})
    assert config is not None or any(problem.severity == "error" for problem in problems)
    assert all(problem.line is not None for problem in problems)
