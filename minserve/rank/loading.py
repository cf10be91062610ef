"""Finds the handler in the model directory and makes it ready (TorchServe's rules: torchserve.md 9.1)."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from minserve.rank.progress import report_progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from minserve.rank.context import Context

logger = logging.getLogger(__name__)


class HandlerError(Exception):
    """The handler file does not have what the contract asks for."""


class _HandlerClass(Protocol):
    def initialize(self, context: Context) -> object: ...

    def handle(self, data: list[dict[str, object]] | None, context: Context) -> object: ...


class Handler:
    """A loaded handler.

    Attributes:
        handle: called with `data` and the context for each batch.
        close: called once at the end; does nothing where the handler offers none.
        probe: says whether this rank is healthy; None where the handler offers none.
    """

    def __init__(self, handle: Callable[..., object], owner: object) -> None:
        self.handle = handle
        self.close: Callable[[], object] = getattr(owner, "close", _nothing)
        self.probe = _find_probe(owner)


def load_handler(model_dir: Path, reference: str, context: Context) -> Handler:
    """Imports and initialises the handler, with the model directory as working directory and first on the import path.

    Args:
        reference: `file.py` or `file.py:name`; the name is a function or a class.

    Raises:
        HandlerError: the file does not have what the contract asks for.
        Exception: whatever the handler's own code raises.
    """
    os.chdir(model_dir)
    if str(model_dir) not in sys.path:
        sys.path.insert(0, str(model_dir))
    file, _, name = reference.partition(":")
    module = _import(model_dir / file)
    target = _find(module, file, name)
    if inspect.isclass(target):
        return _initialize(target, file, context)
    _refuse_async(target, file)
    _initialize_function(target, context)
    return Handler(target, module)


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise HandlerError(f"there is no handler file {path}")
    # Under its own name, so that `import handler` elsewhere in the model directory finds this same module; but a file called
    # json.py must not take the place of a module that others have imported.
    name = path.stem if path.stem not in sys.modules else f"minserve_handler_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise HandlerError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _find(module: ModuleType, file: str, name: str) -> Callable[..., object]:
    if name:
        target = getattr(module, name, None)
        if not callable(target):
            raise HandlerError(f"{file} has no function or class {name}")
        return target  # type: ignore[no-any-return]  # callable() narrows it as far as it goes
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
    _refuse_async(kind.handle, file)  # type: ignore[attr-defined]  # looked at just above
    report_progress("initializing")
    handler: _HandlerClass = kind()
    if callable(getattr(handler, "initialize", None)):
        handler.initialize(context)
    return Handler(handler.handle, handler)


def _initialize_function(handle: Callable[..., object], context: Context) -> None:
    """TorchServe calls a handler function once with None for data, where it may load its model.

    A function that knows nothing of this fails on the None, and then has nothing to load. A real mistake in loading that
    looks like it is not lost: it is a warning here, and the first request fails on it again.
    """
    report_progress("initializing")
    try:
        handle(None, context)
    except (TypeError, AttributeError, RuntimeError) as error:
        if "NoneType" not in str(error):
            raise
        logger.warning(
            "handle(None, context) raised %s: %s; taken as a handler with nothing to load", type(error).__name__, error
        )


def _refuse_async(handle: Callable[..., object], file: str) -> None:
    if inspect.iscoroutinefunction(handle) or inspect.isasyncgenfunction(handle):
        raise HandlerError(
            f"{file}: async handlers are not supported yet; `handle` must be a plain function or a generator"
        )


def _nothing() -> None:
    pass
