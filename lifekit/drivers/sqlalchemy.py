"""What lifekit knows about SQLAlchemy's async engines, from 2.0 and 2.1."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import anyio
from greenlet import getcurrent  # type: ignore[import-untyped]
from sqlalchemy import Engine, event, select
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import Pool
from sqlalchemy.util import greenlet_spawn

from lifekit._core.block import refuse_stragglers
from lifekit._core.drivers import Gateway, Sandbox
from lifekit._core.errors import DeclarationError, SandboxEscapedError, SandboxUnsupportedError
from lifekit._core.transient import is_known_to_pass
from lifekit._util.loops import running_loop
from lifekit._util.redact import redact

from ._checkouts import Checkout, Checkouts, Pooled, current_task, mix_in, pool_sandbox, sqlite_sandbox
from ._doors import by_way_of
from ._lock import AsyncpgSession, PostgresLock, PsycopgSession, Session

T = TypeVar("T")

checkouts: Checkouts = Checkouts("sqlalchemy")
_INSIDE = {"contextlib", "lifekit", "sqlalchemy"}
_MEND = "Return create_async_engine(...) from the factory, so that each lifespan gets its own."


class Use:
    """How an engine, with all that `execution_options()` derives from it, is used."""

    def __init__(self) -> None:
        self.opened = 0
        self.loop: object | None = None
        self.cut = False
        self.gateway: Gateway | None = None
        self.is_checked = False  # whether what connects is
        self.fairies: WeakSet[Any] = WeakSet()  # what SQLAlchemy calls a connection that is out
        self.records: WeakSet[Any] = WeakSet()  # a place in the pool, with or without a connection

    def out(self) -> list[Any]:
        """Return the connections that are out, those that were detached as well."""
        return [fairy for fairy in self.fairies if fairy.dbapi_connection is not None]


_uses: WeakKeyDictionary[object, Use] = WeakKeyDictionary()


class _Noting(Pool):
    """What the class of a pool is mixed with, so that it notes who takes its connections."""

    _use: Use

    def connect(self) -> Any:
        use = self._use
        if use.cut:
            raise _ended()
        try:
            fairy: Any = super().connect()
        except (PoolTimeout, asyncio.CancelledError) as error:  # the latter becomes a TimeoutError
            if 0 < _most(self) <= len(out := use.out()):
                checkouts.note_holders(error, out)
            raise
        if use.cut:  # it was on its way
            fairy.invalidate()
            raise _ended()
        try:
            refuse_stragglers("an engine of SQLAlchemy")
        except SandboxEscapedError:
            fairy.close()
            raise
        use.fairies.add(fairy)
        use.records.add(fairy._connection_record)
        checkouts.note(fairy, Checkout(user_frame(), current_task()))
        return fairy

    def recreate(self) -> Any:
        return _note(super().recreate(), self._use)


class _Engines(Pooled[T]):
    """What engines of both kinds have in common."""

    checkouts = checkouts
    use = "with engine.connect() as connection, or Session(engine) as session"

    def describe(self, value: T) -> str:
        """Return its limit and its database."""
        engine = sync(value)
        most = _most(engine.pool)
        limit = f" of up to {most} connections" if most > 0 else ""
        given = engine.url
        # Passwords can be anywhere else in the query, as in odbc_connect.
        query = {name: given.query[name] for name in ("host", "port") if name in given.query}
        url = given.set(query=query).render_as_string(hide_password=True)
        return redact(f"SQLAlchemy engine{limit}, {url}")

    async def close(self, value: T) -> None:
        """Wait for every connection that is out, which `dispose()` does not, then dispose."""
        use = use_of(value)
        if use.opened > 1:  # by two engines of which one derives from the other
            use.opened -= 1
            return
        # They come back in several ways, by garbage collection too, and no event tells of them all.
        while use.out():  # noqa: ASYNC110
            await anyio.sleep(0.01)
        await self._dispose(value)
        use.opened, use.loop = 0, None

    async def _dispose(self, value: T) -> None:
        raise NotImplementedError

    def transient(self, error: BaseException) -> bool:
        """Return whether the driver's own error, which SQLAlchemy wraps twice, is."""
        return is_known_to_pass(error)

    def out(self, value: T) -> Sequence[Any]:
        """Return the connections that are out."""
        return use_of(value).out()

    def redirect(self, value: T, gateway: Gateway) -> Sandbox | None:
        """Let the engine's dialect connect by way of the gateway."""
        dialect: Any = root(sync(value)).dialect
        use = use_of(value)
        if (dialect.name, dialect.driver) not in _DRIVERS:
            return UnsupportedSandbox(f"{dialect.name}+{dialect.driver}")
        if use.gateway is gateway:
            return None  # by another engine, from which this one derives, or that derives from this
        if dialect.name == "sqlite":
            use.gateway = gateway
            return sqlite_sandbox(gateway, self, value)
        kind: Any = dialect.__class__

        def by_gateway(*args: Any, **given: Any) -> Any:
            with by_way_of(gateway):
                return kind.connect(dialect, *args, **given)

        dialect.connect, use.gateway = by_gateway, gateway
        if not use.is_checked:
            event.listen(root(sync(value)), "connect", functools.partial(_came_by_gateway, use))
            use.is_checked = True
        return pool_sandbox(gateway, self, value)

    def restore(self, value: T) -> None:
        """Let the engine connect as it did."""
        use = use_of(value)
        if use.gateway is not None:
            root(sync(value)).dialect.__dict__.pop("connect", None)
        use.gateway = None

    async def reconnect(self, value: T) -> None:
        """Close the idle connections, where they lead to a server."""
        if sync(value).dialect.name == "sqlite":
            return  # they may be all that there is of a database
        engine, here = sync(value), running_loop()
        idle = list(_idle(engine.pool))
        if idle and all(_loop_of(each.dbapi_connection) in (None, here) for each in idle):
            await greenlet_spawn(engine.dispose)

    async def forget_schema(self, value: T) -> None:
        """Renew asyncpg's connections, which know of types, and of the rows of statements."""
        if sync(value).dialect.driver == "asyncpg":
            await self.reconnect(value)

    def number(self, connection: Any) -> int | None:
        """Return its server's process."""
        return _number(connection.driver_connection)

    def is_in_transaction(self, connection: Any) -> bool:
        """Return whether a transaction is open on it."""
        driver = connection.driver_connection
        if hasattr(driver, "is_in_transaction"):  # asyncpg's
            return not driver.is_closed() and bool(driver.is_in_transaction())
        if hasattr(driver, "in_transaction"):  # SQLite's
            return bool(driver.in_transaction)
        info = getattr(driver, "info", None)
        return info is not None and info.transaction_status not in (0, 4)  # idle, unknown

    async def take_back(self, value: T, connection: Any) -> None:
        """Let the pool know that it is closed. Who is in the midst of a statement gives it back."""
        info = getattr(connection.driver_connection, "info", None)
        if info is None or info.transaction_status != 1:  # active
            await greenlet_spawn(connection.invalidate)


_DRIVERS = {
    *(
        ("postgresql", driver)
        for driver in ("asyncpg", "pg8000", "psycopg", "psycopg2", "psycopg_async")
    ),
    *(("sqlite", driver) for driver in ("aiosqlite", "pysqlite")),
}


def _came_by_gateway(use: Use, connection: Any, record: Any) -> None:
    gateway: Any = use.gateway
    if gateway is not None and not gateway.knows(_number(record.driver_connection)):
        raise SandboxUnsupportedError(
            "this engine's `creator` gave it a connection that was made before the lifespan opened, so "
            "that what it does would be permanent. Let the creator connect."
        )


def _number(driver: Any) -> int | None:
    if hasattr(driver, "get_server_pid"):  # asyncpg's
        return driver.get_server_pid()  # type: ignore[no-any-return]
    info = getattr(driver, "info", None)
    return info.backend_pid if info is not None else None


class UnsupportedSandbox(Sandbox):
    """The sandbox of an engine that can have none."""

    def __init__(self, name: str) -> None:
        self._name = name

    def error(self) -> SandboxUnsupportedError:
        """Return what says so."""
        return SandboxUnsupportedError(
            f"a SQLAlchemy engine on {self._name} can't be sandboxed, one on postgresql with asyncpg, "
            "psycopg, psycopg2 or pg8000 can, and one on sqlite with aiosqlite or pysqlite. Let the "
            "engine's factory make that under test, override the resource, run the test without a "
            'sandbox, @pytest.mark.lifekit(isolation="none"), or say in its declaration that it may '
            "last: @registry.resource(…, sandbox=False)."
        )

    async def begin(self) -> None:
        """Say so.

        Raises:
            SandboxUnsupportedError: Always.
        """
        raise self.error()


class EngineDriver(_Engines[Engine]):
    """Sync engines, as `create_engine()` returns them, of any dialect."""

    async def open(self, value: Engine) -> Engine:
        """Take an engine, and watch it."""
        use_of(value).opened += 1
        self.watch(value)
        return value

    def watch(self, value: Engine) -> None:
        """Let the engine's pool note who takes its connections."""
        use = use_of(value)
        use.cut = False
        _note(value.pool, use)

    async def check(self, value: Engine) -> None:
        """Run one `SELECT 1`, in a thread."""

        def ask() -> None:
            with value.connect() as connection:
                connection.scalar(select(1))

        if value.dialect.name != "sqlite":  # of which each thread may have its own
            await anyio.to_thread.run_sync(ask)

    async def _dispose(self, value: Engine) -> None:
        await anyio.to_thread.run_sync(value.dispose)

    def terminate(self, value: Engine) -> None:
        """Cut every connection off, and let none arrive that is on its way."""
        _cut_all(value, use_of(value))


class SqlalchemyDriver(_Engines[AsyncEngine]):
    """Engines as `create_async_engine()` returns them, of any dialect."""

    async def open(self, value: AsyncEngine) -> AsyncEngine:
        """Take an engine that is connected in no other loop, and watch it."""
        use, loop = use_of(value), running_loop()
        loops = {_loop_of(record.dbapi_connection) for record in _idle(value.sync_engine.pool)}
        if (use.opened and use.loop is not loop) or loops - {None, loop}:
            raise DeclarationError(
                f"this SQLAlchemy engine has connections of another event loop. {_MEND}"
            )
        use.opened += 1
        self.watch(value)
        return value

    def watch(self, value: AsyncEngine) -> None:
        """Let the engine's pool note who takes its connections."""
        use = use_of(value)
        use.loop, use.cut = running_loop(), False
        _note(value.sync_engine.pool, use)

    async def check(self, value: AsyncEngine) -> None:
        """Run one `SELECT 1`."""
        async with value.connect() as connection:
            await connection.scalar(select(1))

    def lock(self, value: AsyncEngine, key: str) -> PostgresLock | None:
        """Return an advisory lock, where the engine is one of PostgreSQL's."""
        if value.dialect.name != "postgresql" or value.dialect.driver not in ("asyncpg", "psycopg"):
            return None
        return PostgresLock(functools.partial(_lock_session, value), key)

    async def _dispose(self, value: AsyncEngine) -> None:
        await value.dispose()

    def terminate(self, value: AsyncEngine) -> None:
        """Cut every connection off, and let none arrive that is on its way."""
        use = use_of(value)
        if use.loop is running_loop():  # else `open` refused it: it is another's
            _cut_all(value.sync_engine, use)


async def _lock_session(engine: AsyncEngine) -> Session:
    """Return a connection that is made as the engine's pool makes its own, as its driver's."""
    pool: Any = engine.sync_engine.pool
    own: Any = engine.dialect.get_driver_connection(await greenlet_spawn(pool._invoke_creator, None))
    if engine.dialect.driver == "asyncpg":
        return AsyncpgSession(own)
    await own.set_autocommit(True)
    return PsycopgSession(own)


def _cut_all(engine: Any, use: Use) -> None:
    use.opened = max(use.opened - 1, 0)
    if use.opened:
        return
    use.cut, use.loop = True, None
    owners = [*use.out(), *use.records, *_idle(engine.pool)]
    for connection in dict.fromkeys(owner.dbapi_connection for owner in owners):
        if connection is not None:
            _cut(engine.dialect, connection)
    engine.dispose(close=False)


def sync(value: Any) -> Any:
    """Return the sync engine that an engine is, or has."""
    return getattr(value, "sync_engine", value)


def root(engine: Any) -> Any:
    """Return the engine from which `execution_options()` derived this one, and whose pool it has."""
    while hasattr(engine, "_proxied"):
        engine = engine._proxied
    return engine


def user_frame() -> FrameType:
    """Return the frame of the code that now asks SQLAlchemy for something."""
    # Below SQLAlchemy's sync code the stack ends, and goes on in the greenlet that began it.
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    assert frame is not None
    first, greenlet = frame, getcurrent()
    while frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        below = frame.f_back
        if below is None and greenlet.parent is not None:
            greenlet = greenlet.parent
            below = greenlet.gr_frame
        if below is None:
            return first
        frame = below
    return frame


def _ended() -> InvalidRequestError:
    return InvalidRequestError("this engine was cut off when its lifespan ended")


def use_of(value: Any) -> Use:
    """Return how an engine is used."""
    engine = root(sync(value))
    return _uses.get(engine) or _uses.setdefault(engine, Use())


def _most(pool: Any) -> int:
    """Return how many connections a pool hands out at most, 0 where there is no limit."""
    overflow: int = getattr(pool, "_max_overflow", -1)
    return pool.size() + overflow if overflow >= 0 else 0


def _note(pool: Any, use: Use) -> Any:
    mix_in(_Noting, pool)
    pool._use = use
    return pool


def _idle(pool: Any) -> Iterator[Any]:
    """Yield the places of the pool that hold a connection and are not in use."""
    queue = getattr(getattr(pool, "_pool", None), "_queue", None)
    places = [*getattr(queue, "_queue", ()), pool.__dict__.get("connection")]  # the latter StaticPool's
    yield from (place for place in places if place is not None and place.dbapi_connection is not None)


def _loop_of(connection: Any) -> object | None:
    return getattr(connection._connection, "_loop", None)  # asyncpg's


def _cut(dialect: Any, connection: Any) -> None:
    if getattr(dialect, "has_terminate", False):
        dialect.do_terminate(connection)
        return
    # psycopg has no abort. Whoever waits for its answer has to be woken, so the socket goes first.
    driver = dialect.get_driver_connection(connection)
    with suppress(Exception):
        with socket.socket(fileno=os.dup(driver.fileno())) as copy:
            copy.shutdown(socket.SHUT_RDWR)
        if driver.info.transaction_status.name != "ACTIVE":
            driver.pgconn.finish()


driver: SqlalchemyDriver = SqlalchemyDriver()
sync_driver: EngineDriver = EngineDriver()
