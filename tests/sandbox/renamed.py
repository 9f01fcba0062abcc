"""A write in a sandbox, with a driver whose next release may have other insides.

python -m tests.sandbox.renamed CLIENT URL

It says "worked" or "refused", and "ESCAPED" where a row got out.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg2

from lifekit import Registry
from lifekit.testing import sandboxing

ADD = "INSERT INTO renamed VALUES (1)"


async def _asyncpg(url: str) -> Any:
    import asyncpg

    return await asyncpg.create_pool(url, min_size=1, max_size=2)


async def _aiopg(url: str) -> Any:
    import aiopg

    return await aiopg.create_pool(url, minsize=1, maxsize=2)


async def _psycopg(url: str) -> Any:
    import psycopg_pool

    return psycopg_pool.AsyncConnectionPool(url, min_size=1, max_size=2, open=False)


async def _sqlalchemy(url: str) -> Any:
    from sqlalchemy.ext.asyncio import create_async_engine

    return create_async_engine(url.replace("postgresql:", "postgresql+psycopg:"))


async def _add_by_asyncpg(pool: Any) -> None:
    await pool.execute(ADD)


async def _add_by_aiopg(pool: Any) -> None:
    async with pool.acquire() as connection, connection.cursor() as cursor:
        await cursor.execute(ADD)


async def _add_by_psycopg(pool: Any) -> None:
    async with pool.connection() as connection:
        await connection.execute(ADD)


async def _add_by_sqlalchemy(engine: Any) -> None:
    async with engine.begin() as connection:
        await connection.exec_driver_sql(ADD)


CLIENTS: dict[str, tuple[Callable[[str], Awaitable[Any]], Callable[[Any], Awaitable[None]]]] = {
    "asyncpg": (_asyncpg, _add_by_asyncpg),
    "aiopg": (_aiopg, _add_by_aiopg),
    "psycopg_pool": (_psycopg, _add_by_psycopg),
    "sqlalchemy": (_sqlalchemy, _add_by_sqlalchemy),
}


async def write(client: str, url: str, look: Callable[[], None]) -> None:
    """Write in two blocks; *look* is called whenever a row may have got out."""
    make, add = CLIENTS[client]
    registry = Registry("renamed", start_timeout=20, close_timeout=5)

    async def pool() -> Any:
        return await make(url)

    handle = registry.resource(pool)
    with sandboxing():
        lifespan = registry.lifespan()
        await lifespan.__aenter__()
    try:
        for _ in range(2):
            async with lifespan.sandbox():
                await asyncio.wait_for(add(lifespan[handle]), 20)
                look()
            look()
    finally:
        await lifespan.__aexit__(None, None, None)


def main() -> None:
    """Write, and say how that went."""
    client, url = sys.argv[1:]
    past = psycopg2.connect(url)
    past.autocommit = True

    def look() -> None:
        with past.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM renamed")
            if cursor.fetchall() != [(0,)]:
                print("ESCAPED", flush=True)

    try:
        asyncio.run(write(client, url, look))
        print("worked")
    except BaseException as error:
        print("refused:", repr(error)[:200])
    look()


if __name__ == "__main__":
    main()
