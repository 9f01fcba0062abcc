"""An engine of SQLAlchemy for each event loop, disposed of in that loop."""

import asyncio
import os

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from lifekit import Registry

url = os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+asyncpg:")
registry = Registry()


@registry.resource
def engine() -> AsyncEngine:
    return create_async_engine(url)


async def main() -> None:
    async with registry.lifespan(), engine.get().connect() as connection:
        print(await connection.scalar(text("SELECT 1")))


for _ in range(4):
    asyncio.run(main())
