import json
import logging
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import hdrs, web
from aiohttp.test_utils import make_mocked_request

from minserve.errors import InvalidKey, MinServeError, StartupError
from minserve.frontend.app import combined_app, inference_app, make_keys, management_app, metrics_app
from minserve.frontend.auth import KEY_FILE, Keys, Kind
from minserve.registry.models import Registry
from tests.unit.frontend.rig import OPTIONS, FakeSupervisor, Rig

PROTECTED = OPTIONS.model_copy(update={"disable_token_authorization": False, "enable_model_api": True})
REFUSED = "Token Authorization failed. Token either incorrect, expired, or not provided correctly"
OPEN = {"/", "/api-description", "/livez", "/readyz", "/docs", "/docs/{file}", "/metrics"}
WHOLE_HOUR = 1_764_072_000.0  # 2025-11-25T12:00:00Z


class Clock:
    def __init__(self) -> None:
        self.now = WHOLE_HOUR

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(tmp_path: Path, clock: Clock) -> Keys:
    return Keys(tmp_path / KEY_FILE, 0.5, clock)


def told(keys: Keys, kind: Kind) -> str:
    """What the file says, which is where a client has it from."""
    key: str = json.loads(keys.path.read_text())[kind]["key"]
    return key


def passes(keys: Keys, kind: Kind, header: str | None) -> bool:
    headers = {} if header is None else {"Authorization": header}
    check = keys.require(kind)
    try:
        return check(make_mocked_request("GET", "/", headers)) is None
    except InvalidKey:
        return False


# ── the file ──


def test_the_file_is_torchserves_and_for_nobody_else(keys: Keys) -> None:
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    text = keys.path.read_text()
    content = json.loads(text)
    assert {kind: list(key) for kind, key in content.items()} == {
        "management": ["key", "expiration time"],
        "inference": ["key", "expiration time"],
        "API": ["key"],
    }
    assert content["inference"]["expiration time"] == "2025-11-25T12:00:30.000000Z"
    assert text == json.dumps(content, indent=2)
    assert len({key["key"] for key in content.values()}) == 3
    assert [path.name for path in keys.path.parent.iterdir()] == [KEY_FILE]


def test_a_file_that_was_there_is_replaced_not_written_into(tmp_path: Path) -> None:
    """Whatever it leads to, and whoever may read it."""
    target = tmp_path / "elsewhere"
    target.write_text("precious")
    (tmp_path / KEY_FILE).symlink_to(target)
    keys = Keys(tmp_path / KEY_FILE, 60)
    assert target.read_text() == "precious"
    assert not keys.path.is_symlink()
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600


def test_without_a_place_for_the_file_the_server_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="disable_token_authorization"):
        Keys(tmp_path / "none" / KEY_FILE, 60)
    (tmp_path / KEY_FILE / "folder").mkdir(parents=True)
    with pytest.raises(StartupError):
        Keys(tmp_path / KEY_FILE, 60)
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]


def test_only_the_servers_own_file_is_removed(keys: Keys) -> None:
    later = Keys(keys.path, 60)
    keys.remove()
    assert keys.path.exists()
    later.remove()
    assert not keys.path.exists()
    later.remove()


def test_keys_are_made_where_the_server_is_started_and_only_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert make_keys(OPTIONS) is None
    assert not list(tmp_path.iterdir())
    keys = make_keys(PROTECTED)
    assert keys is not None
    assert keys.path == tmp_path / KEY_FILE


# ── keys ──


def test_what_an_authorization_header_may_look_like(keys: Keys) -> None:
    key = told(keys, Kind.INFERENCE)
    assert passes(keys, Kind.INFERENCE, f"Bearer {key}")
    assert passes(keys, Kind.INFERENCE, f"Bearer \t {key}")
    for header in (
        *(None, "", "Bearer", "Bearer ", key, f"Bearer{key}", f"bearer {key}", f"Basic {key}"),
        *(f" Bearer {key}", f"Bearer {key} ", f"Bearer {key}x", f"Bearer {key[:-1]}", "Bearer é"),
    ):
        assert not passes(keys, Kind.INFERENCE, header), header
    assert not keys.good(Kind.INFERENCE, {"Authorization": f"Bearer {key}\udcff"}), "as bytes that are no UTF-8 arrive"


def test_a_key_expires_after_its_minutes_also_in_fractions_and_the_api_key_never(keys: Keys, clock: Clock) -> None:
    headers = {kind: f"Bearer {told(keys, kind)}" for kind in Kind}
    clock.now += 29.9
    assert all(passes(keys, kind, headers[kind]) for kind in Kind)
    clock.now += 0.1
    assert [kind for kind in Kind if passes(keys, kind, headers[kind])] == [Kind.API]


def test_a_key_for_longer_than_dates_go_is_good_until_they_end(tmp_path: Path) -> None:
    keys = Keys(tmp_path / KEY_FILE, 1e300)
    assert json.loads(keys.path.read_text())["inference"]["expiration time"] == "9999-12-31T23:59:59.000000Z"


def test_a_new_key_takes_the_place_of_the_old_one_and_of_no_other(
    keys: Keys, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    old = {kind: told(keys, kind) for kind in Kind}
    clock.now += 60
    keys.renew(Kind.MANAGEMENT)
    new = {kind: told(keys, kind) for kind in Kind}
    assert [kind for kind in Kind if old[kind] != new[kind]] == [Kind.MANAGEMENT]
    assert passes(keys, Kind.MANAGEMENT, f"Bearer {new[Kind.MANAGEMENT]}")
    assert not passes(keys, Kind.MANAGEMENT, f"Bearer {old[Kind.MANAGEMENT]}")
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    assert caplog.records
    assert not [key for key in (*old.values(), *new.values()) if key in caplog.text]


def test_a_key_that_cannot_be_told_is_not_taken(keys: Keys) -> None:
    key = told(keys, Kind.INFERENCE)
    keys.path.unlink()
    keys.path.mkdir()
    (keys.path / "x").touch()
    with pytest.raises(MinServeError, match=KEY_FILE):
        keys.renew(Kind.INFERENCE)
    assert passes(keys, Kind.INFERENCE, f"Bearer {key}")


# ── every route ──


def passed(handler: object) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Stands where the handler is called."""

    async def answered(request: web.Request) -> web.StreamResponse:
        return web.Response(status=299)

    return answered


@pytest_asyncio.fixture
async def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setattr("minserve.registry.making.Supervisor", FakeSupervisor)
    return Rig().registry


SOME = make_mocked_request("GET", "/", {"Host": "localhost"})


async def outcome(route: web.AbstractRoute, path: str, header: str | None) -> int:
    method = "PATCH" if route.method == hdrs.METH_ANY else route.method
    headers = {"Host": "localhost", **({} if header is None else {"Authorization": header})}
    request = SOME.clone(method=method, rel_url=path, headers=headers)
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]] = route.handler
    return (await handler(request)).status


def needed(path: str, side: str, management: set[str]) -> Kind | None:
    path = path.rstrip("/") or "/"
    if path in OPEN:
        return None
    if path == "/token":
        return Kind.API
    return Kind.MANAGEMENT if side == "management" or path in management else Kind.INFERENCE


@pytest.mark.asyncio
@pytest.mark.parametrize("side", ["inference", "management", "combined"])
async def test_every_route_takes_the_one_key_it_needs_and_no_other(
    registry: Registry, keys: Keys, clock: Clock, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    monkeypatch.setattr("minserve.frontend.routing.errors_as_json", passed)
    make = {"inference": inference_app, "management": management_app, "combined": combined_app}[side]
    app = make(registry, PROTECTED, keys)
    # On the port of both: what is management's on its own port, but for what both ports have.
    both = {resource.canonical for resource in inference_app(registry, PROTECTED, keys).router.resources()}
    alone = {resource.canonical for resource in management_app(registry, PROTECTED, keys).router.resources()}
    texts = {kind: told(keys, kind) for kind in Kind}
    good = {f"{kind} key": f"Bearer {text}" for kind, text in texts.items()}
    bad = {"none": None, "empty": "", "malformed": texts[Kind.MANAGEMENT], "unknown": "Bearer abcdefgh"}
    wrong: list[str] = []
    seen = 0
    for late in (False, True):
        clock.now += 60 if late else 0
        for resource in app.router.resources():
            need = needed(resource.canonical, side, alone - both)
            for route in resource:
                for name, header in {**bad, **good}.items():
                    fits = need is None or (name == f"{need} key" and not (late and need is not Kind.API))
                    status = await outcome(route, resource.canonical, header)
                    seen += 1
                    if status != (299 if fits else 400):
                        wrong.append(f"{route.method} {resource.canonical}: {status} with {name}, expired: {late}")
    assert wrong == []
    assert seen > 300


@pytest.mark.asyncio
async def test_where_no_key_is_asked_for_none_is_looked_at(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no handler of a prediction has anything in front of it."""
    monkeypatch.setattr("minserve.frontend.routing.errors_as_json", passed)
    for app in (inference_app(registry, OPTIONS), management_app(registry, OPTIONS), metrics_app(registry, PROTECTED)):
        for resource in app.router.resources():
            for route in resource:
                assert await outcome(route, resource.canonical, "Bearer nonsense") == 299
    for route in inference_app(registry, OPTIONS).router.routes():
        assert route.handler.__code__.co_name == "answered"


# ── over HTTP ──


@pytest_asyncio.fixture
async def rig(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr("minserve.registry.making.Supervisor", FakeSupervisor)
    async with Rig(PROTECTED, keys) as rig:
        yield rig


def bearer(keys: Keys, kind: Kind) -> dict[str, str]:
    return {"Authorization": f"Bearer {told(keys, kind)}"}


@pytest.mark.asyncio
async def test_the_way_of_torchserves_scripts(rig: Rig, keys: Keys) -> None:
    async with rig.inference.post("/predictions/m", data=b"1") as response:
        assert (response.status, response.content_type) == (400, "application/json")
        assert await response.json() == {"code": 400, "type": "InvalidKeyException", "message": REFUSED}
    async with rig.inference.post("/predictions/m", data=b"1", headers=bearer(keys, Kind.INFERENCE)) as response:
        assert (response.status, await response.read()) == (200, b"1")
    old = bearer(keys, Kind.MANAGEMENT)
    async with rig.management.get("/token?type=management", headers=bearer(keys, Kind.API)) as response:
        assert (response.status, response.content_type, await response.read()) == (200, "application/json", b"\n")
    for headers, status in ((old, 400), (bearer(keys, Kind.MANAGEMENT), 200)):
        async with rig.management.get("/models", headers=headers) as response:
            assert response.status == status


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("query", "kind"),
    [("", Kind.API), ("?type=", Kind.API), ("?type=API", Kind.API), ("?type=inference", Kind.MANAGEMENT)],
)
async def test_a_call_that_gets_no_new_key_changes_nothing(rig: Rig, keys: Keys, query: str, kind: Kind) -> None:
    before = keys.path.read_text()
    async with rig.management.get(f"/token{query}", headers=bearer(keys, kind)) as response:
        answer = await response.json()
        assert (response.status, answer["type"]) == (400, "InvalidKeyException")
        assert answer["message"].startswith(REFUSED.replace("Authorization", "Authentication"))
    assert keys.path.read_text() == before


@pytest.mark.asyncio
async def test_who_has_no_key_learns_whether_the_server_is_ready_but_not_why(rig: Rig) -> None:
    rig.supervisor().not_ready = "rank 1: secret of the model"
    async with rig.inference.get("/readyz") as response:
        assert (response.status, await response.json()) == (503, {"status": "not ready"})
