"""A pool of psycopg for each event loop: the second is told, and closes none but its own."""

import asyncio
import os

from psycopg_pool import AsyncConnectionPool

from lifekit import Registry, WrongLoopError

registry = Registry()


@registry.resource
def db() -> AsyncConnectionPool:
    return AsyncConnectionPool(os.environ["DATABASE_URL"], min_size=1, open=False)


async def query() -> None:
    async with db.get().connection() as connection:
        print(await (await connection.execute("SELECT 1")).fetchone())


async def another() -> None:
    try:
        await query()
    except WrongLoopError as error:
        print(f"WrongLoopError: {error}")
    async with registry.lifespan():
        await query()


first, lifespan = asyncio.new_event_loop(), registry.lifespan()
first.run_until_complete(lifespan.__aenter__())
asyncio.run(another())
first.run_until_complete(lifespan.__aexit__(None, None, None))
first.close()
