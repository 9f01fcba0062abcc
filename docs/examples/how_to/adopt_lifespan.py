"""The same application with a lifespan of its own, beside which lifekit's runs."""

# --8<-- [start:lifespan]
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TypedDict

import asyncpg
import redis.asyncio as redis
from fastapi import FastAPI, Request

from lifekit import Registry
from lifekit.asgi import combine

registry = Registry("shop")


@registry.resource
def cache() -> redis.Redis:
    return redis.from_url(os.environ["REDIS_URL"])


class State(TypedDict):
    db: asyncpg.Pool


@asynccontextmanager
async def old_lifespan(app: FastAPI) -> AsyncGenerator[State]:
    async with asyncpg.create_pool(os.environ["DATABASE_URL"]) as db:
        yield {"db": db}


app = FastAPI(lifespan=combine(registry.lifespan, old_lifespan))


@app.get("/times/{number}")
async def times(number: int, request: Request) -> int:
    factor = int(await request.state.cache.get("factor") or 2)  # of the registry
    db = request.state.db  # of the old lifespan
    result: int = await db.fetchval("SELECT $1::int * $2::int", number, factor)
    return result


# --8<-- [end:lifespan]
