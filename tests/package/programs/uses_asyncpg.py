"""A pool of asyncpg's, in a sandbox and outside of it."""

import asyncio
import sys

import asyncpg

from lifekit import Registry, testing

registry = Registry("asyncpg")


@registry.resource
def db() -> "asyncpg.Pool[asyncpg.Record]":
    """The pool."""
    return asyncpg.create_pool(sys.argv[1])


async def main() -> None:
    """Write, and see that it is undone and the pool closed."""
    with testing.sandboxing():
        async with registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                await lifespan[db].execute("CREATE TABLE packaged AS SELECT 5 AS number")
                print(await lifespan[db].fetchval("SELECT number FROM packaged"))
            pool = lifespan[db]
            print(await pool.fetchval("SELECT to_regclass('packaged')"))
    print("closed" if pool.is_closing() else "open")


asyncio.run(main())
