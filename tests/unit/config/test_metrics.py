from pathlib import Path

import pytest

from minserve.config.metrics import declared_metrics, server_metrics
from minserve.config.server import ServerOptions
from minserve.errors import ConfigError
from minserve.telemetry.declarations import DEFAULT, Declaration

GOOD = """
dimensions:
  - &level Level
  - &hostname Hostname
ts_metrics:
  counter:
    - {name: Requests2XX, unit: Count, dimensions: [*level, *hostname]}
model_metrics:
  histogram:
    - {name: HandlerTime, unit: ms, dimensions: [ModelName, *level]}
  gauge:
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.yaml"


def test_without_a_file_there_are_the_usual_metrics() -> None:
    assert declared_metrics("") == DEFAULT


def test_a_file_declares_all_that_there_is(file: Path) -> None:
    file.write_text(GOOD)
    declared = declared_metrics(str(file))
    assert declared.server == (Declaration("Requests2XX", "counter", "Count", ("Level", "Hostname")),)
    assert declared.model == (Declaration("HandlerTime", "histogram", "ms", ("ModelName", "Level")),)
    metrics = server_metrics(ServerOptions(metrics_config=str(file)))
    metrics.answered(200)
    metrics.answered(404)
    assert "Requests2XX{" in metrics.text()
    assert "Requests4XX" not in metrics.text()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model_metrics: {gauge: [{unit: ms}]}", "1: model_metrics.gauge[0].name: found null"),
        ("model_metrics: {gauge: [{name: A, unit: 3}]}", "model_metrics.gauge[0].unit: found 3 (an integer)"),
        ("model_metrics: {gauge: [{name: A b, unit: s}]}", 'model_metrics.gauge[0].name: found "A b"'),
        ("model_metrics: {gauge: [{name: minserve_x, unit: s}]}", "does not begin with minserve_"),
        ("model_metrics: {meter: []}", "model_metrics.meter: found an unknown kind 'meter'"),
        ("model_metrics: {gauge: {name: A}}", "model_metrics.gauge: found a map, allowed: a list of metrics"),
        ("model_metrics: {gauge: [A]}", 'model_metrics.gauge[0]: found "A" (a string)'),
        ("model_metrics: [A]", "model_metrics: found "),
        (
            "model_metrics: {gauge: [{name: A, unit: s}], counter: [{name: A, unit: s}]}",
            "model_metrics.counter[0].name: found A a second time",
        ),
        ("model_metrics: {gauge: [{name: A, unit: s, dimensions: [Hostname]}]}", "are the server's"),
        ("model_metrics: {gauge: [{name: A, unit: s, dimensions: [B, B]}]}", "dimensions[1]: found B a second time"),
        ("model_metrics: {gauge: [{name: A, unit: s, label: [B]}]}", "found an unknown key 'label'"),
        ("ts_metrics: {gauge: [{name: QueueTime, unit: s, dimensions: [H]}]}", "found 1 dimensions, allowed: 2, as in"),
        ("ts_metrics: {gauge: [{name: A, unit: s}]}", "found no dimension"),
        ("metrics: {}", "metrics: found an unknown key 'metrics'"),
        ("[", "found broken YAML"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_key(file: Path, text: str, complaint: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        declared_metrics(str(file))
    assert complaint in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        declared_metrics("/nonexistent/metrics.yaml")


def test_in_mode_log_a_name_may_have_blanks(file: Path) -> None:
    file.write_text("model_metrics: {gauge: [{name: A b, unit: s, dimensions: [Model Name]}]}")
    assert declared_metrics(str(file), "log").model[0].name == "A b"
