"""compose.yml and the Dockerfile against what the server does: no engine runs in CI, so what can be read is checked here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from minserve.config.keys import MinServeConfig
from minserve.config.server import ServerOptions

REPOSITORY = Path(__file__).parents[3]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((REPOSITORY / "docker/compose.yml").read_text())["services"]
DOCKERFILE = (REPOSITORY / "docker/Dockerfile").read_text()
STORE = REPOSITORY / "configs/models"

each_service = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)


def command_of_the_image() -> list[str]:
    """The arguments that a plain `docker run` gives to minserve."""
    match = re.search(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert match is not None
    arguments: list[str] = json.loads(match[1])
    return arguments


@each_service
def test_the_drain_and_the_ranks_end_fit_into_the_grace_period(service: dict[str, Any]) -> None:
    options = MinServeConfig()
    assert float(service["stop_grace_period"].removesuffix("s")) > options.drain_timeout + options.exit_timeout


@each_service
def test_all_ports_are_published_on_loopback_only(service: dict[str, Any]) -> None:
    options = ServerOptions()
    ports = (options.inference_port, options.management_port, options.metrics_port)
    wanted = [f"127.0.0.1:{port}:{port}" for port in ports]
    assert service["ports"] == wanted


@each_service
def test_the_example_store_is_mounted_where_the_server_looks_and_cannot_be_written(service: dict[str, Any]) -> None:
    (volume,) = service["volumes"]
    match = re.fullmatch(r"\$\{MODEL_STORE:-(.+)\}:(.+):ro", volume)
    assert match is not None
    assert (REPOSITORY / "docker" / match[1]).resolve() == STORE
    assert match[2] == service["command"][service["command"].index("--model-store") + 1]


@each_service
def test_the_models_served_by_default_exist(service: dict[str, Any]) -> None:
    wanted = service["command"][service["command"].index("--models") + 1]
    for name in wanted.removeprefix("${MODELS:-").removesuffix("}").split(","):
        assert (STORE / name / "model-config.yaml").is_file()


@pytest.mark.parametrize("arguments", [command_of_the_image(), *(service["command"] for service in SERVICES.values())])
def test_the_server_binds_all_interfaces_of_the_container_by_an_explicit_flag(arguments: list[str]) -> None:
    assert arguments[0] == "start"
    assert arguments[arguments.index("--host") + 1] == "0.0.0.0"


def test_links_between_models_hold_wherever_the_store_is_mounted() -> None:
    links = [path for path in STORE.rglob("*") if path.is_symlink()]
    assert links
    for link in links:
        assert not link.readlink().is_absolute(), link
        assert link.resolve(strict=True).is_relative_to(STORE), link


def test_the_healthcheck_asks_the_default_port() -> None:
    assert f"http://127.0.0.1:{ServerOptions().inference_port}/ping" in DOCKERFILE


def test_no_package_index_is_written_down() -> None:
    """Which one serves torch for CPU or CUDA is for whoever builds: a default here would be one host's word for all."""
    urls = re.findall(r"https?://[^/\s'\"]+", DOCKERFILE)
    assert set(urls) == {"http://127.0.0.1:8080"}


def test_what_the_dockerfile_copies_is_in_the_build_context() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            assert f"!{source}" in ignored
            assert (REPOSITORY / source).exists()
