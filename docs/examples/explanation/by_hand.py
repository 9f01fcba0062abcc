"""An application whose lifespan is written by hand: two pools, opened and closed in one event loop."""

# --8<-- [start:lifespan]
import os
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

import asyncpg
import redis.asyncio as redis
from fastapi import FastAPI, Request


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    async with AsyncExitStack() as stack:
        pool = asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1)
        app.state.db = await stack.enter_async_context(pool)
        client = redis.from_url(os.environ["REDIS_URL"])
        app.state.cache = await stack.enter_async_context(client)
        yield


app = FastAPI(lifespan=lifespan)
# --8<-- [end:lifespan]


@app.get("/one")
async def one(request: Request) -> int:
    await request.app.state.cache.incr("visits")
    answer: int = await request.app.state.db.fetchval("SELECT 1")
    return answer
