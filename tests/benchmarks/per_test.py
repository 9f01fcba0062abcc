"""What isolating one test costs: one insert and one select, undone in several ways."""

# Not `from __future__ import annotations`: SQLAlchemy evaluates them, and here they are local.

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.util import find_spec
from itertools import count
from secrets import token_hex
from time import perf_counter
from typing import Any, NamedTuple

import asyncpg
import redis.asyncio as redis

from lifekit import Registry, embedded
from lifekit.testing import sandboxing

from .contests import take_turns
from .isolation import seconds
from .measure import Row, Take, contest, on

TABLES = ["notes", *(f"other{number}" for number in range(19))]
SCHEMA = ";".join(f"CREATE TABLE {name} (id serial PRIMARY KEY, body text)" for name in TABLES)
WARM_UP = 10
"""Tests after which a connection has prepared all, and PostgreSQL plans no statement anew."""

Test = Callable[[], Awaitable[None]]


class Way(NamedTuple):
    """A way to isolate: *prepared* opens what all tests share, and yields one test."""

    prepared: Callable[[], Any]
    per_round: int = 10
    isolates: bool = True
    stays: bool = True
    """Whether it is open all the time: not what sandboxes, or the others would go by its gateway."""


async def work(db: Any) -> None:
    """Do what a test does, on a pool or a connection."""
    number = await db.fetchval("INSERT INTO notes (body) VALUES ('kept') RETURNING id")
    assert await db.fetchval("SELECT body FROM notes WHERE id = $1", number) == "kept"


async def turn(way: Way, times: int) -> float:
    """Open a way for its turn alone, and return the seconds of one test of so many."""
    async with way.prepared() as test:
        for _ in range(WARM_UP):
            await test()
        return await seconds(times, test)


async def measured_ways(figure: str, ways: dict[str, Way | None], rounds: int, few: int) -> list[Row]:
    """Open all ways that stay open, and have their tests run in turns."""
    takes: dict[str, Take | None] = {}
    async with AsyncExitStack() as stack:
        for name, way in ways.items():
            takes[name] = None
            if way is None:
                continue
            times = min(way.per_round, few)
            if way.stays:
                test = await stack.enter_async_context(way.prepared())
                takes[name] = partial(seconds, times, test)
            else:
                takes[name] = partial(turn, way, times)
        return await take_turns(figure, rounds, takes, "ms", floor="nothing")


# -- PostgreSQL ----------------------------------------------------------------------------------


def postgres_ways(url: str) -> dict[str, Way]:
    """Return the ways to isolate a test on asyncpg, in a database that has the tables."""
    root, _, name = url.rpartition("/")
    pooled = partial(asyncpg.create_pool, url, min_size=1)

    @asynccontextmanager
    async def nothing() -> AsyncGenerator[Test]:
        async with pooled() as pool:
            yield partial(work, pool)

    @asynccontextmanager
    async def sandbox() -> AsyncGenerator[Test]:
        registry = Registry("tests")

        @registry.resource
        def db() -> asyncpg.Pool:
            return pooled()

        with sandboxing():
            async with registry.lifespan() as lifespan:

                async def test() -> None:
                    async with lifespan.sandbox():
                        await work(lifespan[db])

                yield test

    @asynccontextmanager
    async def rollback() -> AsyncGenerator[Test]:
        async with pooled() as pool:

            async def test() -> None:
                async with pool.acquire() as connection:
                    transaction = connection.transaction()
                    await transaction.start()
                    try:
                        await work(connection)
                    finally:
                        await transaction.rollback()

            yield test

    @asynccontextmanager
    async def new_pool() -> AsyncGenerator[Test]:
        async def test() -> None:
            async with asyncpg.create_pool(url) as pool:
                await work(pool)

        yield test

    @asynccontextmanager
    async def emptied(statement: str) -> AsyncGenerator[Test]:
        async with pooled() as pool:

            async def test() -> None:
                await work(pool)
                await pool.execute(statement)

            yield test

    @asynccontextmanager
    async def template() -> AsyncGenerator[Test]:
        numbers = count(1)
        admin = await asyncpg.connect(f"{root}/postgres")
        await admin.execute(f"CREATE DATABASE {name}_template TEMPLATE {name}")

        async def test() -> None:
            database = f"{name}_{next(numbers)}"
            await admin.execute(f"CREATE DATABASE {database} TEMPLATE {name}_template")
            async with asyncpg.create_pool(f"{root}/{database}", min_size=1) as pool:
                await work(pool)
            await admin.execute(f"DROP DATABASE {database}")

        yield test
        await admin.execute(f"DROP DATABASE {name}_template")
        await admin.close()

    def truncate(tables: list[str]) -> str:
        return f"TRUNCATE {', '.join(tables)} RESTART IDENTITY CASCADE"

    def delete(tables: list[str]) -> str:
        return ";".join(f"DELETE FROM {table}" for table in tables)

    return {
        # The template first: nobody may be connected to what it copies.
        "a database from a template": Way(template, per_round=1),
        "nothing": Way(nothing, isolates=False),
        "one connection rolled back": Way(rollback),
        "lifekit's sandbox": Way(sandbox, stays=False),
        "DELETE of 1 table": Way(partial(emptied, delete(TABLES[:1]))),
        "DELETE of 20 tables": Way(partial(emptied, delete(TABLES))),
        "TRUNCATE of 1 table": Way(partial(emptied, truncate(TABLES[:1])), per_round=2),
        "TRUNCATE of 20 tables": Way(partial(emptied, truncate(TABLES)), per_round=1),
        "a new pool": Way(new_pool, per_round=1, isolates=False),
    }


@asynccontextmanager
async def database() -> AsyncGenerator[str]:
    """Run a server with a database that has the tables, and yield its URL."""
    async with embedded.postgres() as server:
        admin, name = await asyncpg.connect(server.url), f"bench_{token_hex(4)}"
        await admin.execute(f"CREATE DATABASE {name}")
        url = f"{server.url.rpartition('/')[0]}/{name}"
        connection = await asyncpg.connect(url)
        await connection.execute(SCHEMA)
        await connection.close()
        yield url
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


def postgres(*, rounds: int = 40, few: int = 10) -> list[Row]:
    """Compare ways to isolate a test on asyncpg."""

    async def measured() -> list[Row]:
        async with database() as url:
            ways = postgres_ways(url)
            return await measured_ways("isolation", dict(ways), rounds, few)

    return on("asyncio", measured)


# -- SQLAlchemy ----------------------------------------------------------------------------------


def sqlalchemy_ways(url: str) -> dict[str, Way]:
    """Return the ways to isolate a test on SQLAlchemy's sessions."""
    from sqlalchemy import select
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
    from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

    class Base(DeclarativeBase): ...

    class Note(Base):
        __tablename__ = "notes"
        id: Mapped[int] = mapped_column(primary_key=True)
        body: Mapped[str]

    address = url.replace("postgresql://", "postgresql+asyncpg://", 1)

    async def use(session: AsyncSession) -> None:
        note = Note(body="kept")
        session.add(note)
        await session.commit()
        assert await session.scalar(select(Note.body).where(Note.id == note.id)) == "kept"

    @asynccontextmanager
    async def nothing() -> AsyncGenerator[Test]:
        engine = create_async_engine(address)

        async def test() -> None:
            async with AsyncSession(engine, expire_on_commit=False) as session:
                await use(session)

        yield test
        await engine.dispose()

    @asynccontextmanager
    async def recipe() -> AsyncGenerator[Test]:
        engine = create_async_engine(address)

        async def test() -> None:
            async with engine.connect() as connection:
                transaction = await connection.begin()
                session = AsyncSession(
                    bind=connection,
                    join_transaction_mode="create_savepoint",
                    expire_on_commit=False,
                )
                await use(session)
                await session.close()
                await transaction.rollback()

        yield test
        await engine.dispose()

    @asynccontextmanager
    async def sandbox() -> AsyncGenerator[Test]:
        registry = Registry("tests")

        @registry.resource
        def engine() -> AsyncEngine:
            return create_async_engine(address)

        with sandboxing():
            async with registry.lifespan() as lifespan:

                async def test() -> None:
                    async with (
                        lifespan.sandbox(),
                        AsyncSession(lifespan[engine], expire_on_commit=False) as session,
                    ):
                        await use(session)

                yield test

    return {
        "nothing": Way(nothing, isolates=False),
        "SQLAlchemy's recipe": Way(recipe),
        "lifekit's sandbox": Way(sandbox, stays=False),
    }


def sqlalchemy(*, rounds: int = 40, few: int = 10) -> list[Row]:
    """Compare ways to isolate a test on SQLAlchemy's sessions."""

    async def measured() -> list[Row]:
        async with database() as url:
            ways = sqlalchemy_ways(url)
            return await measured_ways("isolation-sqlalchemy", dict(ways), rounds, few)

    return on("asyncio", measured)


# -- Redis ---------------------------------------------------------------------------------------


async def use_redis(client: Any) -> None:
    """Do what a test does, on a client."""
    await client.set("key", "kept")
    assert await client.get("key") == b"kept"


def redis_ways(url: str) -> dict[str, Way | None]:
    """Return the ways to isolate a test on Redis."""
    root = url.rpartition("/")[0]

    @asynccontextmanager
    async def client(number: int) -> AsyncGenerator[Any]:
        made: Any = redis.from_url(f"{root}/{number}")
        yield made
        await made.aclose()

    @asynccontextmanager
    async def nothing() -> AsyncGenerator[Test]:
        async with client(8) as shared:
            yield partial(use_redis, shared)

    @asynccontextmanager
    async def flushed() -> AsyncGenerator[Test]:
        async with client(9) as shared:

            async def test() -> None:
                await use_redis(shared)
                await shared.flushdb()

            yield test

    @asynccontextmanager
    async def fake() -> AsyncGenerator[Test]:
        from fakeredis import FakeAsyncRedis, FakeServer

        async def test() -> None:
            async with FakeAsyncRedis(server=FakeServer()) as made:
                await use_redis(made)

        yield test

    @asynccontextmanager
    async def sandbox() -> AsyncGenerator[Test]:
        registry = Registry("tests")

        @registry.resource
        def cache() -> redis.Redis:
            return redis.from_url(url)

        with sandboxing():
            async with registry.lifespan() as lifespan:

                async def test() -> None:
                    async with lifespan.sandbox():
                        await use_redis(lifespan[cache])

                yield test

    return {
        "nothing": Way(nothing, isolates=False),
        "FLUSHDB": Way(flushed),
        "fakeredis": Way(fake) if find_spec("fakeredis") else None,
        "lifekit's sandbox": Way(sandbox, stays=False),
    }


def valkey(*, rounds: int = 40, few: int = 10) -> list[Row]:
    """Compare ways to isolate a test on Redis."""

    async def measured() -> list[Row]:
        async with embedded.valkey() as server:
            return await measured_ways("isolation-redis", redis_ways(server.url), rounds, few)

    return on("asyncio", measured)


# -- an application on aiopg and Redis -----------------------------------------------------------


def users(*, rounds: int = 40, few: int = 10) -> list[Row]:
    """Compare ways to isolate two requests to an application."""
    from .users import ways  # here, for it imports FastAPI

    async def measured() -> list[Row]:
        async with database() as url, embedded.valkey() as server:
            found = ways(url, server.url)
            return await measured_ways("isolation-aiopg", dict(found), rounds, few)

    return on("asyncio", measured)


# -- servers -------------------------------------------------------------------------------------


def servers(*, rounds: int = 5) -> list[Row]:
    """Measure what a run pays for a server of its own."""

    async def measured() -> list[Row]:
        took: list[float] = []
        for _ in range(rounds):
            began = perf_counter()
            async with embedded.postgres():
                pass
            took.append(perf_counter() - began)
        return contest("server", {"PostgreSQL, started and stopped": took}, "ms")

    return on("asyncio", measured)
