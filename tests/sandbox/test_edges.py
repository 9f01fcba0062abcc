"""Where a block begins and ends: what is said inside is undone, what is said outside stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import asyncpg
import psycopg_pool
import pytest
from anyio.lowlevel import checkpoint

from lifekit import Lifespan, Registry, SandboxBusyError
from lifekit.embedded import Server
from lifekit.testing import sandboxing

from .past import Past, connected

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """All clients here are asyncio's."""
    return "asyncio"


@pytest.fixture
def past(postgres: Server) -> Any:
    """What asks past the gateway, and finds a table of rows."""
    with connected(postgres.url, Past) as past:
        past.ask("DROP TABLE IF EXISTS edges; CREATE TABLE edges (n int)")
        yield past.ask
        past.ask("DROP TABLE edges")


COUNT = "SELECT count(*) FROM edges"


@asynccontextmanager
async def opened(*makes: Callable[[], Any]) -> AsyncGenerator[tuple[Lifespan, list[Any]]]:
    """Open a lifespan, sandboxed, and its pools."""
    registry = Registry("edges", close_timeout=60)
    handles = [registry.resource(name=f"pool{n}")(make) for n, make in enumerate(makes)]
    with sandboxing():
        async with registry.lifespan() as lifespan:
            yield lifespan, [lifespan[each] for each in handles]


async def test_what_forgets_prepared_statements_outside_lets_no_write_out(
    postgres: Server, past: Any
) -> None:
    def make() -> Any:
        return psycopg_pool.AsyncConnectionPool(postgres.url, min_size=1, max_size=1, open=False)

    async with opened(make) as (lifespan, [pool]):
        for forgets in ("SELECT 1", "DEALLOCATE ALL", "DISCARD ALL"):
            async with pool.connection() as connection:
                await connection.set_autocommit(True)
                await connection.execute(forgets)
                await connection.set_autocommit(False)
            async with lifespan.sandbox(), pool.connection() as connection:
                await connection.execute("INSERT INTO edges VALUES (1)")
        assert past(COUNT) == 0


@pytest.mark.parametrize("nested", [False, True])
async def test_what_is_said_while_settings_are_asked_for_belongs_to_its_block(
    postgres: Server, past: Any, nested: bool
) -> None:
    urls = (postgres.url, f"{postgres.url}?application_name=other")
    makes = [lambda url=url: asyncpg.create_pool(url, min_size=1) for url in urls]
    go_on = asyncio.Event()
    async with opened(*makes) as (lifespan, [pool, other]), other.acquire() as held:

        async def insert() -> None:
            await go_on.wait()
            await held.execute("INSERT INTO edges VALUES (1)")

        async def block() -> None:
            async with lifespan.sandbox():
                await pool.execute("SELECT 1")
                go_on.set()
                for _ in range(2):
                    await asyncio.sleep(0)

        loop = asyncio.create_task(insert())  # the application's own, begun before
        await asyncio.sleep(0)
        if nested:
            async with lifespan.sandbox():
                await pool.execute("SELECT 1")
                await block()
                await loop
                assert await pool.fetchval(COUNT) == 0
        else:
            await block()
            await loop
    assert past(COUNT) == 0


async def test_what_is_said_between_two_blocks_stays(postgres: Server, past: Any) -> None:
    def make() -> Any:
        return asyncpg.create_pool(postgres.url, min_size=1)

    async with opened(make) as (lifespan, [pool]), pool.acquire() as held:
        async with lifespan.sandbox():
            await held.execute("INSERT INTO edges VALUES (1)")
        said = asyncio.create_task(held.execute("INSERT INTO edges VALUES (2)"))
        await checkpoint()
        async with lifespan.sandbox():
            await said
    assert past("SELECT array_agg(n) FROM edges") == [2]


async def test_a_block_does_not_begin_in_one_that_ends(postgres: Server, past: Any) -> None:
    async with opened(lambda: asyncpg.create_pool(postgres.url, min_size=1)) as (lifespan, [pool]):
        wrote, ending = asyncio.Event(), asyncio.Event()

        async def application(held: Any) -> None:
            await ending.wait()
            async with held.transaction():
                await held.execute("INSERT INTO edges VALUES (1)")
                wrote.set()
                with pytest.raises(SandboxBusyError):
                    await late

        async def straggler() -> None:
            await wrote.wait()
            while not lifespan._root.block._is_leaving:  # type: ignore[union-attr] # pyright: ignore
                await checkpoint()
            async with lifespan.sandbox():
                raise AssertionError

        async with pool.acquire() as held:
            own = asyncio.create_task(application(held))
            await asyncio.sleep(0)
            async with lifespan.sandbox():
                late = asyncio.create_task(straggler())
                ending.set()
                await wrote.wait()
            await own
        async with lifespan.sandbox():
            assert await pool.fetchval(COUNT) == 0
    assert past(COUNT) == 0


async def test_a_failed_transaction_forgets_no_deferred_constraint(postgres: Server, past: Any) -> None:
    past("CREATE TABLE edges_one (i int PRIMARY KEY)")
    past("CREATE TABLE edges_many (i int REFERENCES edges_one DEFERRABLE INITIALLY DEFERRED)")
    try:
        make: Callable[[], Any] = partial(asyncpg.create_pool, postgres.url, min_size=1)
        async with opened(make) as (lifespan, [pool]):  # noqa: SIM117
            async with lifespan.sandbox(), pool.acquire() as connection:
                await connection.execute("BEGIN; CREATE TABLE edges_fresh ()")
                for sql in ("SELECT 1/0", "INSERT INTO edges_one VALUES (1)"):
                    with pytest.raises(asyncpg.PostgresError):
                        await connection.execute(sql)
                await connection.execute("ROLLBACK")
                with pytest.raises(asyncpg.ForeignKeyViolationError):
                    async with connection.transaction():
                        await connection.execute("INSERT INTO edges_many VALUES (404)")
    finally:
        past("DROP TABLE edges_many, edges_one")
