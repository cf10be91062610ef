"""The model store: which models there are, which of them a start is to serve, and what an address stands for."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minserve.config.model import CONFIG_FILE
from minserve.errors import ConfigError, ModelNotFound, StartupError
from minserve.registry.archive import ENDINGS, MANIFEST, is_archive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from minserve.config.server import ServerOptions

logger = logging.getLogger(__name__)

ADDRESS = re.compile(r"[a-z][a-z0-9+.\-]*://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Location:
    """A model directory or an archive, and the name to serve it under; None: its own, see `registry.validating`.

    Attributes:
        url: what was asked for; "" for the path.
        missing: why it cannot be read at all.
    """

    path: Path
    name: str | None = None
    url: str = ""
    missing: ConfigError | None = None

    @property
    def file_name(self) -> str:
        """What the model is called if nobody gives it a name: that of the folder, or of the file without its ending."""
        name = self.path.name
        ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), "")
        if not ending or self.path.is_dir():
            return name
        return re.sub(r"\W", "_", name.removesuffix(name[-len(ending) :]))


def locate(store: Path, wanted: Sequence[str], lenient: bool = False) -> list[Location]:
    """The models to serve.

    Args:
        store: the model store.
        wanted: `all`, or `[NAME=]LOCATION` with a folder or an archive of the store, a path, or an address.
        lenient: a location that is not there does not stop the start; it comes as `missing`.

    Raises:
        StartupError: the store or a location is not there.
    """
    if not os.path.isdir(store):
        raise StartupError(f"model store {store}: no such directory")
    if not os.access(store, os.R_OK | os.X_OK):
        raise StartupError(f"model store {store}: this user may not read it")
    if not lenient and _is_model(store) and not any(is_archive(path) for path in store.iterdir()):
        raise StartupError(f"model store {store} is itself a model directory; give the folder that holds it")
    locations: list[Location] = []
    for item in wanted:
        if item.lower() == "all":
            locations += _all(store)
            continue
        name, location = _split(item)
        if ADDRESS.match(location):
            locations.append(Location(Path(location), name, location))
            continue
        path = store / location  # an absolute location stands for itself
        missing = None
        if not path.is_dir() and not (path.is_file() and is_archive(path)):
            if not lenient:
                what = "is no archive (.mar, .tar.gz, .tgz, .zip)" if path.is_file() else "no such directory or archive"
                raise StartupError(f"model {item}: {path}: {what}")
            missing = ConfigError(f"Model not found at: {location}")
        locations.append(Location(Path(os.path.abspath(path)), name, location, missing))
    return locations


def locate_named(name: str, options: ServerOptions) -> Location:
    """Where the model of the store lies that is served under a name, or cannot be.

    Raises:
        ConfigError: it is not in the store any more.
    """
    try:
        locations = locate(Path(options.model_store), options.load_models, options.lenient)
    except StartupError as error:
        raise ConfigError(str(error)) from None
    for location in locations:
        if (location.name or location.file_name) == name:
            return location
    raise ConfigError(f"{name} is not in {options.model_store} any more")


def find_model(store: Path, url: str, allowed_urls: Sequence[str]) -> Path:
    """The file or folder that a registration names, unless it is an address (`ADDRESS`).

    A name, or the last part of a path, is looked for in the store, as TorchServe does. Another folder must be allowed.

    Raises:
        ModelNotFound: there is none, with TorchServe's texts.
    """
    if not url:
        raise ModelNotFound("empty url")
    if ".." in url:
        raise ModelNotFound(f"Relative path is not allowed in url: {url}")
    try:
        return _found(store, url, allowed_urls)
    except OSError:  # a name that is too long, a folder that may not be read
        raise ModelNotFound(f"Model not found at: {url}") from None


def _found(store: Path, url: str, allowed_urls: Sequence[str]) -> Path:
    name = Path(url).name  # "" of `.`, which would be the store itself, and that is no model
    in_store = store / name
    if name and in_store.is_file() and is_archive(in_store):
        return Path(os.path.abspath(in_store))
    folder = Path(url)
    if folder.is_absolute() and folder.is_dir():
        inside = Path(os.path.abspath(store)) in Path(os.path.abspath(folder)).parents
        if not inside and not any(re.fullmatch(one, f"file://{url}", re.IGNORECASE) for one in allowed_urls):
            raise ModelNotFound(f"Given URL {url} does not match any allowed URL(s)")
        return folder
    if name and in_store.is_dir():
        return Path(os.path.abspath(in_store))
    raise ModelNotFound(f"Model not found at: {url}")


def _split(item: str) -> tuple[str | None, str]:
    """`NAME=LOCATION`; an address may have a `=` of its own."""
    if ADDRESS.match(item):
        return None, item
    name, equals, location = item.partition("=")
    return (name or None, location) if equals else (None, item)


def _is_model(path: Path) -> bool:
    return any(os.path.exists(path / name) for name in (CONFIG_FILE, "handler.py", MANIFEST))  # `path.exists` may raise


def _all(store: Path) -> list[Location]:
    """Every folder of the store that looks like a model directory, and every archive, by name."""
    locations = []
    for path in sorted(store.iterdir()):
        if path.name.startswith((".", "__")):
            continue
        if _is_model(path) if path.is_dir() else is_archive(path):
            locations.append(Location(Path(os.path.abspath(path)), url=path.name))
        elif path.is_dir() and not os.access(path, os.R_OK | os.X_OK):  # such as a volume's lost+found
            logger.warning("%s: skipped, this user may not read it", path)
        elif path.is_dir():
            logger.warning("%s: skipped, it has neither a %s nor a handler.py nor a %s", path, CONFIG_FILE, MANIFEST)
    return locations
