"""``wait_closed()`` of a pool of aiopg waits for a connection that nobody gives back."""

import asyncio
import os

import aiopg


async def main() -> None:
    pool = await aiopg.create_pool(os.environ["DATABASE_URL"], minsize=1)
    connection = await pool.acquire()
    print(connection.closed)
    pool.close()
    async with asyncio.timeout(1):  # else it would never end
        await pool.wait_closed()


asyncio.run(main())
