"""The server's own options: command line over file over defaults. Names as in TorchServe's config.properties."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minserve.config.keys import Count, Seconds, Text, Timeout, Whole
from minserve.config.problems import Problem, describe_value, raise_errors
from minserve.config.schema import allowed_values
from minserve.config.yaml import read_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping

    from minserve.config.yaml import YamlDocument

ListenPort = Annotated[int, Field(ge=0, le=65535, title="an integer from 0 to 65535; 0 picks a free port")]


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
    max_in_flight_bytes: Count = 256 * 1024 * 1024
    """Bytes of request bodies in the server at one time, of all models; a request that would exceed them gets a 503. Default
    268435456."""
    max_connections: Count = 4096
    """Open client connections on each port; one more gets a 503. Default 4096."""
    header_timeout: Timeout = 30.0
    """Seconds for a request's head to arrive, from the connection's start or the head's first byte. Default 30."""
    body_timeout: Timeout = 120.0
    """Seconds for a request's body to arrive after its head. Default 120."""
    keepalive_timeout: Timeout = 75.0
    """Seconds for which a connection without a request stays open. Default 75."""
    shutdown_delay: Seconds = 0.0
    """Seconds between the signal to stop and the drain: /readyz says 503 already, requests are still served, so that a
    balancer can notice. Default 0."""
    reload: bool = False
    """Reload a model, without a failed request, when a file of its directory changes. For development. Default false."""
    log_max_bytes: Whole = 100 * 1024 * 1024
    """Bytes after which a log file (`--log-file`) is set aside for a new one; 0: never. Default 104857600."""
    log_files: Count = 5
    """Log files that are set aside before the oldest is removed. Default 5."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Log level of the server; debug reaches the ranks, too. Default info."""


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
                problems.append(document.problem((key,), found=describe_value(values[key]), allowed=allowed))
    raise_errors(sorted(problems, key=lambda problem: (problem.line or 0, problem.key)))
    return options


def _unknown(document: YamlDocument, key: str) -> Problem:
    close = difflib.get_close_matches(key, ServerOptions.model_fields, n=1)
    hint = f"did you mean {close[0]}?" if close else ""
    return document.problem(
        (key,), found="an unknown option", allowed=", ".join(sorted(ServerOptions.model_fields)), hint=hint
    )
