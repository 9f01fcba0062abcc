"""What lifekit knows about single connections of psycopg 3, from `_connection_base.py` of 3.3."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar, cast

import anyio
import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from lifekit._core.block import refuse_stragglers
from lifekit._core.drivers import judge
from lifekit._core.errors import DeclarationError
from lifekit._util.redact import redact

from ._checkouts import Checkouts, Connected, called_like
from ._doors import Door, Here, checkout, gateways

if TYPE_CHECKING:
    SyncConnection = psycopg.Connection[Any]
    AsyncConnection = psycopg.AsyncConnection[Any]
else:
    SyncConnection = psycopg.Connection
    AsyncConnection = psycopg.AsyncConnection

T = TypeVar("T")

checkouts: Checkouts = Checkouts("psycopg")
_MEND = "Let the factory connect, so that each lifespan gets its own."


@functools.cache
def _in_tests(kind: Any, *, is_nobodys: bool) -> Any:
    """Return the class that a connection of *kind* gets that is made by way of a gateway.

    If it *is_nobodys*, no pool refuses a use that is too late.
    """
    # Of that one base: beside another the layout would differ.
    base = psycopg.BaseConnection if TYPE_CHECKING else kind

    class ByGateway(base):  # type: ignore[misc,valid-type]
        __slots__ = ()

        def cancel(self) -> None:
            if not self.closed:
                gateways[self].cancel(self.info.backend_pid)

    if not is_nobodys:
        return called_like(kind, ByGateway)

    class InTests(ByGateway):
        __slots__ = ()

        def wait(self, *args: Any, **options: Any) -> Any:
            # All that it sends it waits for; the async one's returns a coroutine.
            refuse_stragglers("a connection of psycopg")
            return cast(Any, super()).wait(*args, **options)

    return called_like(kind, InTests)


class _Connections(Connected[T]):
    """What connections of both kinds have in common."""

    checkouts = checkouts

    async def open(self, value: T) -> T:
        """Take a connection that is open."""
        if self.is_closed(value):
            raise DeclarationError(f"this psycopg connection is closed already. {_MEND}")
        return value

    def terminate(self, value: T) -> None:
        """Cut it off."""
        cast(Any, value).pgconn.finish()

    def describe(self, value: T) -> str:
        """Return its server."""
        info = cast(Any, value).info
        if self.is_closed(value):
            return "psycopg connection, closed"
        server = f"{info.host}:{info.port}" if info.host[:1] != "/" else info.host
        return redact(f"psycopg connection, postgresql://{info.user}@{server}/{info.dbname}")

    def is_closed(self, value: T) -> bool:
        """Return whether it is closed."""
        return bool(cast(Any, value).closed)

    def number(self, connection: Any) -> int | None:
        """Return its server's process."""
        return connection.info.backend_pid if not connection.closed else None

    def is_in_transaction(self, connection: Any) -> bool:
        """Return whether a transaction is open on it."""
        return connection.info.transaction_status.name in ("ACTIVE", "INTRANS", "INERROR")

    def transient(self, error: BaseException) -> bool:
        """Return whether the server is starting, stopping or full, or hung up on us."""
        return judge(error) is True


def _rests(connection: Any) -> bool:
    """Return whether nothing is under way but a transaction that psycopg has begun by itself."""
    amid = connection.info.transaction_status.name in ("INTRANS", "INERROR")
    return amid and not connection.autocommit and not connection.closed


class SyncConnectionDriver(_Connections[SyncConnection]):
    """Connections that block, as `psycopg.connect()` returns them."""

    async def check(self, value: SyncConnection) -> None:
        """Run one `SELECT 1`, in a thread, and leave no transaction open."""
        await anyio.to_thread.run_sync(_ask, value)

    async def close(self, value: SyncConnection) -> None:
        """Say goodbye to the server."""
        await anyio.to_thread.run_sync(value.close)

    async def rest(self, value: SyncConnection) -> None:
        """End the transaction that psycopg has begun by itself."""
        if _rests(value):
            with suppress(psycopg.Error):  # where a `with connection.transaction()` is open
                await anyio.to_thread.run_sync(value.rollback)


def _ask(connection: SyncConnection) -> None:
    idle = connection.info.transaction_status.name == "IDLE"
    connection.execute("SELECT 1")
    if idle:
        connection.rollback()


class AsyncConnectionDriver(_Connections[AsyncConnection]):
    """Connections as `await psycopg.AsyncConnection.connect()` returns them."""

    async def check(self, value: AsyncConnection) -> None:
        """Run one `SELECT 1`, and leave no transaction open."""
        idle = value.info.transaction_status.name == "IDLE"
        await value.execute("SELECT 1")
        if idle:
            await value.rollback()

    async def close(self, value: AsyncConnection) -> None:
        """Say goodbye to the server."""
        await value.close()

    async def rest(self, value: AsyncConnection) -> None:
        """End the transaction that psycopg has begun by itself."""
        if _rests(value):
            with suppress(psycopg.Error):  # where an `async with connection.transaction()` is open
                await value.rollback()


def _through(connect: Any, here: Here) -> Any:
    """Return what connects by way of the gateway of the calling code, where it has one."""

    connected: Callable[[Any, str], Generator[Any, Any, Any]] = connect.__func__

    def by_gateway(kind: Any, conninfo: str = "") -> Generator[Any, Any, Any]:
        from ._libpq import redirected

        given: dict[str, Any] = conninfo_to_dict(conninfo)
        gateway = here(given.get("host"), given.get("port"))
        if gateway is None:
            return (yield from connected(kind, conninfo))
        by = checkout()
        pointed = make_conninfo("", **redirected(given, gateway))
        connection = yield from connected(kind, pointed)
        is_nobodys = gateway.made(connection, async_driver.number, by)
        connection.__class__ = _in_tests(cast("Any", type(connection)), is_nobodys=is_nobodys)
        gateways[connection] = gateway
        return connection

    return classmethod(by_gateway)


sync_driver: SyncConnectionDriver = SyncConnectionDriver()
async_driver: AsyncConnectionDriver = AsyncConnectionDriver()
door: Door = Door(psycopg.BaseConnection, "_connect_gen", _through)  # of which both kinds are made
