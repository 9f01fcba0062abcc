"""Whether what is sent once is run once: rows and sequences, of one run in a sandbox and past it.

python -m tests.sandbox.executions [--runs 1000] [--seed 1]
"""

from __future__ import annotations

import asyncio
import random
from argparse import ArgumentParser
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

import asyncpg
import psycopg_pool
import sqlalchemy
from sqlalchemy.ext.asyncio import create_async_engine

from lifekit import Registry, embedded
from lifekit.testing import sandboxing

SCHEMA = """
CREATE TABLE counted (id bigserial PRIMARY KEY, n int CHECK (n > 0), run bigint);
CREATE SEQUENCE runs;
ALTER TABLE counted ALTER COLUMN run SET DEFAULT nextval('runs');
"""
STATE = """SELECT (SELECT last_value || ' ' || is_called FROM counted_id_seq),
    (SELECT last_value || ' ' || is_called FROM runs),
    (SELECT array_agg((id, n, run)::text ORDER BY id) FROM counted)"""
"""How often each row was tried, not only what stayed: a sequence takes no value back."""
CLEAN = "TRUNCATE counted RESTART IDENTITY; ALTER SEQUENCE runs RESTART"
INSERT = "INSERT INTO counted (n) VALUES "

COUNTED = sqlalchemy.Table(
    "counted",
    sqlalchemy.MetaData(),
    sqlalchemy.Column("id", sqlalchemy.BigInteger, primary_key=True),
    sqlalchemy.Column("n", sqlalchemy.Integer),
)

Run = Callable[[Any, list[int], bool], Awaitable[Any]]


async def _asyncpg(pool: Any, values: list[int], in_transaction: bool) -> None:
    async with pool.acquire() as connection:
        rows = [(value,) for value in values]
        if not in_transaction:
            await connection.executemany(INSERT + "($1)", rows)
            return
        async with connection.transaction():
            await connection.executemany(INSERT + "($1)", rows)


async def _asyncpg_returning(pool: Any, values: list[int], in_transaction: bool) -> Any:
    async with pool.acquire() as connection:
        rows = [(value,) for value in values]
        return await connection.fetchmany(INSERT + "($1) RETURNING id", rows)


async def _psycopg(pool: Any, values: list[int], in_transaction: bool) -> Any:
    async with pool.connection() as connection:
        await connection.set_autocommit(not in_transaction)
        cursor = connection.cursor()
        rows = [(value,) for value in values]
        await cursor.executemany(INSERT + "(%s) RETURNING id", rows, returning=in_transaction)


async def _psycopg_pipeline(pool: Any, values: list[int], in_transaction: bool) -> Any:
    async with pool.connection() as connection, connection.pipeline():
        for value in values:
            await connection.execute(INSERT + "(%s)", [value], prepare=in_transaction)


async def _insertmany(engine: Any, values: list[int], in_transaction: bool) -> Any:
    statement = COUNTED.insert().returning(COUNTED.c.id, sort_by_parameter_order=in_transaction)
    async with engine.begin() as connection:
        options = {"insertmanyvalues_page_size": 3}
        rows = [{"n": value} for value in values]
        await connection.execute(statement, rows, execution_options=options)


async def _insertmany_sync(engine: Any, values: list[int], in_transaction: bool) -> Any:

    def work() -> None:
        with engine.begin() as connection:
            connection.execute(COUNTED.insert(), [{"n": value} for value in values])

    await asyncio.to_thread(work)


def _engine(url: str, driver: str) -> str:
    return url.replace("postgresql://", f"postgresql+{driver}://")


CLIENTS: dict[str, tuple[Callable[[str], Any], list[Run]]] = {
    "asyncpg": (
        lambda url: asyncpg.create_pool(url, min_size=0, max_size=2),
        [_asyncpg, _asyncpg_returning],
    ),
    "psycopg": (
        lambda url: psycopg_pool.AsyncConnectionPool(url, min_size=0, max_size=2, open=False),
        [_psycopg, _psycopg_pipeline],
    ),
    "engine on asyncpg": (lambda url: create_async_engine(_engine(url, "asyncpg")), [_insertmany]),
    "engine on psycopg": (lambda url: create_async_engine(_engine(url, "psycopg")), [_insertmany]),
    "engine on psycopg2": (
        lambda url: sqlalchemy.create_engine(_engine(url, "psycopg2")),
        [_insertmany_sync],
    ),
}


async def compare(server: embedded.Server, runs: int, seed: int) -> dict[str, list[str]]:
    """Run each client so often here and there; return how many of each there were, and what differs."""
    rng = random.Random(seed)
    base = server.url.rpartition("/")[0]
    admin = await asyncpg.connect(server.url)
    for name in ("counted_here", "counted_there"):
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.execute(f"CREATE DATABASE {name}")
    await admin.close()
    urls = [f"{base}/counted_here", f"{base}/counted_there"]
    registries = [Registry("production"), Registry("executions")]
    handles: list[dict[str, Any]] = [{}, {}]
    for registry, url, those in zip(registries, urls, handles, strict=True):
        for name, (make, _) in CLIENTS.items():
            those[name] = registry.resource(name=name.replace(" ", "_"))(partial(make, url))
    found: dict[str, list[str]] = {}
    async with AsyncExitStack() as stack:
        past = [await asyncpg.connect(url) for url in urls]
        for each in past:
            stack.push_async_callback(each.close)
            await each.execute(SCHEMA)
        with sandboxing():
            boxed = await stack.enter_async_context(registries[1].lifespan())
        free = await stack.enter_async_context(registries[0].lifespan())
        for number in range(runs):
            name = rng.choice(list(CLIENTS))
            run = rng.choice(CLIENTS[name][1])
            # What is long is sent in several pieces.
            values = [
                rng.randint(1, 9) for _ in range(rng.randint(1, 4000 if rng.random() < 0.1 else 9))
            ]
            if rng.random() < 0.5:
                values[rng.randrange(len(values))] = -1
            in_transaction = rng.random() < 0.5
            for each in past:
                await each.execute(CLEAN)
            with suppress(Exception):
                await run(free[handles[0][name]], values, in_transaction)
            here = await _state(past[0])
            async with boxed.sandbox():
                with suppress(Exception):
                    await run(boxed[handles[1][name]], values, in_transaction)
                there = await _state(boxed[handles[1]["asyncpg"]])
            differing = found.setdefault(f"{name}.{run.__name__}", [])
            if here != there:
                told = f"run {number}: {values[:20]}, {in_transaction}: {here} became {there}"
                differing.append(told[:2000])
    return found


async def _state(database: Any) -> tuple[Any, ...]:
    return tuple(await database.fetchrow(STATE))


def main() -> None:
    """Compare, and tell what differs."""
    parser = ArgumentParser(description=__doc__, usage=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    given = parser.parse_args()
    print(f"--seed {given.seed}", flush=True)

    async def all_runs() -> None:
        async with embedded.postgres(settings={"autovacuum": "off"}) as server:
            for name, differing in (await compare(server, given.runs, given.seed)).items():
                print(name, "the same" if not differing else "\n  ".join(["", *differing]))

    asyncio.run(all_runs())


if __name__ == "__main__":
    main()
