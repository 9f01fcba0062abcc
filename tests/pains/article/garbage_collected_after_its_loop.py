"""What a request left open is collected after its event loop was closed.

Of old, ``__del__`` then raised ``RuntimeError: Event loop is closed`` into nowhere. Today's drivers
warn instead; the server hears nothing of it.
"""

import gc
import os

import aiopg
import asyncpg
import redis.asyncio as redis
from fastapi import FastAPI
from fastapi.testclient import TestClient

app = FastAPI()


@app.get("/ping")
async def ping() -> None:
    db = await asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1)
    reports = await aiopg.create_pool(os.environ["DATABASE_URL"], minsize=1)
    cache = redis.from_url(os.environ["REDIS_URL"])
    await cache.get("greeting")
    print(await db.fetchval("SELECT 1"), reports.freesize)


TestClient(app).get("/ping")
gc.collect()
