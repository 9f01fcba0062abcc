"""A connection that nobody gives back: the closing has a deadline, and says who has it."""

import asyncio
import os

import aiopg

from lifekit import Registry

registry = Registry(close_timeout=0.5)


@registry.resource
async def db() -> aiopg.Pool:
    return await aiopg.create_pool(os.environ["DATABASE_URL"], minsize=1)


async def main() -> None:
    async with registry.lifespan():
        connection = await db.get().acquire()
        print(connection.closed)


asyncio.run(main())
