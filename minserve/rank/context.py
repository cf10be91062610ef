"""The `context` that a handler gets: TorchServe's, member for member (torchserve.md 9.3).

One object for the life of the rank, so that handlers may keep things on it; what belongs to a batch is replaced with each.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING

from minserve.rank.metric_cache import MetricsCache
from minserve.rank.requests import RequestProcessor, Requests

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from minserve.rank.streaming import Chunks
    from minserve.wire.messages import RequestMeta

# Known to be the same for every batch, so that the copies of a context share them.
_SHARED = frozenset({"manifest", "model_yaml_config", "system_properties", "stream"})
# What a batch has of its own, where several are under way and each has its own view of the context.
_OF_A_BATCH = frozenset({"_common", "_requests", "request_ids", "request_processor", "stream"})


class Context:
    """What a handler knows of its model, of this rank and of the requests in the batch.

    Attributes:
        model_name: the model's name.
        manifest: TorchServe's MANIFEST.json; for a model directory one made up from it.
        system_properties: model_dir, gpu_id (index of this rank's device among those it sees, None on CPU), batch_size,
            server_name, server_version, limit_max_image_pixels.
        model_yaml_config: model-config.yaml as the author wrote it.
        metrics: where the handler records its own metrics.
        stopping_criteria: for handlers that set it; without continuous batching nobody reads it.
        header_key_sequence_id, header_key_sequence_start, header_key_sequence_end: names of the headers of a sequence.
        stream: of this batch, where it is one of several under way; None where the rank has one at a time.

    The arguments are those of TorchServe's, so that authors' tests of their handlers can make one.
    """

    def __init__(
        self,
        model_name: str,
        model_dir: str,
        manifest: Mapping[str, object],
        batch_size: int,
        gpu: int | None,
        mms_version: str,
        limit_max_image_pixels: bool = True,
        metrics: MetricsCache | None = None,
        model_yaml_config: Mapping[str, object] | None = None,
    ) -> None:
        self.model_name = model_name
        self.manifest = manifest
        self.model_yaml_config = model_yaml_config or {}
        self.system_properties: dict[str, object] = {
            "model_dir": model_dir,
            "gpu_id": gpu,
            "batch_size": batch_size,
            "server_name": "MMS",
            "server_version": mms_version,
            "limit_max_image_pixels": limit_max_image_pixels,
        }
        self._requests = Requests()
        self.metrics = MetricsCache(model_name=model_name) if metrics is None else metrics
        self.stopping_criteria: Sequence[Callable[[object], object]] | None = None
        self.header_key_sequence_id = os.environ.get("TS_REQUEST_SEQUENCE_ID", "ts_request_sequence_id")
        self.header_key_sequence_start = os.environ.get("TS_REQUEST_SEQUENCE_START", "ts_request_sequence_start")
        self.header_key_sequence_end = os.environ.get("TS_REQUEST_SEQUENCE_END", "ts_request_sequence_end")
        self.stream: Chunks | None = None

    def begin_batch(self, requests: bytes | Sequence[RequestMeta]) -> None:
        """A new batch: nothing of the last one may show through."""
        self._requests = Requests(requests)
        if isinstance(self.metrics, MetricsCache):  # a handler may have put something else in its place
            self.metrics.begin_batch(self._requests)

    @property
    def request_ids(self) -> dict[int, str] | None:
        """{index in the batch: request id}; None while the handler is initialised."""
        return self._requests.ids

    @request_ids.setter
    def request_ids(self, ids: dict[int, str]) -> None:
        self._requests.ids = ids

    @property
    def request_processor(self) -> list[RequestProcessor]:
        """One for each request of the batch."""
        return self._requests.processors

    @request_processor.setter
    def request_processor(self, processors: list[RequestProcessor]) -> None:
        self._requests.processors = processors

    def __deepcopy__(self, memo: dict[int, object]) -> Context:
        """A context of its own for a batch that is worked on beside others, as TorchServe makes one for each.

        What the handler keeps on it is copied; what cannot be copied (a lock, an engine) is shared.
        """
        other = object.__new__(type(self))
        for name, value in vars(self).items():
            try:
                kept = value if name in _SHARED else copy.deepcopy(value, memo)
            except Exception:
                kept = value
            setattr(other, name, kept)
        return other

    @property
    def cl_socket(self) -> object:
        """TorchServe's socket to its frontend, on which some handlers write protocol frames of their own.

        Raises:
            AttributeError: always; minserve speaks another protocol.
        """
        raise AttributeError(
            "context.cl_socket is TorchServe's own socket, and minserve has none: "
            "send chunks with ts.handler_utils.utils.send_intermediate_predict_response"
        )

    def get_sequence_id(self, idx: int) -> object:
        """The id of the sequence that a request belongs to, None when it belongs to none."""
        return self.get_request_header(idx, self.header_key_sequence_id)

    def get_request_id(self, idx: int = 0) -> str | None:
        """The id of a request of the batch."""
        return self.request_ids.get(idx) if self.request_ids else None

    def get_request_header(self, idx: int, key: str) -> object:
        """A header of a request, None when it is absent."""
        return self.request_processor[idx].get_request_property(key)

    def get_all_request_header(self, idx: int) -> dict[str, object]:
        """All headers of a request."""
        return self.request_processor[idx].get_request_properties()

    def set_response_content_type(self, idx: int, value: str) -> None:
        """Sets the Content-Type of a request's answer; without it the answer has none, as with TorchServe."""
        self.request_processor[idx].add_response_property("content-type", value)

    def get_response_content_type(self, idx: int) -> str | None:
        """The Content-Type of a request's answer."""
        return self.request_processor[idx].get_response_header("content-type")

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        """Sets a header of a request's answer."""
        self.request_processor[idx].add_response_property(key, value)

    def get_response_headers(self, idx: int) -> dict[str, str]:
        """The headers of a request's answer."""
        return self.request_processor[idx].get_response_headers()

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        """Sets the HTTP status of one request's answer."""
        self.request_processor[idx].report_status(code, phrase)

    def set_all_response_status(self, code: int = 200, phrase: str = "") -> None:
        """Sets the HTTP status of every answer of the batch."""
        for processor in self.request_processor:
            processor.report_status(code, phrase)

    def get_response_status(self, idx: int) -> tuple[int, str]:
        """The HTTP status and reason phrase of a request's answer."""
        processor = self.request_processor[idx]
        return processor.status, processor.phrase


def are_plain(context: Context) -> bool:
    """Whether nobody can have set the status or a header of an answer of the batch.

    No member: a handler may keep something of its own under any name that TorchServe's context has not.
    """
    return context._requests.plain


class BatchContext(Context):
    """The context of one batch where several are under way: what belongs to the batch is its own, all else the rank's.

    Its own, for a thread of the handler may look at it while another batch has its turn.

    Args:
        common: the one that the handler was loaded with, and may have kept.
    """

    _common: Context

    def __init__(self, common: Context) -> None:
        vars(self)["_common"] = common

    def begin_batch(self, requests: bytes | Sequence[RequestMeta]) -> None:
        """See `Context`."""
        super().begin_batch(requests)
        if isinstance(self._common.metrics, MetricsCache):
            vars(self)["metrics"] = self._common.metrics.for_requests(self._requests)
        self.show()

    def show(self) -> None:
        """Its batch has its turn: the common context shows it, too."""
        common = self._common
        common._requests = self._requests
        if isinstance(common.metrics, MetricsCache):
            common.metrics.begin_batch(self._requests)

    def __getattr__(self, name: str) -> object:
        if "_common" not in vars(self):
            raise AttributeError(name)  # copy.copy asks a new one that has nothing yet
        return getattr(self._common, name)  # only what it has not itself is looked for here

    def __setattr__(self, name: str, value: object) -> None:
        if name in _OF_A_BATCH:
            object.__setattr__(self, name, value)
        else:
            vars(self).pop(name, None)
            setattr(self._common, name, value)
