import re

import pytest

from tests.unit.frontend.rig import Rig

pytestmark = pytest.mark.asyncio


async def test_the_page_and_all_that_it_loads_come_from_here(rig: Rig) -> None:
    async with rig.management.get("/docs") as response:
        page = await response.text()
        assert (response.status, response.content_type) == (200, "text/html")
        policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "http:" not in page + policy
    assert "https:" not in page + policy
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(loaded) == 4
    for path, content_type in zip(loaded, ("image/png", "text/css", "text/javascript", "text/javascript"), strict=True):
        async with rig.management.get(path) as response:
            assert (response.status, response.content_type) == (200, content_type)
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert len(await response.read()) > 100


async def test_nothing_else_lies_there(rig: Rig) -> None:
    for path in ("/docs/index.html", "/docs/..%2f__init__.py", "/docs/swagger-ui.js.map"):
        async with rig.management.get(path) as response:
            assert response.status == 404
    async with rig.inference.get("/docs") as response:
        assert response.status == 404
