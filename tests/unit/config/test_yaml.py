from pathlib import Path

import pytest
import yaml as pyyaml
from hypothesis import given
from hypothesis import strategies as st

from minserve.config.yaml import MAX_BYTES, MAX_VALUES, parse_yaml, read_yaml

FILE = "model-config.yaml"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"# only a comment\n", b"---\n", b"\xef\xbb\xbf", b"null\n"])
def test_an_empty_file_is_an_empty_mapping(content: bytes) -> None:
    document = parse_yaml(content, FILE)
    assert document.data == {}
    assert document.problems == ()


def test_every_value_has_its_line() -> None:
    content = (
        b"# comment\nminWorkers: 1\ntorchrun:\n  nproc-per-node: 2\ndeviceIds:\n  - 0\n  - 1\nflow: {a: [1,\n  2]}\n"
    )
    document = parse_yaml(content, FILE)
    lines = {
        ("minWorkers",): 2,
        ("torchrun",): 3,
        ("torchrun", "nproc-per-node"): 4,
        ("deviceIds", 1): 7,
        ("flow", "a"): 8,
        ("flow", "a", 1): 9,
        ("torchrun", "absent"): 3,
        ("absent",): 2,
    }
    assert {path: document.line(path) for path in lines} == lines


def test_aliases_and_merge_keys_are_resolved() -> None:
    document = parse_yaml(b"base: &base {a: 1, b: 2}\nmine:\n  <<: *base\n  b: 3\nagain: *base\n", FILE)
    assert document.problems == ()
    assert document.data == {"base": {"a": 1, "b": 2}, "mine": {"a": 1, "b": 3}, "again": {"a": 1, "b": 2}}
    assert document.line(("mine", "a")) == 2  # the line of `mine`: a merged key has none of its own


NESTED_ALIASES = b"a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (level, level, b", ".join([b"*a%d" % (level - 1)] * 9)) for level in range(1, 10)
)
MERGED_ALIASES = b"a0: &a0 {x: 1}\n" + b"".join(
    b"a%d: &a%d {<<: [%s]}\n" % (level, level, b", ".join([b"*a%d" % (level - 1)] * 9)) for level in range(1, 10)
)

UNREADABLE = {
    "a tag of Python": (
        b"a: 1\nb: !!python/object/apply:os.system ['true']\n",
        "model-config.yaml:2: b: found the tag !!python/object/apply:os.system, allowed: plain YAML values, without tags",
    ),
    "a tag of someone": (b"a:\n  - !mine x\n", "model-config.yaml:2: a[0]: found the tag !mine"),
    "a tagged top level": (b"!mine\na: 1\n", "model-config.yaml:1: found a !mine at the top level"),
    "a list": (b"- a\n- b\n", "model-config.yaml:1: found a seq at the top level, allowed: a mapping"),
    "a word": (b"hello\n", "model-config.yaml:1: found a str at the top level, allowed: a mapping"),
    "a set": (b"!!set {a, b}\n", "model-config.yaml:1: found a set at the top level, allowed: a mapping"),
    "two documents": (b"a: 1\n---\nb: 2\n", "model-config.yaml:2: found broken YAML (expected a single document"),
    "a syntax error": (b"a: 1\nb: [1, 2\nc: 3\n", "model-config.yaml:3: found broken YAML (while parsing a flow"),
    "a tab": (b"a:\n\tb: 1\n", "model-config.yaml:2: found broken YAML (while scanning for the next token"),
    "no UTF-8": (b"a: 1\nb: \xff\n", "model-config.yaml:2: found the byte 0xff, not UTF-8, allowed: text in UTF-8"),
    "a control character": (b"a: 1\nb: \x07\n", "model-config.yaml:2: found the character U+0007, allowed: printable"),
    "an unknown alias": (b"a: *b\n", "model-config.yaml:1: found broken YAML (found undefined alias"),
    "no such date": (b"a:\n  day: 2026-13-45\n", "model-config.yaml:2: found broken YAML (not a valid timestamp)"),
    "no integer": (b"a: !!int x\n", "model-config.yaml:1: found broken YAML (not a valid int)"),
    "a key that is a number": (b"a: 1\n1: 2\n", "model-config.yaml:2: found a key of type int, allowed: keys that are"),
    "a key that is a list": (b"a:\n  ? [1]\n  : 2\n", "model-config.yaml:2: a: found a key of type seq"),
    "nested aliases": (NESTED_ALIASES, f"found too many values, allowed: at most {MAX_VALUES} values"),
    "nested merges": (MERGED_ALIASES, f"found too many values, allowed: at most {MAX_VALUES} values"),
    "an alias of itself": (b"a: &a [*a]\n", "model-config.yaml:1: a: found too many values"),
    "deep nesting": (b"a: " + b"[" * 200 + b"]" * 200, "model-config.yaml:1: a: found too many values"),
    "very deep nesting": (b"a: " + b"[" * 9999, "model-config.yaml: found values nested too deeply"),
    "a huge file": (b"#" * (MAX_BYTES + 1), f"model-config.yaml: found a larger file, allowed: at most {MAX_BYTES}"),
}


@pytest.mark.parametrize(("content", "message"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_file_that_cannot_be_read(content: bytes, message: str) -> None:
    document = parse_yaml(content, FILE)
    assert document.data is None
    (problem,) = document.problems
    assert problem.severity == "error"
    assert message in str(problem)


def test_all_duplicate_keys_are_found_and_the_last_value_stays() -> None:
    document = parse_yaml(b"a: 1\nb: {c: 1, c: 2}\na: 3\n'a': 4\n", FILE)
    assert document.data == {"a": 4, "b": {"c": 2}}
    assert [str(problem) for problem in document.problems] == [
        "model-config.yaml:2: b.c: found the key again (first on line 2), allowed: each key once",
        "model-config.yaml:3: a: found the key again (first on line 1), allowed: each key once",
        "model-config.yaml:4: a: found the key again (first on line 1), allowed: each key once",
    ]


def test_equal_text_of_another_type_is_another_key() -> None:
    assert parse_yaml(b"a: {1: x, '1': y}\n", FILE).problems == ()


def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    document = read_yaml(tmp_path / FILE)
    assert document.data is None
    assert "cannot be read (No such file or directory)" in str(document.problems[0])


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=6), VALUES, max_size=4))
def test_reads_what_a_yaml_writer_wrote(values: dict[str, object]) -> None:
    document = parse_yaml(pyyaml.safe_dump(values).encode(), FILE)
    assert document.problems == ()
    assert document.data == values


@given(st.binary(max_size=60) | st.text("ab:[]{}-&*! '\"\n\t#?|>%@`0.", max_size=40).map(str.encode))
def test_never_raises(content: bytes) -> None:
    document = parse_yaml(content, FILE)
    assert document.data is not None or document.problems
