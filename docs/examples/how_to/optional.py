"""A cache that the application can do without, and a pool whose password changes."""

import os
from typing import Annotated

import asyncpg
import redis.asyncio as redis
from fastapi import Depends, FastAPI

from lifekit import Registry, UnavailableError

registry = Registry()


# --8<-- [start:resources]
@registry.resource(renew_every=900.0)
def db() -> asyncpg.Pool:
    return asyncpg.create_pool(os.environ["DATABASE_URL"])


@registry.resource(required=False)
def cache() -> redis.Redis:
    return redis.from_url(os.environ["REDIS_URL"])


# --8<-- [end:resources]

app = FastAPI(lifespan=registry.lifespan)


# --8<-- [start:routes]
@app.get("/time")
async def time(db: Annotated[asyncpg.Pool, Depends(db)]) -> str:
    found = await cached("time") or await db.fetchval("SELECT now()")
    return str(found)


async def cached(key: str) -> bytes | str | None:
    try:
        return await cache.get().get(key)
    except UnavailableError:
        return None


@app.post("/time")
async def keep(time: str, cache: Annotated[redis.Redis, Depends(cache)]) -> None:
    await cache.set("time", time)  # 503 while the cache is not there


# --8<-- [end:routes]
