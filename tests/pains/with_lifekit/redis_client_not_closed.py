"""A redis client that has an owner, which closes it."""

import asyncio
import os

import redis.asyncio as redis

from lifekit import Registry

registry = Registry()


@registry.resource
def cache() -> redis.Redis:
    return redis.from_url(os.environ["REDIS_URL"])


async def main() -> None:
    async with registry.lifespan():
        print(await cache.get().get("greeting"))


asyncio.run(main())
