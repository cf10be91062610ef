from collections.abc import Mapping
from pathlib import Path

import pytest

from minserve.config.properties import Properties, read_properties
from minserve.config.server import ServerOptions
from minserve.config.torchserve import FROM_ENVIRONMENT, WITHOUT_EFFECT, environment_name
from minserve.errors import ConfigError, StartupError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.properties"


def read(
    file: Path, text: str, given: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None
) -> Properties:
    file.write_text("model_store=store\n" + text)
    return read_properties(file, given or {}, environ or {})


def test_every_kind_of_value_in_javas_syntax(file: Path) -> None:
    properties = read(
        file,
        "# a comment\n! another\n"
        "inference_address: https://0.0.0.0\n"
        "job_queue_size 7\n"
        "token_expiration_min = 0.5\n"
        "enable_model_api=TRUE\n"
        "allowed_urls=https://a/.*, file:///b/.*\n"
        "cors_allowed_origin=caf\\u00e9\n"
        "keystore_pass= with a blank \n"
        'models={\\\n  "m": {"1.0": {"minWorkers": 1, "batchSize": 4}}\\\n}\n'
        "load_models=a=x.mar,y.mar\n",
    )
    options = properties.options
    assert options.inference_address == "https://0.0.0.0"
    assert (options.job_queue_size, options.token_expiration_min, options.enable_model_api) == (7, 0.5, True)
    assert options.allowed_urls == ["https://a/.*", "file:///b/.*"]
    assert (options.cors_allowed_origin, options.keystore_pass) == ("café", "with a blank ")
    assert options.models == {"m": {"1.0": {"minWorkers": 1, "batchSize": 4}}}
    assert options.load_models == ["a=x.mar", "y.mar"]
    assert properties.warnings == ()


def test_torchserves_defaults_where_they_are_not_ours() -> None:
    options = read_properties(None, {"model_store": "s"}, {}).options
    assert (options.load_models, options.metrics_mode, options.disable_token_authorization) == ([], "log", False)
    assert options.lenient
    assert options.inference_port == ServerOptions().inference_port


@pytest.mark.parametrize("text", ["all", "ALL", " All "])
def test_all_models_in_any_case(file: Path, text: str) -> None:
    assert read(file, f"load_models={text}").options.load_models == ["all"]


def test_no_workers_means_as_many_as_we_think_right(file: Path) -> None:
    assert read(file, "default_workers_per_model=0").options.default_workers_per_model is None
    assert read(file, "default_workers_per_model=3").options.default_workers_per_model == 3


def test_what_torchserve_forgives_is_a_warning(file: Path) -> None:
    properties = read(file, "metrics_mode=loud\ninstall_py_dep_per_model=yes\n")
    assert (properties.options.metrics_mode, properties.options.install_py_dep_per_model) == ("log", False)
    assert list(properties.warnings) == [
        f'{file}:2: metrics_mode: found "loud" (a string), allowed: "log" or "prometheus" or "legacy"; '
        "taken as log, as by TorchServe",
        f'{file}:3: install_py_dep_per_model: found "yes" (a string), allowed: true or false; '
        "taken as false, as by TorchServe",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("job_queue_size=ten", ':2: job_queue_size: found "ten" .a string., allowed: an integer >= 1'),
        ("job_queue_size=0", ':2: job_queue_size: found "0" .a string., allowed: an integer >= 1'),
        ("job_queue_size=1.0", 'found "1.0"'),
        ("number_of_gpu=-1", "allowed: an integer >= 0"),
        ("default_response_timeout=x", "allowed: a number of seconds > 0"),
        ("default_response_timeout=nan", "allowed: a number of seconds > 0"),
        ("token_expiration_min=0", "allowed: a number of minutes > 0"),
        ("inference_address=localhost:8080", "inference_address: .* allowed: http://HOST"),
        ("blacklist_env_vars=(", "allowed: a regular expression"),
        ("allowed_urls=(", "allowed: a list of regular expressions"),
        ("keystore_type=JKS", "allowed: PKCS12"),
        ("service_envelope=xml", 'allowed: "" or "body" or "json"'),
        ("models={", ":2: models: .* allowed: JSON"),
        ("models=[]", "models: found .* allowed: a map of models"),
        ("x=\\u12", "four hexadecimal digits"),
        ("max_connections=x", "max_connections"),
        ("# one\nhost=a\\\n  b\nmanagement_port=x", ":5: management_port"),
    ],
)
def test_what_is_wrong_is_said_with_file_line_and_key(file: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(file, text)
    assert str(caught.value).startswith(str(file))


def test_all_errors_are_listed_and_a_password_is_never_shown(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(file, "job_queue_size=x\nnumber_of_gpu=y\nkeystore_type=JKS\nkeystore_pass=secret\n")
    assert len(str(caught.value).splitlines()) == 3
    assert "secret" not in str(caught.value)


def test_keys_that_set_nothing_are_one_warning(file: Path) -> None:
    properties = read(file, "vmargs=-Xmx1g\nnumber_of_netty_threads=4\ninfernce_address=x\nmy_own=1\n")
    assert list(properties.warnings) == [
        f"{file}: keys without effect here: number_of_netty_threads, vmargs; "
        "not known: infernce_address (did you mean inference_address?), my_own"
    ]


def test_no_key_is_both_an_option_and_without_effect() -> None:
    assert not WITHOUT_EFFECT & ServerOptions.model_fields.keys()
    assert ServerOptions.model_fields.keys() > FROM_ENVIRONMENT


# ── environment and command line ──


def test_the_environment_fills_in_names(file: Path) -> None:
    options = read(
        file, "metrics_config=$$HOME$$/m.yaml\ndefault_service_handler=a$$B$$", environ={"HOME": "/h", "B": "x"}
    )
    assert options.options.metrics_config == "/h/m.yaml"
    assert options.options.default_service_handler == "a$$B$$", "names of one character are none, as in TorchServe"
    assert options.properties["metrics_config"] == "$$HOME$$/m.yaml", "a secret does not end up in a snapshot"


def test_a_name_that_the_environment_has_not(file: Path) -> None:
    with pytest.raises(ConfigError, match=r":2: metrics_config: Invalid Environment Variable NOWHERE$"):
        read(file, "metrics_config=$$NOWHERE$$/m.yaml")


def test_the_environment_counts_only_where_the_file_says_so(file: Path) -> None:
    environ = {"TS_JOB_QUEUE_SIZE": "9", "TS_TOKEN_EXPIRATION_TIME_MIN": "3", "TS_ALLOWED_URLS": "x"}
    assert read(file, "job_queue_size=7", environ=environ).options.job_queue_size == 7
    options = read(file, "job_queue_size=7\nenable_envvars_config=true", {"job_queue_size": 8}, environ).options
    assert (options.job_queue_size, options.token_expiration_min, options.allowed_urls) == (9, 3, [])
    both = "enable_envvars_config=true\nuse_env_allowed_urls=true"
    assert read(file, both, environ=environ).options.allowed_urls == ["x"]


def test_a_wrong_value_in_the_environment_is_not_blamed_on_the_file(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(file, "enable_envvars_config=true", environ={"TS_MAX_REQUEST_SIZE": "big"})
    assert str(caught.value) == ('environment: TS_MAX_REQUEST_SIZE: found "big" (a string), allowed: an integer >= 1')


def test_names_in_the_environment() -> None:
    assert environment_name("model_store") == "TS_MODEL_STORE"
    assert environment_name("token_expiration_min") == "TS_TOKEN_EXPIRATION_TIME_MIN"
    assert environment_name("metric_time_interval") is None, "TorchServe reads none for it"


def test_the_command_line_stands_over_the_file(file: Path) -> None:
    given = {"model_store": "mine", "enable_model_api": True, "load_models": ["a", "b"], "lenient": True}
    properties = read(file, "enable_model_api=false\nload_models=(", given)
    assert (properties.options.model_store, properties.options.enable_model_api) == ("mine", True)
    assert dict(properties.properties) == {"model_store": "mine", "enable_model_api": "true", "load_models": "a,b"}


def test_a_start_without_a_store_or_a_file(file: Path) -> None:
    with pytest.raises(StartupError, match=r"^Missing mandatory parameter --model-store$"):
        read_properties(None, {}, {})
    with pytest.raises(ConfigError, match=r"config.properties: found a file that cannot be read .No such file"):
        read_properties(file, {}, {})
