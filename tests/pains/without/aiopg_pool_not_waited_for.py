"""A pool of aiopg that is closed without ``wait_closed()``, and a connection that nobody closes."""

import asyncio
import os

import aiopg


async def main() -> None:
    pool = await aiopg.create_pool(os.environ["DATABASE_URL"], minsize=3)
    connection = await aiopg.connect(os.environ["DATABASE_URL"])
    print(connection.closed)
    pool.close()


asyncio.run(main())
