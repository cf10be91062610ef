"""Strict YAML: values with the line each stands on, and every way a file can be broken as a `Problem`.

PyYAML's safe loader keeps the last of two equal keys and says nothing, expands aliases without a limit, and forgets
where a value stood. So the node tree is walked once before the values are made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from minserve.config.problems import Problem

YamlPath = tuple[str | int, ...]

MAX_BYTES = 256 * 1024
# Counted with every alias expanded: a few hundred bytes of nested anchors stand for billions of values.
MAX_VALUES = 20_000
MAX_DEPTH = 64

_TAG_PREFIX = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class YamlDocument:
    """A file's values and where they stand.

    Attributes:
        file: path of the file, as the caller gave it.
        data: the top-level mapping, or None when the file cannot be read as one.
        lines: line, from 1, of every key and list item, by path.
        problems: what is wrong with the file as YAML.
        dangerous: it was not read on purpose: it is too large, or would be once its aliases are expanded.
    """

    file: str
    data: Mapping[str, object] | None
    lines: Mapping[YamlPath, int] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    dangerous: bool = False

    def line(self, path: YamlPath) -> int | None:
        """Return the line of a value, or of the nearest map or list around it (a merged key has no line of its own)."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)

    def problem(
        self,
        path: YamlPath,
        *,
        found: str,
        allowed: str,
        hint: str = "",
        severity: Literal["error", "warning"] = "error",
    ) -> Problem:
        """Make a problem about the value at `path`."""
        return Problem(self.file, self.line(path), _key(path), found, allowed, hint, severity)


def read_yaml(path: Path) -> YamlDocument:
    """Read a file. Never raises: what is wrong is in the document's `problems`."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        return _unreadable(str(path), None, f"a file that cannot be read ({reason})", "a readable file")
    return parse_yaml(content, str(path))


def parse_yaml(content: bytes, file: str) -> YamlDocument:
    """Parse the content of `file`. An empty one is an empty mapping. Never raises.

    A duplicate key leaves the last value in `data`, so that the rest of the file can be checked too; after any other
    problem `data` is None.
    """
    if len(content) > MAX_BYTES:
        return _unreadable(file, None, "a larger file", f"at most {MAX_BYTES} bytes", dangerous=True)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return _unreadable(file, line, f"the byte 0x{content[error.start]:02x}, not UTF-8", "text in UTF-8")
    try:
        return _parse(text, file)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return _unreadable(file, line, f"the character U+{ord(text[error.position]):04X}", "printable characters")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(part for part in (error.context, error.problem) if part)
        return _unreadable(file, mark.line + 1 if mark else None, f"broken YAML ({reason})", "valid YAML")
    except RecursionError:
        return _unreadable(file, None, "values nested too deeply", f"at most {MAX_DEPTH} levels", dangerous=True)


def _parse(text: str, file: str) -> YamlDocument:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None or root.tag == _TAG_PREFIX + "null":
            return YamlDocument(file, {})
        walk = _Walk(file)
        kind = root.tag.removeprefix(_TAG_PREFIX)
        if kind != "map":  # `!!set` is a mapping node too
            walk.report((), root, f"a {kind} at the top level", "a mapping (lines of `key: value`)")
        elif walk.visit(root, ()):
            data = loader.construct_document(root)
            return YamlDocument(file, data, walk.lines, tuple(walk.problems))
        return YamlDocument(file, None, walk.lines, tuple(walk.problems), walk.endless)
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """The safe loader; whatever a constructor raises has a line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
            # 2026-13-45 is no date; `!!int x`, `!!bool maybe` and `!!timestamp x` each raise something else.
            kind = node.tag.removeprefix(_TAG_PREFIX)
            raise yaml.constructor.ConstructorError(None, None, f"not a valid {kind}", node.start_mark) from error


class _Walk:
    """One pass over the node tree: the lines of all values, and what the loader would let pass."""

    def __init__(self, file: str) -> None:
        self.lines: dict[YamlPath, int] = {}
        self.problems: list[Problem] = []
        self.endless = False
        self._file = file
        self._visited = 0

    def report(self, path: YamlPath, node: yaml.Node, found: str, allowed: str) -> None:
        self.problems.append(Problem(self._file, node.start_mark.line + 1, _key(path), found, allowed))

    def visit(self, node: yaml.Node, path: YamlPath) -> bool:
        """Walk the values under `path`; False when no values should be made of this tree."""
        self._visited += 1
        if self._visited > MAX_VALUES or len(path) > MAX_DEPTH:
            limit = f"at most {MAX_VALUES} values, {MAX_DEPTH} levels deep, aliases expanded"
            self.report(path[:1], node, "too many values", limit)
            self.endless = True
            return False
        self.lines.setdefault(path, node.start_mark.line + 1)
        if node.tag not in yaml.SafeLoader.yaml_constructors:
            tag = node.tag.replace(_TAG_PREFIX, "!!")
            self.report(path, node, f"the tag {tag}", "plain YAML values, without tags")
            return False
        if isinstance(node, yaml.MappingNode):
            return self._visit_mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return all(self.visit(item, (*path, index)) for index, item in enumerate(node.value))
        return True

    def _visit_mapping(self, node: yaml.MappingNode, path: YamlPath) -> bool:
        first_lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or (not path and not key.tag.endswith((":str", ":merge"))):
                kind = key.tag.removeprefix(_TAG_PREFIX)
                self.report(path, key, f"a key of type {kind}", "keys that are text (quote it)")
                return False
            at = (*path, key.value)
            line = key.start_mark.line + 1
            if (key.tag, key.value) in first_lines:
                first = first_lines[key.tag, key.value]
                self.report(at, key, f"the key again (first on line {first})", "each key once")
            first_lines.setdefault((key.tag, key.value), line)
            self.lines[at] = line
            if not self.visit(value, at):
                return False
        return True


def _key(path: YamlPath) -> str:
    """Write a path as `torchrun.nproc-per-node` or `deviceIds[1]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _unreadable(file: str, line: int | None, found: str, allowed: str, dangerous: bool = False) -> YamlDocument:
    return YamlDocument(file, None, problems=(Problem(file, line, "", found, allowed),), dangerous=dangerous)
