"""The sandbox of psycopg's pools: as in production, and nothing lasts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import Any

import psycopg
import psycopg2
import pytest
from psycopg import AsyncClientCursor, AsyncConnection, AsyncRawCursor, errors, sql
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row
from psycopg.types import TypeInfo
from psycopg_pool import AsyncConnectionPool, AsyncNullConnectionPool, PoolClosed, PoolTimeout

from lifekit import Registry, SandboxBusyError, SandboxEscapedError, SandboxUnsupportedError
from lifekit.drivers.psycopg import driver
from lifekit.embedded import Server
from lifekit.sandbox import _shared
from lifekit.sandbox._psycopg_connection import LaneConnection
from lifekit.testing import sandboxing

from ..drivers.conftest import until

pytestmark = pytest.mark.anyio

Pool = AsyncConnectionPool[Any]
Play = Callable[[Pool], Awaitable[list[Any]]]

SCHEMA = """
CREATE TABLE t (i int PRIMARY KEY, s text);
CREATE TABLE child (i int REFERENCES t DEFERRABLE INITIALLY DEFERRED);
INSERT INTO t VALUES (1, 'one')
"""


@pytest.fixture(params=[("asyncio", {"use_uvloop": False})], ids=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> object:
    """psycopg is asyncio's own here; uvloop has a test of its own."""
    return request.param


@pytest.fixture(scope="module")
def urls(postgres: Server) -> Iterator[tuple[str, str]]:
    """Two databases alike: one for the sandbox, one to do the same for real."""
    base = postgres.url.rpartition("/")[0]
    names = ("psycopg_box", "psycopg_real")
    with closing(psycopg2.connect(postgres.url)) as admin, admin.cursor() as cursor:
        admin.autocommit = True
        for name in names:
            cursor.execute(f"CREATE DATABASE {name}")
            with closing(psycopg2.connect(f"{base}/{name}")) as made, made, made.cursor() as setup:
                setup.execute(SCHEMA)
        yield f"{base}/{names[0]}", f"{base}/{names[1]}"
        for name in names:
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")


class Ground:
    """Opens pools, sandboxed and not."""

    def __init__(self, urls: tuple[str, str]) -> None:
        self._box, self._real = urls

    @asynccontextmanager
    async def lifespan(self, kind: Any = AsyncConnectionPool, **options: Any) -> AsyncGenerator[Any]:
        """A sandboxed lifespan and its pool."""
        registry = Registry(close_timeout=2)
        given = {"min_size": 0, "max_size": 3, "open": False, **options}

        @registry.resource
        def db() -> Pool:
            pool: Pool = kind(self._box, **given)
            return pool

        with sandboxing():
            async with registry.lifespan() as lifespan:
                yield lifespan, lifespan[db]

    @asynccontextmanager
    async def box(self, kind: Any = AsyncConnectionPool, **options: Any) -> AsyncGenerator[Pool]:
        """A pool inside of a block."""
        async with self.lifespan(kind, **options) as (lifespan, pool), lifespan.sandbox():
            yield pool

    @asynccontextmanager
    async def real(self, kind: Any = AsyncConnectionPool, **options: Any) -> AsyncGenerator[Pool]:
        """A pool on the other database, which is as it was afterwards."""
        pool: Pool = kind(self._real, **{"min_size": 0, "max_size": 3, "open": False, **options})
        async with pool:
            yield pool
        with closing(psycopg2.connect(self._real)) as admin, admin, admin.cursor() as cursor:
            cursor.execute(
                "DROP TABLE IF EXISTS made; TRUNCATE t, child; INSERT INTO t VALUES (1, 'one')"
            )

    def untouched(self) -> bool:
        """Whether the sandbox's database is as it was."""
        with closing(psycopg2.connect(self._box)) as admin, admin.cursor() as cursor:
            cursor.execute(
                "SELECT (SELECT array_agg(i) FROM t), (SELECT count(*) FROM child), "
                "(SELECT count(*) FROM pg_tables WHERE schemaname = 'public'), "
                "(SELECT count(*) FROM pg_locks WHERE locktype = 'advisory')"
            )
            return bool(cursor.fetchone() == ([1], 0, 2, 0))


@pytest.fixture
def ground(urls: tuple[str, str]) -> Iterator[Ground]:
    """And nothing has lasted when the test is over."""
    made = Ground(urls)
    yield made
    assert made.untouched()


async def told(act: Awaitable[Any]) -> object:
    """What an act gives: a cursor's rows and its tag, or its error."""
    try:
        result: Any = await act
    except psycopg.Error as error:
        return type(error).__name__, str(error).partition("\n")[0]
    if not hasattr(result, "fetchall"):
        return result
    rows = await result.fetchall() if result.description else None
    return result.statusmessage, result.rowcount, rows


def status(connection: Any) -> str:
    """The transaction's, by its name."""
    return str(connection.info.transaction_status.name)


# -- as in production ---------------------------------------------------------------------------


async def implicit_transactions(pool: Pool) -> list[Any]:
    """A BEGIN before the first statement, a commit at the end of the block."""
    seen: list[Any] = []
    async with pool.connection() as c:
        seen += [status(c), await told(c.execute("INSERT INTO t VALUES (2)")), status(c)]
    with pytest.raises(LookupError):
        async with pool.connection() as c:
            await c.execute("INSERT INTO t VALUES (3)")
            raise LookupError
    async with pool.connection() as c:
        seen += [await told(c.execute("SELECT i FROM t ORDER BY i")), status(c)]
        await c.rollback()
        await c.execute("INSERT INTO t VALUES (4)")
        await c.commit()
        await c.execute("INSERT INTO t VALUES (5)")
        await c.rollback()
        seen += [await told(c.execute("SELECT i FROM t ORDER BY i"))]
    return seen


async def failed_transactions(pool: Pool) -> list[Any]:
    """What fails takes its transaction along."""
    seen: list[Any] = []
    async with pool.connection() as c:
        await c.execute("INSERT INTO t VALUES (2)")
        seen += [await told(c.execute("SELECT nope")), status(c)]
        seen += [await told(c.execute("SELECT 1")), await told(c.commit()), status(c)]
        seen += [await told(c.execute("SELECT i FROM t")), await told(c.execute("SELECT $1 FROM"))]
        await c.rollback()
        await c.execute("INSERT INTO t VALUES (2)")
        with pytest.raises(errors.DivisionByZero):
            async for _ in c.cursor().stream("SELECT 1 / 0"):
                pass
        seen += [status(c), await told(c.commit()), await told(c.execute("SELECT i FROM t"))]
    return seen


async def nested_transactions(pool: Pool) -> list[Any]:
    """Blocks, inside of one another, with names and without."""
    seen: list[Any] = []
    async with pool.connection() as c:
        async with c.transaction() as outer:
            await c.execute("INSERT INTO t VALUES (2)")
            async with c.transaction() as inner:
                seen += [outer.savepoint_name, inner.savepoint_name, status(c)]
                await c.execute("INSERT INTO t VALUES (3)")
                raise psycopg.Rollback(inner)
            async with c.transaction("named", force_rollback=True):
                await c.execute("INSERT INTO t VALUES (4)")
            with pytest.raises(errors.UniqueViolation):
                async with c.transaction():
                    await c.execute("INSERT INTO t VALUES (2)")
            seen += [status(c), await told(c.commit())]
        seen += [status(c), outer.status.name, await told(c.execute("SELECT i FROM t ORDER BY i"))]
        async with c.transaction() as within:
            seen += [within.savepoint_name]
    return seen


async def autocommit(pool: Pool) -> list[Any]:
    """Each statement by itself, and transactions where they are asked for."""
    seen: list[Any] = []
    async with pool.connection() as c:
        await c.set_autocommit(True)
        seen += [await told(c.execute("INSERT INTO t VALUES (2)")), status(c)]
        seen += [await told(c.execute("INSERT INTO t VALUES (2)")), status(c)]
        seen += [await told(c.execute("INSERT INTO t VALUES (3); SELECT 1; SELECT nope"))]
        async with c.transaction():
            await c.execute("INSERT INTO t VALUES (4)")
            seen += [status(c), await told(c.set_autocommit(False)), await told(c.set_read_only(True))]
        cursor = c.cursor()
        seen += [await told(cursor.executemany("INSERT INTO t VALUES (%s)", [(5,), (2,)]))]
        seen += [await told(cursor.executemany("INSERT INTO t VALUES (%s)", [(6,), (7,)]))]
        seen += [cursor.rowcount, await told(c.execute("SELECT i FROM t ORDER BY i"))]
        seen += [[row async for row in cursor.stream("SELECT generate_series(1, 3)")], status(c)]
        async with cursor.copy("COPY t (i) FROM STDIN") as copy:
            await copy.write_row((8,))
        with pytest.raises(LookupError):
            async with cursor.copy("COPY t (i) FROM STDIN") as copy:
                await copy.write_row((9,))
                raise LookupError
        seen += [status(c), await told(c.execute("SELECT max(i) FROM t"))]
        await c.set_autocommit(False)
        seen += [c.autocommit]
    return seen


async def control_as_text(pool: Pool) -> list[Any]:
    """BEGIN and COMMIT in SQL, and psycopg's own calls between them."""
    seen: list[Any] = []
    async with pool.connection() as c:
        seen += [await told(c.execute("BEGIN")), status(c)]
        await c.execute("INSERT INTO t VALUES (2)")
        await c.commit()
        seen += [status(c), await told(c.execute("INSERT INTO t VALUES (3)"))]
        seen += [await told(c.execute("ROLLBACK")), status(c)]
        await c.execute("INSERT INTO t VALUES (4)")
        seen += [await told(c.execute("COMMIT")), status(c)]
        await c.set_autocommit(True)
        seen += [await told(c.execute("START TRANSACTION")), status(c)]
        seen += [
            await told(c.execute("SAVEPOINT a")),
            await told(c.execute("INSERT INTO t VALUES (5)")),
        ]
        seen += [await told(c.execute("ROLLBACK TO a")), await told(c.execute("RELEASE a"))]
        seen += [await told(c.execute("COMMIT")), await told(c.execute("SELECT i FROM t ORDER BY i"))]
        seen += [await told(c.execute("SAVEPOINT a")), await told(c.execute("/* x */ commit"))]
        await c.set_autocommit(False)
    return seen


async def read_only(pool: Pool) -> list[Any]:
    """The attributes of transactions."""
    seen: list[Any] = []
    async with pool.connection() as c:
        await c.set_read_only(True)
        await c.set_deferrable(True)
        await c.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
        seen += [await told(c.execute("INSERT INTO t VALUES (2)"))]
        await c.rollback()
        seen += [await told(c.execute("SHOW transaction_read_only")), c.isolation_level, c.deferrable]
        await c.rollback()
        for reset in (c.set_read_only, c.set_deferrable, c.set_isolation_level):
            await reset(None)
        seen += [await told(c.execute("INSERT INTO t VALUES (2)"))]
    return seen


async def cursors(pool: Pool) -> list[Any]:
    """Server-side and client-side ones, COPY, streams, and cursors that are made by hand."""
    seen: list[Any] = []
    async with pool.connection() as c:
        async with c.cursor("c1", scrollable=True) as named:
            await named.execute("SELECT generate_series(1, %s)", (250,))
            seen += [await named.fetchone(), await named.fetchmany(3), named.rownumber]
            await named.scroll(-2)
            seen += [len([row async for row in named])]
            await c.commit()
            seen += [await told(named.fetchone()), status(c)]
            await c.rollback()
        cursor = c.cursor(row_factory=dict_row, binary=True)
        await cursor.execute("SELECT 1::int8 AS n, '\\x00ff'::bytea AS b")
        seen += [await cursor.fetchall()]
        async with cursor.copy("COPY (SELECT * FROM t) TO STDOUT") as copy:
            seen += [[row async for row in copy.rows()]]
        async with cursor.copy("COPY t FROM STDIN (FORMAT BINARY)") as copy:
            copy.set_types(["int4", "text"])
            await copy.write_row((2, "two"))
        seen += [cursor.rowcount, [row async for row in cursor.stream("SELECT i FROM t")]]
        await cursor.executemany("INSERT INTO t VALUES (%s) RETURNING i", [(3,), (4,)], returning=True)
        seen += [[await each.fetchall() async for each in cursor.results()]]
        client, raw = AsyncClientCursor(c), AsyncRawCursor(c)
        seen += [client.mogrify("SELECT %s", ("a'b",)), await told(client.execute("SELECT %s", ("x",)))]
        seen += [await told(raw.execute("SELECT $1::int", (7,))), sql.Literal("é'").as_string(c)]
        seen += [await told(c.execute("SELECT 1; SELECT 2"))]
    async with pool.connection() as c:
        await c.set_autocommit(True)
        other = c.cursor("c2")
        seen += [await told(other.execute("SELECT 1"))]
        await other.close()
        await c.set_autocommit(False)
    return seen


async def stolen_cursors(pool: Pool) -> list[Any]:
    """Cursors that SQL declared, fetched from by psycopg."""
    seen: list[Any] = []
    async with pool.connection() as c:
        await c.execute("DECLARE stolen CURSOR FOR SELECT generate_series(1, 5)")
        async with c.cursor("stolen") as cursor:
            seen += [await cursor.fetchmany(2), await cursor.fetchall()]
        seen += [await told(c.execute("FETCH FROM stolen")), status(c)]
    return seen


async def deferred_constraints(pool: Pool) -> list[Any]:
    """Checked at the application's commit, or when it says so."""
    seen: list[Any] = []
    async with pool.connection() as c:
        await c.execute("INSERT INTO child VALUES (9)")
        seen += [await told(c.commit()), status(c), await told(c.execute("SELECT count(*) FROM child"))]
        await c.execute("INSERT INTO child VALUES (9)")
        await c.execute("INSERT INTO t VALUES (9)")
        await c.commit()
        seen += [await told(c.execute("SET CONSTRAINTS ALL IMMEDIATE"))]
        seen += [await told(c.execute("INSERT INTO child VALUES (8)")), status(c)]
    return seen


async def prepared_statements(pool: Pool) -> list[Any]:
    """Two connections prepare the same and other things, and a rollback forgets them."""
    seen: list[Any] = []
    for _ in range(2):
        async with pool.connection() as one, pool.connection() as two:
            for c, query in ((one, "SELECT %s::int"), (two, "SELECT %s::text")):
                c.prepare_threshold = 1
                for n in range(4):
                    seen += [await told(c.execute(query, (n,)))]
                await c.commit()
                await c.execute(query, (5,), prepare=True)
                await c.commit()
            seen += [await told(one.execute("SELECT %s::int", (6,)))]
            await one.rollback()
            for c, query in ((two, "SELECT %s::text"), (one, "SELECT %s::int")):
                seen += [await told(c.execute(query, (7,)))]
                await c.commit()
    return seen


async def types_and_notices(pool: Pool) -> list[Any]:
    """What is asked about types, and what the server remarks."""
    seen: list[Any] = []
    async with pool.connection() as c, pool.connection() as silent:
        fetch: Any = TypeInfo.fetch
        seen += [(await fetch(c, "text")).oid, await fetch(c, "nope"), status(c)]

        def remark(notice: errors.Diagnostic) -> None:
            seen.append(notice.message_primary)

        def never(notice: errors.Diagnostic) -> None:
            seen.append("the wrong one")

        c.add_notice_handler(remark)
        silent.add_notice_handler(never)
        await c.execute("DO $$ BEGIN RAISE NOTICE 'hello'; END $$")
        seen += [c.info.dbname[:8], c.info.encoding, c.info.status.name, c.closed]
    return seen


async def strange_returns(pool: Pool) -> list[Any]:
    """Connections given back in a transaction, closed, or by hand."""
    seen: list[Any] = []
    c = await pool.getconn()
    await c.execute("INSERT INTO t VALUES (2)")
    await pool.putconn(c)
    async with pool.connection() as c:
        seen += [await told(c.execute("SELECT i FROM t"))]
        await c.close()
        seen += [c.closed, c.broken, await told(c.execute("SELECT 1"))]
    for _ in range(4):
        async with pool.connection() as c:
            seen += [await told(c.execute("SELECT 1"))]
    return seen


PLAYS = [
    implicit_transactions,
    failed_transactions,
    nested_transactions,
    autocommit,
    control_as_text,
    read_only,
    cursors,
    stolen_cursors,
    deferred_constraints,
    prepared_statements,
    types_and_notices,
    strange_returns,
]


@pytest.mark.filterwarnings("ignore:.*discarding.*")
@pytest.mark.parametrize("play", PLAYS, ids=lambda play: str(play.__name__))
async def test_the_application_sees_what_it_would_see_in_production(play: Play, ground: Ground) -> None:
    """In a block as in a database of its own, twice, errors included."""
    async with ground.real() as pool:
        expected = await play(pool)
    assert expected
    async with ground.lifespan() as (lifespan, pool):
        for _ in range(2):
            async with lifespan.sandbox():
                assert await play(pool) == expected


async def test_a_null_pool_is_sandboxed_as_well(ground: Ground) -> None:
    """It makes a connection for each use."""
    async with ground.real(AsyncNullConnectionPool) as pool:
        expected = await autocommit(pool)
    async with ground.box(AsyncNullConnectionPool) as pool:
        assert await autocommit(pool) == expected


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
async def test_it_works_on_uvloop(ground: Ground) -> None:
    """As elsewhere."""
    async with ground.real() as pool:
        expected = await cursors(pool)
    async with ground.box() as pool:
        assert await cursors(pool) == expected


async def test_callbacks_and_a_class_of_ones_own_are_the_applications(ground: Ground) -> None:
    """`configure`, `reset`, `check`, `kwargs` and `connection_class` do what they do."""
    seen: list[str] = []

    class Own(AsyncConnection[Any]):
        pass

    async def configure(c: AsyncConnection[Any]) -> None:
        await c.execute("SELECT 1")
        await c.commit()
        seen.append("configured")

    async def reset(c: AsyncConnection[Any]) -> None:
        seen.append(f"reset {status(c)}")

    options = {
        "connection_class": Own,
        "configure": configure,
        "reset": reset,
        "check": AsyncConnectionPool.check_connection,
        "kwargs": {"autocommit": True, "row_factory": dict_row},
    }

    async def play(pool: Pool) -> list[Any]:
        async with pool.connection() as c:
            assert isinstance(c, Own)
            seen.append(str(await (await c.execute("SELECT 1 AS n")).fetchone()))
        async with pool.connection():
            return [c.autocommit]

    async with ground.lifespan(**options) as (lifespan, pool), lifespan.sandbox():
        seen.clear()  # the real connection's
        assert await play(pool) == [True]
    assert seen == ["configured", "{'n': 1}", "reset IDLE", "reset IDLE"]


# -- together -----------------------------------------------------------------------------------


async def test_tasks_have_their_transactions_one_after_another(ground: Ground) -> None:
    """Nothing of one gets lost by another's rollback."""

    async def one(pool: Pool, number: int) -> None:
        async with pool.connection() as c:
            await c.execute("INSERT INTO t VALUES (%s)", (number,))
            await asyncio.sleep(0)
            if number % 2:
                await c.rollback()

    async with ground.box() as pool:
        await asyncio.gather(*(one(pool, number) for number in range(10, 20)))
        async with pool.connection() as c:
            cursor = await c.execute("SELECT array_agg(i ORDER BY i) FROM t WHERE i >= 10")
            assert await cursor.fetchone() == ([10, 12, 14, 16, 18],)


async def test_max_size_and_time_limits_bite(ground: Ground) -> None:
    """As the pool's own code does it."""
    async with ground.box(max_size=1, max_waiting=1) as pool, pool.connection():
        with pytest.raises(PoolTimeout):
            await pool.getconn(timeout=0.02)
        assert pool.get_stats()["pool_size"] == 1


async def test_a_wait_that_cant_end_names_both_sites(ground: Ground) -> None:
    """The same task holds a transaction on another connection."""
    async with ground.box() as pool, pool.connection() as first, pool.connection() as second:
        await first.execute("INSERT INTO t VALUES (2)")
        with pytest.raises(SandboxBusyError, match="can't end before it") as caught:
            await second.execute("SELECT 1")
        assert str(caught.value).count("test_psycopg.py:") == 2
        await first.commit()
        await second.execute("SELECT 1")


async def test_a_transaction_that_sleeps_is_named_in_the_end(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its task waits for something else, for ever."""
    monkeypatch.setattr(_shared, "PATIENCE", 0.05)
    began, over = asyncio.Event(), asyncio.Event()

    async def sleeps(pool: Pool) -> None:
        async with pool.connection() as c:
            await c.execute("INSERT INTO t VALUES (2)")
            began.set()
            await over.wait()

    async with ground.box() as pool, asyncio.TaskGroup() as tasks:
        tasks.create_task(sleeps(pool), name="sleepy")
        await began.wait()
        async with pool.connection() as c:
            with pytest.raises(SandboxBusyError, match="sleepy"):
                await c.execute("SELECT 1")
        over.set()


async def test_a_cancelled_statement_undoes_itself_alone(ground: Ground) -> None:
    """And the connection works on."""
    async with ground.box() as pool, pool.connection() as c:
        await c.set_autocommit(True)
        await c.execute("INSERT INTO t VALUES (2)")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await c.execute("INSERT INTO t SELECT 3 FROM pg_sleep(60)")
        assert await told(c.execute("SELECT i FROM t ORDER BY i")) == ("SELECT 2", 2, [(1,), (2,)])
        await c.set_autocommit(False)


async def test_cancelling_a_waiting_statement_leaves_the_running_one_alone(ground: Ground) -> None:
    """By its task, and by `cancel_safe()`."""
    async with ground.box() as pool, pool.connection() as busy, pool.connection() as other:
        running = asyncio.create_task(busy.execute("SELECT 1 FROM pg_sleep(0.2)"))
        await until(lambda: status(busy) == "ACTIVE")
        waiting = asyncio.create_task(other.execute("SELECT 2"))
        for _ in range(5):
            await asyncio.sleep(0)
        await other.cancel_safe()
        waiting.cancel()
        assert (await asyncio.gather(waiting, return_exceptions=True))[
            0
        ].__class__ is asyncio.CancelledError
        assert await (await running).fetchone() == (1,)


async def test_a_stream_that_is_cancelled_while_it_waits_reads_nothing(ground: Ground) -> None:
    """What arrives then is for the statement that runs."""
    async with ground.box() as pool, pool.connection() as busy, pool.connection() as other:

        async def stream() -> None:
            async for _ in other.cursor().stream("SELECT 2"):
                pass

        running = asyncio.create_task(busy.execute("SELECT 1 FROM pg_sleep(0.1)"))
        await until(lambda: status(busy) == "ACTIVE")
        waiting = asyncio.create_task(stream())
        for _ in range(5):
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await (await running).fetchone() == (1,)


def _has_begun(c: AsyncConnection[Any], running: asyncio.Task[Any]) -> bool:
    return running.done() or c.pgconn.transaction_status == TransactionStatus.ACTIVE


async def test_a_statement_that_fails_as_it_is_cancelled_closes_nothing(ground: Ground) -> None:
    """Other than psycopg's own connections, which are nobody else's."""
    async with ground.box() as pool, pool.connection() as c:
        for _ in range(20):
            running = asyncio.create_task(c.execute("wrong"))
            await until(partial(_has_begun, c, running))
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await c.rollback()
        await c.execute("SELECT 1")


@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize("direction", [b"COPY t FROM STDIN", b"COPY t TO STDOUT"])
async def test_a_copy_that_is_cancelled_as_it_begins_closes_nothing(
    ground: Ground, direction: bytes, autocommit: bool
) -> None:
    """However far it came: what was done before is there."""

    async def copies(c: AsyncConnection[Any]) -> None:
        async with c.cursor().copy(direction):
            await asyncio.Event().wait()

    async with ground.box() as pool:
        async with pool.connection() as c:
            await c.execute("INSERT INTO t SELECT generate_series(2, 2000)")
        for rounds in range(24):
            c = await pool.getconn()
            await c.set_autocommit(autocommit)
            running = asyncio.create_task(copies(c))
            for _ in range(rounds):
                await asyncio.sleep(0)
            running.cancel()
            assert isinstance(
                (await asyncio.gather(running, return_exceptions=True))[0], asyncio.CancelledError
            )
            await pool.putconn(c)
        async with pool.connection() as c:
            assert await told(c.execute("SELECT count(*) FROM t")) == ("SELECT 1", 1, [(2000,)])


async def test_whose_connection_is_closed_is_told_at_once(ground: Ground) -> None:
    """As in production: whether its statement runs, or waits for its turn."""

    async def play(pool: Pool) -> list[Any]:
        async with pool.connection() as first, pool.connection() as second:
            running = asyncio.create_task(told(first.execute("SELECT 1 FROM pg_sleep(60)")))
            await until(lambda: status(first) == "ACTIVE")
            waiting = asyncio.create_task(told(second.execute("SELECT 2 FROM pg_sleep(60)")))
            await asyncio.sleep(0)
            await second.close()
            seen = [await waiting, status(first), second.closed, second.broken]
            await first.close()
            return [*seen, await running, status(first), first.closed, first.broken]

    async with ground.real() as pool:
        expected = await play(pool)
    async with ground.box() as pool:
        async with pool.connection() as c:
            await c.execute("INSERT INTO t VALUES (2)")
        assert await asyncio.wait_for(play(pool), 5) == expected
        async with pool.connection() as c:
            assert await told(c.execute("SELECT i FROM t ORDER BY i")) == ("SELECT 2", 2, [(1,), (2,)])


async def test_cancel_safe_cancels_what_runs_on_that_connection(ground: Ground) -> None:
    """From another task."""
    async with ground.box() as pool, pool.connection() as c:
        running = asyncio.create_task(c.execute("SELECT pg_sleep(60)"))
        await until(lambda: status(c) == "ACTIVE")
        await c.cancel_safe()
        with pytest.raises(errors.QueryCanceled):
            await running


# -- what gets out ------------------------------------------------------------------------------


async def test_what_was_not_given_back_fails_the_block_by_name(ground: Ground) -> None:
    """Task, coroutine and line; it is closed, and the next block has all its connections."""
    async with ground.lifespan(max_size=1) as (lifespan, pool):
        began, tasks = asyncio.Event(), list[asyncio.Task[None]]()

        async def stray() -> None:
            async with pool.connection() as c:
                await c.execute("INSERT INTO t VALUES (2)")
                began.set()
                await c.execute("SELECT pg_sleep(60)")

        with pytest.raises(SandboxEscapedError, match="in a transaction acquired at") as caught:
            async with lifespan.sandbox():
                tasks.append(asyncio.create_task(stray(), name="a stray"))
                await began.wait()
        assert "a stray" in str(caught.value)
        assert "stray and stands at" in str(caught.value)
        with pytest.raises(psycopg.OperationalError):
            await tasks[0]
        async with lifespan.sandbox():
            assert await implicit_transactions(pool)


async def test_who_still_waits_for_a_connection_gets_none_from_outside(ground: Ground) -> None:
    """Nor may code that was started in the block acquire after it."""
    async with ground.lifespan(max_size=1) as (lifespan, pool):
        go, tasks = asyncio.Event(), list[asyncio.Task[Any]]()

        async def late() -> None:
            await go.wait()
            await pool.getconn()

        with pytest.raises(SandboxEscapedError):
            async with lifespan.sandbox():
                await pool.getconn()
                tasks += [asyncio.create_task(pool.getconn()), asyncio.create_task(late())]
                await until(lambda: pool.get_stats()["requests_waiting"])
        go.set()
        for task in tasks:
            with pytest.raises(SandboxEscapedError, match="outlived its test"):
                await task


async def _write(pool: Pool) -> object:
    async with pool.connection() as c:
        await c.execute("INSERT INTO t VALUES (2)")
        return c


async def test_a_worker_that_waits_when_a_block_begins_works_inside_it(ground: Ground) -> None:
    """It asked the pool before; and what it waited for is the pool's again afterwards."""
    async with ground.lifespan(max_size=1) as (lifespan, pool):
        held = await pool.getconn()
        for leave in (pool.putconn, AsyncConnection.close):
            worker = asyncio.create_task(_write(pool))
            await until(lambda: pool.get_stats()["requests_waiting"])
            async with lifespan.sandbox():
                await leave(held)
                await worker
                async with pool.connection() as c:
                    seen = await told(c.execute("SELECT i FROM t ORDER BY i"))
            assert seen == ("SELECT 2", 2, [(1,), (2,)])
            assert ground.untouched()
            if not held.closed:
                assert await pool.getconn() is held
        await pool.putconn(held)
        async with pool.connection() as c:
            await c.execute("SELECT 1")


@pytest.mark.parametrize("kind", [AsyncConnectionPool, AsyncNullConnectionPool])
async def test_what_is_on_its_way_when_a_block_begins_stays_outside(ground: Ground, kind: Any) -> None:
    """A connection in the making, and one that was promised already: the worker gets one inside."""
    configured: list[Any] = []

    async def configure(c: AsyncConnection[Any]) -> None:
        configured.append(c)

    async def works(pool: Any) -> bool:
        async with pool.connection(timeout=5) as c:
            return isinstance(c, LaneConnection) is pool._sandbox.active

    async with ground.lifespan(kind, max_size=1, configure=configure) as (lifespan, pool):
        for rounds in range(20):
            async with pool.connection() as held:
                await held.close()  # so that one has to be made
            worker = asyncio.create_task(works(pool))
            for _ in range(rounds):
                await asyncio.sleep(0)
            async with lifespan.sandbox():
                assert await worker
            held = await asyncio.wait_for(pool.getconn(), 5)
            assert held in configured
            worker = asyncio.create_task(works(pool))
            await until(lambda: pool.get_stats()["requests_waiting"])
            await pool.putconn(held)
            async with lifespan.sandbox():
                assert await worker
        assert pool.get_stats()["pool_size"] <= 1


async def test_a_connection_in_the_making_when_a_block_ends_does_nothing_more(ground: Ground) -> None:
    """Nor does it count."""
    go = asyncio.Event()

    async def configure(c: AsyncConnection[Any]) -> None:
        if isinstance(c, LaneConnection):
            await go.wait()

    async with ground.lifespan(max_size=1, configure=configure) as (lifespan, pool):
        async with lifespan.sandbox():
            late = asyncio.create_task(_write(pool))
            await asyncio.sleep(0)
        go.set()
        with pytest.raises(SandboxEscapedError, match="which has ended"):
            await late
        for _ in range(2):
            async with lifespan.sandbox():
                await asyncio.wait_for(_write(pool), 5)
            async with pool.connection(timeout=5) as c:
                await c.execute("SELECT 1")


async def test_a_worker_that_waits_when_a_block_ends_works_outside_of_it(ground: Ground) -> None:
    """It was started before, and asked the pool inside."""

    async def works(pool: Pool) -> object:
        await go.wait()
        async with pool.connection() as c:
            return await told(c.execute("SELECT i FROM t ORDER BY i"))

    async with ground.lifespan(max_size=1) as (lifespan, pool):
        for _ in range(2):  # without a connection to give at once, and with one
            go = asyncio.Event()
            worker = asyncio.create_task(works(pool))
            with pytest.raises(SandboxEscapedError, match="had not been given back"):
                async with lifespan.sandbox():
                    await (await pool.getconn()).execute("INSERT INTO t VALUES (2)")
                    go.set()
                    await until(lambda: pool.get_stats()["requests_waiting"])
            assert await worker == ("SELECT 1", 1, [(1,)])


async def test_who_listens_on_a_connection_of_its_own_hears_in_a_block_as_well(
    ground: Ground, urls: tuple[str, str]
) -> None:
    """What comes from elsewhere, again and again; it may be closed while it waits."""
    heard: list[str] = []

    async def listens(c: AsyncConnection[Any]) -> None:
        while True:
            async for each in c.notifies(timeout=0.01):
                heard.append(each.payload)

    async with ground.lifespan() as (lifespan, pool):
        c = await pool.getconn()
        await c.set_autocommit(True)
        await c.execute("LISTEN news")
        worker = asyncio.create_task(listens(c))
        async with lifespan.sandbox():
            with closing(psycopg2.connect(urls[0])) as other, other, other.cursor() as cursor:
                cursor.execute("NOTIFY news, 'inside'")
            await until(lambda: heard)
            with pytest.raises(SandboxEscapedError):
                await c.set_autocommit(False)
            await c.close()
            with pytest.raises(psycopg.OperationalError):
                await worker
        await pool.putconn(c)


async def test_a_connection_acquired_before_the_block_can_only_undo(ground: Ground) -> None:
    """And is the real thing again afterwards."""
    async with ground.lifespan(max_size=2) as (lifespan, pool):
        idle, begun = await pool.getconn(), await pool.getconn()
        await begun.execute("INSERT INTO t VALUES (2)")
        async with lifespan.sandbox():
            for c in (idle, begun):
                with pytest.raises(SandboxEscapedError, match="before the sandbox began"):
                    await c.execute("INSERT INTO t VALUES (3)")
            with pytest.raises(SandboxEscapedError):
                await begun.commit()
            await pool.putconn(begun)
        await idle.execute("SELECT 1")
        await pool.putconn(idle)
        async with pool.connection() as one, pool.connection() as two:
            assert {one, two} == {idle, begun}


async def test_a_connection_that_was_given_back_does_nothing_after_the_block(ground: Ground) -> None:
    """Who kept it would work in a transaction that nobody ends."""
    async with ground.lifespan() as (lifespan, pool):
        async with lifespan.sandbox(), pool.connection() as kept:
            await kept.execute("SELECT 1")
        with pytest.raises(SandboxEscapedError, match="has ended"):
            await kept.execute("INSERT INTO t VALUES (2)")


async def test_a_commit_behind_its_back_is_noticed(urls: tuple[str, str]) -> None:
    """The guard is gone at the end, whoever took it away."""
    ground = Ground(urls)
    async with ground.lifespan() as (lifespan, pool):
        with pytest.raises(SandboxEscapedError, match="behind its back"):
            async with lifespan.sandbox(), pool.connection() as c:
                await c.execute("SELECT 1")
                c.pgconn.exec_(b"COMMIT")
        async with lifespan.sandbox():
            assert await autocommit(pool)
    assert ground.untouched()


async def test_the_application_closes_a_virtual_pool_only(ground: Ground) -> None:
    """It is closed as the application sees it, and open for the next block."""
    async with ground.lifespan() as (lifespan, pool):
        async with lifespan.sandbox():
            async with pool.connection():
                await pool.close()
            with pytest.raises(PoolClosed):
                await pool.getconn()
        async with lifespan.sandbox():
            assert await implicit_transactions(pool)
        async with pool.connection() as c:
            await c.execute("SELECT 1")


async def test_a_changed_schema_does_not_outlive_the_block_in_any_cache(ground: Ground) -> None:
    """Statements were prepared for another table of that name."""
    async with ground.lifespan() as (lifespan, pool):
        for column in ("int", "text"):
            async with lifespan.sandbox(), pool.connection() as c:
                await c.execute(sql.SQL("CREATE TABLE made (c {})").format(sql.SQL(column)))
                for _ in range(2):
                    cursor = await c.execute("SELECT * FROM made WHERE c IS NOT NULL", prepare=True)
                    assert cursor.description is not None
                    assert cursor.description[0].type_display == column.replace("int", "int4")


async def test_advisory_locks_and_settings_end_with_the_block(ground: Ground) -> None:
    """Those of the session, too."""
    async with ground.lifespan() as (lifespan, pool):
        async with lifespan.sandbox(), pool.connection() as c:
            await c.execute("SELECT pg_advisory_lock(7)")
            await c.execute("SET application_name = 'changed'")
        assert ground.untouched()
        async with lifespan.sandbox(), pool.connection() as c:
            cursor = await c.execute("SHOW application_name")
            assert await cursor.fetchone() != ("changed",)


# -- what it refuses ----------------------------------------------------------------------------


async def _pipeline(c: AsyncConnection[Any]) -> None:
    async with c.pipeline():
        await c.execute("COMMIT")


async def _notifies(c: AsyncConnection[Any]) -> None:
    async for _ in c.notifies(timeout=0):
        pass


async def _two_phase(c: AsyncConnection[Any]) -> None:
    await c.tpc_begin(c.xid(1, "a", "b"))


async def _stream(c: AsyncConnection[Any]) -> None:
    async for _ in c.cursor().stream("COMMIT"):
        pass


async def _copy(c: AsyncConnection[Any]) -> None:
    async with c.cursor().copy("COMMIT"):
        pass


async def _vacuum(c: AsyncConnection[Any]) -> None:
    await c.set_autocommit(True)
    await c.execute("VACUUM t")


async def _copy_by_hand(c: AsyncConnection[Any]) -> None:
    await c.set_autocommit(True)
    async with psycopg.AsyncCursor(c).copy("COPY t TO STDOUT"):
        pass


async def _server_cursor(c: AsyncConnection[Any]) -> None:
    async with c.cursor("x") as cursor:
        await cursor.execute("SELECT 1; COMMIT")


REFUSED: dict[str, Callable[[AsyncConnection[Any]], Awaitable[object]]] = {
    "LISTEN": lambda c: c.execute("LISTEN channel"),
    "notifies()": _notifies,
    "pipeline()": _pipeline,
    "tpc_begin()": _two_phase,
    "PREPARE TRANSACTION": lambda c: c.execute("PREPARE TRANSACTION 'x'"),
    "a script with COMMIT": lambda c: c.execute("INSERT INTO t VALUES (2); COMMIT; SELECT 1"),
    "COMMIT by stream()": _stream,
    "COMMIT by copy()": _copy,
    "COMMIT in a server-side cursor": _server_cursor,
    "VACUUM": _vacuum,
    "a COPY by a cursor made by hand": _copy_by_hand,
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_it_can_not_do_it_refuses(what: str, ground: Ground) -> None:
    """Before anything is sent, with the way out; and the connection works on."""
    async with ground.box() as pool, pool.connection() as c:
        with pytest.raises(SandboxUnsupportedError):
            await REFUSED[what](c)
        await c.rollback()
        assert await told(c.execute("SELECT i FROM t")) == ("SELECT 1", 1, [(1,)])


async def test_a_server_that_goes_away_undoes_all_and_the_next_block_works(ground: Ground) -> None:
    """On a new real connection."""
    async with ground.lifespan() as (lifespan, pool):
        async with lifespan.sandbox():
            with pytest.raises(psycopg.OperationalError):
                async with pool.connection() as c:
                    await c.execute("INSERT INTO t VALUES (2)")
                    await c.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        async with lifespan.sandbox():
            assert await implicit_transactions(pool)


async def test_a_connection_killed_between_blocks_is_made_anew(ground: Ground) -> None:
    """Although nobody reads what an idle connection is told."""
    async with ground.lifespan() as (lifespan, pool):
        async with lifespan.sandbox():
            assert await implicit_transactions(pool)
        async with pool.connection() as c:
            await c.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND state = 'idle in transaction' "
                "AND pid <> pg_backend_pid()"
            )
        async with lifespan.sandbox():
            assert await implicit_transactions(pool)


async def test_the_driver_without_a_sandbox_is_untouched(ground: Ground) -> None:
    """Outside of a block the pool gives what it always gave."""
    async with ground.lifespan() as (lifespan, pool):
        async with lifespan.sandbox(), pool.connection() as inside:
            assert isinstance(inside, AsyncConnection)
        async with pool.connection() as outside:
            assert type(outside) is AsyncConnection
            assert outside.pgconn is not inside.pgconn
        assert driver.holders(pool) == []
