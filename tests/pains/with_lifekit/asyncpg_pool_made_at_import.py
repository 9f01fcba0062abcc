"""A pool of asyncpg made at import, and handed to a registry: refused, with its line."""

import asyncio
import os

import asyncpg

from lifekit import Registry

registry = Registry()
asyncio.set_event_loop(asyncio.new_event_loop())  # as Python does by itself before 3.14
pool = asyncpg.create_pool(os.environ["DATABASE_URL"])


@registry.resource
def db() -> asyncpg.Pool:
    return pool


async def main() -> None:
    async with registry.lifespan():
        print(await db.get().fetchval("SELECT 1"))


asyncio.run(main())
