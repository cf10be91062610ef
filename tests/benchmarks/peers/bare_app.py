"""The floor for HTTP in Python: the echo route on bare aiohttp and uvloop, and a stream of as many chunks as the others'."""

from __future__ import annotations

import socket

import uvloop
from aiohttp import web

BACKLOG = 1024  # minserve's
LARGEST_BODY = 32 * 2**20
CHUNK = b"x" * 100
CHUNKS = 256


async def echo(request: web.Request) -> web.Response:
    """POST /predictions/echo."""
    return web.Response(body=await request.read())


async def length(request: web.Request) -> web.Response:
    """POST /predictions/length: the size of the body."""
    return web.Response(body=str(len(await request.read())).encode())


async def stream(request: web.Request) -> web.StreamResponse:
    """POST /predictions/stream."""
    await request.read()
    response = web.StreamResponse()
    response.enable_chunked_encoding()
    await response.prepare(request)
    for _ in range(CHUNKS):
        await response.write(CHUNK)
    await response.write_eof()
    return response


def main() -> None:
    """Serves on a free port of the loopback interface and prints the URL."""
    app = web.Application(client_max_size=LARGEST_BODY)
    for handler in (echo, length, stream):
        app.router.add_post(f"/predictions/{handler.__name__}", handler)
    listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    web.run_app(app, sock=listener, access_log=None, print=None, loop=uvloop.new_event_loop())


if __name__ == "__main__":
    main()
