"""What the application is made of: each resource, and what it is built from."""

from contextlib import AbstractAsyncContextManager

import aiopg
import asyncpg
import redis.asyncio as redis

from lifekit import Registry, embedded, stopping
from lifekit.events import Event, Started, Stopped

from .links import TABLES, Links
from .settings import Settings


def show(event: Event) -> None:
    """Print each start and each stop as a picture."""
    if isinstance(event, Started | Stopped):
        print(event.timeline, flush=True)


registry = Registry("shortener", on_event=show)


@registry.resource
def settings() -> Settings:
    return Settings.from_environment()


@registry.resource(settings)
def postgres(settings: Settings) -> AbstractAsyncContextManager[embedded.Server]:
    return embedded.postgres(settings.database_url)


@registry.resource(settings)
def valkey(settings: Settings) -> AbstractAsyncContextManager[embedded.Server]:
    return embedded.valkey(settings.redis_url)


@registry.resource(postgres, retry=3)
def db(postgres: embedded.Server) -> asyncpg.Pool:
    return asyncpg.create_pool(postgres.url)


@registry.resource(valkey, retry=3)
def cache(valkey: embedded.Server) -> redis.Redis:
    return redis.from_url(valkey.url, decode_responses=True)


@registry.resource(db)
async def schema(db: asyncpg.Pool) -> None:
    await db.execute(TABLES)


@registry.resource(postgres, after=(schema,), required=False)
async def reports(postgres: embedded.Server) -> aiopg.Pool:
    return await aiopg.create_pool(postgres.url)


@registry.resource(db, cache, after=(schema,))
def links(db: asyncpg.Pool, cache: redis.Redis) -> Links:
    return Links(db, cache)


@registry.worker(links, leader=db, drain=5.0)  # in one process of several
async def save_visits(links: Links) -> None:
    async for visits in stopping().until(links.visits()):
        await links.save(visits)


@registry.worker(db, every=60.0)
async def remove_expired(db: asyncpg.Pool) -> None:
    await db.execute("DELETE FROM links WHERE expires < now()")
