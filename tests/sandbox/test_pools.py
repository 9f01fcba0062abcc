"""What a sandbox promises, for each kind of value: one claim, one test, run over all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import anyio
import pytest

from lifekit import Lifespan, Registry, SandboxEscapedError
from lifekit.embedded import Server
from lifekit.testing import sandboxing

from .past import Past, database
from .pools import POOLS, Asyncpg, Pool, sqlstate
from .streams import stream_of

pytestmark = pytest.mark.anyio
ADD = "INSERT INTO rows (n) VALUES (1)"
COUNT = "SELECT count(*) FROM rows"
BUSY = "55P03"
SLEEP = f"{ADD}; SELECT pg_sleep(600)"


async def _aiopg_sleeps(connection: Any) -> None:
    async with connection.cursor() as cursor:
        await cursor.execute(SLEEP)


def _sleeps(connection: Any) -> Any:
    return connection.execute(SLEEP)


def _terminates(connection: Any) -> None:
    connection.terminate()


def _finishes(connection: Any) -> None:
    connection.pgconn.finish()


def _closes(connection: Any) -> None:
    connection.close()


ENDS: dict[str, tuple[Any, Any]] = {
    "asyncpg": (_sleeps, _terminates),
    "psycopg": (_sleeps, _finishes),
    "aiopg": (_aiopg_sleeps, _closes),
}
"""How a connection is brought to sleep, and ended at once, where that is possible."""


@pytest.fixture
def anyio_backend() -> object:
    """These clients are asyncio's."""
    return "asyncio", {"use_uvloop": False}


@pytest.fixture(params=POOLS, ids=lambda pool: pool.name)
def kind(request: pytest.FixtureRequest) -> Pool:
    """Each kind of value."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def past(postgres: Server) -> Iterator[Past]:
    """A database of this module's own."""
    with database(postgres.url, "pools", Past) as past:
        past.ask("CREATE TABLE rows (n int CHECK (n > 0), id serial)")
        past.ask("CREATE TABLE one (i int PRIMARY KEY)")
        past.ask(
            "CREATE TABLE many (one int REFERENCES one DEFERRABLE INITIALLY DEFERRED); SELECT NULL"
        )
        yield past


class House:
    """A sandboxed lifespan of one pool."""

    def __init__(self, kind: Pool, lifespan: Lifespan, value: Any) -> None:
        self.kind, self.lifespan, self.value = kind, lifespan, value

    async def run(self, sql: str) -> Any:
        """Run SQL on any connection."""
        return await self.kind.run(self.value, sql)

    async def count(self) -> int:
        """Return how many rows the application sees."""
        found: int = await self.kind.value(self.value, COUNT)
        return found

    def acquire(self) -> Any:
        """Take a connection."""
        return self.kind.acquire(self.value)


async def opened(stack: AsyncExitStack, past: Past, *kinds: Pool, most: int = 4) -> list[House]:
    """Open a lifespan of several pools."""
    registry = Registry("pools", close_timeout=60)

    def make(kind: Pool) -> Any:
        made = kind.make(past.url, most)
        if not hasattr(made, "__await__") or kind.name == "asyncpg":
            return lambda: made

        async def factory() -> Any:
            return await made

        return factory

    handles = [registry.resource(name=f"pool{number}")(make(kind)) for number, kind in enumerate(kinds)]
    with sandboxing():
        lifespan = await stack.enter_async_context(registry.lifespan())
    return [House(kind, lifespan, lifespan[each]) for kind, each in zip(kinds, handles, strict=True)]


@pytest.fixture
async def house(kind: Pool, past: Past) -> AsyncGenerator[House]:
    """Afterwards the table is as before, and nobody is connected."""
    async with AsyncExitStack() as stack:
        (house,) = await opened(stack, past, kind)
        yield house
    await past.until(
        "SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = 'pools' AND pid <> pg_backend_pid()"
    )
    assert past.ask(COUNT) == 0


async def refused(run: Any, sql: str) -> str | None:
    """Return the SQLSTATE by which something is refused."""
    try:
        await run(sql)
    except Exception as error:
        return sqlstate(error)
    return None


# -- a block ------------------------------------------------------------------------------------------


async def test_what_was_done_inside_is_undone_and_outside_it_is_the_real_thing(
    house: House, past: Past
) -> None:
    await house.run(ADD)
    assert past.ask(COUNT) == 1
    for _ in range(2):
        async with house.lifespan.sandbox():
            await house.run(ADD)
            async with house.acquire() as run:
                for sql in ("BEGIN", ADD, "COMMIT", "BEGIN", ADD, "ROLLBACK"):
                    await run(sql)
            assert await house.count() == 3
            assert past.ask(COUNT) == 1
        assert await house.count() == 1
    await house.run("DELETE FROM rows")


async def test_a_failure_undoes_its_statement_or_its_transaction(house: House) -> None:
    async with house.lifespan.sandbox():
        await house.run(ADD)
        async with house.acquire() as run:
            assert await refused(run, "INSERT INTO rows VALUES (-1)") == "23514"
            await run("BEGIN")
            await run(ADD)
            assert await refused(run, "SELECT 1/0") == "22012"
            assert await refused(run, ADD) == "25P02"
            await run("ROLLBACK")
            await run("BEGIN")
            await run("SAVEPOINT s")
            assert await refused(run, "SELECT 1/0") == "22012"
            await run("ROLLBACK TO s")
            await run(ADD)
            await run("COMMIT")
        assert await house.count() == 2


async def test_deferred_constraints_are_checked_at_the_applications_commit(house: House) -> None:
    async with house.lifespan.sandbox(), house.acquire() as run:
        await run("BEGIN")
        await run("INSERT INTO many VALUES (1)")
        await run("INSERT INTO one VALUES (1)")
        await run("COMMIT")
        assert await refused(run, "INSERT INTO many VALUES (2)") == "23503"
        await run("BEGIN")
        await run("INSERT INTO many VALUES (3)")
        assert await refused(run, "COMMIT") == "23503"
        assert await run("SELECT * FROM many") in ([(1,)], [[1]])


async def test_settings_are_a_connections_own(house: House) -> None:
    async with house.lifespan.sandbox(), house.acquire() as one, house.acquire() as other:
        await one("SET search_path TO pg_catalog")
        await other("SET app.tenant TO 'b'")
        assert [tuple(row) for row in await one("SHOW search_path")] == [("pg_catalog",)]
        assert [tuple(row) for row in await other("SHOW search_path")] == [('"$user", public',)]
        await one("BEGIN")
        await one("SET LOCAL work_mem = '99kB'")
        await one("COMMIT")
        assert [tuple(row) for row in await one("SHOW work_mem")] == [("4MB",)]


async def test_modes_of_transactions(house: House) -> None:
    async with house.lifespan.sandbox(), house.acquire() as run:
        await run("BEGIN READ ONLY")
        assert await refused(run, ADD) == "25006"
        await run("ROLLBACK")
        await run("BEGIN ISOLATION LEVEL SERIALIZABLE")
        await run(ADD)
        await run("COMMIT AND CHAIN")
        await run(ADD)
        await run("ROLLBACK")
    assert await house.count() == 0


async def test_a_schema_is_undone_and_no_cache_remembers_it(house: House) -> None:
    for columns in ("a int", "b text, c int"):
        async with house.lifespan.sandbox():
            for _ in range(2):
                await house.run("SELECT * FROM rows")
            await house.run(f"CREATE TABLE fresh ({columns})")
            await house.run("INSERT INTO fresh DEFAULT VALUES")
            assert len((await house.run("SELECT * FROM fresh"))[0]) == columns.count(",") + 1
        assert await house.kind.value(house.value, "SELECT to_regclass('fresh')") is None


# -- several at once ----------------------------------------------------------------------------------


async def test_each_sees_what_others_have_committed(house: House, past: Past) -> None:
    """Many at once, and those of another kind of value as well."""
    async with AsyncExitStack() as stack:
        mine, other = await opened(stack, past, house.kind, Asyncpg())
        async with mine.lifespan.sandbox():
            await asyncio.gather(
                *(mine.run(ADD) for _ in range(8)), *(other.run(ADD) for _ in range(8))
            )
            assert await mine.count() == await other.count() == 16
            async with mine.acquire() as run:
                await run("BEGIN")
                await run(ADD)
                counting = asyncio.create_task(other.count())
                await asyncio.sleep(0)
                await run("COMMIT")
                assert await counting == 17
            assert past.ask(COUNT) == 0


async def test_a_transaction_that_has_only_read_makes_nobody_wait(house: House) -> None:
    async with house.lifespan.sandbox(), house.acquire() as one, house.acquire() as other:
        for sql in ("BEGIN", COUNT):
            await one(sql)
        with anyio.fail_after(4):
            await other(ADD)
        assert [tuple(row) for row in await one(COUNT)] == [(1,)]
        await one("COMMIT")


async def test_a_wait_that_cant_end_is_told_with_both_lines(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lifekit._sandbox.postgres.session.PATIENCE", 0.2)
    async with house.lifespan.sandbox(), house.acquire() as one, house.acquire() as other:
        for sql in ("BEGIN", ADD):
            await one(sql)
        with pytest.raises(Exception, match="lifekit's sandbox") as caught, anyio.fail_after(60):
            await other(ADD)
        assert sqlstate(caught.value) == BUSY
        await one("COMMIT")
        await other(ADD)
        assert await house.count() == 2


# -- streams ------------------------------------------------------------------------------------------


@asynccontextmanager
async def streaming(house: House) -> AsyncGenerator[Any]:
    """A connection in a block, and how its driver streams; skips where it does not."""
    async with house.lifespan.sandbox(), house.kind.connection(house.value) as connection:
        stream = stream_of(connection)
        if stream is None:
            pytest.skip(f"{house.kind.name} has no streams")
        yield connection, stream


async def test_rows_are_copied_in_and_out(house: House, past: Past) -> None:
    """And a COPY that fails, of which some was sent, leaves nothing."""
    async with streaming(house) as (connection, stream):
        await stream.copy_in(connection, b"2\n1\n")
        with pytest.raises(Exception, match="invalid input syntax"):
            await stream.copy_in(connection, b"3\n" * 20_000 + b"no number\n")
        assert await stream.copy_out(connection) == b"1\n2\n"
        assert await house.count() == 2
        assert past.ask(COUNT) == 0


async def test_a_cursor_of_the_servers_is_read_in_part(house: House) -> None:
    async with streaming(house) as (connection, stream):
        for _ in range(2):
            assert await stream.some(connection, "SELECT generate_series(1, 9)", 2) == [1, 2]
        await house.run(ADD)
        assert await house.count() == 1


@pytest.mark.parametrize(
    "kind", [each for each in POOLS if each.name in ENDS], ids=lambda pool: pool.name
)
async def test_a_connection_ends_amid_a_statement_and_nobody_waits_for_that(
    house: House, past: Past
) -> None:
    """What it had not committed is undone."""
    sleeps = "datname = 'pools' AND wait_event = 'PgSleep'"
    asleep = f"SELECT count(*) = 1 FROM pg_stat_activity WHERE {sleeps}"
    with anyio.fail_after(30):
        async with house.lifespan.sandbox():
            await house.run(ADD)
            with suppress(Exception):  # what giving back an ended one says
                async with house.kind.connection(house.value) as connection:
                    sleeping = asyncio.ensure_future(ENDS[house.kind.name][0](connection))
                    await past.until(asleep)
                    ENDS[house.kind.name][1](connection)
                    await asyncio.gather(sleeping, return_exceptions=True)
            assert await house.count() == 1
    await past.until(asleep.replace("= 1", "= 0"))


async def test_a_sink_of_asyncpgs_may_fail_amid_a_copy(past: Past) -> None:
    """With pieces that came while it was at the one before."""
    async with AsyncExitStack() as stack:
        (house,) = await opened(stack, past, Asyncpg())

        pieces: list[bytes] = []
        over = "SELECT count(*) = 0 FROM pg_stat_activity WHERE query ~ '^COPY' AND state = 'active'"

        async def sink(data: bytes) -> None:
            pieces.append(data)
            if len(pieces) == 2:
                raise LookupError
            await past.until(over)

        async with house.lifespan.sandbox(), house.value.acquire() as connection:
            with pytest.raises(LookupError):
                await connection.copy_from_query("SELECT generate_series(1, 60000)", output=sink)
            async with asyncio.timeout(30):
                assert await connection.fetchval("SELECT 1") == 1


# -- the edges of a block -----------------------------------------------------------------------------


async def test_what_was_acquired_before_the_block_is_in_it(house: House, past: Past) -> None:
    async with house.acquire() as run:
        await run("SET application_name = 'early'")
        async with house.lifespan.sandbox():
            await run(ADD)
            assert await house.count() == 1
            assert past.ask(COUNT) == 0
            assert [tuple(row) for row in await run("SHOW application_name")] == [("early",)]
        assert [tuple(row) for row in await run(COUNT)] == [(0,)]
        assert [tuple(row) for row in await run("SHOW application_name")] == [("early",)]


async def test_what_was_not_given_back_is_named_and_closed(house: House) -> None:
    """And the pool is whole in the next block."""
    for sql in (None, f"BEGIN; {ADD}"):
        with pytest.raises(
            SandboxEscapedError, match=r"not been given back:\n  a connection .*acquired at "
        ) as caught:
            async with house.lifespan.sandbox():
                taken = await house.kind.take(house.value)
                if sql is not None and house.kind.name == "asyncpg":
                    await taken.execute(sql)
        assert ("in a transaction" in str(caught.value)) == (
            sql is not None and house.kind.name == "asyncpg"
        )
        with anyio.fail_after(60):
            async with house.lifespan.sandbox():
                await asyncio.gather(*(house.run(ADD) for _ in range(6)))
                assert await house.count() == 6


async def test_a_transaction_begun_before_the_block_stays_outside(house: House, past: Past) -> None:
    async with house.acquire() as run:
        await run("BEGIN")
        await run(ADD)
        async with house.lifespan.sandbox():
            assert await house.count() == 0
            await run("COMMIT")
            assert past.ask(COUNT) == 1
            await run(ADD)
            assert past.ask(COUNT) == 1
    await house.run("DELETE FROM rows")


async def test_a_killed_connection_ends_the_block_and_not_the_lifespan(
    house: House, past: Past
) -> None:
    others = "FROM pg_stat_activity WHERE datname = 'pools' AND pid <> pg_backend_pid()"
    with anyio.fail_after(60):
        async with house.lifespan.sandbox():
            await house.run(ADD)
            past.ask(f"SELECT count(pg_terminate_backend(pid)) {others}")
            await past.until(f"SELECT count(*) = 0 {others}")
            for _ in range(6):  # as often as there may be connections that are lost
                await refused(house.run, ADD)
        async with house.lifespan.sandbox():
            for _ in range(6):
                await refused(house.run, "SELECT 1")
            await house.run(ADD)
            assert await house.count() == 1
    assert past.ask(COUNT) == 0


async def test_a_block_begins_beside_a_connection_that_is_out_and_lost(
    house: House, past: Past
) -> None:
    others = "FROM pg_stat_activity WHERE datname = 'pools' AND pid <> pg_backend_pid()"
    done = False
    with suppress(Exception), anyio.fail_after(60):  # what giving back a lost one says
        async with house.acquire():
            past.ask(f"SELECT count(pg_terminate_backend(pid)) {others}")
            await past.until(f"SELECT count(*) = 0 {others}")
            for _ in range(2):
                async with house.lifespan.sandbox():
                    assert await house.count() == 0
                    await house.run(ADD)
            done = True
    assert done


async def test_what_a_driver_gives_back_by_itself_is_waited_for(past: Past) -> None:
    """asyncpg does so where a task is cancelled that gives back what it cancelled before."""
    asleep = "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    async with AsyncExitStack() as stack:
        (house,) = await opened(stack, past, Asyncpg())
        async with house.lifespan.sandbox():
            task = asyncio.create_task(house.run("SELECT pg_sleep(600)"))
            await past.until(asleep)
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
        async with house.lifespan.sandbox():
            assert await house.count() == 0
