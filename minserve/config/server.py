"""The server's own options: command line over file over defaults. Names as in TorchServe's config.properties."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from minserve.config.addresses import AddressText
from minserve.config.keys import Count, Seconds, Text, Timeout, Whole
from minserve.config.problems import Problem, describe_value, raise_errors
from minserve.config.schema import allowed_values
from minserve.config.yaml import read_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping

    from minserve.config.yaml import YamlDocument

ListenPort = Annotated[int, Field(ge=0, le=65535, title="an integer from 0 to 65535; 0 picks a free port")]
Frontends = Annotated[int, Field(ge=1, le=64, title="an integer from 1 to 64")]
Minutes = Annotated[float, Field(gt=0, title="a number of minutes > 0")]


def _compiled(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


KeystoreType = Annotated[Literal["PKCS12"], BeforeValidator(_upper), Field(title="PKCS12, in any case")]
ModelNumbers = Annotated[
    dict[str, dict[str, dict[str, object]]], Field(title="a map of models to maps of versions to maps of numbers")
]
RegularExpression = Annotated[str, AfterValidator(_compiled), Field(title="a regular expression")]


class ServerOptions(BaseModel):
    """What `minserve start` can be told."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    model_store: Text = "model-store"
    """Folder with the model directories."""
    load_models: Annotated[list[Text], Field(title="a list of `all` or NAME=LOCATION")] = Field(
        default_factory=lambda: ["all"]
    )
    """`all`, or models of the store as LOCATION or NAME=LOCATION. Default: all."""
    host: Text = "127.0.0.1"
    """Address to listen on. Default 127.0.0.1: nobody but this machine."""
    inference_port: ListenPort = 8080
    """Port of /predictions and /ping. Default 8080."""
    management_port: ListenPort = 8081
    """Port of /models. Default 8081."""
    metrics_port: ListenPort = 8082
    """Port of /metrics. Default 8082."""
    inference_address: AddressText = ""
    """Where /predictions listens, in place of host and inference_port. Default port 80, with https 443."""
    management_address: AddressText = ""
    """Where /models listens, in place of host and management_port. Default port 8081, with https 8444. The same as
    inference_address: one listener serves both."""
    metrics_address: AddressText = ""
    """Where /metrics listens, in place of host and metrics_port. Default port 8082, with https 8445."""
    private_key_file: str = ""
    """PEM file with the private key for https. With certificate_file. Default: the keystore, or without one a certificate
    that the server signs itself."""
    certificate_file: str = ""
    """PEM file with the certificate for https and the chain up to its authority. With private_key_file."""
    keystore: str = ""
    """PKCS #12 file with key and certificate for https, in place of private_key_file and certificate_file."""
    keystore_pass: str = Field(default="changeit", repr=False)
    """Password of the keystore. Default changeit, as TorchServe's."""
    keystore_type: KeystoreType = "PKCS12"
    """Format of the keystore. Default PKCS12; `keytool -importkeystore` turns Java's JKS into it."""
    default_response_timeout: Timeout = 120.0
    """responseTimeout of a model that sets none, in seconds. Default 120."""
    default_startup_timeout: Timeout = 120.0
    """startupTimeout of a model that sets none, in seconds. Default 120."""
    default_workers_per_model: Count | None = None
    """Workers of a model that sets neither minWorkers nor maxWorkers. Default: one for each visible GPU for a model of one
    process, as TorchServe's; 1 on CPU and for a group of ranks."""
    job_queue_size: Count = 100
    """jobQueueSize of a model that sets none. Default 100."""
    max_request_size: Count = 6_553_500
    """Largest request body in bytes; a larger one gets a 413. Default 6553500."""
    max_response_size: Count = 6_553_500
    """Largest answer in bytes that is not a stream; in place of a larger one the client gets a 500. Default 6553500."""
    max_in_flight_bytes: Count = 256 * 1024 * 1024
    """Bytes of request bodies in the server at one time, of all models; a request that would exceed them gets a 503. Default
    268435456."""
    max_connections: Count = 4096
    """Open client connections on each port; one more gets a 503. Default 4096."""
    frontends: Frontends = 1
    """Processes that speak HTTP on the inference address, in front of the one that has the queues. More than one pays on
    machines with many cores, see docs/architecture.md. Default 1: the server itself."""
    header_timeout: Timeout = 30.0
    """Seconds for a request's head to arrive, from the connection's start or the head's first byte. Default 30."""
    body_timeout: Timeout = 120.0
    """Seconds for a request's body to arrive after its head. Default 120."""
    keepalive_timeout: Timeout = 75.0
    """Seconds for which a connection without a request stays open. Default 75."""
    launcher: Literal["", "warm", "torchrun"] = ""
    """`launcher` of a model that sets none: warm or torchrun. Default: warm for groups of ranks, and for single processes
    from the time when there is a warm launcher."""
    shutdown_delay: Seconds = 0.0
    """Seconds between the signal to stop and the drain: /readyz says 503 already, requests are still served, so that a
    balancer can notice. Default 0."""
    reload: bool = False
    """Reload a model, without a failed request, when a file of its directory changes. For development. Default false."""
    log_max_bytes: Whole = 100 * 1024 * 1024
    """Bytes after which a log file (`--log-file`) is set aside for a new one; 0: never. Default 104857600."""
    log_files: Count = 5
    """Log files that are set aside before the oldest is removed. Default 5."""
    access_log: bool = False
    """A line in the log for each answer; costs about as much as the rest of its way through the server. Default false."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Log level of the server; debug reaches the ranks, too. Default info."""
    enable_model_api: bool = False
    """Models can be registered and unregistered while the server runs. Default false."""
    disable_token_authorization: bool = True
    """Requests need no token. Default true: none is needed; under `minserve torchserve` false."""
    token_expiration_min: Minutes = 60.0
    """Minutes after which the keys of inference and management expire. Default 60."""
    allowed_urls: Annotated[list[RegularExpression], Field(title="a list of regular expressions")] = Field(
        default_factory=list
    )
    """Addresses from which a model may be registered. Default: none but files and folders of the store."""
    default_service_handler: str = ""
    """Handler of a model that names none and has no handler.py. Default: none."""
    service_envelope: Literal["", "body", "json", "kserve", "kservev2"] = ""
    """Request envelope around every handler. Default: the one in the archive's manifest."""
    install_py_dep_per_model: bool = False
    """Install the packages of an archive's requirements file before it is served. Default false."""
    limit_max_image_pixels: bool = True
    """Handlers refuse images with very many pixels. Default true."""
    decode_input_request: bool = True
    """Bodies of JSON and text reach handlers parsed; if not, as bytes. Default true."""
    unregister_model_timeout: Timeout = 120.0
    """Seconds that an unregistered model has to answer its requests and to end. Default 120."""
    number_of_gpu: Whole | None = None
    """Most GPUs that the server uses, the first of those that it sees. Default: all."""
    blacklist_env_vars: RegularExpression = ""
    """Variables of the server's environment whose whole name matches are kept from the models' processes. Default: none."""
    metrics_mode: Literal["log", "prometheus", "legacy"] = "prometheus"
    """Where metrics go: to the log; to /metrics; or to /metrics what requests and latencies of inference count, the rest to
    the log. Default prometheus; under `minserve torchserve` log."""
    metrics_config: str = ""
    """YAML file that declares the metrics, in TorchServe's format. Default: TorchServe's usual metrics."""
    enable_metrics_api: bool = True
    """Listen on the metrics address. Default true."""
    model_metrics_auto_detect: bool = False
    """Metrics of handlers count although metrics_config does not declare them. Default false."""
    disable_system_metrics: bool = False
    """Do not measure CPU, memory, disk and GPUs. Default false."""
    metric_time_interval: Timeout = 60.0
    """Seconds between two measurements of the system. Default 60."""
    system_metrics_cmd: str = ""
    """Command that measures the system in the server's place, a metric a line. Default: none."""
    allowed_hosts: list[Text] = Field(default_factory=list)
    """Names under which management, metrics and documentation may be called, besides loopback and `host`; `.example.org`
    stands for all names below it, `*` for any. Default: none."""
    cors_allowed_origin: str = ""
    """Origin whose pages may read answers (Access-Control-Allow-Origin). Default: none."""
    cors_allowed_methods: str = ""
    """Methods that these pages may use, separated by commas. Default: none."""
    cors_allowed_headers: str = ""
    """Headers that these pages may send, separated by commas. Default: none."""
    models: ModelNumbers = Field(default_factory=dict)
    """Numbers for models that their own configuration leaves open, by name and version, with TorchServe's keys."""
    model_snapshot: str = ""
    """The models to serve, as the JSON of a snapshot, in place of load_models. Default: none."""
    lenient: bool = False
    """Errors of a model's YAML that TorchServe forgives are warnings, as they are in archives anyway. Default false."""


def read_server_options(file: Path | None, given: Mapping[str, object]) -> ServerOptions:
    """Options from a YAML file, overridden by those `given` on the command line.

    Raises:
        ConfigError: the file cannot be read, has an unknown key or a wrong value. The message lists all of it.
    """
    document = read_yaml(file) if file is not None else None
    values: dict[str, object] = {}
    problems: list[Problem] = []
    if document is not None:
        problems += document.problems
        for key, value in (document.data or {}).items():
            if key in ServerOptions.model_fields:
                values[key] = value
            else:
                problems.append(_unknown(document, key))
    try:
        options = ServerOptions.model_validate({**values, **given})
    except ValidationError as error:
        for key in {str(detail["loc"][0]) for detail in error.errors()}:
            allowed = allowed_values(ServerOptions, key)
            if document is None or key in given:
                problems.append(Problem("command line", None, key, describe_value(given[key]), allowed))
            else:
                found = describe_value("…" if key == "keystore_pass" else values[key])
                problems.append(document.problem((key,), found=found, allowed=allowed))
    raise_errors(sorted(problems, key=lambda problem: (problem.line or 0, problem.key)))
    return options


def _unknown(document: YamlDocument, key: str) -> Problem:
    close = difflib.get_close_matches(key, ServerOptions.model_fields, n=1)
    hint = f"did you mean {close[0]}?" if close else ""
    return document.problem(
        (key,), found="an unknown option", allowed=", ".join(sorted(ServerOptions.model_fields)), hint=hint
    )
