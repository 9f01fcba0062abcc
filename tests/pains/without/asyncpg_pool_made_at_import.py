"""A pool of asyncpg made at import, which nobody awaited."""

import asyncio
import os

import asyncpg

pool = asyncpg.create_pool(os.environ["DATABASE_URL"])


async def main() -> None:
    print(await pool.fetchval("SELECT 1"))


asyncio.run(main())
