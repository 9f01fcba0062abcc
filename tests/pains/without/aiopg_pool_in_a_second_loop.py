"""A pool of aiopg that one event loop opened, used in another."""

import asyncio
import os

import aiopg


async def query(pool: aiopg.Pool) -> None:
    async with pool.acquire() as connection, connection.cursor() as cursor:
        await cursor.execute("SELECT pg_sleep(0.5)")
        print(await cursor.fetchone())


async def opened() -> aiopg.Pool:
    pool = await aiopg.create_pool(os.environ["DATABASE_URL"], minsize=1)
    await query(pool)
    return pool


async def attempt(pool: aiopg.Pool) -> None:
    try:
        await query(pool)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")


first = asyncio.new_event_loop()
pool = first.run_until_complete(opened())
asyncio.run(attempt(pool))
first.close()
asyncio.run(attempt(pool))
