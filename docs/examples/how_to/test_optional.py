"""The application serves without its cache, and says so where it can't."""

from __future__ import annotations

# --8<-- [start:test]
import redis.asyncio as redis

from how_to.optional import app, cache, registry
from lifekit import testing


def away() -> redis.Redis:
    raise ConnectionError("the cache is away")


async def test_without_the_cache() -> None:
    with registry.override(cache, factory=away):
        async with testing.client(app) as client:
            assert (await client.get("/time")).status_code == 200
            answer = await client.post("/time", params={"time": "noon"})
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) >= 1


# --8<-- [end:test]
