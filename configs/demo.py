"""`make demo`: a sentence-embedding model on two torchrun ranks, the README's curl, and its answer beside one process's."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

MODELS = Path(__file__).parent / "models"
TEXT = "minserve puts any PyTorch code behind HTTP."
START_TIMEOUT_S = 180.0


def main() -> int:
    """Starts a server with `minilm` and `minilm-tp`, asks both, and serves on until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--port", type=int, default=8080, help="inference port; management and metrics have the next two"
    )
    parser.add_argument("--once", action="store_true", help="end after the answer")
    options = parser.parse_args()
    command = [sys.executable, "-m", "minserve", "start", "--model-store", str(MODELS), "--models", "minilm,minilm-tp"]
    command += ["--inference-port", str(options.port), "--management-port", str(options.port + 1)]
    command += ["--metrics-port", str(options.port + 2)]
    print(f"$ minserve {' '.join(command[3:])}", flush=True)
    server = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    try:
        if not wait_until_ready(server, f"http://127.0.0.1:{options.port + 1}"):
            return server.wait()
        show_answers(f"http://127.0.0.1:{options.port}")
        if options.once:
            server.terminate()
        else:
            print("\nThe server runs on: try the curl in another terminal. Ctrl-C ends it.", flush=True)
        return server.wait()
    except KeyboardInterrupt:
        return server.wait()
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def wait_until_ready(server: subprocess.Popen[bytes], management: str) -> bool:
    """Waits until both models serve; False when the server has ended."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if all(json.loads(get(f"{management}/models/{name}"))[0]["ready"] for name in ("minilm", "minilm-tp")):
                time.sleep(0.3)  # lets the server's own summary come first on the terminal
                return True
        except OSError:
            pass
        time.sleep(0.2)
    server.terminate()
    return False


def show_answers(url: str) -> None:
    """Sends the README's curl to both models and prints the answer and how far apart they are."""
    two, one = (predict(f"{url}/predictions/{name}") for name in ("minilm-tp", "minilm"))
    shown = ", ".join(f"{value:.6f}" for value in two[:4])
    print(f"\n$ curl {url}/predictions/minilm-tp -H 'Content-Type: text/plain' -d '{TEXT}'")
    print(f'{{"embedding": [{shown}, ... {len(two)} numbers in all]}}')
    difference = max(abs(left - right) for left, right in zip(two, one, strict=True))
    print(f"two ranks against one process: largest difference {difference:.1e}", flush=True)


def predict(url: str) -> list[float]:
    """The embedding of the text, by curl where there is one."""
    if shutil.which("curl"):
        command = ["curl", "--silent", "--show-error", "--fail", url, "-H", "Content-Type: text/plain", "-d", TEXT]
        body = subprocess.run(command, check=True, capture_output=True).stdout
    else:
        body = get(url, TEXT.encode())
    embedding: list[float] = json.loads(body)["embedding"]
    return embedding


def get(url: str, body: bytes | None = None) -> bytes:
    """The body of an answer."""
    request = urllib.request.Request(url, body, {"Content-Type": "text/plain"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        data: bytes = answer.read()
    return data


if __name__ == "__main__":
    sys.exit(main())
