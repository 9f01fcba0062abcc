"""Two event loops, and a pool of asyncpg that belongs to one: the other is told so, every time."""

import asyncio
import os

import asyncpg

from lifekit import Registry, WrongLoopError

registry = Registry()


@registry.resource
def db() -> asyncpg.Pool:
    return asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1, max_size=1)


async def query() -> None:
    print(await db.get().fetchval("SELECT 1"))


async def another() -> None:
    for _ in range(2):
        try:
            await query()
        except WrongLoopError as error:
            print(f"WrongLoopError: {error}")
    async with registry.lifespan():  # a pool of its own
        await query()


with asyncio.Runner() as first:
    lifespan = registry.lifespan()
    first.run(lifespan.__aenter__())
    asyncio.run(another())
    first.run(query())
    first.run(lifespan.__aexit__(None, None, None))
