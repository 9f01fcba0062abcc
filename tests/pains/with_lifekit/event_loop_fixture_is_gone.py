"""A sync test, and no event loop to be taken: the application runs in one of its own."""

import os
from typing import Annotated

import asyncpg
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from lifekit import Registry

registry = Registry()


@registry.resource
def db() -> asyncpg.Pool:
    return asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1)


app = FastAPI(lifespan=registry.lifespan)


@app.get("/one")
async def one(db: Annotated[asyncpg.Pool, Depends(db)]) -> int:
    answer: int = await db.fetchval("SELECT 1")
    return answer


def test_one(sync_client: TestClient) -> None:
    assert sync_client.get("/one").json() == 1
