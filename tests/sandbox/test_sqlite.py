"""What works on SQLite, in blocks: on private copies, which are gone afterwards."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import aiosqlite
import anyio
import pytest
from sqlalchemy import (
    URL,
    AsyncAdaptedQueuePool,
    NullPool,
    QueuePool,
    SingletonThreadPool,
    StaticPool,
    create_engine,
    event,
    text,
)
from sqlalchemy.exc import DatabaseError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from lifekit import (
    Lifespan,
    Registry,
    SandboxBusyError,
    SandboxEscapedError,
    SandboxUnsupportedError,
)
from lifekit.testing import sandboxing

pytestmark = pytest.mark.anyio
HERE = r"test_sqlite.py:\d+ in test"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A database with a table, and a row."""
    path = tmp_path / "a shop?.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE links (slug TEXT)")
        connection.execute("INSERT INTO links VALUES ('first')")
        connection.commit()
    return path


def rows(path: Path) -> list[str]:
    """What the file itself holds."""
    with closing(sqlite3.connect(path)) as connection:
        return [slug for (slug,) in connection.execute("SELECT slug FROM links ORDER BY 1")]


async def run(value: Any, statement: str) -> Sequence[Any]:
    """Run it in a transaction of its own, and commit; return the first column."""
    if isinstance(value, aiosqlite.Connection):
        found = [row[0] for row in await value.execute_fetchall(statement)]
        await value.commit()
        return found
    if isinstance(value, AsyncEngine):
        async with value.begin() as connection:
            result = await connection.execute(text(statement))
            return list(result.scalars()) if result.returns_rows else []
    with value.begin() as connection:
        result = connection.execute(text(statement))
        return list(result.scalars()) if result.returns_rows else []


async def slugs(value: Any) -> Sequence[Any]:
    return await run(value, "SELECT slug FROM links ORDER BY 1")


async def add(value: Any, slug: str) -> None:
    await run(value, f"INSERT INTO links VALUES ('{slug}')")


def url(path: Path, dialect: str = "sqlite") -> URL:
    return URL.create(dialect, database=str(path))


def by_uri(path: Path, dialect: str = "sqlite") -> str:
    return f"{dialect}:///file:{str(path).replace('?', '%253f')}?mode=rw&uri=true"


def shared(path: Path, dialect: str = "sqlite") -> str:
    return f"{dialect}:///file:{path.parent.name}?mode=memory&cache=shared&uri=true"


def sync(where: Callable[[Path], Any], **options: Any) -> Callable[[Path], Any]:
    return lambda path: create_engine(where(path), **options)


def aio(where: Callable[[Path, str], Any], **options: Any) -> Callable[[Path], Any]:
    return lambda path: create_async_engine(where(path, "sqlite+aiosqlite"), **options)


def memory(path: Path, dialect: str = "sqlite") -> str:
    return f"{dialect}://"


one = {"pool_size": 1, "max_overflow": 0}
ON_FILES: dict[str, Callable[[Path], Any]] = {
    "sync, file": sync(url),
    "sync, file, NullPool": sync(url, poolclass=NullPool),
    "sync, file, StaticPool": sync(url, poolclass=StaticPool),
    "sync, file, SingletonThreadPool": sync(url, poolclass=SingletonThreadPool),
    "sync, URI": sync(by_uri),
    "async, file": aio(url),
    "async, file, NullPool": aio(url, poolclass=NullPool),
    "async, file, StaticPool": aio(url, poolclass=StaticPool),
    "async, URI": aio(by_uri),
    "aiosqlite, file": lambda path: aiosqlite.connect(path),
}
KINDS: dict[str, Callable[[Path], Any]] = {
    **ON_FILES,
    "sync, memory": sync(memory),
    "sync, memory, StaticPool": sync(memory, poolclass=StaticPool),
    "sync, memory, QueuePool": sync(memory, poolclass=QueuePool, **one),
    "sync, shared memory": sync(shared, poolclass=QueuePool),
    "async, memory": aio(memory),
    "async, memory, a queue": aio(memory, poolclass=AsyncAdaptedQueuePool, **one),
    "async, shared memory": aio(shared, poolclass=AsyncAdaptedQueuePool),
    "aiosqlite, memory": lambda path: aiosqlite.connect(":memory:"),
}


@asynccontextmanager
async def opened(make: Callable[[], Any]) -> AsyncGenerator[tuple[Lifespan, Any]]:
    """The lifespan and the value of one resource, in test mode; with the table and its row."""
    registry = Registry("sqlite")
    store = registry.resource(name="store")(make)
    with sandboxing():
        async with registry.lifespan() as lifespan:
            value = lifespan[store]
            await run(value, "CREATE TABLE IF NOT EXISTS links (slug TEXT)")
            if not await slugs(value):
                await add(value, "first")
            yield lifespan, value


each_kind = pytest.mark.parametrize("kind", KINDS)
each_on_files = pytest.mark.parametrize("kind", ON_FILES)


@each_kind
async def test_nothing_of_a_block_is_there_after_it(kind: str, file: Path) -> None:
    async with opened(lambda: KINDS[kind](file)) as (lifespan, value):
        for slug in ("second", "third"):
            async with lifespan.sandbox():
                assert await slugs(value) == ["first"]
                await add(value, slug)
                await run(value, "CREATE TABLE more (n INT)")
                assert await slugs(value) == ["first", slug]
            assert await slugs(value) == ["first"]


@each_kind
async def test_what_is_done_between_blocks_is_done_and_found_by_the_next(kind: str, file: Path) -> None:
    async with opened(lambda: KINDS[kind](file)) as (lifespan, value):
        async with lifespan.sandbox():
            await add(value, "undone")
        await add(value, "lasting")
        async with lifespan.sandbox():
            assert await slugs(value) == ["first", "lasting"]
        assert await slugs(value) == ["first", "lasting"]


@each_kind
async def test_an_inner_block_undoes_its_own_part_alone(kind: str, file: Path) -> None:
    async with opened(lambda: KINDS[kind](file)) as (lifespan, value):
        async with lifespan.sandbox():
            async with lifespan.sandbox():  # before the outer one has connected
                assert await slugs(value) == ["first"]
                await add(value, "early")
            await add(value, "outer")
            async with lifespan.sandbox():
                await add(value, "inner")
                assert await slugs(value) == ["first", "inner", "outer"]
            assert await slugs(value) == ["first", "outer"]
            async with lifespan.sandbox():
                assert await slugs(value) == ["first", "outer"]
        assert await slugs(value) == ["first"]


@each_on_files
async def test_the_copy_is_in_a_folder_that_is_gone_afterwards(kind: str, file: Path) -> None:
    async with opened(lambda: ON_FILES[kind](file)) as (lifespan, value):
        async with lifespan.sandbox():
            [copy] = await run(value, "SELECT file FROM pragma_database_list WHERE name = 'main'")
            assert exists(copy)
        assert not exists(copy)
        assert not exists(str(Path(copy).parents[1]))


def exists(path: str) -> bool:
    return Path(path).exists()


@each_on_files
async def test_the_file_is_not_written_in_a_block(kind: str, file: Path) -> None:
    async with opened(lambda: ON_FILES[kind](file)) as (lifespan, value):
        before = content(file)
        async with lifespan.sandbox():
            await add(value, "second")
            assert content(file) == before
            assert rows(file) == ["first"]
        assert names(file.parent) == [file.name]


def content(path: Path) -> bytes:
    return path.read_bytes()


def linked(path: Path) -> Path:
    link = path.with_name("link.db")
    link.symlink_to(path)
    return link


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


# -- two values, and threads -----------------------------------------------------------------------


async def test_two_engines_on_one_file_share_one_copy(file: Path) -> None:
    """Also by a link to it, and in a block that begins inside another one."""
    registry = Registry("sqlite")
    other = linked(file)
    first = registry.resource(name="first")(lambda: create_engine(url(file)))
    second = registry.resource(name="second")(lambda: ON_FILES["async, file"](other))
    with sandboxing():
        async with registry.lifespan() as lifespan:
            for _ in range(2):
                async with lifespan.sandbox():
                    await add(lifespan[first], "second")
                    assert await slugs(lifespan[second]) == ["first", "second"]
                    async with lifespan.sandbox():
                        await add(lifespan[second], "third")
                        assert await slugs(lifespan[first]) == ["first", "second", "third"]
                    assert await slugs(lifespan[first]) == ["first", "second"]
            assert await slugs(lifespan[second]) == ["first"]


async def test_two_lifespans_do_not_see_each_others_blocks(file: Path) -> None:
    make = KINDS["sync, file"]
    async with opened(lambda: make(file)) as (one, first), opened(lambda: make(file)) as (two, second):
        await add(first, "second")
        async with one.sandbox():
            await add(first, "of one")
            async with two.sandbox():
                assert await slugs(second) == ["first", "second"]
                await add(second, "of two")
            assert await slugs(first) == ["first", "of one", "second"]


async def test_threads_work_on_the_same_copy(file: Path) -> None:
    async with opened(lambda: create_engine(url(file))) as (lifespan, value):

        def insert(number: int) -> None:
            with value.begin() as connection:
                connection.execute(text(f"INSERT INTO links VALUES ('{number}')"))

        async with lifespan.sandbox():
            async with anyio.create_task_group() as group:
                for number in range(8):
                    group.start_soon(anyio.to_thread.run_sync, insert, number)
            assert len(await slugs(value)) == 9
        assert await slugs(value) == ["first"]


async def test_a_thread_with_a_database_of_its_own_finds_it_as_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Under SingletonThreadPool each thread has one, in memory. Its copy is closed with the block."""
    thread = anyio.CapacityLimiter(1)
    async with opened(lambda: create_engine("sqlite://")) as (lifespan, value):

        def of_thread(statement: str) -> list[Any]:
            with value.begin() as connection:
                result = connection.execute(text(statement))
                return list(result.scalars()) if result.returns_rows else []

        async def there(statement: str) -> list[Any]:
            return await anyio.to_thread.run_sync(of_thread, statement, limiter=thread)

        await there("CREATE TABLE own (n INT)")
        async with lifespan.sandbox():
            await there("INSERT INTO own VALUES (1)")
            assert await there("SELECT n FROM own") == [1]
            assert await slugs(value) == ["first"]
        assert "Exception closing connection" not in caplog.text
        assert await there("SELECT n FROM own") == []


# -- what survives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync, file", "async, file", "async, memory"])
async def test_the_applications_own_listeners_prepare_the_connections_of_blocks(
    kind: str, file: Path
) -> None:
    def make() -> Any:
        engine = KINDS[kind](file)

        @event.listens_for(getattr(engine, "sync_engine", engine), "connect")
        def prepare(connection: Any, record: Any) -> None:
            connection.cursor().execute("PRAGMA foreign_keys = ON")

        return engine

    async with opened(make) as (lifespan, value):
        async with lifespan.sandbox():
            assert await run(value, "PRAGMA foreign_keys") == [1]
        assert await run(value, "PRAGMA foreign_keys") == [1]


@pytest.mark.parametrize("kind", ["sync, file", "async, file"])
async def test_what_is_in_the_write_ahead_log_is_found(kind: str, file: Path) -> None:
    async with opened(lambda: ON_FILES[kind](file)) as (lifespan, value):
        await run(value, "PRAGMA journal_mode = WAL")
        await add(value, "second")
        for _ in range(2):
            async with lifespan.sandbox():
                assert await slugs(value) == ["first", "second"]
                assert await run(value, "PRAGMA journal_mode") == ["wal"]
                await add(value, "third")
        assert await slugs(value) == ["first", "second"]


async def test_a_block_finds_what_another_process_wrote_before_it(file: Path) -> None:
    async with opened(lambda: create_engine(url(file))) as (lifespan, value):
        for number in range(3):
            with closing(sqlite3.connect(file)) as other:
                other.execute("INSERT INTO links VALUES (?)", (f"{number}",))
                other.commit()
            async with lifespan.sandbox():
                assert await slugs(value) == [*map(str, range(number + 1)), "first"]


async def test_a_file_that_is_made_in_a_block_is_not_there_afterwards(tmp_path: Path) -> None:
    registry = Registry("sqlite")
    store = registry.resource(name="store")(lambda: create_engine(url(tmp_path / "new.db")))
    with sandboxing():
        async with registry.lifespan() as lifespan:
            for _ in range(2):
                async with lifespan.sandbox():
                    await run(lifespan[store], "CREATE TABLE links (slug TEXT)")
            assert names(tmp_path) == []


async def test_an_engine_that_derives_from_another_one_is_in_the_sandbox_with_it(file: Path) -> None:
    registry = Registry("sqlite")
    store = registry.resource(name="store")(lambda: create_engine(url(file)))

    @registry.resource(store)
    def derived(store: Any) -> Any:
        return store.execution_options(isolation_level="AUTOCOMMIT")

    with sandboxing():
        async with registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                await add(lifespan[derived], "second")
                assert await slugs(lifespan[store]) == ["first", "second"]
            assert rows(file) == ["first"]


async def test_the_connections_from_before_a_block_are_the_same_after_it() -> None:
    """With what only they have: their temporary tables."""
    async with opened(lambda: create_async_engine("sqlite+aiosqlite://")) as (lifespan, value):
        await run(value, "CREATE TEMP TABLE own (n INT)")
        async with lifespan.sandbox():
            await run(value, "CREATE TEMP TABLE other (n INT)")
        assert await run(value, "SELECT name FROM sqlite_temp_master") == ["own"]


async def test_what_may_last_is_left_alone(file: Path) -> None:
    registry = Registry("sqlite")
    store = registry.resource(name="store", sandbox=False)(lambda: create_engine(url(file)))
    with sandboxing():
        async with registry.lifespan() as lifespan, lifespan.sandbox():
            await add(lifespan[store], "second")
    assert rows(file) == ["first", "second"]


# -- connections of aiosqlite ----------------------------------------------------------------------


@pytest.mark.parametrize("where", ["file", ":memory:"])
async def test_a_connection_of_aiosqlite_keeps_its_settings_in_a_block(where: str, file: Path) -> None:
    async def make() -> aiosqlite.Connection:
        at = str(file) if where == "file" else where
        connection = await aiosqlite.connect(at, detect_types=sqlite3.PARSE_COLNAMES)
        connection.row_factory = sqlite3.Row
        connection.isolation_level = "IMMEDIATE"
        await connection.execute("PRAGMA foreign_keys = ON")
        return connection

    async with opened(make) as (lifespan, value):
        async with lifespan.sandbox():
            [row] = await value.execute_fetchall("SELECT '2026-01-02' AS 'day [date]'")
            assert f"{row['day']!r}" == "datetime.date(2026, 1, 2)"
            assert await run(value, "PRAGMA foreign_keys") == [1]
            assert value.isolation_level == "IMMEDIATE"
            await run(value, "PRAGMA foreign_keys = OFF")
        assert await run(value, "PRAGMA foreign_keys") == [1]


async def test_a_connection_of_aiosqlite_shares_the_copy_of_an_engine(file: Path) -> None:
    registry = Registry("sqlite")
    engine = registry.resource(name="engine")(lambda: create_engine(url(file)))
    connection = registry.resource(name="connection")(lambda: aiosqlite.connect(file))
    with sandboxing():
        async with registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                await add(lifespan[engine], "second")
                assert await slugs(lifespan[connection]) == ["first", "second"]
            assert await slugs(lifespan[connection]) == ["first"]


async def test_what_outlives_its_block_reaches_aiosqlite_no_more(file: Path) -> None:
    async with opened(lambda: aiosqlite.connect(file)) as (lifespan, value):
        over = anyio.Event()

        async def late() -> None:
            await over.wait()
            with pytest.raises(SandboxEscapedError, match="a connection of aiosqlite is used"):
                await add(value, "late")

        async with anyio.create_task_group() as group:
            async with lifespan.sandbox():
                group.start_soon(late)
            over.set()
    assert rows(file) == ["first"]


async def test_no_block_begins_in_a_transaction_of_aiosqlite(file: Path) -> None:
    async with opened(lambda: aiosqlite.connect(file)) as (lifespan, value):
        await value.execute("INSERT INTO links VALUES ('second')")
        with pytest.raises(SandboxBusyError, match="Commit it before"):
            async with lifespan.sandbox():
                pass
        await value.commit()
        async with lifespan.sandbox():
            assert await slugs(value) == ["first", "second"]


async def test_a_block_may_close_a_connection_of_aiosqlite(file: Path) -> None:
    async with opened(lambda: aiosqlite.connect(file)) as (lifespan, value), lifespan.sandbox():
        await add(value, "second")
        await value.close()
    assert rows(file) == ["first"]


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync, file", "async, file", "async, memory"])
async def test_a_block_does_not_begin_while_a_connection_is_out(kind: str, file: Path) -> None:
    async with opened(lambda: KINDS[kind](file)) as (lifespan, value):
        connection = value.connect()
        if isinstance(value, AsyncEngine):
            await connection.start()
        with pytest.raises(SandboxBusyError, match=rf"(?s)would be permanent.*{HERE}"):
            async with lifespan.sandbox():
                pass
        closed = connection.close()
        if closed is not None:
            await closed
        async with lifespan.sandbox():
            await add(value, "second")
        assert await slugs(value) == ["first"]


@pytest.mark.parametrize("kind", ["sync, file", "async, file", "async, memory", "sync, memory"])
async def test_a_connection_that_a_block_leaves_behind_is_named_and_closed(
    kind: str, file: Path
) -> None:
    async with opened(lambda: KINDS[kind](file)) as (lifespan, value):
        with pytest.raises(SandboxEscapedError, match=rf"(?s)in a transaction.*{HERE}"):
            async with lifespan.sandbox():
                connection = value.connect()
                if isinstance(value, AsyncEngine):
                    await connection.start()
                    await connection.execute(text("INSERT INTO links VALUES ('second')"))
                else:
                    connection.execute(text("INSERT INTO links VALUES ('second')"))
        async with lifespan.sandbox():
            assert await slugs(value) == ["first"]


@pytest.mark.parametrize("kind", ["sync, file", "async, file", "async, memory", "aiosqlite, file"])
@pytest.mark.parametrize("statement", ["ATTACH '{}' AS other", "VACUUM INTO '{}'"])
async def test_one_more_file_is_not_touched_in_a_block(
    kind: str, statement: str, file: Path, tmp_path: Path
) -> None:
    async with opened(lambda: KINDS[kind](file)) as (lifespan, value):
        with pytest.raises(SandboxUnsupportedError, match=r"more.db' was not attached"):
            async with lifespan.sandbox():
                autocommit = value
                if not isinstance(value, aiosqlite.Connection):
                    autocommit = value.execution_options(isolation_level="AUTOCOMMIT")
                with pytest.raises((DatabaseError, sqlite3.DatabaseError), match="authoriz"):
                    await run(autocommit, statement.format(tmp_path / "more.db"))
                await run(autocommit, "ATTACH ':memory:' AS other")
                await run(autocommit, "VACUUM")
    assert names(tmp_path) == [file.name]


async def test_an_engine_that_connects_by_itself_is_refused(file: Path) -> None:
    async with opened(lambda: create_engine("sqlite://", creator=lambda: sqlite3.connect(file))) as (
        lifespan,
        _,
    ):
        with pytest.raises(SandboxUnsupportedError, match="engine's creator connects"):
            async with lifespan.sandbox():
                pass
