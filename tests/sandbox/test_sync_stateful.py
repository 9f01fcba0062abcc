"""An application with threads sees the same in a sync engine's sandbox, on psycopg2; nothing lasts."""

from __future__ import annotations

import asyncio
import contextvars
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError

from ..depth import TIMES
from .differential import (
    DDL,
    DEFERRABLE,
    LEVEL_SHOWN,
    NEVER_COMMITS,
    POOL,
    READS,
    SESSION,
    WRITES,
    Application,
    Client,
    Op,
    Seen,
    Worlds,
    calm,
    sequences_of,
    sql,
)
from .test_sqlalchemy_stateful import CORE, CROWDS, MODES

MOST = 4
"""Connections of the pool."""


async def connect(url: str) -> Any:
    return create_engine(
        f"postgresql+psycopg2{url.removeprefix('postgresql')}",
        pool_size=MOST - 1,
        max_overflow=1,
        pool_timeout=0.05,
        connect_args={"options": "-c app.name="},
    )


async def close(engine: Any) -> None:
    engine.dispose()


class SyncApplication(Application):
    """What applications do with an engine: each connection has a thread of its own."""

    def __init__(self, pool: Any) -> None:
        super().__init__(pool)
        self.threads = {who: ThreadPoolExecutor(1) for who in (0, 1, 2, POOL)}
        self.nesting: dict[int, list[Any]] = {}
        self.modes: dict[int, str] = {}

    async def do(self, op: Op) -> Seen:
        """With what the connection tells afterwards."""
        seen = await super().do(op)
        if op.who not in self.held:
            return seen
        used: Connection = self.held[op.who]
        told = used.in_transaction(), used.in_nested_transaction(), used.closed, used.invalidated
        return *seen, told

    async def finish(self) -> list[Any]:
        try:
            return await super().finish()
        finally:
            for each in self.threads.values():
                each.shutdown()

    def in_transaction(self, who: int) -> bool:
        used: Any = self.held[who]
        if used.closed or used.invalidated:
            return False
        return bool(used._dbapi_connection.dbapi_connection.info.transaction_status)

    def note(self, op: Op) -> None:
        super().note(op)
        # What has one snapshot keeps the connection to itself.
        mode = self.modes.get(op.who, "plain")
        if mode not in ("plain", "autocommit") and op.who in self.held and self.in_transaction(op.who):
            self.busy = op.who

    def text(self, error: Exception) -> str:
        said = re.sub(r"0x[0-9A-F]+|(?<=c_)[0-9a-f]+_\d+", "", super().text(error))
        code = getattr(error.orig, "pgcode", None) if isinstance(error, DBAPIError) else None
        return f"{said}, {code}"

    async def _in_thread(self, who: int, call: Callable[[], Any]) -> Any:
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self.threads[who], context.run, call)

    async def _on(self, who: int, act: Callable[[Any], Any]) -> Any:
        def run() -> Any:
            if who != POOL:
                return act(self.held[who])
            with self.pool.begin() as connection:
                return act(connection)

        return await self._in_thread(who, run)

    async def acquire(self, who: int, mode: str = "plain") -> None:
        if who == POOL or who in self.held:
            return
        engine = self.pool.execution_options(**MODES[mode])
        self.held[who] = await self._in_thread(who, engine.connect)
        self.modes[who] = mode

    async def release(self, who: int) -> None:
        if who != POOL:
            self.nesting.pop(who, None)
            self.modes.pop(who, None)
            await self._in_thread(who, self.held.pop(who).close)

    async def execute(self, who: int, sql: str) -> Any:
        def act(connection: Any) -> Any:
            result = connection.exec_driver_sql(sql)
            return [tuple(row) for row in result.all()] if result.returns_rows else result.rowcount

        return await self._on(who, act)

    fetch = execute

    async def core(self, who: int, name: str) -> Any:
        def act(connection: Any) -> Any:
            result = connection.execute(*CORE[name])
            return [tuple(row) for row in result.all()] if result.returns_rows else result.rowcount

        return await self._on(who, act)

    async def raw(self, who: int, sql: str) -> Any:
        """Of psycopg2's connection, in a transaction that SQLAlchemy knows of: it ends no other."""

        def act(connection: Any) -> Any:
            if not connection.in_transaction():
                connection.begin()
            with connection.connection.driver_connection.cursor() as cursor:
                cursor.execute(sql)
                return cursor.fetchall() if cursor.description else cursor.rowcount

        return await self._on(who, act)

    async def stream(self, who: int, sql: str, count: int) -> Any:
        """Of a cursor of the server."""

        def act(connection: Any) -> Any:
            streams = {"stream_results": True, "yield_per": 1}
            with connection.execute(text(sql), execution_options=streams) as result:
                return [tuple(row) for row in result.fetchmany(count)]

        return await self._on(who, act)

    async def cancelled(self, who: int) -> Any:
        """By psycopg2's `cancel`, from another thread."""
        if who == POOL:
            return None
        task = await self.asleep(self.execute(who, "SELECT pg_sleep(60)"))
        if not task.done():
            used: Any = self.held[who]
            await asyncio.to_thread(used._dbapi_connection.dbapi_connection.cancel)
        return await task

    async def of(self, who: int, what: str) -> Any:
        """`begin`, `commit`, `rollback` or `invalidate`."""
        if who != POOL:
            await self._in_thread(who, getattr(self.held[who], what))

    async def nested(self, who: int, what: str) -> Any:
        """`begin_nested`, or the end of the innermost."""
        if who == POOL:
            return
        nesting = self.nesting.setdefault(who, [])
        if what == "begin":
            nesting.append(await self._in_thread(who, self.held[who].begin_nested))
        elif nesting:
            await self._in_thread(who, getattr(nesting.pop(), what))

    async def exhausted(self, who: int) -> Any:
        def take() -> None:
            taken: list[Any] = []
            try:
                for _ in range(5):
                    taken.append(self.pool.connect())
            finally:
                for each in taken:
                    each.close()

        await self._in_thread(who, take)

    async def dispose(self, who: int) -> Any:
        if not self.held:  # else nobody closes what comes back
            await self._in_thread(who, self.pool.dispose)

    async def at_once(self, who: int, *statements: str) -> Any:
        def run(statement: str) -> object:
            with self.pool.begin() as connection:
                return connection.exec_driver_sql(statement).rowcount

        free = MOST - len(self.held)  # where one waits for another, chance says for how long
        each = (asyncio.to_thread(run, statement) for statement in statements[:free])
        seen = await asyncio.gather(*each, return_exceptions=True)
        return str(sorted(f"{type(one).__name__}: {one}" for one in seen))


plain_sql = st.one_of(*(st.sampled_from(each) for each in (WRITES, WRITES, READS, SESSION, DDL)))
acts: dict[str, st.SearchStrategy[tuple[Any, ...]]] = {
    "execute": st.tuples(plain_sql),
    "fetch": st.tuples(st.sampled_from(READS)),
    "core": st.tuples(st.sampled_from(sorted(CORE))),
    "raw": st.tuples(sql),
    "stream": st.tuples(st.sampled_from(READS[:7]), st.integers(1, 3)),
    "cancelled": st.just(()),
    "of": st.tuples(st.sampled_from(["begin", *["commit", "rollback"] * 4, "invalidate"])),
    "nested": st.tuples(st.sampled_from(["begin", "begin", "commit", "rollback"])),
    "exhausted": st.just(()),
    "dispose": st.just(()),
    "at_once": st.sampled_from(CROWDS),
    "acquire": st.tuples(st.sampled_from(sorted(MODES))),
    "release": st.just(()),
}
OFTEN = ["of"] * 9 + ["execute"] * 7 + ["core"] * 5 + ["nested"] * 3 + ["acquire"] * 3 + ["release"] * 2
sequences = sequences_of(acts, OFTEN, of_pool="at_once")

CLIENT = Client(connect, close, SyncApplication, [DEFERRABLE, LEVEL_SHOWN, NEVER_COMMITS])


@settings(calm, max_examples=15, derandomize=True)
@given(sequences)
def test_an_application_sees_the_same_as_in_production(worlds: Worlds, sequence: list[Op]) -> None:
    """Rows, states, errors and their texts; afterwards the database is as before."""
    worlds.compare(sequence)


@pytest.mark.proof
@pytest.mark.timeout(1200)
@settings(calm, max_examples=40 * TIMES, derandomize=True)
@given(sequences)
def test_many_applications_see_the_same_as_in_production(worlds: Worlds, sequence: list[Op]) -> None:
    """The same, with many more."""
    worlds.compare(sequence)
