"""What lifekit knows about asyncpg's pools and connections, from `pool.py` of asyncpg 0.29 to 0.32."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import asyncpg
from asyncpg import connect_utils, exceptions

from lifekit._core.block import current_block, refuse_stragglers
from lifekit._core.drivers import Gateway, Sandbox, judge
from lifekit._core.errors import DeclarationError, SandboxEscapedError, note_once
from lifekit._util.loops import running_loop
from lifekit._util.redact import redact

from ._checkouts import Checkouts, Connected, Pooled, mix_in, pool_sandbox
from ._doors import Door, Here, by_way_of, checkout
from ._lock import AsyncpgSession, PostgresLock

if TYPE_CHECKING:
    Pool = asyncpg.Pool[Any]
    Connection = asyncpg.Connection[Any]
else:
    Pool = asyncpg.Pool
    Connection = asyncpg.Connection

checkouts: Checkouts = Checkouts("asyncpg")
_MEND = "Return asyncpg.create_pool(...) from the factory, so that each lifespan gets its own."


class _Noting:
    """What the class of an open pool is mixed with, so that the pool notes who acquires."""

    __slots__ = ()  # the layout must not change

    async def _acquire(self, seconds: float | None) -> Any:
        try:
            connection = await cast(Any, super())._acquire(seconds)
        except (TimeoutError, asyncio.CancelledError) as error:  # the latter becomes a TimeoutError
            if len(out := _out(self)) >= cast(Any, self).get_max_size():
                checkouts.note_holders(error, out)
            raise
        # Not by the holder, which takes no weak reference before 0.32.
        checkouts.note(connection._con, checkouts.here())
        return connection


class _InTests(_Noting):
    """The same in test mode, where a use may be too late."""

    __slots__ = ()

    async def _acquire(self, seconds: float | None) -> Any:
        refuse_stragglers("a pool of asyncpg")
        if seconds is None and current_block.get() is not None:
            checkouts.refuse_hopeless(_out(self), cast(Any, self).get_max_size())
        connection = await super()._acquire(seconds)
        try:
            refuse_stragglers("a pool of asyncpg")  # the block may have ended meanwhile
        except SandboxEscapedError:
            await cast(Any, self).release(connection)
            raise
        return connection


class AsyncpgDriver(Pooled[Pool]):
    """Pools of asyncpg, as `asyncpg.create_pool()` returns them, awaited or not."""

    checkouts = checkouts
    use = "async with pool.acquire() as connection"

    async def open(self, value: Pool) -> Pool:
        """Open a pool that is this lifespan's own, and watch it."""
        pool: Any = value
        if pool._loop is not running_loop():
            raise DeclarationError(f"this asyncpg pool belongs to another event loop. {_MEND}")
        if pool.is_closing():
            raise DeclarationError(f"this asyncpg pool is closed already. {_MEND}")
        self.watch(value)
        await pool
        return value

    def watch(self, value: Pool) -> None:
        """Let the pool note who acquires its connections."""
        mix_in(_Noting, value)

    async def check(self, value: Pool) -> None:
        """Run one `SELECT 1`."""
        await value.fetchval("SELECT 1")

    def close(self, value: Pool) -> Awaitable[object]:
        """Wait for every connection that is out, then close them all."""
        return value.close()

    def terminate(self, value: Pool) -> None:
        """Cut every connection off, whatever state the pool is in."""
        pool: Any = value
        if pool._loop is not running_loop():
            return  # `open` refused it: it is another's, or dead
        with suppress(exceptions.InterfaceError):  # it never opened, or is still opening
            pool.terminate()
        pool._closed = True
        for holder in pool._holders:
            # A failed opening leaves connects behind, for gather() lets the others go on. From 0.32
            # on a closed pool drops what still arrives; before, its being idle for too long does.
            holder._max_inactive_time = 1e-9
            if holder.is_connected():  # an interrupted close() marks the pool closed, and no more
                holder.terminate()

    def describe(self, value: Pool) -> str:
        """Return its sizes and its server."""
        sizes = f"{value.get_min_size()} to {value.get_max_size()}"
        return redact(f"asyncpg pool of {sizes}, {_server(value)}")

    def redirect(self, value: Pool, gateway: Gateway) -> Sandbox:
        """Let the pool connect by way of the gateway."""
        pool: Any = value
        connect = pool._connect  # what `create_pool(connect=...)` was given, or asyncpg's own

        async def by_gateway(*args: Any, **options: Any) -> Any:
            with by_way_of(gateway):
                return await connect(*args, **options)

        pool._connect = by_gateway
        mix_in(_InTests, value)
        return pool_sandbox(gateway, self, value)

    async def reconnect(self, value: Pool) -> None:
        """Let connections of before be closed when they would be used again."""
        await value.expire_connections()

    async def forget_schema(self, value: Pool) -> None:
        """Renew its connections: they know of types, and of the rows of statements."""
        await self.reconnect(value)

    def out(self, value: Pool) -> Sequence[Any]:
        """Return the connections that are out."""
        return _out(value)

    def number(self, connection: Any) -> int:
        """Return its server's process."""
        return connection.get_server_pid()  # type: ignore[no-any-return]

    def is_in_transaction(self, connection: Any) -> bool:
        """Return whether a transaction is open on it."""
        return not connection.is_closed() and bool(connection.is_in_transaction())

    def take_back(self, value: Pool, connection: Any) -> None:
        """Terminate it, of which the pool takes note."""
        connection.terminate()

    def lock(self, value: Pool, key: str) -> PostgresLock:
        """Return an advisory lock, on a connection that is made as the pool makes its own."""
        pool: Any = value

        async def connect() -> AsyncpgSession:
            given = {**pool._connect_kwargs, "loop": pool._loop}
            return AsyncpgSession(await pool._connect(*pool._connect_args, **given))

        return PostgresLock(connect, key)

    def transient(self, error: BaseException) -> bool:
        """Return whether the server is starting, stopping or full, or hung up on us."""
        return judge(error) is True

    def salvage(self, error: BaseException) -> None:
        """Terminate a pool that failed to open inside a factory: before 0.32 nobody else does."""
        for frame, _ in walk_tb(error.__traceback__):
            if frame.f_code is Pool._async__init__.__code__:  # type: ignore[attr-defined]
                pool = frame.f_locals["self"]
                note_once(error, f"lifekit: opening {self.describe(pool)}")
                self.terminate(pool)


class ConnectionDriver(Connected[Connection]):
    """Single connections of asyncpg, as `await asyncpg.connect()` returns them."""

    checkouts = checkouts

    async def open(self, value: Connection) -> Connection:
        """Take a connection that is this event loop's, and open."""
        connection: Any = value
        if connection._loop != running_loop():
            raise DeclarationError(f"this asyncpg connection belongs to another event loop. {_CONNECT}")
        if value.is_closed():
            raise DeclarationError(f"this asyncpg connection is closed already. {_CONNECT}")
        return value

    async def check(self, value: Connection) -> None:
        """Run one `SELECT 1`."""
        await value.fetchval("SELECT 1")

    def close(self, value: Connection) -> Awaitable[object]:
        """Say goodbye to the server."""
        return value.close()

    def terminate(self, value: Connection) -> None:
        """Cut it off."""
        connection: Any = value
        if connection._loop == running_loop():  # else `open` refused it: it is another's, or dead
            value.terminate()

    def describe(self, value: Connection) -> str:
        """Return its server."""
        connection: Any = value
        address, given = connection._addr, connection._params
        if isinstance(address, str):  # of a unix socket
            address = address.rpartition("/")[0], address.rpartition(".")[2]
        return redact(f"asyncpg connection, {_named(given.user, address, given.database)}")

    def is_closed(self, value: Connection) -> bool:
        """Return whether it is closed."""
        return value.is_closed()

    def number(self, connection: Any) -> int:
        """Return its server's process."""
        return connection.get_server_pid()  # type: ignore[no-any-return]

    def is_in_transaction(self, connection: Any) -> bool:
        """Return whether a transaction is open on it."""
        return bool(connection.is_in_transaction())

    async def forget_schema(self, value: Connection) -> None:
        """Forget types, and the rows of statements."""
        if not value.is_closed():
            await value.reload_schema_state()

    def transient(self, error: BaseException) -> bool:
        """Return whether the server is starting, stopping or full, or hung up on us."""
        return judge(error) is True


_CONNECT = "Let the factory connect, so that each lifespan gets its own."


def _named(user: object, address: object, database: object) -> str:
    host, port = cast("tuple[object, object]", address)
    return f"postgresql://{user}@{host}:{port}/{database}"


def _through(connect: Any, here: Here) -> Any:
    """Return what connects by way of the gateway of the calling code, where it has one."""

    async def by_gateway(*, loop: Any = None, **given: Any) -> Any:
        # A pool that was redirected gives another one.
        gateway = here() if loop is None or loop is running_loop() else None
        if gateway is None:
            return await connect(loop=loop, **given)
        by = checkout()
        connection = await connect(loop=gateway.loop(), **given)
        gateway.made(connection, connection_driver.number, by)
        return connection

    return by_gateway


def _out(pool: Any) -> list[Any]:
    return [holder._con for holder in pool._holders if not holder.is_idle()]


def _server(pool: Any) -> str:
    """Return where a pool connects to: its DSN, and the arguments that win over it."""
    given = dict(pool._connect_kwargs)
    try:
        url = urlsplit(pool._connect_args[0] or "" if pool._connect_args else "")
    except ValueError:
        return "a malformed DSN"
    if "@" in url.path + url.query + url.fragment:
        return "a malformed DSN"  # an unquoted password goes on there
    login, _, address = url.netloc.rpartition("@")
    user, _, password = login.partition(":")
    hosts = given.get("host") or address
    host = _listed(hosts)
    user, database = given.get("user") or user, given.get("database") or url.path[1:]
    if not (host or user or database):
        return "the server that PGHOST names"
    secret = ":***" if given.get("password") or password else ""
    port = f":{_listed(given['port'])}" if given.get("port") else ""
    return f"postgresql://{user}{secret}{'@' if user or secret else ''}{host}{port}/{database}"


def _listed(given: Any) -> str:
    several = cast("list[object]", given) if isinstance(given, list | tuple) else [given]
    return ",".join(map(str, several))


driver: AsyncpgDriver = AsyncpgDriver()
connection_driver: ConnectionDriver = ConnectionDriver()
door: Door = Door(connect_utils, "_connect", _through)  # asyncpg.connect() looks it up each time
