from __future__ import annotations

import io
import json
import logging
import sys
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minserve.errors import WireError
from minserve.rank.data import Refused, check_answers, decode_batch, encode_answer
from minserve.wire.messages import Part, RequestMeta, new_batch
from tests.unit.rank.rig import requests


def decode(content_type: str, body: bytes) -> object:
    """What the handler of a batch of one gets as "body"."""
    (row,) = decode_batch(new_batch(requests(body, content_type=content_type)), bytearray(body))
    assert row.keys() == {"body"}
    return row["body"]


@pytest.mark.parametrize(
    ("content_type", "body", "value"),
    [
        ("application/json", b'{"a": [1, null]}', {"a": [1, None]}),
        ("Application/JSON ; charset=utf-8", '"ä"'.encode(), "ä"),
        ("application/json", b"7", 7),
        ("application/json;charset=utf-16", '{"ä": 1}'.encode("utf-16"), {"ä": 1}),
        ("application/json", b"[1,", bytearray(b"[1,")),
        ("application/json", b"", bytearray()),
        ("application/json", b"\xff\xfe\xff", bytearray(b"\xff\xfe\xff")),
        ("application/json", b"[" * 100_000, bytearray(b"[" * 100_000)),
        ("application/json", b"9" * 5000, bytearray(b"9" * 5000)),  # over Python's limit on digits
        ("text/plain", "grüß".encode(), "grüß"),
        ("TEXT/csv; header=present", b"a,b", "a,b"),
        ("text/plain", b"\xff", bytearray(b"\xff")),
        ("text/plain", b"", ""),
        ("application/jsonlines", b"{}", bytearray(b"{}")),
        ("application/octet-stream", b"{}", bytearray(b"{}")),
        ("image/png", b"\x89PNG", bytearray(b"\x89PNG")),
        ("", b"{}", bytearray(b"{}")),
        ("; charset=utf-8", b"x", bytearray(b"x")),
    ],
)
def test_a_body_is_decoded_by_its_content_type(content_type: str, body: bytes, value: object) -> None:
    decoded = decode(content_type, body)
    assert decoded == value
    assert type(decoded) is type(value)


def test_bodies_stay_bytes_where_nothing_is_to_be_parsed() -> None:
    one = requests(b"[1]", content_type="application/json")
    two = requests(b"[1]", b"x", content_type="text/plain")
    assert decode_batch(new_batch(one), bytearray(b"[1]"), parse=False) == [{"body": bytearray(b"[1]")}]
    rows = decode_batch(new_batch(two), bytearray(b"[1]x"), parse=False)
    assert rows == [{"body": bytearray(b"[1]")}, {"body": bytearray(b"x")}]
    assert all(type(row["body"]) is bytearray for row in rows)


def test_what_does_not_parse_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        decode("application/json", b"[1,")
    assert "a body of type application/json does not parse" in caplog.text


def test_a_single_raw_body_is_not_copied() -> None:
    body = bytearray(b"raw")
    (row,) = decode_batch(new_batch(requests(b"raw")), body)
    assert row["body"] is body


def test_bodies_of_a_batch_are_bytearrays_of_their_own() -> None:
    body = bytearray(b"abcd")
    rows = decode_batch(new_batch(requests(b"a", b"bcd")), body)
    assert rows == [{"body": bytearray(b"a")}, {"body": bytearray(b"bcd")}]
    first = rows[0]["body"]
    assert isinstance(first, bytearray)
    first += b"!"  # the handler may do as it likes: nobody else sees it
    assert body == b"abcd"


def test_form_fields_are_decoded_each_by_its_own_type() -> None:
    form = (Part("image", "image/png", 3), Part("options", "application/json", 2), Part("note", "", 2))
    batch = new_batch((RequestMeta("a", (), form), *requests(b"raw")))
    assert decode_batch(batch, bytearray(b"png{}hiraw")) == [
        {"image": bytearray(b"png"), "options": {}, "note": bytearray(b"hi")},
        {"body": bytearray(b"raw")},
    ]


@pytest.mark.parametrize("empty_first", [True, False])
def test_a_request_without_parts_has_a_row_all_the_same(empty_first: bool) -> None:
    """`curl -d ''` sends an empty form: no part at all. Its neighbour in the batch must not get its place."""
    empty, raw = RequestMeta("empty", (), ()), requests(b"raw")[0]
    rows = decode_batch(new_batch((empty, raw) if empty_first else (raw, empty)), bytearray(b"raw"))
    expected: list[dict[str, object]] = [{}, {"body": bytearray(b"raw")}]
    assert rows == (expected if empty_first else expected[::-1])


@pytest.mark.parametrize("body", [b"ab", b"abcd"])
def test_parts_that_do_not_cover_the_body_are_a_wire_error(body: bytes) -> None:
    with pytest.raises(WireError):
        decode_batch(new_batch(requests(b"abc")), bytearray(body))


# ── answers ──


@pytest.mark.parametrize("answers", [["a", "b"], ("a", "b")])
def test_a_list_or_tuple_of_the_right_length_passes(answers: object) -> None:
    assert check_answers(answers, 2) == ["a", "b"]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["a"], "number of batch response mismatched: 2 requests, 1 answers"),
        (["a", "b", "c"], "2 requests, 3 answers"),
        ([], "2 requests, 0 answers"),
        (None, "handle must return a list, not a NoneType"),
        ("ab", "not a str"),
        ({0: "a", 1: "b"}, "not a dict"),
        (iter(["a", "b"]), "not a list_iterator"),
    ],
)
def test_anything_else_is_refused(answers: object, message: str) -> None:
    with pytest.raises(Refused, match=message):
        check_answers(answers, 2)


STRIDED = memoryview(b"a-b-c")[::2]
FLOATS = memoryview(bytes(8)).cast("f")
EMPTY_MATRIX = memoryview(memoryview(bytes(6)).cast("B", (2, 3))[:0])


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (b"raw\x00", b"raw\x00"),
        (bytearray(b"raw"), b"raw"),
        (STRIDED, b"abc"),
        (EMPTY_MATRIX, b""),
        ("grüß", "grüß".encode()),
        ("\udcff", b"\xff"),  # bytes that were decoded with surrogateescape come out as they were
        ("", b""),
        (None, b"null"),
        (True, b"true"),
        (0.1, b"0.1"),
        ([], b"[]"),
        ({"a": "ä"}, b'{\n  "a": "\\u00e4"\n}'),
    ],
)
def test_an_answer_becomes_bytes(value: object, encoded: bytes) -> None:
    body = encode_answer(value, 0)
    assert bytes(body) == encoded
    assert len(body) == len(encoded)


def test_the_length_of_a_wide_view_is_in_bytes() -> None:
    assert len(encode_answer(FLOATS, 0)) == 8


@pytest.mark.parametrize("value", [b"x" * 10, bytearray(10)])
def test_bytes_are_not_copied(value: object) -> None:
    assert encode_answer(value, 0) is value


CYCLE: list[object] = []
CYCLE.append(CYCLE)
DEEP: list[object] = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1, 2}, "Unsupported model output data type: answer 3 is of type set"),
        ([object()], "answer 3 is of type list: Object of type object is not JSON serializable"),
        ({(1, 2): 3}, "keys must be str"),
        ([b"x"], "Object of type bytes"),
        (CYCLE, "Circular reference"),
        (DEEP, "recursion"),
        ("\ud800", "answer 3 is of type str: 'utf-8' codec"),
    ],
    ids=["set", "object", "key", "bytes", "cycle", "deep", "surrogate"],
)
def test_what_has_no_encoding_is_refused_by_name(value: object, message: str) -> None:
    with pytest.raises(Refused, match=message):
        encode_answer(value, 3)


KEYS = st.text(st.characters()) | st.integers() | st.floats() | st.booleans() | st.none()
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4))


@given(JSON.filter(lambda value: not isinstance(value, str)))
@example([float("nan"), float("inf"), -float("inf"), -0.0, 1e-7, 10**400])
@example({"": {}, "a": [[], {}, [[]], [{}]], "\ud800": "\u2028/\x7f"})
@example((1, (2,), ()))
def test_json_is_byte_for_byte_what_torchserve_sends(value: object) -> None:
    assert encode_answer(value, 0) == json.dumps(value, indent=2).encode()


class NotATensor:
    """Stands for a Tensor of a torch that this process has not imported."""


def test_a_tensor_is_known_only_where_the_handler_has_imported_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(Tensor=NotATensor, save=lambda tensor, buffer: buffer.write(b"saved"))
    monkeypatch.setitem(sys.modules, "torch", fake)
    assert encode_answer(NotATensor(), 0) == b"saved"
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(Refused, match="NotATensor"):
        encode_answer(NotATensor(), 0)
    assert "torch" not in sys.modules


def test_a_tensor_comes_back_from_torch_load() -> None:
    import torch

    tensor = torch.arange(6).reshape(2, 3)
    assert torch.equal(torch.load(io.BytesIO(encode_answer(tensor, 0))), tensor)
    with pytest.raises(Refused, match="Object of type Tensor is not JSON serializable"):
        encode_answer([tensor], 0)
