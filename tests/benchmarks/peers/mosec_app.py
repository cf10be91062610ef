"""The echo application on mosec: `python mosec_app.py --port 8000`."""

from __future__ import annotations

import sys

from mosec import Runtime, Server, Worker

BATCH_SIZE = 32
WAIT_MS = 1  # mosec takes no 0


class Raw(Worker):  # type: ignore[misc]
    """Bytes as they are, in place of JSON."""

    def serialize(self, data: bytes) -> bytes:
        """The answer's body."""
        return data

    def deserialize(self, data: bytes) -> bytes:
        """The request's body."""
        return data


class Echo(Raw):
    """One request a call."""

    def forward(self, data: bytes) -> bytes:
        """Sends the body back."""
        return data


class EchoBatch(Raw):
    """A batch a call."""

    def forward(self, data: list[bytes]) -> list[bytes]:
        """Sends the bodies back."""
        return data


if __name__ == "__main__":
    server = Server()
    batched = Runtime(EchoBatch, max_batch_size=BATCH_SIZE, max_wait_time=WAIT_MS)
    server.register_runtime({"/predictions/one": [Runtime(Echo)], "/predictions/batch": [batched]})
    print(f"http://127.0.0.1:{sys.argv[sys.argv.index('--port') + 1]}", flush=True)
    server.run()
