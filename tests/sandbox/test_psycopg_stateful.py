"""An application sees the same in psycopg's sandbox as in production; and nothing of it lasts."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg import AsyncClientCursor, AsyncRawCursor, AsyncTransaction, IsolationLevel
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

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
    text_of,
)

_SIZE = 4


async def _reset(connection: Any) -> None:
    await connection.set_autocommit(False)
    for reset in (connection.set_isolation_level, connection.set_read_only, connection.set_deferrable):
        await reset(None)


async def connect(url: str) -> Any:
    pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
        url, min_size=0, max_size=_SIZE, open=False, reset=_reset, kwargs={"options": "-c app.name="}
    )
    await pool.open()
    return pool


async def close(pool: Any) -> None:
    await pool.close()


@dataclass
class Held:
    """A connection that the application has acquired, and what it made with it."""

    connection: Any
    transactions: list[Any] = field(default_factory=list[Any])
    cursors: list[Any] = field(default_factory=list[Any])


async def answer(cursor: Any) -> list[Any]:
    """All that a cursor has, result by result."""
    told: list[Any] = []
    while True:
        columns = cursor.description and [(each.name, each.type_code) for each in cursor.description]
        rows = await cursor.fetchall() if columns else None
        if cursor.statusmessage == "EXPLAIN":  # that tells of the server's caches, too
            rows = rows and rows[0]
        told.append((cursor.statusmessage, len(rows or ()) or cursor.rowcount, columns, rows))
        if not cursor.nextset():
            return told


OF_CONNECTIONS = {"acquire", "release", "begin", "leave", "steal_cursor"} | {
    f"{act}_cursor" for act in ("open", "read", "scroll", "close")
}


class PsycopgApplication(Application):
    """What applications do with a psycopg pool."""

    def in_transaction(self, who: int) -> bool:
        return self._status(who) in ("INTRANS", "INERROR", "ACTIVE")

    def _status(self, who: int) -> str:
        return str(self.held[who].connection.info.transaction_status.name)

    async def do(self, op: Op) -> Seen:
        if op.who == POOL and op.what in OF_CONNECTIONS:
            return ("of connections only",)
        seen = await super().do(op)
        if op.who not in self.held:
            return seen
        connection = self.held[op.who].connection
        return (*seen, self._status(op.who), connection.closed, connection.broken)

    def text(self, error: Exception) -> str:
        return re.sub(r"(_pg3|lifekit)_\d+|0x[0-9a-f]+|database=\w+", "", super().text(error))

    def note(self, op: Op) -> None:
        super().note(op)
        if op.who in self.held and self.in_transaction(op.who):
            held = self.held[op.who]
            c = held.connection
            modes = (c.isolation_level, c.read_only)
            if (op.what == "begin" and len(held.transactions) > 1) or any(modes):
                self.busy = op.who

    @asynccontextmanager
    async def _on(self, who: int) -> AsyncGenerator[Any]:
        if who == POOL:
            async with self.pool.connection(timeout=60) as connection:
                yield connection
        else:
            yield self.held[who].connection

    async def acquire(self, who: int) -> None:
        if who not in self.held:
            self.held[who] = Held(await self.pool.getconn(timeout=60))

    async def release(self, who: int) -> None:
        held = self.held.pop(who)
        for cursor in held.cursors:
            with suppress(Exception):
                await cursor.close()
            cursor._closed = True  # one that failed to close would warn
        while held.transactions:
            with suppress(Exception):
                await self._leave(held, LookupError("released"))
        await self.pool.putconn(held.connection)

    async def _leave(self, held: Held, error: BaseException | None) -> Any:
        return await held.transactions.pop().__aexit__(error and type(error), error, None)

    async def execute(self, who: int, sql: str) -> Any:
        async with self._on(who) as connection:
            return await answer(await connection.execute(sql))

    fetch = execute

    async def query(self, who: int, sql: Any, how: str) -> Any:
        async with self._on(who) as connection:
            match how:
                case "prepare":
                    return await answer(await connection.execute(sql, prepare=True))
                case "binary":
                    return await answer(await connection.execute(sql, binary=True))
                case "dict":
                    return await answer(await connection.cursor(row_factory=dict_row).execute(sql))
                case "client":
                    return await answer(await AsyncClientCursor(connection).execute(sql))
                case _:
                    return await answer(await AsyncRawCursor(connection).execute(sql))

    async def with_arguments(self, who: int, sql: str, *args: Any) -> Any:
        async with self._on(who) as connection:
            return await answer(await connection.execute(sql, args))

    async def many(self, who: int, sql: str, rows: Iterable[Any], returning: bool) -> Any:
        async with self._on(who) as connection:
            cursor = connection.cursor()
            await cursor.executemany(sql, rows, returning=returning)
            return await answer(cursor) if returning else (cursor.rowcount, cursor.statusmessage)

    async def stream(self, who: int, sql: str, size: int, count: int) -> Any:
        got: list[Any] = []
        async with self._on(who) as connection:
            rows = connection.cursor().stream(sql, size=size)
            try:
                async for row in rows:
                    got.append(row)
                    if len(got) == count:
                        break
            finally:
                await rows.aclose()
        return got

    async def copy_in(self, who: int, sql: str, rows: Iterable[Any], fails: bool) -> Any:
        async with self._on(who) as connection:
            cursor = connection.cursor()
            async with cursor.copy(sql) as copy:
                for row in rows:
                    await copy.write_row(row)
                if fails:
                    raise LookupError("in the midst")
            return cursor.rowcount

    async def copy_out(self, who: int, query: str, count: int) -> Any:
        got: list[Any] = []
        async with self._on(who) as connection:
            cursor = connection.cursor()
            async with cursor.copy(f"COPY ({query}) TO STDOUT") as copy:
                async for row in copy.rows():
                    got.append(row)
                    if len(got) == count:
                        raise LookupError("enough")
            return got, cursor.rowcount

    async def interrupted(self, who: int, sql: str) -> Any:
        async with self._on(who) as connection:

            async def limited() -> None:
                async with asyncio.timeout(20):
                    await connection.execute(sql)

            task = await self.asleep(limited())
            pass_time(20)
            await task

    async def cancelled(self, who: int, sql: str) -> Any:
        async with self._on(who) as connection:
            task = await self.asleep(connection.execute(sql))
            task.cancel()
            return repr((await asyncio.gather(task, return_exceptions=True))[0])

    async def cancel_safe(self, who: int, sql: str) -> Any:
        async with self._on(who) as connection:
            task = await self.asleep(connection.execute(sql))
            await connection.cancel_safe()
            await task

    async def begin(self, who: int, name: str | None, force_rollback: bool) -> None:
        held = self.held[who]
        transaction = AsyncTransaction(held.connection, name, force_rollback)
        await transaction.__aenter__()
        held.transactions.append(transaction)

    async def leave(self, who: int, error: BaseException | None) -> Any:
        held = self.held[who]
        return await self._leave(held, error) if held.transactions else None

    async def commit(self, who: int) -> Any:
        async with self._on(who) as connection:
            await connection.commit()

    async def rollback(self, who: int) -> Any:
        async with self._on(who) as connection:
            await connection.rollback()

    async def attribute(self, who: int, name: str, value: Any) -> Any:
        async with self._on(who) as connection:
            await getattr(connection, f"set_{name}")(value)

    async def open_cursor(self, who: int, sql: str, scrollable: bool | None, withhold: bool) -> Any:
        held = self.held[who]
        name = f"named_{len(held.cursors)}"
        cursor = held.connection.cursor(name, scrollable=scrollable, withhold=withhold)
        held.cursors.append(cursor)
        await cursor.execute(sql)
        return cursor.description and [each.name for each in cursor.description]

    async def steal_cursor(self, who: int, name: str) -> Any:
        async with self.held[who].connection.cursor(name) as cursor:
            return await cursor.fetchmany(1)

    async def read_cursor(self, who: int, count: int) -> Any:
        cursors = self.held[who].cursors
        return (await cursors[-1].fetchmany(count), cursors[-1].rownumber) if cursors else None

    async def scroll_cursor(self, who: int, count: int, mode: str) -> Any:
        for cursor in self.held[who].cursors[-1:]:
            await cursor.scroll(count, mode)

    async def close_cursor(self, who: int) -> Any:
        for cursor in self.held[who].cursors[-1:]:
            await cursor.close()
            self.held[who].cursors.pop()

    async def notifies(self, who: int) -> Any:
        async with self._on(who) as connection:
            return [each async for each in connection.notifies(timeout=0)]

    async def close(self, who: int) -> Any:
        async with self._on(who) as connection:
            await connection.close()

    async def exhaust(self, who: int) -> Any:
        taken = [await self.pool.getconn(timeout=60) for _ in range(_SIZE - len(self.held))]
        try:
            await self.pool.getconn(timeout=0.01)
        finally:
            for each in taken:
                await self.pool.putconn(each)

    async def at_once(self, who: int, *statements: str) -> Any:
        seen = await asyncio.gather(
            *(self.execute(POOL, sql) for sql in statements), return_exceptions=True
        )
        return sorted(f"{type(one).__name__}: {one}" for one in seen)


arguments: list[tuple[Any, ...]] = [
    ("INSERT INTO app.item (v) VALUES (%s)", 4),
    ("INSERT INTO app.item (v) VALUES (%s)", -4),
    ("INSERT INTO app.item (v) VALUES (%s)", "a text"),
    ("UPDATE app.parent SET v = %s WHERE id = %s", "new", 1),
    ("SELECT set_config('app.name', %s, true)", "tom"),
]
MANY = ["INSERT INTO app.item (v) VALUES (%s)", "INSERT INTO app.item (v) VALUES (%s) RETURNING v"]
rows = st.sampled_from([[(6,), (7,)], [(6,), (-7,)], [(6,), ("text",)], []])
copied = st.sampled_from([[(2,), (3,)], [(2,), (2,)], [(-2,)], [("text",)]])
COPIES = [
    "COPY app.watched FROM STDIN",
    "COPY app.nothing FROM STDIN",
    "COPY app.watched TO STDOUT",
    "SELECT 1",
]
crowds: list[tuple[Any, ...]] = [
    ("UPDATE app.parent SET v = v || '!'", "SELECT 1/0", "INSERT INTO app.log VALUES ('at once')"),
    ("INSERT INTO app.watched VALUES (7)", "INSERT INTO app.watched VALUES (-7)", "SELECT 1"),
]
attributes: list[tuple[Any, ...]] = [
    *(("autocommit", value) for value in (True, True, False)),
    *(("read_only", value) for value in (True, False, None)),
    *(("deferrable", value) for value in (True, None)),
    *(("isolation_level", value) for value in (*IsolationLevel, None)),
]
acts: dict[str, st.SearchStrategy[tuple[Any, ...]]] = {
    "execute": st.tuples(sql),
    "fetch": st.tuples(st.sampled_from(READS)),
    "query": st.tuples(sql, st.sampled_from(["prepare", "binary", "dict", "client", "raw"])),
    "with_arguments": st.sampled_from(arguments),
    "many": st.tuples(st.sampled_from(MANY), rows, st.booleans()),
    "stream": st.tuples(
        st.one_of(st.sampled_from(READS), sql), st.sampled_from([1, 2]), st.integers(1, 3)
    ),
    "copy_in": st.tuples(st.sampled_from([COPIES[0], *COPIES]), copied, st.booleans()),
    "copy_out": st.tuples(st.sampled_from([*READS[:3], "SELECT 1/0"]), st.integers(1, 3)),
    "interrupted": st.just(("SELECT pg_sleep(60)",)),
    "cancelled": st.just(("SELECT pg_sleep(60)",)),
    "cancel_safe": st.just(("SELECT pg_sleep(60)",)),
    "begin": st.tuples(st.sampled_from([None, None, "s1", "Other"]), st.booleans()),
    "leave": st.tuples(
        st.sampled_from([None, None, psycopg.Rollback(), LookupError("left")]),
    ),
    "commit": st.just(()),
    "rollback": st.just(()),
    "attribute": st.sampled_from(attributes),
    "open_cursor": st.tuples(
        st.sampled_from(READS[:7]),
        st.sampled_from([None, True, False]),
        st.sampled_from([False, False, True]),
    ),
    "steal_cursor": st.sampled_from([("own",), ("nothing",)]),
    "read_cursor": st.tuples(st.integers(1, 3)),
    "scroll_cursor": st.tuples(st.integers(-2, 3), st.sampled_from(["relative", "absolute"])),
    "close_cursor": st.just(()),
    "notifies": st.just(()),
    "close": st.just(()),
    "exhaust": st.just(()),
    "at_once": st.sampled_from(crowds),
    "acquire": st.just(()),
    "release": st.just(()),
}
OFTEN = [
    *["execute"] * 12,
    *["fetch"] * 6,
    *["commit"] * 4,
    *["begin", "leave", "rollback", "attribute"] * 2,
]
sequences = sequences_of(acts, OFTEN, of_pool="at_once")

SESSION_STATE = re.compile(
    "SHOW|current_setting|EXECUTE|FETCH|PREPARE|DEALLOCATE|DISCARD|currval|lastval|_lock|_unlock|own\\b"
    "|pg_cursors|CLOSE|TEMP TABLE"
)


def several_connections(ops: Iterable[Op]) -> bool:
    """Whether what was done for one connection may come back on another."""
    seen = list(ops)
    return len({each.who for each in seen}) > 1 or any(each.what == "release" for each in seen)


def of_the_session(op: Op) -> bool:
    """Whether it depends on what the session has, other than a transaction."""
    return SESSION_STATE.search(text_of(op)) is not None or "cursor" in op.what


def refused(there: Seen) -> bool:
    return bool(there[0] == "SandboxUnsupportedError")


LIMITS = [DEFERRABLE, LEVEL_SHOWN, NEVER_COMMITS]


CLIENT = Client(connect, close, PsycopgApplication, LIMITS)


@settings(calm, max_examples=20, derandomize=True)
@given(sequences)
def test_an_application_sees_the_same_as_in_production(worlds: Worlds, sequence: list[Op]) -> None:
    """Results, errors and their texts, whatever it does; afterwards the database is as before."""
    worlds.compare(sequence)


ORPHAN = "INSERT INTO app.child VALUES (2, 3, NULL, 2)"
ONE = "INSERT INTO app.item (v) VALUES (1)"
AUTOCOMMIT = ("attribute", "autocommit", True)
LOST = LookupError("left")
TOLD: list[list[tuple[Any, ...] | str]] = [
    [ONE, "COMMIT", ONE, "ROLLBACK", ONE, ("commit",), ONE, ("rollback",)],
    [AUTOCOMMIT, ONE, "SELECT 1/0", ONE, ORPHAN, "SELECT 1", "BEGIN", ONE, ORPHAN, "COMMIT"],
    [ORPHAN, ("commit",), ORPHAN, "INSERT INTO app.parent VALUES (3, 'x')", ("commit",)],
    ["SET CONSTRAINTS ALL IMMEDIATE", ORPHAN, ("commit",), ORPHAN, "SELECT 1", ("rollback",)],
    ["SET LOCAL work_mem = '234kB'", ("commit",), "SHOW work_mem"],
    [ONE, "SELECT 1/0", "SELECT 1", ("commit",), "SELECT 1"],
    [("begin", None, False), ONE, ("begin", "s1", False), ORPHAN, ("leave", LOST), ("leave", None)],
    [("begin", None, False), ("begin", None, False), ORPHAN, ("leave", None), ("leave", None)],
    [("begin", None, True), ONE, ("commit",), ("leave", None), ("begin", "s1", False), ONE],
    [("attribute", "read_only", True), ONE, ("rollback",), ("attribute", "read_only", None), ONE],
    [("open_cursor", READS[0], True, False), ("read_cursor", 1), ("commit",), ("read_cursor", 1)],
    [AUTOCOMMIT, ("open_cursor", READS[0], None, True), ("read_cursor", 1), ("close_cursor",)],
    [AUTOCOMMIT, ("open_cursor", READS[0], None, False), ("open_cursor", READS[6], None, True)],
    [("open_cursor", READS[0], None, True), ("commit",), ("read_cursor", 1), ("rollback",)],
    ["DECLARE own CURSOR FOR SELECT 1", ("steal_cursor", "own"), ("commit",), "FETCH 1 FROM own"],
    [AUTOCOMMIT, ("copy_in", COPIES[0], [(-2,)], False), ("copy_in", COPIES[0], [(2,)], True)],
    [("copy_in", COPIES[0], [(-2,)], False), ("commit",), ("copy_in", COPIES[0], [(2,)], True)],
    [("copy_in", COPIES[2], [(2,)], False), "SELECT 1", ("commit",)],
    [ONE, ("copy_out", READS[0], 1), ("commit",), ONE, ("commit",)],
    [AUTOCOMMIT, ("stream", "INSERT INTO app.item (v) VALUES (1), (2) RETURNING v", 1, 1), ONE],
    [AUTOCOMMIT, ("copy_out", READS[0], 1), ("stream", READS[0], 1, 1), ("stream", ONE, 1, 1), ONE],
    [AUTOCOMMIT, ("many", MANY[1], [(6,), (7,)], True), ("many", MANY[0], [(6,), (-7,)], False)],
    [("interrupted", "SELECT pg_sleep(60)"), "SELECT 1", ("rollback",), ONE],
    [AUTOCOMMIT, ("cancelled", "SELECT pg_sleep(60)"), ("cancel_safe", "SELECT pg_sleep(60)"), ONE],
    [ONE, ("close",), ONE, ("commit",), ("release",), ("acquire",), ONE, ("exhaust",)],
    [
        ("query", READS[0], "prepare"),
        ("rollback",),
        ("query", READS[0], "prepare"),
        ("query", "", "raw"),
    ],
]


@pytest.mark.parametrize("steps", TOLD, ids=range(len(TOLD)))
def test_what_matters_most(worlds: Worlds, steps: list[tuple[Any, ...] | str]) -> None:
    """The same for what no random choice may leave out."""
    told = [("execute", step) if isinstance(step, str) else step for step in steps]
    worlds.compare([Op(step[0], 0, step[1:]) for step in told])


@pytest.mark.long
@pytest.mark.timeout(1200)
@settings(calm, max_examples=40 * TIMES, derandomize=True)
@given(sequences)
def test_many_applications_see_the_same_as_in_production(worlds: Worlds, sequence: list[Op]) -> None:
    """The same, with many more."""
    worlds.compare(sequence)
