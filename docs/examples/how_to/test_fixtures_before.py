"""How the application of adopt_after.py was tested: asgi-lifespan, and fixtures by hand."""

# --8<-- [start:before]
from collections.abc import AsyncGenerator

import pytest_asyncio
from asgi_lifespan import LifespanManager
from httpx2 import ASGITransport, AsyncClient

from how_to.adopt_after import app


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def client() -> AsyncGenerator[AsyncClient]:
    async with LifespanManager(app) as manager:
        transport = ASGITransport(app=manager.app)
        async with AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


async def test_it_multiplies(client: AsyncClient) -> None:
    assert (await client.get("/times/21")).json() == 42


# --8<-- [end:before]
