"""A client of redis-py's, in a sandbox and outside of it."""

import asyncio
import sys
from typing import Any

import redis.asyncio as redis

from lifekit import Registry, testing

registry = Registry("redis")


@registry.resource
def cache() -> redis.Redis:
    """The client."""
    return redis.from_url(sys.argv[1], decode_responses=True)


async def main() -> None:
    """Write, and see that it is undone and the client closed."""
    with testing.sandboxing():
        async with registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                await lifespan[cache].set("packaged", 5)
                print(await lifespan[cache].get("packaged"))
            client = lifespan[cache]
            print(await client.get("packaged"))
    pool: Any = client.connection_pool
    print([connection.is_connected for connection in pool._available_connections])


asyncio.run(main())
