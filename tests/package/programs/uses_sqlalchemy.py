"""An engine of SQLAlchemy's on asyncpg, in a sandbox and outside of it."""

import asyncio
import sys

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from lifekit import Registry, testing

registry = Registry("sqlalchemy")


@registry.resource
def engine() -> AsyncEngine:
    """The engine."""
    return create_async_engine(sys.argv[1].replace("postgresql:", "postgresql+asyncpg:", 1))


async def main() -> None:
    """Write, and see that it is undone and the engine disposed."""
    with testing.sandboxing():
        async with registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                async with lifespan[engine].begin() as connection:
                    await connection.execute(text("CREATE TABLE packaged AS SELECT 5 AS number"))
                async with lifespan[engine].connect() as connection:
                    print(await connection.scalar(text("SELECT number FROM packaged")))
            used = lifespan[engine]
            async with used.connect() as connection:
                print(await connection.scalar(text("SELECT to_regclass('packaged')")))
    print("open" if used.sync_engine.pool.checkedin() else "closed")  # type: ignore[attr-defined]


asyncio.run(main())
