"""Tests a handler on N real ranks, from pytest or anything else.

    from minserve.testing import rank_group

    def test_sum():
        with rank_group("my_model/", nproc=2) as group:
            assert group.predict("14").json == {"sum": 42.0}

Behind it is a real `minserve start` with torchrun and sockets, so what passes here is what production does. docs/testing.md
shows more: batches, streams, faults by name, what each rank has logged and where it stands.
"""

from minserve.testing.answers import Answer, Body, StreamBroken, StreamRefused
from minserve.testing.faults import FAULTS
from minserve.testing.group import Group, rank_group
from minserve.testing.running import StartFailed, until

__all__ = [
    "FAULTS",
    "Answer",
    "Body",
    "Group",
    "StartFailed",
    "StreamBroken",
    "StreamRefused",
    "rank_group",
    "until",
]
