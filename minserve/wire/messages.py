"""What the meta part of each frame kind holds, as typed msgspec structs, and how batches and answers become frames.

Decoding validates: a field of a wrong type is a `WireError`, never an odd value further in. Bodies are not in the structs:
they lie behind the meta in the order in which the meta lists their lengths.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, TypeVar

import msgspec

from minserve.errors import WireError
from minserve.wire.frames import Kind, header

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Bytes of one part of a body, as they came from a socket or a handler.
Buffer = bytes | bytearray | memoryview


class Message(msgspec.Struct, array_like=True, gc=False):
    """Base of all: arrays instead of maps on the wire, and no cycle collector, for they hold no cycles."""


# ── from a rank ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Hello(Message):
    """First frame of a rank. `secret` proves that the server's own launch started it."""

    rank: int
    local_rank: int
    world_size: int
    pid: int
    worker: str
    secret: str


class Progress(Message):
    """How far a rank's load is; `total` 0 means unknown."""

    stage: str
    done: int = 0
    total: int = 0


class Loaded(Message):
    """The handler is ready.

    Attributes:
        seconds: that importing and initialising took.
        probes: it offers a probe.
        in_flight: how many batches it can have at work at once; 0: it has nothing to say on that.
    """

    seconds: float
    probes: bool = False
    in_flight: int = 0


class Failure(Message):
    """An exception in a rank: while loading (FAILED) or in a batch (ERROR).

    Attributes:
        kind: "own" (raised by this rank's code), "collective" (torch.distributed, so perhaps a victim), "device", "memory",
            "refused" (minserve refused what `handle` returned on rank 0; every rank is still in step), "chunk" (likewise a
            chunk of a stream, which goes on without chunks), "cancelled" (no exception: the stream's clients have left,
            and so has this rank).
        type_name: class name of the exception.
        text: its text.
        place: `file:line` where it was raised.
        traceback: for the log; never sent to a client.
        origin: rank that raised first; another than the sender when a pipeline passed the failure on.
        needs: ranks that must report the same failure before it counts as ordinary.
        status: HTTP status that the handler asked for with its exception; 0: none.
        collectives: how many this rank had issued in the batch when it raised.
    """

    kind: str
    type_name: str
    text: str
    place: str
    traceback: str
    origin: int
    needs: tuple[int, ...]
    status: int = 0
    collectives: int = 0


class Answer(Message):
    """One request's answer, or one chunk of it. `length` is its share of the frame's body.

    `index` is the request's place in its batch. `headers` are name, value pairs in the order they were set.
    """

    index: int
    length: int
    status: int = 200
    reason: str = ""
    headers: tuple[tuple[str, str], ...] = ()


class Shared(Message):
    """Where a body lies that is in an arena, and so not in its frame. `index` counts the parts or answers of the frame."""

    index: int
    block: int
    use: int


class Answers(Message):
    """Meta of REPLY and CHUNK. A REPLY ends the batch.

    Attributes:
        shared: those whose bodies are in the arena for answers.
        step: counts a stream's steps from 1.
        seconds: that rank 0 spent in `handle`, in a REPLY. As a METRICS frame it would be half the work of a small batch.
    """

    answers: tuple[Answer, ...]
    step: int = 0
    seconds: float = 0.0
    shared: tuple[Shared, ...] = ()


class Metric(Message):
    """One value that a handler, or the rank itself, has recorded.

    Attributes:
        value: what a counter grows by, what a gauge is set to, what a histogram observes.
        unit: in full where TorchServe has a name for it ("Milliseconds", "Count", "unit" for none), else as the handler
            wrote it.
        kind: "counter", "gauge" or "histogram".
        dimensions: name, value pairs in the metric's own order.
        request_id: ids of the requests it belongs to, joined by ","; "" for none.
        at: when it was recorded, in seconds since the epoch.
    """

    name: str
    value: float
    unit: str
    kind: str
    dimensions: tuple[tuple[str, str], ...]
    request_id: str
    at: float


class Metrics(Message):
    """Meta of METRICS, which any rank sends in front of its last frame of a batch, or of LOADED; only if there are any."""

    metrics: tuple[Metric, ...]


# ── to every rank ────────────────────────────────────────────────────────────────────────────────────────────────────


class Load(Message):
    """What to load. The frame's body is the text of model-config.yaml, which the rank parses for the author's sections.

    Attributes:
        handler: `file.py[:name]`, or the name of a shipped handler.
        gpu: LOCAL_RANK indexes a mask of devices.
        reply_done: ranks > 0 send a DONE frame per batch.
        manifest: text of the archive's MANIFEST.json; "" for a model directory, whose manifest is made up.
        envelope: name of the request envelope around the handler; "" for none.
        limit_max_image_pixels: for the handler, which decodes images with or without a limit of their size.
        decode_input: bodies of JSON and text reach the handler parsed; if not, all do as bytes.
        predict_on: "all" ranks run the handler, or "rank0" alone.
        metrics: the model metrics that metrics_config declares, as JSON: [{"name", "type", "unit", "dimensions": [...]}].
        asynchronous: each batch is a task of its own, and the answers may come in any order.
        in_flight: how many batches may be under way, where the configuration says so; 0: the handler may say.
        views: what would reach the handler as a bytearray does as a read-only memoryview.
        spin: seconds that the rank looks for the next batch before it sleeps.
        wait_for_cores: its threads take no core from anybody.
    """

    model: str
    version: str
    model_dir: str
    handler: str
    batch_size: int
    gpu: bool
    reply_done: bool
    manifest: str = ""
    envelope: str = ""
    limit_max_image_pixels: bool = True
    decode_input: bool = True
    predict_on: str = "all"
    metrics: str = ""
    asynchronous: bool = False
    in_flight: int = 0
    views: bool = False
    spin: float = 0.0
    wait_for_cores: bool = False


class Part(Message):
    """One field of a request: a raw body is the single part "body"."""

    name: str
    content_type: str
    length: int


class RequestMeta(Message):
    """One request of a batch. `headers` are the HTTP headers as they came, undecoded: few handlers look at them.

    `operation` is "" for a prediction, else "explain" or "describe".
    """

    id: str
    headers: tuple[tuple[bytes, bytes], ...]
    parts: tuple[Part, ...]
    url_path: str = ""
    operation: str = ""


class Batch(Message):
    """Meta of BATCH, made by `new_batch`. Every rank reads every batch, and most handlers look at nothing but the bodies.

    Attributes:
        requests: its `RequestMeta`s, encoded; a rank decodes them when its handler asks for one.
        parts: those of each request, once more.
        grant: the step up to which a stream may go before it needs a GRANT.
        shared: the parts, counted over all requests, that are in the arena for requests.
    """

    requests: bytes
    parts: tuple[tuple[Part, ...], ...]
    grant: int = 0
    shared: tuple[Shared, ...] = ()


class Step(Message):
    """Meta of GRANT: the step up to which. Meta of CANCEL: the last one granted, behind which the stream ends."""

    step: int


class Shutdown(Message):
    """Meta of SHUTDOWN."""

    reason: str


M = TypeVar("M", bound=Message)
_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(tuple[RequestMeta, ...])


@functools.cache
def _decoder(kind: type[Message]) -> msgspec.msgpack.Decoder[Message]:
    return msgspec.msgpack.Decoder(kind)


def pack(kind: Kind, message: Message, seq: int = 0, flags: int = 0) -> bytes:
    """A frame without a body."""
    meta = _encoder.encode(message)
    return header(kind, seq, len(meta), 0, flags) + meta


def pack_with_body(kind: Kind, message: Message, bodies: Sequence[Buffer], seq: int, flags: int = 0) -> list[Buffer]:
    """A frame as pieces for `writelines` or `sendmsg`: the bodies are neither joined nor copied.

    The caller must not change a body before the socket has taken it.
    """
    meta = _encoder.encode(message)
    length = sum(map(len, bodies))
    return [header(kind, seq, len(meta), length, flags) + meta, *[body for body in bodies if len(body)]]


def unpack(kind: type[M], meta: Buffer) -> M:
    """The struct in a frame's meta.

    Raises:
        WireError: it is not one of that kind.
    """
    try:
        return _decoder(kind).decode(meta)  # type: ignore[return-value]  # one decoder per class, by construction
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise WireError(f"bad {kind.__name__} message: {error}") from None


def new_batch(requests: Sequence[RequestMeta], grant: int = 0, shared: tuple[Shared, ...] = ()) -> Batch:
    """A batch of these requests."""
    return Batch(_encoder.encode(requests), tuple([request.parts for request in requests]), grant, shared)


def decode_requests(requests: bytes) -> tuple[RequestMeta, ...]:
    """The requests of a batch.

    Raises:
        WireError: they are none.
    """
    try:
        return _requests.decode(requests)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise WireError(f"bad requests of a batch: {error}") from None


def inline_lengths(lengths: Iterable[int], shared: Sequence[Shared]) -> list[int]:
    """The bytes that each part or answer has in its frame's body: none if it is in an arena.

    Raises:
        WireError: one is said to be there that is not in the frame.
    """
    inline = list(lengths)
    for place in shared:
        if not 0 <= place.index < len(inline):
            raise WireError(f"part {place.index} of {len(inline)} is said to be in shared memory")
        inline[place.index] = 0
    return inline


def split_body(body: bytearray, lengths: Sequence[int]) -> list[bytearray]:
    """Cuts a frame's body into the pieces whose lengths its meta lists, each in memory of its own; one alone is the body.

    Raises:
        WireError: the lengths do not add up to the body.
    """
    if len(lengths) == 1 and lengths[0] == len(body):  # as nearly all have it: not one more copy
        return [body]
    pieces = []
    offset = 0
    for length in lengths:
        if length < 0 or offset + length > len(body):
            raise WireError(f"parts of a frame reach over its body of {len(body)} bytes")
        pieces.append(body[offset : offset + length])
        offset += length
    if offset != len(body):
        raise WireError(f"parts of a frame add up to {offset} bytes, its body has {len(body)}")
    return pieces
