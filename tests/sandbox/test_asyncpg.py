"""asyncpg's sandbox on a real server: what FIELD calls containable is contained, and nothing lasts."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from typing import Any, cast

import anyio
import asyncpg
import pytest
from anyio.lowlevel import checkpoint
from asyncpg import exceptions

from lifekit import Registry, SandboxBusyError, SandboxError, SandboxEscapedError, embedded
from lifekit.embedded import Server
from lifekit.testing import sandboxing

from ..depth import LOOPS
from ..virtual_time import pass_time
from .conftest import SLEEPING, asleep
from .differential import SCHEMA
from .past import Past, database

pytestmark = pytest.mark.anyio

BOTH_LOOPS = pytest.mark.parametrize("anyio_backend", LOOPS)
ADD = "INSERT INTO app.item (v) VALUES (1)"
COUNT = "SELECT count(*) FROM app.item"
HELD = """SELECT coalesce(md5(string_agg(t, ',' ORDER BY t)), '') FROM (
    SELECT 'parent' || t::text AS t FROM app.parent AS t UNION ALL
    SELECT 'child' || t::text FROM app.child AS t UNION ALL
    SELECT 'item' || t::text FROM app.item AS t UNION ALL
    SELECT 'log' || t::text FROM app.log AS t UNION ALL
    SELECT 'watched' || t::text FROM app.watched AS t UNION ALL
    SELECT relkind::text || relname::text FROM pg_class
        WHERE relnamespace = 'app'::regnamespace UNION ALL
    SELECT 'type' || typname::text FROM pg_type WHERE typnamespace = 'app'::regnamespace UNION ALL
    SELECT 'schema' || nspname::text FROM pg_namespace WHERE nspname NOT LIKE 'pg_%') AS everything"""


@pytest.fixture
def anyio_backend() -> object:
    """Most run on asyncio alone."""
    return "asyncio", {"use_uvloop": False}


class Outside(Past):
    """A connection of its own to the same database."""

    def sessions(self, where: str = "true") -> int:
        """How many other connections to this database the server has."""
        count: int = self.ask(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            f"AND pid <> pg_backend_pid() AND {where}"
        )
        return count


@pytest.fixture(scope="module")
def outside(postgres: Server) -> Iterator[Outside]:
    """A database with the application's tables."""
    with database(postgres.url, "boxed_alone", Outside) as outside:
        outside.ask(SCHEMA)
        yield outside


class Box:
    """Lifespans of a pool, open sandboxed."""

    def __init__(self, outside: Outside, stack: AsyncExitStack) -> None:
        self.outside = outside
        self._stack = stack

    async def open(self, url: str | None = None, **options: Any) -> tuple[Any, Any]:
        """A lifespan, and its pool."""
        registry = Registry("boxed", close_timeout=60)
        given: dict[str, Any] = {"min_size": 1, "max_size": 4, **options}

        async def pool() -> Any:
            return asyncpg.create_pool(url or self.outside.url, **given)

        handle: Any = registry.resource(pool)
        with sandboxing():
            lifespan = await self._stack.enter_async_context(registry.lifespan())
        return lifespan, lifespan[handle]


IDLE = """SELECT NOT EXISTS (SELECT FROM pg_stat_activity AS one
    WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND (state = 'active' OR backend_xid IS NOT NULL OR backend_xmin IS NOT NULL OR EXISTS (
        SELECT FROM pg_locks WHERE pid = one.pid AND locktype <> 'virtualxid')))"""


@pytest.fixture
async def box(outside: Outside) -> AsyncGenerator[Box]:
    """What makes pools; afterwards the database holds what it held, and the server is idle."""
    before = outside.ask(HELD)
    async with AsyncExitStack() as stack:
        yield Box(outside, stack)
        # The server may be at the last ROLLBACK still, for which nobody has waited.
        await outside.until(IDLE)
    await outside.until("SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()")
    assert outside.ask(HELD) == before


@pytest.fixture
async def app(box: Box) -> AsyncGenerator[Any]:
    """A pool inside of a block."""
    lifespan, pool = await box.open()
    async with lifespan.sandbox():
        yield pool


# -- what a block is --------------------------------------------------------------------------------


@BOTH_LOOPS
async def test_what_is_committed_inside_is_gone_afterwards(box: Box) -> None:
    """Block after block finds what was there before the first."""
    lifespan, pool = await box.open()
    for _ in range(5):
        async with lifespan.sandbox():
            assert await pool.fetchval(COUNT) == 2
            await pool.execute(ADD)
            async with pool.acquire() as connection, connection.transaction():
                await connection.execute(ADD)
            assert await pool.fetchval(COUNT) == 4
            assert box.outside.ask(COUNT) == 2


async def test_the_pool_is_the_same_object_with_the_same_types(box: Box) -> None:
    """isinstance, type names and identity hold inside and outside."""
    lifespan, pool = await box.open()
    same, connections = pool, pool
    async with lifespan.sandbox():
        assert pool is same
        assert isinstance(pool, asyncpg.Pool)
        assert type(same).__name__ == "Pool"
        async with connections.acquire() as connection:
            same = connection
            assert isinstance(same, asyncpg.Connection)
            assert type(connection).__name__ == "PoolConnectionProxy"
            assert type(connection._con) is asyncpg.Connection


async def test_outside_of_a_block_it_is_the_real_thing(box: Box) -> None:
    """Before, between and after blocks statements last."""
    lifespan, pool = await box.open()
    async with lifespan.sandbox():
        await pool.execute(ADD)
    await pool.execute("CREATE TABLE app.lasting (a int)")
    assert box.outside.ask("SELECT count(*) FROM app.lasting") == 0
    async with lifespan.sandbox():
        await pool.execute("DROP TABLE app.lasting")
    assert box.outside.ask("SELECT count(*) FROM app.lasting") == 0
    await pool.execute("DROP TABLE app.lasting")


async def test_a_failing_body_undoes_as_well(box: Box) -> None:
    """And its own error is what comes out."""
    lifespan, pool = await box.open()
    with pytest.raises(LookupError, match="mine"):
        async with lifespan.sandbox():
            await pool.execute(ADD)
            raise LookupError("mine")
    assert await pool.fetchval(COUNT) == 2


@BOTH_LOOPS
async def test_a_cancelled_body_undoes_as_well(box: Box) -> None:
    """In the middle of a transaction."""
    lifespan, pool = await box.open()

    async def body() -> None:
        async with lifespan.sandbox(), pool.acquire() as connection, connection.transaction():
            await connection.execute(ADD)
            await connection.execute("SELECT pg_sleep(300)")

    task = await asleep(box.outside.ask, body())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with lifespan.sandbox():
        assert await pool.fetchval(COUNT) == 2


@BOTH_LOOPS
async def test_many_tasks_at_once_share_the_real_connection(box: Box) -> None:
    """Each with its own connection, transactions, failures: as many commits as committed."""
    lifespan, pool = await box.open(max_size=5)

    async def work(number: int) -> None:
        async with pool.acquire() as connection:
            await connection.execute(ADD)
            with pytest.raises(ZeroDivisionError):
                async with connection.transaction():
                    await connection.execute(ADD)
                    raise ZeroDivisionError
            async with connection.transaction():
                await connection.execute(ADD)
                with pytest.raises(exceptions.CheckViolationError):
                    async with connection.transaction():
                        await connection.execute("INSERT INTO app.item (v) VALUES (-$1::int)", 1)
            with pytest.raises(exceptions.DivisionByZeroError):
                await connection.fetch("SELECT 1/0")

    async with lifespan.sandbox():
        await asyncio.gather(*(work(number) for number in range(20)))
        assert await pool.fetchval(COUNT) == 42


async def test_a_failing_statement_undoes_itself_alone(app: Any) -> None:
    """Outside of transactions each statement stands for itself, on the pool and on a connection."""
    await app.execute(ADD)
    with pytest.raises(exceptions.CheckViolationError, match="positive"):
        await app.execute("INSERT INTO app.item (v) VALUES (1), (-1)")
    async with app.acquire() as connection:
        with pytest.raises(exceptions.UndefinedColumnError):
            await connection.fetch("SELECT nonsense")
        await connection.execute(ADD)
    assert await app.fetchval(COUNT) == 4


async def test_a_failing_statement_in_a_transaction_aborts_it(app: Any) -> None:
    """Until it is rolled back, as in production; a COMMIT says ROLLBACK."""
    async with app.acquire() as connection:
        await connection.execute("BEGIN")
        await connection.execute(ADD)
        with pytest.raises(exceptions.DivisionByZeroError):
            await connection.execute("SELECT 1/0")
        with pytest.raises(exceptions.InFailedSQLTransactionError):
            await connection.fetch("SELECT 1")
        assert connection.is_in_transaction()
        assert await connection.execute("COMMIT") == "ROLLBACK"
        assert not connection.is_in_transaction()
    assert await app.fetchval(COUNT) == 2


# -- transactions -----------------------------------------------------------------------------------


def by_execute(connection: Any) -> Callable[[str], Any]:
    """Send by the simple protocol."""
    return lambda sql: connection.execute(sql)


def by_fetch(connection: Any) -> Callable[[str], Any]:
    """Send by the extended protocol."""
    return lambda sql: connection.fetch(sql)


def by_prepare(connection: Any) -> Callable[[str], Any]:
    """Send by a prepared statement."""

    async def send(sql: str) -> Any:
        return await (await connection.prepare(sql)).fetch()

    return send


@pytest.mark.parametrize("way", [by_execute, by_fetch, by_prepare])
@pytest.mark.parametrize("end", ["COMMIT", "end;", "/* x */ Commit Work", "-- x\ncommit transaction"])
async def test_a_commit_in_text_keeps_the_transaction(app: Any, way: Any, end: str) -> None:
    """Until the block ends; a later rollback does not reach it."""
    async with app.acquire() as connection:
        send = way(connection)
        await send("BEGIN")
        await send(ADD)
        await send(end)
        assert not connection.is_in_transaction()
        await send("START TRANSACTION")
        await send(ADD)
        await send("ROLLBACK")
        assert await connection.fetchval(COUNT) == 3


@pytest.mark.parametrize("way", [by_execute, by_fetch, by_prepare])
async def test_savepoints_in_text(app: Any, way: Any) -> None:
    """The application's own are real ones."""
    async with app.acquire() as connection:
        send = way(connection)
        for sql in ("BEGIN", ADD, "SAVEPOINT a", ADD, "SAVEPOINT a", ADD, "ROLLBACK TO a", "RELEASE a"):
            await send(sql)
        assert await connection.fetchval(COUNT) == 4
        await send("ROLLBACK TO a")
        await send("COMMIT")
        assert await connection.fetchval(COUNT) == 3
        with pytest.raises(exceptions.NoActiveSQLTransactionError):
            await send("SAVEPOINT a")


async def test_scripts_with_control(app: Any) -> None:
    """One message with BEGIN and COMMIT in it is taken apart."""
    assert await app.execute(f"BEGIN; {ADD}; {ADD}; COMMIT") == "COMMIT"
    assert await app.execute(f"BEGIN; {ADD}; ROLLBACK") == "ROLLBACK"
    async with app.acquire() as connection:
        assert await connection.execute(f"BEGIN; {ADD}; COMMIT; BEGIN") == "BEGIN"
        assert connection.is_in_transaction()
        await connection.execute("ROLLBACK")
        with pytest.raises(exceptions.CheckViolationError):
            await connection.execute("BEGIN; INSERT INTO app.item (v) VALUES (-1); COMMIT")
        assert connection.is_in_transaction()
        await connection.execute("ROLLBACK")
    assert await app.fetchval(COUNT) == 5


async def test_a_script_without_control_is_one_transaction(app: Any) -> None:
    """Its failure undoes all of it."""
    with pytest.raises(exceptions.CheckViolationError):
        await app.execute(f"{ADD}; INSERT INTO app.item (v) VALUES (-1)")
    assert await app.fetchval(COUNT) == 2


async def test_a_script_that_splits_its_own_transaction(app: Any) -> None:
    """`insert; commit; select` keeps what was committed, as in production."""
    await app.execute(f"{ADD}; COMMIT; SELECT 2")
    assert await app.fetchval(COUNT) == 3
    async with app.acquire() as connection:
        await connection.execute(f"BEGIN; {ADD}; COMMIT; BEGIN; {ADD}")
        await connection.execute("ROLLBACK")
    assert await app.fetchval(COUNT) == 4


async def test_nested_transactions(app: Any) -> None:
    """Three deep, with a rollback in each."""
    async with app.acquire() as connection:
        async with connection.transaction():
            await connection.execute(ADD)
            async with connection.transaction():
                await connection.execute(ADD)
                inner = connection.transaction()
                await inner.start()
                await connection.execute(ADD)
                await inner.rollback()
                assert await connection.fetchval(COUNT) == 4
            lost = connection.transaction()
            await lost.start()
            await connection.execute(ADD)
            await lost.rollback()
        assert await connection.fetchval(COUNT) == 4
        assert not connection.is_in_transaction()


async def test_a_transaction_object_inside_of_a_raw_begin_is_refused_as_in_production(app: Any) -> None:
    """By asyncpg's own text."""
    async with app.acquire() as connection:
        await connection.execute("BEGIN")
        with pytest.raises(exceptions.InterfaceError, match="manually started transaction"):
            await connection.transaction().start()
        await connection.execute("ROLLBACK")


@pytest.mark.parametrize(
    "options",
    [
        {"isolation": "serializable"},
        {"isolation": "repeatable_read", "readonly": True},
        {"isolation": "serializable", "readonly": True, "deferrable": True},
        {"readonly": True},
    ],
)
async def test_modes_of_transactions(app: Any, options: dict[str, Any]) -> None:
    """Every argument is taken, and a read-only one refuses to write, but what follows may."""
    async with app.acquire() as connection:
        for _ in range(2):
            if options.get("readonly"):
                with pytest.raises(exceptions.ReadOnlySQLTransactionError):
                    async with connection.transaction(**options):
                        assert await connection.fetchval(COUNT) >= 2
                        await connection.execute(ADD)
                async with connection.transaction(**options):
                    assert await connection.fetchval("SHOW transaction_read_only") == "on"
            else:
                async with connection.transaction(**options):
                    await connection.execute(ADD)
            await connection.execute(ADD)
            assert await connection.fetchval("SHOW transaction_read_only") == "off"
        async with connection.transaction(isolation="serializable"):
            with pytest.raises(exceptions.InterfaceError, match="different isolation level"):
                await connection.transaction(isolation="read_committed").start()
    assert await app.fetchval(COUNT) == (4 if options.get("readonly") else 6)


async def test_and_chain(app: Any) -> None:
    """A chained commit begins the next transaction, with the same modes."""
    async with app.acquire() as connection:
        await connection.execute("BEGIN")
        await connection.execute(ADD)
        await connection.execute("COMMIT AND CHAIN")
        assert connection.is_in_transaction()
        await connection.execute(ADD)
        await connection.execute("ROLLBACK AND CHAIN")
        await connection.execute("ROLLBACK")
        await connection.execute("BEGIN READ ONLY")
        await connection.execute("COMMIT AND CHAIN")
        with pytest.raises(exceptions.ReadOnlySQLTransactionError):
            await connection.execute(ADD)
        await connection.execute("ROLLBACK")
        assert await connection.fetchval(COUNT) == 3
        with pytest.raises(exceptions.NoActiveSQLTransactionError):
            await connection.execute("COMMIT AND CHAIN")


async def test_reset_ends_an_open_transaction(app: Any) -> None:
    """conn.reset() and a release roll back."""
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    async with app.acquire() as connection:
        await connection.execute("BEGIN")
        await connection.execute(ADD)
        await connection.reset()
        assert not connection.is_in_transaction()
        await connection.execute("BEGIN")
        await connection.execute(ADD)
    assert await app.fetchval(COUNT) == 2


# -- cursors, prepared statements, COPY ---------------------------------------------------------------

NUMBERS = "SELECT generate_series(1, 10)"


async def test_cursors(app: Any) -> None:
    """Iterated, fetched, moved; outside of a transaction refused as by asyncpg."""
    async with app.acquire() as connection:
        async with connection.transaction():
            assert [row[0] async for row in connection.cursor(NUMBERS, prefetch=3)] == [*range(1, 11)]
            cursor = await connection.cursor(NUMBERS)
            assert await cursor.forward(2) == 2
            assert (await cursor.fetchrow())[0] == 3
            assert [row[0] for row in await cursor.fetch(3)] == [4, 5, 6]
            statement = await connection.prepare("SELECT generate_series(1, $1::int)")
            assert [row[0] async for row in statement.cursor(3, prefetch=2)] == [1, 2, 3]
        with pytest.raises(exceptions.NoActiveSQLTransactionError):
            await connection.cursor(NUMBERS)
        with pytest.raises(exceptions.NoActiveSQLTransactionError):
            _ = [row async for row in connection.cursor(NUMBERS)]


async def test_cursors_in_text(app: Any) -> None:
    """DECLARE, FETCH, CLOSE in a transaction; a held one outside, until the release."""
    async with app.acquire() as connection:
        await connection.execute("BEGIN")
        await connection.execute(f"DECLARE c CURSOR FOR {NUMBERS}")
        assert len(await connection.fetch("FETCH 4 FROM c")) == 4
        await connection.execute("COMMIT")
        with pytest.raises(exceptions.InvalidCursorNameError):
            await connection.fetch("FETCH 4 FROM c")
        await connection.execute(f"DECLARE h CURSOR WITH HOLD FOR {NUMBERS}")
        assert len(await connection.fetch("FETCH 4 FROM h")) == 4
    async with app.acquire() as connection:
        with pytest.raises(exceptions.InvalidCursorNameError):
            await connection.fetch("FETCH 4 FROM h")


async def test_a_statement_prepared_in_one_block_works_in_the_next(box: Box) -> None:
    """On the same connection, kept by whom it may concern: its cache."""
    lifespan, pool = await box.open(max_size=1)
    for _ in range(3):
        async with lifespan.sandbox(), pool.acquire() as connection:
            assert await connection.fetchval("SELECT $1::int + 1", 1) == 2
            statement = await connection.prepare("SELECT $1::int + 1")
            assert await statement.fetchval(4) == 5
            assert await statement.fetchmany([(1,), (2,)]) is not None


async def test_statements_without_a_cache_interleave(box: Box) -> None:
    """Unnamed statements of two connections do not mix, with statement_cache_size=0."""
    lifespan, pool = await box.open(statement_cache_size=0)
    for _ in range(2):
        async with lifespan.sandbox(), pool.acquire() as one, pool.acquire() as two:
            first, second = await one.prepare("SELECT 1"), await two.prepare("SELECT 'two', 2")
            assert tuple(await second.fetchrow()) == ("two", 2)
            assert await first.fetchval() == 1
            assert tuple(await second.fetchrow()) == ("two", 2)
            await asyncio.gather(
                *(each.fetch("SELECT $1::int", n) for n, each in enumerate((one, two)) for _ in "a")
            )
    assert box.outside.ask("SELECT 1") == 1


async def test_copy_both_ways(app: Any) -> None:
    """Records in, query and table out; a failing COPY undoes itself alone."""
    got: list[bytes] = []

    async def sink(data: bytes) -> None:
        got.append(data)

    async def source() -> AsyncGenerator[bytes]:
        yield b"7\n"
        yield b"8\n"

    copied = {"schema_name": "app", "columns": ["v"]}
    assert await app.copy_records_to_table("item", records=[(3,), (4,)], **copied) == "COPY 2"
    with pytest.raises(exceptions.CheckViolationError):
        await app.copy_records_to_table("item", records=[(3,), (-4,)], **copied)
    with pytest.raises(TypeError):
        await app.copy_records_to_table("item", records=[(3,), ("text",)], **copied)
    assert await app.copy_to_table("item", source=source(), **copied) == "COPY 2"
    assert await app.copy_from_query("SELECT v FROM app.item ORDER BY id", output=sink) == "COPY 6"
    assert b"".join(got).split() == [b"10", b"20", b"3", b"4", b"7", b"8"]
    async with app.acquire() as connection, connection.transaction():
        await connection.copy_records_to_table("item", records=[(5,)], **copied)
        assert await connection.copy_from_table("item", output=sink, **copied) == "COPY 7"
    with pytest.raises(exceptions.DivisionByZeroError):
        await app.copy_from_query("SELECT 1/0", output=sink)
    assert await app.fetchval(COUNT) == 7


async def test_executemany_is_all_or_nothing(app: Any) -> None:
    """A failing row takes those before it along."""
    add = "INSERT INTO app.item (v) VALUES ($1)"
    await app.executemany(add, [(1,), (2,)])
    for bad in (-3, "text"):
        with pytest.raises((exceptions.CheckViolationError, exceptions.DataError)):
            await app.executemany(add, [(1,), (2,), (bad,)])
    assert await app.fetchval(COUNT) == 4
    rows = await app.fetchmany(f"{add} RETURNING v", [(5,), (6,)])
    assert [row["v"] for row in rows] == [5, 6]


# -- what the pool was made with ---------------------------------------------------------------------


class OwnConnection(asyncpg.Connection):
    """A user's class."""

    async def count(self) -> Any:
        """A method of its own."""
        return await self.fetchval(COUNT)

    def get_reset_query(self) -> str:
        """One more statement, which asyncpg sends at each release."""
        return super().get_reset_query() + "\nSET application_name = 'released';"


class OwnRecord(asyncpg.Record):
    """A user's class."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


async def test_own_classes(box: Box) -> None:
    """connection_class and record_class, with a reset query of its own."""
    lifespan, pool = await box.open(connection_class=OwnConnection, record_class=OwnRecord)
    async with lifespan.sandbox():
        async with pool.acquire() as connection:
            assert isinstance(connection._con, OwnConnection)
            assert await connection.count() == 2
            assert (await connection.fetchrow("SELECT 3 AS three")).three == 3
            await connection.execute("SET work_mem = '99kB'")
        assert await pool.fetchval("SHOW work_mem") == "4MB"


async def test_hooks_of_the_pool(box: Box) -> None:
    """init once for each connection, setup at each acquire, reset at each release."""
    calls: list[str] = []

    def hook(name: str) -> Callable[[Any], Any]:
        async def called(connection: Any) -> None:
            calls.append(name)
            assert isinstance(connection, asyncpg.Connection)
            await connection.execute(f"SET app.{name} = 'done'")

        return called

    lifespan, pool = await box.open(init=hook("init"), setup=hook("setup"), reset=hook("reset"))
    assert calls[:1] == ["init"]
    async with lifespan.sandbox():
        calls.clear()
        async with pool.acquire() as connection:
            assert await connection.fetchval("SELECT current_setting('app.setup')") == "done"
        await pool.fetchval("SELECT 1")
    assert calls == ["setup", "reset", "setup", "reset"]
    async with lifespan.sandbox():
        assert await pool.fetchval("SELECT current_setting('app.setup')") == "done"


async def test_what_init_waits_for_is_told(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lifekit._sandbox.postgres.session.PATIENCE", 0.1)

    async def init(connection: Any) -> None:
        await connection.execute("SELECT 1")

    lifespan, pool = await box.open(init=init)
    async with lifespan.sandbox(), pool.acquire() as first, first.transaction():
        await first.execute(ADD)
        with pytest.raises(exceptions.LockNotAvailableError, match="has a transaction open") as caught:
            await pool.acquire()
    assert "in test_what_init_waits_for_is_told" in str(caught.value)


async def test_type_codecs(box: Box) -> None:
    """Set by init, and on one connection by hand, in several blocks."""

    async def init(connection: Any) -> None:
        await connection.set_type_codec(
            "jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads
        )

    lifespan, pool = await box.open(init=init)
    for _ in range(2):
        async with lifespan.sandbox():
            assert await pool.fetchval("SELECT $1::jsonb", {"a": [1]}) == {"a": [1]}
            await pool.execute("CREATE TYPE app.mood AS ENUM ('fine', 'sad')")
            await pool.execute("CREATE TABLE app.moods (mood app.mood, pair app.parent)")
            await pool.execute("INSERT INTO app.moods VALUES ($1, $2)", "sad", (1, "x"))
            assert tuple(await pool.fetchrow("SELECT * FROM app.moods")) == ("sad", (1, "x"))


async def test_a_type_made_anew_in_each_block(box: Box) -> None:
    """Its number differs, and nothing of the former is remembered."""
    lifespan, pool = await box.open()
    for columns, value in (
        ("a int, b text", (1, "b")),
        ("c text", ("c",)),
        ("a int, b text", (1, "b")),
    ):
        async with lifespan.sandbox():
            await pool.execute(f"CREATE TYPE app.pair AS ({columns})")
            await pool.execute("CREATE TABLE app.pairs (pair app.pair)")
            await pool.execute("INSERT INTO app.pairs VALUES ($1)", value)
            assert tuple(await pool.fetchval("SELECT pair FROM app.pairs")) == value


# -- constraints that wait ----------------------------------------------------------------------------

ORPHAN = "INSERT INTO app.child VALUES (9, 9, NULL, 9)"


@BOTH_LOOPS
async def test_deferred_constraints_are_checked_at_the_applications_commit(app: Any) -> None:
    """Not before; and they are deferred again afterwards."""
    for _ in range(2):
        async with app.acquire() as connection:
            with pytest.raises(exceptions.ForeignKeyViolationError, match="child_parent_fkey"):
                async with connection.transaction():
                    await connection.execute(ORPHAN)
                    assert await connection.fetchval("SELECT count(*) FROM app.child") == 2
            assert not connection.is_in_transaction()
            assert await connection.fetchval("SELECT count(*) FROM app.child") == 1
            async with connection.transaction():
                await connection.execute(ORPHAN)
                await connection.execute("INSERT INTO app.parent VALUES (9)")
            await connection.execute("DELETE FROM app.child WHERE id = 9")
            await connection.execute("DELETE FROM app.parent WHERE id = 9")


async def test_deferred_constraints_are_checked_after_a_statement_of_its_own(app: Any) -> None:
    """Without a transaction the statement fails, and is undone; one that is kept by its end is fine."""
    with pytest.raises(exceptions.ForeignKeyViolationError):
        await app.execute(ORPHAN)
    with pytest.raises(exceptions.UniqueViolationError, match="child_u"):
        await app.execute("INSERT INTO app.child VALUES (3, 1, 1, 1)")
    assert await app.fetchval("SELECT count(*) FROM app.child") == 1
    await app.execute(f"{ORPHAN}; INSERT INTO app.parent VALUES (9)")
    assert await app.fetchval("SELECT count(*) FROM app.child") == 2


async def test_set_constraints_lasts_for_its_transaction(app: Any) -> None:
    """IMMEDIATE bites at once, DEFERRED waits, and the next transaction begins as declared."""
    strict = "INSERT INTO app.child VALUES (5, NULL, 5, 5)"
    async with app.acquire() as connection:
        with pytest.raises(exceptions.ForeignKeyViolationError):
            async with connection.transaction():
                await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
                try:
                    await connection.execute(ORPHAN)
                except exceptions.ForeignKeyViolationError:
                    raise
                pytest.fail("it was to bite at once")
        async with connection.transaction():
            await connection.execute("SET CONSTRAINTS app.child_strict_fkey DEFERRED")
            await connection.execute(strict)
            await connection.execute("INSERT INTO app.parent VALUES (5)")
        await connection.execute("DELETE FROM app.child WHERE id = 5")
        await connection.execute("DELETE FROM app.parent WHERE id = 5")
        async with connection.transaction():
            with pytest.raises(exceptions.ForeignKeyViolationError):
                async with connection.transaction():
                    await connection.execute(strict)
                    pytest.fail("it was to be immediate again")
        await connection.execute("SET CONSTRAINTS ALL DEFERRED")
        with pytest.raises(exceptions.ForeignKeyViolationError):
            await connection.execute(strict)


async def test_constraint_triggers_run_at_the_commit_once(app: Any) -> None:
    """With their side effects, and their errors."""
    async with app.acquire() as connection:
        async with connection.transaction():
            await connection.execute("INSERT INTO app.watched VALUES (1)")
            assert await connection.fetchval("SELECT count(*) FROM app.log") == 0
        assert await connection.fetchval("SELECT count(*) FROM app.log") == 1
        await connection.execute("INSERT INTO app.watched VALUES (2)")
        assert await connection.fetchval("SELECT count(*) FROM app.log") == 2
        with pytest.raises(exceptions.RaiseError, match="watched: -1"):
            await connection.execute("INSERT INTO app.watched VALUES (-1)")
        assert await connection.fetchval("SELECT count(*) FROM app.log") == 2


async def test_a_deferrable_constraint_made_in_the_block_is_checked(app: Any) -> None:
    """What is known of the schema is asked again."""
    await app.execute("CREATE TABLE app.fresh (a int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    await app.execute("INSERT INTO app.fresh VALUES (1)")
    with pytest.raises(exceptions.UniqueViolationError):
        await app.execute("INSERT INTO app.fresh VALUES (1)")


# -- the session --------------------------------------------------------------------------------------


async def test_set_local_ends_with_the_applications_transaction(app: Any) -> None:
    """Whether it commits or not, by SET LOCAL and by set_config."""
    async with app.acquire() as connection:
        for end in ("COMMIT", "ROLLBACK"):
            await connection.execute("BEGIN")
            await connection.execute("SET LOCAL work_mem = '100kB'")
            await connection.fetchval("SELECT set_config('app.name', $1, true)", "ann")
            assert await connection.fetchval("SHOW work_mem") == "100kB"
            await connection.execute(end)
            assert await connection.fetchval("SHOW work_mem") == "4MB"
            assert not await connection.fetchval("SELECT current_setting('app.name', true)")


async def test_set_local_outside_of_a_transaction_does_nothing(app: Any) -> None:
    """PostgreSQL warns, and forgets it."""
    await app.execute("SET LOCAL work_mem = '100kB'")
    assert await app.fetchval("SHOW work_mem") == "4MB"
    await app.fetchval("SELECT set_config('work_mem', '100kB', true)")
    assert await app.fetchval("SHOW work_mem") == "4MB"


async def test_what_a_session_set_ends_with_its_release(box: Box) -> None:
    """Not with its statement or transaction, and not only with the block."""
    lifespan, pool = await box.open()
    async with lifespan.sandbox():
        async with pool.acquire() as connection:
            await connection.execute("SET work_mem = '100kB'")
            async with connection.transaction():
                await connection.execute("SET search_path = app")
            assert await connection.fetchval("SELECT count(*) FROM item") == 2
            assert await connection.fetchval("SHOW work_mem") == "100kB"
        assert await pool.fetchval("SHOW work_mem") == "4MB"
        async with pool.acquire() as connection:
            await connection.execute("SET work_mem = '100kB'")
    async with lifespan.sandbox():
        assert await pool.fetchval("SHOW work_mem") == "4MB"


LOCKED = """SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = database
WHERE locktype = 'advisory' AND datname = current_database()"""


async def test_advisory_locks_are_released(box: Box) -> None:
    """Those of the session as well, at the block's end."""
    lifespan, pool = await box.open()
    async with lifespan.sandbox(), pool.acquire() as connection:
        await connection.fetchval("SELECT pg_advisory_lock(1)")
        async with connection.transaction():
            await connection.fetchval("SELECT pg_advisory_xact_lock(2)")
        await connection.fetchval("SELECT pg_advisory_lock(3)")
        assert box.outside.ask(LOCKED) > 0
    assert box.outside.ask(LOCKED) == 0


async def test_prepare_in_text_ends_with_the_block(box: Box) -> None:
    """A rollback does not take back PREPARE; what takes all statements away takes one's own."""
    lifespan, pool = await box.open()
    for _ in range(2):
        async with lifespan.sandbox(), pool.acquire() as connection:
            await connection.execute("PREPARE own AS SELECT 5")
            assert await connection.fetchval("EXECUTE own") == 5
            await connection.execute("DISCARD PLANS")
            for sql in ("DEALLOCATE own", "DEALLOCATE ALL", "DISCARD ALL"):
                await connection.execute(sql)
                with pytest.raises(
                    exceptions.InvalidSQLStatementNameError, match='"own" does not exist'
                ):
                    await connection.execute("EXECUTE own")
                await connection.execute("PREPARE own AS SELECT 5")
        async with lifespan.sandbox():
            await pool.expire_connections()  # asyncpg believes that it has statements
    async with lifespan.sandbox():
        with pytest.raises(exceptions.InvalidSQLStatementNameError, match='"own" does not exist'):
            await pool.execute("EXECUTE own")
        await pool.execute(ADD)


async def test_a_session_begins_without_a_sequences_last_value(box: Box) -> None:
    """currval() and lastval() of an earlier block are not this one's."""
    lifespan, pool = await box.open()
    async with lifespan.sandbox():
        await pool.execute(ADD)
        assert await pool.fetchval("SELECT lastval() > 0")
    async with lifespan.sandbox():
        with pytest.raises(exceptions.ObjectNotInPrerequisiteStateError):
            await pool.fetchval("SELECT lastval()")


async def test_nothing_is_left_on_the_real_connection(box: Box) -> None:
    """After many blocks: no more connections, statements, locks or channels than after the second."""
    lifespan, pool = await box.open()
    left = """SELECT (SELECT count(*) FROM pg_prepared_statements) * 1000000
        + (SELECT count(*) FROM pg_cursors) * 1000 + (SELECT count(*) FROM pg_listening_channels())"""

    async def block() -> Any:
        async with lifespan.sandbox():
            async with pool.acquire() as connection, connection.transaction():
                await connection.execute(ADD)
                await connection.fetch("SELECT $1::int", 1)
                statement = await connection.prepare("SELECT 1, 2")
                await statement.fetch()
                _ = [row async for row in connection.cursor(NUMBERS)]
            await pool.execute("NOTIFY nobody")
            del statement
            gc.collect()
            return await pool.fetchval(left)

    await block()
    after_two = await block()
    sessions = box.outside.sessions()
    last = max([await block() for _ in range(4)])
    assert last <= after_two
    assert box.outside.sessions() == sessions


async def test_a_listener_hears_what_the_block_sends(box: Box) -> None:
    """The one of the application's start, and one of the block."""
    lifespan, pool = await box.open()
    heard: list[str] = []

    def hear(*told: Any) -> None:
        heard.append(told[-1])

    async with pool.acquire() as first, pool.acquire() as second:
        await first.add_listener("news", hear)
        async with lifespan.sandbox():
            await second.add_listener("news", hear)
            await pool.execute("NOTIFY news, 'one'")
            await pool.execute("SELECT pg_notify('news', $1)", "two")
            await second.remove_listener("news", hear)
            await pool.execute("NOTIFY news, 'three'")
        assert heard == ["one", "one", "two", "two", "three"]
        await first.remove_listener("news", hear)


# -- what can't be done -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "PREPARE TRANSACTION 'a'",
        "COMMIT PREPARED 'a'",
        "ROLLBACK PREPARED 'a'",
        "VACUUM",
        "VACUUM app.item",
        "CREATE DATABASE more",
        "DROP DATABASE template1",
        "ALTER SYSTEM SET work_mem = '1MB'",
        "CREATE INDEX CONCURRENTLY own ON app.item (v)",
        "DO $$ BEGIN INSERT INTO app.item (v) VALUES (1); COMMIT; END $$",
    ],
)
async def test_what_needs_no_transaction_is_refused_with_the_way_out(app: Any, sql: str) -> None:
    """And has no effect; what follows works."""
    await app.execute(ADD)
    with pytest.raises(exceptions.PostgresError, match=r"isolation=\"none\""):
        await app.execute(sql)
    with pytest.raises(exceptions.PostgresError, match=r"isolation=\"none\""):
        await app.fetch(sql)
    await app.execute(ADD)
    assert await app.fetchval(COUNT) == 4


# -- waiting ------------------------------------------------------------------------------------------


async def test_max_size_and_the_acquire_timeout_bite(box: Box) -> None:
    """As in production."""
    lifespan, pool = await box.open(max_size=2)
    async with lifespan.sandbox(), pool.acquire(), pool.acquire():
        assert (pool.get_size(), pool.get_idle_size(), pool.get_max_size()) == (2, 0, 2)
        with pytest.raises(TimeoutError):
            await pool.acquire(timeout=0.01)
        waiter = asyncio.create_task(pool.fetchval("SELECT 1"))
        await asyncio.sleep(0)
        assert not waiter.done()
        waiter.cancel()
    async with lifespan.sandbox(), pool.acquire() as one:
        held = await pool.acquire()
        waiter = asyncio.create_task(pool.fetchval("SELECT 1"))
        await pool.release(held)
        assert await waiter == 1
        assert await one.fetchval("SELECT 2") == 2


@BOTH_LOOPS
async def test_a_task_that_holds_them_all_and_wants_one_more_is_told(box: Box) -> None:
    """It would hang in production."""
    lifespan, pool = await box.open(max_size=2)
    async with lifespan.sandbox(), pool.acquire(), pool.acquire():
        with pytest.raises(SandboxBusyError, match="all held by the task") as caught:
            await pool.fetchval("SELECT 1")
    assert str(caught.value).count("test_asyncpg.py:") == 2


def told_of_both(error: Exception) -> bool:
    """Whether it names two acquire lines, of this file."""
    text = str(error)
    return text.count("test_asyncpg.py:") >= 2 and "Pass the connection on" in text


@BOTH_LOOPS
async def test_the_same_task_waiting_for_its_own_transaction_is_told(app: Any) -> None:
    """With both acquire lines, and the transaction goes on."""
    async with app.acquire() as connection, connection.transaction():
        await connection.execute(ADD)
        with pytest.raises(exceptions.LockNotAvailableError) as caught, anyio.fail_after(60):
            await app.execute(ADD)
        assert told_of_both(caught.value)
        await connection.execute(ADD)
    assert await app.fetchval(COUNT) == 4


DRIVERS = (
    exceptions.PostgresError,
    exceptions.InterfaceError,
    exceptions.InternalClientError,
    OSError,
)
"""What asyncpg raises when its connection is lost."""


async def by_gather(one: Any) -> None:
    """Await it in a gather()."""
    await asyncio.gather(asyncio.sleep(0), one)


async def by_group(one: Any) -> None:
    """Await it in a task group."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(one)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def by_anyio(one: Any) -> None:
    """Await it in a task group of AnyIO's."""

    async def run() -> None:
        await one

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(run)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def by_task(one: Any) -> None:
    """Await a task."""
    await asyncio.create_task(one)


async def by_shield(one: Any) -> None:
    """Await a shielded task."""
    await asyncio.shield(asyncio.create_task(one))


async def by_wait(one: Any) -> None:
    """Await by asyncio.wait()."""
    done, _ = await asyncio.wait([asyncio.create_task(one)])
    await done.pop()


async def by_wait_for(one: Any) -> None:
    """Await by asyncio.wait_for()."""
    await asyncio.wait_for(one, 30)


async def by_completed(one: Any) -> None:
    """Await by as_completed()."""
    for each in asyncio.as_completed([one]):
        await each


@BOTH_LOOPS
@pytest.mark.parametrize("way", [by_gather, by_group, by_anyio, by_task])
async def test_a_cycle_of_tasks_is_told_at_once(app: Any, way: Any) -> None:
    """A transaction awaits a task that asks for a connection of its own."""

    async def add() -> None:
        await app.execute(ADD)

    async with app.acquire() as connection, connection.transaction():
        await connection.execute(ADD)
        with pytest.raises(exceptions.LockNotAvailableError) as caught, anyio.fail_after(60):
            await way(add())
        assert told_of_both(caught.value)
        await connection.execute(ADD)


@pytest.mark.parametrize("way", [by_wait, by_completed, by_shield, by_wait_for])
async def test_a_cycle_that_is_not_seen_at_once_is_told_after_a_while(
    app: Any, way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what is awaited can't be known the patience ends: it never hangs."""
    monkeypatch.setattr("lifekit._sandbox.postgres.session.PATIENCE", 0.1)

    async def add() -> None:
        await app.execute(ADD)

    async with app.acquire() as connection, connection.transaction():
        await connection.execute(ADD)
        with pytest.raises(exceptions.LockNotAvailableError) as caught, anyio.fail_after(60):
            await way(add())
        assert told_of_both(caught.value)


async def test_a_wait_that_ends_is_no_cycle(app: Any) -> None:
    """Another task's transaction is waited for."""
    inside, go = asyncio.Event(), asyncio.Event()

    async def transaction() -> None:
        async with app.acquire() as connection, connection.transaction():
            await connection.execute(ADD)
            inside.set()
            await go.wait()
            await connection.execute(ADD)

    task = asyncio.create_task(transaction())
    await inside.wait()
    counting = asyncio.create_task(app.fetchval(COUNT))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not counting.done()
    go.set()
    assert await counting == 4
    await task


async def test_the_command_timeout_bites_while_waiting(box: Box) -> None:
    """The pool's and the call's own."""
    lifespan, pool = await box.open(command_timeout=0.2)
    async with lifespan.sandbox():
        inside, go = asyncio.Event(), asyncio.Event()

        async def transaction() -> None:
            async with pool.acquire() as connection, connection.transaction():
                await connection.execute(ADD)
                inside.set()
                await go.wait()

        task = asyncio.create_task(transaction())
        await inside.wait()
        async with pool.acquire() as connection:
            for waiting in (connection.execute(ADD), connection.fetchval(COUNT, timeout=0.3)):
                with pytest.raises(TimeoutError):
                    await waiting
            go.set()
            await task
            assert await connection.fetchval(COUNT) == 3


async def test_a_statement_that_takes_too_long_is_undone(app: Any, outside: Outside) -> None:
    """Outside of a transaction it alone; inside it aborts the transaction."""
    async with app.acquire() as connection:
        await connection.execute(ADD)
        task = await asleep(outside.ask, connection.execute(f"{ADD}; SELECT pg_sleep(60)", timeout=20))
        pass_time(20)
        with pytest.raises(TimeoutError):
            await task
        assert await connection.fetchval(COUNT) == 3
        await connection.execute("BEGIN")
        await connection.execute(ADD)
        task = await asleep(outside.ask, connection.fetch("SELECT pg_sleep(60)", timeout=20))
        pass_time(20)
        with pytest.raises(TimeoutError):
            await task
        with pytest.raises(exceptions.InFailedSQLTransactionError):
            await connection.execute("SELECT 1")
        await connection.execute("ROLLBACK")
        assert await connection.fetchval(COUNT) == 3


# -- cancellation -------------------------------------------------------------------------------------


async def mixed(pool: Any) -> None:
    """A workload with some of everything."""
    await pool.execute(ADD)
    async with pool.acquire() as connection:
        async with connection.transaction(readonly=True):
            await connection.fetch("SELECT $1::int", 1)
        async with connection.transaction():
            await connection.execute(ORPHAN)
            async with connection.transaction():
                await connection.execute("INSERT INTO app.parent VALUES (9)")
            await connection.execute("SET LOCAL work_mem = '100kB'")
            _ = [row async for row in connection.cursor(NUMBERS, prefetch=5)]
        with suppress(exceptions.DivisionByZeroError):
            await connection.execute("SELECT 1/0")
        await connection.execute("SET work_mem = '200kB'")
        await connection.copy_records_to_table("item", schema_name="app", columns=["v"], records=[(1,)])
        await connection.executemany("INSERT INTO app.item (v) VALUES ($1)", [(1,), (2,)])
        await (await connection.prepare("SELECT 1")).fetch()
    await asyncio.gather(pool.execute(ADD), pool.execute(ADD))


class Steps:
    """Runs a coroutine, and throws a cancellation in at its k-th suspension."""

    def __init__(self, coroutine: Any, cancel_at: int) -> None:
        self._coroutine = coroutine
        self._left = cancel_at
        self.cancelled = False

    def __await__(self) -> Any:
        iterator = self._coroutine.__await__()
        result: Any = None
        while True:
            try:
                waits = iterator.send(result)
            except StopIteration as end:
                return end.value
            self._left -= 1
            if self._left == 0:
                task = asyncio.current_task()
                assert task is not None
                self.cancelled = True
                task.cancel()
            try:
                result = cast(Any, (yield waits))
            except BaseException as error:
                try:
                    waits = iterator.throw(error)
                except StopIteration as end:
                    return end.value
                result = cast(Any, (yield waits))


@BOTH_LOOPS
async def test_cancellation_at_every_suspension_recovers(box: Box) -> None:
    """Whichever await of a workload is cut, the sandbox goes on working and leaves nothing."""
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    lifespan, pool = await box.open(max_size=3)
    at = 0
    for at in range(1, 1000):
        async with lifespan.sandbox():

            async def cut(at: int = at) -> bool:
                steps = Steps(mixed(pool), at)
                await steps
                return steps.cancelled

            task = asyncio.create_task(cut())
            try:
                with anyio.fail_after(60):
                    cancelled = await asyncio.shield(task)
            except asyncio.CancelledError:
                cancelled = True
            await settled(pool)
            with anyio.fail_after(60):
                assert await pool.fetchval("SHOW work_mem") == "4MB", at
                assert await pool.fetchval(COUNT) <= 9, at
                await pool.execute(ADD)
                async with pool.acquire() as connection, connection.transaction():
                    await connection.execute(ADD)
        if not cancelled:
            break
    assert at > 20


async def settled(pool: Any) -> None:
    """Wait until every connection is back."""
    with anyio.fail_after(60):
        while pool.get_size() != pool.get_idle_size():
            await checkpoint()


# -- strays -------------------------------------------------------------------------------------------


async def test_a_connection_not_given_back_is_named(box: Box) -> None:
    """By its acquire line and task; it is closed, and the next block works."""
    lifespan, pool = await box.open()
    connection: Any = None
    with pytest.raises(SandboxEscapedError, match=r"test_asyncpg\.py:\d+ in ") as caught:
        async with lifespan.sandbox():
            connection = await pool.acquire()
            await connection.execute(ADD)
    assert "in a transaction" not in str(caught.value)
    with pytest.raises(exceptions.InterfaceError):
        await connection.fetchval(COUNT)
    async with lifespan.sandbox():
        assert await pool.fetchval(COUNT) == 2


async def test_an_open_transaction_is_named(box: Box) -> None:
    """As one."""
    lifespan, pool = await box.open()
    with pytest.raises(SandboxEscapedError, match="connection in a transaction acquired at"):
        async with lifespan.sandbox():
            connection = await pool.acquire()
            await connection.fetchval("SELECT pg_advisory_lock(5)")
            await connection.execute("BEGIN")
            await connection.execute(ADD)
    async with lifespan.sandbox():
        assert await pool.fetchval(COUNT) == 2


@BOTH_LOOPS
async def test_a_task_that_still_holds_one_is_named(box: Box) -> None:
    """By its name, coroutine and where it stands; a later use of the pool by it is refused."""
    lifespan, pool = await box.open()
    go, refused = asyncio.Event(), asyncio.Event()

    async def straggler() -> None:
        try:
            async with pool.acquire() as connection:
                await connection.execute(ADD)
                holding.set()
                await go.wait()
                await connection.execute(ADD)
        except exceptions.InterfaceError:
            pass
        with pytest.raises(SandboxEscapedError, match="has ended"):
            await pool.execute(ADD)
        refused.set()

    holding = asyncio.Event()
    task: Any = None
    with pytest.raises(SandboxEscapedError) as caught:
        async with lifespan.sandbox():
            task = asyncio.create_task(straggler(), name="late one")
            await holding.wait()
    text = str(caught.value)
    assert "'late one'" in text
    assert "straggler" in text
    assert text.count("test_asyncpg.py:") == 2
    go.set()
    await task
    assert refused.is_set()
    async with lifespan.sandbox():
        assert await pool.fetchval(COUNT) == 2


async def test_a_task_in_the_midst_of_a_statement_at_the_end(box: Box) -> None:
    """It is cut off, and the end does not wait for it."""
    lifespan, pool = await box.open()
    task: Any = None
    with pytest.raises(SandboxEscapedError), anyio.fail_after(60):
        async with lifespan.sandbox():
            task = await asleep(box.outside.ask, pool.execute(f"{ADD}; SELECT pg_sleep(300)"))
    with pytest.raises(Exception, match=r".+"), anyio.fail_after(60):
        await task
    async with lifespan.sandbox():
        assert await pool.fetchval(COUNT) == 2


async def test_a_block_fails_with_its_own_error_and_a_note_of_the_strays(box: Box) -> None:
    """The test's own failure comes first."""
    lifespan, pool = await box.open()
    with pytest.raises(LookupError) as caught:
        async with lifespan.sandbox():
            await pool.acquire()
            raise LookupError("mine")
    assert "not been given back" in "".join(caught.value.__notes__)


async def test_a_connection_from_before_the_block_is_in_it_as_well(box: Box) -> None:
    """What it does is undone; it can be given back inside, and is whole afterwards."""
    lifespan, pool = await box.open(max_size=2)
    early, other = await pool.acquire(), await pool.acquire()
    async with lifespan.sandbox():
        await early.execute(ADD)
        async with other.transaction():
            await other.execute("INSERT INTO app.item (v) VALUES ($1)", 3)
        assert await other.fetchval(COUNT) == 4
        assert box.outside.ask(COUNT) == 2
        await pool.release(early)
        assert await pool.fetchval(COUNT) == 4
    assert await other.fetchval(COUNT) == 2
    await pool.release(other)
    assert await pool.fetchval(COUNT) == 2
    assert pool.get_idle_size() == pool.get_size()


# -- the pool's own life ------------------------------------------------------------------------------


async def test_expiring_connections_inside(box: Box) -> None:
    """What they did stays in the block, and ends with it."""
    lifespan, pool = await box.open()
    async with lifespan.sandbox():
        await pool.execute(ADD)
        await pool.expire_connections()
        assert await pool.fetchval(COUNT) == 3
    async with lifespan.sandbox():
        assert await pool.fetchval(COUNT) == 2
    assert await pool.fetchval(COUNT) == 2


async def test_the_lifespan_closing_while_a_block_is_active(box: Box, outside: Outside) -> None:
    """Everything is undone, and nothing hangs."""
    registry = Registry("closing", close_timeout=60)

    @registry.resource
    async def pool() -> Any:
        return asyncpg.create_pool(outside.url, min_size=0, max_size=2)

    handle: Any = pool
    block: Any = None
    with anyio.fail_after(60):
        with sandboxing():
            async with registry.lifespan() as lifespan:
                block = lifespan.sandbox()
                await block.__aenter__()
                await lifespan[handle].execute(ADD)
        await block.__aexit__(None, None, None)


async def test_without_sandboxing_there_is_no_block(outside: Outside) -> None:
    """The error says what to write."""
    registry = Registry("plain")

    @registry.resource
    async def pool() -> Any:
        return asyncpg.create_pool(outside.url, min_size=0, max_size=2)

    async with registry.lifespan() as lifespan:
        with pytest.raises(SandboxError, match="sandboxing"):
            async with lifespan.sandbox():
                pytest.fail("it must not begin")


async def test_ddl_is_undone(box: Box) -> None:
    """And another table of the name in the next block is its own, with other columns."""
    lifespan, pool = await box.open()
    for column in ("a int", "b text", "a int, b text"):
        async with lifespan.sandbox():
            await pool.execute(f"CREATE TABLE app.fresh ({column})")
            await pool.execute("INSERT INTO app.fresh DEFAULT VALUES")
            names = list((await pool.fetchrow("SELECT * FROM app.fresh")).keys())
            assert names == [each.split()[0] for each in column.split(", ")]
            await pool.execute("ALTER TABLE app.item ADD COLUMN more int")
            assert len(await pool.fetchrow("SELECT * FROM app.item")) == 3
        async with lifespan.sandbox():
            assert len(await pool.fetchrow("SELECT * FROM app.item")) == 2


async def test_truncate_and_sequences(box: Box) -> None:
    """TRUNCATE is undone; what a sequence gave it does not take back."""
    lifespan, pool = await box.open()
    async with lifespan.sandbox():
        before = await pool.fetchval("SELECT nextval('app.item_id_seq')")
        await pool.execute("TRUNCATE app.item RESTART IDENTITY")
        assert await pool.fetchval("INSERT INTO app.item (v) VALUES (1) RETURNING id") == 1
    async with lifespan.sandbox():
        assert await pool.fetchval("SELECT nextval('app.item_id_seq')") == before + 1


# -- the server goes ----------------------------------------------------------------------------------


@BOTH_LOOPS
async def test_the_real_connection_killed_during_a_block(box: Box) -> None:
    """Statements fail as the driver's do, nothing hangs, and the next block works."""
    lifespan, pool = await box.open()
    with anyio.fail_after(60):
        async with lifespan.sandbox():
            await pool.execute(ADD)
            async with pool.acquire() as connection:
                pid = await connection.fetchval("SELECT pg_backend_pid()")
                box.outside.ask("SELECT pg_terminate_backend(%s)", pid)
                await box.outside.until(f"SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = {pid}")
                with pytest.raises(DRIVERS):
                    await connection.execute(ADD)
                with pytest.raises(DRIVERS):
                    await connection.fetchval(COUNT)
        async with lifespan.sandbox():
            assert await pool.fetchval(COUNT) == 2
            await pool.execute(ADD)


async def test_the_real_connection_killed_in_a_statement_of_a_transaction(box: Box) -> None:
    """While another task waits for its turn."""
    lifespan, pool = await box.open()

    async def transaction() -> None:
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("SELECT pg_sleep(300)")

    with anyio.fail_after(60):
        async with lifespan.sandbox():
            sleeping = await asleep(box.outside.ask, transaction())
            waiting = asyncio.create_task(pool.execute(ADD))
            box.outside.ask(f"SELECT count(pg_terminate_backend(pid)) {SLEEPING}")
            results = await asyncio.gather(sleeping, waiting, return_exceptions=True)
            assert isinstance(results[0], DRIVERS)
            # The other one may have had its own connection only afterwards.
            assert isinstance(results[1], DRIVERS) or results[1] == "INSERT 0 1"
        async with lifespan.sandbox():
            assert await pool.fetchval(COUNT) == 2


async def test_the_whole_server_stopped_during_a_block(outside: Outside) -> None:
    """No hang; blocks fail while it is away."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(embedded.postgres())
        lifespan, pool = await Box(outside, stack).open(server.url, min_size=0)
        with anyio.fail_after(60):
            async with lifespan.sandbox():
                await pool.execute("CREATE TABLE t (a int)")
                async with pool.acquire() as connection:
                    await connection.execute("INSERT INTO t VALUES (1)")
                    assert server.pid is not None
                    os.kill(server.pid, signal.SIGQUIT)
                    with pytest.raises(DRIVERS):
                        while True:
                            await connection.execute("SELECT pg_sleep(0.01)")
                with pytest.raises(DRIVERS):
                    await pool.fetchval("SELECT 1")
            with pytest.raises((exceptions.PostgresError, OSError)):
                async with lifespan.sandbox():
                    await pool.fetchval("SELECT 1")


# -- who waits while a block begins or ends ---------------------------------------------------------


async def test_who_waits_for_a_connection_when_the_block_ends_gets_none(box: Box) -> None:
    lifespan, pool = await box.open(max_size=1)
    stack, late = AsyncExitStack(), None
    with pytest.raises(SandboxEscapedError, match="had not been given back"):
        async with stack, lifespan.sandbox():
            await pool.acquire()
            late = asyncio.create_task(pool.execute(ADD))
            await asyncio.sleep(0)
    assert late is not None
    with pytest.raises(SandboxEscapedError, match="which has ended"):
        await late
    async with lifespan.sandbox():
        assert await pool.fetchval(COUNT) == 2
    assert await pool.fetchval(COUNT) == 2


async def test_a_worker_that_waits_when_a_block_begins_works_inside_it(box: Box) -> None:
    lifespan, pool = await box.open(max_size=1)
    for leave in ("close", "release"):
        held = await pool.acquire()
        worker = asyncio.create_task(pool.execute(ADD))
        await asyncio.sleep(0)
        async with lifespan.sandbox():
            if leave == "close":
                await held.close()
            await pool.release(held)
            await worker
            assert await pool.fetchval(COUNT) == 3
        assert await pool.fetchval(COUNT) == 2
        assert box.outside.ask(COUNT) == 2
    async with pool.acquire() as connection:  # the real thing again
        await connection.execute("CREATE TABLE app.lasting (a int)")
    assert box.outside.ask("SELECT count(*) FROM app.lasting") == 0
    await pool.execute("DROP TABLE app.lasting")


async def test_a_connection_in_the_making_when_the_block_ends_does_nothing_more(box: Box) -> None:
    made = asyncio.Event()

    async def setup(connection: Any) -> None:
        if late is not None:
            await made.wait()

    late: Any = None
    lifespan, pool = await box.open(setup=setup)
    async with lifespan.sandbox():
        late = asyncio.create_task(pool.execute(ADD))
        await asyncio.sleep(0)
    made.set()
    with pytest.raises(SandboxEscapedError):
        await late
    async with lifespan.sandbox():
        assert await pool.fetchval(COUNT) == 2


# -- the session of the real connection --------------------------------------------------------------


async def test_what_is_set_for_a_transaction_by_any_name_ends_with_it(app: Any) -> None:
    show = "SELECT current_setting('role'), current_setting('timezone'), current_setting('a.b', true)"
    async with app.acquire() as connection:
        before = await connection.fetchrow(
            "SELECT current_setting('role'), current_setting('timezone')"
        )
        async with connection.transaction():
            await connection.execute("SET LOCAL ROLE pg_monitor")
            await connection.execute("SET LOCAL TIME ZONE 'Asia/Tokyo'")
            await connection.execute("SELECT set_config('a.b', $1, true)", "7")
            assert tuple(await connection.fetchrow(show)) == ("pg_monitor", "Asia/Tokyo", "7")
        assert tuple(await connection.fetchrow(show)) == (*before, "")
        async with connection.transaction():
            await connection.execute("SELECT set_config('a.b', lower('X'), false)")
        assert (await connection.fetchrow(show))[2] == "x"
        with pytest.raises(exceptions.FeatureNotSupportedError, match="name that is not in the text"):
            await connection.execute("SELECT set_config($1, $2, true)", "a.b", "8")


async def test_a_reset_leaves_the_limit_for_locks(app: Any) -> None:
    async with app.acquire() as connection:
        await connection.execute("SET application_name = 'x'")
    assert await app.fetchval("SHOW application_name") != "x"
    assert await app.fetchval("SHOW lock_timeout") == "9999ms"


LIMIT = "idle_in_transaction_session_timeout"


async def test_a_limit_for_idle_transactions_does_not_end_the_real_one(box: Box) -> None:
    lifespan, pool = await box.open(server_settings={LIMIT: "60000"})
    async with lifespan.sandbox():
        await pool.execute(ADD)
        assert await pool.fetchval(f"SHOW {LIMIT}") == "0"


@pytest.mark.parametrize("lifts", [f"SET {LIMIT} = 60000", "RESET ALL"])
async def test_a_limit_set_inside_does_not_end_the_real_one_either(lifts: str, box: Box) -> None:
    lifespan, pool = await box.open(server_settings={LIMIT: "60000"})
    async with lifespan.sandbox():
        await pool.execute(ADD)
        await pool.execute(lifts)
        assert await pool.fetchval(f"SHOW {LIMIT}") == "0"


async def test_a_connection_killed_between_blocks_is_made_anew(box: Box) -> None:
    """Also where the loop did not run since, and has not heard of it."""
    lifespan, pool = await box.open(min_size=0)
    async with lifespan.sandbox():
        await pool.execute(ADD)
    killed = (
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    )
    box.outside.ask(f"{killed} AND datname = current_database()")
    async with lifespan.sandbox():
        assert await pool.fetchval(COUNT) == 2


async def test_strings_can_t_be_given_another_meaning(app: Any) -> None:
    with pytest.raises(exceptions.FeatureNotSupportedError, match="standard_conforming_strings"):
        await app.execute("SET standard_conforming_strings = off")
