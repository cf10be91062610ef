"""What minserve is measured against: the same route on bare aiohttp and uvloop. Reads the body and sends it back."""

from __future__ import annotations

import socket

import uvloop
from aiohttp import web

BACKLOG = 1024  # minserve's


async def echo(request: web.Request) -> web.Response:
    """POST /predictions/{model}."""
    return web.Response(body=await request.read())


def main() -> None:
    """Serves on a free port of the loopback interface and prints the URL."""
    app = web.Application()
    app.router.add_post("/predictions/{model}", echo)
    listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    web.run_app(app, sock=listener, access_log=None, print=None, loop=uvloop.new_event_loop())


if __name__ == "__main__":
    main()
