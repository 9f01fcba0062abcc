"""Mocks of a redis client and of a pool that know what is awaited and what is entered."""

import asyncio

import asyncpg
import redis.asyncio as redis

from lifekit import Registry, testing

registry = Registry()


@registry.resource
def db() -> asyncpg.Pool:
    return asyncpg.create_pool("postgresql://nowhere")


@registry.resource
def cache() -> redis.Redis:
    return redis.from_url("redis://nowhere")


async def follow(slug: str, db: asyncpg.Pool, cache: redis.Redis) -> str | bytes | None:
    url = await cache.get(slug)
    if url is None:
        async with db.acquire() as connection:
            url = await connection.fetchval("SELECT url FROM links WHERE slug = $1", slug)
    return url


async def main() -> None:
    fake_cache, fake_db = testing.mock(cache), testing.mock(db)
    fake_cache.get.return_value = None
    fake_db.acquire.return_value.fetchval.return_value = "https://example.org/"
    print(await follow("a", fake_db, fake_cache))


asyncio.run(main())
