import pytest

from minserve.telemetry import recorded as module
from minserve.telemetry.declarations import DEFAULT, Declaration, Declarations
from minserve.telemetry.metrics import Metrics
from minserve.wire.messages import Metric

OWN = (("ModelName", "m"), ("Level", "Model"))


def make(declared: Declarations = DEFAULT, *, auto_detect: bool = False) -> Metrics:
    return Metrics(declared, "prometheus", auto_detect, "here")


def value(
    name: str = "PredictionTime",
    number: float = 1.5,
    dimensions: tuple[tuple[str, str], ...] = OWN,
    kind: str = "gauge",
) -> Metric:
    return Metric(name, number, "Milliseconds", kind, dimensions, "a,b", 1800.2)


def samples(metrics: Metrics) -> list[str]:
    return [line for line in metrics.text().splitlines() if not line.startswith("#")]


def test_a_rank_above_0_has_a_label_of_its_own() -> None:
    metrics = make()
    metrics.from_rank(0, [value(number=1)])
    metrics.from_rank(3, [value(number=2)])
    assert samples(metrics) == [
        'PredictionTime{ModelName="m",Level="Model",Hostname="here",} 1.0',
        'PredictionTime{ModelName="m",Level="Model",Rank="3",Hostname="here",} 2.0',
    ]


def test_an_undeclared_metric_is_dropped_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    metrics = make()
    metrics.from_rank(0, [value("Calls"), value("Calls"), value()])
    assert len(samples(metrics)) == 1
    (text,) = caplog.messages
    assert "Calls is not declared in metrics_config" in text


@pytest.mark.parametrize("kind", ["counter", "gauge", "histogram"])
def test_with_auto_detect_it_is_taken_in_as_what_it_says_it_is(kind: str) -> None:
    metrics = make(auto_detect=True)
    metrics.from_rank(0, [value("Calls", 2, (("Level", "Model"),), kind)])
    metrics.from_rank(0, [value("Calls", 3, (("Level", "Model"),), kind)])
    text = metrics.text()
    assert f"# HELP Calls Torchserve prometheus {kind} metric with unit: Milliseconds\n# TYPE Calls {kind}\n" in text
    end = {"counter": "", "gauge": "", "histogram": "_sum"}[kind]
    expected = {"counter": 5.0, "gauge": 3.0, "histogram": 5.0}[kind]
    assert f'Calls{end}{{Level="Model",Hostname="here",}} {expected}\n' in text


@pytest.mark.parametrize(
    "bad",
    [
        value("two words"),
        value("minserve_workers"),
        value("CPUUtilization"),
        value("Calls", kind="summary"),
        value("Calls", dimensions=(("Hostname", "mine"),)),
        value("Calls", dimensions=(("a-b", "x"),)),
        value("Calls", dimensions=(("__name__", "x"),)),
        value("x" * 501),
        value("Calls", dimensions=tuple((f"l{number}", "x") for number in range(51))),
    ],
    ids=lambda bad: f"{bad.name[:20]} {bad.kind} {bad.dimensions[0][0]}",
)
def test_nothing_is_taken_in_that_would_cost_prometheus_the_rest(bad: Metric, caplog: pytest.LogCaptureFixture) -> None:
    metrics = make(auto_detect=True)
    before = metrics.text()
    metrics.from_rank(0, [bad])
    assert metrics.text() == before
    assert "cannot be taken in" in caplog.text


def test_of_two_equal_labels_the_first_counts() -> None:
    metrics = make(auto_detect=True)
    metrics.from_rank(0, [value("Calls", 1, (("Level", "Own"), ("ModelName", "m"), ("Level", "Model")))])
    assert samples(metrics) == ['Calls{Level="Own",ModelName="m",Hostname="here",} 1.0']


def test_another_number_of_dimensions_than_declared_is_told_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    metrics = make()
    metrics.from_rank(0, [value(dimensions=(("Level", "Model"),)), value(dimensions=(*OWN, ("More", "x")))])
    assert samples(metrics) == []
    (text,) = caplog.messages
    assert "has the dimensions ['Level'], declared are ['ModelName', 'Level', 'Hostname']" in text


@pytest.mark.parametrize("number", [-1.0, float("nan")])
def test_a_declared_counter_never_goes_down(number: float, caplog: pytest.LogCaptureFixture) -> None:
    metrics = make(Declarations((), (Declaration("Calls", "counter", "Count", ()),)))
    metrics.from_rank(0, [value("Calls", 3, ()), value("Calls", number, ())])
    assert samples(metrics) == ['Calls{Hostname="here",} 3.0']
    assert "cannot grow by" in caplog.text


def test_ever_new_labels_end_at_a_bound(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "MOST_SERIES", 5)
    metrics = make()
    for number in range(9):
        metrics.from_rank(0, [value(dimensions=(("ModelName", str(number)), ("Level", "Model")))])
    metrics.from_rank(0, [value(number=7, dimensions=(("ModelName", "0"), ("Level", "Model")))])
    assert len(samples(metrics)) == 5
    assert samples(metrics)[0].endswith(" 7.0")  # those that are there go on
    (text,) = caplog.messages
    assert "ever new values" in text
