"""One way to talk to PostgreSQL for each client, so that one test is run over all of them.

All of them run SQL as text, BEGIN and COMMIT included, in the way of their own. Those that block are
used in threads.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiopg
import asyncpg
import psycopg
import psycopg2

from lifekit._sandbox.postgres.gateway import Gateway, Server
from lifekit._sandbox.postgres.place import Place


class Connection(ABC):
    """A connection of some client, in autocommit mode."""

    def __init__(self, real: Any) -> None:
        self.real = real
        """As the client has it."""

    @classmethod
    @abstractmethod
    async def open(cls, url: str) -> Connection:
        """Connect."""

    @abstractmethod
    async def run(self, sql: str) -> list[tuple[Any, ...]]:
        """Run one statement, or several; return the rows of the last."""

    @abstractmethod
    async def close(self) -> None:
        """Close it as the client does."""

    async def value(self, sql: str) -> Any:
        """Return the only value that a query gives."""
        ((value,),) = await self.run(sql)
        return value


class Asyncpg(Connection):
    """asyncpg, whose queries with rows go by the extended protocol."""

    @classmethod
    async def open(cls, url: str) -> Connection:
        return cls(await asyncpg.connect(url))

    async def run(self, sql: str) -> list[tuple[Any, ...]]:
        if ";" in sql:
            await self.real.execute(sql)
            return []
        return [tuple(row) for row in await self.real.fetch(sql)]

    async def close(self) -> None:
        await self.real.close()


class Aiopg(Connection):
    """aiopg, on psycopg2's asynchronous connections."""

    @classmethod
    async def open(cls, url: str) -> Connection:
        return cls(await aiopg.connect(url))

    async def run(self, sql: str) -> list[tuple[Any, ...]]:
        cursor = await self.real.cursor()
        try:
            await cursor.execute(sql)
            return await cursor.fetchall() if cursor.description else []
        finally:
            cursor.close()

    async def close(self) -> None:
        await self.real.close()


class Psycopg(Connection):
    """psycopg 3's asynchronous connections."""

    prepares: int | None = 0  # each statement, at once

    @classmethod
    async def open(cls, url: str) -> Connection:
        real = await psycopg.AsyncConnection.connect(
            url, autocommit=True, prepare_threshold=cls.prepares
        )
        return cls(real)

    async def run(self, sql: str) -> list[tuple[Any, ...]]:
        prepare = None if ";" not in sql else False
        cursor = await self.real.execute(sql, prepare=prepare)
        while cursor.nextset():
            pass
        return await cursor.fetchall() if cursor.description else []

    async def close(self) -> None:
        await self.real.close()


class PsycopgUnprepared(Psycopg):
    """The same, with simple queries alone."""

    prepares = None


class Psycopg2(Connection):
    """psycopg2, in threads."""

    @classmethod
    async def open(cls, url: str) -> Connection:
        real = await asyncio.to_thread(psycopg2.connect, url)
        real.autocommit = True
        return cls(real)

    def _run(self, sql: str) -> list[tuple[Any, ...]]:
        with self.real.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []

    async def run(self, sql: str) -> list[tuple[Any, ...]]:
        return await asyncio.to_thread(self._run, sql)

    async def close(self) -> None:
        await asyncio.to_thread(self.real.close)


CLIENTS: list[type[Connection]] = [Asyncpg, Aiopg, Psycopg, PsycopgUnprepared, Psycopg2]


def through(url: str, gateway: Gateway) -> str:
    """Return the URL by which a client reaches the server of a URL through a gateway."""
    parts = urlsplit(url)
    folder = gateway.folder(Server(parts.hostname or "", parts.port or 0))
    userinfo = parts.netloc.rpartition("@")[0]
    return f"postgresql://{userinfo}@/{parts.path.lstrip('/')}?host={folder}&port=5432"


@asynccontextmanager
async def running_gateway(*, in_thread: bool = False) -> AsyncGenerator[Gateway]:
    """A gateway, in this loop or in a thread."""
    place = Place()
    if in_thread:
        place.move_into_thread()
    gateway = Gateway(place)
    try:
        yield gateway
    finally:
        gateway.close()


@asynccontextmanager
async def block(gateway: Gateway) -> AsyncGenerator[None]:
    """Undo at the end what was done inside."""
    await gateway.begin()
    try:
        yield
    finally:
        at_once = gateway.end_at_once()
        wrong = await gateway.end() if at_once is None else at_once
    if wrong:
        raise RuntimeError("; ".join(wrong))
