"""Each kind of value that hands out connections to PostgreSQL, told alike: one test is run over all.

Connections are in autocommit mode, so that BEGIN and COMMIT are text. What blocks runs in threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any

import aiopg
import asyncpg
import psycopg
import psycopg2.pool
import psycopg_pool
import sqlalchemy
from sqlalchemy.ext.asyncio import create_async_engine

Run = Callable[[str], Any]


class Pool:
    """One kind of value."""

    name: str
    keeps: bool = True
    """Whether it gives the same connection to the next who asks."""

    def make(self, url: str, most: int) -> Any:
        """Return what the application's factory would, or an awaitable of it."""
        raise NotImplementedError

    def acquire(self, value: Any) -> Any:
        """Return a context manager of the way to run SQL on a connection: rows come back."""
        raise NotImplementedError

    def connection(self, value: Any) -> Any:
        """Return a context manager of a connection as the driver has it."""
        raise NotImplementedError

    async def take(self, value: Any) -> Any:
        """Take a connection and never give it back."""
        raise NotImplementedError

    async def run(self, value: Any, sql: str) -> Any:
        """Run SQL on any connection."""
        async with self.acquire(value) as run:
            return await run(sql)

    async def value(self, value: Any, sql: str) -> Any:
        """Return the only value that a query gives."""
        ((found,),) = await self.run(value, sql)
        return found


class Asyncpg(Pool):
    name = "asyncpg"

    def make(self, url: str, most: int) -> Any:
        return asyncpg.create_pool(url, min_size=0, max_size=most)

    @asynccontextmanager
    async def acquire(self, value: Any) -> AsyncGenerator[Run]:
        async with value.acquire() as connection:

            async def run(sql: str) -> Any:
                if ";" in sql:
                    await connection.execute(sql)
                    return []
                return [tuple(row) for row in await connection.fetch(sql)]

            yield run

    def connection(self, value: Any) -> Any:
        return value.acquire()

    async def take(self, value: Any) -> Any:
        return await value.acquire()


class Aiopg(Pool):
    name = "aiopg"

    def make(self, url: str, most: int) -> Any:
        return aiopg.create_pool(url, minsize=0, maxsize=most)

    @asynccontextmanager
    async def acquire(self, value: Any) -> AsyncGenerator[Run]:
        async with value.acquire() as connection, connection.cursor() as cursor:

            async def run(sql: str) -> Any:
                await cursor.execute(sql)
                return await cursor.fetchall() if cursor.description else []

            yield run

    def connection(self, value: Any) -> Any:
        return value.acquire()

    async def take(self, value: Any) -> Any:
        return await value.acquire()


def _rows(cursor: Any) -> Any:
    while cursor.nextset():
        pass
    return cursor.fetchall() if cursor.description else []


class Psycopg(Pool):
    name = "psycopg"
    kind: Any = psycopg_pool.AsyncConnectionPool

    def make(self, url: str, most: int) -> Any:
        sizes = {"min_size": 0, "max_size": most}
        return self.kind(url, **sizes, open=False, kwargs={"autocommit": True})

    @asynccontextmanager
    async def acquire(self, value: Any) -> AsyncGenerator[Run]:
        async with value.connection() as connection:

            async def run(sql: str) -> Any:
                cursor = await connection.execute(sql)
                found = _rows(cursor)
                return await found if asyncio.iscoroutine(found) else found

            yield run

    def connection(self, value: Any) -> Any:
        return value.connection()

    async def take(self, value: Any) -> Any:
        return await value.getconn()


class PsycopgNull(Psycopg):
    name = "psycopg, no pooling"
    kind = psycopg_pool.AsyncNullConnectionPool
    keeps = False


class PsycopgSync(Pool):
    name = "psycopg, sync"

    def make(self, url: str, most: int) -> Any:
        return psycopg_pool.ConnectionPool(
            url, min_size=0, max_size=most, open=False, kwargs={"autocommit": True}
        )

    @asynccontextmanager
    async def acquire(self, value: Any) -> AsyncGenerator[Run]:
        manager: AbstractContextManager[Any] = value.connection()
        connection = await asyncio.to_thread(manager.__enter__)

        async def run(sql: str) -> Any:
            return await asyncio.to_thread(lambda: _rows(connection.execute(sql)))

        try:
            yield run
        finally:
            await asyncio.to_thread(manager.__exit__, None, None, None)

    @asynccontextmanager
    async def connection(self, value: Any) -> AsyncGenerator[Any]:
        connection = await asyncio.to_thread(value.getconn)
        yield connection
        await asyncio.to_thread(value.putconn, connection)

    async def take(self, value: Any) -> Any:
        return await asyncio.to_thread(value.getconn)


class PsycopgSyncNull(PsycopgSync):
    name = "psycopg, sync, no pooling"
    keeps = False

    def make(self, url: str, most: int) -> Any:
        return psycopg_pool.NullConnectionPool(
            url, min_size=0, max_size=most, open=False, kwargs={"autocommit": True}
        )


class Psycopg2(Pool):
    """psycopg2's own."""

    name = "psycopg2"

    def make(self, url: str, most: int) -> Any:
        return psycopg2.pool.ThreadedConnectionPool(0, 2 * most, url)  # where others wait, it fails

    @asynccontextmanager
    async def acquire(self, value: Any) -> AsyncGenerator[Run]:
        connection = await asyncio.to_thread(value.getconn)
        connection.autocommit = True

        def work(sql: str) -> Any:
            with connection.cursor() as cursor:
                cursor.execute(sql)
                return cursor.fetchall() if cursor.description else []

        async def run(sql: str) -> Any:
            return await asyncio.to_thread(work, sql)

        try:
            yield run
        finally:
            await asyncio.to_thread(value.putconn, connection)

    @asynccontextmanager
    async def connection(self, value: Any) -> AsyncGenerator[Any]:
        connection = await asyncio.to_thread(value.getconn)
        connection.autocommit = True
        yield connection
        await asyncio.to_thread(value.putconn, connection)

    async def take(self, value: Any) -> Any:
        return await asyncio.to_thread(value.getconn)


class Engine(Pool):
    """SQLAlchemy's sync engines."""

    def __init__(self, driver: str) -> None:
        self.name, self.driver = f"SQLAlchemy on {driver}", driver

    def make(self, url: str, most: int) -> Any:
        given = url.replace("postgresql://", f"postgresql+{self.driver}://")
        return sqlalchemy.create_engine(
            given, pool_size=most, max_overflow=0, isolation_level="AUTOCOMMIT"
        )

    @asynccontextmanager
    async def acquire(self, value: Any) -> AsyncGenerator[Run]:
        connection = await asyncio.to_thread(value.connect)

        def work(sql: str) -> Any:
            result = connection.exec_driver_sql(sql)
            return [tuple(row) for row in result] if result.returns_rows else []

        async def run(sql: str) -> Any:
            return await asyncio.to_thread(work, sql)

        try:
            yield run
        finally:
            await asyncio.to_thread(connection.close)

    @asynccontextmanager
    async def connection(self, value: Any) -> AsyncGenerator[Any]:
        fairy = await asyncio.to_thread(value.raw_connection)
        yield fairy.driver_connection
        await asyncio.to_thread(fairy.close)

    async def take(self, value: Any) -> Any:
        return await asyncio.to_thread(value.connect)


class AsyncEngine(Engine):
    """Its async ones."""

    def __init__(self, driver: str) -> None:
        super().__init__(driver)
        self.name = f"SQLAlchemy on {driver}, async"

    def make(self, url: str, most: int) -> Any:
        given = url.replace("postgresql://", f"postgresql+{self.driver}://")
        return create_async_engine(given, pool_size=most, max_overflow=0, isolation_level="AUTOCOMMIT")

    @asynccontextmanager
    async def acquire(self, value: Any) -> AsyncGenerator[Run]:
        async with value.connect() as connection:

            async def run(sql: str) -> Any:
                result = await connection.exec_driver_sql(sql)
                return [tuple(row) for row in result] if result.returns_rows else []

            yield run

    @asynccontextmanager
    async def connection(self, value: Any) -> AsyncGenerator[Any]:
        async with value.connect() as connection:
            raw = await connection.get_raw_connection()
            yield raw.driver_connection

    async def take(self, value: Any) -> Any:
        connection = value.connect()
        await connection.start()
        return connection


POOLS: list[Pool] = [
    *(Asyncpg(), Aiopg(), Psycopg(), PsycopgNull(), PsycopgSync(), PsycopgSyncNull(), Psycopg2()),
    *(AsyncEngine("asyncpg"), AsyncEngine("psycopg")),
    *(Engine("psycopg2"), Engine("psycopg"), Engine("pg8000")),
]


def sqlstate(error: BaseException) -> str | None:
    """Return the code that PostgreSQL gave an error."""
    seen: BaseException | None = error
    while seen is not None:
        for each in (seen, getattr(seen, "orig", None)):
            found = getattr(each, "sqlstate", None) or getattr(each, "pgcode", None)
            if found:
                return str(found)
            if each is not None and each.args and isinstance(each.args[0], dict):  # pg8000's
                return str(each.args[0].get("C"))
        seen = seen.__cause__
    return None


__all__ = ["POOLS", "Pool", "psycopg", "sqlstate"]
