"""The article's second strategy, an application for each test: everything connects anew each time."""

from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio
from httpx import ASGITransport, AsyncClient

from .dependencies import Connected
from .myapp import app, starts


@pytest_asyncio.fixture
async def client() -> AsyncGenerator[AsyncClient]:
    async with app.router.lifespan_context(app):
        transport = ASGITransport(app)
        async with AsyncClient(transport=transport, base_url="http://test") as client:
            yield client
        await Connected.db.execute("TRUNCATE users, audit")  # a new pool is not a new database
        await Connected.cache.delete("users")


@pytest.mark.asyncio
async def test_a_user_is_created(client: AsyncClient) -> None:
    assert (await client.post("/api/users?name=ada")).status_code == 201


@pytest.mark.asyncio
async def test_there_are_no_users_at_first(client: AsyncClient) -> None:
    assert (await client.get("/api/users")).json() == []


@pytest.mark.asyncio
async def test_the_application_started_once(client: AsyncClient) -> None:
    assert len(starts) == 1
