"""A program that cancels statements in a block, in every way that libpq's clients have.

python -m tests.sandbox.cancelling URL

It is a process of its own: where libpq waits for a gateway in the same one, nothing runs any more.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import psycopg
import psycopg2
import psycopg_pool
import sqlalchemy
from psycopg2.extras import DictConnection

from lifekit import Registry
from lifekit.testing import sandboxing

from .past import Past, connected

SLEEP = "SELECT pg_sleep(600)"
ASLEEP = "SELECT count(*) = 1 FROM pg_stat_activity WHERE query = %s AND state = 'active'"


def of_a_class(url: str) -> Any:
    return psycopg2.connect(url, connection_factory=DictConnection)


def of_a_function(url: str) -> Any:
    def made(dsn: str, **given: Any) -> Any:
        return DictConnection(dsn, **given)

    return psycopg2.connect(url, connection_factory=made)


def of_a_pool(url: str) -> Any:
    return psycopg_pool.ConnectionPool(url, min_size=1, open=True).getconn()


def of_an_engine(url: str) -> Any:
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg2:"))
    made: Any = engine.raw_connection()
    return made.driver_connection


WAYS: list[Callable[[str], Any]] = [
    *(psycopg2.connect, of_a_class, of_a_function, of_an_engine),
    *(psycopg.connect, of_a_pool),
]


def sleeps(connection: Any) -> str:
    """Return the SQLSTATE by which the statement ended."""
    try:
        with connection.cursor() as cursor:
            cursor.execute(SLEEP)
    except (psycopg.Error, psycopg2.Error) as error:
        return str(getattr(error, "sqlstate", None) or getattr(error, "pgcode", None))
    return "none"


async def cancels(connection: Any, cancel: Callable[[], object], past: Past) -> None:
    """Cancel what it does, then use it."""
    asleep = asyncio.create_task(asyncio.to_thread(sleeps, connection))
    while not past.ask(ASLEEP, SLEEP):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    await asyncio.to_thread(cancel)
    assert await asleep == "57014"
    await asyncio.to_thread(connection.rollback)
    with connection.cursor() as cursor:
        await asyncio.to_thread(cursor.execute, "SELECT 7")
        assert cursor.fetchone()[0] == 7
    await asyncio.to_thread(connection.rollback)


async def main(past: Past) -> None:
    """Do so, and say by which ways."""
    with sandboxing():
        async with Registry("cancelling").lifespan() as lifespan, lifespan.sandbox():
            for way in WAYS:
                connection = await asyncio.to_thread(way, past.url)
                await cancels(connection, connection.cancel, past)
                print(way.__name__)
                if (safely := getattr(connection, "cancel_safe", None)) is not None:
                    await cancels(connection, safely, past)
                await asyncio.to_thread(connection.close)


if __name__ == "__main__":
    with connected(sys.argv[1], Past) as past:
        asyncio.run(main(past))
