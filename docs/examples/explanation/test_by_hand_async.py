"""Async tests of an application without lifekit: one event loop for fixtures and tests."""

# --8<-- [start:async]
from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio
from httpx2 import ASGITransport, AsyncClient

from .by_hand import app


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def client() -> AsyncGenerator[AsyncClient]:
    async with app.router.lifespan_context(app):  # ASGITransport runs no lifespan
        transport = ASGITransport(app)
        async with AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


@pytest.mark.asyncio(loop_scope="session")
async def test_one(client: AsyncClient) -> None:
    assert (await client.get("/one")).json() == 1


# --8<-- [end:async]
@pytest.mark.asyncio(loop_scope="session")
async def test_once_more(client: AsyncClient) -> None:
    assert (await client.get("/one")).json() == 1
