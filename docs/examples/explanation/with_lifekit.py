"""The same application with its pools declared."""

# --8<-- [start:app]
import os
from typing import Annotated

import asyncpg
import redis.asyncio as redis
from fastapi import Depends, FastAPI

from lifekit import Registry

registry = Registry("shop")


@registry.resource
def db() -> asyncpg.Pool:
    return asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1)


@registry.resource
def cache() -> redis.Redis:
    return redis.from_url(os.environ["REDIS_URL"])


app = FastAPI(lifespan=registry.lifespan)


@app.get("/one")
async def one(
    db: Annotated[asyncpg.Pool, Depends(db)], cache: Annotated[redis.Redis, Depends(cache)]
) -> int:
    await cache.incr("visits")
    answer: int = await db.fetchval("SELECT 1")
    return answer


# --8<-- [end:app]
