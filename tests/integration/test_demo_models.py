"""Every demo model of configs/ over real torchrun ranks, and the parallel ones against the single process."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.integration.servers import DEMO_MODELS, Answer, RunningServer, server

PARALLEL = ("minilm-tp", "minilm-pp", "minilm-pptp")
TEXT = "minserve puts any PyTorch code behind HTTP."
# The first numbers of the embedding by transformers' BertModel, mean pooling and normalisation, from the same weights.
GOLDEN = [-0.10178298, -0.01695050, -0.02601027, 0.02198500]
MIXED = ["a", TEXT, "Ranks wait for each other. " * 20, "日本語も", "", "x " * 600]


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    names = ("echo", "allreduce", "whoami", "stream-tp", "minilm", *PARALLEL)
    with server(*(DEMO_MODELS / name for name in names)) as started:
        for name in names:
            started.wait_until_ready(name)
        yield started


def embed(running: RunningServer, model: str, texts: Sequence[str]) -> list[list[float]]:
    answer = running.predict_json(model, {"texts": texts})
    assert answer.status == 200, answer.body
    embeddings = json.loads(answer.body)["embeddings"]
    assert isinstance(embeddings, list)
    return embeddings


def test_minilm_gives_the_numbers_of_the_published_model(running: RunningServer) -> None:
    embedding = json.loads(running.predict("minilm", TEXT).body)["embedding"]
    assert embedding[:4] == pytest.approx(GOLDEN, abs=1e-5)
    assert sum(value * value for value in embedding) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("model", PARALLEL)
def test_ranks_give_the_numbers_of_one_process(running: RunningServer, model: str) -> None:
    single = [embed(running, "minilm", [text])[0] for text in MIXED]
    for text, expected in zip(MIXED, single, strict=True):
        assert embed(running, model, [text])[0] == pytest.approx(expected, abs=1e-4)
    for embedding, expected in zip(embed(running, model, MIXED), single, strict=True):
        assert embedding == pytest.approx(expected, abs=1e-4)


async def post_all(url: str, bodies: Sequence[object]) -> list[Answer]:
    """Sends all bodies at once, each from a client of its own."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def post(body: object) -> Answer:
            async with session.post(url, json=body) as answer:
                return Answer(answer.status, dict(answer.headers), await answer.read())

        return await asyncio.gather(*(post(body) for body in bodies))


@pytest.mark.asyncio
@pytest.mark.parametrize("model", ["minilm", *PARALLEL])
async def test_batches_of_different_lengths_do_not_mix(running: RunningServer, model: str) -> None:
    texts = [f"sentence {index} " * (1 + index % 7) for index in range(24)]
    expected = embed(running, "minilm", texts)
    answers = await post_all(f"{running.inference}/predictions/{model}", texts)
    for answer, embedding in zip(answers, expected, strict=True):
        assert json.loads(answer.body)["embedding"] == pytest.approx(embedding, abs=1e-4)


@pytest.mark.asyncio
async def test_each_of_200_clients_gets_the_answer_to_its_question(running: RunningServer) -> None:
    for _ in range(3):
        bodies = [{"value": value, "nonce": 7919 * value + 1} for value in range(200)]
        answers = await post_all(f"{running.inference}/predictions/allreduce", bodies)
        for body, answer in zip(bodies, answers, strict=True):
            assert answer.json == {"sum": body["value"] * 3.0, "world_size": 2, "nonce": body["nonce"]}


@pytest.mark.parametrize("model", ["minilm", *PARALLEL, "allreduce", "stream-tp"])
def test_bad_input_is_a_400_that_says_why(running: RunningServer, model: str) -> None:
    before = running.pids(model)
    answer = running.predict_json(model, {"neither": "this", "nor": "that"})
    assert answer.status == 400
    error = answer.json
    assert isinstance(error, Mapping)
    assert (error["code"], error["type"]) == (400, "BadRequestException")
    assert running.pids(model) == before


def test_ranks_get_torchruns_environment(running: RunningServer) -> None:
    ranks = running.predict("whoami").json
    assert isinstance(ranks, list)
    assert [rank["pid"] for rank in ranks] == running.pids("whoami")
    for index, rank in enumerate(ranks):
        assert (rank["RANK"], rank["LOCAL_RANK"]) == (str(index), str(index))
        assert (rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert (rank["MASTER_ADDR"], rank["OMP_NUM_THREADS"]) == ("127.0.0.1", "1")


def send_raw(running: RunningServer, model: str, headers: bytes, body: bytes) -> bytes:
    """What comes back for a request written by hand."""
    where = urlsplit(running.inference)
    assert where.hostname is not None
    with socket.create_connection((where.hostname, where.port or 80), timeout=20) as connection:
        connection.sendall(b"POST /predictions/%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" % model.encode())
        connection.sendall(headers + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        received = b""
        while part := connection.recv(65536):
            received += part
    return received


def test_a_stream_comes_from_rank_0_alone_chunk_by_chunk(running: RunningServer) -> None:
    """On the wire: one chunk of chunked transfer encoding for each step, none twice."""
    received = send_raw(running, "stream-tp", b"Content-Type: application/json", b'{"text": "abc", "steps": 4}')
    headers, _, chunks = received.partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 200")
    assert b"transfer-encoding: chunked" in headers.lower()
    assert chunks == b"".join(b"5\r\n%d:%d\n\r\n" % (step, (step + 3) * 3) for step in range(1, 5)) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    "headers", [b"Content-Type: image/\xff", b"X-Odd: \xff\xfe", b"Content-Type: text/plain; charset=\xc3\x28"]
)
def test_stray_bytes_in_headers_harm_nobody(running: RunningServer, headers: bytes) -> None:
    before = running.pids("echo")
    assert send_raw(running, "echo", headers, b"body").endswith(b"\r\n\r\nbody")
    assert running.predict("echo", "next").body == b"next"
    assert running.pids("echo") == before


@pytest.mark.asyncio
async def test_streams_of_one_batch_end_each_at_its_own_step(running: RunningServer) -> None:
    bodies = [{"text": "x" * index, "steps": 1 + index % 5} for index in range(12)]
    answers = await post_all(f"{running.inference}/predictions/stream-tp", bodies)
    for index, answer in enumerate(answers):
        steps = range(1, 2 + index % 5)
        assert answer.body.decode() == "".join(f"{step}:{(step + index) * 3}\n" for step in steps)


def test_echo_shows_how_bodies_reach_a_handler(running: RunningServer) -> None:
    as_json = {"Content-Type": "application/json"}
    assert running.predict("echo", '{"a": [1, 2]}', headers=as_json).json == {"a": [1, 2]}
    assert running.predict("echo", "text").body == b"text"
    raw = bytes(range(256))
    assert running.predict("echo", raw, headers={"Content-Type": "image/png"}).body == raw


@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "DELETE"])
def test_every_method_predicts(running: RunningServer, method: str) -> None:
    assert running.predict("echo", "text", method=method).body == b"text"


def test_gloos_loop_threads_take_no_core_from_the_thread_that_has_their_lock(running: RunningServer) -> None:
    for pid in running.pids("allreduce"):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        loops = [int(task.name) for task in tasks if (task / "comm").read_text() == "gloo_tcp_loop\n"]
        assert {os.sched_getscheduler(loop) for loop in loops} == {os.SCHED_BATCH}
        assert os.sched_getscheduler(pid) == os.SCHED_OTHER
