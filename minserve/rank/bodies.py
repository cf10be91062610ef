"""The bodies of a batch, from its frame and from shared memory, as the handler wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.errors import WireError
from minserve.rank.data import decode_batch, decode_part, is_parsed
from minserve.wire.messages import inline_lengths, split_body

if TYPE_CHECKING:
    from minserve.rank.data import Value
    from minserve.wire.messages import Batch, Buffer
    from minserve.wire.views import Views


class Bodies:
    """Makes the `data` argument of `handle`.

    Args:
        shared: where large bodies lie, if there is shared memory.
        parse: bodies of JSON and text by their content type; if not, all stay bytes.
        views: what stays bytes is a read-only view, of the shared memory itself where it lies there.
    """

    def __init__(self, shared: Views | None = None, parse: bool = True, views: bool = False) -> None:
        self._shared = shared
        self._parse = parse
        self._views = views

    def decode(self, batch: Batch, body: bytearray) -> list[dict[str, Value]]:
        """One dict a request, by field name; a raw body is the field "body".

        Raises:
            WireError: the parts do not add up to the frame's body, or are not where they are said to be.
        """
        if not batch.shared and not self._views:
            return decode_batch(batch, body, self._parse)
        pieces = iter(self._pieces(batch, body))
        return [{part.name: self._value(part.content_type, next(pieces)) for part in parts} for parts in batch.parts]

    def skip(self, batch: Batch) -> None:
        """This rank does not run the batch: it lets go of what it was lent."""
        for place in batch.shared:
            self._memory.skip(place.block, place.use)

    def _pieces(self, batch: Batch, body: bytearray) -> list[Buffer]:
        parts = [part for parts in batch.parts for part in parts]
        inline = inline_lengths((part.length for part in parts), batch.shared)
        pieces: list[Buffer] = list(split_body(body, inline))
        for place in batch.shared:
            part = parts[place.index]
            keep = self._views and not (self._parse and is_parsed(part.content_type))
            look = self._memory.view if keep else self._memory.copy
            pieces[place.index] = look(place.block, place.use, part.length)
        return pieces

    def _value(self, content_type: str, piece: Buffer) -> Value:
        if not isinstance(piece, bytearray):
            return piece
        value = decode_part(content_type, piece) if self._parse else piece
        return memoryview(value).toreadonly() if self._views and isinstance(value, bytearray) else value

    @property
    def _memory(self) -> Views:
        if self._shared is None:
            raise WireError("a body is in shared memory, of which there is none")
        return self._shared
