"""A session's fixture under ``asyncio_default_fixture_loop_scope = function``."""

import os
from collections.abc import AsyncGenerator

import asyncpg
import pytest
import pytest_asyncio


@pytest_asyncio.fixture(scope="session")
async def db() -> AsyncGenerator[asyncpg.Pool]:
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1) as pool:
        yield pool


@pytest.mark.asyncio
async def test_one(db: asyncpg.Pool) -> None:
    assert await db.fetchval("SELECT 1") == 1
