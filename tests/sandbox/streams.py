"""How each driver copies rows in and out, and reads with a cursor of the server's.

None of it where the driver has no such thing.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from typing import Any

import asyncpg
import psycopg
import psycopg2.extensions

IN = "COPY rows (n) FROM STDIN"
OUT = "COPY (SELECT n FROM rows ORDER BY n) TO STDOUT"


class Asyncpg:
    """asyncpg."""

    async def copy_in(self, connection: Any, lines: bytes) -> None:
        await connection.copy_to_table("rows", columns=["n"], source=io.BytesIO(lines))

    async def copy_out(self, connection: Any) -> bytes:
        taken = io.BytesIO()
        await connection.copy_from_query("SELECT n FROM rows ORDER BY n", output=taken)
        return taken.getvalue()

    async def some(self, connection: Any, sql: str, count: int) -> list[Any]:
        async with connection.transaction():
            cursor = await connection.cursor(sql)
            return [row[0] for row in await cursor.fetch(count)]


class Psycopg:
    """psycopg's asynchronous connections."""

    async def copy_in(self, connection: Any, lines: bytes) -> None:
        async with connection.cursor().copy(IN) as copy:
            await copy.write(lines)

    async def copy_out(self, connection: Any) -> bytes:
        async with connection.cursor().copy(OUT) as copy:
            return b"".join([bytes(each) async for each in copy])

    async def some(self, connection: Any, sql: str, count: int) -> list[Any]:
        async with connection.transaction(), connection.cursor("named") as cursor:
            await cursor.execute(sql)
            return [row[0] for row in await cursor.fetchmany(count)]


class Blocking:
    """Drivers that block, in threads."""

    async def copy_in(self, connection: Any, lines: bytes) -> None:
        await asyncio.to_thread(self._copy_in, connection, lines)

    async def copy_out(self, connection: Any) -> bytes:
        return await asyncio.to_thread(self._copy_out, connection)

    async def some(self, connection: Any, sql: str, count: int) -> list[Any]:
        return await asyncio.to_thread(self._some, connection, sql, count)

    def _copy_in(self, connection: Any, lines: bytes) -> None:
        with connection.cursor().copy(IN) as copy:
            copy.write(lines)

    def _copy_out(self, connection: Any) -> bytes:
        with connection.cursor().copy(OUT) as copy:
            return b"".join(map(bytes, copy))

    def _some(self, connection: Any, sql: str, count: int) -> list[Any]:
        with connection.transaction(), connection.cursor("named") as cursor:
            cursor.execute(sql)
            return [row[0] for row in cursor.fetchmany(count)]


class Psycopg2(Blocking):
    """psycopg2."""

    def _copy_in(self, connection: Any, lines: bytes) -> None:
        with connection.cursor() as cursor:
            cursor.copy_expert(IN, io.BytesIO(lines))

    def _copy_out(self, connection: Any) -> bytes:
        taken = io.BytesIO()
        with connection.cursor() as cursor:
            cursor.copy_expert(OUT, taken)
        return taken.getvalue()

    def _some(self, connection: Any, sql: str, count: int) -> list[Any]:
        with connection.cursor("named", withhold=True) as cursor:
            cursor.execute(sql)
            return [row[0] for row in cursor.fetchmany(count)]


def stream_of(connection: Any) -> Asyncpg | Psycopg | Blocking | None:
    """Return how the driver of a connection does it."""
    kinds: list[tuple[Any, Callable[[], Any]]] = [
        (asyncpg.Connection, Asyncpg),
        (psycopg.AsyncConnection, Psycopg),
        (psycopg.Connection, Blocking),
        (psycopg2.extensions.connection, Psycopg2),
    ]
    return next((make() for kind, make in kinds if isinstance(connection, kind)), None)
