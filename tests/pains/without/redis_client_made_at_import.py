"""A redis client made at import, used in three event loops: the second fails, the third works."""

import asyncio
import os

import redis.asyncio as redis

cache = redis.from_url(os.environ["REDIS_URL"])


async def main() -> None:
    try:
        print(await cache.get("greeting"))
    except RuntimeError as error:
        print(f"RuntimeError: {error}")


for _ in range(3):
    asyncio.run(main())
