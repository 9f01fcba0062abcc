"""A pool of asyncpg made at import, and handed to a registry: refused, with its line."""

import asyncio
import os

import asyncpg

from lifekit import Registry

registry = Registry()
pool = asyncpg.create_pool(os.environ["DATABASE_URL"])


@registry.resource
def db() -> asyncpg.Pool:
    return pool


async def main() -> None:
    async with registry.lifespan():
        print(await db.get().fetchval("SELECT 1"))


asyncio.run(main())
