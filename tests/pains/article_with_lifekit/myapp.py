"""The article's application on lifekit: what it is connected to is declared, and closes by itself."""

import os
from typing import Annotated, Any

import aiopg
import asyncpg
import redis.asyncio
from fastapi import Depends, FastAPI

from lifekit import Registry
from lifekit.events import Event, Started

starts: list[Event] = []


def note(event: Event) -> None:
    if isinstance(event, Started):
        starts.append(event)


registry = Registry("users", on_event=note)


@registry.resource
async def db() -> asyncpg.Pool:
    return await asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1)


@registry.resource(db)
async def tables(db: asyncpg.Pool) -> None:
    for table in ("users (name text UNIQUE)", "audit (entry text)"):
        await db.execute(f"CREATE TABLE IF NOT EXISTS {table}")


@registry.resource(after=(tables,))
async def audit() -> aiopg.Pool:
    return await aiopg.create_pool(os.environ["DATABASE_URL"], minsize=1)


@registry.resource
def cache() -> redis.asyncio.Redis:
    return redis.asyncio.from_url(os.environ["REDIS_URL"])


app = FastAPI(lifespan=registry.lifespan)
Database = Annotated[asyncpg.Pool, Depends(db)]
Audit = Annotated[aiopg.Pool, Depends(audit)]
Cache = Annotated[redis.asyncio.Redis, Depends(cache)]


@app.post("/api/users", status_code=201)
async def create(name: str, db: Database, audit: Audit, cache: Cache) -> None:
    await db.execute("INSERT INTO users VALUES ($1)", name)
    await cache.incr("users")
    async with audit.acquire() as connection, connection.cursor() as cursor:
        await cursor.execute("INSERT INTO audit VALUES (%s)", [f"{name} came"])


@app.get("/api/users")
async def users(db: Database) -> list[str]:
    return [user["name"] for user in await db.fetch("SELECT name FROM users")]


@app.get("/api/users/count")
async def count(cache: Cache) -> int:
    return int(await cache.get("users") or 0)


@app.get("/api/users/first")
async def first(db: Annotated[Any, Depends(db)]) -> str | None:
    name: str | None = await db.fetchone("SELECT min(name) FROM users")
    return name  # asyncpg has a fetchrow and a fetchval, and no fetchone


@app.get("/api/audit")
async def entries(audit: Audit) -> list[str]:
    async with audit.acquire() as connection, connection.cursor() as cursor:
        await cursor.execute("SELECT entry FROM audit")
        return [entry async for (entry,) in cursor]
