"""An application sees the same in aiopg's sandbox as in production; and nothing of it lasts."""

from __future__ import annotations

import asyncio
import re
import warnings
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiopg
import psycopg2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg2 import extensions, extras

from ..depth import TIMES
from ..virtual_time import pass_time
from .differential import (
    DEFERRABLE,
    LEVEL_SHOWN,
    NEVER_COMMITS,
    POOL,
    READS,
    Application,
    Client,
    Op,
    Seen,
    Worlds,
    calm,
    sequences_of,
    sql,
)


async def connect(url: str) -> Any:
    return await aiopg.create_pool(
        url, minsize=1, maxsize=4, timeout=60, enable_hstore=False, options="-c app.name="
    )


async def close(pool: Any) -> None:
    pool.terminate()
    await pool.wait_closed()


FACTORIES = {
    "plain": extensions.cursor,
    "dict": extras.RealDictCursor,
    "tuple": extras.NamedTupleCursor,
}


def forget(*transactions: Any) -> None:
    """Let aiopg not warn, at some collection of garbage, of those that are still open."""
    for each in transactions:
        each._is_begin, each._unique_id = False, None


class Held:
    """A connection that the application has acquired, with a cursor of it."""

    def __init__(self, connection: Any, cursor: Any) -> None:
        self.connection = connection
        self.cursor = cursor
        self.transactions: list[Any] = []

    def forget(self) -> None:
        """Forget its transactions."""
        forget(*self.transactions, self.cursor._transaction)


class AiopgApplication(Application):
    """What applications do with an aiopg pool."""

    async def do(self, op: Op) -> Seen:
        """With what the connection and its cursor tell afterwards."""
        seen = await super().do(op)
        return seen if op.who not in self.held else (*seen, *self.told(self.held[op.who]))

    def told(self, held: Held) -> Seen:
        """What there is to be asked without a statement."""
        cursor, connection = held.cursor, held.connection
        state = connection.closed, cursor.closed, connection.isexecuting(), list(connection.notices)
        if cursor.closed:
            return (*state, connection.raw.get_transaction_status())
        query = re.sub(rb"\bs[0-9a-f]{32}", b"", cursor.query or b"")
        tells = cursor.statusmessage, cursor.rowcount, cursor.rownumber, cursor.description, query
        return *state, *tells, cursor.lastrowid, cursor.name

    def in_transaction(self, who: int) -> bool:
        connection = self.held[who].connection
        idle = connection.raw.get_transaction_status() == extensions.TRANSACTION_STATUS_IDLE
        return not (connection.closed or idle)

    def text(self, error: Exception) -> str:
        text = re.sub(r"\bs[0-9a-f]{32}", "", super().text(error))
        return f"{text}, {error.pgcode}" if isinstance(error, psycopg2.Error) else text

    async def acquire(self, who: int) -> Any:
        if who != POOL and who not in self.held:
            connection = await self._acquired()
            self.held[who] = Held(connection, await connection.cursor())
        return self.pool.size - self.pool.freesize

    async def _acquired(self) -> Any:
        connection = await self.pool.acquire()
        connection.notices.clear()  # it may be any that is free
        return connection

    async def release(self, who: int) -> Any:
        if who == POOL:
            return None
        told = await self._give_back(self.held.pop(who))
        return told, self.pool.size - self.pool.freesize

    async def _give_back(self, held: Held) -> list[str]:
        held.forget()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            await self.pool.release(held.connection)
        return [str(each.message) for each in told]

    @asynccontextmanager
    async def _borrowed(self) -> AsyncGenerator[Any]:
        connection = await self._acquired()
        async with connection.cursor() as cursor:
            try:
                yield cursor
            finally:
                await self._give_back(Held(connection, cursor))

    async def _with(self, who: int, act: str, *args: Any, **options: Any) -> Any:
        if who != POOL:
            cursor = self.held[who].cursor
            return await getattr(cursor, act)(*args, **options)
        async with self._borrowed() as cursor:
            await getattr(cursor, act)(*args, **options)
            rows = await cursor.fetchall() if cursor.description else None
            return rows, cursor.statusmessage, cursor.rowcount, list(cursor.connection.notices)

    async def execute(self, who: int, sql: str) -> Any:
        return await self._with(who, "execute", sql)

    async def fetch(self, who: int, sql: str) -> Any:
        seen = await self._with(who, "execute", sql)
        return seen if who == POOL else await self.held[who].cursor.fetchall()

    async def copy(self, who: int, sql: str) -> Any:
        return await self._with(who, "execute", sql)

    async def with_arguments(self, who: int, sql: str, args: Any) -> Any:
        return await self._with(who, "execute", sql, args)

    async def call(self, who: int, name: str, args: Any) -> Any:
        return await self._with(who, "callproc", name, args)

    async def of_cursor(self, who: int, what: str, *args: Any) -> Any:
        return None if who == POOL else await getattr(self.held[who].cursor, what)(*args)

    async def of_connection(self, who: int, what: str, *args: Any) -> Any:
        return None if who == POOL else await getattr(self.held[who].connection, what)(*args)

    async def mogrify(self, who: int, sql: str, args: Any) -> Any:
        return None if who == POOL else self.held[who].cursor.mogrify(sql, args)

    async def iterate(self, who: int, count: int) -> Any:
        rows: list[Any] = []
        if who != POOL:
            async for row in self.held[who].cursor:
                rows.append(row)
                if len(rows) == count:
                    break
        return rows

    async def another_cursor(self, who: int, kind: str) -> Any:
        if who != POOL:
            held = self.held[who]
            held.forget()
            held.transactions.clear()
            held.cursor.close()
            held.cursor = await held.connection.cursor(cursor_factory=FACTORIES[kind])

    async def named_cursor(self, who: int) -> Any:
        if who != POOL:
            return await self.held[who].connection.cursor("named")
        with await self.pool.cursor() as cursor:
            return cursor.name, cursor.closed

    async def interrupted(self, who: int, sql: str) -> Any:
        task = await self.asleep(self._with(who, "execute", sql, timeout=20))
        pass_time(20)
        return await task

    async def cancelled(self, who: int, sql: str) -> Any:
        task = await self.asleep(self._with(who, "execute", sql))
        task.cancel()
        return await self._outcome(task)

    async def _outcome(self, task: asyncio.Task[Any]) -> Any:
        try:
            return await task
        except asyncio.CancelledError:
            return "cancelled"

    async def begin(self, who: int, level: str | None, readonly: bool, deferrable: bool) -> Any:
        if who != POOL:
            held = self.held[who]
            isolation: Any = getattr(aiopg.IsolationLevel, level or "default")
            transaction = aiopg.Transaction(held.cursor, isolation, readonly, deferrable)
            held.transactions.append(transaction)
            await transaction.begin()

    async def end(self, who: int, what: str) -> Any:
        """`commit`, `rollback`, `savepoint`, `release_savepoint` or `rollback_savepoint`."""
        if who != POOL and self.held[who].transactions:
            transaction = self.held[who].transactions[-1]
            try:
                await getattr(transaction, what)()
            finally:
                if what in ("commit", "rollback"):
                    self.held[who].transactions.pop()
                    forget(transaction)

    async def block(self, who: int, how: str, statements: tuple[Any, ...], fails: bool) -> Any:
        """`begin` or `begin_nested`, with blocks inside for statements that are tuples."""
        if who == POOL:
            async with self._borrowed() as cursor:
                return await self._block(cursor, how, statements, fails)
        return await self._block(self.held[who].cursor, how, statements, fails)

    async def _block(self, cursor: Any, how: str, statements: Any, fails: bool) -> Any:
        seen: list[Any] = []
        with suppress(LookupError):
            async with getattr(cursor, how)():
                for each in statements:
                    if isinstance(each, tuple):
                        with suppress(psycopg2.Error):
                            seen.append(await self._block(cursor, "begin_nested", each, False))
                    else:
                        await cursor.execute(each)
                        seen.append((cursor.statusmessage, cursor.rowcount))
                if fails:
                    raise LookupError
        return seen

    async def at_once(self, who: int, *statements: str) -> Any:
        each = (self._with(POOL, "execute", sql) for sql in statements)
        seen = await asyncio.gather(*each, return_exceptions=True)
        return sorted(f"{type(one).__name__}: {one}" for one in seen)

    async def pool_state(self, who: int, clears: bool) -> Any:
        if clears:
            await self.pool.clear()
        return self.pool.size - self.pool.freesize


levels = st.sampled_from([None, None, "read_committed", "repeatable_read", "serializable"])
arguments: list[tuple[str, Any]] = [
    ("INSERT INTO app.item (v) VALUES (%s)", (4,)),
    ("INSERT INTO app.item (v) VALUES (%s)", (-4,)),
    ("INSERT INTO app.item (v) VALUES (%(v)s)", {"v": "a text"}),
    ("UPDATE app.parent SET v = %s WHERE id = %s", ("100%; COMMIT", 1)),
    ("SELECT %s, %s", (1,)),
    ("SELECT %s", (object,)),
    ("%s", (extensions.AsIs("COMMIT"),)),
    ("SELECT %s", ([1, None, "x'y"],)),
]
calls: list[tuple[str, Any]] = [
    ("int4larger", (1, 2)),
    ("make_date", {"year": 2020, "day": 3, "month": 2}),
    ("set_config", ("app.name", "called", False)),
    ("nonsense", ()),
    ("setval", ("app.item_id_seq", 60)),
]
crowds: list[tuple[Any, ...]] = [
    ("UPDATE app.parent SET v = v || '!'", "SELECT 1/0", "INSERT INTO app.log VALUES ('at once')"),
    ("INSERT INTO app.watched VALUES (7)", "INSERT INTO app.watched VALUES (-7)", "SELECT 1"),
]
ADD = "INSERT INTO app.item (v) VALUES (1)"
BAD = "INSERT INTO app.item (v) VALUES (-1)"
ORPHAN = "INSERT INTO app.child VALUES (2, 3, NULL, 2)"
bodies: list[tuple[Any, ...]] = [
    (ADD,),
    (ADD, BAD),
    (ORPHAN,),
    (ADD, (ADD, BAD), ADD),
    (ADD, (ADD, (BAD,)), "SELECT 1/0"),
    ((ORPHAN,), "INSERT INTO app.parent VALUES (3)"),
    (ADD, "COMMIT"),
    (ADD, "ROLLBACK", ADD),
    ("BEGIN", ADD),
]
of_cursor: list[tuple[Any, ...]] = [
    ("fetchone",),
    ("fetchone",),
    ("fetchmany",),
    ("fetchmany", 2),
    ("fetchall",),
    ("scroll", 1),
    ("scroll", -1),
    ("scroll", 0, "absolute"),
    ("scroll", 5, "absolute"),
    ("scroll", 1, "nonsense"),
    ("executemany", "SELECT %s", [(1,)]),
    ("copy_from", None, "app.item"),
    ("copy_to", None, "app.item"),
    ("copy_expert", "COPY app.item TO STDOUT", None),
    ("nextset",),
]
of_connection: list[tuple[Any, ...]] = [
    ("get_transaction_status",),
    ("get_transaction_status",),
    ("commit",),
    ("rollback",),
    ("cancel",),
    ("reset",),
    ("set_session",),
    ("set_isolation_level", 1),
    ("tpc_begin",),
    ("lobject",),
    ("get_parameter_status", "TimeZone"),
]
COPIES = [("COPY app.item TO STDOUT",), ("SELECT 1; COPY app.item (v) FROM STDIN",)]
acts: dict[str, st.SearchStrategy[tuple[Any, ...]]] = {
    # Of EXPLAIN the number of rows, which aiopg tells, is another each time.
    "execute": st.tuples(
        sql.filter(lambda text: not re.match("EXPLAIN|SELECT pg_advisory_lock", text))
    ),
    "copy": st.sampled_from(COPIES),
    # Whom nobody waits for any more still takes the lock in production, a little later.
    "fetch": st.tuples(st.sampled_from([text for text in READS if "_advisory_lock" not in text])),
    "with_arguments": st.sampled_from(arguments),
    "call": st.sampled_from(calls),
    "of_cursor": st.sampled_from(of_cursor),
    "of_connection": st.sampled_from(of_connection),
    "mogrify": st.sampled_from(arguments),
    "iterate": st.tuples(st.integers(1, 3)),
    "another_cursor": st.tuples(st.sampled_from(sorted(FACTORIES))),
    "named_cursor": st.just(()),
    "interrupted": st.just(("SELECT pg_sleep(60)",)),
    "cancelled": st.just(("SELECT pg_sleep(60)",)),
    "begin": st.tuples(levels, st.booleans(), st.booleans()),
    "end": st.tuples(
        st.sampled_from(["commit", "rollback", "savepoint", "release_savepoint", "rollback_savepoint"])
    ),
    "block": st.tuples(
        st.sampled_from(["begin", "begin_nested"]), st.sampled_from(bodies), st.booleans()
    ),
    "at_once": st.sampled_from(crowds),
    "pool_state": st.tuples(st.booleans()),
    "acquire": st.just(()),
    "release": st.just(()),
}
OFTEN = ["execute"] * 12 + ["fetch"] * 6 + ["of_cursor"] * 3 + ["begin", "end", "end", "block"] * 2
sequences = sequences_of(acts, OFTEN, of_pool="at_once")

SESSION_STATE = re.compile(
    "SHOW|current_setting|EXECUTE|FETCH|PREPARE|DEALLOCATE|currval|lastval|_lock|_unlock|own|CLOSE"
    "|TEMP TABLE|set_config"
)

LIMITS = [DEFERRABLE, LEVEL_SHOWN, NEVER_COMMITS]

CLIENT = Client(connect, close, AiopgApplication, LIMITS)


@settings(calm, max_examples=20, derandomize=True)
@given(sequences)
def test_an_application_sees_the_same_as_in_production(worlds: Worlds, sequence: list[Op]) -> None:
    """Rows, tags, counts, notices, errors and their texts; afterwards the database is as before."""
    worlds.compare(sequence)


ROWS = "SELECT id, v FROM app.item ORDER BY id"
TOLD: dict[str, list[tuple[Any, ...]]] = {
    "told": [("execute", ROWS), ("execute", "BEGIN"), ("of_cursor", "fetchone"), ("iterate", 1)],
    "orphan": [("block", "begin", (ORPHAN,), False), ("end", "rollback"), ("fetch", ROWS)],
    "released": [("execute", f"BEGIN; {ADD}"), ("release",), ("acquire",), ("fetch", ROWS)],
    "nested": [("block", "begin", (ADD, (ADD, BAD), ADD), False), ("fetch", ROWS)],
    "begun twice": [
        ("begin", None, False, False),
        ("execute", ADD),
        ("begin", "repeatable_read", False, False),
    ],
    "timed out": [
        ("begin", None, False, False),
        ("execute", ADD),
        ("interrupted", "SELECT pg_sleep(60)"),
    ],
}


@pytest.mark.parametrize("name", TOLD)
def test_what_matters_most(worlds: Worlds, name: str) -> None:
    """The same for what no random choice may leave out."""
    worlds.compare([Op(what, 0, args) for what, *given in TOLD[name] for args in [tuple(given)]])


@pytest.mark.long
@pytest.mark.timeout(1200)
@settings(calm, max_examples=40 * TIMES, derandomize=True)
@given(sequences)
def test_many_applications_see_the_same_as_in_production(worlds: Worlds, sequence: list[Op]) -> None:
    """The same, with many more."""
    worlds.compare(sequence)
