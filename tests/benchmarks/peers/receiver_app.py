"""The floor for a large body over loopback: one blocking socket, read into shared memory, and no parser or event loop."""

from __future__ import annotations

import mmap
import os
import re
import socket
from contextlib import suppress

LARGEST_BODY = 32 * 2**20
STEP = 256 * 1024  # of 64 KiB to 1 MiB none was faster than the others


def main() -> None:
    """Serves on a free port of the loopback interface, one client after the other, and prints the URL."""
    descriptor = os.memfd_create("floor")
    os.ftruncate(descriptor, LARGEST_BODY)
    place = memoryview(mmap.mmap(descriptor, LARGEST_BODY))
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    while True:
        client, _ = listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with client, suppress(OSError):
            while _answered(client, place):
                pass


def _answered(client: socket.socket, place: memoryview) -> bool:
    head = b""
    while b"\r\n\r\n" not in head:
        received = client.recv(STEP)
        if not received:
            return False
        head += received
    head, _, begun = head.partition(b"\r\n\r\n")
    match = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
    size = int(match[1]) if match else 0
    place[: len(begun)] = begun
    have = len(begun)
    while have < size:
        count = client.recv_into(place[have : min(size, have + STEP)])
        if not count:
            return False
        have += count
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%d" % (len(str(size)), size))
    return True


if __name__ == "__main__":
    main()
