"""A pool of asyncpg that one event loop opened, used in another: each use fails in its own way."""

import asyncio
import os
import traceback

import asyncpg


async def query(pool: asyncpg.Pool) -> None:
    async with asyncio.timeout(1):  # else the second query would never end
        print(await pool.fetchval("SELECT 1"))


async def opened() -> asyncpg.Pool:
    pool = await asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1, max_size=1)
    await query(pool)
    return pool


async def another(pool: asyncpg.Pool) -> None:
    for attempt in (query, query, asyncpg.Pool.close):
        try:
            await attempt(pool)
        except Exception:
            traceback.print_exc()


asyncio.run(another(asyncio.run(opened())))
