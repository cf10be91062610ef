from __future__ import annotations

import json
import logging
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import minserve
from minserve.errors import WireError
from minserve.rank import threads
from minserve.rank.loop import Rank
from minserve.wire.frames import Frame, Kind
from minserve.wire.messages import Answers, Failure, Loaded, Metrics, Progress, new_batch, unpack
from tests.unit.rank.rig import (
    DEADLINE_S,
    SHUTDOWN,
    FakeConnection,
    FakeSlot,
    batch,
    cancel,
    frame,
    grant,
    launch,
    load,
    parts,
    probe,
    requests,
    resume,
)

LOG = "minserve.rank.outbox"
COMPAT = Path(minserve.__file__).parent / "compat"
ECHO = """
    def handle(data, context):
        return [bytes(row["body"]) for row in data or []]
"""
# Raises where a body says so, and answers the others.
FRAGILE = """
    def handle(data, context):
        for row in data or []:
            if row["body"] == b"raise":
                raise LookupError("no such token")
        return [bytes(row["body"]) for row in data or []]
"""


class Served:
    """What became of a rank."""

    def __init__(self, connection: FakeConnection, slot: FakeSlot, code: int) -> None:
        self.connection = connection
        self.slot = slot
        self.code = code
        self.log = [entry for entry in connection.log if "PROGRESS" not in entry]


Serve = Callable[..., Served]


@pytest.fixture
def serve(model_dir: Path) -> Serve:
    """Runs a rank over a handler's source and the frames behind LOAD. The link ends after the last of them."""

    def run(source: str, *frames: Frame, rank: int = 0, **options: Any) -> Served:
        (model_dir / "handler.py").write_text(textwrap.dedent(source))
        connection = FakeConnection([load(str(model_dir), **options), *frames])
        slot = FakeSlot()
        return Served(connection, slot, Rank(launch(rank), connection, slot).run())

    return run


# ── load ──


@pytest.mark.parametrize("rank", [0, 1])
def test_a_load_is_answered_by_every_rank_after_its_progress(serve: Serve, rank: int) -> None:
    served = serve(ECHO, SHUTDOWN, rank=rank)
    assert served.connection.log == [
        "<LOAD 0",
        ">PROGRESS 0",
        ">PROGRESS 0",
        ">LOADED 0",
        "<SHUTDOWN 0",
    ]
    stages = [unpack(Progress, sent.meta).stage for sent in served.connection.of(Kind.PROGRESS)]
    assert stages == ["importing", "initializing"]
    (loaded,) = served.connection.of(Kind.LOADED)
    assert 0 <= unpack(Loaded, loaded.meta).seconds < 60
    assert served.code == 0


@pytest.mark.parametrize("source", ["raise LookupError('no weights')", "raise SystemExit('no weights')"])
def test_a_handler_that_cannot_load_is_reported_with_its_traceback(serve: Serve, source: str, model_dir: Path) -> None:
    served = serve(source, batch(1, b"never read"), rank=1)
    assert served.log == ["<LOAD 0", ">FAILED 0"]
    assert served.code == 1
    failure = served.connection.failure(Kind.FAILED)
    assert (failure.text, failure.origin, failure.needs) == ("no weights", 1, (0, 1))
    assert failure.place == f"{model_dir}/handler.py:1"
    assert source in failure.traceback


def test_a_yaml_that_is_none_is_reported_as_a_failed_load(serve: Serve) -> None:
    served = serve(ECHO, yaml=b"a: [")
    assert served.log == ["<LOAD 0", ">FAILED 0"]


def test_the_context_has_what_load_says(serve: Serve, model_dir: Path) -> None:
    source = """
        import json
        def handle(data, context):
            known = [context.model_name, context.manifest, context.model_yaml_config, context.system_properties]
            return [json.dumps(known)]
    """
    served = serve(source, batch(1, b""), yaml=b"handler: {layers: 3}", gpu=True, rank=0)
    ((_, body),) = served.connection.answers()[0]
    name, manifest, config, properties = json.loads(body)
    assert name == "m"
    assert manifest["model"] == {"modelName": "m", "modelVersion": "1.0", "handler": "handler.py"}
    assert config == {"handler": {"layers": 3}}
    assert (properties["model_dir"], properties["batch_size"], properties["gpu_id"]) == (str(model_dir), 4, 0)


@pytest.mark.parametrize(("rank", "reply_done", "quiet"), [(0, False, False), (1, False, True), (1, True, False)])
def test_a_rank_that_says_nothing_at_the_end_of_a_batch_is_quiet(
    serve: Serve, rank: int, reply_done: bool, quiet: bool
) -> None:
    assert serve(ECHO, rank=rank, reply_done=reply_done).connection.quiet is quiet


def test_an_archive_brings_its_manifest_and_the_servers_settings(serve: Serve) -> None:
    source = """
        def handle(data, context):
            if data is None: return None
            limit = context.system_properties["limit_max_image_pixels"]
            return [[context.manifest, limit, type(data[0]["body"]).__name__]]
    """
    options = {"manifest": '{"model": {"x": 1}}', "limit_max_image_pixels": False, "decode_input": False}
    text = frame(Kind.BATCH, new_batch(requests(b"abc", content_type="text/plain"), 8), 1, b"abc")
    served = serve(source, text, handler="handler", **options)
    ((_, body),) = served.connection.answers()[0]
    assert json.loads(body) == [{"model": {"x": 1}}, False, "bytearray"]


@pytest.mark.parametrize(("gpu", "rank", "expected"), [(True, 0, "0"), (True, 1, "1"), (False, 1, "None")])
def test_the_gpu_is_this_ranks_own(serve: Serve, gpu: bool, rank: int, expected: str) -> None:
    source = """
        class Model:
            def initialize(self, context):
                raise LookupError(context.system_properties["gpu_id"])
            def handle(self, data, context): ...
    """
    assert serve(source, gpu=gpu, rank=rank).connection.failure(Kind.FAILED).text == expected


def test_anything_but_load_comes_first_stops_the_rank(capfd: pytest.CaptureFixture[str]) -> None:
    connection = FakeConnection([batch(1, b"x")])
    assert Rank(launch(1), connection, FakeSlot()).run() == 1
    assert capfd.readouterr().err == "minserve: rank 1 stops: expected LOAD, got BATCH\n"
    assert connection.sent == []


@pytest.mark.parametrize("frames", [[], [resume(3)]])
def test_a_link_that_ends_ends_the_rank_quietly(serve: Serve, frames: list[Frame]) -> None:
    assert serve(ECHO, *frames).code == 0


def test_shutdown_closes_the_handler(serve: Serve, model_dir: Path) -> None:
    source = ECHO + "\n    def close(): open('closed', 'x').close()"
    assert serve(source, SHUTDOWN, batch(1, b"never read")).log[-1] == "<SHUTDOWN 0"
    assert (model_dir / "closed").exists()


# ── batches ──


def test_rank_0_answers_each_batch(serve: Serve) -> None:
    served = serve(ECHO, batch(1, b"a", b"bc"), batch(2, b""), SHUTDOWN)
    assert served.log == ["<LOAD 0", ">LOADED 0", "<BATCH 1", ">REPLY 1", "<BATCH 2", ">REPLY 2", "<SHUTDOWN 0"]
    assert served.connection.answers() == [[(0, b"a"), (1, b"bc")], [(0, b"")]]


def test_rank_0_never_says_that_it_skips(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, LOG):
        serve(ECHO, batch(1, b"a"), SHUTDOWN)
    assert "skip" not in caplog.text


def test_another_rank_runs_the_batch_and_sends_nothing(
    serve: Serve, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = """
        def handle(data, context):
            if data:
                with open("ran", "a") as file:
                    file.write(bytes(data[0]["body"]).decode())
            return "no list, and nobody minds here"
    """
    with caplog.at_level(logging.DEBUG, LOG):
        served = serve(source, batch(1, b"a"), batch(2, b"b"), SHUTDOWN, rank=1)
    assert served.log == ["<LOAD 0", ">LOADED 0", "<BATCH 1", "<BATCH 2", "<SHUTDOWN 0"]
    assert (model_dir / "ran").read_text() == "ab"
    skips = [record for record in caplog.records if record.name == LOG]
    assert [(record.levelno, record.getMessage()) for record in skips] == [
        (logging.DEBUG, "skip sending response at rank 1")
    ] * 2


def test_another_rank_says_done_where_the_reply_waits_for_all(serve: Serve) -> None:
    assert serve(ECHO, batch(1, b"a"), rank=1, reply_done=True).log[-1] == ">DONE 1"
    assert serve(ECHO, batch(1, b"a"), rank=0, reply_done=True).log[-1] == ">REPLY 1"


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([batch(2, b"x")], "got batch 2 after batch 0"),
        ([batch(1, b"x"), batch(1, b"x")], "got batch 1 after batch 1"),
        ([batch(1, b"x"), batch(3, b"x")], "got batch 3 after batch 1"),
    ],
)
def test_a_batch_out_of_sequence_stops_the_rank_before_it_runs(
    serve: Serve, frames: list[Frame], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    served = serve(ECHO, *frames, batch(2, b"never read"))
    assert served.code == 1
    assert served.log[-1] == f"<BATCH {frames[-1].seq}"
    assert capfd.readouterr().err == f"minserve: rank 0 stops: {reason}\n"


def test_grants_cancels_and_the_rest_between_batches_change_nothing(serve: Serve) -> None:
    strangers = [grant(1, 16), cancel(1, 16), resume(1), grant(9, 16), cancel(9, 16), resume(9)]
    served = serve(ECHO, batch(1, b"a"), *strangers, batch(2, b"b"))
    assert served.connection.answers() == [[(0, b"a")], [(0, b"b")]]


def test_status_and_headers_reach_the_answer_and_not_the_next_one(serve: Serve) -> None:
    source = """
        def handle(data, context):
            if data and data[0]["body"] == b"odd":
                context.set_response_status(404, "Nowhere", idx=1)
                context.set_response_content_type(1, "text/x")
            return [""] * len(data or [])
    """
    served = serve(source, batch(1, b"odd", b"x"), batch(2, b"x", b"x"))
    seen = [[(a.status, a.reason, a.headers) for a, _ in parts(sent)] for sent in served.connection.of(Kind.REPLY)]
    plain = (200, "", ())
    assert seen == [[plain, (404, "Nowhere", (("content-type", "text/x"),))], [plain, plain]]


def test_a_meta_that_is_no_batch_ends_the_rank(serve: Serve) -> None:
    with pytest.raises(WireError, match="bad Batch message"):
        serve(ECHO, Frame(Kind.BATCH, 0, 1, bytearray(b"\xc1"), bytearray()))


# ── batches of rank 0 alone ──


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_runs_a_batch_where_the_handler_calls_the_others(serve: Serve, rank: int, model_dir: Path) -> None:
    source = """
        def handle(data, context):
            if data:
                open(f"ran.{bytes(data[0]['body']).decode()}", "x").close()
            return [bytes(row["body"]) for row in data or []]
    """
    served = serve(source, batch(1, b"a"), batch(2, b"b"), SHUTDOWN, rank=rank, predict_on="rank0", reply_done=True)
    end = ">REPLY" if rank == 0 else ">DONE"
    assert served.log[2:] == ["<BATCH 1", f"{end} 1", "<BATCH 2", f"{end} 2", "<SHUTDOWN 0"]
    assert served.slot.log == ["received 1", "finished 1", "received 2", "finished 2"]
    assert len(list(model_dir.glob("ran.*"))) == (2 if rank == 0 else 0)


def test_a_failure_of_rank_0_alone_needs_no_other_to_fail_alike(serve: Serve) -> None:
    served = serve(FRAGILE, batch(1, b"raise"), predict_on="rank0")
    assert served.connection.failure().needs == (0,)


def test_every_rank_runs_its_probe_also_there(serve: Serve) -> None:
    served = serve(PROBING.format(body="return False"), probe(1), rank=1, predict_on="rank0")
    assert served.connection.failure().type_name == "ProbeFailed"


# ── metrics ──

RECORDING = """
    class Model:
        def initialize(self, context):
            context.metrics.add_counter("loads", 1)
        def handle(self, data, context):
            for _ in range(len(data[0]["body"])):
                context.metrics.add_counter("letters", 1, 0)
            if data[0]["body"] == b"raise":
                raise LookupError
            return ["x"]
"""


def recorded(served: Served) -> list[tuple[int, list[tuple[str, str]]]]:
    """(seq, name and request id of each metric) of each frame."""
    return [
        (sent.seq, [(metric.name, metric.request_id) for metric in unpack(Metrics, sent.meta).metrics])
        for sent in served.connection.of(Kind.METRICS)
    ]


@pytest.mark.parametrize(("rank", "done"), [(0, ">REPLY"), (1, ">DONE"), (1, "")])
def test_metrics_go_in_front_of_the_end_of_the_batch_and_of_the_load_on_every_rank(
    serve: Serve, rank: int, done: str
) -> None:
    served = serve(RECORDING, batch(1, b"ab"), batch(2, b""), rank=rank, reply_done=done == ">DONE")
    ends = [[f"{done} {seq}"] if done else [] for seq in (1, 2)]
    load = ["<LOAD 0", ">METRICS 0", ">LOADED 0"]
    assert served.log == [*load, "<BATCH 1", ">METRICS 1", *ends[0], "<BATCH 2", *ends[1]]
    assert recorded(served) == [(0, [("loads", "")]), (1, [("letters", "r0")] * 2)]


def test_a_batch_that_raises_has_metrics_too(serve: Serve) -> None:
    assert serve(RECORDING, batch(1, b"raise")).log[3:] == ["<BATCH 1", ">METRICS 1", ">ERROR 1"]


def test_a_load_that_fails_has_metrics_too(serve: Serve) -> None:
    source = RECORDING.replace('"loads", 1)', '"loads", 1)\n            raise LookupError')
    assert serve(source).log == ["<LOAD 0", ">METRICS 0", ">FAILED 0"]


def test_more_metrics_than_a_frame_should_hold_go_in_several(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minserve.rank.outbox.METRICS_PER_FRAME", 2)
    served = serve(RECORDING, batch(1, b"abcde"))
    assert served.log[3:] == ["<BATCH 1", ">METRICS 1", ">METRICS 1", ">METRICS 1", ">REPLY 1"]
    assert sum(len(names) for _, names in recorded(served)) == 6


def test_rank_0_tells_with_its_answers_how_long_a_batch_took(serve: Serve) -> None:
    served = serve("import time\ndef handle(data, context):\n    time.sleep(0.002)\n    return ['x']", batch(1, b""))
    (reply,) = served.connection.of(Kind.REPLY)
    assert 0.002 <= unpack(Answers, reply.meta).seconds < 60


def test_a_handler_may_put_metrics_of_its_own_in_place_of_ours(serve: Serve) -> None:
    source = """
        class Model:
            def initialize(self, context):
                context.metrics = None
            def handle(self, data, context):
                return ["x"]
    """
    declared = [{"name": "PredictionTime", "type": "gauge", "unit": "ms", "dimensions": ["ModelName", "Level"]}]
    assert serve(source, batch(1, b""), metrics=json.dumps(declared)).log[-1] == ">REPLY 1"


# ── async handlers ──


def test_a_coroutine_is_run_to_its_end_and_its_loop_goes_on_with_the_next_batch(serve: Serve) -> None:
    source = """
        import asyncio
        class Model:
            def initialize(self, context):
                self.later = None
            async def handle(self, data, context):
                before, self.later = self.later, asyncio.get_running_loop().create_future()
                if before is not None:
                    before.set_result(b"earlier")
                    return [await before]
                return [b"first"]
    """
    served = serve(source, batch(1, b""), batch(2, b""), SHUTDOWN)
    assert served.connection.answers() == [[(0, b"first")], [(0, b"earlier")]]


def test_an_exception_of_a_coroutine_is_an_error_like_any_other(serve: Serve, model_dir: Path) -> None:
    source = """
        async def handle(data, context):
            if data: raise LookupError("gone")
    """
    served = serve(source, batch(1, b""), resume(1), batch(2, b""))
    assert served.log[2:5] == ["<BATCH 1", ">ERROR 1", "<CONTINUE 1"]
    failure = served.connection.of(Kind.ERROR)[0]
    assert unpack(Failure, failure.meta).place == f"{model_dir}/handler.py:3"


ASYNC_STREAMS = [
    "async def handle(data, context):\n    yield ['a']\n    yield ['b']",
    "async def handle(data, context):\n    if data: return chunks()\nasync def chunks():\n    yield ['a']\n    yield ['b']",
]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("source", ASYNC_STREAMS)
def test_an_async_generators_yields_are_chunks(serve: Serve, source: str, rank: int) -> None:
    served = serve(source, batch(1, b""), batch(2, b""), rank=rank)
    assert served.connection.answers(Kind.CHUNK) == ([[(0, b"a")], [(0, b"b")]] * 2 if rank == 0 else [])
    assert served.connection.answers() == ([[(0, b"")]] * 2 if rank == 0 else [])
    assert served.slot.log[:4] == ["received 1", "step 1 of 1", "step 2 of 1", "finished 1"]


def test_the_loop_goes_on_while_an_async_generator_waits_for_its_grant(serve: Serve) -> None:
    source = """
        import asyncio
        import minserve
        async def handle(data, context):
            asyncio.get_running_loop().call_later(0, minserve.report_progress, "meanwhile")
            for _ in range(3):
                yield ["a"]
    """
    served = serve(source, batch(1, b"", grant=1), grant(1, 3))
    assert [entry for entry in served.connection.log if "CHUNK" in entry] == [">CHUNK 1"] * 3
    stages = [unpack(Progress, sent.meta).stage for sent in served.connection.of(Kind.PROGRESS)]
    assert stages[-1] == "meanwhile"


@pytest.mark.parametrize("rank", [0, 1])
def test_an_async_generator_is_cancelled_in_step_and_cleans_up(serve: Serve, rank: int) -> None:
    source = """
        import asyncio
        import minserve
        async def handle(data, context):
            try:
                while data[0]["body"] == b"":
                    yield ["a"]
                yield ["short"]
            finally:
                await asyncio.sleep(0)
                minserve.report_progress("cleaned up")
    """
    frames = [batch(1, b"", grant=2), cancel(1, 2), batch(2, b"x"), resume(1), SHUTDOWN]
    served = serve(source, *frames, rank=rank, reply_done=True)
    chunk = [">CHUNK 1"] if rank == 0 else []
    assert served.connection.log[4:] == [
        "<BATCH 1",
        *chunk * 2,
        "<CANCEL 1",
        ">PROGRESS 0",
        ">ERROR 1",
        "<BATCH 2",
        "<CONTINUE 1",
        *[">CHUNK 2"] * (rank == 0),
        ">PROGRESS 0",
        ">REPLY 2" if rank == 0 else ">DONE 2",
        "<SHUTDOWN 0",
    ]
    assert served.connection.failure().kind == "cancelled"


def test_an_async_close_is_waited_for(serve: Serve, model_dir: Path) -> None:
    source = ECHO + "\n    async def close(): open('closed', 'x').close()"
    serve(source, SHUTDOWN)
    assert (model_dir / "closed").exists()


# ── exceptions ──


@pytest.mark.parametrize("rank", [0, 1])
def test_after_an_exception_a_rank_goes_on_only_with_continue_and_then_in_order(serve: Serve, rank: int) -> None:
    frames = [batch(1, b"raise"), batch(2, b"a"), batch(3, b"b"), resume(1), batch(4, b"c"), SHUTDOWN]
    served = serve(FRAGILE, *frames, rank=rank, reply_done=True)
    end = ">REPLY" if rank == 0 else ">DONE"
    assert served.log[2:] == [
        "<BATCH 1",
        ">ERROR 1",
        "<BATCH 2",
        "<BATCH 3",
        "<CONTINUE 1",
        f"{end} 2",
        f"{end} 3",
        "<BATCH 4",
        f"{end} 4",
        "<SHUTDOWN 0",
    ]
    assert served.connection.answers() == ([[(0, b"a")], [(0, b"b")], [(0, b"c")]] if rank == 0 else [])


def test_a_parked_batch_that_raises_waits_too_and_parks_behind_what_is_parked(serve: Serve) -> None:
    frames = [batch(1, b"raise"), batch(2, b"raise"), batch(3, b"a"), resume(1), batch(4, b"b"), resume(2)]
    served = serve(FRAGILE, *frames)
    assert served.log[2:] == [
        "<BATCH 1",
        ">ERROR 1",
        "<BATCH 2",
        "<BATCH 3",
        "<CONTINUE 1",
        ">ERROR 2",
        "<BATCH 4",
        "<CONTINUE 2",
        ">REPLY 3",
        ">REPLY 4",
    ]


def test_the_continue_of_another_batch_does_not_count(serve: Serve) -> None:
    served = serve(FRAGILE, batch(1, b"ok"), batch(2, b"raise"), batch(3, b"a"), resume(1), resume(3))
    assert served.log[-1] == "<CONTINUE 3"
    assert served.connection.answers() == [[(0, b"ok")]]


@pytest.mark.parametrize("last", [[], [SHUTDOWN, resume(1)]])
def test_a_rank_that_waits_for_continue_ends_with_its_server(serve: Serve, last: list[Frame]) -> None:
    served = serve(FRAGILE, batch(1, b"raise"), batch(2, b"parked"), *last)
    assert served.log[-1] == ("<SHUTDOWN 0" if last else "<BATCH 2")
    assert served.code == 0
    assert not served.connection.of(Kind.REPLY)


def test_an_exception_is_reported_as_it_was_raised(serve: Serve, model_dir: Path) -> None:
    failure = serve(FRAGILE, batch(1, b"raise"), rank=1).connection.failure()
    assert (failure.kind, failure.type_name, failure.text) == ("own", "LookupError", "no such token")
    assert (failure.place, failure.origin, failure.needs) == (f"{model_dir}/handler.py:5", 1, (0, 1))


def test_an_exception_that_quotes_a_lone_surrogate_does_not_end_the_rank(serve: Serve) -> None:
    source = """
        import json
        def handle(data, context):
            raise KeyError(json.loads(data[0]["body"]))
    """
    served = serve(source, batch(1, rb'"\ud800"'), resume(1), SHUTDOWN)
    assert served.log[-3:] == [">ERROR 1", "<CONTINUE 1", "<SHUTDOWN 0"]


def test_a_prediction_exception_chooses_the_status(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(COMPAT)
    source = """
        from ts.utils.util import PredictionException
        def handle(data, context):
            if data:
                raise PredictionException("too long", 413)
    """
    failure = serve(source, batch(1, b"x")).connection.failure()
    assert (failure.type_name, failure.status) == ("PredictionException", 413)
    assert "too long" in failure.text


def test_system_exit_flies(serve: Serve, model_dir: Path) -> None:
    """The process ends with the handler's own status, which the server tells the client."""
    with pytest.raises(SystemExit) as exit_:
        serve("import sys\ndef handle(data, context):\n    if data: sys.exit(7)", batch(1, b"x"))
    assert exit_.value.code == 7


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ("['a']", "number of batch response mismatched: 2 requests, 1 answers"),
        ("None", "handle must return a list, not a NoneType"),
        ("['a', {1}]", "answer 1 is of type set"),
        ("['a', '\\ud800']", "answer 1 is of type str"),
        ("context.set_response_status(99, '', 1) or ['a', 'b']", "answer 1: response status 99"),
        ("context.set_response_header(0, 'x', 'a\\n') or ['a', 'b']", "answer 0: bad response header"),
    ],
)
def test_what_cannot_be_sent_is_refused_on_rank_0_without_waiting(serve: Serve, answers: str, text: str) -> None:
    source = f"""
        def handle(data, context):
            if data and len(data) == 1:
                return ["fine"]
            return data and {answers}
    """
    served = serve(source, batch(1, b"", b""), batch(2, b""))
    assert served.log[2:] == ["<BATCH 1", ">ERROR 1", "<BATCH 2", ">REPLY 2"]
    failure = served.connection.failure()
    assert (failure.kind, failure.origin, failure.status) == ("refused", 0, 0)
    assert text in failure.text


# ── streams ──

COUNTING = """
    def handle(data, context):
        if data is None: return None
        {body}
"""


def streaming(body: str) -> str:
    return COUNTING.format(body=body.replace("\n", "\n        "))


def test_a_generators_yields_are_chunks_and_its_end_is_the_reply(serve: Serve) -> None:
    source = streaming("yield ['a', None]\nyield [None, None]\nyield ['b', b'c']")
    served = serve(source, batch(1, b"", b""), batch(2, b"", b""))
    one = [">CHUNK 1", ">CHUNK 1", ">CHUNK 1", ">REPLY 1"]
    assert served.log[2:] == ["<BATCH 1", *one, "<BATCH 2", *[entry.replace("1", "2") for entry in one]]
    assert served.connection.answers(Kind.CHUNK)[:3] == [[(0, b"a")], [], [(0, b"b"), (1, b"c")]]
    assert served.connection.answers()[0] == [(0, b""), (1, b"")]
    steps = [unpack(Answers, sent.meta).step for sent in served.connection.sent if sent.seq == 2]
    assert steps == [1, 2, 3, 3]


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        ("yield ['a']\nreturn ['last']", [(0, b"last")]),
        ("return ['only']\nyield", [(0, b"only")]),
        ("return\nyield", [(0, b"")]),
    ],
)
def test_what_a_generator_returns_is_its_last_chunk(serve: Serve, body: str, reply: object) -> None:
    assert serve(streaming(body), batch(1, b"")).connection.answers() == [reply]


def test_another_rank_runs_the_generator_to_its_end_and_sends_nothing(
    serve: Serve, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = streaming("yield ['a']\nyield object()\nopen('exhausted', 'x').close()")
    with caplog.at_level(logging.DEBUG, LOG):
        served = serve(source, batch(1, b""), rank=1)
    assert served.log[2:] == ["<BATCH 1"]
    assert (model_dir / "exhausted").exists()
    assert caplog.messages.count("skip sending response at rank 1") == 1


@pytest.mark.parametrize("bad", ["['a', 'b']", "[{1}]", "'text'"])
def test_a_bad_chunk_mutes_is_reported_once_and_the_generator_is_exhausted(
    serve: Serve, model_dir: Path, bad: str
) -> None:
    """The other ranks go on with the collectives of its later steps, so it must, too."""
    source = streaming(f"yield ['a']\nyield {bad}\nyield {bad}\nyield ['c']\nopen('exhausted', 'w').close()")
    served = serve(source, batch(1, b""), batch(2, b""))
    # Its steps are told, without chunks; and no wait for CONTINUE.
    one = [">CHUNK 1", ">ERROR 1", ">CHUNK 1", ">CHUNK 1", ">CHUNK 1", ">REPLY 1"]
    assert served.log[2:] == ["<BATCH 1", *one, "<BATCH 2", *[entry.replace("1", "2") for entry in one]]
    assert (model_dir / "exhausted").exists()
    assert {unpack(Failure, sent.meta).kind for sent in served.connection.of(Kind.ERROR)} == {"chunk"}


def test_an_exception_in_mid_stream_is_an_error_like_any_other(serve: Serve) -> None:
    served = serve(streaming("yield ['a']\nraise LookupError('gone')"), batch(1, b""), batch(2, b""), resume(1))
    assert served.log[2:7] == ["<BATCH 1", ">CHUNK 1", ">ERROR 1", "<BATCH 2", "<CONTINUE 1"]


def test_every_rank_shows_how_far_it_is(serve: Serve) -> None:
    for rank in (0, 1):
        served = serve(streaming("yield ['a']\nyield ['b']"), batch(1, b""), batch(2, b""), rank=rank)
        steps = ["received 1", "step 1 of 1", "step 2 of 1", "finished 1"]
        assert served.slot.log == [*steps, "received 2", "step 1 of 2", "step 2 of 2", "finished 2"]


def test_a_batch_that_raised_is_finished_once_the_rank_may_go_on(serve: Serve) -> None:
    assert serve(FRAGILE, batch(1, b"raise")).slot.log == ["received 1"]
    assert serve(FRAGILE, batch(1, b"raise"), resume(1)).slot.log == ["received 1", "finished 1"]


# ── streams that end early ──

# Without end, and tells when it has cleaned up: a frame of its own, PROGRESS, among the others.
ENDLESS = """
    import minserve
    def handle(data, context):
        if data is None: return None
        return chunks(data)
    def chunks(data):
        try:
            while data[0]["body"] == b"":
                try:
                    yield ["a"]
                except Exception:
                    raise SystemExit("a cancel is none")
            return ["short"]
        finally:
            minserve.report_progress("cleaned up")
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stream_whose_clients_have_left_ends_behind_the_last_grant_and_the_next_batch_goes_on(
    serve: Serve, rank: int
) -> None:
    frames = [batch(1, b"", grant=2), batch(2, b"x"), grant(1, 3), cancel(1, 3), resume(1), SHUTDOWN]
    served = serve(ENDLESS, *frames, rank=rank, reply_done=True)
    chunk = [">CHUNK 1"] if rank == 0 else []
    assert served.connection.log[4:] == [
        "<BATCH 1",
        *chunk * 2,
        "<BATCH 2",
        "<GRANT 1",
        *chunk,
        "<CANCEL 1",
        ">PROGRESS 0",
        ">ERROR 1",
        "<CONTINUE 1",
        ">PROGRESS 0",
        ">REPLY 2" if rank == 0 else ">DONE 2",
        "<SHUTDOWN 0",
    ]
    failure = served.connection.failure()
    assert (failure.kind, failure.type_name, failure.origin, failure.needs) == ("cancelled", "", rank, (0, 1))
    assert (served.code, served.slot.log[-1]) == (0, "finished 2")


SENDING = """
    import threading
    import minserve
    from minserve.rank.streaming import current
    def handle(data, context):
        if data is None: return None
        {body}
"""


def sending(body: str) -> str:
    return SENDING.format(body=body.replace("\n", "\n        "))


def test_a_handlers_except_exception_does_not_swallow_a_cancel(serve: Serve) -> None:
    source = sending("try:\n    while True: current().send(['a'])\nexcept Exception: return ['swallowed']")
    served = serve(source, batch(1, b"", grant=1), cancel(1, 1))
    assert served.log[2:] == ["<BATCH 1", ">CHUNK 1", "<CANCEL 1", ">ERROR 1"]


def test_a_handler_that_swallows_a_cancel_may_end_its_batch_as_it_likes(serve: Serve) -> None:
    source = sending("try:\n    while True: current().send(['a'])\nexcept minserve.Cancelled: return ['swallowed']")
    served = serve(source, batch(1, b"", grant=1), cancel(1, 1), batch(2, b"", grant=0), cancel(2, 0))
    assert served.log[2:] == ["<BATCH 1", ">CHUNK 1", "<CANCEL 1", ">REPLY 1", "<BATCH 2", "<CANCEL 2", ">REPLY 2"]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("try:\n    while True: yield ['a']\nfinally:\n    raise LookupError('in its clean-up')", "LookupError"),
        ("while True:\n    try: yield ['a']\n    except GeneratorExit: yield ['b']", "RuntimeError"),
    ],
)
def test_an_error_in_the_clean_up_is_an_error_like_any_other(serve: Serve, body: str, error: str) -> None:
    served = serve(streaming(body), batch(1, b"", grant=1), cancel(1, 1), resume(1))
    assert served.log[2:] == ["<BATCH 1", ">CHUNK 1", "<CANCEL 1", ">ERROR 1", "<CONTINUE 1"]
    assert (served.connection.failure().kind, served.connection.failure().type_name) == ("own", error)


def test_a_cancel_kept_from_an_earlier_batch_is_an_error_of_this_one(serve: Serve) -> None:
    """Reported as a cancel the server would take it for the word that nobody waits, and would answer nobody."""
    served = serve(sending("raise minserve.Cancelled"), batch(1, b""), resume(1), rank=1)
    assert served.log[2:] == ["<BATCH 1", ">ERROR 1", "<CONTINUE 1"]
    assert (served.connection.failure().kind, served.connection.failure().type_name) == ("own", "Cancelled")


def test_a_shutdown_in_mid_stream_ends_the_rank_and_is_no_error(serve: Serve) -> None:
    served = serve(ENDLESS, batch(1, b"", grant=1), SHUTDOWN)
    assert served.connection.log[4:] == ["<BATCH 1", ">CHUNK 1", "<SHUTDOWN 0", ">PROGRESS 0"]
    assert served.code == 0


@pytest.mark.parametrize("body", ["while True: current().send(['a'])", "try: current().send(['a'])\nfinally: {}[1]"])
def test_a_link_that_ends_in_mid_stream_ends_the_rank_quietly(serve: Serve, body: str) -> None:
    served = serve(sending(body), batch(1, b"", grant=0))
    assert (served.log[2:], served.code) == (["<BATCH 1"], 0)


@pytest.mark.parametrize("handles", [False, True])
def test_a_frame_that_is_none_is_not_the_handlers_error(serve: Serve, handles: bool) -> None:
    body = "try: current().send(['a'])\nexcept Exception: return ['b']" if handles else "current().send(['a'])"
    with pytest.raises(WireError, match="bad Step message"):
        serve(sending(body), batch(1, b"", grant=0), Frame(Kind.GRANT, 0, 1, bytearray(b"\xc1"), bytearray()))


class Meeting:
    """Where a handler's thread waits until its rank waits for it: `left` is set by the first look of `wait_for_end`."""

    def __init__(self) -> None:
        self.left = threading.Event()

    def sleep(self, seconds: float) -> None:
        self.left.set()


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Meeting:
    it = Meeting()
    monkeypatch.setattr(threads, "time", it)
    monkeypatch.setitem(sys.modules, "meeting", it)  # for the handler's import
    return it


# Its thread is in the middle of something when the stream is cancelled: it comes to its end only behind that.
WITH_A_THREAD = """
    import threading
    import meeting, minserve
    from minserve.rank.streaming import current
    def work():
        if meeting.left.wait(DEADLINE):
            minserve.report_progress("the thread is through")
    def handle(data, context):
        if data is None: return None
        threading.Thread(target=work, daemon=True).start()
        BODY
"""


@pytest.mark.parametrize(
    ("body", "log"),
    [
        ("while True: current().send(['a'])", [">PROGRESS 0", ">ERROR 1"]),
        ("try: current().send(['a'])\nexcept minserve.Cancelled: return ['b']", [">REPLY 1", ">PROGRESS 0"]),
        ("try: current().send(['a'])\nfinally: {}[1]", [">PROGRESS 0", ">ERROR 1"]),
    ],
)
def test_a_cancelled_batch_is_over_only_when_its_threads_are(
    serve: Serve, meeting: Meeting, body: str, log: list[str]
) -> None:
    source = WITH_A_THREAD.replace("DEADLINE", str(DEADLINE_S)).replace("BODY", body.replace("\n", "\n        "))
    served = serve(source, batch(1, b"", grant=0), cancel(1, 0), resume(1), SHUTDOWN)
    assert served.connection.log[4:] == ["<BATCH 1", "<CANCEL 1", *log, "<CONTINUE 1", "<SHUTDOWN 0"]


def test_a_thread_that_streams_leaves_at_its_send_without_a_traceback(
    serve: Serve, capfd: pytest.CaptureFixture[str]
) -> None:
    body = """
def generate():
    while True: current().send(['a'])
thread = threading.Thread(target=generate)
thread.start()
thread.join()
return ['b']
"""
    served = serve(sending(body), batch(1, b"", grant=2), cancel(1, 2))
    assert served.log[2:] == ["<BATCH 1", ">CHUNK 1", ">CHUNK 1", "<CANCEL 1", ">REPLY 1"]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("end", "last"), [("return ['b']", ">REPLY 1"), ("raise LookupError", ">ERROR 1")])
def test_what_a_thread_sends_behind_its_batchs_end_is_for_nobody(serve: Serve, end: str, last: str) -> None:
    """It may have been on its way for a while: the stream is that of its own batch."""
    body = f"""
streams.append(current())
streams[0].send(['a'])
{end}
"""
    served = serve("streams = []" + textwrap.dedent(sending(body)), batch(1, b""), resume(1), batch(2, b""))
    assert [entry for entry in served.log if entry.endswith("1") and entry[0] == ">"] == [">CHUNK 1", last]


# ── probes ──

PROBING = """
    def handle(data, context):
        return ["handled"]
    def probe():
        {body}
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("source", [ECHO, PROBING.format(body="return True"), PROBING.format(body="pass")])
def test_a_probe_is_a_batch_without_requests_that_every_rank_answers(serve: Serve, source: str, rank: int) -> None:
    served = serve(source, probe(1), batch(2, b"x"), rank=rank)
    assert served.log[2:4] == ["<BATCH 1", ">REPLY 1" if rank == 0 else ">DONE 1"]
    assert served.connection.answers()[:1] == ([[]] if rank == 0 else [])
    assert served.slot.log[:2] == ["received 1", "finished 1"]


@pytest.mark.parametrize(("source", "offered"), [(ECHO, False), (PROBING.format(body="pass"), True)])
def test_a_rank_that_has_loaded_says_whether_it_has_a_probe(serve: Serve, source: str, offered: bool) -> None:
    (loaded,) = serve(source).connection.of(Kind.LOADED)
    assert unpack(Loaded, loaded.meta).probes is offered


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("body", "error", "text"),
    [
        ("return False", "ProbeFailed", "probe() answered False; True or None means healthy"),
        ("return 'fine'", "ProbeFailed", "probe() answered 'fine'; True or None means healthy"),
        ("raise LookupError('no device')", "LookupError", "no device"),
    ],
)
def test_a_probe_that_fails_is_an_error_of_its_rank(serve: Serve, body: str, error: str, text: str, rank: int) -> None:
    served = serve(PROBING.format(body=body), probe(1), batch(2, b"parked"), rank=rank)
    assert served.log[2:] == ["<BATCH 1", ">ERROR 1", "<BATCH 2"]
    assert (served.connection.failure().type_name, served.connection.failure().text) == (error, text)


# ── TorchServe's function ──

SEND = """
    from ts.handler_utils.utils import send_intermediate_predict_response as send
    def handle(data, context):
        if data is None: return None
        {body}
"""


@pytest.mark.parametrize(
    ("body", "log"),
    [
        ("send(['a', 'b'], context.request_ids, 'ok', 200, context)\nreturn ['c', 'd']", [">CHUNK 1", ">REPLY 1"]),
        ("send(['b'], {1: 'r1'}, 'ok', 200, context)\nreturn ['', '']", [">CHUNK 1", ">REPLY 1"]),
        ("send(['a', 'b'], context.request_ids, 'ok', 200)\nreturn None", [">CHUNK 1", ">REPLY 1"]),
        ("send(['a'], context.request_ids, 'ok', 200)\nreturn ['', '']", [">ERROR 1", ">CHUNK 1", ">REPLY 1"]),
    ],
)
def test_torchserves_function_sends_chunks(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, body: str, log: list[str]
) -> None:
    monkeypatch.syspath_prepend(COMPAT)
    source = SEND.format(body=body.replace("\n", "\n        "))
    assert serve(source, batch(1, b"", b"")).log[3:] == log
    assert serve(source, batch(1, b"", b""), rank=1).log[3:] == []


def test_torchserves_function_sends_at_once_and_where_it_is_told(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(COMPAT)
    body = "send(['x', 'y'], {1: 'r1', 0: 'r0'}, 'ok', 200, context)\n        return ['last', 'one']"
    connection = serve(SEND.format(body=body), batch(1, b"", b"")).connection
    assert connection.answers(Kind.CHUNK) == [[(0, b"y"), (1, b"x")]]
    assert connection.answers() == [[(0, b"last"), (1, b"one")]]


def test_between_batches_torchserves_function_does_nothing(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(COMPAT)
    source = """
        from ts.handler_utils.utils import send_intermediate_predict_response as send
        send(["at import"], {0: "r0"}, "ok", 200)
        def handle(data, context):
            return ["x"]
        def close():
            send(["after the last batch"], {0: "r0"}, "ok", 200)
    """
    served = serve(source, batch(1, b""), SHUTDOWN)
    assert served.log == ["<LOAD 0", ">LOADED 0", "<BATCH 1", ">REPLY 1", "<SHUTDOWN 0"]


def test_none_is_no_answer_of_a_handler_that_streamed_nothing(serve: Serve) -> None:
    served = serve(streaming("return None"), batch(1, b""))
    assert served.connection.failure().text.endswith("handle must return a list, not a NoneType")
