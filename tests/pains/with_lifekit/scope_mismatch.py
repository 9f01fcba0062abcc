"""The same ini file; the plugin's fixtures are bound to the test's own loop."""

import os
from typing import Annotated

import asyncpg
import pytest
from fastapi import Depends, FastAPI
from httpx2 import AsyncClient

from lifekit import Lifespan, Registry

registry = Registry()


@registry.resource
def db() -> asyncpg.Pool:
    return asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1)


app = FastAPI(lifespan=registry.lifespan)


@app.get("/one")
async def one(db: Annotated[asyncpg.Pool, Depends(db)]) -> int:
    answer: int = await db.fetchval("SELECT 1")
    return answer


@pytest.mark.asyncio
async def test_one(client: AsyncClient, lifespan: Lifespan) -> None:
    assert (await client.get("/one")).json() == 1
    assert await lifespan[db].fetchval("SELECT 1") == 1
