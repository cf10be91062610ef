"""What is asked of both servers: a few lives of a server, each with its configuration and its calls in order."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass

from tests.side_by_side.calls import Call

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
BOUNDARY = "a-boundary"
MULTIPART = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


@dataclass(frozen=True)
class Life:
    """A server from start to stop. `log` are patterns that its log files must match, each once at least."""

    name: str
    properties: tuple[str, ...]
    arguments: tuple[str, ...]
    calls: tuple[Call, ...]
    log: tuple[str, ...] = ()


def _part(name: str, content: str, kind: str = "", filename: str = "") -> str:
    lines = [
        f"--{BOUNDARY}",
        f'Content-Disposition: form-data; name="{name}"' + (f'; filename="{filename}"' * bool(filename)),
    ]
    lines += [f"Content-Type: {kind}"] if kind else []
    return "\r\n".join([*lines, "", content, ""])


FIELDS = (
    _part("text", "plain field")
    + _part("file", '{"a": 1}', "application/json", "a.json")
    + _part("words", "some text", "text/plain", "a.txt")
    + _part("text", "the last wins")
    + f"--{BOUNDARY}--\r\n"
).encode()


def _png(red: int, green: int, blue: int, side: int = 8) -> bytes:
    """A picture of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\x00" + bytes([red, green, blue]) * side) * side
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


PICTURE_FIELD = (
    _part("data", "", "image/png", "a.png").encode().removesuffix(b"\r\n")
    + _png(10, 240, 20)
    + f"\r\n--{BOUNDARY}--\r\n".encode()
)


def _predict(
    name: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, method: str = "POST"
) -> Call:
    return Call(name, method, path, headers=headers or {}, body=body)


def _manage(name: str, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Call:
    return Call(name, method, path, "management", headers=headers or {}, body=body)


def _do(what: str, **more: object) -> Call:
    return _predict(f"handler: {what}", "/predictions/replies", json.dumps({"do": what, **more}).encode(), JSON)


INPUTS = (
    _predict("raw body", "/predictions/echo", b"raw", {"Content-Type": "application/octet-stream"}),
    _predict("no content type", "/predictions/echo", b"raw"),
    _predict("no body", "/predictions/echo", method="GET"),
    _predict("PUT predicts", "/predictions/echo", b"x", method="PUT"),
    _predict("json", "/predictions/echo", b'{"a": [1, null]}', JSON),
    _predict(
        "json with charset", "/predictions/echo", b'{"a": 1}', {"Content-Type": "application/json; charset=utf-8"}
    ),
    _predict("json that is none", "/predictions/echo", b"{no json", JSON),
    _predict("text", "/predictions/echo", "täxt".encode(), {"Content-Type": "text/plain"}),
    _predict("text that is no utf-8", "/predictions/echo", b"\xff\xfe", {"Content-Type": "text/plain"}),
    _predict("form", "/predictions/echo", b"a=1&b=two%20words&a=2", FORM),
    _predict("json sent by curl -d", "/predictions/echo", b'{"a":1}', FORM),
    _predict("multipart", "/predictions/echo", FIELDS, MULTIPART),
    _predict("query is dropped", "/predictions/echo?a=1&b=2", b"x"),
    _predict("own header", "/predictions/echo", b"x", {"X-Own": "Value"}),
    _predict("version", "/predictions/echo/1.0", b"x"),
    _predict("url path", "/predictions/echo/1.0/v1/chat/completions", b"x"),
    _predict("slash at the end", "/predictions/echo/", b"x"),
    _predict("explanations", "/explanations/echo", b"x"),
    _predict("explanations of a version", "/explanations/echo/1.0", b"x"),
    _predict("kserve v1", "/v1/models/echo:predict", b'{"instances": [1]}', JSON),
    _predict("kserve v1 explain", "/v1/models/echo:explain", b'{"instances": [1]}', JSON),
    _predict("kserve v2", "/v2/models/echo/infer", b'{"inputs": []}', JSON),
    _predict("sagemaker", "/invocations?model_name=echo&a=1", b"x"),
    _predict("sagemaker without a name", "/invocations", b"x"),
    _predict("sagemaker, many models", "/models/echo/invoke?a=1", b"x"),
    _predict("legacy predict", "/echo/predict?a=1", b"x"),
    _predict("legacy predict of a version", "/echo/1.0/predict", b"x"),
    _predict("DELETE predicts", "/predictions/echo", method="DELETE"),
    _predict("kserve v2 explain", "/v2/models/echo/explain", b'{"inputs": []}', JSON),
    _predict("sagemaker, named in a form", "/invocations", b"model_name=echo&a=1", FORM),
    _predict("sagemaker, no such model", "/invocations?model_name=nobody", b"x"),
    _predict("an empty form", "/predictions/echo", b"", FORM),
    _predict("json that is a list", "/predictions/echo", b"[1, 2]", JSON),
    _predict("upper case type", "/predictions/echo", b"[1, 2]", {"Content-Type": "Application/JSON"}),
    _predict("a long url path", "/predictions/echo/1.0/a/b%20c/d?x=1", b"x"),
)

FAILURES = (
    _predict("no such model", "/predictions/nobody", b"x"),
    _predict("no such version", "/predictions/echo/9.9", b"x"),
    _predict("no such path", "/nowhere", b"x"),
    _predict("predictions without a model", "/predictions", b"x"),
    _predict("kserve v1, no such model", "/v1/models/nobody:predict", b"x"),
    _predict("GET /", "/", method="GET"),
    _predict("kserve v2 without the flag", "/v2", method="GET"),
    _predict("health of kserve v2 without the flag", "/v2/health/live", method="GET"),
    _predict("kserve v1 without a verb", "/v1/models/echo", method="GET"),
    _predict("explanations, no such model", "/explanations/nobody", b"x"),
    _predict("explanations without a model", "/explanations", b"x"),
    _predict("metrics are not here", "/metrics", method="GET"),
    _predict("models are not here", "/models", method="GET"),
    _do("status", code=201, phrase="Made"),
    _do("status", code=404),
    _do("header"),
    *(_do(what) for what in ("text", "bytes", "bytearray", "json", "number", "none", "empty", "list", "tensor")),
    *(_do(what) for what in ("raise", "prediction", "prediction500", "memory", "cuda")),
    *(_do(what) for what in ("many", "no list", "nothing", "object")),
    _predict("good after all these", "/predictions/replies", b'{"do": "text"}', JSON),
    _do("exit"),
    Call("good after a death", "POST", "/predictions/replies", headers=JSON, body=b'{"do": "text"}', until=200),
    _predict("too large a body", "/predictions/echo", b"x" * 200_000),
)

ARCHIVES = (
    _predict("eager", "/predictions/eager", b"[1, 2, 3]", JSON),
    _predict("eager explained", "/explanations/eager", b'{"data": [1, 2, 3], "target": 1}', JSON),
    _predict("torchscript", "/predictions/scripted", b"[0.5, 0, -1]", JSON),
    _predict("image", "/predictions/image", _png(200, 30, 90)),
    _predict("image in a form", "/predictions/image", PICTURE_FIELD, MULTIPART),
    _predict("no image", "/predictions/image", b"this is no picture"),
    _predict("four ranks", "/predictions/tp4", b"42", {"Content-Type": "text/plain"}),
    _predict("four ranks again", "/predictions/tp4/1.0", b"7"),
    Call("a batch", "POST", "/predictions/batch", copies=(b"200", b"201", b"404", b"503")),
    _predict("measured", "/predictions/measured", b"x"),
)

MANAGED = (
    _manage("list", "GET", "/models"),
    _manage("list a page", "GET", "/models?limit=2"),
    _manage("list the next page", "GET", "/models?limit=2&next_page_token=2"),
    _manage("list with a limit out of range", "GET", "/models?limit=1000"),
    _manage("list with a limit that is no number", "GET", "/models?limit=x"),
    _manage("list past the end", "GET", "/models?next_page_token=99"),
    _manage("describe", "GET", "/models/echo"),
    _manage("describe a version", "GET", "/models/echo/1.0"),
    _manage("describe all", "GET", "/models/echo/all"),
    _manage("describe tp", "GET", "/models/tp4"),
    _manage("describe a batching model", "GET", "/models/batch"),
    _manage("describe, no such model", "GET", "/models/nobody"),
    _manage("describe, no such version", "GET", "/models/echo/9.9"),
    _manage("describe, customized", "GET", "/models/echo?customized=true"),
    _manage("kserve readiness", "GET", "/v1/models/echo"),
    _manage("kserve readiness, no such model", "GET", "/v1/models/nobody"),
    _manage("kserve readiness, other method", "POST", "/v1/models/echo"),
    _manage("list with a token that is no number", "GET", "/models?next_page_token=x"),
    _manage("list with a negative limit", "GET", "/models?limit=-1"),
    _manage("list nothing", "GET", "/models?limit=0"),
    _manage("list exactly all", "GET", "/models?limit=9"),
    _manage("describe, customized, a version", "GET", "/models/echo/1.0?customized=true"),
    Call("describe junk", "GET", "/models/junk", "management", only="modelName|code|type"),
    _manage("register without a url", "POST", "/models"),
    _manage("register with an empty url", "POST", "/models?url="),
    _manage("register with a runtime that there is not", "POST", "/models?url=eager.mar&model_name=x&runtime=ruby"),
    _manage("register with JSON that is none", "POST", "/models", b"{no json", JSON),
    _manage("register with JSON without a url", "POST", "/models", b"{}", JSON),
    _manage(
        "register with numbers that are none",
        "POST",
        "/models?url=eager.mar&model_name=odd&batch_size=x&initial_workers=0",
    ),
    _manage("describe what was registered with them", "GET", "/models/odd"),
    _predict("it has no worker", "/predictions/odd", b"[1, 2, 3]", JSON),
    _manage("customized, it has no worker", "GET", "/models/odd?customized=true"),
    _manage("its kserve readiness", "GET", "/v1/models/odd"),
    _manage("scale with a number that is none", "PUT", "/models/odd?min_worker=x&synchronous=true"),
    _manage("scale with a maximum alone", "PUT", "/models/odd?max_worker=1&synchronous=true"),
    _manage("scale a version in the query", "PUT", "/models/odd?min_worker=1&model_version=1.5&synchronous=true"),
    _manage("scale a version in the query that there is not", "PUT", "/models/odd?min_worker=1&model_version=7"),
    _manage("unregister a version that there is not", "DELETE", "/models/odd/9.9"),
    _manage("unregister a version", "DELETE", "/models/odd/1.5"),
    _manage("PUT without a model", "PUT", "/models"),
    _manage("DELETE without a model", "DELETE", "/models"),
    _manage("ping is not here", "GET", "/ping"),
    _manage("predictions are not here", "POST", "/predictions/echo", b"x"),
    _manage("register what is not there", "POST", "/models?url=nothing.mar"),
    _manage("register outside the store", "POST", "/models?url=../echo.mar"),
    _manage("register junk", "POST", "/models?url=junk.mar"),
    _manage("register twice", "POST", "/models?url=echo.mar"),
    _manage("register an address that is not allowed", "POST", "/models?url=https://example.invalid/a.mar"),
    _manage("register a second version", "POST", "/models?url=echo-two.mar&initial_workers=0"),
    _predict("the second has no worker", "/predictions/echo/2.0", b"x"),
    _manage("customized without a worker", "GET", "/models/echo/2.0?customized=true"),
    _predict("the first is the default", "/predictions/echo", b"x"),
    _manage("scale the second", "PUT", "/models/echo/2.0?min_worker=1&synchronous=true"),
    _predict("the second serves", "/predictions/echo/2.0", b"x"),
    _manage("describe both", "GET", "/models/echo/all"),
    _manage("the second becomes the default", "PUT", "/models/echo/2.0/set-default"),
    _predict("the second is the default", "/predictions/echo", b"x"),
    _manage("set-default, no such version", "PUT", "/models/echo/9.9/set-default"),
    _manage("set-default, no such model", "PUT", "/models/nobody/1.0/set-default"),
    _manage("the default cannot be unregistered", "DELETE", "/models/echo/2.0"),
    _manage("unregister the first", "DELETE", "/models/echo/1.0"),
    _manage("unregister it again", "DELETE", "/models/echo/1.0"),
    _predict("it is gone", "/predictions/echo/1.0", b"x"),
    _manage("scale, asynchronously", "PUT", "/models/echo?min_worker=1"),
    _manage("scale to nothing", "PUT", "/models/echo?min_worker=0&synchronous=true"),
    _manage("scale, maximum under minimum", "PUT", "/models/echo?min_worker=2&max_worker=1"),
    _manage("scale, no such model", "PUT", "/models/nobody?min_worker=1"),
    _manage("scale, no such version", "PUT", "/models/echo/9.9?min_worker=1"),
    _manage("unregister the last", "DELETE", "/models/echo"),
    _manage("unregister what is not there", "DELETE", "/models/echo"),
    _manage(
        "register with JSON",
        "POST",
        "/models",
        b'{"url": "echo.mar", "model_name": "other", "initial_workers": 1}',
        JSON,
    ),
    _predict("under its other name", "/predictions/other", b"x"),
    _manage(
        "register with workers",
        "POST",
        "/models?url=measured.tar.gz&model_name=again&initial_workers=1&batch_size=3&max_batch_delay=7&response_timeout=33",
    ),
    _manage("describe what was registered", "GET", "/models/again"),
    _manage(
        "register, asynchronously", "POST", "/models?url=eager.mar&model_name=later&initial_workers=1&synchronous=false"
    ),
    Call("it comes up", "POST", "/predictions/later", headers=JSON, body=b"[1, 2, 3]", until=200),
    _manage("register what cannot be loaded", "POST", "/models?url=failing.mar&initial_workers=1"),
    _manage("it is not there then", "GET", "/models/failing"),
    _manage("method that is not allowed", "PATCH", "/models/again"),
    _manage("no such management path", "GET", "/nowhere"),
)

HEALTH = (
    Call("ping", "GET", "/ping"),
    Call("ping with a slash", "GET", "/ping/"),
)

METRICS = (
    Call(
        "metrics, types",
        "GET",
        "/metrics",
        "metrics",
        only="^# TYPE ts_|^# TYPE Requests|^# TYPE (Queue|Worker|Handler|Prediction)",
    ),
    Call(
        "metrics, help",
        "GET",
        "/metrics",
        "metrics",
        only="^# HELP ts_|^# HELP Requests|^# HELP (Queue|Worker|Handler|Prediction)",
    ),
    Call("metrics, counted", "GET", "/metrics", "metrics", only=r"^ts_inference_requests_total"),
    Call(
        "metrics by name",
        "GET",
        "/metrics?name[]=ts_inference_requests_total",
        "metrics",
        only=r"^# |^ts_inference_requests_total",
    ),
    Call(
        "metrics of a handler",
        "GET",
        "/metrics",
        "metrics",
        only=r"^(InferenceCalls|Preprocess|Payload|Share|Examples|InitializeCalls)",
    ),
)

AUTHORIZED = (
    Call("no key", "GET", "/ping"),
    Call("wrong key", "GET", "/ping", headers={"Authorization": "Bearer nonsense"}),
    Call("no bearer", "GET", "/ping", headers={"Authorization": "{inference}"}),
    Call("key of the other kind", "GET", "/ping", headers={"Authorization": "Bearer {management}"}),
    Call("inference key", "GET", "/ping", headers={"Authorization": "Bearer {inference}"}),
    Call(
        "predict with the key", "POST", "/predictions/echo", headers={"Authorization": "Bearer {inference}"}, body=b"x"
    ),
    Call("predict without", "POST", "/predictions/echo", body=b"x"),
    Call("management without", "GET", "/models", "management"),
    Call("management with the inference key", "GET", "/models", "management", {"Authorization": "Bearer {inference}"}),
    Call("management key", "GET", "/models", "management", {"Authorization": "Bearer {management}"}),
    Call(
        "model api is off: register",
        "POST",
        "/models?url=eager.mar",
        "management",
        {"Authorization": "Bearer {management}"},
    ),
    Call(
        "model api is off: unregister", "DELETE", "/models/echo", "management", {"Authorization": "Bearer {management}"}
    ),
    Call(
        "model api is off: scaling is not",
        "PUT",
        "/models/echo?min_worker=1&synchronous=true",
        "management",
        {"Authorization": "Bearer {management}"},
    ),
    Call("token without a key", "GET", "/token?type=inference", "management"),
    Call(
        "token with the wrong key",
        "GET",
        "/token?type=inference",
        "management",
        {"Authorization": "Bearer {management}"},
    ),
    Call("new inference key", "GET", "/token?type=inference", "management", {"Authorization": "Bearer {API}"}),
    Call("the new key", "GET", "/ping", headers={"Authorization": "Bearer {inference}"}),
    Call("a new management key", "POST", "/token?type=management", "management", {"Authorization": "Bearer {API}"}),
    Call("the new management key", "GET", "/models", "management", {"Authorization": "Bearer {management}"}),
    Call("token without a type", "GET", "/token", "management", {"Authorization": "Bearer {API}"}),
    Call(
        "explain with the wrong key", "POST", "/explanations/echo", headers={"Authorization": "Bearer {API}"}, body=b"x"
    ),
    Call("no such path without a key", "GET", "/nowhere"),
    Call("an API description needs no key", "GET", "/api-description", only="^$"),
    Call("scale without a key", "PUT", "/models/echo?min_worker=1", "management"),
    Call("token of no kind", "GET", "/token?type=nonsense", "management", {"Authorization": "Bearer {API}"}),
    Call("no metrics in mode log", "GET", "/metrics", "metrics"),
)

LEGACY = (
    _predict("json envelope", "/predictions/eager", b'{"instances": [[1, 2, 3], [3, 2, 1]]}', JSON),
    _predict("json envelope, no JSON", "/predictions/eager", b"[1]", JSON),
    Call("metrics, legacy", "GET", "/metrics", "metrics", only="^# (TYPE|HELP)|^ts_inference_requests_total"),
)

MOVED = (
    Call("every worker is up: micro", "POST", "/predictions/micro", headers=JSON, body=b"[1, 2, 3]", until=200),
    Call("every worker is up: pipe", "POST", "/predictions/pipe", body=b"1", until=200),
    _predict("in pieces", "/predictions/pieces", b"raw"),
    _predict("in pieces, json", "/predictions/pieces", b'{"a": 1}', JSON),
    _predict("in pieces, curl -d", "/predictions/pieces", b"data=abc", FORM),
    _predict(
        "in pieces, curl -F", "/predictions/pieces", f"{_part('data', 'abc')}--{BOUNDARY}--\r\n".encode(), MULTIPART
    ),
    _predict("in pieces, curl -T", "/predictions/pieces/2023.11-rc1", b"raw", method="PUT"),
    Call("a batch in pieces", "POST", "/predictions/micro", headers=JSON, copies=(b"[1, 2, 3]",) * 4),
    _predict("a pipeline", "/predictions/pipe", b"3"),
    _predict("a pipeline that fails", "/predictions/pipe", b"x"),
    _predict("a pipeline again", "/predictions/pipe", b"4"),
    _predict("a sloppy YAML", "/predictions/sloppy", b"x"),
    *(_manage(f"describe {name}", "GET", f"/models/{name}") for name in ("pieces", "micro", "pipe", "sloppy")),
    _manage("list what was moved", "GET", "/models"),
    Call("metrics of timed steps", "GET", "/metrics", "metrics", only="^# (TYPE|HELP) ts_handler_"),
)

ONE_INPUT = b'{"id": "mine", "inputs": [{"name": "a", "shape": [2, 2], "datatype": "FP32", "data": [1.5, 2, 3, 4]}]}'
TWO_INPUTS = (
    b'{"inputs": [{"name": "a", "shape": [2], "datatype": "INT64", "data": [1, 2]}, '
    b'{"name": "b", "shape": [1], "datatype": "BYTES", "data": ["text"]}]}'
)

ENVELOPE = (
    _predict("kservev2", "/v2/models/inputs/infer", ONE_INPUT, JSON),
    _predict("kservev2, two inputs", "/v2/models/inputs/infer", TWO_INPUTS, JSON),
    _predict("kservev2 on predictions", "/predictions/inputs", ONE_INPUT),
    _predict("kservev2, a wrong shape", "/v2/models/inputs/infer", ONE_INPUT.replace(b"2, 2", b"3, 2", 1), JSON),
    _predict("kservev2, no inputs", "/v2/models/inputs/infer", b'{"instances": [1]}', JSON),
    _manage("describe what the models key configures", "GET", "/models/inputs"),
    _manage("list what has a name of the configuration's", "GET", "/models"),
)

LIVES = (
    Life(
        "everything",
        (
            "metrics_mode=prometheus",
            "model_metrics_auto_detect=true",
            "enable_model_api=true",
            "disable_token_authorization=true",
            "default_workers_per_model=1",
            "disable_system_metrics=true",
            "max_request_size=100000",
            "load_models=echo.mar,replies.mar,eager.mar,scripted.mar,image.mar,tp4.mar,batch.mar,measured.tar.gz,junk.mar",
            "install_py_dep_per_model=false",
        ),
        (),
        (
            Call("every worker is up: tp4", "POST", "/predictions/tp4", body=b"1", until=200),
            Call("every worker is up: image", "POST", "/predictions/image", body=_png(1, 2, 3), until=200),
            Call("every worker is up: measured", "POST", "/predictions/measured", body=b"x", until=200),
            *HEALTH,
            *INPUTS,
            *FAILURES,
            *ARCHIVES,
            *METRICS,
            *MANAGED,
        ),
        (
            r"ts_log\.log",
            r"access_log\.log[\s\S]*/127\.0\.0\.1:\d+ \"POST /predictions/echo HTTP/1\.1\" 200 \d+",
            r"State change WORKER_STARTED -> WORKER_MODEL_LOADED",
            r"9\d{3} Worker disconnected\. WORKER_MODEL_LOADED",
            r"State change WORKER_MODEL_LOADED -> WORKER_STOPPED",
            r"Auto recovery start timestamp: \d{13}",
            r"Retry worker: 9\d{3} in \d+ seconds\.",
            r"Auto recovery succeeded, reset recoveryStartTS",
            r"Backend worker error|Backend worker monitoring thread",
            r"MODEL_LOG - ",
            r"these weights are for another model",
        ),
    ),
    Life(
        "guarded",
        ("default_workers_per_model=1", "load_models=echo.mar"),
        (),
        AUTHORIZED,
        (r"MODEL_METRICS|PredictionTime\.ms:",),
    ),
    Life(
        "legacy",
        ("metrics_mode=legacy", "default_workers_per_model=1", "load_models=eager.mar", "service_envelope=json"),
        ("--disable-token-auth",),
        LEGACY,
    ),
    Life(
        "moved",
        (
            "metrics_mode=prometheus",
            "model_metrics_auto_detect=true",
            "disable_system_metrics=true",
            "disable_token_authorization=true",
            "default_workers_per_model=1",
            "limit_max_image_pixels=false",
            "load_models=pieces,micro.mar,pipe.mar,sloppy.mar",
        ),
        (),
        MOVED,
        (
            r"ModelServer - Inference API bind to: http://127\.0\.0\.1:\d+\n[\s\S]*Metrics API bind to: http",
            r"-pipe_1\.0-stdout MODEL_LOG - Torch worker started\.",
            r"MODEL_LOG - the service is set up in its model's folder",
            r"MODEL_LOG - Compiled model with backend eager",
            r"MODEL_LOG - rank 1 has joined",
        ),
    ),
    Life(
        "envelope",
        (
            "service_envelope=kservev2",
            "disable_token_authorization=true",
            "load_models=inputs=inputs.mar",
            "default_response_timeout=55",
            "job_queue_size=7",
            "number_of_netty_threads=4",
            "async_logging=true",
            "models={\\",
            '  "inputs": {\\',
            '    "1.0": {"defaultVersion": true, "marName": "inputs.mar", "minWorkers": 1, "maxWorkers": 2, \\',
            '            "batchSize": 3, "maxBatchDelay": 10, "responseTimeout": 99}}}',
        ),
        (),
        ENVELOPE,
    ),
)
