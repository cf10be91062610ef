import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from minserve.telemetry.declarations import Declaration
from minserve.telemetry.series import Family, Histogram, number

HOST = (("Level", "Host"), ("Hostname", "here"))


def family(kind: str = "counter", name: str = "Requests2XX") -> Family:
    return Family(Declaration(name, kind, "Count", ("Level", "Hostname")))  # type: ignore[arg-type]


def text(family: Family, *names: str) -> str:
    return "".join(family.lines(names))


def test_a_counter_keeps_its_name_and_each_label_has_its_comma() -> None:
    counter = family()
    counter.series(HOST).record(1)
    counter.series(HOST).record(2.5)
    assert text(counter) == (
        "# HELP Requests2XX Torchserve prometheus counter metric with unit: Count\n"
        "# TYPE Requests2XX counter\n"
        'Requests2XX{Level="Host",Hostname="here",} 3.5\n'
    )


def test_a_gauge_is_its_last_value() -> None:
    gauge = family("gauge")
    gauge.series(HOST).record(1)
    gauge.series(HOST).record(-2)
    assert text(gauge).endswith('{Level="Host",Hostname="here",} -2.0\n')


def test_a_metric_without_a_series_has_its_head() -> None:
    assert text(family()).count("\n") == 2
    assert text(family(), "Requests2XX") == ""


def test_a_histogram_counts_each_value_into_the_first_bucket_that_holds_it() -> None:
    histogram = family("histogram", "Size")
    for value in (0.005, 0.0051, 10, 11):
        histogram.series((("a", "b"),)).record(value)
    lines = text(histogram).splitlines()[2:]
    assert lines[:2] == ['Size_bucket{a="b",le="0.005",} 1.0', 'Size_bucket{a="b",le="0.01",} 2.0']
    assert lines[-4:] == [
        'Size_bucket{a="b",le="10.0",} 3.0',
        'Size_bucket{a="b",le="+Inf",} 4.0',
        'Size_count{a="b",} 4.0',
        'Size_sum{a="b",} 21.0101',
    ]


def test_names_choose_among_the_samples_of_a_histogram() -> None:
    histogram = family("histogram", "Size")
    histogram.series(()).record(1)
    assert text(histogram, "Size_sum", "other").splitlines()[1:] == ["# TYPE Size histogram", "Size_sum 1.0"]
    assert text(histogram, "Size") == ""


def test_many_of_one_value_count_as_many() -> None:
    one_by_one, at_once = Histogram(), Histogram()
    for _ in range(3):
        one_by_one.record(0.3)
    at_once.record_many(0.3, 3)
    assert at_once.buckets() == one_by_one.buckets()
    assert at_once.total == pytest.approx(one_by_one.total)


@pytest.mark.parametrize("value", ['"', "\\", "\n", "\\n", "é", 'a",b="', ""])
def test_no_label_breaks_the_text(value: str) -> None:
    counter = family()
    counter.series((("label", value), ("other", "x"))).record(1)
    (parsed,) = text_string_to_metric_families(text(counter))
    assert [sample.labels for sample in parsed.samples] == [{"label": value, "other": "x"}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, "1.0"), (0.1, "0.1"), (math.inf, "+Inf"), (-math.inf, "-Inf"), (math.nan, "NaN"), (2**40, "1099511627776.0")],
)
def test_numbers_are_written_as_prometheus_reads_them(value: float, expected: str) -> None:
    assert number(value) == expected
