"""What the applications of `soak` do with each client. An act writes two rows with its tag or none."""

from __future__ import annotations

import asyncio
import io
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, ClassVar

import aiopg
import asyncpg
import psycopg_pool
import sqlalchemy

ADD = "INSERT INTO rows (tag, n) VALUES "
SLEEP = "SELECT pg_sleep(1)"
TAGS = "SELECT tag, count(*) FROM rows GROUP BY tag"

Act = Callable[[str, list[Any]], Awaitable[None]]


class Broken(Exception):
    """What an application raises in the midst of something."""


def _breaking(tag: str) -> Iterator[tuple[str, int]]:
    yield tag, 1
    raise Broken


class Actor(ABC):
    """An application's use of one pool."""

    name: ClassVar[str]
    writing: ClassVar[Sequence[str]] = ()
    """The acts that have committed where they return."""
    leaving: ClassVar[Sequence[str]] = ("leave_open",)
    """The acts that do not give back what they took."""
    threads = False
    """Whether what it does goes on where its task is cancelled."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.pool: Any = None
        self.works: set[asyncio.Task[Any]] = set()
        """What goes on in threads."""

    @abstractmethod
    def make(self) -> Any:
        """Return the pool, or what gives it."""

    @abstractmethod
    async def ping(self) -> None:
        """Ask the server for anything."""

    def acts(self) -> list[Act]:
        """Return all that it can do."""
        found: list[Act] = [getattr(self, each) for each in self.writing]
        others = [name for name in vars(type(self)) if name not in _NO_ACTS and name[0] != "_"]
        return found * 2 + [getattr(self, each) for each in others if each not in self.writing]


_NO_ACTS = {"name", "writing", "leaving", "threads", "make", "ping", "acts", "tags", "url"}


class Asyncpg(Actor):
    """asyncpg."""

    name = "asyncpg"
    writing = ("transaction", "many", "copy", "nested", "at_once", "prepared")

    def make(self) -> Any:
        return asyncpg.create_pool(self.url, min_size=0, max_size=4, server_settings={"jit": "off"})

    async def ping(self) -> None:
        await self.pool.fetchval("SELECT 1")

    async def tags(self) -> list[tuple[str, int]]:
        """Return what is there."""
        return [tuple(row) for row in await self.pool.fetch(TAGS)]

    async def transaction(self, tag: str, kept: list[Any]) -> None:
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute(ADD + "($1, $2)", tag, 1)
            await connection.execute(ADD + f"('{tag}', 2)")

    async def nested(self, tag: str, kept: list[Any]) -> None:
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute(ADD + f"('{tag}', 1)")
            try:
                async with connection.transaction():
                    await connection.execute(ADD + f"('{tag}', 2)")
                    await connection.execute(ADD + f"('{tag}', -2)")
            except asyncpg.CheckViolationError:
                await connection.execute(ADD + f"('{tag}', 3)")

    async def many(self, tag: str, kept: list[Any]) -> None:
        await self.pool.executemany(ADD + "($1, $2)", [(tag, 1), (tag, 2)])

    async def many_fails(self, tag: str, kept: list[Any]) -> None:
        await self.pool.executemany(ADD + "($1, $2)", [(tag, 1), (tag, -2)])

    async def prepared(self, tag: str, kept: list[Any]) -> None:
        async with self.pool.acquire() as connection:
            statement = await connection.prepare(ADD + "($1, 1), ($1, 2) RETURNING n")
            assert [row["n"] for row in await statement.fetch(tag)] == [1, 2]

    async def copy(self, tag: str, kept: list[Any]) -> None:
        async with self.pool.acquire() as connection:
            rows = [(tag, 1), (tag, 2)]
            await connection.copy_records_to_table("rows", columns=["tag", "n"], records=rows)

    async def copy_cut_off(self, tag: str, kept: list[Any]) -> None:
        async with self.pool.acquire() as connection:
            rows = _breaking(tag)
            await connection.copy_records_to_table("rows", columns=["tag", "n"], records=rows)

    async def copy_out(self, tag: str, kept: list[Any]) -> None:
        async def take(data: bytes) -> None:
            raise Broken

        async with self.pool.acquire() as connection:
            # Of a short one asyncpg waits forever, with a server as well.
            query = "SELECT generate_series(1, 60000)"
            await connection.copy_from_query(query, output=take)

    async def cursor(self, tag: str, kept: list[Any]) -> None:
        async with self.pool.acquire() as connection, connection.transaction():
            async for row in connection.cursor("SELECT generate_series(1, 9) AS n", prefetch=2):
                if row["n"] == 5:
                    break

    async def times_out(self, tag: str, kept: list[Any]) -> None:
        await self.pool.execute(f"{ADD}('{tag}', 1); {SLEEP}", timeout=0.01)

    async def timeout(self, tag: str, kept: list[Any]) -> None:
        async with asyncio.timeout(0.01), self.pool.acquire() as connection, connection.transaction():
            await connection.execute(ADD + f"('{tag}', 1)")
            await connection.execute(SLEEP)

    async def terminate(self, tag: str, kept: list[Any]) -> None:
        async with self.pool.acquire() as connection:
            await connection.execute("BEGIN")
            await connection.execute(ADD + f"('{tag}', 1)")
            connection.terminate()

    async def terminate_amid(self, tag: str, kept: list[Any]) -> None:
        async with self.pool.acquire() as connection:
            sleeping = asyncio.create_task(connection.execute(f"{ADD}('{tag}', 1); {SLEEP}"))
            try:
                await asyncio.sleep(0.003)
            finally:
                connection.terminate()
                await asyncio.gather(sleeping, return_exceptions=True)

    async def at_once(self, tag: str, kept: list[Any]) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.pool.execute(f"{ADD}('{tag}', 1), ('{tag}', 2)"))
            group.create_task(self.ping())

    async def leave_open(self, tag: str, kept: list[Any]) -> None:
        connection = await self.pool.acquire()
        kept.append(connection)
        await connection.execute("BEGIN")
        await connection.execute(ADD + f"('{tag}', 1)")

    async def alter(self, tag: str, kept: list[Any]) -> None:
        await self.pool.execute("CREATE TABLE IF NOT EXISTS extra (a int)")
        await self.pool.fetch("SELECT * FROM extra")


class Psycopg(Actor):
    """psycopg 3."""

    name = "psycopg"
    writing = ("transaction", "many", "copy", "pipeline", "nested")

    def make(self) -> Any:
        return psycopg_pool.AsyncConnectionPool(self.url, min_size=0, max_size=3, open=False)

    async def ping(self) -> None:
        async with self.pool.connection() as connection:
            await connection.execute("SELECT 1")

    async def transaction(self, tag: str, kept: list[Any]) -> None:
        async with self.pool.connection() as connection:
            await connection.execute(ADD + "(%s, 1)", [tag], prepare=True)
            await connection.execute(ADD + "(%s, 2)", [tag])

    async def nested(self, tag: str, kept: list[Any]) -> None:
        async with self.pool.connection() as connection:
            await connection.set_autocommit(True)
            try:
                async with connection.transaction():
                    await connection.execute(ADD + "(%s, 1)", [tag])
                    async with connection.transaction(force_rollback=True):
                        await connection.execute(ADD + "(%s, 2)", [tag])
                    await connection.execute(ADD + "(%s, 3)", [tag])
            finally:
                if not connection.closed:
                    await connection.set_autocommit(False)

    async def many(self, tag: str, kept: list[Any]) -> None:
        async with self.pool.connection() as connection:
            await connection.cursor().executemany(ADD + "(%s, %s)", [(tag, 1), (tag, 2)])

    async def many_fails(self, tag: str, kept: list[Any]) -> None:
        async with self.pool.connection() as connection:
            await connection.cursor().executemany(ADD + "(%s, %s)", [(tag, 1), (tag, -2)])

    async def pipeline(self, tag: str, kept: list[Any]) -> None:
        async with self.pool.connection() as connection, connection.pipeline():
            await connection.execute(ADD + "(%s, 1)", [tag])
            await connection.execute(ADD + "(%s, 2)", [tag])

    async def pipeline_fails(self, tag: str, kept: list[Any]) -> None:
        async with self.pool.connection() as connection, connection.pipeline():
            await connection.execute(ADD + "(%s, 1)", [tag])
            await connection.execute("SELECT 1/0")
            await connection.execute(ADD + "(%s, 2)", [tag])

    async def _copy(self, rows: Any) -> None:
        sql = "COPY rows (tag, n) FROM STDIN"
        async with self.pool.connection() as connection, connection.cursor().copy(sql) as copy:
            for row in rows:
                await copy.write_row(row)

    async def copy(self, tag: str, kept: list[Any]) -> None:
        await self._copy([(tag, 1), (tag, 2)])

    async def copy_cut_off(self, tag: str, kept: list[Any]) -> None:
        await self._copy(_breaking(tag))

    async def copy_out(self, tag: str, kept: list[Any]) -> None:
        sql = "COPY (SELECT generate_series(1, 100)) TO STDOUT"
        async with self.pool.connection() as connection, connection.cursor().copy(sql) as copy:
            await copy.read()
            raise Broken

    async def cursor(self, tag: str, kept: list[Any]) -> None:
        async with self.pool.connection() as connection, connection.cursor("named") as cursor:
            await cursor.execute("SELECT generate_series(1, 9)")
            await cursor.fetchmany(2)

    async def times_out(self, tag: str, kept: list[Any]) -> None:
        async with self.pool.connection() as connection:
            await connection.execute("SET LOCAL statement_timeout = 10")
            await connection.execute(ADD + "(%s, 1)", [tag])
            await connection.execute(SLEEP)

    async def timeout(self, tag: str, kept: list[Any]) -> None:
        async with asyncio.timeout(0.01), self.pool.connection() as connection:
            await connection.execute(ADD + "(%s, 1)", [tag])
            await connection.execute(SLEEP)

    async def close_amid(self, tag: str, kept: list[Any]) -> None:
        async with self.pool.connection() as connection:
            await connection.execute(ADD + "(%s, 1)", [tag])
            await connection.close()

    async def leave_open(self, tag: str, kept: list[Any]) -> None:
        connection = await self.pool.getconn()
        kept.append(connection.pgconn)
        await connection.execute(ADD + "(%s, 1)", [tag])


class Aiopg(Actor):
    """aiopg."""

    name = "aiopg"
    writing = ("transaction", "one")

    async def make(self) -> Any:
        # More than there are tasks: where one comes back closed, aiopg wakes nobody who waits.
        return await aiopg.create_pool(self.url, minsize=0, maxsize=8)

    async def ping(self) -> None:
        await self._run("SELECT 1")

    async def _run(self, *statements: str) -> None:
        async with self.pool.acquire() as connection, connection.cursor() as cursor:
            for each in statements:
                await cursor.execute(each)

    async def transaction(self, tag: str, kept: list[Any]) -> None:
        await self._run("BEGIN", f"{ADD}('{tag}', 1)", f"{ADD}('{tag}', 2)", "COMMIT")

    async def one(self, tag: str, kept: list[Any]) -> None:
        await self._run(f"{ADD}('{tag}', 1); {ADD}('{tag}', 2)")

    async def fails(self, tag: str, kept: list[Any]) -> None:
        await self._run("BEGIN", f"{ADD}('{tag}', 1)", f"{ADD}('{tag}', -2)", "COMMIT")

    async def rollback(self, tag: str, kept: list[Any]) -> None:
        await self._run("BEGIN", f"{ADD}('{tag}', 1)", "SAVEPOINT s", "ROLLBACK TO s", "ROLLBACK")

    async def timeout(self, tag: str, kept: list[Any]) -> None:
        async with asyncio.timeout(0.01):
            await self._run("BEGIN", f"{ADD}('{tag}', 1)", SLEEP)


class Engine(Actor):
    """A sync engine of SQLAlchemy's, in threads."""

    name = "engine"
    writing = ("transaction", "many", "copy")
    threads = True

    def make(self) -> Any:
        url = self.url.replace("postgresql://", "postgresql+psycopg2://")
        return sqlalchemy.create_engine(url, pool_size=3, max_overflow=0, pool_timeout=20)

    async def ping(self) -> None:
        await self._begin(lambda connection: connection.scalar(sqlalchemy.text("SELECT 1")))

    async def _begin(self, work: Callable[[Any], Any]) -> None:
        def begin() -> None:
            with self.pool.begin() as connection:
                work(connection)

        await self._in_thread(begin)

    async def _in_thread(self, work: Callable[[], Any]) -> None:
        task = asyncio.create_task(asyncio.to_thread(work))
        self.works.add(task)
        task.add_done_callback(self._is_done)
        await asyncio.shield(task)

    def _is_done(self, task: asyncio.Task[Any]) -> None:
        self.works.discard(task)
        if not task.cancelled():
            task.exception()  # nobody else may ask

    async def transaction(self, tag: str, kept: list[Any]) -> None:
        def work(connection: Any) -> None:
            connection.exec_driver_sql(f"{ADD}('{tag}', 1)")
            connection.exec_driver_sql(f"{ADD}('{tag}', 2)")

        await self._begin(work)

    async def many(self, tag: str, kept: list[Any]) -> None:
        rows: Any = sqlalchemy.table("rows", sqlalchemy.column("tag"), sqlalchemy.column("n"))
        values = [{"tag": tag, "n": 1}, {"tag": tag, "n": 2}]
        await self._begin(lambda connection: connection.execute(rows.insert(), values))

    async def copy(self, tag: str, kept: list[Any]) -> None:
        await self._begin(lambda connection: _copy(connection, io.StringIO(f"{tag}\t1\n{tag}\t2\n")))

    async def copy_cut_off(self, tag: str, kept: list[Any]) -> None:
        class Cut(io.StringIO):
            def read(self, size: int | None = -1) -> str:
                raise Broken

        await self._begin(lambda connection: _copy(connection, Cut()))

    async def times_out(self, tag: str, kept: list[Any]) -> None:
        def work(connection: Any) -> None:
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = 10; {ADD}('{tag}', 1)")
            connection.exec_driver_sql(SLEEP)

        await self._begin(work)

    async def invalidate(self, tag: str, kept: list[Any]) -> None:
        def work(connection: Any) -> None:
            connection.exec_driver_sql(f"{ADD}('{tag}', 1)")
            connection.invalidate()

        await self._begin(work)

    async def leave_open(self, tag: str, kept: list[Any]) -> None:
        def work() -> None:
            connection = self.pool.connect()
            kept.append(connection)
            connection.exec_driver_sql(f"{ADD}('{tag}', 1)")

        await self._in_thread(work)


def _copy(connection: Any, file: Any) -> None:
    cursor = connection.connection.cursor()
    cursor.copy_expert("COPY rows (tag, n) FROM STDIN", file)


CLIENTS: list[type[Actor]] = [Asyncpg, Psycopg, Aiopg, Engine]
