"""Connections without a pool: values of resources, and those that code makes by itself."""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import asyncpg
import psycopg
import psycopg2
import psycopg2.pool
import pytest
from asyncpg import connect_utils
from pg8000 import core  # type: ignore[import-untyped]

from lifekit import Lifespan, Registry, SandboxBusyError, SandboxEscapedError, SandboxUnsupportedError
from lifekit.embedded import Server
from lifekit.testing import sandboxing

from .connections import OWN, VALUES, Connection, by_pg8000
from .past import Past, database
from .pools import POOLS, Pool

pytestmark = pytest.mark.anyio
ADD = "INSERT INTO rows (n) VALUES (1)"
COUNT = "SELECT count(*) FROM rows"


@pytest.fixture
def anyio_backend() -> object:
    """These clients are asyncio's."""
    return "asyncio", {"use_uvloop": False}


@pytest.fixture(scope="module")
def past(postgres: Server) -> Iterator[Past]:
    """A database of this module's own."""
    with database(postgres.url, "connections", Past) as past:
        past.ask("CREATE TABLE rows (n int CHECK (n > 0), id serial)")
        yield past


@pytest.fixture(autouse=True)
def nothing_lasts(past: Past) -> Iterator[None]:
    """The table is empty afterwards."""
    yield
    assert past.ask(COUNT) == 0


@pytest.fixture(params=OWN, ids=lambda each: each.name)
def own(request: pytest.FixtureRequest) -> Connection:
    """What code may connect by itself."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
async def lifespan(past: Past) -> AsyncGenerator[Lifespan]:
    """One without resources."""
    with sandboxing():
        async with Registry("own").lifespan() as lifespan:
            yield lifespan


# -- values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VALUES, ids=lambda each: each.name)
async def test_a_value_is_undone_and_what_its_factory_did_stays(kind: Connection, past: Past) -> None:
    registry = Registry("values")

    @registry.resource
    async def connection() -> Any:
        made = await kind.connect(past.url)
        await kind.run(made, "SET app.tenant = 'a'")
        await kind.run(made, "CREATE TEMP TABLE own AS SELECT 7 AS n")
        return made

    with sandboxing():
        async with registry.lifespan() as lifespan:
            value = lifespan[connection]
            for _ in range(2):
                async with lifespan.sandbox():
                    await kind.run(value, ADD)
                    await kind.run(value, "UPDATE own SET n = n + 1")
                    for sql in ("BEGIN", ADD, "COMMIT", "BEGIN", ADD, "ROLLBACK"):
                        await kind.run(value, sql)
                    assert await kind.run(value, COUNT) == 2
                    assert past.ask(COUNT) == 0
                assert await kind.run(value, COUNT) == 0
                assert await kind.run(value, "SELECT n FROM own") == 7
                assert await kind.run(value, "SHOW app.tenant") == "a"


@pytest.mark.parametrize("module", [psycopg, psycopg2], ids=lambda each: each.__name__)
async def test_a_transaction_that_its_driver_begins_by_itself_ends_with_the_block(
    module: Any, past: Past
) -> None:
    registry = Registry("implicit")
    connection = registry.resource(name="connection")(lambda: module.connect(past.url))
    with sandboxing():
        async with registry.lifespan() as lifespan:
            cursor = lifespan[connection].cursor()
            for _ in range(2):
                async with lifespan.sandbox():
                    await asyncio.to_thread(cursor.execute, ADD)
                    await asyncio.to_thread(cursor.execute, COUNT)
                    assert cursor.fetchall() == [(1,)]


async def test_a_value_that_was_connected_before_is_refused(past: Past) -> None:
    """A block does not begin, for what it did would last."""
    early = await asyncpg.connect(past.url)
    registry = Registry("early")
    registry.resource(name="connection")(lambda: early)
    with sandboxing():
        async with registry.lifespan() as lifespan:
            with pytest.raises(SandboxEscapedError, match="made before its lifespan opened"):
                async with lifespan.sandbox():
                    raise AssertionError


@pytest.mark.parametrize("kind", POOLS, ids=lambda each: each.name)
async def test_what_is_declared_to_last_does_though_its_connections_come_late(
    kind: Pool, past: Past
) -> None:
    registry = Registry("lasting", close_timeout=60)

    async def make() -> Any:
        made = kind.make(past.url, 4)
        return await made if hasattr(made, "__await__") and kind.name != "asyncpg" else made

    pool = registry.resource(name="pool", sandbox=False)(make)
    with sandboxing():
        async with registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                await kind.run(lifespan[pool], ADD)
                assert past.ask(COUNT) == 1
            await kind.run(lifespan[pool], "DELETE FROM rows")


async def test_who_uses_a_value_too_late_is_refused(past: Past) -> None:
    registry, late = Registry("late"), asyncio.Event()

    @registry.resource
    async def connection() -> Any:
        return await asyncpg.connect(past.url)

    async def outlives(value: asyncpg.Connection[Any]) -> None:
        await late.wait()
        await value.execute(ADD)

    with sandboxing():
        async with registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                task = asyncio.create_task(outlives(lifespan[connection]))
                await asyncio.sleep(0)
            late.set()
            with pytest.raises(SandboxEscapedError, match="a connection of asyncpg is used by code"):
                await task


# -- what code connects by itself ---------------------------------------------------------------------


async def test_what_code_connects_by_itself_is_undone(
    own: Connection, lifespan: Lifespan, past: Past
) -> None:
    """Of before the block and of inside; the two see each other's rows."""
    early = await own.connect(past.url)
    for _ in range(2):
        async with lifespan.sandbox():
            await own.run(early, ADD)
            inside = await own.connect(past.url)
            await own.run(inside, ADD)
            assert await own.run(early, COUNT) == await own.run(inside, COUNT) == 2
            assert past.ask(COUNT) == 0
            await own.close(inside)
    await own.close(early)


async def test_what_is_bound_before_a_flush_is_executed_once(lifespan: Lifespan, past: Past) -> None:
    """As pg8000 does it, while the gateway itself has something to ask in between."""

    def work() -> Any:
        connection = by_pg8000(past.url)
        with closing(connection), closing(connection.cursor()) as cursor:
            cursor.executemany("INSERT INTO rows (n) VALUES (%s)", [(1,), (2,), (3,)])
            cursor.execute("SELECT n FROM rows ORDER BY id")
            found = [n for (n,) in cursor.fetchall()]
            connection.commit()
            connection.autocommit = True
            cursor.executemany("INSERT INTO rows (n) VALUES (%s)", [(4,), (5,)])
        return found

    async with lifespan.sandbox():
        assert await asyncio.to_thread(work) == [1, 2, 3]
        connection = await asyncpg.connect(past.url)
        assert await connection.fetchval("SELECT array_agg(n ORDER BY n) FROM rows") == [1, 2, 3, 4, 5]
        await connection.close()


async def test_a_thread_for_which_the_event_loop_waits_is_told_so(
    lifespan: Lifespan, past: Past, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lifekit._sandbox.postgres.sandbox._PATIENCE", 0.2)
    async with lifespan.sandbox():
        connection = await asyncpg.connect(past.url)  # so that the gateway runs in this loop
        with ThreadPoolExecutor() as threads:
            blocked = threads.submit(psycopg2.connect, past.url)
            with pytest.raises(SandboxBusyError, match="has been blocked for"):
                blocked.result(60)
        other = await asyncio.to_thread(psycopg2.connect, past.url)
        other.close()
        await connection.close()


async def test_what_another_thread_cancels_is_cancelled_by_each_client_of_libpq(past: Past) -> None:
    """libpq itself would wait for the gateway, and let no thread run meanwhile."""
    program = [sys.executable, "-m", "tests.sandbox.cancelling", past.url]
    ran = await asyncio.to_thread(
        subprocess.run, program, stdout=subprocess.PIPE, text=True, timeout=60, check=True
    )
    psycopg2s = ["connect", "of_a_class", "of_a_function", "of_an_engine"]
    assert ran.stdout.split() == [*psycopg2s, "connect", "of_a_pool"]


async def test_what_a_task_still_has_open_is_named_and_closed(lifespan: Lifespan, past: Past) -> None:
    has, end = asyncio.Event(), asyncio.Event()
    made: list[asyncpg.Connection[Any]] = []

    async def outlives() -> None:
        made.append(await asyncpg.connect(past.url))
        has.set()
        await end.wait()

    async with asyncio.TaskGroup() as tasks:
        with pytest.raises(SandboxEscapedError, match=r"opened at .*test_connections.*in .*outlives"):
            async with lifespan.sandbox():
                tasks.create_task(outlives())
                await has.wait()
        assert made[0].is_closed()
        end.set()


async def test_a_block_that_has_ended_makes_no_new_connections(lifespan: Lifespan, past: Past) -> None:
    late = asyncio.Event()

    async def outlives() -> None:
        await late.wait()
        await asyncpg.connect(past.url)

    async with lifespan.sandbox():
        task = asyncio.create_task(outlives())
        await asyncio.sleep(0)
    late.set()
    with pytest.raises(SandboxEscapedError, match="a new connection is used by code"):
        await task


def _doors() -> list[Any]:
    base = vars(psycopg.BaseConnection)["_connect_gen"]
    pg8000: Any = core
    return [
        vars(connect_utils)["_connect"],
        vars(psycopg2)["_connect"],
        base,
        pg8000.CoreConnection.__init__,
    ]


async def test_nothing_stays_installed(past: Past) -> None:
    """Of two lifespans the last one takes it away."""
    before, finders = _doors(), list(sys.meta_path)
    with sandboxing():
        async with Registry("outer").lifespan():
            async with Registry("inner").lifespan():
                pass
            assert all(now is not then for now, then in zip(_doors(), before, strict=True))
    assert _doors() == before
    assert sys.meta_path == finders


async def test_without_test_mode_nothing_is_installed(past: Past) -> None:
    before = _doors()
    async with Registry("production").lifespan():
        assert _doors() == before


async def test_two_lifespans_in_two_threads_have_their_own(past: Past) -> None:
    """In each one's block there are its own rows; code that may belong to either is refused."""
    both, done = threading.Barrier(2), threading.Barrier(2)
    seen: list[Any] = []

    async def application() -> None:
        with sandboxing():
            async with Registry("thread").lifespan() as lifespan, lifespan.sandbox():
                connection = await asyncpg.connect(past.url)
                await asyncio.to_thread(both.wait, 60)
                await connection.execute("CREATE TEMP TABLE mine AS SELECT 1 AS n")
                other = await asyncpg.connect(past.url)
                seen.append(await other.fetchval("SELECT count(*) FROM mine"))
                run = functools.partial(asyncio.get_running_loop().run_in_executor, None)
                with pytest.raises(SandboxUnsupportedError, match="in which of them"):
                    await run(psycopg2.connect, past.url)
                await asyncio.to_thread(done.wait, 60)
                await connection.close()
                await other.close()

    await asyncio.gather(*(asyncio.to_thread(asyncio.run, application()) for _ in range(2)))
    assert seen == [1, 1]


LATE_IMPORT = """
import asyncio, os, sys
from lifekit import Registry
from lifekit.testing import sandboxing

registry = Registry("late")

@registry.resource
async def connection():
    import asyncpg
    return await asyncpg.connect(os.environ["URL"])

async def main():
    assert "asyncpg" not in sys.modules and "psycopg2" not in sys.modules
    with sandboxing():
        async with registry.lifespan() as lifespan, lifespan.sandbox():
            await lifespan[connection].execute("INSERT INTO rows (n) VALUES (1)")
            import psycopg2
            with psycopg2.connect(os.environ["URL"]) as other, other.cursor() as cursor:
                cursor.execute("SELECT count(*) FROM rows")
                print(cursor.fetchone()[0])
                cursor.execute("INSERT INTO rows (n) VALUES (1)")

asyncio.run(main())
"""


def test_what_is_imported_late_is_undone_as_well(past: Past) -> None:
    environment = {**os.environ, "URL": past.url}
    command = [sys.executable, "-c", LATE_IMPORT]
    assert subprocess.check_output(command, env=environment, text=True) == "1\n"


# -- psycopg2's pools ---------------------------------------------------------------------------------


async def test_a_simple_pool_of_psycopg2_is_undone(past: Past) -> None:
    """The threaded one is among the pools."""
    registry = Registry("simple")
    make = functools.partial(psycopg2.pool.SimpleConnectionPool, 1, 2, dsn=past.url)
    pool = registry.resource(name="pool")(make)
    with sandboxing():
        async with registry.lifespan() as lifespan:
            async with lifespan.sandbox():

                def work() -> Any:
                    taken = lifespan[pool].getconn()
                    with taken, taken.cursor() as cursor:
                        cursor.execute(ADD)
                        cursor.execute(COUNT)
                        found = cursor.fetchall()
                    lifespan[pool].putconn(taken)
                    return found

                assert await asyncio.to_thread(work) == [(1,)]
            assert past.ask(COUNT) == 0
