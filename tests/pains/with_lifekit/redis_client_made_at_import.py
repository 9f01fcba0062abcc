"""A redis client that is declared at import and made anew in each of three event loops."""

import asyncio
import os

import redis.asyncio as redis

from lifekit import Registry, WrongLoopError

registry = Registry()


@registry.resource
def cache() -> redis.Redis:
    return redis.from_url(os.environ["REDIS_URL"])


async def greet() -> None:
    print(await cache.get().get("greeting"))


async def main() -> None:
    async with registry.lifespan():
        await greet()
        try:
            await asyncio.to_thread(asyncio.run, greet())  # in an event loop of that thread's own
        except WrongLoopError as error:
            print(f"WrongLoopError: {error}")


for _ in range(3):
    asyncio.run(main())
