"""Two event loops, and a pool of aiopg that belongs to one: the other is told so, every time."""

import asyncio
import os

import aiopg

from lifekit import Registry, WrongLoopError

registry = Registry()


@registry.resource
async def db() -> aiopg.Pool:
    return await aiopg.create_pool(os.environ["DATABASE_URL"], minsize=1)


async def query() -> None:
    async with db.get().acquire() as connection, connection.cursor() as cursor:
        await cursor.execute("SELECT pg_sleep(0.5)")
        print(await cursor.fetchone())


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
