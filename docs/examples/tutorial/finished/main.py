from typing import Annotated

import asyncpg
import redis.asyncio as redis
from fastapi import Depends, FastAPI
from pydantic import BaseModel

import resources

app = FastAPI(title="Guestbook", lifespan=resources.registry.lifespan)

Db = Annotated[asyncpg.Pool, Depends(resources.db)]
Cache = Annotated[redis.Redis, Depends(resources.cache)]


class Entry(BaseModel):
    name: str
    text: str


class Page(BaseModel):
    visits: int | None
    entries: list[Entry]


@app.post("/entries", status_code=201)
async def sign(entry: Entry, db: Db) -> Entry:
    await db.execute(
        "INSERT INTO entries (name, text) VALUES ($1, $2)",
        entry.name,
        entry.text,
    )
    return entry


@app.get("/entries")
async def read(db: Db, cache: Cache) -> Page:
    rows = await db.fetch("SELECT name, text FROM entries ORDER BY id")
    entries = [Entry(**row) for row in rows]
    return Page(visits=await count(cache), entries=entries)


async def count(cache: redis.Redis) -> int | None:
    try:
        return await cache.incr("visits")
    except redis.ConnectionError:
        return None  # the page can be read without it
