"""The same application, moved."""

# --8<-- [start:after]
import os
from typing import Annotated

import asyncpg
import redis.asyncio as redis
from fastapi import Depends, FastAPI

from lifekit import Registry

registry = Registry("shop")


@registry.resource
def db() -> asyncpg.Pool:
    return asyncpg.create_pool(os.environ["DATABASE_URL"])


@registry.resource
def cache() -> redis.Redis:
    return redis.from_url(os.environ["REDIS_URL"])


app = FastAPI(lifespan=registry.lifespan)


@app.get("/times/{number}")
async def times(
    number: int,
    db: Annotated[asyncpg.Pool, Depends(db)],
    cache: Annotated[redis.Redis, Depends(cache)],
) -> int:
    factor = int(await cache.get("factor") or 2)
    result: int = await db.fetchval("SELECT $1::int * $2::int", number, factor)
    return result


# --8<-- [end:after]
