"""From what somebody asks for to a file or folder that is here: out of the store, or fetched into it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from minserve.errors import ModelNotFound
from minserve.registry.download import fetch, in_store
from minserve.registry.source import Source
from minserve.registry.store import ADDRESS, Location, find_model

if TYPE_CHECKING:
    from minserve.config.server import ServerOptions
    from minserve.registry.registration import Registration


LONGEST_URL = 8192  # characters; a JSON body has room for far more


async def obtain(registration: Registration, options: ServerOptions) -> Source:
    """Where the model lies; an address is fetched into the store first, unless that is where it leads.

    Raises:
        ModelNotFound: there is none, or it is not allowed.
        MinServeError: it cannot be fetched.
    """
    store, url = Path(options.model_store), registration.url
    if not url.isprintable() or len(url) > LONGEST_URL:  # it goes into the log
        raise ModelNotFound(f"Model not found at: {url[:LONGEST_URL]}")
    if not ADDRESS.match(url):
        path = await asyncio.to_thread(find_model, store, url, options.allowed_urls)
        return Source(Location(path, registration.name, url), registration)
    if (found := in_store(url, store)) is not None:
        return Source(Location(found, registration.name, url), registration)
    path = await fetch(url, store, options.allowed_urls)
    return Source(Location(path, registration.name, url), registration, downloaded=True)
