"""A redis client that nobody closes."""

import asyncio
import os

import redis.asyncio as redis


async def main() -> None:
    cache = redis.from_url(os.environ["REDIS_URL"])
    print(await cache.get("greeting"))


asyncio.run(main())
