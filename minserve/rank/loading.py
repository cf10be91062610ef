"""Finds the handler and makes it ready (TorchServe's rules: torchserve.md 9.1).

It is a file in the model directory, or else a module by name: one that is installed, or one of those that TorchServe ships.
Which of them there is is found out before anything is imported, so that an import that fails is always told as what it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from minserve.rank import coroutines
from minserve.rank.progress import report_progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from minserve.rank.context import Context

logger = logging.getLogger(__name__)

SHIPPED = "ts.torch_handler"
ENVELOPES = f"{SHIPPED}.request_envelope"


class HandlerError(Exception):
    """The handler file does not have what the contract asks for."""


class _HandlerClass(Protocol):
    def initialize(self, context: Context) -> object: ...

    def handle(self, data: list[dict[str, object]] | None, context: Context) -> object: ...


class _EnvelopeClass(Protocol):
    def __init__(self, handle: Callable[..., object]) -> None: ...

    def handle(self, data: list[dict[str, object]], context: Context) -> object: ...


class Handler:
    """A loaded handler.

    Attributes:
        handle: called with `data` and the context for each batch. What it returns is a list, a generator of lists, or a
            coroutine or async generator of them.
        close: called once at the end; does nothing where the handler offers none.
        probe: says whether this rank is healthy; None where the handler offers none.
        owners: the objects on which it may keep what belongs to a batch.
    """

    def __init__(self, handle: Callable[..., object], owner: object) -> None:
        self.handle = handle
        self.close: Callable[[], object] = getattr(owner, "close", _nothing)
        self.probe = _find_probe(owner)
        self.owners = [owner]


def load_handler(
    model_dir: Path, reference: str, context: Context, envelope: str = "", archive: bool = False
) -> Handler:
    """Imports and initialises the handler, with the model directory as working directory and first on the import path.

    Args:
        reference: `file.py` or `file.py:name`; the name is a function or a class. Or, without `.py`, a module's name.
        envelope: name of the request envelope around the handler, "" for none.
        archive: the model has a manifest, and the reference is read as TorchServe does, which looks at the last part of a
            path alone and takes a class where the name is none of the module's.

    Raises:
        HandlerError: the file does not have what the contract asks for.
        Exception: whatever the handler's own code raises.
    """
    os.chdir(model_dir)
    if str(model_dir) not in sys.path:
        sys.path.insert(0, str(model_dir))
    file, _, name = reference.partition(":")
    module = _import(model_dir, file, archive)
    target = _find(module, file, name, archive)
    if inspect.isclass(target):
        handler = _initialize(target, file, context)
    else:
        _initialize_function(target, context)
        handler = Handler(target, module)
        # TorchServe's usual form: a function that hands over to an object of the module's.
        handler.owners += [value for value in vars(module).values() if type(value).__module__ == module.__name__]
    if envelope:
        around = _in_envelope(handler.handle, envelope)
        handler.handle = around.handle
        handler.owners.append(around)
    return handler


def _import(model_dir: Path, file: str, archive: bool) -> ModuleType:
    last = file.rpartition("/")[2]
    names = [file, f"{file}.py"] + [last, f"{last}.py"] * archive
    path = next((model_dir / name for name in names if (model_dir / name).is_file()), None)
    if path is not None:
        return import_file(path, "handler")
    if file.endswith(".py") and not archive:
        raise HandlerError(f"there is no handler file {model_dir / file}")
    name = last.removesuffix(".py")
    for module in (name, f"{SHIPPED}.{name}"):
        if _exists(module):
            return importlib.import_module(module)
    raise HandlerError(
        f"there is no handler {file}: no file in {model_dir}, no module, and none of those that are shipped"
    )


def _exists(module: str) -> bool:
    """Whether there is such a module. It is not imported; the packages around it are."""
    if not all(part.isidentifier() for part in module.split(".")):
        return False
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(f"{error.name}."):
            return False
        raise


def _in_envelope(handle: Callable[..., object], name: str) -> _EnvelopeClass:
    if not _exists(f"{ENVELOPES}.{name}"):
        raise HandlerError(f"there is no request envelope {name!r}")
    module = importlib.import_module(f"{ENVELOPES}.{name}")
    kinds: list[type[_EnvelopeClass]] = [
        value
        for key, value in vars(module).items()
        if key.endswith("Envelope") and getattr(value, "__module__", "") == module.__name__
    ]
    if len(kinds) != 1:
        raise HandlerError(f"{module.__name__} must define exactly one class whose name ends in Envelope")
    return kinds[0](handle)


def import_file(path: Path, kind: str) -> ModuleType:
    """The module of a file of the model directory.

    Under its own name, so that an import of that name elsewhere in the directory finds this same module; but a file called
    json.py must not take the place of a module that others have imported, and is then called after its `kind`.

    Raises:
        HandlerError: it is not a Python file.
    """
    known = sys.modules.get(path.stem)
    if known is not None and os.path.realpath(getattr(known, "__file__", None) or "") == os.path.realpath(path):
        return known
    name = path.stem if known is None else f"minserve_{kind}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise HandlerError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _find(module: ModuleType, file: str, name: str, archive: bool) -> Callable[..., object]:
    if name:
        target = getattr(module, name, None)
        if callable(target):
            return target  # type: ignore[no-any-return]  # callable() narrows it as far as it goes
        if not archive:
            raise HandlerError(f"{file} has no function or class {name}")
    if callable(getattr(module, "handle", None)):
        return module.handle  # type: ignore[no-any-return]
    classes = dict.fromkeys(value for value in vars(module).values() if inspect.isclass(value))  # an alias counts once
    own = [value for value in classes if value.__module__ == module.__name__]
    handlers = own if len(own) == 1 else [value for value in own if hasattr(value, "handle")]
    if len(handlers) != 1:
        found = ", ".join(value.__name__ for value in own) or "no class"
        raise HandlerError(
            f"{file} must define a function `handle` or exactly one class with a method `handle`; found {found}"
        )
    return handlers[0]


def _find_probe(owner: object) -> Callable[[], object] | None:
    """A handler written for TorchServe may have something else of this name: what needs arguments is not ours to call."""
    probe = getattr(owner, "probe", None)
    if not callable(probe):
        return None
    try:
        inspect.signature(probe).bind()
    except (TypeError, ValueError) as error:
        logger.warning(
            "`probe` is not taken as the handler's own check, for it cannot be called without arguments: %s", error
        )
        return None
    return probe  # type: ignore[no-any-return]  # callable() narrows it as far as it goes


def _initialize(kind: type, file: str, context: Context) -> Handler:
    if not callable(getattr(kind, "handle", None)):
        raise HandlerError(f"class {kind.__name__} in {file} has no method `handle`")
    report_progress("initializing")
    handler: _HandlerClass = kind()
    if callable(getattr(handler, "initialize", None)):
        coroutines.complete(handler.initialize(context))
    return Handler(handler.handle, handler)


def _initialize_function(handle: Callable[..., object], context: Context) -> None:
    """TorchServe calls a handler function once with None for data, where it may load its model.

    A function that knows nothing of this fails on the None, and then has nothing to load. A real mistake in loading that
    looks like it is not lost: it is a warning here, and the first request fails on it again.
    """
    report_progress("initializing")
    try:
        coroutines.complete(handle(None, context))
    except (TypeError, AttributeError, RuntimeError) as error:
        if "NoneType" not in str(error):
            raise
        logger.warning(
            "handle(None, context) raised %s: %s; taken as a handler with nothing to load", type(error).__name__, error
        )


def _nothing() -> None:
    pass
