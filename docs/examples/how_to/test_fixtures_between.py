"""The same test, with lifekit.testing in place of asgi-lifespan."""

# --8<-- [start:between]
from collections.abc import AsyncGenerator

import pytest_asyncio
from httpx2 import AsyncClient

from how_to.adopt_after import app
from lifekit import testing


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def client() -> AsyncGenerator[AsyncClient]:
    async with testing.client(app) as client:
        yield client


# --8<-- [end:between]
async def test_it_multiplies(client: AsyncClient) -> None:
    assert (await client.get("/times/21")).json() == 42
