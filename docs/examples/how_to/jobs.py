"""What the application, its worker and its command line are made of."""

# --8<-- [start:registries]
import os

import asyncpg
import redis.asyncio as redis

from lifekit import Registry

store = Registry("store")


@store.resource
def db() -> asyncpg.Pool:
    return asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1)


@store.resource(db)
async def schema(db: asyncpg.Pool) -> None:
    await db.execute("CREATE TABLE IF NOT EXISTS mails (recipient text NOT NULL)")


jobs = Registry("jobs", grace=10)
jobs.include(store)


@jobs.resource
def queue() -> redis.Redis:
    return redis.from_url(os.environ["REDIS_URL"], decode_responses=True)


# --8<-- [end:registries]
