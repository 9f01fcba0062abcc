"""What applications do with an asyncpg pool, as data: operations, and what came of each of them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from lifekit import SandboxBusyError

SCHEMA = """
DROP SCHEMA IF EXISTS app CASCADE;
CREATE SCHEMA app;
CREATE TABLE app.parent (id int PRIMARY KEY, v text NOT NULL DEFAULT 'x');
CREATE TABLE app.child (
    id int PRIMARY KEY,
    parent int REFERENCES app.parent DEFERRABLE INITIALLY DEFERRED,
    strict int REFERENCES app.parent DEFERRABLE INITIALLY IMMEDIATE,
    u int CONSTRAINT child_u UNIQUE DEFERRABLE INITIALLY DEFERRED
);
CREATE TABLE app.item (id serial PRIMARY KEY, v int CONSTRAINT positive CHECK (v >= 0));
CREATE TABLE app.log (line text);
CREATE TABLE app.watched (id int PRIMARY KEY);
CREATE FUNCTION app.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.id < 0 THEN RAISE EXCEPTION 'watched: %', NEW.id; END IF;
    INSERT INTO app.log VALUES ('checked ' || NEW.id); RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER watch AFTER INSERT ON app.watched DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION app.note();
INSERT INTO app.parent VALUES (1, 'one'), (2, '2');
INSERT INTO app.child VALUES (1, 1, 1, 1);
INSERT INTO app.item (v) VALUES (10), (20);
"""

POOL = 3
"""Who acts: one of three connections, or the pool itself."""


@dataclass(frozen=True)
class Op:
    """One operation: the name of one of the application's methods, who acts, and with what."""

    what: str
    who: int
    args: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        who = "pool" if self.who == POOL else f"c{self.who}"
        return f"{who}.{self.what}({', '.join(map(repr, self.args))})"


@dataclass
class Held:
    """A connection that the application has acquired, and what it made with it."""

    connection: Any
    transactions: list[Any] = field(default_factory=list[Any])
    cursors: list[Any] = field(default_factory=list[Any])
    prepared: dict[str, Any] = field(default_factory=dict[str, Any])


class Application:
    """Does what it is told with a pool, and writes down what it sees."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.held: dict[int, Held] = {}

    def who_is_in_transaction(self) -> int | None:
        """The connection that is in a transaction."""
        return next((i for i, held in self.held.items() if held.connection.is_in_transaction()), None)

    async def do(self, op: Op) -> tuple[Any, ...]:
        """What the application sees of one operation."""
        if op.who != POOL and op.what != "acquire" and op.who not in self.held:
            return ("not acquired",)
        try:
            async with asyncio.timeout(20):
                seen: tuple[Any, ...] = ("fine", plain(await getattr(self, op.what)(op.who, *op.args)))
        except SandboxBusyError:
            return ("busy",)
        except Exception as error:
            text = re.sub(r"__asyncpg_(\w+?)_\w+__|0x[0-9a-f]+", r"\1", str(error))
            seen = (type(error).__name__, getattr(error, "sqlstate", None), text)
        if op.who in self.held:
            seen += ("in transaction" if self.held[op.who].connection.is_in_transaction() else "",)
        return seen

    def _on(self, who: int) -> Any:
        return self.pool if who == POOL else self.held[who].connection

    async def acquire(self, who: int) -> None:
        if who != POOL and who not in self.held:
            self.held[who] = Held(await self.pool.acquire(timeout=5))

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
        return await self._on(who).execute(sql, timeout=0.02)

    async def cancelled(self, who: int, sql: str) -> Any:
        task = asyncio.create_task(self._on(who).fetch(sql))
        for _ in range(20):
            await asyncio.sleep(0.001)
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

    async def reset(self, who: int) -> Any:
        if who != POOL:
            await self.held[who].connection.reset()

    async def finish(self) -> list[Any]:
        """Give everything back, and look at what there is."""
        seen: list[Any] = [await self.do(Op("release", who)) for who in sorted(self.held)]
        for table in ("parent", "child", "item", "log", "watched"):
            query = f"SELECT t::text FROM app.{table} AS t ORDER BY 1"
            seen.append((table, await self.do(Op("fetch", POOL, (query,)))))
        return seen


def plain(value: Any) -> Any:
    """What can be compared: records as tuples."""
    if isinstance(value, asyncpg.Record):
        return tuple(value.items())
    if isinstance(value, list):
        return list(map(plain, value))  # pyright: ignore
    return value
