"""An application as it was: pools made by startup handlers, found by way of app.state."""

# --8<-- [start:before]
import os

import asyncpg
import redis.asyncio as redis
from fastapi import FastAPI, Request


async def connect() -> None:
    app.state.db = await asyncpg.create_pool(os.environ["DATABASE_URL"])
    app.state.cache = redis.from_url(os.environ["REDIS_URL"])


async def disconnect() -> None:
    await app.state.cache.aclose()
    await app.state.db.close()


app = FastAPI(on_startup=[connect], on_shutdown=[disconnect])


@app.get("/times/{number}")
async def times(number: int, request: Request) -> int:
    factor = int(await request.app.state.cache.get("factor") or 2)
    result: int = await request.app.state.db.fetchval("SELECT $1::int * $2::int", number, factor)
    return result


# --8<-- [end:before]
