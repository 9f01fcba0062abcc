"""The article's lifespan, word for word but for the names of the servers."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import aiopg
import redis.asyncio
from fastapi import FastAPI
from fastapi.testclient import TestClient


async def connect_to_redis() -> Any:
    return redis.asyncio.from_url(os.environ["REDIS_URL"])


async def connect_to_db() -> Any:
    return await aiopg.create_pool(os.environ["DATABASE_URL"], minsize=1)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    # Startup
    redis = await connect_to_redis()
    db = await connect_to_db()
    app.state.redis = redis
    app.state.db = db

    yield

    # Shutdown
    await redis.close()
    await redis.wait_closed()
    db.close()
    await db.wait_closed()


app = FastAPI(lifespan=lifespan)

with TestClient(app):
    print("it serves")
