"""A pool of psycopg that one event loop opened works in another, until it is closed there."""

import asyncio
import os

from psycopg_pool import AsyncConnectionPool


async def query() -> None:
    async with pools[0].connection() as connection:
        print(await (await connection.execute("SELECT 1")).fetchone())


async def main() -> None:
    pools.append(AsyncConnectionPool(os.environ["DATABASE_URL"], min_size=1, open=False))
    await pools[0].open(wait=True)
    await query()


async def another() -> None:
    await query()
    try:
        await pools[0].close()
    except RuntimeError as error:
        print(f"RuntimeError: {error}")


pools: list[AsyncConnectionPool] = []
first = asyncio.new_event_loop()
first.run_until_complete(main())
first.close()
asyncio.run(another())
