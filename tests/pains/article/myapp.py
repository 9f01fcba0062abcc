"""The article's application, with its lifespan: FastAPI, asyncpg, aiopg and redis.

Mended: ``redis.wait_closed()``, which was aioredis's, is gone; ``redis.close()`` is ``aclose()`` now.
The routes call their dependencies, so that the article's ``patch`` reaches them; it would not reach
what ``Depends`` has got hold of when it is imported.
"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import aiopg
import asyncpg
import redis.asyncio as redis
from fastapi import FastAPI

from . import dependencies
from .dependencies import Connected

starts: list[FastAPI] = []


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    starts.append(app)
    Connected.db = await asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1)
    for table in ("users (name text UNIQUE)", "audit (entry text)"):
        await Connected.db.execute(f"CREATE TABLE IF NOT EXISTS {table}")
    Connected.audit = await aiopg.create_pool(os.environ["DATABASE_URL"], minsize=1)
    Connected.cache = redis.from_url(os.environ["REDIS_URL"])
    yield
    await Connected.cache.aclose()
    Connected.audit.close()
    await Connected.audit.wait_closed()
    await Connected.db.close()


app = FastAPI(lifespan=lifespan)


@app.post("/api/users", status_code=201)
async def create(name: str) -> None:
    db, cache = await dependencies.get_db(), await dependencies.get_redis()
    await db.execute("INSERT INTO users VALUES ($1)", name)
    await cache.incr("users")
    audit = await dependencies.get_audit()
    async with audit.acquire() as connection, connection.cursor() as cursor:
        await cursor.execute("INSERT INTO audit VALUES (%s)", [f"{name} came"])


@app.get("/api/users")
async def users() -> list[str]:
    db = await dependencies.get_db()
    return [user["name"] for user in await db.fetch("SELECT name FROM users")]


@app.get("/api/users/count")
async def count() -> int:
    cache = await dependencies.get_redis()
    return int(await cache.get("users") or 0)


@app.get("/api/users/first")
async def first() -> str | None:
    db: Any = await dependencies.get_db()
    name: str | None = await db.fetchone("SELECT min(name) FROM users")
    return name  # asyncpg has a fetchrow and a fetchval, and no fetchone


@app.get("/api/audit")
async def entries() -> list[str]:
    audit = await dependencies.get_audit()
    async with audit.acquire() as connection, connection.cursor() as cursor:
        await cursor.execute("SELECT entry FROM audit")
        return [entry async for (entry,) in cursor]
