"""The sandbox of SQLAlchemy's engines: what applications see in it, and that nothing lasts."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial
from typing import Any
from uuid import uuid4

import asyncpg
import psycopg2
import pytest
from sqlalchemy import (
    Column,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    event,
    func,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, StaticPool

from lifekit import Registry, SandboxBusyError, SandboxEscapedError, SandboxUnsupportedError
from lifekit.drivers.sqlalchemy import driver
from lifekit.embedded import Server
from lifekit.sandbox.asyncpg import lane_of
from lifekit.testing import sandboxing

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    """SQLAlchemy's engines are asyncio's own."""
    return ("asyncio", {"use_uvloop": False})


class Base(DeclarativeBase):
    """The application's tables."""


class Item(Base):
    """A row."""

    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(String, unique=True)
    parent: Mapped[int | None] = mapped_column(
        ForeignKey("item.id", deferrable=True, initially="DEFERRED")
    )


OTHER = Table("other", MetaData(), Column("id", Integer, primary_key=True))
SCHEMA = """
CREATE TABLE item (id serial PRIMARY KEY, name text UNIQUE,
    parent int REFERENCES item DEFERRABLE INITIALLY DEFERRED);
INSERT INTO item VALUES (0, 'first', NULL)
"""


class Databases:
    """One database that every test sandboxes, and copies of it that are written to."""

    def __init__(self, url: str, admin: Any) -> None:
        self.template = f"sa_{uuid4().hex}"
        self._url, self._admin = url, admin

    def run(self, sql: str) -> None:
        """Run SQL as the owner of all databases."""
        with self._admin.cursor() as cursor:
            cursor.execute(sql)

    def url(self, database: str, scheme: str = "postgresql+asyncpg") -> str:
        """Return where *database* is."""
        return f"{scheme}://{self._url.partition('://')[2].rpartition('/')[0]}/{database}"

    def rows(self) -> list[Any]:
        """Return what the sandboxed database holds: tables, and rows."""
        with closing(psycopg2.connect(self.url(self.template, "postgresql"))) as connection:
            cursor = connection.cursor()
            cursor.execute("SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 2200")
            tables = cursor.fetchall()
            cursor.execute("SELECT * FROM item")
            return [*tables, *cursor.fetchall()]


UNTOUCHED = [("item",), (0, "first", None)]


@pytest.fixture(scope="module")
def databases(postgres: Server) -> Iterator[Databases]:
    """Made once."""
    with closing(psycopg2.connect(postgres.url)) as admin:
        admin.autocommit = True
        made = Databases(postgres.url, admin)
        made.run(f"CREATE DATABASE {made.template}")
        with closing(psycopg2.connect(made.url(made.template, "postgresql"))) as connection:
            connection.cursor().execute(SCHEMA)
            connection.commit()
        yield made
        made.run(f"DROP DATABASE {made.template} WITH (FORCE)")


class Sandboxed:
    """A lifespan of one engine, opened sandboxed."""

    def __init__(self, engine: AsyncEngine, lifespan: Any) -> None:
        self.engine, self.block = engine, lifespan.sandbox


Opens = Callable[..., Any]


@pytest.fixture
async def opened(databases: Databases) -> AsyncIterator[Opens]:
    """Opens engines sandboxed, and looks in the end whether anything lasted."""
    async with AsyncExitStack() as stack:

        async def opens(url: str = "", **options: Any) -> Sandboxed:
            engine = create_async_engine(url or databases.url(databases.template), **options)
            registry = Registry()
            registry.resource(name="engine")(lambda: engine)
            with sandboxing():
                lifespan = await stack.enter_async_context(registry.lifespan())
            return Sandboxed(engine, lifespan)

        yield opens
    assert databases.rows() == UNTOUCHED


@asynccontextmanager
async def in_production(databases: Databases) -> AsyncGenerator[AsyncEngine]:
    """An engine on a database of its own."""
    name = f"sa_{uuid4().hex}"
    databases.run(f"CREATE DATABASE {name} TEMPLATE {databases.template}")
    engine = create_async_engine(databases.url(name))
    try:
        yield engine
    finally:
        await engine.dispose()
        databases.run(f"DROP DATABASE {name} WITH (FORCE)")


# -- what applications do ----------------------------------------------------------------------------


async def names(engine: Any) -> list[Any]:
    """All that another connection sees."""
    async with engine.connect() as connection:
        return list((await connection.scalars(select(Item.name).order_by(Item.id))).all())


def failure(error: DBAPIError) -> tuple[str, Any]:
    """What an application sees of an error."""
    return type(error).__name__, getattr(error.orig, "sqlstate", None)


async def begin_commits_and_rolls_back(engine: AsyncEngine) -> Any:
    async with engine.begin() as connection:
        await connection.execute(text("INSERT INTO item (name) VALUES ('kept')"))
    with pytest.raises(LookupError):
        async with engine.begin() as connection:
            await connection.execute(text("INSERT INTO item (name) VALUES ('lost')"))
            raise LookupError
    async with engine.connect() as connection:  # and is never committed
        await connection.execute(text("INSERT INTO item (name) VALUES ('lost')"))
    return await names(engine)


async def a_session_works_its_unit(engine: AsyncEngine) -> Any:
    seen: list[Any] = []
    async with async_sessionmaker(engine)() as session:
        item = Item(name="a")
        session.add(item)
        await session.commit()
        await session.refresh(item)  # it expired at the commit
        seen.append((item.id > 0, item.name))
        item.name = "b"
        await session.flush()
        seen.append(await session.scalar(select(func.count()).where(Item.name == "b")))
        await session.rollback()
        await session.refresh(item)
        seen.append(item.name)
        await session.delete(item)
        await session.commit()
    return seen, await names(engine)


async def a_nested_transaction_is_undone_alone(engine: AsyncEngine) -> Any:
    seen: list[Any] = []
    async with AsyncSession(engine) as session, session.begin():
        session.add(Item(name="outer"))
        for name in ("inner", "first"):
            try:
                async with session.begin_nested():
                    session.add(Item(name=name))
            except IntegrityError as error:
                seen.append(failure(error))
        nested = await session.begin_nested()
        await session.execute(text("DELETE FROM item"))
        await nested.rollback()
    return seen, await names(engine)


async def a_failed_transaction_stays_failed(engine: AsyncEngine) -> Any:
    seen: list[Any] = []
    async with engine.connect() as connection:
        await connection.execute(text("INSERT INTO item (name) VALUES ('lost')"))
        for sql in ("INSERT INTO item (name) VALUES ('first')", "SELECT 1"):
            with pytest.raises(DBAPIError) as caught:
                await connection.execute(text(sql))
            seen.append(failure(caught.value))
        await connection.rollback()
        seen.append(await connection.scalar(text("SELECT 7")))
    return seen, await names(engine)


async def autocommit_is_a_transaction_per_statement(engine: AsyncEngine) -> Any:
    derived = engine.execution_options(isolation_level="AUTOCOMMIT")
    async with derived.connect() as connection:
        await connection.execute(text("INSERT INTO item (name) VALUES ('kept')"))
        with pytest.raises(IntegrityError) as caught:
            await connection.execute(text("INSERT INTO item (name) VALUES ('first')"))
        await connection.execute(text("INSERT INTO item (name) VALUES ('more')"))
        await connection.rollback()
        return failure(caught.value), await names(engine)


async def a_read_only_transaction_refuses_to_write(engine: AsyncEngine) -> Any:
    async with engine.connect() as connection:
        await connection.execution_options(postgresql_readonly=True)
        seen: list[Any] = [await connection.scalar(select(Item.name))]
        with pytest.raises(DBAPIError) as caught:
            await connection.execute(text("INSERT INTO item (name) VALUES ('lost')"))
        seen.append(failure(caught.value))
    async with engine.begin() as connection:
        await connection.execute(text("INSERT INTO item (name) VALUES ('kept')"))
    return seen, await names(engine)


async def every_isolation_level_commits(engine: AsyncEngine) -> Any:
    for level in ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"):
        derived = engine.execution_options(isolation_level=level)
        async with derived.begin() as connection:
            await connection.execute(text("INSERT INTO item (name) VALUES (:name)"), {"name": level})
    return await names(engine)


async def rows_come_in_streams(engine: AsyncEngine) -> Any:
    async with engine.connect() as connection:
        result = await connection.stream(text("SELECT generate_series(1, 120)"))
        return [row[0] async for row in result]


async def many_rows_go_in_at_once(engine: AsyncEngine) -> Any:
    async with AsyncSession(engine) as session:
        session.add_all([Item(id=n, name=f"n{n}") for n in range(1, 30)])
        await session.commit()
        await session.execute(update(Item).where(Item.id == 1).values(name="one"))
        await session.commit()
    return await names(engine)


async def a_deferred_constraint_fails_the_commit(engine: AsyncEngine) -> Any:
    async with AsyncSession(engine) as session:
        session.add(Item(name="orphan", parent=12345))
        await session.flush()
        with pytest.raises(IntegrityError) as caught:
            await session.commit()
        await session.rollback()
    return failure(caught.value), await names(engine)


async def tables_come_and_go(engine: AsyncEngine) -> Any:
    async with engine.begin() as connection:
        await connection.run_sync(OTHER.metadata.create_all)
    async with engine.begin() as connection:
        await connection.execute(OTHER.insert(), [{"id": 1}, {"id": 2}])
    async with engine.connect() as connection:
        seen = (await connection.scalars(select(OTHER.c.id))).all()
    async with engine.begin() as connection:
        await connection.run_sync(OTHER.metadata.drop_all)
    with pytest.raises(DBAPIError) as caught:
        await names_of_other(engine)
    return seen, failure(caught.value)


async def names_of_other(engine: AsyncEngine) -> Any:
    async with engine.connect() as connection:
        return (await connection.execute(select(OTHER.c.id))).all()


async def two_tasks_have_a_session_each(engine: AsyncEngine) -> Any:
    async def one(name: str) -> Any:
        async with AsyncSession(engine) as session:
            before = await session.scalar(select(func.count()).select_from(Item))
            session.add(Item(name=name))
            await session.commit()
            return before is not None

    done = await asyncio.gather(*(one(f"task {n}") for n in range(8)))
    return done, sorted(await names(engine))


async def a_session_follows_another(engine: AsyncEngine) -> Any:
    async with AsyncSession(engine) as first, AsyncSession(engine) as second:
        first.add(Item(name="of the first"))
        await first.commit()
        second.add(Item(name="of the second"))
        await second.commit()
        return list((await first.scalars(select(Item.name).order_by(Item.id))).all())


async def a_reader_leaves_room_for_a_writer(engine: AsyncEngine) -> Any:
    seen: list[Any] = []
    async with AsyncSession(engine) as reader, AsyncSession(engine) as writer:
        count = select(func.count()).select_from(Item)
        seen.append(await reader.scalar(count))
        writer.add(Item(id=7, name="w"))
        await writer.commit()
        seen.append(await writer.scalar(count))
        seen.append(await reader.scalar(count))
        reader.add(Item(id=8, name="r"))
        await reader.flush()
        await reader.rollback()
        seen.append(await reader.scalar(count))
        writer.add(Item(id=9, name="w2"))
        await writer.commit()
        await reader.commit()
    return seen, await names(engine)


async def a_reader_rolls_back_after_a_writer(engine: AsyncEngine) -> Any:
    async with AsyncSession(engine) as reader, AsyncSession(engine) as writer:
        await reader.scalar(select(Item.name))
        writer.add(Item(id=7, name="w"))
        await writer.flush()
        await reader.rollback()
        await writer.commit()
    return await names(engine)


async def a_savepoint_is_not_lent(engine: AsyncEngine) -> Any:
    async with AsyncSession(engine) as first, AsyncSession(engine) as second:
        async with first.begin_nested():
            await first.scalar(select(Item.name))
        await first.commit()
        second.add(Item(id=7, name="w"))
        await second.commit()
    return await names(engine)


async def readers_and_writers_in_tasks(engine: AsyncEngine) -> Any:
    read, wrote = asyncio.Event(), asyncio.Event()

    async def reads() -> Any:
        async with AsyncSession(engine) as session:
            one = await session.scalar(select(func.count()).select_from(Item))
            read.set()
            await wrote.wait()
            return one, await session.scalar(select(func.count()).select_from(Item))

    async def writes() -> None:
        await read.wait()
        async with engine.begin() as connection:
            await connection.execute(text("INSERT INTO item (name) VALUES ('w')"))
        wrote.set()

    return (await asyncio.gather(reads(), writes()))[0]


async def readers_beside_an_error(engine: AsyncEngine) -> Any:
    seen: list[Any] = []
    async with AsyncSession(engine) as reader, AsyncSession(engine) as writer:
        await reader.scalar(select(Item.name))
        with pytest.raises(DBAPIError):
            await writer.execute(text("SELECT 1/0"))
        await writer.rollback()
        seen.append(await reader.scalar(select(Item.name)))
        with pytest.raises(DBAPIError):
            await reader.execute(text("SELECT 1/0"))
        with pytest.raises(DBAPIError) as caught:
            await reader.execute(text("SELECT 1"))
        seen.append(failure(caught.value))
        await reader.rollback()
        seen.append(await reader.scalar(select(Item.name)))
    return seen


APPLICATIONS = [
    begin_commits_and_rolls_back,
    a_session_works_its_unit,
    a_nested_transaction_is_undone_alone,
    a_failed_transaction_stays_failed,
    autocommit_is_a_transaction_per_statement,
    a_read_only_transaction_refuses_to_write,
    every_isolation_level_commits,
    rows_come_in_streams,
    many_rows_go_in_at_once,
    a_deferred_constraint_fails_the_commit,
    tables_come_and_go,
    two_tasks_have_a_session_each,
    a_session_follows_another,
    a_reader_leaves_room_for_a_writer,
    a_reader_rolls_back_after_a_writer,
    a_savepoint_is_not_lent,
    readers_and_writers_in_tasks,
    readers_beside_an_error,
]


@pytest.mark.parametrize("application", APPLICATIONS)
async def test_an_application_sees_the_same_as_in_production(
    application: Any, databases: Databases, opened: Opens
) -> None:
    """Also in the next block, when all it did is undone and it does the same again."""
    async with in_production(databases) as engine:
        expected = await application(engine)
    sandboxed = await opened()
    for _ in range(2):
        async with sandboxed.block():
            assert await application(sandboxed.engine) == expected
        assert databases.rows() == UNTOUCHED


@pytest.mark.parametrize(
    "options",
    [
        {"poolclass": NullPool},
        {"poolclass": StaticPool},
        {"pool_pre_ping": True, "pool_size": 1, "max_overflow": 0},
        {"pool_reset_on_return": None},
        {"connect_args": {"prepared_statement_cache_size": 0}},
        {"connect_args": {"statement_cache_size": 0, "prepared_statement_cache_size": 0}},
        {"pool_recycle": 0},
        {"isolation_level": "SERIALIZABLE"},
    ],
    ids=str,
)
async def test_engines_of_every_kind_are_sandboxed(
    options: Any, databases: Databases, opened: Opens
) -> None:
    """Whatever pool, and whatever arguments, the application gives its engine."""
    sandboxed = await opened(**options)
    for _ in range(2):
        async with sandboxed.block():
            assert isinstance(sandboxed.engine.pool, options.get("poolclass", AsyncAdaptedQueuePool))
            assert await begin_commits_and_rolls_back(sandboxed.engine) == ["first", "kept"]
        assert await names(sandboxed.engine) == ["first"]


# -- the pool ----------------------------------------------------------------------------------------


async def test_the_pool_limits_as_in_production(opened: Opens) -> None:
    """Who waits for too long for a connection is told so."""
    sandboxed = await opened(pool_size=1, max_overflow=1, pool_timeout=0.01)
    async with sandboxed.block(), sandboxed.engine.connect(), sandboxed.engine.connect():
        with pytest.raises(PoolTimeoutError, match="size 1 overflow 1 reached"):
            await sandboxed.engine.connect()


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
async def test_blocks_share_one_real_connection(opened: Opens) -> None:
    """Whoever asks, and in whichever block."""
    sandboxed = await opened()
    pids: set[int] = set()
    for _ in range(2):
        async with sandboxed.block():
            for _ in range(2):
                async with sandboxed.engine.connect() as one, sandboxed.engine.connect() as two:
                    pids.add(await one.scalar(text("SELECT pg_backend_pid()")))
                    await one.rollback()
                    pids.add(await two.scalar(text("SELECT pg_backend_pid()")))
    assert len(pids) == 1


async def test_statements_prepared_on_a_changed_table_are_forgotten(opened: Opens) -> None:
    """The next block finds the table as it was, and its statements work at once."""
    sandboxed = await opened()
    for columns in (4, 3):
        async with sandboxed.block(), sandboxed.engine.connect() as connection:
            if columns == 4:
                await connection.execute(text("ALTER TABLE item ADD COLUMN extra int"))
            assert len((await connection.execute(text("SELECT * FROM item"))).one()) == columns


async def test_dispose_inside_a_block_empties_the_virtual_pool_alone(opened: Opens) -> None:
    """The block goes on, and so does what was outside of it."""
    sandboxed = await opened()
    assert await names(sandboxed.engine) == ["first"]
    outside = sandboxed.engine.pool
    async with sandboxed.block():
        assert await begin_commits_and_rolls_back(sandboxed.engine) == ["first", "kept"]
        await sandboxed.engine.dispose()
        assert await names(sandboxed.engine) == ["first", "kept"]
    assert sandboxed.engine.pool is outside
    assert outside.checkedin() == 1
    async with sandboxed.block():
        assert await names(sandboxed.engine) == ["first"]


async def test_listeners_of_the_pool_are_called(opened: Opens) -> None:
    """Those from before the block, and those that come in it; what they set is set in every block."""
    sandboxed = await opened()
    calls: list[str] = []

    def connect(connection: Any, _: Any) -> None:
        calls.append("connect")
        cursor = connection.cursor()
        cursor.execute("SET application_name = 'listener'")
        cursor.close()

    event.listen(sandboxed.engine.sync_engine, "connect", connect)
    event.listen(sandboxed.engine.sync_engine, "checkin", lambda *_: calls.append("checkin"))
    for _ in range(2):
        async with sandboxed.block(), sandboxed.engine.connect() as connection:
            assert await connection.scalar(text("SHOW application_name")) == "listener"
    event.listen(sandboxed.engine.sync_engine, "checkout", lambda *_: calls.append("checkout"))
    async with sandboxed.block():
        assert await names(sandboxed.engine) == ["first"]
    assert calls == ["connect", "connect", "checkin", "checkin", "checkout", "checkin"]


async def test_engines_and_pools_have_a_transaction_each(databases: Databases) -> None:
    """None sees what another committed, whatever their logins: only pools of asyncpg share."""
    registry = Registry()
    url = databases.url(databases.template)
    engine = registry.resource(name="engine")(lambda: create_async_engine(url))
    twin = registry.resource(name="twin")(lambda: create_async_engine(url))
    named = registry.resource(name="named")(
        lambda: create_async_engine(url, connect_args={"server_settings": {"application_name": "x"}})
    )
    login = databases.url(databases.template, "postgresql")
    pools: list[Any] = [
        registry.resource(name=f"pool{size}")(partial(_pool, login, max_size=size)) for size in (1, 2)
    ]
    user = f"user_{databases.template}"
    databases.run(f"CREATE ROLE {user} LOGIN SUPERUSER PASSWORD 'other'")
    other = registry.resource(name="other")(partial(_pool, login, user=user, password="other"))
    with sandboxing():
        async with registry.lifespan() as lifespan, lifespan.sandbox():
            assert await begin_commits_and_rolls_back(lifespan[engine]) == ["first", "kept"]
            for each in (twin, named):
                assert await names(lifespan[each]) == ["first"]
            await lifespan[pools[0]].execute("UPDATE item SET parent = 0")
            count = "SELECT count(*) FROM item WHERE parent = 0"
            seen = [await lifespan[each].fetchval(count) for each in (*pools, other)]
            assert seen == [1, 1, 0]
    databases.run(f"DROP ROLE {user}")
    assert databases.rows() == UNTOUCHED


async def test_a_connection_killed_between_blocks_is_made_anew(
    opened: Opens, databases: Databases
) -> None:
    """Also where the loop did not run since, and has not heard of it."""
    app = await opened()
    async with app.block():
        assert await begin_commits_and_rolls_back(app.engine) == ["first", "kept"]
    databases.run(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        f"WHERE datname = '{databases.template}'"
    )
    async with app.block():
        assert await names(app.engine) == ["first"]


async def _pool(url: str, **given: Any) -> Any:
    options: dict[str, Any] = {"min_size": 0, "max_size": 2, **given}
    return await asyncpg.create_pool(url, **options)


async def test_a_derived_engine_is_in_the_sandbox(databases: Databases) -> None:
    """As a resource of its own too, beside the one that it derives from."""
    registry = Registry()
    url = databases.url(databases.template)
    engine = registry.resource(name="engine")(lambda: create_async_engine(url))

    @registry.resource(engine)
    def derived(engine: AsyncEngine) -> AsyncEngine:
        return engine.execution_options(isolation_level="AUTOCOMMIT")

    with sandboxing():
        async with registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                async with lifespan[derived].connect() as connection:
                    await connection.execute(text("INSERT INTO item (name) VALUES ('x')"))
                assert await names(lifespan[engine]) == ["first", "x"]
            assert await names(lifespan[derived]) == ["first"]
    assert databases.rows() == UNTOUCHED


# -- strays, and what came before --------------------------------------------------------------------


async def test_a_session_that_nobody_closed_is_named(opened: Opens) -> None:
    """With the line that made it connect, even if it was collected since."""
    sandboxed = await opened()

    async def forget() -> None:
        session = AsyncSession(sandboxed.engine)
        session.add(Item(name="stray"))
        await session.flush()

    with pytest.raises(SandboxEscapedError, match=r"in a transaction acquired at .*:\d+ in .*forget"):
        async with sandboxed.block():
            await forget()
            gc.collect()
    async with sandboxed.block():
        assert await names(sandboxed.engine) == ["first"]


async def test_a_task_that_outlives_its_test_is_named(opened: Opens) -> None:
    """What it holds is closed, and what it does later fails."""
    sandboxed = await opened()
    holds, go_on = asyncio.Event(), asyncio.Event()

    async def stray() -> None:
        async with sandboxed.engine.connect() as connection:
            await connection.execute(text("INSERT INTO item (name) VALUES ('stray')"))
            holds.set()
            await go_on.wait()
            await connection.commit()
            await connection.execute(text("INSERT INTO item (name) VALUES ('stray')"))

    tasks: list[asyncio.Task[None]] = []
    with pytest.raises(SandboxEscapedError) as caught:
        async with sandboxed.block():
            tasks.append(asyncio.create_task(stray(), name="the stray"))
            await holds.wait()
    for part in ("in a transaction", "stray (task 'the stray'), which runs", "stands at", "stray"):
        assert part in str(caught.value)
    go_on.set()
    with pytest.raises(InterfaceError, match="closed"):
        await tasks[0]


async def test_code_that_was_started_in_a_block_cannot_begin_after_it(opened: Opens) -> None:
    """It would write where nothing undoes it."""
    sandboxed = await opened()
    go_on = asyncio.Event()

    async def late() -> None:
        await go_on.wait()
        await names(sandboxed.engine)

    async with sandboxed.block():
        task = asyncio.create_task(late())
    go_on.set()
    with pytest.raises(SandboxEscapedError, match="SQLAlchemy engine is used by code that was started"):
        await task


async def test_a_connection_from_before_the_block_is_in_it(opened: Opens) -> None:
    """A worker's, which it keeps: it is a real one again afterwards."""
    sandboxed = await opened()
    async with sandboxed.engine.connect() as connection:
        pid = await connection.scalar(text("SELECT pg_backend_pid()"))
        await connection.rollback()
        async with sandboxed.block():
            await connection.execute(text("INSERT INTO item (name) VALUES ('x')"))
            await connection.commit()
            assert await names(sandboxed.engine) == ["first", "x"]
        with pytest.raises(SandboxEscapedError, match=r"in a transaction acquired at .*in_it"):
            async with sandboxed.block():
                await connection.execute(text("INSERT INTO item (name) VALUES ('x')"))
        await connection.rollback()
        assert await connection.scalar(text("SELECT pg_backend_pid()")) == pid


async def test_a_transaction_from_before_the_block_is_refused(opened: Opens) -> None:
    """What it did already would last, and so would what it does."""
    sandboxed = await opened()
    async with sandboxed.engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        async with sandboxed.block():
            with pytest.raises(
                SandboxEscapedError, match="was in a transaction when the sandbox began"
            ):
                await connection.execute(text("INSERT INTO item (name) VALUES ('x')"))


async def test_two_transactions_of_one_task_that_both_write_are_told(opened: Opens) -> None:
    """Never a wait without end: the error has both lines."""
    sandboxed = await opened()
    async with sandboxed.block(), AsyncSession(sandboxed.engine) as first:
        first.add(Item(name="x"))
        await first.flush()
        async with AsyncSession(sandboxed.engine) as second:
            second.add(Item(name="y"))
            with pytest.raises(SandboxBusyError) as caught:
                await second.flush()
    assert str(caught.value).count("in test_two_transactions_of_one_task_that_both_write") == 2


async def test_a_listener_that_fails_when_the_real_connection_closes(opened: Opens) -> None:
    """Fails that block alone, and leaves nothing open."""
    sandboxed = await opened()
    broken: list[str] = []

    def close(connection: Any, _: Any) -> None:
        if lane_of(connection._connection) is None and not broken:
            broken.append("here")
            raise LookupError

    event.listen(sandboxed.engine.sync_engine, "close", close)

    async def make_type() -> None:
        async with sandboxed.block(), sandboxed.engine.begin() as connection:
            await connection.execute(text("CREATE TYPE mood AS ENUM ('fine')"))

    with pytest.raises(LookupError):
        await make_type()
    assert broken == ["here"]
    await make_type()


# -- engines that have none --------------------------------------------------------------------------


async def test_another_driver_is_refused_with_the_way_out(databases: Databases, opened: Opens) -> None:
    """The engine works, only not in a block."""
    sandboxed = await opened(databases.url(databases.template, "postgresql+psycopg"))
    assert await names(sandboxed.engine) == ["first"]
    with pytest.raises(SandboxUnsupportedError, match=r"on postgresql\+psycopg can't .*asyncpg can\. "):
        async with sandboxed.block():
            pass


async def test_an_engine_opens_sandboxed_again(databases: Databases) -> None:
    """One made at import has a sandbox in each lifespan."""
    engine = create_async_engine(databases.url(databases.template))
    for _ in range(2):
        registry = Registry()
        registry.resource(name="engine")(lambda: engine)
        with sandboxing():
            async with registry.lifespan() as lifespan, lifespan.sandbox():
                assert await begin_commits_and_rolls_back(engine) == ["first", "kept"]
    assert databases.rows() == UNTOUCHED
    assert driver.holders(engine) == []
