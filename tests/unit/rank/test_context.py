from __future__ import annotations

import copy
import threading

import pytest

from minserve.rank.context import BatchContext, Context, are_plain
from minserve.rank.metric_cache import MetricsCache
from minserve.rank.requests import RequestProcessor
from minserve.wire.messages import Part, RequestMeta, new_batch

META = RequestMeta(
    "abc",
    ((b"Content-Type", b"text/plain"), (b"x-note", "ä".encode()), (b"X-Raw", b"\xff")),
    (Part("body", "text/plain", 3), Part("plain", "", 0)),
    "v1/rest",
)


def context(*metas: RequestMeta) -> Context:
    result = Context("m", "/m", {"model": {}}, 4, 1, "0.1", False, model_yaml_config={"handler": {"x": 1}})
    if metas:
        result.begin_batch(metas)
    return result


def test_what_is_known_of_the_model_before_any_batch() -> None:
    fresh = context()
    assert fresh.system_properties == {
        "model_dir": "/m",
        "gpu_id": 1,
        "batch_size": 4,
        "server_name": "MMS",
        "server_version": "0.1",
        "limit_max_image_pixels": False,
    }
    assert fresh.model_yaml_config == {"handler": {"x": 1}}
    assert fresh.request_ids is None
    assert fresh.get_request_id() is None


def test_request_ids_are_by_place_in_the_batch() -> None:
    two = context(META, RequestMeta("def", (), ()))
    assert two.request_ids == {0: "abc", 1: "def"}
    assert [two.get_request_id(), two.get_request_id(1), two.get_request_id(2)] == ["abc", "def", None]


def test_headers_are_the_clients_plus_torchserves_own() -> None:
    assert context(META).get_all_request_header(0) == {
        "Content-Type": "text/plain",
        "x-note": "ä",
        "X-Raw": "\udcff",
        "body": {"content-type": "text/plain"},
        "plain": {"content-type": ""},
        "url_path": "v1/rest",
        "explain": "False",
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [("x-note", "ä"), ("X-NOTE", "ä"), ("content-type", "text/plain"), ("URL_path", "v1/rest"), ("absent", None)],
)
def test_a_header_is_found_in_any_case(key: str, value: object) -> None:
    assert context(META).get_request_header(0, key) == value


@pytest.mark.parametrize(
    ("operation", "own"),
    [
        ("", {"url_path": "", "explain": "False"}),
        ("explain", {"url_path": "", "explain": "True"}),
        ("describe", {"describe": "True"}),
    ],
)
def test_what_is_asked_for_is_a_header(operation: str, own: dict[str, object]) -> None:
    assert context(RequestMeta("", (), (), operation=operation)).get_all_request_header(0) == own


def test_a_sequence_is_known_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = RequestMeta("", ((b"ts_request_sequence_id", b"s1"), (b"x-seq", b"s2")), ())
    assert context(meta).get_sequence_id(0) == "s1"
    monkeypatch.setenv("TS_REQUEST_SEQUENCE_ID", "x-seq")
    assert context(meta).get_sequence_id(0) == "s2"
    fresh = context()
    names = fresh.header_key_sequence_id, fresh.header_key_sequence_start, fresh.header_key_sequence_end
    assert names == ("x-seq", "ts_request_sequence_start", "ts_request_sequence_end")


def test_the_socket_that_there_is_not_explains_itself() -> None:
    assert not hasattr(context(META), "cl_socket")
    with pytest.raises(AttributeError, match="send chunks with ts"):
        _ = context(META).cl_socket


def test_metrics_belong_to_the_requests_of_the_batch() -> None:
    one = context(META)
    assert one.metrics.model_name == "m"
    assert one.metrics.request_ids == {0: "abc"}


def test_a_copy_is_apart_in_all_that_belongs_to_a_batch_and_in_what_the_handler_keeps() -> None:
    original = context(META)
    vars(original).update(cache={"mine": [1]}, lock=threading.Lock())
    other = copy.deepcopy(original)
    other.begin_batch([RequestMeta("new", (), ())])
    other.set_response_status(404)
    vars(other)["cache"]["mine"].append(2)
    assert (original.request_ids, original.get_response_status(0)) == ({0: "abc"}, (200, ""))
    assert original.metrics.request_ids == {0: "abc"}
    assert vars(original)["cache"] == {"mine": [1]}
    assert vars(other)["lock"] is vars(original)["lock"]  # cannot be copied
    assert other.manifest is original.manifest


def test_the_exact_name_of_a_header_wins() -> None:
    headers = ((b"X-A", b"1"), (b"x-a", b"2"), (b"X-a", b"3"))
    assert context(RequestMeta("", headers, ())).get_request_header(0, "x-a") == "2"


def test_answers_start_as_200_without_headers() -> None:
    one = context(META)
    assert one.get_response_status(0) == (200, "")
    assert one.get_response_headers(0) == {}
    assert one.get_response_content_type(0) is None


def test_each_request_has_a_status_and_headers_of_its_own() -> None:
    two = context(META, META)
    two.set_response_status(404, "Not here", idx=1)
    two.set_response_header(1, "x-a", "1")
    two.set_response_content_type(1, "text/html")
    assert two.get_response_status(0) == (200, "")
    assert two.get_response_headers(0) == {}
    assert two.get_response_status(1) == (404, "Not here")
    assert two.get_response_headers(1) == {"x-a": "1", "content-type": "text/html"}
    assert two.get_response_content_type(1) == "text/html"


def test_a_header_takes_the_place_of_the_same_name_in_another_case() -> None:
    """HTTP does not tell them apart, and an answer with two types is one that each client takes another way."""
    one = context(META)
    one.set_response_content_type(0, "text/html")
    one.set_response_header(0, "Content-Type", "text/plain")
    assert one.get_response_headers(0) == {"Content-Type": "text/plain"}
    assert one.get_response_content_type(0) == "text/plain"


def test_one_status_for_all() -> None:
    two = context(META, META)
    two.set_all_response_status(503)
    assert [two.get_response_status(index) for index in range(2)] == [(503, "")] * 2


def test_what_few_handlers_look_at_is_made_when_one_does() -> None:
    one = context()
    one.begin_batch(new_batch([META]).requests)  # encoded, as it comes
    assert one.request_ids is one.request_ids == {0: "abc"}
    assert one.get_request_id() == "abc"
    plain = [are_plain(one)]
    first = one.request_processor
    plain.append(are_plain(one))  # from now on it may be changed
    assert one.request_processor is first
    assert one.get_request_header(0, "x-note") == "ä"
    one.begin_batch([META, META])
    assert [*plain, are_plain(one)] == [True, False, True]
    assert len(one.request_processor) == 2
    its_own = [RequestProcessor({})]
    one.request_processor = its_own
    assert one.request_processor is its_own


def test_what_a_thread_of_an_earlier_batch_still_holds_is_not_the_next_ones() -> None:
    """It was about to look when its batch ended."""
    one = context(META)
    left = one._requests
    one.begin_batch([RequestMeta("new", (), ())])
    left.processors[0].report_status(500)
    assert left.ids == {0: "abc"}
    assert are_plain(one)
    assert one.get_response_status(0) == (200, "")
    assert one.request_ids == {0: "new"}


def test_a_copy_in_the_middle_of_a_batch_keeps_its_requests_and_no_more() -> None:
    one = context()
    one.begin_batch(new_batch([META]).requests)
    other = copy.deepcopy(one)
    other.set_response_status(404)
    assert one.get_response_status(0) == (200, "")
    assert (other.request_ids, other.metrics.request_ids) == ({0: "abc"}, {0: "abc"})
    assert other.get_request_header(0, "x-note") == "ä"


def test_nothing_of_one_batch_shows_in_the_next_but_what_the_handler_keeps() -> None:
    kept = context(META, META)
    kept.set_all_response_status(500, "bad")
    kept.set_response_header(0, "x-a", "1")
    setattr(kept, "cache", {"mine": 1})  # noqa: B010  # as handlers do
    kept.begin_batch([RequestMeta("new", (), ())])
    assert kept.request_ids == {0: "new"}
    assert kept.get_response_status(0) == (200, "")
    assert kept.get_response_headers(0) == {}
    assert kept.get_all_request_header(0) == {"url_path": "", "explain": "False"}
    assert getattr(kept, "cache") == {"mine": 1}  # noqa: B009


def test_an_authors_test_makes_a_processor_of_headers() -> None:
    assert RequestProcessor({"explain": "True"}).get_request_property("explain") == "True"


def test_the_processor_has_torchserves_members() -> None:
    processor = RequestProcessor(META)
    assert processor.get_request_properties()["x-note"] == processor.get_request_property("X-Note") == "ä"
    processor.report_status(418, "Teapot")
    assert (processor.get_response_status_code(), processor.get_response_status_phrase()) == (418, "Teapot")
    processor.add_response_property("x-a", "1")
    assert processor.get_response_headers() == {"x-a": "1"}
    assert (processor.get_response_header("x-a"), processor.get_response_header("x-b")) == ("1", None)


def test_a_batch_beside_others_has_what_is_its_own_and_all_else_is_common() -> None:
    common = context()
    common.tokenizer = "kept in load"  # type: ignore[attr-defined]
    first, second = BatchContext(common), BatchContext(common)
    first.begin_batch([RequestMeta("a", (), ())])
    second.begin_batch([RequestMeta("b", (), ())])
    assert (first.get_request_id(), second.get_request_id(), common.get_request_id()) == ("a", "b", "b")
    first.set_response_status(404, idx=0)
    assert (first.get_response_status(0)[0], second.get_response_status(0)[0]) == (404, 200)
    assert (first.metrics.request_ids, second.metrics.request_ids) == ({0: "a"}, {0: "b"})

    first.show()
    assert common.get_request_id() == "a"
    assert common.get_response_status(0)[0] == 404
    assert common.metrics.request_ids == {0: "a"}

    first.cache = {"kept": "in a batch"}
    assert second.cache is common.cache  # type: ignore[attr-defined]
    assert second.tokenizer == "kept in load"
    assert isinstance(first, Context)
    with pytest.raises(AttributeError):
        second.never_set  # noqa: B018
    with pytest.raises(AttributeError, match="cl_socket"):
        first.cl_socket  # noqa: B018


def test_a_batch_beside_others_shares_what_a_handler_has_put_in_the_place_of_the_metrics() -> None:
    common = context()
    one = BatchContext(common)
    one.begin_batch([META])
    its_own = MetricsCache()
    one.metrics = its_own
    other = BatchContext(common)
    other.begin_batch([META])
    assert common.metrics is its_own
    assert other.metrics.request_ids == {0: "abc"}


def test_a_plain_copy_of_a_batchs_context_is_of_that_batch() -> None:
    common = context()
    one = BatchContext(common)
    one.begin_batch([META, META])
    other = copy.copy(one)
    BatchContext(common).begin_batch([RequestMeta("next", (), ())])
    other.set_response_status(418, idx=1)
    assert one.get_response_status(1) == (418, "")
    assert not are_plain(one)
    assert other.request_ids == {0: "abc", 1: "abc"}
    assert other.model_name == "m"
