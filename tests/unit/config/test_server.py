from pathlib import Path

import pytest

from minserve.config.server import ServerOptions, read_server_options
from minserve.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "server.yaml"


def test_without_a_file_and_options_everything_has_its_default() -> None:
    options = read_server_options(None, {})
    assert options == ServerOptions()
    assert (options.model_store, options.load_models, options.host) == ("model-store", ["all"], "127.0.0.1")
    assert (options.inference_port, options.management_port) == (8080, 8081)
    assert (options.job_queue_size, options.max_request_size, options.log_level) == (100, 6_553_500, "info")
    assert (options.default_response_timeout, options.default_startup_timeout) == (120, 120)


def test_the_command_line_stands_over_the_file_and_the_file_over_the_defaults(file: Path) -> None:
    file.write_text("host: 0.0.0.0\ninference_port: 1\nload_models: [a, b=c]\ndefault_response_timeout: 5\n")
    options = read_server_options(file, {"inference_port": 2, "log_level": "debug"})
    assert (options.host, options.inference_port, options.load_models) == ("0.0.0.0", 2, ["a", "b=c"])
    assert (options.default_response_timeout, options.log_level) == (5, "debug")


def test_an_option_of_the_command_line_saves_a_wrong_one_of_the_file(file: Path) -> None:
    file.write_text("inference_port: many\n")
    assert read_server_options(file, {"inference_port": 2}).inference_port == 2


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}"])
def test_an_empty_file_is_fine(file: Path, text: str) -> None:
    file.write_text(text)
    assert read_server_options(file, {}) == ServerOptions()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "inference_prot: 1",
            "inference_prot: found an unknown option, allowed: access_log, .*; did you mean inference_port\\?",
        ),
        ("\nzzz: 1", ":2: zzz: found an unknown option, allowed: [^;]*$"),
        ('inference_port: "8080"', 'found "8080" .a string., allowed: an integer from 0 to 65535; 0 picks a free port'),
        ("inference_port: true", "found true .a boolean."),
        ("inference_port: 65536", "found 65536 .an integer., allowed: an integer from 0 to 65535"),
        ("inference_port: -1", "found -1"),
        ("inference_port: 80.0", "found 80.0 .a float."),
        ("inference_port:", "found null"),
        ("host: ''", 'found "" .a string., allowed: a string, not empty'),
        ("load_models: all", 'found "all" .a string., allowed: a list of `all` or NAME=LOCATION'),
        ("load_models: [1]", "allowed: a list of `all` or NAME=LOCATION"),
        ("log_level: loud", 'found "loud" .a string., allowed: "debug" or "info" or "warning" or "error"'),
        ("default_response_timeout: 0", "allowed: a number of seconds > 0"),
        ("default_response_timeout: .inf", "allowed: a number of seconds > 0"),
        ("max_request_size: 0", "allowed: an integer >= 1"),
        ("host: a\nhost: b", "host: found the key again .first on line 1., allowed: each key once"),
        ("[1, 2]", "found a seq at the top level"),
        ("a: [", "broken YAML"),
    ],
)
def test_what_is_wrong_in_the_file_is_said_with_file_line_and_key(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_server_options(file, {})
    assert str(caught.value).startswith(f"{file}:")


def test_all_errors_are_listed_at_once(file: Path) -> None:
    file.write_text("management_port: x\nlogg_level: x\ninference_port: x\nhost: 1\nmax_request_size: 0\n")
    with pytest.raises(ConfigError) as caught:
        read_server_options(file, {})
    lines = [int(line.removeprefix(f"{file}:").partition(":")[0]) for line in str(caught.value).splitlines()]
    assert sorted(lines) == [1, 2, 3, 4, 5]


def test_a_wrong_option_of_the_command_line_is_not_blamed_on_the_file(file: Path) -> None:
    file.write_text("host: here\n")
    with pytest.raises(ConfigError) as caught:
        read_server_options(file, {"log_level": "loud"})
    assert str(caught.value) == (
        'command line: log_level: found "loud" (a string), allowed: "debug" or "info" or "warning" or "error"'
    )


def test_a_file_that_is_not_there_is_an_error(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"server.yaml: found a file that cannot be read .No such file"):
        read_server_options(file, {})
