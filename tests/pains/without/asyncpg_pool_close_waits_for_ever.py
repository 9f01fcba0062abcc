"""``close()`` of a pool of asyncpg waits for a connection that nobody gives back."""

import asyncio
import os

import asyncpg


async def main() -> None:
    pool = await asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1)
    connection = await pool.acquire()
    print(await connection.fetchval("SELECT 1"))
    async with asyncio.timeout(61):  # else it would never end
        await pool.close()


asyncio.run(main())
