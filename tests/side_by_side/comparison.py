"""Answers side by side: what each server said to each call, kept in a file, compared, and why some may differ."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from tests.side_by_side.calls import Answer
from tests.side_by_side.differences import REASONS
from tests.side_by_side.servers import running

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.side_by_side.lives import Life

Answers = dict[str, list[Answer]]
"""By "life: call"; for a pattern of the log an answer without a body, of status 1 if it is there and 0 if not."""


@dataclass(frozen=True)
class Difference:
    """Where the two do not say the same."""

    name: str
    theirs: list[Answer]
    ours: list[Answer]

    @property
    def fields(self) -> set[str]:
        """Names of the fields that differ."""
        pairs = zip(self.theirs, self.ours, strict=True)
        return {key for one, other in pairs for key, value in asdict(one).items() if value != asdict(other)[key]}

    @property
    def explained(self) -> bool:
        """Whether there is a reason for each field."""
        reason = REASONS.get(self.name)
        return reason is not None and self.fields <= reason.fields

    def __str__(self) -> str:
        lines = [self.name]
        for other, one in zip(self.theirs, self.ours, strict=False):
            for key, value in asdict(other).items():
                if value != asdict(one)[key]:
                    lines += [f"  {key}:", f"    theirs {value!r}", f"    ours   {asdict(one)[key]!r}"]
        return "\n".join(lines)


def live(
    command: Sequence[str], environ: Mapping[str, str], folder: Path, store: Path, lives: Sequence[Life]
) -> Answers:
    """Runs every life of a server and returns what it said."""
    answers: Answers = {}
    for life in lives:
        with running(command, environ, folder / life.name, store, life) as server:
            for call in life.calls:
                answers[f"{life.name}: {call.name}"] = server.ask(call)
        log = server.log()
        for pattern in life.log:
            found = re.search(pattern, log) is not None
            answers[f"{life.name}: log has {pattern}"] = [Answer(int(found), "", {}, "")]
    return answers


def compare(theirs: Answers, ours: Answers) -> list[Difference]:
    """Every call whose answers are not the same."""
    assert theirs.keys() == ours.keys(), theirs.keys() ^ ours.keys()
    differences = []
    for name, answers in theirs.items():
        alike = [_like(other, one) for other, one in zip(answers, ours[name], strict=True)]
        if alike != answers:
            differences.append(Difference(name, answers, alike))
    return differences


def _like(theirs: Answer, ours: Answer) -> Answer:
    """Ours without the fields that only our descriptions have: who reads JSON by its keys does not see them."""
    try:
        asked, given = json.loads(_quoted(theirs.body)), json.loads(_quoted(ours.body))
    except ValueError:
        return ours
    if _only(given, asked) == asked:
        return replace(ours, body=theirs.body)
    return ours


def _only(value: object, pattern: object) -> object:
    if isinstance(value, dict) and isinstance(pattern, dict):
        return {key: _only(value[key], pattern[key]) for key in value if key in pattern}
    if isinstance(value, list) and isinstance(pattern, list) and len(value) == len(pattern):
        return [_only(one, other) for one, other in zip(value, pattern, strict=True)]
    return value


def _quoted(body: str) -> str:
    return body.replace(": …", ': "…"')


def write(answers: Answers, file: Path) -> None:
    """Keeps answers in a file."""
    file.write_text(
        json.dumps({name: [asdict(one) for one in all_] for name, all_ in answers.items()}, indent=1) + "\n"
    )


def read(file: Path) -> Answers:
    """The answers of a file."""
    return {name: [Answer(**one) for one in all_] for name, all_ in json.loads(file.read_text()).items()}
