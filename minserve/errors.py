"""Every error that minserve raises on purpose, as one tree.

Each class carries what a client sees: the HTTP status and TorchServe's type name. `retryable` says that the same request
may well succeed a little later; the frontend then adds `Retry-After`.

    MinServeError                   500 InternalServerException
    ├── ConfigError                 a file, key or option is wrong; never reaches a client
    ├── StartupError                the server cannot start: port taken, no model store; never reaches a client
    ├── BadRequest                  400 BadRequestException
    ├── NotFound                    404 ResourceNotFoundException
    │   ├── ModelNotFound           404 ModelNotFoundException
    │   └── ModelVersionNotFound    404 ModelVersionNotFoundException
    ├── MethodNotAllowed            405 MethodNotAllowedException
    ├── BodyTooLarge                413 RequestEntityTooLargeException
    ├── Unavailable                 503 ServiceUnavailableException, retryable: nothing was sent to a rank
    │   ├── QueueFull               the model's queue is at its bound
    │   ├── Draining                the server or the worker is shutting down
    │   └── ModelUnhealthy          the model has given up restarting; not retryable
    ├── DeadlineExceeded            504 RequestTimeoutException: the request's own deadline passed
    ├── HandlerError                503 InternalServerException: the handler raised on every rank, or its answer was refused
    │   └── HandlerOutOfMemory      507 InternalServerException
    ├── WorkerFailed                503 InternalServerException, retryable: the rank group died with the request in flight
    │   ├── WorkerOutOfMemory       507 InternalServerException
    │   ├── ResponseTimeout         504 InternalServerException
    │   └── RankProtocolError       502 InternalServerException: a rank sent what the protocol forbids
    └── WireError                   bytes on a rank's socket that are no frame
"""

from __future__ import annotations


class MinServeError(Exception):
    """Base of the tree. `str(error)` is the message that a client or an operator reads."""

    status: int = 500
    type_name: str = "InternalServerException"
    retryable: bool = False
    retry_after: float | None = None
    """Seconds after which it makes sense to try again, where the raiser knows; the frontend rounds up."""


class ConfigError(MinServeError):
    """A configuration file or option is wrong. The message lists every problem, one a line."""


class StartupError(MinServeError):
    """The server cannot start. The message is one line that says what to change."""


class BadRequest(MinServeError):
    """The request cannot be understood."""

    status = 400
    type_name = "BadRequestException"


class NotFound(MinServeError):
    """No such path."""

    status = 404
    type_name = "ResourceNotFoundException"


class ModelNotFound(NotFound):
    """No model of that name."""

    type_name = "ModelNotFoundException"


class ModelVersionNotFound(NotFound):
    """The model has no such version."""

    type_name = "ModelVersionNotFoundException"


class MethodNotAllowed(MinServeError):
    """The path exists, the method does not apply to it."""

    status = 405
    type_name = "MethodNotAllowedException"


class BodyTooLarge(MinServeError):
    """The request body is over the server's limit."""

    status = 413
    type_name = "RequestEntityTooLargeException"


class Unavailable(MinServeError):
    """The request was refused before any rank saw it."""

    status = 503
    type_name = "ServiceUnavailableException"
    retryable = True


class QueueFull(Unavailable):
    """The model's queue is at its bound."""


class Draining(Unavailable):
    """The server or the worker is shutting down."""


class ModelUnhealthy(Unavailable):
    """The model's workers failed for longer than the retry window and are not restarted any more."""

    retryable = False


class DeadlineExceeded(MinServeError):
    """The request's own deadline passed before its answer came."""

    status = 504
    type_name = "RequestTimeoutException"


class HandlerError(MinServeError):
    """The handler raised in step on every rank, or minserve refused what it returned. The worker goes on."""

    status = 503


class HandlerOutOfMemory(HandlerError):
    """Every rank ran out of memory in the same batch."""

    status = 507


class WorkerFailed(MinServeError):
    """The rank group failed while the request was in flight, or while it started.

    Args:
        message: names model, worker, rank and cause.
        last_lines: what the rank printed last: for the log and for operators, never for clients.
        load_error: when a handler raised while it was loaded: type, text and place, without what differs from start to
            start. Three alike in a row are a crash loop.
    """

    status = 503
    retryable = True

    def __init__(self, message: str, last_lines: tuple[str, ...] = (), load_error: str = "") -> None:
        super().__init__(message)
        self.last_lines = last_lines
        self.load_error = load_error


class WorkerOutOfMemory(WorkerFailed):
    """A rank exited with the code that stands for an out-of-memory kill."""

    status = 507


class ResponseTimeout(WorkerFailed):
    """The ranks did not finish a batch within responseTimeout."""

    status = 504


class RankProtocolError(WorkerFailed):
    """A rank sent what the protocol forbids: a wrong seq, an unknown request, bytes that are no frame."""

    status = 502


class WireError(MinServeError):
    """Bytes that are no frame of ours, or a frame over its limits."""
