"""What PostgreSQL's gateway costs in a block, beside the bare driver, and beside the usual recipe."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import asyncpg

from lifekit import Registry, embedded
from lifekit.testing import sandboxing

from .measure import Row, Take, interleave, on, paired_ratio

SELECT = "SELECT 1"
QUERY = "SELECT body FROM notes WHERE id = $1"
INSERT = "INSERT INTO notes (body) VALUES ($1)"
ROWS = "SELECT id, body FROM rows"
TABLES = """
CREATE TABLE notes (id serial PRIMARY KEY, body text);
CREATE TABLE rows AS SELECT id, 'body ' || id AS body FROM generate_series(1, 5000) AS id;
"""


async def seconds(times: int, act: Callable[[], Awaitable[object]]) -> float:
    """Return the seconds of one *act* of so many."""
    began = perf_counter()
    for _ in range(times):
        await act()
    return (perf_counter() - began) / times


@dataclass
class Two:
    """A connection past the gateway, and one by it; what acquiring costs is the pools' own."""

    lifespan: Any
    floor: Any
    ours: Any


@asynccontextmanager
async def two() -> AsyncGenerator[Two]:
    """Open both."""
    registry = Registry("notes")
    async with embedded.postgres() as server:

        @registry.resource
        def db() -> asyncpg.Pool[Any]:
            return asyncpg.create_pool(server.url, min_size=1)

        async with asyncpg.create_pool(server.url) as bare:  # before all connections go by the gateway
            await bare.execute(TABLES)
            with sandboxing():
                async with (
                    registry.lifespan() as lifespan,
                    bare.acquire() as floor,
                    lifespan[db].acquire() as ours,
                ):
                    yield Two(lifespan, floor, ours)


async def _test(connection: Any, statement: str, *values: object) -> None:
    await connection.execute("BEGIN")
    await connection.fetch(statement, *values)
    await connection.execute("ROLLBACK")


async def _sandboxed_test(both: Two, statement: str, *values: object) -> None:
    async with both.lifespan.sandbox():
        await both.ours.fetch(statement, *values)


async def _transaction(connection: Any) -> None:
    async with connection.transaction():
        await connection.execute(INSERT, "first")
        await connection.fetch(QUERY, 1)


def _row(key: str, what: str, most: float, costs: Sequence[list[float]]) -> Row:
    floor, ours = costs
    ratio = paired_ratio(floor, ours)
    return Row(what, min(floor), min(ours), ratio, "us", most=most, key=f"sandbox/{key}")


def in_memory(*, rounds: int = 100, times: int = 20) -> list[Row]:
    """Compare asyncpg joined to the gateway in memory, in one loop, with asyncpg by itself."""

    async def measured() -> list[Row]:
        async with two() as both:
            turns = partial(interleave, rounds)

            def each(count: int, act: Callable[..., Awaitable[object]], *given: object) -> Take:
                return partial(seconds, count, partial(act, *given))

            tests = await turns(
                each(times, _test, both.floor, SELECT), each(times, _sandboxed_test, both, SELECT)
            )
            inserts = await turns(
                each(times, _test, both.floor, INSERT, "kept"),
                each(times, _sandboxed_test, both, INSERT, "kept"),
            )
            async with both.lifespan.sandbox():
                async with both.floor.transaction(), both.ours.transaction():
                    statements = await turns(
                        each(5 * times, both.floor.fetchval, QUERY, 1),
                        each(5 * times, both.ours.fetchval, QUERY, 1),
                    )
                transactions = await turns(
                    each(times, _transaction, both.floor), each(times, _transaction, both.ours)
                )
                rows = await turns(each(1, both.floor.fetch, ROWS), each(1, both.ours.fetch, ROWS))
        return [
            _row("query", "a test of SELECT 1: BEGIN, query, ROLLBACK (asyncpg, memory)", 1.25, tests),
            _row("insert", "a test with an insert: the same", 1.3, inserts),
            _row("statement", "a statement in a transaction: asyncpg by itself", 1.4, statements),
            _row("transaction", "a transaction of two statements: the same", 1.1, transactions),
            _row("rows", "5,000 rows: the same", 2.3, rows),
        ]

    return on("asyncio", measured)


def in_a_thread(*, rounds: int = 60, times: int = 10) -> list[Row]:
    """Compare a sync SQLAlchemy engine on psycopg2, the gateway in a thread, with the usual recipe."""
    from sqlalchemy import Engine, create_engine, select, text
    from sqlalchemy.orm import Session

    def use(session: Session) -> None:
        session.execute(text("INSERT INTO notes (body) VALUES ('kept')"))
        session.commit()
        session.scalar(select(1))

    def recipe(engine: Engine) -> None:
        with engine.connect() as connection:
            transaction = connection.begin()
            with Session(bind=connection, join_transaction_mode="create_savepoint") as session:
                use(session)
            transaction.rollback()

    async def measured() -> list[Row]:
        registry = Registry("notes")
        async with embedded.postgres() as server:
            url = server.url.replace("postgresql://", "postgresql+psycopg2://", 1)

            @registry.resource
            def engine() -> Engine:
                return create_engine(url)

            bare = create_engine(url)
            with bare.begin() as connection:
                connection.execute(text(TABLES))
            with sandboxing():
                async with registry.lifespan() as lifespan:

                    async def by_recipe() -> None:
                        recipe(bare)

                    async def in_a_block() -> None:
                        async with lifespan.sandbox():
                            with Session(lifespan[engine]) as session:
                                use(session)

                    takes = [partial(seconds, times, act) for act in (by_recipe, in_a_block)]
                    costs = await interleave(rounds, *takes)
            bare.dispose()
        what = "a test with a commit: SQLAlchemy's recipe (sync, psycopg2, thread)"
        return [_row("thread", what, 1.5, costs)]

    return on("asyncio", measured)


def gateway(*, rounds: int = 100, times: int = 20) -> list[Row]:
    """Compare at both places."""
    rows = in_memory(rounds=rounds, times=times)
    return rows + in_a_thread(rounds=max(rounds // 2, 1), times=max(times // 2, 1))
