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
    ├── InvalidModel                400 InvalidModelException: what is to be registered is no model
    ├── DownloadFailed              400 DownloadArchiveException: an archive cannot be fetched from its address
    ├── NotSaved                    500 InternalServerException: an archive that was fetched has no place in the store
    ├── PackagesFailed              400 ModelException: a model's own packages cannot be installed
    ├── Conflict                    409 ConflictStatusException: the version is registered already
    ├── InvalidModelVersion         403 InvalidModelVersionException: the default version stays while others exist
    ├── CleanupTimeout              408 RequestTimeoutException: workers took too long to end
    ├── InvalidKey                  400 InvalidKeyException: no key, a wrong one or an expired one
    ├── Forbidden                   403 ForbiddenException: from a page or for a name that is not this server's
    ├── MethodNotAllowed            405 MethodNotAllowedException
    ├── BodyTooLarge                413 RequestEntityTooLargeException
    ├── Unavailable                 503 ServiceUnavailableException, retryable: nothing was sent to a rank
    │   ├── QueueFull               the model's queue is at its bound
    │   ├── NoWorkers               the model has no worker, because nobody has asked for one; not retryable
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


class InvalidModel(MinServeError):
    """What is to be registered is no model: a broken archive, a wrong configuration, no name."""

    status = 400
    type_name = "InvalidModelException"


class DownloadFailed(MinServeError):
    """An archive cannot be fetched from its address. The log says why; the text is TorchServe's."""

    status = 400
    type_name = "DownloadArchiveException"


class NotSaved(MinServeError):
    """An archive cannot be put into the model store: a file of that name is there, or the disk is full."""


class PackagesFailed(MinServeError):
    """The packages that a model asks for cannot be installed. The log has what pip said; the text is TorchServe's."""

    status = 400
    type_name = "ModelException"


class Conflict(MinServeError):
    """The model version is registered already."""

    status = 409
    type_name = "ConflictStatusException"


class InvalidModelVersion(MinServeError):
    """The default version of a model cannot go while it has others."""

    status = 403
    type_name = "InvalidModelVersionException"


class CleanupTimeout(MinServeError):
    """The workers of a model that is unregistered took too long to end; they have been killed."""

    status = 408
    type_name = "RequestTimeoutException"


class InvalidKey(MinServeError):
    """The request needs a key and has none that is good. Status and texts are TorchServe's."""

    status = 400
    type_name = "InvalidKeyException"


class Forbidden(MinServeError):
    """The request comes from a foreign web page, or was sent to a name that is not this server's."""

    status = 403
    type_name = "ForbiddenException"


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


class NoWorkers(Unavailable):
    """The model has no worker, and none is to be started. The text is TorchServe's, which scripts look for."""

    retryable = False

    def __init__(self, model: str, version: str = "") -> None:
        super().__init__(no_workers(model, version))


def no_workers(model: str, version: str = "") -> str:
    """TorchServe's one sentence for a model without workers and for a full queue.

    Args:
        version: if the request names one; where the quotes then stand is TorchServe's, too.
    """
    name = f'"{model}" Version {version}"' if version else f'"{model}"'
    return (
        f"Model {name} has no worker to serve inference request. Please use scale workers API to add workers. "
        "If this is a sequence inference, please check if it is closed, or expired; or exceeds maxSequenceJobQueueSize"
    )


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
