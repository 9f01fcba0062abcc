"""Mocks of a redis client and of a pool, made with the standard library's tools."""

import asyncio
from typing import Any
from unittest.mock import AsyncMock, create_autospec

import asyncpg
import redis.asyncio as redis


async def follow(slug: str, db: asyncpg.Pool, cache: redis.Redis) -> str | bytes | None:
    url = await cache.get(slug)
    if url is None:
        async with db.acquire() as connection:
            url = await connection.fetchval("SELECT url FROM links WHERE slug = $1", slug)
    return url


async def main() -> None:
    specced: Any = create_autospec(redis.Redis)
    lenient: Any = AsyncMock()
    lenient.get.return_value = None
    for cache in (specced, lenient):
        try:
            print(await follow("a", AsyncMock(), cache))
        except TypeError as error:
            print(f"TypeError: {error}")


asyncio.run(main())
