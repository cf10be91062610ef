"""Between bytes and what handlers work with: a batch's bodies in, what `handle` returned out (torchserve.md 1.2, 1.3)."""

from __future__ import annotations

import functools
import json
import logging
import sys
from typing import TYPE_CHECKING

import msgspec

from minserve.errors import WireError

if TYPE_CHECKING:
    from minserve.wire.messages import Batch, Buffer

logger = logging.getLogger(__name__)

Value = object  # JSON value, str, bytearray or memoryview
JSON, TEXT = "application/json", "text"
_BYTES = bytes, bytearray  # to make `bytes | bytearray` takes longer than to look


class Refused(Exception):
    """What a handler returned cannot be sent."""


def decode_batch(batch: Batch, body: bytearray, parse: bool = True) -> list[dict[str, Value]]:
    """The `data` argument of `handle`: one dict a request, by field name; a raw body is the field "body".

    Args:
        parse: bodies of JSON and text by their content type; if not, all stay bytes.

    Raises:
        WireError: the parts do not add up to the body.
    """
    if len(batch.parts) == 1 and len(batch.parts[0]) == 1:
        ((only,),) = batch.parts
        if only.length == len(body):  # the frame's own memory, no copy
            return [{only.name: decode_part(only.content_type, body) if parse else body}]
    data: list[dict[str, Value]] = []
    start = 0
    for parts in batch.parts:  # one plain loop: each rank does this for every request
        row: dict[str, Value] = {}
        for part in parts:
            end = start + part.length
            piece = body[start:end]
            if end < start or end > len(body):
                raise WireError(f"parts of a batch reach over its body of {len(body)} bytes")
            row[part.name] = decode_part(part.content_type, piece) if parse and is_parsed(part.content_type) else piece
            start = end
        data.append(row)
    if start != len(body):
        raise WireError(f"parts of a batch add up to {start} bytes, its body has {len(body)}")
    return data


def decode_part(content_type: str, value: bytearray) -> Value:
    """JSON and text by content type; anything else, and what does not parse, stays the bytearray handlers expect."""
    if not is_parsed(content_type):
        return value
    mime = _mime(content_type)
    try:
        return json.loads(value) if mime == JSON else value.decode("utf-8")
    except (ValueError, RecursionError) as error:
        logger.warning("a body of type %s does not parse: %s; the handler gets its bytes", mime, error)
        return value


@functools.lru_cache(maxsize=256)
def is_parsed(content_type: str) -> bool:
    """Whether a body of this type is to reach the handler as something else than bytes."""
    mime = _mime(content_type)
    return mime == JSON or mime.startswith(TEXT)


def _mime(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def check_answers(answers: object, count: int) -> list[object]:
    """What `handle` returned, or yielded, as a list of `count`.

    Raises:
        Refused: it is no list, or has another length.
    """
    if not isinstance(answers, list | tuple):
        raise Refused(f"Invalid model predict output: handle must return a list, not a {type(answers).__name__}")
    if len(answers) != count:
        raise Refused(f"number of batch response mismatched: {count} requests, {len(answers)} answers")
    return answers if isinstance(answers, list) else list(answers)


def encode_answer(value: object, index: int) -> Buffer:
    """One answer's body: bytes as they are, text as UTF-8, a tensor as torch.save writes it, anything else as JSON.

    Raises:
        Refused: it is none of these.
    """
    if isinstance(value, _BYTES):
        return value
    try:
        if isinstance(value, str):
            return value.encode("utf-8", "surrogateescape")
        if isinstance(value, memoryview):
            return value.cast("B") if value.c_contiguous and value.nbytes else value.tobytes()
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            return _save(torch, value)
        return _pretty_json(value)
    except Exception as error:  # on rank 0 alone: taken for the handler's own it would restart the worker
        raise Refused(
            f"Unsupported model output data type: answer {index} is of type {type(value).__name__}: {error}"
        ) from None


def _pretty_json(value: object) -> bytes:
    """Byte for byte what `json.dumps(value, indent=2)` gives, which TorchServe sends, ten times as fast.

    `json` indents in pure Python but writes plain JSON in C, and msgspec indents that in C. It refuses NaN, which
    `json` lets pass.
    """
    plain = json.dumps(value)
    if plain[:1] not in "[{":
        return plain.encode()
    try:
        return msgspec.json.format(plain.encode(), indent=2)
    except msgspec.DecodeError:
        return json.dumps(value, indent=2).encode()


def _save(torch: object, tensor: object) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(tensor, buffer)  # type: ignore[attr-defined]  # torch is the handler's import, not ours
    return buffer.getvalue()
