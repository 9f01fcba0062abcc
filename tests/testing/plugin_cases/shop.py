"""An application on PostgreSQL and Redis, that counts what it sold."""

# No `from __future__ import annotations`: FastAPI resolves Depends(db) where the function is made.

import os
from typing import Annotated

import asyncpg
import redis.asyncio as redis
from fastapi import Depends, FastAPI

from lifekit import Registry

registry = Registry("shop")


@registry.resource
def db() -> asyncpg.Pool:
    return asyncpg.create_pool(os.environ["SHOP_POSTGRES"], min_size=1, max_size=4)


@registry.resource
def cache() -> redis.Redis:
    return redis.from_url(os.environ["SHOP_REDIS"])


app = FastAPI(lifespan=registry.lifespan)


@app.post("/sold/{thing}")
async def sell(
    thing: str, db: Annotated[asyncpg.Pool, Depends(db)], cache: Annotated[redis.Redis, Depends(cache)]
) -> list[int]:
    await db.execute("INSERT INTO sold VALUES ($1)", thing)
    return [await db.fetchval("SELECT count(*) FROM sold"), await cache.incr("sold")]
