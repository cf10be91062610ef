import warnings

import pytest

from minserve.errors import BadRequest
from minserve.frontend.multipart import MAX_HEAD, MAX_PADDING, parts_of

FORM = "multipart/form-data; boundary=b"
HEAD = b'Content-Disposition: form-data; name="a"\r\n'
PART = b"--b\r\n" + HEAD + b"\r\n"


def parts(body: bytes, content_type: str = FORM) -> list[tuple[str, str, bytes]]:
    return [(part.name, part.content_type, bytes(part.value)) for part in parts_of(body, content_type)]


@pytest.mark.parametrize(
    "value",
    [b"", b"1", b"\r\n", b"--", b"x--b", b"-", b"\r\n-", b"\r\n--a", b"\r\n\r\n", b"\n--b--\n", b"\x00\xff" * 9],
)
def test_a_value_is_what_lies_between_head_and_boundary(value: bytes) -> None:
    assert parts(PART + value + b"\r\n--b--\r\n") == [("a", "", value)]


@pytest.mark.parametrize(
    "body",
    [
        PART + b"1\r\n--b--",  # no line end behind the last boundary
        b"a word before\r\n" + PART + b"1\r\n--b--\r\n",
        b"\r\n" + PART + b"1\r\n--b--\r\n",
        PART + b"1\r\n--b--\r\nand one behind\r\n" + PART,
        PART.replace(b"--b\r", b"--b \t \r") + b"1\r\n--b-- \t\r\n",
        PART.replace(b"Content-Disposition", b"content-DISPOSITION") + b"1\r\n--b--\r\n",
        PART.replace(b'"a"', b"a") + b"1\r\n--b--\r\n",
    ],
)
def test_what_the_standard_allows_around_the_parts_is_taken(body: bytes) -> None:
    assert parts(body) == [("a", "", b"1")]


def test_a_value_without_a_byte_needs_no_line_of_its_own() -> None:
    assert parts(b"--b\r\n" + HEAD + b"\r\n--b--\r\n") == [("a", "", b"")]


def test_no_part_at_all_is_a_form() -> None:
    assert parts(b"--b--\r\n") == []


def test_parts_come_in_their_order_and_twice_if_they_are_sent_twice() -> None:
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%s"\r\nContent-Type: %s\r\n\r\n%s\r\n' % part
        for part in ((b"x", b"image/png", b"1"), (b"a", b"text/plain", b"2"), (b"x", b"text/plain", b"3"))
    )
    assert parts(body + b"--b--\r\n") == [
        ("x", "image/png", b"1"),
        ("a", "text/plain", b"2"),
        ("x", "text/plain", b"3"),
    ]


def test_a_value_is_a_view_of_the_body_and_no_copy() -> None:
    body = PART + b"x" * 1000 + b"\r\n--b--\r\n"
    (part,) = parts_of(body, FORM)
    assert part.value.obj is body


@pytest.mark.parametrize(
    "content_type",
    [
        'multipart/form-data; boundary="b"',
        "multipart/form-data;boundary=b",
        "multipart/form-data; charset=utf-8; boundary=b",
        "Multipart/Form-Data; Boundary=b",
    ],
)
def test_a_boundary_may_be_spelt_in_several_ways(content_type: str) -> None:
    assert parts(PART + b"1\r\n--b--\r\n", content_type) == [("a", "", b"1")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b'name="a b"', "a b"),
        ('name="ä"'.encode(), "ä"),
        (b"name*=utf-8''%C3%A4", "ä"),
        (b'name="a\\"b"', 'a"b'),
        (b'filename="x.png"; name="a"', "a"),
    ],
)
def test_a_name_may_be_spelt_in_several_ways(name: bytes, expected: str) -> None:
    body = b"--b\r\nContent-Disposition: form-data; " + name + b"\r\n\r\n1\r\n--b--\r\n"
    assert parts(body) == [(expected, "", b"1")]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the boundary of the Content-Type is not in it"),
        (b"--c\r\n\r\n--c--\r\n", "the boundary of the Content-Type is not in it"),
        (b"x--b\r\n\r\n--b--\r\n"[:6], "the boundary of the Content-Type is not in it"),
        (b"--b", "there is something else behind a boundary"),
        (b"--b-\r\n", "there is something else behind a boundary"),
        (PART.replace(b"--b\r", b"--bc\r") + b"1\r\n--b--\r\n", "there is something else behind a boundary"),
        (b"--b" + b" " * MAX_PADDING + b"\r\n", "there is something else behind a boundary"),
        (b"--b\r\n", "the headers of a part have no end"),
        (b"--b\r\n" + HEAD, "the headers of a part have no end"),
        (b"--b\r\nX: " + b"a" * MAX_HEAD + b"\r\n\r\n1\r\n--b--\r\n", f"or are over {MAX_HEAD} bytes"),
        (PART + b"1", "there is no boundary at its end"),
        (PART + b"1\r\n--", "there is no boundary at its end"),
        (PART + b"1--b--\r\n", "there is no boundary at its end"),
        (PART + b"1\r\n--b\r\n" + HEAD + b"\r\n2", "there is no boundary at its end"),
        (b"--b\r\n\r\n1\r\n--b--\r\n", "a part without a name"),
        (PART.replace(b"; name=", b"; file=") + b"1\r\n--b--\r\n", "a part without a name"),
        (PART.replace(b'"a"', b'""') + b"1\r\n--b--\r\n", "a part without a name"),
        (b"--b\r\nnonsense\r\n\r\n1\r\n--b--\r\n", "a part with bad headers"),
        (b"--b\r\n" + HEAD + b"X\x00: 1\r\n\r\n1\r\n--b--\r\n", "a part with bad headers"),
        (PART.replace(b'name="a"', b"name*=nonsense''%41") + b"1\r\n--b--\r\n", "a part without a name"),
        (PART.replace(b'name="a"', b"name*=utf-8''%ff") + b"1\r\n--b--\r\n", "a part without a name"),
        (PART.replace(b'name="a"', b"name*0=a'b") + b"1\r\n--b--\r\n", "a part with bad headers"),
        (
            b"--b\r\n" + HEAD + b"Content-Type: Multipart/mixed; boundary=c\r\n\r\n1\r\n--b--\r\n",
            "a multipart inside a multipart",
        ),
    ],
)
def test_a_body_that_is_no_form_is_refused_with_what_is_wrong(body: bytes, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parts(body)
    assert str(caught.value).startswith("bad multipart body: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content_type", "message"),
    [
        ("multipart/form-data", "its Content-Type has no boundary"),
        ("multipart/form-data; boundary=", "its Content-Type has no boundary"),
        ("multipart/form-data; boundary=" + "b" * 71, "at most 70 characters, all ASCII"),
        ("multipart/form-data; boundary=ä", "at most 70 characters, all ASCII"),
    ],
)
def test_a_boundary_that_is_none_is_refused(content_type: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        parts(PART + b"1\r\n--b--\r\n", content_type)


def test_a_refusal_quotes_no_more_than_the_beginning() -> None:
    with pytest.raises(BadRequest) as caught:
        parts(b"--b\r\n" + b"n" * 8000 + b"\r\n\r\n1\r\n--b--\r\n")
    assert len(str(caught.value)) < 300


def test_a_clients_mistake_is_no_warning_of_ours() -> None:
    with warnings.catch_warnings(action="error"), pytest.raises(BadRequest):
        parts(PART.replace(b'name="a"', b"name*=utf-8''%ff") + b"1\r\n--b--\r\n")
