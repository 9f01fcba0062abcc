"""Async tests with a sync ``TestClient``, and what is connected once for all of them.

Each request has an event loop of its own, which is closed after it.
"""

import os
from typing import Any

import aiopg
import asyncpg
import pytest
import redis.asyncio as redis
from fastapi import FastAPI
from fastapi.testclient import TestClient

app = FastAPI()
cache = redis.from_url(os.environ["REDIS_URL"])
pools: dict[str, Any] = {}


@app.get("/ping")
async def ping() -> None:
    await cache.get("greeting")


@app.get("/aiopg")
async def with_aiopg() -> None:
    if "aiopg" not in pools:
        pools["aiopg"] = await aiopg.create_pool(os.environ["DATABASE_URL"], minsize=1)
    async with pools["aiopg"].acquire() as connection, connection.cursor() as cursor:
        await cursor.execute("SELECT pg_sleep(0.5)")


@app.get("/asyncpg")
async def with_asyncpg() -> None:
    if "asyncpg" not in pools:
        pools["asyncpg"] = await asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1)
    async with pools["asyncpg"].acquire() as connection:
        await connection.execute("SELECT 1")


@pytest.mark.asyncio
@pytest.mark.parametrize("path", ["/ping", "/aiopg", "/asyncpg"])
@pytest.mark.parametrize("time", ["first", "second"])
async def test_something(path: str, time: str) -> None:
    assert TestClient(app).get(path).status_code == 200
