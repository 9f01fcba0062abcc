"""A sandbox around a test: what it did is rolled back, and the pool keeps its connection."""

import asyncio
import os

import aiopg

from lifekit import Registry
from lifekit.testing import sandboxing

registry = Registry()


@registry.resource
async def db() -> aiopg.Pool:
    return await aiopg.create_pool(os.environ["DATABASE_URL"], minsize=1)


async def test_insert(pool: aiopg.Pool) -> None:
    async with pool.acquire() as connection, connection.cursor() as cursor:
        await cursor.execute("CREATE TABLE links (slug text)")
        await cursor.execute("INSERT INTO links VALUES ('a')")


async def main() -> None:
    with sandboxing():
        async with registry.lifespan() as lifespan:
            for _ in range(2):  # which works twice only if nothing lasts
                async with lifespan.sandbox():
                    await test_insert(lifespan[db])
            print(f"{lifespan[db].freesize} connections are left")


asyncio.run(main())
