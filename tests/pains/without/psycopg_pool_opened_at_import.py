"""A pool of psycopg made at import, which opens by itself."""

import asyncio
import os

from psycopg_pool import AsyncConnectionPool

pool = AsyncConnectionPool(os.environ["DATABASE_URL"])


async def main() -> None:
    async with pool.connection() as connection:
        print(await (await connection.execute("SELECT 1")).fetchone())


asyncio.run(main())
