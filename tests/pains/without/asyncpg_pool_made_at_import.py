"""A pool of asyncpg made at import, which nobody awaited."""

import asyncio
import os

import asyncpg

asyncio.set_event_loop(asyncio.new_event_loop())  # as Python does by itself before 3.14
pool = asyncpg.create_pool(os.environ["DATABASE_URL"])


async def main() -> None:
    print(await pool.fetchval("SELECT 1"))


asyncio.run(main())
