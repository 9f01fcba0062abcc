"""What lifekit knows about aiopg's pools, from `pool.py` and `connection.py` of aiopg 1.4."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from traceback import walk_tb
from typing import Any

import psycopg2
from aiopg import Connection, Pool
from psycopg2.extensions import parse_dsn

from lifekit._backend import running_loop
from lifekit._errors import DeclarationError, note_once
from lifekit._redact import redact

from . import Driver, Sandbox
from ._libpq import is_transient
from ._loans import Loan, Loans, mix_in

loans: Loans = Loans("aiopg")
_MEND = "Return aiopg.create_pool(...) from the factory, so that each lifespan gets its own."


class _Noting(Pool):
    """What the class of an open pool is mixed with, so that the pool notes who acquires."""

    def _acquire(self) -> Any:
        # Called where acquire() is, even if wait_for() then awaits it in a task of its own.
        return self._noted(loans.here())

    async def _noted(self, loan: Loan) -> Connection:
        connection = await super()._acquire()
        loans.note(connection, loan)
        return connection

    async def _fill_free_pool(self, override_min: bool) -> None:
        # Once past its first line acquire() no more asks whether the pool was closed meanwhile.
        if not self._closed:
            await super()._fill_free_pool(override_min)
        if self._closed:
            _cut(self._free)
            raise RuntimeError("Cannot acquire connection after closing pool")


class AiopgDriver(Driver[Pool]):
    """Pools of aiopg, as `aiopg.create_pool()` gives them."""

    async def open(self, value: Pool) -> Pool:
        """Take a pool that is this lifespan's own, and watch it."""
        pool: Any = value
        if pool._loop is not running_loop():
            raise DeclarationError(f"this aiopg pool belongs to another event loop. {_MEND}")
        if pool._closing or pool.closed:
            raise DeclarationError(f"this aiopg pool is closed already. {_MEND}")
        self.watch(value)
        return value

    def watch(self, value: Pool) -> None:
        """Let the pool note who acquires its connections."""
        mix_in(_Noting, value)

    async def check(self, value: Pool) -> None:
        """Run one `SELECT 1`."""
        async with value.acquire() as connection, connection.cursor() as cursor:
            await cursor.execute("SELECT 1")

    def close(self, value: Pool) -> None:
        """Hand out no more connections."""
        value.close()

    def wait_closed(self, value: Pool) -> Awaitable[object]:
        """Close the idle connections and wait for those that are out."""
        return value.wait_closed()

    def terminate(self, value: Pool) -> None:
        """Cut every connection off, idle or out, and wake what waits for the pool."""
        pool: Any = value
        loop: Any = running_loop()
        if pool._loop is not loop:
            return  # `open` refused it: it is another's, or dead
        # Pool.terminate() leaves the idle ones open, and wait_closed() waiting.
        pool.close()
        pool._closed = True
        pool._terminated |= pool._used  # release() then knows them
        _cut(pool._used)
        _cut(pool._free)
        if pool._cond.locked():
            pool._cond.notify_all()
        else:
            loop.create_task(_wake(pool._cond))

    def describe(self, value: Pool) -> str:
        """Return its sizes and its server."""
        sizes = f"{value.minsize} to {value.maxsize or 'any number'}"
        return redact(f"aiopg pool of {sizes}, {_server(value)}")

    def holders(self, value: Pool) -> Sequence[str]:
        """Return where each connection that is out was acquired."""
        pool: Any = value
        return loans.lines(pool._used)

    def sandbox(self, value: Pool) -> Sandbox:
        """Let the pool's connections, inside a block, share one that is never committed."""
        from lifekit.sandbox.aiopg import sandbox

        return sandbox(value)

    def transient(self, error: BaseException) -> bool:
        """Return whether the server is starting, stopping or full, or hung up on us."""
        return isinstance(error, psycopg2.OperationalError) and is_transient(error)

    def salvage(self, error: BaseException) -> None:
        """Close what a pool had opened when it failed to open: nobody else knows it."""
        opening: Any = Pool.from_pool_fill
        filling: Any = Pool._fill_free_pool  # pyright: ignore[reportPrivateUsage]
        for frame, _ in walk_tb(error.__traceback__):
            if frame.f_code is opening.__func__.__code__:
                pool = frame.f_locals["self"]
                note_once(error, f"lifekit: opening {self.describe(pool)}")
                self.terminate(pool)
            elif frame.f_code is filling.__code__ and "conn" in frame.f_locals:
                _cut({frame.f_locals["conn"]})  # the one that on_connect failed with


def _cut(connections: Any) -> None:
    while connections:
        connection = connections.pop()
        # Not twice: its descriptor may be another's by now, which close() would take off the loop.
        if connection.raw.closed != 1:
            connection.close()


async def _wake(condition: Any) -> None:
    async with condition:
        condition.notify_all()


def _server(pool: Any) -> str:
    """Return where a pool connects to: its DSN, and the arguments that win over it."""
    try:
        given = parse_dsn(pool._dsn or "") | pool._conn_kwargs
    except psycopg2.ProgrammingError:
        return "a malformed DSN"
    user, host, port = (given.get(name) or "" for name in ("user", "host", "port"))
    database = given.get("dbname") or given.get("database") or ""
    if not (host or user or database):
        return "the server that PGHOST names"
    login = f"{user}{':***' if given.get('password') else ''}@" if user else ""
    return f"postgresql://{login}{host}{':' if port else ''}{port}/{database}"


driver: AiopgDriver = AiopgDriver()
