import pytest

from minserve.errors import BadRequest
from minserve.frontend.parameters import Parameters, flag


@pytest.mark.parametrize(
    ("value", "whole", "seconds"),
    [
        ("4", 4, 4.0),
        ("0", 0, None),
        ("-1", None, None),
        ("2.5", None, 2.5),
        ("", None, None),
        ("many", None, None),
        ("nan", None, None),
        ("1e400", None, None),
        ("2147483647", 2147483647, 2147483647.0),
        ("2147483648", None, None),
        (None, None, None),
    ],
)
def test_a_number_of_a_query_that_is_none_counts_as_not_given(
    value: str | None, whole: int | None, seconds: float | None
) -> None:
    parameters = Parameters.of_query({} if value is None else {"a": value})
    assert parameters.whole("a", least=0) == whole
    assert parameters.seconds("a") == seconds


@pytest.mark.parametrize(
    ("value", "whole"), [(b"4", 4), (b"4.0", 4), (b'"4"', 4), (b"-1", None), (b"null", None), (b"0", None)]
)
def test_a_number_of_json_may_be_written_as_text(value: bytes, whole: int | None) -> None:
    assert Parameters.of_json(b'{"a": %s}' % value).whole("a", least=1) == whole


@pytest.mark.parametrize("value", [b'"many"', b"2.5", b"true", b"[1]", b'"nan"'])
def test_another_value_of_json_is_an_error_that_names_the_key(value: bytes) -> None:
    parameters = Parameters.of_json(b'{"batch_size": %s}' % value)
    with pytest.raises(BadRequest) as caught:
        parameters.whole("batch_size", least=1)
    assert str(caught.value) == f"batch_size: found {value.decode()}, allowed: a whole number up to 2147483647"
    with pytest.raises(BadRequest, match="startup_timeout: found 1e300, allowed: a number of seconds up to 2147483647"):
        Parameters.of_json(b'{"startup_timeout": 1e300}').seconds("startup_timeout")


def test_texts_and_flags_of_json_have_their_types() -> None:
    parameters = Parameters.of_json(b'{"url": 1, "synchronous": 0, "on": true, "off": "False", "none": null}')
    assert parameters.flag("on", default=False) is True
    assert parameters.flag("off", default=True) is False
    assert parameters.flag("none", default=True) is True
    assert parameters.text("none") is None
    with pytest.raises(BadRequest, match="url: found 1, allowed: a string"):
        parameters.text("url")
    with pytest.raises(BadRequest, match="synchronous: found 0, allowed: true or false"):
        parameters.flag("synchronous", default=True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"{url", "the body is not JSON"),
        (b'{"url": "\xff"}', "the body is not JSON"),
        (b"[1]", r"the body: found \[1\], allowed: a JSON object"),
        (b'"%s"' % (b"x" * 500), "the body: found .{101}, allowed"),
        (b'{"url":' + b"[" * 100_000, "the body is nested too deeply"),
    ],
)
def test_a_body_that_is_no_object_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        Parameters.of_json(body)


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [("true", False, True), ("TRUE", False, True), ("1", True, False), ("", True, False), (None, True, True)],
)
def test_only_true_is_true(text: str | None, default: bool, value: bool) -> None:
    assert flag(text, default) is value
