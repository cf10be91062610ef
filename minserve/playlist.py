"""Which batches of a recording are to be played: those of one life of the worker, as its ranks saw them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minserve.recording import RecordingError
from minserve.wire.recording import Ended, Gap, Header, Sent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from minserve.wire.messages import RequestMeta
    from minserve.wire.recording import AnyRecord


@dataclass(slots=True)
class Batch:
    """A recorded batch. `error` is how it ended: empty with answers, None when the recording ended before it."""

    sent: Sent
    missing_before: int  # batches that were dropped between the one before and this one
    error: str | None = None

    @property
    def seq(self) -> int:
        """Its number in that life of the worker."""
        return self.sent.seq

    @property
    def requests(self) -> tuple[RequestMeta, ...]:
        """What each request says of itself."""
        return self.sent.requests

    @property
    def bodies(self) -> tuple[bytes, ...]:
        """Those of all parts of all requests; where they were not kept, zero bytes of the same lengths."""
        if self.sent.bodies is not None:
            return self.sent.bodies
        return tuple(bytes(part.length) for request in self.requests for part in request.parts)


@dataclass(frozen=True, slots=True)
class Playlist:
    """What is to be played, and what whoever looks at the result should know."""

    header: Header
    batches: Sequence[Batch]
    notes: Sequence[str]


def parse_range(text: str | None) -> range:
    """The seqs of `A:B`, both among them, either may be missing; or of a single `A`.

    Raises:
        RecordingError: it is neither.
    """
    if text is None:
        text = ":"
    match = re.fullmatch(r"(\d*)(:?)(\d*)", text, re.ASCII)
    if match is None or text == "":
        raise RecordingError(f"seq: found {text!r}, allowed: A:B, A:, :B or A, with numbers of batches")
    first = int(match[1] or 1)
    last = int(match[3] or 2**63) if match[2] else first
    if last < first:
        raise RecordingError(f"seq: found {text!r}, allowed: A:B with A <= B")
    return range(first, last + 1)


def choose(records: Sequence[AnyRecord], seqs: range, incarnation: str | None) -> Playlist:
    """The batches to play.

    Args:
        incarnation: the beginning of the name of a life of the worker; None: there is only one.

    Raises:
        RecordingError: there is no such life, or no such batch, or it has to be chosen which.
    """
    header = records[0]
    assert isinstance(header, Header)
    lives = _lives(records)
    if not lives:
        raise RecordingError(f"the recording of {header.who} has no batch")
    found = [name for name in lives if incarnation is None or name.startswith(incarnation)]
    if len(found) != 1:
        what = f"{len(found)} lives" if incarnation is None else f"{len(found)} that begin with {incarnation!r}"
        allowed = "\n".join(f"  {name}: {_describe(batches)}" for name, batches in lives.items())
        raise RecordingError(f"incarnation: found {what} of the worker, allowed, one of:\n{allowed}")
    everything = lives[found[0]]
    batches = [batch for batch in everything if batch.seq in seqs]
    if not batches:
        raise RecordingError(f"seq: found no batch of that range in {found[0]}, allowed: {_describe(everything)}")
    return Playlist(header, batches, _notes(header, everything, batches))


def _lives(records: Sequence[AnyRecord]) -> dict[str, list[Batch]]:
    """The batches of each life of the worker, in order."""
    lives: dict[str, list[Batch]] = {}
    open_: dict[tuple[str, int], Batch] = {}
    missing = 0
    for record in records:
        if isinstance(record, Gap):
            missing += record.batches
        elif isinstance(record, Sent):
            batch = Batch(record, missing)
            missing = 0
            lives.setdefault(record.incarnation, []).append(batch)
            open_[record.incarnation, record.seq] = batch
        elif isinstance(record, Ended) and (record.incarnation, record.seq) in open_:
            open_.pop((record.incarnation, record.seq)).error = record.error
    return lives


def _describe(batches: Sequence[Batch]) -> str:
    failed = [batch for batch in batches if batch.error]
    told = f", {len(failed)} failed, the last one with: {failed[-1].error}" if failed else ""
    return f"batches {batches[0].seq} to {batches[-1].seq}{told}"


def _notes(header: Header, everything: Sequence[Batch], batches: Sequence[Batch]) -> list[str]:
    notes = []
    if not header.bodies:
        notes.append("the bodies were not recorded: zero bytes of the same lengths stand for them")
    if batches[0] is everything[0] and batches[0].seq > 1:
        notes.append(f"the recording begins with batch {batches[0].seq}: what the ranks had done before is not in it")
    missing = sum(batch.missing_before for batch in batches[1:])
    if missing:
        notes.append(f"{missing} batches are missing in between: they came faster than the recording was read")
    return notes
