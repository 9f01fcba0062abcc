"""An application sees the same in SQLAlchemy's sandbox as in production; and nothing of it lasts."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Column, ForeignKey, Integer, MetaData, Table, insert, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

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


async def connect(url: str) -> Any:
    return create_async_engine(
        f"postgresql+asyncpg{url.removeprefix('postgresql')}",
        pool_size=3,
        max_overflow=1,
        pool_timeout=0.05,
        connect_args={"server_settings": {"app.name": ""}},
    )


async def close(engine: Any) -> None:
    await engine.dispose()


class Base(DeclarativeBase):
    """The application's tables."""

    metadata = MetaData(schema="app")


class Parent(Base):
    __tablename__ = "parent"
    id: Mapped[int] = mapped_column(primary_key=True)
    v: Mapped[str]


class Child(Base):
    __tablename__ = "child"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent: Mapped[int | None] = mapped_column(ForeignKey("app.parent.id"))
    u: Mapped[int | None]


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    v: Mapped[int | None]


EXTRA = Table("extra", MetaData(schema="app"), Column("a", Integer))
OBJECTS: dict[str, Callable[[], Any]] = {
    "item": lambda: Item(v=3),
    "bad item": lambda: Item(v=-3),
    "same item": lambda: Item(id=1, v=4),
    "parent": lambda: Parent(id=3, v="three"),
    "orphan": lambda: Child(id=5, parent=3, u=5),
    "twin": lambda: Child(id=6, parent=1, u=1),
}
CORE: dict[str, tuple[Any, Any]] = {
    "select": (select(Item.id, Item.v).order_by(Item.id), None),
    "insert": (insert(Item).values(v=6), None),
    "insert bad": (insert(Item).values(v=-6), None),
    "insert many": (insert(Item), [{"v": 7}, {"v": 8}]),
    "insert many, one bad": (insert(Item), [{"v": 7}, {"v": -8}]),
    "insert many returning": (insert(Item).returning(Item.id), [{"v": 7}, {"v": 8}]),
    "update": (update(Parent).values(v=Parent.v + "*").returning(Parent.v), None),
    "update one": (update(Parent).where(Parent.id == 2).values(v="second"), None),
    "insert twice": (insert(Parent), [{"id": 9, "v": "9"}, {"id": 9, "v": "9"}]),
    "insert orphan": (insert(Child).values(id=7, parent=70), None),
    "text": (text("SELECT :a || 'b'"), {"a": "x"}),
}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "autocommit": {"isolation_level": "AUTOCOMMIT"},
    "repeatable": {"isolation_level": "REPEATABLE READ"},
    "serializable": {"isolation_level": "SERIALIZABLE"},
    "read only": {"postgresql_readonly": True},
    "deferrable": {"postgresql_deferrable": True, "isolation_level": "SERIALIZABLE"},
}


class Held:
    """A connection or a session of the application's."""

    def __init__(self, used: Any, mode: str) -> None:
        self.used: Any = used
        self.mode = mode
        self.nested: list[Any] = []
        self.objects: dict[str, Any] = {}

    async def connection(self) -> AsyncConnection:
        """What statements go over."""
        used = self.used
        return await used.connection() if isinstance(used, AsyncSession) else used

    def drivers(self) -> Iterator[Any]:
        """Yield the connection of asyncpg that it has, if any."""
        sync: list[Any] = []
        if not isinstance(self.used, AsyncSession):
            sync = [self.used.sync_connection]
        elif (transaction := self.used.sync_session.get_transaction()) is not None:
            connections: dict[Any, Any] = vars(transaction)["_connections"]
            sync = [each[0] for each in set(connections.values())]
        for each in sync:
            if each is not None and not each.closed and not each.invalidated:
                yield each._dbapi_connection.dbapi_connection._connection


class SqlalchemyApplication(Application):
    """What applications do with an engine."""

    async def do(self, op: Op) -> Seen:
        """With what the connection or session tells afterwards."""
        seen = await super().do(op)
        if op.who not in self.held:
            return seen
        used = self.held[op.who].used
        told = [used.in_transaction(), used.in_nested_transaction()]
        if isinstance(used, AsyncSession):
            sets = used.new, used.dirty, used.deleted, used.identity_map.values()
            told += [used.is_active, *(sorted(type(each).__name__ for each in one) for one in sets)]
        else:
            told += [used.closed, used.invalidated]
        return *seen, told

    def in_transaction(self, who: int) -> bool:
        return any(each.is_in_transaction() for each in self.held[who].drivers())

    def note(self, op: Op) -> None:
        super().note(op)
        held = self.held.get(op.who)
        # What has one snapshot keeps the connection to itself.
        if held and held.mode not in ("plain", "autocommit") and self.in_transaction(op.who):
            self.busy = op.who

    def text(self, error: Exception) -> str:
        text = re.sub(r"0x[0-9A-F]+", "", super().text(error))
        code = getattr(error.orig, "sqlstate", None) if isinstance(error, DBAPIError) else None
        return f"{text}, {code}"

    def plain(self, value: Any) -> Any:
        """Rows as tuples."""
        rows: Any = value
        return [tuple(each) for each in rows] if isinstance(value, list) else value

    async def acquire(self, who: int, kind: str = "session", mode: str = "plain") -> None:
        engine: AsyncEngine = self.pool.execution_options(**MODES[mode])
        if who == POOL or who in self.held:
            return
        if kind == "session":
            self.held[who] = Held(AsyncSession(engine), mode)
        else:
            self.held[who] = Held(await engine.connect(), mode)

    async def release(self, who: int) -> None:
        if who != POOL:
            await self.held.pop(who).used.close()

    async def _on(self, who: int, act: Callable[[AsyncConnection], Any]) -> Any:
        if who != POOL:
            return await act(await self.held[who].connection())
        async with self.pool.begin() as connection:
            return await act(connection)

    async def execute(self, who: int, sql: str) -> Any:
        async def act(connection: AsyncConnection) -> Any:
            result = await connection.exec_driver_sql(sql)
            return list(result.all()) if result.returns_rows else result.rowcount

        return await self._on(who, act)

    fetch = execute

    async def core(self, who: int, name: str) -> Any:
        async def act(connection: AsyncConnection) -> Any:
            result = await connection.execute(*CORE[name])
            return list(result.all()) if result.returns_rows else result.rowcount

        return await self._on(who, act)

    async def raw(self, who: int, sql: str) -> Any:
        """Of asyncpg's connection."""

        async def act(connection: AsyncConnection) -> Any:
            raw = await connection.get_raw_connection()
            driver: Any = raw.driver_connection
            return await driver.execute(sql)

        return await self._on(who, act)

    async def stream(self, who: int, sql: str, count: int) -> Any:
        async def act(connection: AsyncConnection) -> Any:
            rows: list[Any] = []
            async with connection.stream(text(sql), execution_options={"yield_per": 1}) as result:
                async for row in result:
                    rows.append(row)
                    if len(rows) == count:
                        break
            return rows

        return await self._on(who, act)

    async def stream_scalars(self, who: int) -> Any:
        async def act(connection: AsyncConnection) -> Any:
            result = await connection.stream_scalars(select(Item.v).order_by(Item.id))
            return str([each async for each in result])

        return await self._on(who, act)

    async def cancelled(self, who: int) -> Any:
        task = await self.asleep(self.execute(who, "SELECT pg_sleep(60)"))
        task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return "cancelled"

    async def of(self, who: int, what: str) -> Any:
        """`begin`, `commit`, `rollback`, and for connections `invalidate`."""
        if who != POOL and hasattr(self.held[who].used, what):
            await getattr(self.held[who].used, what)()

    async def nested(self, who: int, what: str) -> Any:
        """`begin_nested`, or the end of the innermost."""
        if who == POOL:
            return
        held = self.held[who]
        if what == "begin":
            held.nested.append(await held.used.begin_nested())
        elif held.nested:
            await getattr(held.nested.pop(), what)()

    async def option(self, who: int, mode: str) -> Any:
        if who != POOL and isinstance(self.held[who].used, AsyncConnection):
            await self.held[who].used.execution_options(**MODES[mode])
            self.held[who].mode = mode

    async def isolation(self, who: int) -> Any:
        if who != POOL:
            return await (await self.held[who].connection()).get_isolation_level()
        return None

    async def orm(self, who: int, what: str, name: str) -> Any:
        """What sessions do."""
        if who == POOL or not isinstance(self.held[who].used, AsyncSession):
            return None
        held = self.held[who]
        session: Any = held.used
        one: Any = held.objects.get(name)

        def read(_: object) -> Any:
            return one.id, getattr(one, "v", "")

        match what:
            case "add":
                held.objects[name] = OBJECTS[name]()
                session.add(held.objects[name])
            case "merge":
                held.objects[name] = await session.merge(OBJECTS[name]())
            case "get":
                held.objects[name] = one = await session.get(type(OBJECTS[name]()), 1)
                return one is not None and str(one.__dict__.get("v"))
            case "flush" | "reset" | "close":
                await getattr(session, what)()
            case "expire_all" | "expunge_all":
                getattr(session, what)()
            case "rows":
                rows = await session.scalars(select(Item).order_by(Item.id))
                return str([each.v for each in rows.all()])
            case "read" if one is not None:
                return str(await session.run_sync(read))
            case "change" if one is not None:
                values: dict[str, Any] = {
                    "parent": {"v": "changed"},
                    "orphan": {"u": 8},
                    "twin": {"u": 9},
                }
                for attribute, value in values.get(name, {"v": 33}).items():
                    setattr(one, attribute, value)
            case _ if one is not None and what in ("refresh", "delete"):
                await getattr(session, what)(one)
            case _:
                pass
        return None

    async def tables(self, who: int, what: str) -> Any:
        async def act(connection: AsyncConnection) -> Any:
            await connection.run_sync(getattr(EXTRA.metadata, what))

        return await self._on(who, act)

    async def autocommitted(self, who: int, sql: str) -> Any:
        if who != POOL:
            return
        engine = self.pool.execution_options(isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            await connection.exec_driver_sql(sql)

    async def exhausted(self, who: int) -> Any:
        async with AsyncExitStack() as stack:
            for _ in range(5):
                await stack.enter_async_context(self.pool.connect())

    async def dispose(self, who: int) -> Any:
        if not self.held:  # else nobody closes what comes back
            await self.pool.dispose()

    async def at_once(self, who: int, *statements: str) -> Any:
        each = (self.execute(POOL, sql) for sql in statements)
        seen = await asyncio.gather(*each, return_exceptions=True)
        return str(sorted(f"{type(one).__name__}: {one}" for one in seen))


CROWDS: list[tuple[Any, ...]] = [
    ("UPDATE app.parent SET v = v || '!'", "SELECT 1/0", "INSERT INTO app.log VALUES ('at once')"),
    ("INSERT INTO app.watched VALUES (7)", "INSERT INTO app.watched VALUES (-7)", "SELECT 1"),
]
names = st.sampled_from(sorted(OBJECTS))
orm_acts = ["add", "add", "add", "flush", "flush", "merge", "get", "rows", "read", "change", "change"]
orm_acts += ["refresh", "delete", "expire_all", "expunge_all", "reset", "close"]
plain_sql = st.one_of(*(st.sampled_from(each) for each in (WRITES, WRITES, READS, SESSION, DDL)))
acts: dict[str, st.SearchStrategy[tuple[Any, ...]]] = {
    "execute": st.tuples(plain_sql),
    "fetch": st.tuples(st.sampled_from(READS)),
    "core": st.tuples(st.sampled_from(sorted(CORE))),
    "raw": st.tuples(sql),
    "stream": st.tuples(st.sampled_from(READS[:7]), st.integers(1, 3)),
    "stream_scalars": st.just(()),
    "cancelled": st.just(()),
    "of": st.tuples(st.sampled_from(["begin", *["commit", "rollback"] * 4, "invalidate"])),
    "nested": st.tuples(st.sampled_from(["begin", "begin", "commit", "rollback"])),
    "option": st.tuples(st.sampled_from(sorted(MODES))),
    "isolation": st.just(()),
    "orm": st.tuples(st.sampled_from(orm_acts), names),
    "tables": st.tuples(st.sampled_from(["create_all", "drop_all"])),
    "autocommitted": st.tuples(st.sampled_from(WRITES)),
    "exhausted": st.just(()),
    "dispose": st.just(()),
    "at_once": st.sampled_from(CROWDS),
    "acquire": st.tuples(
        st.sampled_from(["connection", "connection", "session"]), st.sampled_from(sorted(MODES))
    ),
    "release": st.just(()),
}
MUCH = ["orm"] * 12 + ["of"] * 10
OFTEN = ["execute"] * 6 + ["core"] * 5 + ["nested"] * 3 + ["acquire"] * 3 + ["release"] * 2
sequences = sequences_of(acts, [*MUCH, *OFTEN], of_pool="at_once")

SESSION_STATE = re.compile(
    "SHOW|current_setting|EXECUTE|FETCH|PREPARE|DEALLOCATE|currval|lastval|_lock|_unlock|own|CLOSE"
    "|TEMP TABLE|set_config|DISCARD"
)
LIMITS = [DEFERRABLE, LEVEL_SHOWN, NEVER_COMMITS]

CLIENT = Client(connect, close, SqlalchemyApplication, LIMITS)


@settings(calm, max_examples=20, derandomize=True)
@given(sequences)
def test_an_application_sees_the_same_as_in_production(worlds: Worlds, sequence: list[Op]) -> None:
    """Rows, states, errors and their texts; afterwards the database is as before."""
    worlds.compare(sequence)


def c0(what: str, *args: Any) -> Op:
    """What the first does."""
    return Op(what, 0, args)


TOLD = {
    "orphan": [c0("orm", "add", "orphan"), c0("orm", "flush", ""), c0("of", "commit")],
    "twin": [c0("orm", "add", "twin"), c0("of", "commit"), c0("of", "rollback"), c0("orm", "rows", "")],
    "core": [c0("core", "insert orphan"), c0("of", "commit"), c0("core", "insert"), c0("of", "commit")],
    "nested": [
        c0("core", "insert"),
        c0("nested", "begin"),
        c0("core", "insert bad"),
        c0("nested", "rollback"),
        c0("core", "insert many"),
        c0("of", "commit"),
        c0("core", "update"),
        c0("of", "rollback"),
    ],
}


@pytest.mark.parametrize("name", TOLD)
def test_what_matters_most(worlds: Worlds, name: str) -> None:
    """The same for what no random choice may leave out."""
    worlds.compare(TOLD[name])


@pytest.mark.long
@pytest.mark.timeout(1200)
@settings(calm, max_examples=40 * TIMES, derandomize=True)
@given(sequences)
def test_many_applications_see_the_same_as_in_production(worlds: Worlds, sequence: list[Op]) -> None:
    """The same, with many more."""
    worlds.compare(sequence)
