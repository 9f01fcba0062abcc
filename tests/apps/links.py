# pyright: reportUnknownMemberType=false
"""A FastAPI application with a pool of PostgreSQL connections and a Redis client."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

import asyncpg
from fastapi import Depends, FastAPI
from redis.asyncio import Redis

from lifekit import Registry
from lifekit.asgi import combine

from .notes import note, note_event, told

NAME = "lifekit-links"

registry = Registry(on_event=note_event)


@registry.resource
def db() -> asyncpg.Pool[asyncpg.Record]:
    return asyncpg.create_pool(
        os.environ["DATABASE_URL"],
        min_size=2,
        max_size=4,
        server_settings={"application_name": NAME},
    )


@registry.resource
def cache() -> Redis:
    return Redis.from_url(os.environ["REDIS_URL"], client_name=NAME)


class Links:
    """What is built from both."""

    def __init__(self, db: asyncpg.Pool[asyncpg.Record], cache: Redis) -> None:
        self.db, self.cache = db, cache


links = registry.resource(db, cache, name="links")(Links)


@asynccontextmanager
async def exit_when_told(app: FastAPI) -> AsyncGenerator[None]:
    """Keep the process alive when its resources are closed."""
    yield
    await told("exit")


app = FastAPI(lifespan=combine(exit_when_told, registry.lifespan))


@app.get("/hold")
async def hold(links: Annotated[Links, Depends(links)]) -> int:
    """Hold a connection of each kind and use them once told."""
    async with links.db.acquire() as connection:
        await links.cache.ping()
        note("asked")
        await told()
        await links.cache.incr("answers")
        answer = await connection.fetchval("SELECT 42")
    note("answered")
    return int(answer)
