"""Each kind of single connection to PostgreSQL, told alike: a resource's value, or what code makes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiopg
import asyncpg
import psycopg
import psycopg2
import sqlalchemy
from asyncpg import connect as bound_before
from pg8000 import dbapi  # type: ignore[import-untyped]
from sqlalchemy.engine import make_url


class Connection:
    """One kind of connection, whose statements commit by themselves."""

    name: str

    async def connect(self, url: str) -> Any:
        """Return what the application's factory would."""
        raise NotImplementedError

    async def run(self, connection: Any, sql: str) -> Any:
        """Run SQL, and return the first value."""
        raise NotImplementedError

    async def close(self, connection: Any) -> None:
        """Close it."""
        await connection.close()


class Asyncpg(Connection):
    name = "asyncpg"

    async def connect(self, url: str) -> Any:
        return await asyncpg.connect(url)

    async def run(self, connection: Any, sql: str) -> Any:
        return await connection.fetchval(sql)


class BoundBefore(Asyncpg):
    name = "asyncpg, its function imported before"

    async def connect(self, url: str) -> Any:
        return await bound_before(url)


class Psycopg(Connection):
    name = "psycopg"

    async def connect(self, url: str) -> Any:
        return await psycopg.AsyncConnection.connect(url, autocommit=True)

    async def run(self, connection: Any, sql: str) -> Any:
        cursor = await connection.execute(sql)
        row = await cursor.fetchone() if cursor.description else None
        return row and row[0]


class Aiopg(Connection):
    name = "aiopg"

    async def connect(self, url: str) -> Any:
        return await aiopg.connect(url)

    async def run(self, connection: Any, sql: str) -> Any:
        async with connection.cursor() as cursor:
            await cursor.execute(sql)
            row = await cursor.fetchone() if cursor.description else None
        return row and row[0]


class Blocking(Connection):
    """One that blocks, and so runs in threads: in those of `start`."""

    start: Any = staticmethod(asyncio.to_thread)

    def __init__(self, name: str, connect: Callable[[str], Any]) -> None:
        self.name, self._connect = name, connect

    async def connect(self, url: str) -> Any:
        def work() -> Any:
            connection = self._connect(url)
            connection.autocommit = True
            return connection

        return await self.start(work)

    async def run(self, connection: Any, sql: str) -> Any:
        def work() -> Any:
            cursor = connection.cursor()
            cursor.execute(sql)
            row = cursor.fetchone() if cursor.description else None
            cursor.close()
            return row and row[0]

        return await self.start(work)

    async def close(self, connection: Any) -> None:
        await self.start(connection.close)


class WithoutContext(Blocking):
    """The same in threads of an executor, which hands no context on."""

    async def start(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, work)


def by_pg8000(url: str) -> Any:
    """Connect."""
    given = make_url(url)
    named: Any = {"host": given.host, "port": given.port, "database": given.database}
    package: Any = dbapi
    return package.connect(given.username, password=given.password, **named)


def by_engine(url: str) -> Any:
    """Connect by an engine of which lifekit does not know."""
    given = url.replace("postgresql:", "postgresql+psycopg2:")
    commits: Any = {"isolation_level": "AUTOCOMMIT", "poolclass": sqlalchemy.NullPool}
    return sqlalchemy.create_engine(given, **commits).raw_connection()


VALUES: list[Connection] = [
    *(Asyncpg(), Psycopg(), Aiopg()),
    *(Blocking("psycopg, sync", psycopg.connect), Blocking("psycopg2", psycopg2.connect)),
]
"""What a resource may be."""
OWN: list[Connection] = [
    *VALUES,
    BoundBefore(),
    Blocking("pg8000", by_pg8000),
    Blocking("SQLAlchemy's raw connections", by_engine),
    WithoutContext("psycopg2, in an executor", psycopg2.connect),
    WithoutContext("psycopg, in an executor", psycopg.connect),
]
"""What code may connect by itself."""
