"""The article's third strategy, a transaction around each test: it isolates one connection only.

The application takes others from its pool. What it does lasts; what the test does it can't see.
"""

from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio
from asyncpg.pool import PoolConnectionProxy
from fastapi import FastAPI
from httpx import AsyncClient

from .dependencies import Connected

pytest_plugins = ["tests.pains.article.fixtures"]
pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(loop_scope="session")
async def db_transaction(app_with_lifespan: FastAPI) -> AsyncGenerator[PoolConnectionProxy]:
    async with Connected.db.acquire() as conn:
        trans = conn.transaction()
        await trans.start()
        try:
            yield conn
        finally:
            await trans.rollback()


async def test_the_application_sees_the_user(
    async_client: AsyncClient, db_transaction: PoolConnectionProxy
) -> None:
    await db_transaction.execute("INSERT INTO users VALUES ('grace')")
    assert (await async_client.get("/api/users")).json() == ["grace"]


async def test_a_user_is_created(
    async_client: AsyncClient, db_transaction: PoolConnectionProxy
) -> None:
    assert (await async_client.post("/api/users?name=ada")).status_code == 201


async def test_there_are_no_users_at_first(
    async_client: AsyncClient, db_transaction: PoolConnectionProxy
) -> None:
    assert await db_transaction.fetchval("SELECT count(*) FROM users") == 0
