"""What a batch keeps on the handler while it waits for its result, so that another one's does not take its place.

Handlers keep things of a batch on themselves: `self.lengths`, set before the model runs, is read behind it. Where the next
batch begins in between, each finds what it has set itself. What a batch did not set before it paused is common to all, and
what it sets once it has gone on stays: counters and caches go on as with one batch after another.

What is changed in place (a list that is emptied and filled again) is common to all batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    Attributes = dict[str, object]

_ABSENT = object()


class Scratch:
    """What one batch has set. Made when it starts.

    Args:
        owners: the attributes, as in `vars()`, of the objects that handlers set things on.
    """

    def __init__(self, owners: Sequence[Attributes]) -> None:
        self._owners = [_Owner(attributes) for attributes in owners]

    def put_aside(self) -> None:
        """The batch pauses, or is over."""
        for owner in self._owners:
            owner.put_aside()

    def bring_back(self) -> None:
        """It goes on."""
        for owner in self._owners:
            owner.bring_back()


class _Owner:
    def __init__(self, attributes: Attributes) -> None:
        self._attributes = attributes
        self._before = dict(attributes)
        self._own: Attributes = {}
        self._covered: Attributes = {}

    def put_aside(self) -> None:
        before = self._before
        changed = {name: value for name, value in self._attributes.items() if before.get(name, _ABSENT) is not value}
        for name, value in self._covered.items():
            if name not in changed:
                if value is _ABSENT:
                    self._attributes.pop(name, None)
                else:
                    self._attributes[name] = value
        self._covered = {}
        self._own.update(changed)

    def bring_back(self) -> None:
        self._covered = {name: self._attributes.get(name, _ABSENT) for name in self._own}
        self._attributes.update(self._own)
        self._before = dict(self._attributes)
