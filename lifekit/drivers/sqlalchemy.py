"""What lifekit knows about SQLAlchemy's async engines, from 2.0 and 2.1."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import anyio
from greenlet import getcurrent  # type: ignore[import-untyped]
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import Pool

from lifekit._backend import running_loop
from lifekit._errors import DeclarationError
from lifekit._redact import redact
from lifekit._transient import is_transient

from . import Driver, Sandbox
from ._loans import Loan, Loans, mix_in

loans: Loans = Loans("sqlalchemy")
_INSIDE = {"contextlib", "lifekit", "sqlalchemy"}
_MEND = "Return create_async_engine(...) from the factory, so that each lifespan gets its own."


class Use:
    """How an engine, with all that `execution_options()` derives from it, is used."""

    def __init__(self) -> None:
        self.opened = 0
        self.loop: object | None = None
        self.cut = False
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
        fairy: Any = super().connect()
        if use.cut:  # it was on its way
            fairy.invalidate()
            raise _ended()
        use.fairies.add(fairy)
        use.records.add(fairy._connection_record)
        task = asyncio.current_task()
        loans.note(fairy, Loan(user_frame(), task.get_name() if task is not None else None))
        return fairy

    def recreate(self) -> Any:
        return _note(super().recreate(), self._use)


class SqlalchemyDriver(Driver[AsyncEngine]):
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

    async def close(self, value: AsyncEngine) -> None:
        """Wait for every connection that is out, which `dispose()` does not, then dispose."""
        use = use_of(value)
        if use.opened > 1:  # by two engines of which one derives from the other
            use.opened -= 1
            return
        # They come back in several ways, by garbage collection too, and no event tells of them all.
        while use.out():  # noqa: ASYNC110
            await anyio.sleep(0.01)
        await value.dispose()
        use.opened, use.loop = 0, None

    def terminate(self, value: AsyncEngine) -> None:
        """Cut every connection off, and let none arrive that is on its way."""
        use = use_of(value)
        if use.loop is not running_loop():
            return  # `open` refused it: it is another's
        use.opened = max(use.opened - 1, 0)
        if use.opened:
            return
        use.cut, use.loop = True, None
        engine = value.sync_engine
        owners = [*use.out(), *use.records, *_idle(engine.pool)]
        for connection in dict.fromkeys(owner.dbapi_connection for owner in owners):
            if connection is not None:
                _cut(engine.dialect, connection)
        engine.dispose(close=False)

    def describe(self, value: AsyncEngine) -> str:
        """Return its limit and its database."""
        pool: Any = value.sync_engine.pool
        most = pool.size() + pool._max_overflow if hasattr(pool, "_max_overflow") else 0
        limit = f" of up to {most} connections" if most > 0 and pool._max_overflow >= 0 else ""
        given = value.sync_engine.url
        # Passwords can be anywhere else in the query, as in odbc_connect.
        query = {name: given.query[name] for name in ("host", "port") if name in given.query}
        url = given.set(query=query).render_as_string(hide_password=True)
        return redact(f"SQLAlchemy engine{limit}, {url}")

    def holders(self, value: AsyncEngine) -> Sequence[str]:
        """Return where each connection that is out was taken."""
        return loans.lines(use_of(value).out())

    def sandbox(self, value: AsyncEngine) -> Sandbox | None:
        """Let the engine's connections, inside a block, share one that is never committed."""
        from lifekit.sandbox.sqlalchemy import sandbox

        return sandbox(value)

    def transient(self, error: BaseException) -> bool:
        """Return whether the driver's own error, which SQLAlchemy wraps twice, is."""
        if not isinstance(error, DBAPIError) or error.orig is None:
            return False
        wrapped = [error.orig, error.orig.__cause__]
        return any(is_transient(each) for each in wrapped if each and not isinstance(each, DBAPIError))


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


def use_of(value: AsyncEngine) -> Use:
    """Return how an engine is used."""
    return _uses.setdefault(root(value.sync_engine), Use())


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
