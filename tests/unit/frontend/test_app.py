import pytest
from aiohttp import http_parser, web

from minserve.config.server import ServerOptions
from minserve.errors import StartupError
from minserve.frontend.app import require_c_parser, runner


def test_the_c_parser_is_there() -> None:
    require_c_parser()


def test_without_the_c_parser_the_server_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_parser, "HttpRequestParser", http_parser.HttpRequestParserPy)
    with pytest.raises(StartupError, match="without its C parser"):
        require_c_parser()


@pytest.mark.asyncio
async def test_no_line_is_logged_for_a_request() -> None:
    app_runner = runner(web.Application(), ServerOptions())
    await app_runner.setup()
    assert app_runner.server is not None
    handler = app_runner.server()
    assert handler.access_logger is None or not handler.access_logger.enabled
    await app_runner.cleanup()
