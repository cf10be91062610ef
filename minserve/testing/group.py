"""`rank_group`: one model on real ranks, and all that a test wants to do to it and know of it."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from minserve.testing import answers
from minserve.testing.answers import Answer, Body
from minserve.testing.faults import find_fault
from minserve.testing.overlay import Config, configure, overlay, read_config
from minserve.testing.running import START_TIMEOUT_S, RunningServer, StartFailed, running_server
from minserve.testing.stacks import read_stacks

PATIENCE_S = 2.0  # for requests in flight when a test is over: nobody waits for their answers
TAIL_LINES = 20
MOST_CLIENTS = 64
SERVING = ("READY", "BUSY")


class Group:
    """A rank group under test. Made by `rank_group`.

    Attributes:
        name: of the model, its folder's.
        server: the server around it, for what this class does not offer.
    """

    def __init__(self, name: str, server: RunningServer) -> None:
        self.name = name
        self.server = server
        self._struck: set[int] = set()  # pids that a fault was to end

    # ── requests ──

    def predict(
        self,
        body: Body = b"",
        *,
        content_type: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> Answer:
        """One request and its answer, whatever its status.

        Args:
            body: bytes (application/octet-stream), text (text/plain), or a value that goes as JSON.
            content_type: instead of the one that the body's type stands for.
        """
        data, kind = answers.encode(body)
        return answers.call(self._url, data, {"Content-Type": content_type or kind, **(headers or {})}, timeout=timeout)

    def predict_many(
        self,
        bodies: Sequence[Body],
        *,
        content_type: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> list[Answer]:
        """Requests at one time (64 at most), so in batches where batchSize allows. Answers in the order of the bodies."""
        with ThreadPoolExecutor(max(1, min(len(bodies), MOST_CLIENTS))) as clients:
            calls = [
                clients.submit(self.predict, body, content_type=content_type, headers=headers, timeout=timeout)
                for body in bodies
            ]
            return [one.result() for one in calls]

    def stream(
        self,
        body: Body = b"",
        *,
        content_type: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> Iterator[bytes]:
        """The chunks of a streaming answer, each as it comes. The request goes out with the first `next`; closing hangs up.

        Raises:
            StreamRefused: the answer is an error.
            StreamBroken: the stream ended before its last chunk.
        """
        data, kind = answers.encode(body)
        return answers.stream(self._url, data, {"Content-Type": content_type or kind, **(headers or {})}, timeout)

    @property
    def _url(self) -> str:
        return f"{self.server.inference}/predictions/{self.name}"

    # ── faults ──

    def inject(self, fault: str, rank: int = 0) -> None:
        """Does something to a rank: kill, terminate, crash, stop, resume; or kill-torchrun, which needs no rank.

        It is done when this returns; that the server has noticed is another matter, see `wait_ready`.

        Raises:
            ValueError: there is no such fault or rank.
            ProcessLookupError: it has ended already.
        """
        what = find_fault(fault)
        if what.torchrun:
            pid = self._torchrun(fault)
        elif rank in (pids := self._pids()):
            pid = pids[rank]
        else:
            raise ValueError(
                f"rank: found {rank}, allowed: {', '.join(map(str, sorted(pids))) or 'none runs just now'}"
            )
        os.kill(pid, what.signal)
        if what.lethal:
            self._struck.add(pid)

    def _torchrun(self, fault: str) -> int:
        worker = self._worker()
        pid = worker["pid"]
        assert isinstance(pid, int)
        if pid in self._pids().values():
            raise ValueError(f"fault: found {fault!r}, allowed with ranks under torchrun; {self.name} is one process")
        return pid

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Waits until the group serves. After a lethal fault that is another group, which the server has started anew.

        Raises:
            StartFailed: the server has given it up, or has ended.
            TimeoutError: not in time; the message has its state and last error.
        """
        deadline = time.monotonic() + timeout
        while True:
            if self.server.process.poll() is not None:
                raise StartFailed(f"the server has ended:\n{self.server.log[-3000:]}")
            model = self.server.describe(self.name)
            if "unhealthy" in model:
                raise StartFailed(str(model["unhealthy"]))
            worker = self._worker(model)
            if worker["state"] in SERVING and not self._struck & {worker["pid"], *self._pids(worker).values()}:
                return
            if time.monotonic() > deadline:
                error = worker.get("lastError", "none")
                raise TimeoutError(f"{self.name}: {worker['state']} after {timeout:g} s; its last error: {error}")
            time.sleep(0.02)

    # ── what it is doing ──

    @property
    def pids(self) -> list[int]:
        """The ranks' processes, in rank order."""
        return list(self._pids().values())

    @property
    def restarts(self) -> int:
        """How often it was started again."""
        return self.server.restarts(self.name)

    def events(self) -> list[dict[str, object]]:
        """What has happened to it, oldest first: the `kind`, `rank`, `detail` ... of /models/{model}/events."""
        answer = answers.call(f"{self.server.management}/models/{self.name}/events").json
        assert isinstance(answer, dict), answer
        events: list[dict[str, object]] = answer["events"]
        return events

    def log(self, rank: int | None = None) -> str:
        """What a rank has printed and logged, in all its lives; without a rank the server's whole log.

        Lines come a moment after they were printed: wait with `until(lambda: "..." in group.log(1))`.
        """
        if rank is None:
            return self.server.log
        line = re.compile(rf"^(?:\S+ \S+ [A-Z]+ +)?{re.escape(self.name)}/\d+ rank {rank} \| ?(.*)$", re.MULTILINE)
        return "\n".join(line.findall(self.server.log))

    def stacks(self, timeout: float = 5.0) -> dict[int, str]:
        """The Python stacks of each rank, of all its threads; the reason in brackets where there is none."""
        worker = self._worker()
        directory = self._runtime / "m1" / f"{worker['id']}.r"
        return read_stacks(directory, self._pids(worker), timeout)

    def explain(self) -> str:
        """The last lines and the stacks of each rank, and the group's last error."""
        worker = self._worker()
        parts = [f"{self.name} is {worker['state']}; restarts: {worker['restarts']}"]
        if worker.get("lastError"):
            parts.append(f"last error: {worker['lastError']}")
        for rank, stack in self.stacks().items():
            lines = self.log(rank).splitlines()[-TAIL_LINES:]
            parts += [f"── rank {rank}, last lines ──", *lines, f"── rank {rank}, stacks ──", stack]
        return "\n".join(parts)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Adds `explain()` as a note to any exception of its body. For fixtures, whose `yield` sees none of a test."""
        try:
            yield
        except (GeneratorExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # pytest.fail() raises no Exception
            if not any(self.name in note for note in getattr(error, "__notes__", ())):
                error.add_note(self._explain_whatever_happens())
            raise

    def _explain_whatever_happens(self) -> str:
        try:
            return self.explain()
        except Exception as error:  # the server may be gone; the test's own exception is the one to see
            return f"{self.name}: its ranks cannot be asked ({error!r}). The log ends with:\n{self.server.log[-3000:]}"

    def _worker(self, model: Mapping[str, object] | None = None) -> dict[str, object]:
        workers = (model or self.server.describe(self.name))["workers"]
        assert isinstance(workers, list)
        assert workers, f"{self.name} has no worker"
        worker: dict[str, object] = workers[0]
        return worker

    def _pids(self, worker: Mapping[str, object] | None = None) -> dict[int, int]:
        found = (worker or self._worker())["ranks"]
        assert isinstance(found, list)
        return {rank["rank"]: rank["pid"] for rank in found if rank["pid"]}

    @property
    def _runtime(self) -> Path:
        return self.server.runtime / f"minserve-{self.server.process.pid}"


@contextmanager
def rank_group(
    model_dir: str | os.PathLike[str],
    nproc: int | None = None,
    *,
    parallel_type: str | None = None,
    config: Config | None = None,
    environ: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    start_timeout: float = START_TIMEOUT_S,
) -> Iterator[Group]:
    """One rank group of a model directory, READY, behind a real server on ports of its own.

    The directory is never written to: the server gets one of links to its files, with a model-config.yaml of its own. At
    the end the server, its ranks, what they have started and all their files are gone. An exception of the body gets the
    last lines and the stacks of each rank as a note.

    Args:
        nproc: ranks; None: as the model-config.yaml says.
        parallel_type: tp, pp, pptp, custom; None: as the model-config.yaml says, else tp for more than one rank.
        config: keys of model-config.yaml to set otherwise, nested as there; None takes a key out.
        environ: more for the environment of server and ranks.
        options: more for `minserve start`.
        start_timeout: seconds until it must be READY.

    Raises:
        StartFailed: it does not come up. The message has the rank's reason and its last lines.
        FileNotFoundError: there is no such directory.
        ConfigError: its model-config.yaml is no YAML.
        ValueError: `nproc` is none that a model of that type can have.
    """
    source = Path(os.path.abspath(model_dir))
    wanted = configure(read_config(source), nproc, parallel_type, config or {})
    with running_server(lambda store: overlay(source, store / source.name, wanted), options, environ) as server:
        group = Group(source.name, server)
        try:
            _wait_until_up(group, start_timeout)
            with group.explaining():
                yield group
        finally:
            with suppress(subprocess.TimeoutExpired):  # it is killed then
                server.stop(PATIENCE_S)


def _wait_until_up(group: Group, timeout: float) -> None:
    group.server.wait_until_started(timeout)
    worker = group._worker()
    if worker["state"] not in SERVING:
        lines = worker.get("lastLines")
        told = "".join(f"\n    {line}" for line in lines) if isinstance(lines, list) else ""
        raise StartFailed(f"{worker.get('lastError') or worker['state']}{told}")
