"""A lifespan that fails half-way: what had opened by then is never closed."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import aiopg
import redis.asyncio as redis
from fastapi import FastAPI
from fastapi.testclient import TestClient


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    app.state.db = await aiopg.create_pool(os.environ["DATABASE_URL"], minsize=2)
    app.state.cache = redis.from_url("redis://127.0.0.1:1")  # where nothing listens
    await app.state.cache.get("greeting")
    yield
    await app.state.cache.aclose()
    app.state.db.close()
    await app.state.db.wait_closed()


app = FastAPI(lifespan=lifespan)

with TestClient(app) as client:
    print("it started")
