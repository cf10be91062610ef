"""What is wrong with a configuration file, in a form that a person can act on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from minserve.errors import ConfigError

_LONGEST_VALUE = 60


@dataclass(frozen=True)
class Problem:
    """One thing wrong, or doubtful, in a file. `str()` is the line that an operator reads.

    Attributes:
        file: path of the file, as the caller gave it.
        line: line in the file, from 1; None where there is none, as for a missing file.
        key: the key as a path, such as `torchrun.nproc-per-node` or `deviceIds[1]`.
        found: what stands there.
        allowed: what may stand there.
        hint: what to do, in a few words; may be empty.
        severity: an error stops the model, a warning does not.
    """

    file: str
    line: int | None
    key: str
    found: str
    allowed: str
    hint: str = ""
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        subject = f"{place}: {self.key}" if self.key else place
        text = f"{subject}: found {self.found}, allowed: {self.allowed}"
        return f"{text}; {self.hint}" if self.hint else text


def describe_value(value: object) -> str:
    """Say what a YAML value is, its type included: `"4" (a string)`, `true (a boolean)`, `a map`."""
    match value:
        case None:
            return "null"
        case bool():
            return f"{str(value).lower()} (a boolean)"
        case int():
            return f"{_shortened(str(value))} (an integer)"
        case float():
            return f"{value} (a float)"
        case str():
            return f"{_shortened(json.dumps(value, ensure_ascii=False))} (a string)"
        case Mapping():
            return "a map"
        case list():
            return f"{_shortened(json.dumps(value, ensure_ascii=False, default=str))} (a list)"
        case _:
            return f"{_shortened(str(value))} (a {type(value).__name__})"


def raise_errors(problems: Iterable[Problem]) -> None:
    """Raise one ConfigError that lists the errors among the problems, one a line, or return if there is none.

    Raises:
        ConfigError: at least one problem is an error.
    """
    errors = [str(problem) for problem in problems if problem.severity == "error"]
    if errors:
        raise ConfigError("\n".join(errors))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
