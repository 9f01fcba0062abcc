"""A connection that nobody gives back: the closing has a deadline, and says who has it."""

import asyncio
import os

import asyncpg

from lifekit import Registry

registry = Registry(close_timeout=0.5)


@registry.resource
def db() -> asyncpg.Pool:
    return asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1)


async def main() -> None:
    async with registry.lifespan():
        connection = await db.get().acquire()
        print(await connection.fetchval("SELECT 1"))


asyncio.run(main())
