"""The echo application on LitServe: `python litserve_app.py PORT`. LitServe reads JSON, so the bodies are JSON strings."""

from __future__ import annotations

import sys

from litserve import LitAPI, LitServer

BATCH_SIZE = 32
WAIT_S = 0.001


class Echo(LitAPI):  # type: ignore[misc]
    """One request a call, or a list of them."""

    def setup(self, device: str) -> None:
        """Nothing to load."""

    def predict(self, x: object) -> object:
        """Sends the bodies back."""
        return x

    def batch(self, inputs: list[object]) -> list[object]:
        """No stacking."""
        return inputs

    def unbatch(self, output: list[object]) -> list[object]:
        """No unstacking."""
        return output


if __name__ == "__main__":
    apis = [
        Echo(api_path="/predictions/one"),
        Echo(api_path="/predictions/batch", max_batch_size=BATCH_SIZE, batch_timeout=WAIT_S),
    ]
    print(f"http://127.0.0.1:{sys.argv[1]}", flush=True)
    server = LitServer(apis, accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, log_level="warning", generate_client_file=False
    )
