"""A hand-made rollback around a test: the connection goes back to aiopg's pool in a transaction."""

import asyncio
import os

import aiopg


async def test_insert(pool: aiopg.Pool) -> None:
    async with pool.acquire() as connection, connection.cursor() as cursor:
        await cursor.execute("BEGIN")  # and no COMMIT: the test is not to last
        await cursor.execute("CREATE TABLE links (slug text)")
        await cursor.execute("INSERT INTO links VALUES ('a')")


async def main() -> None:
    async with aiopg.create_pool(os.environ["DATABASE_URL"], minsize=1) as pool:
        await test_insert(pool)
        print(f"{pool.freesize} connections are left")


asyncio.run(main())
