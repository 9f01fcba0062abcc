import redis.asyncio as redis
from httpx2 import AsyncClient
from lifekit import Lifespan, testing

import resources


async def test_without_redis_the_page_can_be_read(
    client: AsyncClient, lifespan: Lifespan
) -> None:
    cache = testing.mock(resources.cache)
    cache.incr.side_effect = redis.ConnectionError("down")

    async with lifespan.override(resources.cache, cache):
        page = await client.get("/entries")

    assert page.json() == {"visits": None, "entries": []}
