"""The article's fourth strategy, patched dependencies: a mock that is told nothing accepts everything.

Mended: ``mock_dependencies`` starts no lifespan; the names of the modules.
"""

from collections.abc import Iterator
from unittest.mock import AsyncMock, patch

import pytest
from httpx import ASGITransport, AsyncClient

from .myapp import app


@pytest.fixture
def mock_dependencies() -> Iterator[None]:
    with patch("tests.pains.article.dependencies.get_db", return_value=AsyncMock()) as get_db:
        get_db.return_value.fetchone.return_value = "ada"
        with patch("tests.pains.article.dependencies.get_redis", return_value=AsyncMock()):
            yield


@pytest.mark.asyncio
async def test_first_with_mocks(mock_dependencies: None) -> None:
    async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
        assert (await client.get("/api/users/first")).json() == "ada"


@pytest.mark.asyncio
async def test_first_as_it_is() -> None:
    async with (
        app.router.lifespan_context(app),
        AsyncClient(transport=ASGITransport(app), base_url="http://test") as client,
    ):
        assert (await client.get("/api/users/first")).json() is None
