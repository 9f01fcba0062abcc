"""What lifekit knows about aiopg's pools and connections, from its `pool.py`, `connection.py`, 1.4."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from traceback import walk_tb
from typing import Any

import aiopg
import psycopg2
from aiopg import Connection, Pool
from psycopg2.extensions import (
    TRANSACTION_STATUS_IDLE,
    TRANSACTION_STATUS_UNKNOWN,
    parse_dsn,
)

from lifekit._core.block import refuse_stragglers
from lifekit._core.drivers import Gateway, Sandbox, judge
from lifekit._core.errors import DeclarationError, SandboxEscapedError, note_once
from lifekit._util.loops import running_loop
from lifekit._util.redact import redact

from ._checkouts import Checkout, Checkouts, Connected, Pooled, mix_in, pool_sandbox
from ._doors import by_way_of
from ._lock import AiopgSession, PostgresLock

checkouts: Checkouts = Checkouts("aiopg")
_MEND = "Return aiopg.create_pool(...) from the factory, so that each lifespan gets its own."


class _Noting(Pool):
    """What the class of an open pool is mixed with, so that the pool notes who acquires."""

    def _acquire(self) -> Any:
        # Called where acquire() is, even if wait_for() then awaits it in a task of its own.
        return self._noted(checkouts.here())

    async def _noted(self, checkout: Checkout) -> Connection:
        try:
            connection = await super()._acquire()
        except asyncio.CancelledError as error:  # it becomes a TimeoutError
            if 0 < (self.maxsize or 0) <= len(self._used):
                checkouts.note_holders(error, list(self._used))
            raise
        checkouts.note(connection, checkout)
        return connection

    async def _fill_free_pool(self, override_min: bool) -> None:
        # Once past its first line acquire() no more asks whether the pool was closed meanwhile.
        if not self._closed:
            await super()._fill_free_pool(override_min)
        if self._closed:
            _cut(self._free)
            raise RuntimeError("Cannot acquire connection after closing pool")


class _InTests(_Noting):
    """The same in test mode, where a use may be too late."""

    async def _noted(self, checkout: Checkout) -> Connection:
        refuse_stragglers("a pool of aiopg")
        with by_way_of(self.__dict__["gateway"]):
            connection = await super()._noted(checkout)
        try:
            refuse_stragglers("a pool of aiopg")  # the block may have ended meanwhile
        except SandboxEscapedError:
            await self.release(connection)
            raise
        return connection


class AiopgDriver(Pooled[Pool]):
    """Pools of aiopg, as `aiopg.create_pool()` gives them."""

    checkouts = checkouts
    use = "async with pool.acquire() as connection"

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

    def redirect(self, value: Pool, gateway: Gateway) -> Sandbox:
        """Let the pool connect by way of the gateway."""
        value.__dict__["gateway"] = gateway
        mix_in(_InTests, value)
        return pool_sandbox(gateway, self, value)

    async def reconnect(self, value: Pool) -> None:
        """Close the idle connections."""
        await value.clear()

    def out(self, value: Pool) -> Sequence[Any]:
        """Return the connections that are out."""
        pool: Any = value
        return list(pool._used)

    def number(self, connection: Any) -> int:
        """Return its server's process."""
        return connection.raw.info.backend_pid  # type: ignore[no-any-return]

    def is_in_transaction(self, connection: Any) -> bool:
        """Return whether a transaction is open on it."""
        status = connection.raw.info.transaction_status
        return status not in (TRANSACTION_STATUS_IDLE, TRANSACTION_STATUS_UNKNOWN)

    async def take_back(self, value: Pool, connection: Any) -> None:
        """Close it, and let the pool know."""
        if not connection.closed:
            connection.close()
        await value.release(connection)

    def transient(self, error: BaseException) -> bool:
        """Return whether the server is starting, stopping or full, or hung up on us."""
        return judge(error) is True

    def lock(self, value: Pool, key: str) -> PostgresLock:
        """Return an advisory lock, on a connection that is made as the pool makes its own."""
        pool: Any = value

        async def connect() -> AiopgSession:
            types = dict.fromkeys(("enable_json", "enable_hstore", "enable_uuid"), False)
            given = {**types, "timeout": pool._timeout, **pool._conn_kwargs}
            return AiopgSession(await aiopg.connect(pool._dsn, **given))

        return PostgresLock(connect, key)

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


class _ConnectionInTests(Connection):
    """What the class of a single connection is mixed with in test mode, where a use may be too late."""

    def cursor(self, *args: Any, **options: Any) -> Any:
        refuse_stragglers("a connection of aiopg")
        return super().cursor(*args, **options)


class ConnectionDriver(Connected[Connection]):
    """Single connections, as `await aiopg.connect()` returns them."""

    checkouts = checkouts

    async def open(self, value: Connection) -> Connection:
        """Take a connection that is this event loop's, and open."""
        connection: Any = value
        if connection._loop is not running_loop():
            raise DeclarationError(f"this aiopg connection belongs to another event loop. {_CONNECT}")
        if value.closed:
            raise DeclarationError(f"this aiopg connection is closed already. {_CONNECT}")
        return value

    async def check(self, value: Connection) -> None:
        """Run one `SELECT 1`."""
        async with value.cursor() as cursor:
            await cursor.execute("SELECT 1")

    async def close(self, value: Connection) -> None:
        """Say goodbye to the server."""
        await value.close()

    def terminate(self, value: Connection) -> None:
        """Close it."""
        connection: Any = value
        if connection._loop is running_loop():  # else `open` refused it: it is another's, or dead
            _cut({value})

    def describe(self, value: Connection) -> str:
        """Return its server."""
        if value.closed:
            return "aiopg connection, closed"
        return redact(f"aiopg connection, {_url(value.raw.get_dsn_parameters())}")

    def redirect(self, value: Connection, gateway: Gateway) -> Sandbox | None:
        """See to it that it is what blocks undo, and that nobody uses it too late."""
        mix_in(_ConnectionInTests, value)
        return super().redirect(value, gateway)

    def is_closed(self, value: Connection) -> bool:
        """Return whether it is closed."""
        return bool(value.closed)

    def number(self, connection: Any) -> int | None:
        """Return its server's process."""
        return connection.raw.info.backend_pid if not connection.closed else None

    def is_in_transaction(self, connection: Any) -> bool:
        """Return whether a transaction is open on it."""
        return driver.is_in_transaction(connection)

    def transient(self, error: BaseException) -> bool:
        """Return whether the server is starting, stopping or full, or hung up on us."""
        return judge(error) is True


_CONNECT = "Let the factory connect, so that each lifespan gets its own."


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
    return _url(given)


def _url(given: Any) -> str:
    user, host, port = (given.get(name) or "" for name in ("user", "host", "port"))
    database = given.get("dbname") or given.get("database") or ""
    if not (host or user or database):
        return "the server that PGHOST names"
    login = f"{user}{':***' if given.get('password') else ''}@" if user else ""
    return f"postgresql://{login}{host}{':' if port else ''}{port}/{database}"


driver: AiopgDriver = AiopgDriver()
connection_driver: ConnectionDriver = ConnectionDriver()
