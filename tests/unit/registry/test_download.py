import asyncio
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from minserve.errors import DownloadFailed, MinServeError, ModelNotFound, NotSaved
from minserve.registry.download import fetch, in_store

BODY = bytes(range(256)) * 8000


class Site:
    """A web server with a few archives, and some that are none."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.hang = asyncio.Event()
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self.server = TestServer(app, host="127.0.0.1")

    @property
    def allowed(self) -> list[str]:
        return [rf"http://127\.0\.0\.1:{self.server.port}/(?!secret).*"]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server.port}/{path}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request.path)
        match request.path:
            case "/m.mar" | "/a dir/m 2.tar.gz":
                return web.Response(body=BODY, headers={"Content-Encoding": "gzip"} if "gz" in request.path else {})
            case "/here.mar":
                return web.Response(status=302, headers={"Location": "/m.mar"})
            case "/elsewhere.mar":
                return web.Response(status=302, headers={"Location": f"http://localhost:{self.server.port}/m.mar"})
            case "/to-secret.mar":
                return web.Response(status=307, headers={"Location": "/secret.mar"})
            case "/round.mar":
                return web.Response(status=302, headers={"Location": "/round.mar"})
            case "/nowhere.mar":
                return web.Response(status=302)
            case "/broken.mar" | "/slow.mar":
                response = web.StreamResponse(headers={"Content-Length": str(len(BODY))})
                await response.prepare(request)
                await response.write(BODY[:1000])
                if request.path == "/slow.mar":
                    self.hang.set()
                    await asyncio.Event().wait()
                assert request.transport is not None
                request.transport.abort()
                return response
        return web.Response(status=404)


@pytest_asyncio.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    await site.server.start_server()
    yield site
    await site.server.close()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("m.mar", "m.mar"),
        ("m.mar?token=a/b.mar#x", "m.mar"),
        ("a%20dir/m%202.tar.gz", "m 2.tar.gz"),
        ("here.mar", "here.mar"),
    ],
)
async def test_an_archive_is_fetched_as_it_lies_there(site: Site, store: Path, path: str, name: str) -> None:
    fetched = await fetch(site.url(path), store, site.allowed)
    assert fetched == store / name
    assert fetched.read_bytes() == BODY
    assert os.listdir(store) == [name]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("url", "error", "text"),
    [
        ("", ModelNotFound, "empty url"),
        ("{site}a/../m.mar", ModelNotFound, "Relative path is not allowed in url: {url}"),
        ("{site}a/%2e%2E/m.mar", ModelNotFound, "Relative path is not allowed in url: {url}"),
        ("http://models.example/m.mar", ModelNotFound, "Given URL {url} does not match any allowed URL(s)"),
        ("file:///etc/passwd.mar", ModelNotFound, "Given URL {url} does not match any allowed URL(s)"),
        ("{site}secret.mar", ModelNotFound, "Given URL {url} does not match any allowed URL(s)"),
        ("{site}to-secret.mar", ModelNotFound, "Given URL {url} does not match any allowed URL(s)"),
        ("{site}elsewhere.mar", ModelNotFound, "Given URL {url} does not match any allowed URL(s)"),
        ("s3://bucket/m.mar", ModelNotFound, "Model not found at: {url}"),
        ("http://[/m.mar", ModelNotFound, "Model not found at: {url}"),
        ("{site}absent.mar", DownloadFailed, "Failed to download archive from: {url}"),
        ("{site}broken.mar", DownloadFailed, "Failed to download archive from: {url}"),
        ("{site}round.mar", DownloadFailed, "Failed to download archive from: {url}"),
        ("{site}nowhere.mar", DownloadFailed, "Failed to download archive from: {url}"),
        ("{site}m.txt", DownloadFailed, "Failed to download archive from: {url}"),
        ("{site}.mar", DownloadFailed, "Failed to download archive from: {url}"),
        ("{site}a%2F.m.mar", DownloadFailed, "Failed to download archive from: {url}"),
        ("{site}taken.mar", NotSaved, "Model file already exists taken.mar"),
    ],
)
async def test_what_cannot_be_fetched_says_it_in_torchserves_words_and_leaves_nothing(
    site: Site, store: Path, url: str, error: type[MinServeError], text: str
) -> None:
    (store / "taken.mar").write_text("mine")
    url = url.format(site=site.url(""))
    with pytest.raises(error) as raised:
        await fetch(url, store, site.allowed)
    assert str(raised.value) == text.format(url=url)
    assert os.listdir(store) == ["taken.mar"]
    assert (store / "taken.mar").read_text() == "mine"


@pytest.mark.asyncio
async def test_a_private_host_that_no_pattern_names_is_not_asked(
    site: Site, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433", "models.example@127.0.0.1"):
        with pytest.raises(MinServeError):
            await fetch(f"http://{host}:{site.server.port}/m.mar", store, ["https?://.*"])
    assert site.requests == []
    assert "localhost is 127.0.0.1, a private or special address" in caplog.text


@pytest.mark.asyncio
async def test_a_size_limit_ends_a_download(site: Site, store: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DownloadFailed):
        await fetch(site.url("m.mar"), store, site.allowed, limit=len(BODY) - 1)
    assert f"larger than {len(BODY) - 1} bytes" in caplog.text
    await fetch(site.url("m.mar"), store, site.allowed, limit=len(BODY))


@pytest.mark.asyncio
async def test_a_download_that_is_cancelled_leaves_nothing(site: Site, store: Path) -> None:
    task = asyncio.create_task(fetch(site.url("slow.mar"), store, site.allowed))
    await site.hang.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert os.listdir(store) == []


@pytest.mark.asyncio
async def test_parts_that_a_server_has_left_that_was_killed_are_removed_and_no_others(site: Site, store: Path) -> None:
    for name in (".m.mar.0123abcd.part", ".mine.part"):
        (store / name).touch()
    others = asyncio.create_task(fetch(site.url("slow.mar"), store, site.allowed))
    await site.hang.wait()
    await fetch(site.url("m.mar"), store, site.allowed)
    assert sorted(name for name in os.listdir(store) if ".slow." not in name) == [".mine.part", "m.mar"]
    assert len(os.listdir(store)) == 3
    others.cancel()
    await asyncio.wait([others])
    assert len(os.listdir(store)) == 2


@pytest.mark.asyncio
async def test_of_two_downloads_of_one_name_the_second_is_refused(site: Site, store: Path) -> None:
    results = await asyncio.gather(
        *(fetch(site.url(f"m.mar?{number}"), store, site.allowed) for number in range(3)), return_exceptions=True
    )
    assert sorted(type(result).__name__ for result in results) == ["NotSaved", "NotSaved", "PosixPath"]
    assert (store / "m.mar").read_bytes() == BODY


@pytest.mark.asyncio
async def test_a_store_that_takes_no_file_is_told(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(NotSaved, match="Failed to save model: http://"):
        await fetch(site.url("m.mar"), tmp_path / "absent", site.allowed)
    assert "No such file or directory" in caplog.text


@pytest.mark.asyncio
async def test_a_file_is_copied_into_the_store(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    outside = store.parent / "outside.mar"
    outside.write_bytes(BODY)
    assert (await fetch(f"file://{outside}", store, ["file://.*"])).read_bytes() == BODY
    os.mkfifo(store.parent / "pipe.mar")
    for name in ("pipe.mar", "absent.mar"):
        with pytest.raises(DownloadFailed):
            await fetch(f"file://{store.parent / name}", store, ["file://.*"])
    with pytest.raises(DownloadFailed):
        await fetch("file://elsewhere/m.mar", store, ["file://.*"])
    assert os.listdir(store) == ["outside.mar"]


def test_a_file_address_in_the_store_needs_no_copy(store: Path) -> None:
    (store / "m.mar").touch()
    assert in_store(f"file://{store}/m.mar", store) == store / "m.mar"
    assert in_store(f"file://localhost{store}/m.mar", store) == store / "m.mar"
    assert in_store(f"file://{store}-sibling/m.mar", store) is None
    assert in_store("https://models.example/m.mar", store) is None
    with pytest.raises(ModelNotFound, match="Model not found at"):
        in_store(f"file://{store}/absent.mar", store)
    (store / "notes.txt").touch()
    for no_model in (
        f"file://{store}",
        f"file://{store}/notes.txt",
        f"file://{store}/./",
        f"file://{store}/{'x' * 300}.mar",
    ):
        with pytest.raises(ModelNotFound, match="Model not found at"):
            in_store(no_model, store)
    with pytest.raises(ModelNotFound, match="Relative path"):
        in_store(f"file://{store}/../outside.mar", store)
