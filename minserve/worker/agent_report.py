"""What torchrun reports of a rank that has ended before it said HELLO, when nobody else can tell which one it was.

torchrun prints the ranks' own lines, then that it has seen a failure, its own traceback, and a table of all failures:

    Root Cause (first observed failure):
    [0]:
      rank      : 1 (local_rank: 1)
      exitcode  : 7 (pid: 4711)

(source: torch.distributed.elastic.multiprocessing.errors.ChildFailedError, the same from torch 1.9 on).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# One row of the table for each rank of a machine with 16 GPUs, after torchrun's traceback.
REPORT_LINES = 200

_BEGIN = "failed (exitcode: "
_ROOT_CAUSE = re.compile(
    r"^Root Cause \(first observed failure\):$"
    r".*?^ +rank +: (?P<rank>\d+)\b"
    r".*?^ +exitcode +: (?P<code>-?\d+) \(pid: (?P<pid>\d+)\)",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class FirstFailure:
    """The rank that has ended first. `code` as in `subprocess`: negative for a signal."""

    rank: int
    pid: int
    code: int


def first_failure(lines: Sequence[str]) -> FirstFailure | None:
    """Whom torchrun's last lines name; None if they name nobody."""
    found = _ROOT_CAUSE.search("\n".join(lines))
    return FirstFailure(int(found["rank"]), int(found["pid"]), int(found["code"])) if found else None


def before_report(lines: Sequence[str]) -> Sequence[str]:
    """The lines up to torchrun's word that a rank has failed: the ranks' own. All lines if there is no such word."""
    end = next((number for number, line in enumerate(lines) if _BEGIN in line), None)
    return lines[: end + 1] if end is not None else lines
