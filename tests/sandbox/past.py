"""A way to the database past the sandbox, to see what lasts."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import anyio
import psycopg2


class Past:
    """A connection that goes past the sandbox."""

    def __init__(self, url: str, connection: Any) -> None:
        self.url, self._connection = url, connection

    def ask(self, sql: str, *values: object) -> Any:
        """Return the first value that a query gives."""
        with self._connection.cursor() as cursor:
            cursor.execute(sql, values or None)
            return cursor.fetchone()[0] if cursor.description else None

    async def until(self, sql: str) -> None:
        """Wait until a query gives true."""
        with anyio.fail_after(60):
            while not self.ask(sql):  # noqa: ASYNC110
                await anyio.sleep(0.005)


P = TypeVar("P", bound=Past)


@contextmanager
def database(server: str, name: str, kind: type[P]) -> Generator[P]:
    """Make a database of that name anew, at the server of that URL."""
    with closing(psycopg2.connect(server)) as admin:
        admin.autocommit = True
        with admin.cursor() as cursor:
            cursor.execute(f"DROP DATABASE IF EXISTS {name}")
            cursor.execute(f"CREATE DATABASE {name}")
    with connected(f"{server.rpartition('/')[0]}/{name}", kind) as past:
        yield past


@contextmanager
def connected(url: str, kind: type[P]) -> Generator[P]:
    """Connect to the database of that URL."""
    with closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        yield kind(url, connection)
