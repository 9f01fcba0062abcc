"""An application sees the same in asyncpg's sandbox as in production; and nothing of it lasts."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ..depth import TIMES
from ..virtual_time import pass_time
from .differential import (
    DDL,
    DEFERRABLE,
    LEVEL_SHOWN,
    NEVER_COMMITS,
    POOL,
    READS,
    Application,
    Client,
    Limit,
    Op,
    Worlds,
    calm,
    sequences_of,
    sql,
)


async def connect(url: str) -> Any:
    return await asyncpg.create_pool(url, min_size=0, max_size=4, server_settings={"app.name": ""})


async def close(pool: Any) -> None:
    pool.terminate()


@dataclass
class Held:
    """A connection that the application has acquired, and what it made with it."""

    connection: Any
    transactions: list[Any] = field(default_factory=list[Any])
    cursors: list[Any] = field(default_factory=list[Any])
    prepared: dict[str, Any] = field(default_factory=dict[str, Any])


class AsyncpgApplication(Application):
    """What applications do with an asyncpg pool."""

    def in_transaction(self, who: int) -> bool:
        return bool(self.held[who].connection.is_in_transaction())

    def _on(self, who: int) -> Any:
        return self.pool if who == POOL else self.held[who].connection

    async def acquire(self, who: int) -> None:
        if who != POOL and who not in self.held:
            self.held[who] = Held(await self.pool.acquire(timeout=60))

    async def release(self, who: int) -> None:
        if who != POOL:
            held = self.held.pop(who)
            held.cursors.clear()
            await self.pool.release(held.connection)

    async def execute(self, who: int, sql: str) -> Any:
        return await self._on(who).execute(sql)

    async def fetch(self, who: int, sql: str) -> Any:
        return await self._on(who).fetch(sql)

    async def with_arguments(self, who: int, sql: str, *args: Any) -> Any:
        return await self._on(who).execute(sql, *args)

    async def many(self, who: int, sql: str, rows: Iterable[Any]) -> Any:
        return await self._on(who).executemany(sql, rows)

    async def copy_in(self, who: int, table: str, rows: Iterable[Any]) -> Any:
        return await self._on(who).copy_records_to_table(table, schema_name="app", records=rows)

    async def copy_out(self, who: int, query: str) -> Any:
        got: list[bytes] = []

        async def sink(data: bytes) -> None:
            got.append(data)

        return (await self._on(who).copy_from_query(query, output=sink), b"".join(got))

    async def interrupted(self, who: int, sql: str) -> Any:
        task = await self.asleep(self._on(who).execute(sql, timeout=20))
        pass_time(20)
        return await task

    async def cancelled(self, who: int, sql: str) -> Any:
        task = await self.asleep(self._on(who).fetch(sql))
        task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return "cancelled"

    async def begin(self, who: int, isolation: str | None, readonly: bool, deferrable: bool) -> None:
        if who != POOL:
            held = self.held[who]
            transaction = held.connection.transaction(
                isolation=isolation, readonly=readonly, deferrable=deferrable
            )
            await transaction.start()
            held.transactions.append(transaction)

    async def commit(self, who: int) -> Any:
        if who != POOL and self.held[who].transactions:
            await self.held[who].transactions.pop().commit()

    async def rollback(self, who: int) -> Any:
        if who != POOL and self.held[who].transactions:
            await self.held[who].transactions.pop().rollback()

    async def open_cursor(self, who: int, sql: str) -> Any:
        if who != POOL:
            self.held[who].cursors.append(await self.held[who].connection.cursor(sql))

    async def read_cursor(self, who: int, count: int) -> Any:
        if who != POOL and self.held[who].cursors:
            return await self.held[who].cursors[-1].fetch(count)
        return None

    async def skip_cursor(self, who: int, count: int) -> Any:
        if who != POOL and self.held[who].cursors:
            return await self.held[who].cursors[-1].forward(count)
        return None

    async def iterate(self, who: int, sql: str) -> Any:
        if who != POOL:
            return [row async for row in self.held[who].connection.cursor(sql, prefetch=1)]
        return None

    async def prepare(self, who: int, sql: str) -> Any:
        if who != POOL:
            self.held[who].prepared[sql] = await self.held[who].connection.prepare(sql)
            return self.held[who].prepared[sql].get_attributes()
        return None

    async def run_prepared(self, who: int, sql: str) -> Any:
        if who != POOL and sql in self.held[who].prepared:
            return await self.held[who].prepared[sql].fetch()
        return None

    async def at_once(self, who: int, *statements: str) -> Any:
        each = (self.pool.execute(sql) for sql in statements)
        seen = await asyncio.gather(*each, return_exceptions=True)
        return sorted(f"{type(one).__name__}: {one}" for one in seen)

    def plain(self, value: Any) -> Any:
        """Records as tuples."""
        if isinstance(value, asyncpg.Record):
            return tuple(value.items())
        return list(map(self.plain, value)) if isinstance(value, list) else value  # pyright: ignore

    async def reset(self, who: int) -> Any:
        if who != POOL:
            await self.held[who].connection.reset()


isolations = st.sampled_from([None, None, "read_committed", "repeatable_read", "serializable"])
arguments: list[tuple[Any, ...]] = [
    ("INSERT INTO app.item (v) VALUES ($1)", 4),
    ("INSERT INTO app.item (v) VALUES ($1)", -4),
    ("INSERT INTO app.item (v) VALUES ($1)", "a text"),
    ("UPDATE app.parent SET v = $2 WHERE id = $1", 1, "new"),
]
rows = st.sampled_from([[(6,), (7,)], [(6,), (-7,)], [(6,), ("text",)]])
crowds: list[tuple[Any, ...]] = [
    ("UPDATE app.parent SET v = v || '!'", "SELECT 1/0", "INSERT INTO app.log VALUES ('at once')"),
    ("INSERT INTO app.watched VALUES (7)", "INSERT INTO app.watched VALUES (-7)", "SELECT 1"),
]
acts: dict[str, st.SearchStrategy[tuple[Any, ...]]] = {
    "execute": st.tuples(sql),
    "fetch": st.tuples(st.sampled_from(READS)),
    "with_arguments": st.sampled_from(arguments),
    "many": st.tuples(st.just("INSERT INTO app.item (v) VALUES ($1)"), rows),
    "copy_in": st.tuples(st.just("watched"), st.sampled_from([[(2,), (3,)], [(2,), (2,)], [(-2,)]])),
    "copy_out": st.tuples(st.sampled_from([*READS[:3], "SELECT 1/0"])),
    "interrupted": st.just(("SELECT pg_sleep(60)",)),
    "cancelled": st.just(("SELECT pg_sleep(60)",)),
    "begin": st.tuples(isolations, st.booleans(), st.booleans()),
    "commit": st.just(()),
    "rollback": st.just(()),
    "open_cursor": st.tuples(st.sampled_from(READS[:7])),
    "read_cursor": st.tuples(st.integers(1, 3)),
    "skip_cursor": st.tuples(st.integers(1, 3)),
    "iterate": st.tuples(st.sampled_from(READS[:7])),
    "prepare": st.tuples(st.sampled_from([*READS[:7], *DDL[:1], "COMMIT", "BEGIN"])),
    "run_prepared": st.tuples(st.sampled_from([*READS[:7], *DDL[:1], "COMMIT", "BEGIN"])),
    "reset": st.just(()),
    "at_once": st.sampled_from(crowds),
    "acquire": st.just(()),
    "release": st.just(()),
}
OFTEN = ["execute"] * 12 + ["fetch"] * 6 + ["begin", "commit", "rollback"] * 2
sequences = sequences_of(acts, OFTEN, of_pool="at_once")

SESSION_STATE = re.compile(
    r"(^|; )(RE)?SET |set_config|SHOW|current_setting|EXECUTE|FETCH|PREPARE|DEALLOCATE|currval|lastval"
    "|_lock|_unlock|own|CLOSE|TEMP TABLE"
)
UNSYNCED = {"prepare", "iterate", "open_cursor", "with_arguments"}

LIMITS = [
    DEFERRABLE,
    LEVEL_SHOWN,
    NEVER_COMMITS,
    Limit(
        "asyncpg's prepare() leaves production inside of an implicit transaction, so that modes which "
        "come next are too late; the sandbox takes them",
        lambda op, here, there, before: (
            here[0] == "ActiveSQLTransactionError" and any(each.what in UNSYNCED for each in before)
        ),
    ),
]


CLIENT = Client(connect, close, AsyncpgApplication, LIMITS)


@settings(calm, max_examples=20, derandomize=True)
@given(sequences)
def test_an_application_sees_the_same_as_in_production(worlds: Worlds, sequence: list[Op]) -> None:
    """Results, errors and their texts, whatever it does; afterwards the database is as before."""
    worlds.compare(sequence)


ORPHAN = "INSERT INTO app.child VALUES (2, 3, NULL, 2)"
ONE = "INSERT INTO app.item (v) VALUES (1)"
TOLD = [
    [("BEGIN", ONE, "COMMIT", "BEGIN", ONE, "ROLLBACK")],
    [(ONE, "SELECT 1/0", "INSERT INTO app.item (v) VALUES (-1)", ONE)],
    [("BEGIN", ORPHAN, "COMMIT", ORPHAN, "SELECT 1")],
    [
        (
            "BEGIN",
            ORPHAN,
            "INSERT INTO app.parent VALUES (3, 'three')",
            "COMMIT",
            "BEGIN",
            "DELETE FROM app.child",
        )
    ],
    [
        (
            "BEGIN",
            "SET CONSTRAINTS ALL IMMEDIATE",
            ORPHAN,
            "COMMIT",
            "BEGIN",
            ORPHAN,
            "SELECT 1",
            "COMMIT",
        )
    ],
    [("BEGIN", ONE, "COMMIT", "BEGIN", ORPHAN, "SELECT 1", "ROLLBACK")],
    [("BEGIN", "SET LOCAL work_mem = '234kB'", "COMMIT", "SHOW work_mem")],
    [("SET LOCAL work_mem = '234kB'", "SHOW work_mem")],
    [("BEGIN", "SELECT 1/0", "COMMIT", "SELECT 1")],
    [("BEGIN READ ONLY", ONE, "ROLLBACK", ONE, "BEGIN READ ONLY", "COMMIT", ONE)],
    [("BEGIN", ONE, "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", ONE, "COMMIT")],
    [("BEGIN; INSERT INTO app.watched VALUES (-1); COMMIT", "SELECT 1", "ROLLBACK")],
    [("SELECT lastval()", ONE, "SELECT lastval()"), ("SELECT lastval()",)],
    [("PREPARE saved AS SELECT 1", "SELECT pg_advisory_lock(7)"), ("PREPARE saved AS SELECT 1",)],
    [
        ("CREATE TABLE app.extra (a int)", "SELECT * FROM app.extra"),
        ("CREATE TABLE app.extra (b text)", "SELECT * FROM app.extra"),
    ],
    [("BEGIN", "DECLARE own CURSOR FOR SELECT 1", "FETCH 1 FROM own", "COMMIT", "FETCH 1 FROM own")],
]
"""Texts of one block after the other, on one connection."""


@pytest.mark.parametrize("way", ["execute", "fetch"])
@pytest.mark.parametrize("blocks", TOLD, ids=lambda blocks: blocks[0][0])
def test_what_matters_most(worlds: Worlds, blocks: list[tuple[str, ...]], way: str) -> None:
    """The same for what no random choice may leave out."""
    for texts in blocks:
        worlds.compare([Op("execute" if "; " in text else way, 0, (text,)) for text in texts])


@pytest.mark.long
@pytest.mark.timeout(1200)
@settings(calm, max_examples=40 * TIMES, derandomize=True)
@given(sequences)
def test_many_applications_see_the_same_as_in_production(worlds: Worlds, sequence: list[Op]) -> None:
    """The same, with many more."""
    worlds.compare(sequence)
