"""The same application, half moved: lifekit opens the cache, a startup handler still the pool."""

import os

import asyncpg
import redis.asyncio as redis
from fastapi import FastAPI, Request

# --8<-- [start:registry]
from lifekit import Registry
from lifekit.asgi import combine

registry = Registry("shop")


@registry.resource
def cache() -> redis.Redis:
    return redis.from_url(os.environ["REDIS_URL"])


# --8<-- [end:registry]
# --8<-- [start:between]
async def connect() -> None:
    app.state.db = await asyncpg.create_pool(os.environ["DATABASE_URL"])
    app.state.cache = cache.get()  # open already; routes find it where they always did


async def disconnect() -> None:
    await app.state.db.close()


app = FastAPI(on_startup=[connect], on_shutdown=[disconnect])
app.router.lifespan_context = combine(registry.lifespan, app.router.lifespan_context)
# --8<-- [end:between]


@app.get("/times/{number}")
async def times(number: int, request: Request) -> int:
    factor = int(await request.app.state.cache.get("factor") or 2)
    result: int = await request.app.state.db.fetchval("SELECT $1::int * $2::int", number, factor)
    return result
