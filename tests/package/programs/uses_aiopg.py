"""A pool of aiopg's, in a sandbox and outside of it."""

import asyncio
import sys
from typing import Any

import aiopg

from lifekit import Registry, testing

registry = Registry("aiopg")


@registry.resource
def db() -> Any:
    """The pool."""
    return aiopg.create_pool(sys.argv[1])


async def value(pool: Any, query: str) -> object:
    """Return what the query gives."""
    async with pool.acquire() as connection, connection.cursor() as cursor:
        await cursor.execute(query)
        return (await cursor.fetchone())[0]


async def main() -> None:
    """Write, and see that it is undone and the pool closed."""
    with testing.sandboxing():
        async with registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                await value(lifespan[db], "CREATE TABLE packaged AS SELECT 5 AS number; SELECT 1")
                print(await value(lifespan[db], "SELECT number FROM packaged"))
            pool = lifespan[db]
            print(await value(pool, "SELECT to_regclass('packaged')"))
    print("closed" if pool.closed else "open")


asyncio.run(main())
