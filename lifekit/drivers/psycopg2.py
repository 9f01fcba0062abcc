"""What lifekit knows about psycopg2's pools and connections, from `pool.py` of 2.9."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio
import psycopg2
from psycopg2.extensions import (
    STATUS_PREPARED,
    TRANSACTION_STATUS_ACTIVE,
    TRANSACTION_STATUS_IDLE,
    TRANSACTION_STATUS_INERROR,
    TRANSACTION_STATUS_INTRANS,
    connection,
    make_dsn,
    parse_dsn,
)
from psycopg2.pool import AbstractConnectionPool

from lifekit._core.block import refuse_stragglers
from lifekit._core.drivers import Gateway, Sandbox, judge
from lifekit._core.errors import DeclarationError, SandboxEscapedError
from lifekit._util.redact import redact

from ._checkouts import Checkouts, Connected, Pooled, mix_in, mixed, pool_sandbox
from ._doors import Door, Here, by_way_of, checkout, chosen, gateways

checkouts: Checkouts = Checkouts("psycopg2")
_MEND = "Let the factory connect, so that each lifespan gets its own."


def _number(made: Any) -> int | None:
    """Return the process of the server's, None of what is closed or not connected yet."""
    return (made.info.backend_pid or None) if not made.closed else None


def _ask(made: Any) -> None:
    begins = not made.autocommit and made.info.transaction_status == TRANSACTION_STATUS_IDLE
    with made.cursor() as cursor:
        cursor.execute("SELECT 1")
    if begins:
        made.rollback()


def _server(given: dict[str, Any]) -> str:
    user, host, port = (given.get(name) or "" for name in ("user", "host", "port"))
    database = given.get("dbname") or given.get("database") or ""
    if not (host or user or database):
        return "the server that PGHOST names"
    login = f"{user}{':***' if given.get('password') else ''}@" if user else ""
    return f"postgresql://{login}{host}{':' if port else ''}{port}/{database}"


class ConnectionDriver(Connected[connection]):
    """Single connections, as `psycopg2.connect()` returns them."""

    checkouts = checkouts

    async def open(self, value: connection) -> connection:
        """Take a connection that is open."""
        if value.closed:
            raise DeclarationError(f"this psycopg2 connection is closed already. {_MEND}")
        return value

    async def check(self, value: connection) -> None:
        """Run one `SELECT 1`, in a thread, and leave no transaction open."""
        if not value.async_:  # which its owner polls
            await anyio.to_thread.run_sync(_ask, value)

    async def close(self, value: connection) -> None:
        """Say goodbye to the server."""
        await anyio.to_thread.run_sync(value.close)

    def terminate(self, value: connection) -> None:
        """Close it: psycopg2 has no more than that."""
        value.close()

    def describe(self, value: connection) -> str:
        """Return its server."""
        return redact(f"psycopg2 connection, {_server(value.get_dsn_parameters())}")

    def is_closed(self, value: connection) -> bool:
        """Return whether it is closed."""
        return bool(value.closed)

    def number(self, connection: Any) -> int | None:
        """Return its server's process."""
        return _number(connection)

    def is_in_transaction(self, connection: Any) -> bool:
        """Return whether a transaction is open on it."""
        status = connection.info.transaction_status
        return status in (
            TRANSACTION_STATUS_ACTIVE,
            TRANSACTION_STATUS_INTRANS,
            TRANSACTION_STATUS_INERROR,
        )

    async def rest(self, value: connection) -> None:
        """End the transaction that psycopg2 has begun by itself."""
        status = value.info.transaction_status
        amid = status in (TRANSACTION_STATUS_INTRANS, TRANSACTION_STATUS_INERROR)
        if amid and not (value.autocommit or value.async_):
            await anyio.to_thread.run_sync(value.rollback)

    def transient(self, error: BaseException) -> bool:
        """Return whether the server is starting, stopping or full, or hung up on us."""
        return judge(error) is True


class _Noting:
    """What the class of an open pool is mixed with, so that the pool notes who takes connections."""

    def getconn(self, key: Any = None) -> Any:
        refuse_stragglers("a pool of psycopg2")
        by = checkouts.here()
        pool: Any = super()
        with by_way_of(self.__dict__.get("gateway") or chosen.get()):
            taken = pool.getconn(key)
        try:
            refuse_stragglers("a pool of psycopg2")  # the sandbox may have ended meanwhile
        except SandboxEscapedError:
            pool.putconn(taken, key)
            raise
        checkouts.note(taken, by)
        return taken


class PoolDriver(Pooled[AbstractConnectionPool]):
    """Pools of psycopg2's own: `ThreadedConnectionPool`, `SimpleConnectionPool`."""

    checkouts = checkouts
    use = "pool.putconn(connection) in `finally`"

    async def open(self, value: AbstractConnectionPool) -> AbstractConnectionPool:
        """Take a pool that is open, and watch it."""
        if value.closed:
            raise DeclarationError(f"this psycopg2 pool is closed already. {_MEND}")
        self.watch(value)
        return value

    def watch(self, value: AbstractConnectionPool) -> None:
        """Let the pool note who takes its connections."""
        mix_in(_Noting, value)

    async def check(self, value: AbstractConnectionPool) -> None:
        """Run one `SELECT 1`, in a thread."""

        def ask() -> None:
            taken = value.getconn()
            try:
                _ask(taken)
            finally:
                value.putconn(taken)

        await anyio.to_thread.run_sync(ask)

    async def close(self, value: AbstractConnectionPool) -> None:
        """Wait for every connection that is out, of which no event tells, then close them all."""
        while self.out(value):  # noqa: ASYNC110
            await anyio.sleep(0.01)
        if not value.closed:
            await anyio.to_thread.run_sync(value.closeall)

    def terminate(self, value: AbstractConnectionPool) -> None:
        """Close every connection, those that are out as well."""
        if not value.closed:
            value.closeall()

    def describe(self, value: AbstractConnectionPool) -> str:
        """Return its sizes and its server."""
        pool: Any = value
        try:
            dsn = pool._kwargs.get("dsn", "") or (pool._args[0] if pool._args else "") or ""
            server = _server(parse_dsn(dsn) | pool._kwargs)
        except psycopg2.ProgrammingError:
            server = "a malformed DSN"
        return redact(f"psycopg2 pool of {pool.minconn} to {pool.maxconn}, {server}")

    def redirect(self, value: AbstractConnectionPool, gateway: Gateway) -> Sandbox | None:
        """Let the pool connect by way of the gateway, in whichever thread it does."""
        self.watch(value)
        value.__dict__["gateway"] = gateway
        return pool_sandbox(gateway, self, value)

    def out(self, value: AbstractConnectionPool) -> Sequence[Any]:
        """Return the connections that are out."""
        pool: Any = value
        return [each for each in list(pool._used.values()) if not each.closed]

    def number(self, connection: Any) -> int | None:
        """Return its server's process."""
        return _number(connection)

    def is_in_transaction(self, connection: Any) -> bool:
        """Return whether a transaction is open on it."""
        return connection_driver.is_in_transaction(connection)

    async def take_back(self, value: AbstractConnectionPool, connection: Any) -> None:
        """Let the pool know that it is closed. Who is in the midst of a statement gives it back."""
        if connection.info.transaction_status != TRANSACTION_STATUS_ACTIVE:
            value.putconn(connection, close=True)

    def transient(self, error: BaseException) -> bool:
        """Return whether the server is starting, stopping or full, or hung up on us."""
        return judge(error) is True


class _Cancelling:
    """What the class of a connection is mixed with that was made by way of a gateway."""

    __slots__ = ()

    def cancel(self) -> None:
        made: Any = self
        if made.closed or made.status == STATUS_PREPARED:
            made = super()
            made.cancel()  # which says what is wrong
        else:
            gateways[made].cancel(_number(made))


def _through(connect: Any, here: Here) -> Any:
    """Return what connects by way of the gateway of the calling code, where it has one."""

    def by_gateway(dsn: str, connection_factory: Any = None, *args: Any, **options: Any) -> Any:
        from ._libpq import redirected

        given = parse_dsn(dsn)
        gateway = here(given.get("host"), given.get("port"))
        if gateway is None:
            return connect(dsn, connection_factory, *args, **options)
        by = checkout()
        factory = connection_factory or mixed(_Cancelling, connection)
        made = connect(make_dsn(**redirected(given, gateway)), factory, *args, **options)
        mix_in(_Cancelling, made)
        gateways[made] = gateway
        gateway.made(made, _number, by)
        return made

    return by_gateway


connection_driver: ConnectionDriver = ConnectionDriver()
pool_driver: PoolDriver = PoolDriver()
door: Door = Door(psycopg2, "_connect", _through)  # psycopg2.connect() looks it up each time
