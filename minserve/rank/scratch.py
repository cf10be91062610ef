"""What a batch keeps on the handler while it waits for its result, so that another one's does not take its place.

Handlers keep things of a batch on themselves: `self.lengths`, set before the model runs, is read behind it. Where the next
batch begins in between, each finds what it has set itself. What no batch sets before it pauses is common to all, and what a
batch sets once it has gone on stays: counters and caches go on as with one batch after another.

Which names are set is seen by their values. A batch may set what is there already (`self.size = 1` behind another batch's
1), so it finds again all names that any batch has been seen to set, with the values that they had when it paused.

What is changed in place (a list that is emptied and filled again) is common to all batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    Attributes = dict[str, object]

_ABSENT = object()


class Owner:
    """An object that handlers set things on.

    Args:
        attributes: its own, as in `vars()`.

    Attributes:
        names: of those that some batch has set before it paused.
    """

    def __init__(self, attributes: Attributes) -> None:
        self.attributes = attributes
        self.names: set[str] = set()


class Scratch:
    """What one batch has set. Made when it starts."""

    def __init__(self, owners: Sequence[Owner]) -> None:
        self._shares = [_Share(owner) for owner in owners]

    def put_aside(self) -> None:
        """The batch pauses."""
        for share in self._shares:
            share.put_aside()

    def bring_back(self) -> None:
        """It goes on."""
        for share in self._shares:
            share.bring_back()

    def give_back(self) -> None:
        """It is over."""
        for share in self._shares:
            share.uncover()


class _Share:
    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._before = dict(owner.attributes)
        self._at_pause: Attributes = {}
        self._covered: Attributes = {}

    def put_aside(self) -> None:
        self._at_pause = dict(self._owner.attributes)
        self._owner.names |= self.uncover()

    def bring_back(self) -> None:
        attributes = self._owner.attributes
        own = {name: self._at_pause[name] for name in self._owner.names if name in self._at_pause}
        self._covered = {name: attributes.get(name, _ABSENT) for name in own}
        attributes.update(own)
        self._before = dict(attributes)

    def uncover(self) -> set[str]:
        """Shows again what was covered and has not been set anew. Returns the names that have been set."""
        attributes, before = self._owner.attributes, self._before
        changed = {name for name, value in attributes.items() if before.get(name, _ABSENT) is not value}
        for name, value in self._covered.items():
            if name in changed:
                continue
            if value is _ABSENT:
                attributes.pop(name, None)
            else:
                attributes[name] = value
        self._covered = {}
        return changed
