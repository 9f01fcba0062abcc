"""A pool of psycopg that is declared at import, and opens where there is an event loop."""

import asyncio
import os

from psycopg_pool import AsyncConnectionPool

from lifekit import Registry

registry = Registry()


@registry.resource
def db() -> AsyncConnectionPool:
    return AsyncConnectionPool(os.environ["DATABASE_URL"], open=False)


async def main() -> None:
    async with registry.lifespan(), db.get().connection() as connection:
        print(await (await connection.execute("SELECT 1")).fetchone())


asyncio.run(main())
