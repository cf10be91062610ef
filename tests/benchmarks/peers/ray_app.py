"""The echo application on Ray Serve: `python ray_app.py PORT FOLDER`."""

from __future__ import annotations

import signal
import sys

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import Response

BATCH_SIZE = 32
WAIT_S = 0.001
MANY = 1000  # requests at a replica; its default of 5 would be the limit


class One:
    """One request a call."""

    async def __call__(self, request: Request) -> Response:
        """Sends the body back."""
        return Response(await request.body())


class Batch:
    """A batch a call."""

    @serve.batch(  # type: ignore[untyped-decorator]
        max_batch_size=BATCH_SIZE, batch_wait_timeout_s=WAIT_S
    )
    async def echo(self, bodies: list[bytes]) -> list[bytes]:
        """Sends the bodies back."""
        return bodies

    async def __call__(self, request: Request) -> Response:
        """Joins the next batch."""
        return Response(await self.echo(await request.body()))


if __name__ == "__main__":
    deployment = serve.deployment(max_ongoing_requests=MANY, ray_actor_options={"num_cpus": 0})
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    ray.init(include_dashboard=False, num_cpus=2, _temp_dir=sys.argv[2], log_to_driver=False)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=int(sys.argv[1])), logging_config=quiet)
    serve.run(deployment(One).bind(), name="one", route_prefix="/predictions/one", logging_config=quiet)
    serve.run(deployment(Batch).bind(), name="batch", route_prefix="/predictions/batch", logging_config=quiet)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    print(f"http://127.0.0.1:{sys.argv[1]}", flush=True)
    signal.sigwait({signal.SIGTERM})
    serve.shutdown()
    ray.shutdown()
