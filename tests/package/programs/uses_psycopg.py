"""A pool of psycopg's, in a sandbox and outside of it."""

import asyncio
import sys
from typing import LiteralString

from psycopg_pool import AsyncConnectionPool

from lifekit import Registry, testing

registry = Registry("psycopg")


@registry.resource
def db() -> AsyncConnectionPool:
    """The pool."""
    return AsyncConnectionPool(sys.argv[1], open=False)


async def value(pool: AsyncConnectionPool, query: LiteralString) -> object:
    """Return what the query gives."""
    async with pool.connection() as connection:
        row = await (await connection.execute(query)).fetchone()
        return row and row[0]


async def main() -> None:
    """Write, and see that it is undone and the pool closed."""
    with testing.sandboxing():
        async with registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                async with lifespan[db].connection() as connection:
                    await connection.execute("CREATE TABLE packaged AS SELECT 5 AS number")
                print(await value(lifespan[db], "SELECT number FROM packaged"))
            pool = lifespan[db]
            print(await value(pool, "SELECT to_regclass('packaged')"))
    print("closed" if pool.closed else "open")


asyncio.run(main())
