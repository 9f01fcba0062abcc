"""aiopg's sandbox on a real server: an application sees what it does in production; nothing lasts."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, closing, suppress
from typing import Any

import aiopg
import anyio
import psycopg2
import pytest
from psycopg2 import errors, extensions, extras, sql

from lifekit import (
    Registry,
    SandboxBusyError,
    SandboxError,
    SandboxEscapedError,
    SandboxUnsupportedError,
)
from lifekit.embedded import Server
from lifekit.testing import sandboxing

pytestmark = pytest.mark.anyio

SCHEMA = """
DROP SCHEMA IF EXISTS app CASCADE;
CREATE SCHEMA app;
CREATE TABLE app.parent (id int PRIMARY KEY);
CREATE TABLE app.child (
    id int PRIMARY KEY, parent int CONSTRAINT known REFERENCES app.parent DEFERRABLE INITIALLY DEFERRED
);
CREATE TABLE app.item (id serial PRIMARY KEY, v int CONSTRAINT positive CHECK (v >= 0));
INSERT INTO app.parent VALUES (1);
INSERT INTO app.item (v) VALUES (10), (20);
"""
ADD = "INSERT INTO app.item (v) VALUES (1)"
COUNT = "SELECT count(*) FROM app.item"
HELD = """SELECT coalesce(md5(string_agg(t, ',' ORDER BY t)), '') FROM (
    SELECT 'parent' || t::text AS t FROM app.parent AS t UNION ALL
    SELECT 'child' || t::text FROM app.child AS t UNION ALL
    SELECT 'item' || t::text FROM app.item AS t UNION ALL
    SELECT relkind::text || relname FROM pg_class WHERE relnamespace = 'app'::regnamespace UNION ALL
    SELECT 'schema' || nspname::text FROM pg_namespace WHERE nspname NOT LIKE 'pg_%') AS everything"""

Story = Callable[[aiopg.Pool], Awaitable[Any]]


@pytest.fixture
def anyio_backend() -> object:
    """aiopg is asyncio's own."""
    return "asyncio", {"use_uvloop": False}


BOTH_LOOPS = pytest.mark.parametrize(
    "anyio_backend",
    [
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ],
)


class Database:
    """A database of its own, and a connection to it that no pool has."""

    def __init__(self, url: str, connection: Any) -> None:
        self.url = url
        self._connection = connection

    def ask(self, query: str, *values: object) -> Any:
        """The first value that a query gives."""
        with self._connection.cursor() as cursor:
            cursor.execute(query, values or None)
            return cursor.fetchone()[0] if cursor.description else None

    async def until(self, query: str, *values: object) -> None:
        """Wait until a query gives true."""
        with anyio.fail_after(5):
            while not self.ask(query, *values):  # noqa: ASYNC110
                await anyio.sleep(0.001)

    async def runs(self, text: str) -> None:
        """Wait until the server runs a statement that contains *text*."""
        await self.until(
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE state = 'active' AND query LIKE %s "
            "AND datname = current_database() AND pid <> pg_backend_pid()",
            f"%{text}%",
        )


def database(postgres: Server, name: str) -> Iterator[Database]:
    """Make it anew."""
    with closing(psycopg2.connect(postgres.url)) as admin:
        admin.autocommit = True
        with admin.cursor() as cursor:
            cursor.execute(f"DROP DATABASE IF EXISTS {name}")
            cursor.execute(f"CREATE DATABASE {name}")
    url = f"{postgres.url.rpartition('/')[0]}/{name}"
    with closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(SCHEMA)
        yield Database(url, connection)


@pytest.fixture(scope="module")
def outside(postgres: Server) -> Iterator[Database]:
    """What the sandboxed pools connect to."""
    yield from database(postgres, "boxed_aiopg")


@pytest.fixture(scope="module")
def production(postgres: Server) -> Iterator[Database]:
    """What real pools connect to, to compare with."""
    yield from database(postgres, "real_aiopg")


class Box:
    """Lifespans of a pool, open sandboxed."""

    def __init__(self, outside: Database, stack: AsyncExitStack) -> None:
        self.outside = outside
        self._stack = stack

    async def open(self, **options: Any) -> tuple[Any, Any]:
        """A lifespan, and its pool."""
        registry = Registry("boxed", close_timeout=2)
        given: dict[str, Any] = {"minsize": 1, "maxsize": 4, "enable_hstore": False, **options}

        async def pool() -> Any:
            return await aiopg.create_pool(self.outside.url, **given)

        handle: Any = registry.resource(pool)
        with sandboxing():
            lifespan = await self._stack.enter_async_context(registry.lifespan())
        return lifespan, lifespan[handle]


@pytest.fixture
async def box(outside: Database) -> AsyncGenerator[Box]:
    """What makes pools; afterwards the database holds what it held, and nobody is connected."""
    before = outside.ask(HELD)
    async with AsyncExitStack() as stack:
        yield Box(outside, stack)
    gc.collect()
    await outside.until(
        "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database() "
        "AND backend_type = 'client backend'"
    )
    assert outside.ask(HELD) == before


@pytest.fixture
async def same(box: Box, production: Database) -> Callable[..., Awaitable[Any]]:
    """Run a story in production and in the sandbox, twice: it sees the same. Return that."""

    async def same(story: Story, **options: Any) -> Any:
        given: dict[str, Any] = {"minsize": 1, "maxsize": 4, "enable_hstore": False, **options}
        production.ask(SCHEMA)
        real = await aiopg.create_pool(production.url, **given)
        try:
            expected = await story(real)
        finally:
            real.terminate()
            await real.wait_closed()
        lifespan, pool = await box.open(**options)
        for _ in range(2):
            box.outside.ask("ALTER SEQUENCE app.item_id_seq RESTART WITH 3")
            async with lifespan.sandbox():
                assert await story(pool) == expected
        return expected

    return same


async def seen(cursor: Any, query: str, values: Any = None) -> Any:
    """All that a cursor tells of a statement."""
    try:
        await cursor.execute(query, values)
    except psycopg2.Error as error:
        result: Any = type(error).__name__, str(error), error.pgcode, error.pgerror
    else:
        result = await cursor.fetchall() if cursor.description is not None else cursor.description
    with suppress(psycopg2.ProgrammingError):
        result = result, await cursor.fetchone()
    names = [column.name for column in cursor.description or ()]
    state = (
        cursor.connection.raw.get_transaction_status(),
        await cursor.connection.get_transaction_status(),
    )
    told = cursor.statusmessage, cursor.rowcount, cursor.rownumber, cursor.query, cursor.closed
    return result, names, state, told, list(cursor.connection.notices), cursor.raw.lastrowid


async def value(pool: Any, query: str) -> Any:
    """The first value that a query gives, over a connection of its own."""
    async with pool.acquire() as connection, connection.cursor() as cursor:
        await cursor.execute(query)
        return (await cursor.fetchone())[0]


async def execute(pool: Any, query: str) -> None:
    """Run a statement over a connection of its own."""
    async with pool.acquire() as connection, connection.cursor() as cursor:
        await cursor.execute(query)


# -- statements ------------------------------------------------------------------------------------


@BOTH_LOOPS
async def test_what_is_committed_inside_is_gone_afterwards(box: Box) -> None:
    """On both loops, block after block."""
    lifespan, pool = await box.open()
    for _ in range(2):
        async with lifespan.sandbox():
            async with pool.acquire() as connection, connection.cursor() as cursor:
                await cursor.execute("CREATE TABLE app.extra (a int)")
                async with cursor.begin():
                    await cursor.execute(ADD)
            assert await value(pool, COUNT) == 3
        assert await value(pool, COUNT) == 2


SCRIPTS = {
    "outside": [
        "SELECT id, v FROM app.item ORDER BY id",
        ADD,
        "INSERT INTO app.item (v) VALUES (%s) RETURNING id",
        "SELECT 'a%%b', %s",
        "INSERT INTO app.item (v) VALUES (-1)",
        "SELECT nonsense",
        "SELECT",
        "",
        " ",
        "; ",
        "COMMIT",
        "ROLLBACK",
        "SELECT 1; SELECT 2",
        "SAVEPOINT s",
        "INSERT INTO app.item (v) VALUES (5); SELECT 1/0",
        COUNT,
    ],
    "transaction": [
        "BEGIN",
        ADD,
        "begin",
        "SAVEPOINT s",
        "SELECT 1/0",
        COUNT,
        "ROLLBACK TO s",
        COUNT,
        "RELEASE s",
        "/* ; */ END -- really",
        COUNT,
        "START TRANSACTION",
        ADD,
        "SELECT 1/0",
        "BEGIN",
        "COMMIT",
        "ABORT",
        COUNT,
    ],
    "modes": [
        "BEGIN READ ONLY",
        ADD,
        "ROLLBACK",
        "BEGIN",
        "SET TRANSACTION READ ONLY",
        "SHOW transaction_read_only",
        "COMMIT",
        "SHOW transaction_read_only",
        ADD,
        "BEGIN",
        "SET LOCAL work_mem = '123kB'",
        "COMMIT",
        "SHOW work_mem",
        "BEGIN",
        "DECLARE own CURSOR FOR SELECT id FROM app.item ORDER BY id",
        "FETCH 1 FROM own",
        "COMMIT",
        "FETCH 1 FROM own",
    ],
    "scripts": [
        f"BEGIN; {ADD}; {ADD}; COMMIT",
        COUNT,
        f"BEGIN; {ADD}",
        COUNT,
        f"{ADD}; ROLLBACK",
        COUNT,
        "BEGIN; SELECT 1; SELECT 1/0; COMMIT",
        "ROLLBACK",
        COUNT,
    ],
    "deferred": [
        "INSERT INTO app.child VALUES (1, 1)",
        "INSERT INTO app.child VALUES (2, 5)",
        "BEGIN",
        "INSERT INTO app.child VALUES (3, 5)",
        "COMMIT",
        "SELECT count(*) FROM app.child",
        "BEGIN",
        "INSERT INTO app.child VALUES (4, 6)",
        "INSERT INTO app.parent VALUES (6)",
        "COMMIT",
        "SELECT count(*) FROM app.child",
        "BEGIN",
        "SET CONSTRAINTS ALL IMMEDIATE",
        "INSERT INTO app.child VALUES (7, 7)",
        "ROLLBACK",
    ],
}


@pytest.mark.parametrize("name", SCRIPTS)
async def test_a_cursor_tells_of_each_statement_what_it_tells_in_production(
    name: str, same: Any
) -> None:
    """Rows, errors, tags, counts, statuses, notices; one cursor for all, and one for each."""

    async def story(pool: Any) -> Any:
        found: list[Any] = []
        async with pool.acquire() as connection, connection.cursor() as cursor:
            for query in SCRIPTS[name]:
                found.append(await seen(cursor, query, (7,) if "%" in query else None))
        async with pool.acquire() as connection:
            for query in SCRIPTS[name]:
                async with connection.cursor() as cursor:
                    found.append(await seen(cursor, query, (7,) if "%" in query else None))
        return [without_lines(each) for each in found]

    def without_lines(told: Any) -> Any:
        result: Any = told[0]
        # Of one statement out of a script the server quotes that statement.
        if name == "scripts" and result is not None and isinstance(result[0], str):
            return [result[0], result[2]]
        return told

    assert len(await same(story)) == 2 * len(SCRIPTS[name])


async def test_notices_of_statements_that_need_a_transaction(same: Any) -> None:
    """As the server warns outside of transactions, and where a script begins or ends one in vain."""

    async def story(pool: Any) -> Any:
        async with pool.acquire() as connection, connection.cursor() as cursor:
            for query in (
                "SET LOCAL work_mem = '100kB'",
                "SET CONSTRAINTS ALL DEFERRED",
                "SET TRANSACTION READ ONLY",
                "SET transaction_read_only = on",
                "SELECT set_config('work_mem', '100kB', true)",
                "COMMIT; BEGIN; BEGIN",
                "SET LOCAL work_mem = '100kB'; SET CONSTRAINTS ALL DEFERRED",
                "SET LOCAL work_mem = '100kB'",
                "ROLLBACK",
            ):
                await cursor.execute(query)
            return list(connection.notices)

    assert len(await same(story)) == 5


@pytest.mark.parametrize(
    "queries",
    [
        ("BEGIN", "SELECT 1", "BEGIN ISOLATION LEVEL SERIALIZABLE"),
        ("BEGIN", "VACUUM; BEGIN; COMMIT; COMMIT"),
        ("BEGIN", "SELECT 1", "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; BEGIN; COMMIT; COMMIT"),
    ],
)
async def test_notices_before_a_statement_that_comes_too_late(queries: Any, same: Any) -> None:
    async def story(pool: Any) -> Any:
        async with pool.acquire() as connection, connection.cursor() as cursor:
            for query in queries:
                with suppress(psycopg2.errors.ActiveSqlTransaction):
                    await cursor.execute(query)
            found = list(connection.notices)
            with suppress(psycopg2.Error):
                await cursor.execute("ROLLBACK")
            return found

    await same(story)


async def test_a_cursor_whose_statement_was_not_sent(same: Any) -> None:
    """It has no rows to go to, and forgets what it was asked before."""

    async def story(pool: Any) -> Any:
        found: list[Any] = []
        async with pool.acquire() as connection, connection.cursor() as cursor:
            for query in ("SELECT 1/0", "BEGIN", "SELECT 1", "ROLLBACK"):
                with suppress(psycopg2.Error):
                    await cursor.execute(query)
                for distance, mode in ((0, "absolute"), (1, "relative"), (1, "nonsense")):
                    try:
                        found.append(await cursor.scroll(distance, mode))
                    except psycopg2.Error as error:
                        found.append(str(error))
                with pytest.raises(IndexError):
                    await cursor.execute("SELECT %s, %s", (1,))
                found.append(cursor.query)
            cursor.close()
            with pytest.raises(psycopg2.InterfaceError, match="cursor already closed"):
                await cursor.nextset()
        return found

    await same(story)


async def test_a_connection_that_was_cut_off_says_so(same: Any) -> None:
    """Its status is unknown, and it still seems to execute what it was at."""

    async def story(pool: Any) -> Any:
        async with pool.acquire() as connection:
            cursor = await connection.cursor()
            with pytest.raises(TimeoutError):
                await cursor.execute("SELECT pg_sleep(10)", timeout=0.01)
            cut = connection.isexecuting(), await connection.get_transaction_status()
        async with pool.acquire() as connection:
            await connection.close()
            return cut, connection.isexecuting(), await connection.get_transaction_status()

    assert await same(story) == ((True, 4), False, 4)


async def test_collecting_one_connection_leaves_another_alone(box: Box) -> None:
    """All lanes show the same psycopg2 connection, whoever asks."""
    lifespan, pool = await box.open()
    async with lifespan.sandbox(), pool.acquire() as connection:
        other = await pool.acquire()
        await other.close()
        await pool.release(other)
        raw = connection.raw
        del other
        gc.collect()
        assert raw.closed == 0


async def test_transaction_control_in_parameters_is_data(same: Any) -> None:
    """What the server gets counts, and what psycopg2 quoted is data."""

    async def story(pool: Any) -> Any:
        async with pool.acquire() as connection, connection.cursor() as cursor:
            found = [await seen(cursor, "SELECT %s", ("x'; COMMIT; --",))]
            found.append(await seen(cursor, "SELECT %(a)s", {"a": "\\'; ROLLBACK; --"}))
            found.append(await seen(cursor, "SELECT %s, %s", (extensions.AsIs("1; SELECT 2"), 3)))
            with pytest.raises(psycopg2.ProgrammingError, match="can't adapt"):
                await cursor.execute("SELECT %s", (object(),))
            with pytest.raises(IndexError):
                await cursor.execute("SELECT %s, %s", (1,))
            await cursor.execute("SELECT '100%'")
            return found, await cursor.fetchone(), cursor.mogrify("SELECT %s", ("é",))

    await same(story)


async def test_control_that_a_parameter_smuggles_in_is_seen(box: Box) -> None:
    """AsIs() gives a COMMIT to the server, which the text before it does not show."""
    lifespan, pool = await box.open()
    async with lifespan.sandbox(), pool.acquire() as connection, connection.cursor() as cursor:
        async with cursor.begin():
            await cursor.execute(ADD)
            await cursor.execute("%s", (extensions.AsIs("COMMIT"),))
            assert cursor.statusmessage == "COMMIT"
            assert await connection.get_transaction_status() == 0
        await cursor.execute("SELECT 1")


async def test_the_results_of_one_connection_stay_while_another_works(same: Any) -> None:
    """Half-read cursors, in turns, of connections and of one connection; also while one runs."""

    async def story(pool: Any) -> Any:
        async with pool.acquire() as one, pool.acquire() as two:
            first, second, third = await one.cursor(), await two.cursor(), await one.cursor()
            await first.execute("SELECT generate_series(1, 9)")
            found = [await first.fetchone()]
            await second.execute("SELECT generate_series(11, 19)")
            await third.execute(ADD)
            found += [await second.fetchmany(2), await first.fetchmany(), first.rownumber]
            running = asyncio.create_task(second.execute("SELECT pg_sleep(0.05)"))
            await asyncio.sleep(0)
            await first.scroll(2)
            found += [await first.fetchone(), one.isexecuting(), two.isexecuting()]
            await running
            found += [[row async for row in first], second.statusmessage, third.rowcount]
            first.close()
            with pytest.raises(psycopg2.InterfaceError, match="cursor already closed"):
                await first.fetchone()
            with pytest.raises(psycopg2.ProgrammingError, match="no results to fetch"):
                await third.fetchall()
            return found

    await same(story)


class _Own(extras.DictCursor):
    """A kind of cursor that an application may have."""

    def execute(self, query: Any, vars: Any = None) -> None:  # noqa: A002
        base: Any = super()
        base.execute(f"/* own */ {query}", vars)


@pytest.mark.parametrize(
    "factory", [None, extras.DictCursor, extras.RealDictCursor, extras.NamedTupleCursor, _Own]
)
async def test_kinds_of_cursors(factory: Any, same: Any) -> None:
    """Given to the pool, to the cursor, or not; rows are what the kind makes of them."""

    async def story(pool: Any) -> Any:
        found: list[Any] = []
        async with pool.acquire() as connection:
            for given in (None, factory):
                async with connection.cursor(cursor_factory=given) as cursor:
                    assert isinstance(cursor, aiopg.Cursor)
                    assert isinstance(cursor.raw, factory or extensions.cursor)
                    await cursor.execute("SELECT id, v FROM app.item ORDER BY id")
                    found += [repr(await cursor.fetchone()), repr(await cursor.fetchall())]
                    await cursor.callproc("int4larger", (1, 2))
                    found += [repr(await cursor.fetchall()), cursor.query]
                    await cursor.callproc("make_date", {"year": 2020, "day": 3, "month": 2})
                    found += [repr(await cursor.fetchone()), cursor.statusmessage]
                    await cursor.execute("BEGIN")
                    found += [cursor.query, cursor.statusmessage]
                    await cursor.execute("ROLLBACK")
                    found += [type(cursor.raw).__name__]
        with await pool.cursor() as cursor:
            await cursor.execute("SELECT 1")
            found.append(repr(await cursor.fetchone()))
        return found

    await same(story, **({"cursor_factory": factory} if factory else {}))


async def test_what_a_connection_tells_and_refuses(same: Any) -> None:
    """Types, the psycopg2 connection for psycopg2's own functions, and what psycopg2 has not async."""

    async def story(pool: Any) -> Any:
        assert isinstance(pool, aiopg.Pool)
        async with pool.acquire() as connection, connection.cursor() as cursor:
            assert isinstance(connection, aiopg.Connection)
            raw = connection.raw
            quote_ident: Any = extensions.quote_ident  # pyright: ignore
            assert isinstance(raw, extensions.connection)
            quoted: Any = sql.SQL("SELECT {} AS {}").format(sql.Literal("é'"), sql.Identifier('a"b'))
            await cursor.execute(quoted)
            found: list[Any] = [quoted.as_string(raw), quote_ident("x y", raw), await cursor.fetchone()]
            extensions.register_type(extensions.UNICODE, raw)
            found += [connection.closed, raw.closed, raw.status, connection.encoding, connection.echo]
            found += [connection.timeout, connection.autocommit, connection.notifies.empty()]
            found += [connection.cursor_factory, cursor.connection is connection, cursor.arraysize]
            for refused in (
                connection.commit(),
                connection.rollback(),
                connection.cancel(),
                connection.reset(),
                cursor.executemany("SELECT 1", []),
                cursor.copy_expert("COPY app.item TO STDOUT", None),
                connection.set_session(),
                connection.cursor("named"),
                cursor.nextset(),
                connection.set_isolation_level(1),
            ):
                with pytest.raises(psycopg2.Error) as error:
                    await refused
                found.append((type(error.value), str(error.value)))
            await connection.close()
            found += [connection.closed, raw.closed, cursor.closed]
            for broken in (cursor.execute("SELECT 1"), cursor.fetchone(), connection.cursor()):
                with pytest.raises(psycopg2.Error) as error:
                    await broken
                found.append((type(error.value), str(error.value)))
            return found

    await same(story)


async def test_copy_fails_as_in_production(box: Box) -> None:
    """psycopg2 has none for async connections; the connection is of use afterwards, though."""
    lifespan, pool = await box.open()
    async with lifespan.sandbox(), pool.acquire() as connection, connection.cursor() as cursor:
        for query in ("/* x */ COPY app.item TO STDOUT", "-- x\ncopy app.item from stdin"):
            with pytest.raises(psycopg2.ProgrammingError, match=r"can't execute COPY (TO|FROM)"):
                await cursor.execute(query)
        assert await value(pool, COUNT) == 2


async def test_statements_past_aiopg_are_refused(box: Box) -> None:
    """Nobody would know when they end."""
    lifespan, pool = await box.open()
    async with lifespan.sandbox(), pool.acquire() as connection, connection.cursor() as cursor:
        for raw in (cursor.raw, connection.raw.cursor()):
            with pytest.raises(SandboxUnsupportedError, match="await the execute"):
                raw.execute(ADD)
        await cursor.execute(COUNT)
        assert await cursor.fetchone() == (2,)
        with pytest.raises(SandboxUnsupportedError, match="not a class"):
            await connection.cursor(cursor_factory=print)


async def test_two_statements_at_once_on_a_connection_are_refused(same: Any) -> None:
    """By aiopg's own code, and the first goes on."""

    async def story(pool: Any) -> Any:
        async with pool.acquire() as connection:
            one, two = await connection.cursor(), await connection.cursor()
            first = asyncio.create_task(one.execute("SELECT 5 FROM pg_sleep(0.02)"))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError) as error:
                await two.execute("SELECT 6")
            await first
            return str(error.value), await one.fetchall()

    await same(story)


# -- transactions ----------------------------------------------------------------------------------


async def test_transactions_of_aiopg(same: Any) -> None:
    """begin(), begin_nested(), Transaction, its modes, errors inside, a rollback, a savepoint."""

    async def story(pool: Any) -> Any:
        found: list[Any] = []
        async with pool.acquire() as connection, connection.cursor() as cursor:
            async with cursor.begin_nested():
                await cursor.execute(ADD)
                with pytest.raises(errors.DivisionByZero):
                    async with cursor.begin_nested():
                        await cursor.execute(ADD)
                        await cursor.execute("SELECT 1/0")
                async with cursor.begin_nested():
                    await cursor.execute(ADD)
            found.append(await seen(cursor, COUNT))
            with pytest.raises(LookupError):
                async with cursor.begin():
                    await cursor.execute(ADD)
                    raise LookupError
            with pytest.raises(errors.CheckViolation):
                async with cursor.begin():
                    await cursor.execute("INSERT INTO app.item (v) VALUES (-1)")
            found.append(await seen(cursor, COUNT))
            for level in aiopg.IsolationLevel:
                async with aiopg.Transaction(cursor, level, readonly=True):
                    found.append(await seen(cursor, "SHOW transaction_read_only"))
                    with pytest.raises(errors.ReadOnlySqlTransaction):
                        await cursor.execute(ADD)
                    with pytest.raises(psycopg2.Error):
                        await cursor.execute("SELECT 1")
            transaction = aiopg.Transaction(cursor, aiopg.IsolationLevel.default)
            await transaction.begin()
            with pytest.raises(psycopg2.ProgrammingError, match="open a new transaction"):
                await transaction.begin()
            await cursor.execute(ADD)
            await transaction.rollback()
            with pytest.raises(errors.ForeignKeyViolation):
                async with cursor.begin():
                    await cursor.execute("INSERT INTO app.child VALUES (1, 99)")
            cursor._transaction._is_begin = False  # aiopg leaves it open, and warns
            found.append(await seen(cursor, COUNT))
        return found

    await same(story)


async def test_released_inside_a_transaction(same: Any) -> None:
    """The pool warns, and discards the connection: its transaction is rolled back."""

    async def story(pool: Any) -> Any:
        connection = await pool.acquire()
        async with connection.cursor() as cursor:
            await cursor.execute("BEGIN")
            await cursor.execute(ADD)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            await pool.release(connection)
        found = [str(each.message) for each in told], connection.closed, pool.size, pool.freesize
        return found, await value(pool, COUNT), pool.size

    expected = await same(story)
    assert expected[0][0] == ["Invalid transaction status on released connection: 2"]


async def test_many_tasks_at_once(same: Any) -> None:
    """Transactions have the connection alone, statements one after the other."""

    async def story(pool: Any) -> Any:
        async def work(number: int) -> int:
            async with pool.acquire() as connection, connection.cursor() as cursor:
                for _ in range(3):
                    async with cursor.begin():
                        await cursor.execute(ADD)
                        await cursor.execute("SAVEPOINT s")
                        with suppress(errors.DivisionByZero):
                            await cursor.execute("SELECT 1/0")
                        await cursor.execute("ROLLBACK TO s")
                    await cursor.execute("UPDATE app.item SET v = v + 1 WHERE id = 1")
                    with suppress(errors.UndefinedColumn):
                        await cursor.execute("SELECT nonsense")
                await cursor.execute("SELECT %s", (number,))
                found: int = (await cursor.fetchone())[0]
                return found

        found = await asyncio.gather(*[work(number) for number in range(8)])
        return found, await value(pool, COUNT), await value(pool, "SELECT v FROM app.item WHERE id = 1")

    assert (await same(story))[1:] == (26, 34)


async def test_waiting_for_the_own_transaction_is_told_at_once(box: Box) -> None:
    """With the lines that acquired both connections."""
    lifespan, pool = await box.open()
    async with lifespan.sandbox(), pool.acquire() as connection, connection.cursor() as cursor:
        async with cursor.begin():
            await cursor.execute("UPDATE app.item SET v = 7 WHERE id = 1")
            with pytest.raises(SandboxBusyError) as error:
                await execute(pool, ADD)
            await cursor.execute(ADD)
        assert str(error.value).count("test_aiopg.py") == 2
        assert "test_waiting_for_the_own_transaction" in str(error.value)
        assert "in execute" in str(error.value)
        await cursor.execute(COUNT)
        assert await cursor.fetchone() == (3,)


# -- time limits and cancellation ------------------------------------------------------------------


WAYS = ("cancel", "timeout", "server", "close")


@BOTH_LOOPS
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a transaction"])
async def test_a_cancelled_statement_is_undone_and_its_connection_closed(
    inside: bool, same: Any, outside: Database, production: Database
) -> None:
    """And so is one that takes too long; a later connection works, and sees none of it."""

    async def story(pool: Any) -> Any:
        found: list[Any] = []
        for seconds, way in zip(("0.41", "0.42", "0.43", "0.44"), WAYS, strict=True):
            connection = await pool.acquire()
            cursor = await connection.cursor()
            if inside:
                await cursor.execute("BEGIN")
                await cursor.execute(ADD)
            slow = f"WITH a AS ({ADD} RETURNING 1) SELECT 1 FROM a, pg_sleep({seconds})"
            if way == "server":
                await cursor.execute("SET statement_timeout = 10")
                asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
            task = asyncio.create_task(cursor.execute(slow, timeout=0.02 if way == "timeout" else None))
            if way in {"cancel", "close"}:
                server = outside if "boxed" in connection.dsn else production
                await server.runs(f"pg_sleep({seconds})")
                task.cancel() if way == "cancel" else await connection.close()
            result: Any = (await asyncio.gather(task, return_exceptions=True))[0]
            found += [type(result), str(result), connection.closed, cursor.closed]
            if way == "server":
                asyncio.get_running_loop().set_exception_handler(None)
                await connection.close()
            await pool.release(connection)
            found += [pool.size, pool.freesize, await value(pool, "SELECT 1")]
        return found

    found = await same(story)
    assert found[:4] == [asyncio.CancelledError, "", True, True]


async def test_cancelled_while_it_waits_for_its_turn(box: Box) -> None:
    """It was never sent, and the transaction that it waited for goes on."""
    lifespan, pool = await box.open()
    async with lifespan.sandbox(), pool.acquire() as connection, connection.cursor() as cursor:
        async with cursor.begin():
            for cancelled in (True, False):
                async with asyncio.TaskGroup() as group:
                    waiting = group.create_task(_with_timeout(pool, None if cancelled else 0.01))
                    while not waiting.done():
                        await cursor.execute(ADD)
                        if cancelled:
                            waiting.cancel()
        await cursor.execute("SELECT count(*) FROM app.item WHERE v = 99")
        assert await cursor.fetchone() == (0,)


async def _with_timeout(pool: Any, seconds: float | None) -> None:
    connection = await pool.acquire()
    try:
        async with connection.cursor() as cursor:
            with pytest.raises(TimeoutError):
                await cursor.execute("INSERT INTO app.item (v) VALUES (99)", timeout=seconds)
    finally:
        await pool.release(connection)


async def test_cancellation_at_every_step_recovers(box: Box) -> None:
    """Wherever it strikes, nothing hangs, what follows works, and the block's end undoes it all."""
    lifespan, pool = await box.open()

    async def work() -> None:
        async with pool.acquire() as connection, connection.cursor() as cursor:
            await cursor.execute(f"BEGIN; {ADD}; SELECT pg_sleep(0.002)")
            await cursor.execute(f"{ADD}; SELECT pg_sleep(0.002); COMMIT")

    steps = cancelled = 0
    ended = False
    with anyio.fail_after(20):
        while not ended:
            async with lifespan.sandbox():
                task = asyncio.create_task(work())
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ResourceWarning)  # released in a transaction
                    await asyncio.wait([task])
                ended = not task.cancelled() and task.result() is None
                assert await value(pool, COUNT) in ({4} if ended else {2, 4})
            steps += 1 + steps // 3
            cancelled += not ended
    assert cancelled > 5
    assert await value(pool, COUNT) == 2


# -- the pool --------------------------------------------------------------------------------------


async def test_sizes_and_the_pools_own_ways(same: Any) -> None:
    """minsize, maxsize, clear(), recycling, echo, on_connect, close() and wait_closed()."""
    connected: list[Any] = []

    async def on_connect(connection: aiopg.Connection) -> None:
        async with connection.cursor() as cursor:
            await cursor.execute("SET search_path = app")
        connected.append(connection)

    async def story(pool: Any) -> Any:
        found = [pool.size, pool.freesize, pool.minsize, pool.maxsize, pool.timeout, pool.echo]
        async with pool.acquire() as one, pool.acquire() as two:
            assert one in connected
            assert two in connected
            found += [pool.size, pool.freesize]
            async with one.cursor() as cursor:
                await cursor.execute("SELECT count(*) FROM item")
                found += [await cursor.fetchone(), cursor.echo]
            with pytest.raises(TimeoutError):
                await pool.acquire()
            waiting = asyncio.create_task(value(pool, "SELECT 5"))
            await asyncio.sleep(0)
            found += [waiting.done()]
        found += [await waiting, pool.size, pool.freesize]
        await pool.clear()
        found += [pool.size, one.closed, two.closed]
        async with pool.acquire() as one:
            found += [one.closed, pool.size]
        pool.close()
        with pytest.raises(RuntimeError, match="after closing pool"):
            await pool.acquire()
        await pool.wait_closed()
        return [*found, pool.closed, pool.size]

    await same(story, minsize=2, maxsize=2, timeout=0.5, on_connect=on_connect, echo=True)


async def test_a_recycled_connection_is_closed(same: Any) -> None:
    """One that was last used too long ago."""

    async def story(pool: Any) -> Any:
        async with pool.acquire() as one:
            one._last_usage -= 100
        async with pool.acquire() as two:
            return one.closed, two is one, two.closed, pool.size

    assert await same(story, pool_recycle=50) == (True, False, 0, 1)


async def test_no_limit_of_connections(same: Any) -> None:
    """maxsize=0 is any number."""

    async def story(pool: Any) -> Any:
        async with AsyncExitStack() as stack:
            for _ in range(15):
                await stack.enter_async_context(pool.acquire())
            return pool.size, pool.maxsize

    assert await same(story, minsize=0, maxsize=0) == (15, None)


async def test_terminate_closes_what_is_out(same: Any) -> None:
    """At once, with a statement under way; it can be given back afterwards."""

    async def story(pool: Any) -> Any:
        connection = await pool.acquire()
        cursor = await connection.cursor()
        task = asyncio.create_task(cursor.execute("SELECT pg_sleep(0.3)"))
        await asyncio.sleep(0.01)
        pool.terminate()
        result: Any = (await asyncio.gather(task, return_exceptions=True))[0]
        await pool.release(connection)
        await pool.wait_closed()
        return type(result), str(result), connection.closed, pool.closed, pool.size

    await same(story)


async def test_outside_of_a_block_it_is_the_real_thing(box: Box) -> None:
    """The same object; what is done to the pool inside does not last either."""
    lifespan, pool = await box.open()
    async with lifespan.sandbox():
        pool.close()
        await pool.wait_closed()
    assert not pool.closed
    await execute(pool, ADD)
    assert box.outside.ask(COUNT) == 3
    await execute(pool, "DELETE FROM app.item WHERE v = 1")
    async with lifespan.sandbox():
        assert await value(pool, COUNT) == 2


async def test_a_task_that_holds_them_all_and_wants_one_more_is_told(box: Box) -> None:
    """Instead of waiting for a minute."""
    lifespan, pool = await box.open(maxsize=1)
    async with lifespan.sandbox(), pool.acquire():
        with pytest.raises(SandboxBusyError, match=r"1 connections are all held.*\n.*test_aiopg\.py"):
            await pool.acquire()


# -- what can't be contained -----------------------------------------------------------------------


async def test_pools_of_one_database_see_what_the_other_committed(box: Box) -> None:
    """Two pools of one lifespan share the real connection."""
    registry = Registry("boxed")

    async def one() -> Any:
        return await aiopg.create_pool(box.outside.url, minsize=0, enable_hstore=False)

    async def other() -> Any:
        return await one()

    first: Any = registry.resource(one)
    second: Any = registry.resource(other)
    with sandboxing():
        async with registry.lifespan() as lifespan:
            for _ in range(2):
                async with lifespan.sandbox():
                    await execute(lifespan[first], ADD)
                    await execute(lifespan[second], ADD)
                    assert await value(lifespan[first], COUNT) == 4
                    assert await value(lifespan[second], COUNT) == 4


@pytest.mark.parametrize(
    "query", ["LISTEN news", "VACUUM", "CREATE DATABASE x", "PREPARE TRANSACTION 'x'"]
)
async def test_what_needs_no_transaction_is_refused_with_the_way_out(query: str, box: Box) -> None:
    """And the connection goes on."""
    lifespan, pool = await box.open()
    async with lifespan.sandbox():
        with pytest.raises(SandboxUnsupportedError, match='isolation="none"'):
            await execute(pool, query)
        assert await value(pool, COUNT) == 2


async def test_an_escape_fails_that_block_only(box: Box) -> None:
    """A COMMIT that nobody could see."""
    lifespan, pool = await box.open()
    with pytest.raises(SandboxEscapedError, match="ended the sandbox's transaction"):
        async with lifespan.sandbox():
            assert await value(pool, "SELECT 1") == 1
            real: Any = pool._sandbox.used
            await real.control("COMMIT")
    async with lifespan.sandbox():
        await execute(pool, ADD)


async def test_what_is_not_given_back_is_named_and_closed(box: Box) -> None:
    """With its line; giving it back later does no harm."""
    lifespan, pool = await box.open()
    connection: Any = None
    with pytest.raises(SandboxEscapedError, match=r"in a transaction acquired at .*test_aiopg\.py"):
        async with lifespan.sandbox():
            connection = await pool.acquire()
            cursor = await connection.cursor()
            await cursor.execute("BEGIN")
            await cursor.execute(ADD)
    assert connection.closed
    await pool.release(connection)
    with pytest.raises(psycopg2.InterfaceError):
        await connection.cursor()
    assert await value(pool, COUNT) == 2


async def test_a_transaction_whose_release_failed_is_named(box: Box) -> None:
    """Where warnings are errors, aiopg loses the connection that it warns of."""
    lifespan, pool = await box.open()
    with pytest.raises(SandboxEscapedError, match=r"in a transaction acquired at .*test_aiopg\.py"):
        async with lifespan.sandbox():
            connection = await pool.acquire()
            async with connection.cursor() as cursor:
                await cursor.execute("BEGIN")
            with pytest.raises(ResourceWarning, match="Invalid transaction status"):
                pool.release(connection)


async def test_code_that_outlives_its_block_is_refused(box: Box) -> None:
    """A task in a statement, one that waits for a connection, one that begins later."""
    lifespan, pool = await box.open(maxsize=1)
    later = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def straggler() -> None:
        await later.wait()
        await execute(pool, ADD)

    with pytest.raises(SandboxEscapedError, match="which runs execute"):
        async with lifespan.sandbox():
            tasks.append(asyncio.create_task(execute(pool, "SELECT pg_sleep(30)")))
            await box.outside.runs("pg_sleep(30)")
            tasks += [asyncio.create_task(execute(pool, ADD)), asyncio.create_task(straggler())]
            await asyncio.sleep(0)
    later.set()
    with anyio.fail_after(5):
        first, *others = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(first, psycopg2.OperationalError)
    assert [type(each) for each in others] == [SandboxEscapedError] * 2


async def test_a_connection_from_before_the_block_is_in_it_as_well(box: Box) -> None:
    """Its cursors from before are not; nor is one that is in a transaction."""
    lifespan, pool = await box.open()
    async with pool.acquire() as connection, connection.cursor() as before:
        await before.execute("LISTEN news")
        async with lifespan.sandbox():
            assert isinstance(connection, aiopg.Connection)
            async with connection.cursor() as cursor:
                await cursor.execute(ADD)
                async with cursor.begin():
                    await cursor.execute(ADD)
                await cursor.execute(COUNT)
                assert await cursor.fetchone() == (4,)
            inside = await connection.cursor()
            with pytest.raises(SandboxEscapedError, match="would last"):
                await before.execute(ADD)
            box.outside.ask("NOTIFY news")
        with pytest.raises(SandboxEscapedError, match="has ended"):
            await inside.execute(ADD)
        assert (await asyncio.wait_for(connection.notifies.get(), 5)).channel == "news"
        assert connection.notifies.empty()
        await before.execute(COUNT)
        assert await before.fetchone() == (2,)
        await before.execute("BEGIN")
        async with lifespan.sandbox():
            with pytest.raises(SandboxEscapedError, match="in a transaction"):
                await before.execute(ADD)
            assert await value(pool, COUNT) == 2
        await before.execute("ROLLBACK")


async def test_released_inside_what_was_acquired_before(box: Box) -> None:
    """It goes back to where it came from."""
    lifespan, pool = await box.open(maxsize=1)
    connection = await pool.acquire()
    async with lifespan.sandbox():
        async with connection.cursor() as cursor:
            await cursor.execute(ADD)
        await pool.release(connection)
        assert await value(pool, COUNT) == 3
    assert pool.freesize == 1
    async with pool.acquire() as again:
        assert again is connection
    assert await value(pool, COUNT) == 2


async def test_the_session_is_that_of_a_fresh_connection(box: Box) -> None:
    """Settings, statements prepared in text, locks; and those of on_connect stay."""

    async def on_connect(connection: aiopg.Connection) -> None:
        async with connection.cursor() as cursor:
            await cursor.execute("SET search_path = app")

    lifespan, pool = await box.open(on_connect=on_connect)
    for _ in range(2):
        async with lifespan.sandbox():
            assert await value(pool, "SHOW work_mem") == "4MB"
            assert await value(pool, "SELECT count(*) FROM item") == 2
            await execute(pool, "SET work_mem = '100kB'")
            await execute(pool, "PREPARE own AS SELECT 5")
            assert await value(pool, "EXECUTE own") == 5
            await execute(pool, "SELECT pg_advisory_lock(1)")
        assert box.outside.ask("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


async def test_a_connection_killed_between_blocks_is_made_anew(box: Box) -> None:
    """Although nobody reads what an idle connection is told."""
    lifespan, pool = await box.open()
    async with lifespan.sandbox():
        await execute(pool, ADD)
    killed = (
        "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity "
        "WHERE pid <> pg_backend_pid() AND state = 'idle in transaction'"
    )
    assert box.outside.ask(f"{killed} AND datname = current_database()") == 1
    async with lifespan.sandbox():
        assert await value(pool, COUNT) == 2


async def test_the_real_connection_killed(box: Box) -> None:
    """Statements fail as in production, nothing hangs, and the next block connects anew."""
    lifespan, pool = await box.open()
    with anyio.fail_after(10):
        async with lifespan.sandbox():
            await execute(pool, ADD)
            async with pool.acquire() as connection, connection.cursor() as cursor:
                pid = await connection.get_backend_pid()
                box.outside.ask("SELECT pg_terminate_backend(%s)", pid)
                with pytest.raises(psycopg2.Error):
                    await cursor.execute(ADD)
                with pytest.raises(psycopg2.Error):
                    await cursor.execute(ADD)
            with pytest.raises(SandboxError, match="next block connects anew"):
                await pool.acquire()
        async with lifespan.sandbox():
            assert await value(pool, COUNT) == 2


async def test_the_lifespan_closing_while_a_block_is_active(outside: Database) -> None:
    """Nothing is left open, and nothing lasts."""
    async with AsyncExitStack() as stack:
        lifespan, pool = await Box(outside, stack).open()
        block = lifespan.sandbox()
        await block.__aenter__()
        await execute(pool, ADD)
    with suppress(SandboxError):
        await block.__aexit__(None, None, None)
    assert outside.ask(COUNT) == 2
