"""What lifekit knows about kinds of values: one driver for each, looked up by type.

A driver's module is imported when the first value of its type shows up, never before, and the
package it speaks of is never imported by lifekit first.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    import asyncio
    import ssl

    from .resource import Resource  # which has the lifespan's values, which drivers know

T = TypeVar("T")


class Sandbox:
    """What undoes all that one test did to one value: override it, and return it from a driver.

    One block: ``begin``, the test, ``end``. After a ``begin``, even one that failed, ``end``
    is called once; it is not cancelled. What is slow belongs in the first ``begin``, and is kept
    until ``close``. Blocks nest: ``begin`` may come again before ``end``, which undoes the inner one.
    """

    nests: bool = True
    """False where it can't: a block inside another one is refused then."""

    async def begin(self) -> None:
        """Let nothing that is done to the value from now on last."""

    async def end(self) -> None:
        """Undo what was done since `begin`.

        Raises:
            SandboxEscapedError: Something is still in use, or could not be undone.
        """

    def end_at_once(self) -> bool:
        """Do what `end` does, where that takes no waiting; return whether it was done.

        Raises:
            SandboxEscapedError: As `end` does.
        """
        return False

    async def close(self) -> None:
        """Give up what the sandbox itself holds; the value's own closing follows."""

    async def closed(self) -> None:
        """Give up what the value's own closing, as the end of a generator, still ran in."""

    def terminate(self) -> None:
        """Cut off what the sandbox itself holds: an `end` took too long, or the value is cut off."""


class Gateway(Protocol):
    """Test mode's way to PostgreSQL and Redis: what goes by it is undone at the end of each block."""

    def socket(self, host: str, port: int, *, tls: Tls | None = None) -> tuple[str, int]:
        """Return the folder and the port of a unix socket that leads to a server.

        Args:
            host: The server's name or address, or the folder of its own unix socket.
            port: Its port.
            tls: How to encrypt on the way to it: the client itself must not.
        """
        ...

    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the running event loop, whose connections are made by way of the gateway."""
        ...

    def url(self, url: str) -> str:
        """Return the URL that leads to where *url* leads, for whatever takes one: by a local port."""
        ...

    def serves_threads(self) -> None:
        """Prepare for clients that block the thread which they wait in, or that call from others."""

    def lease(self, client: Any, described: str) -> Leased:
        """Return the sandbox of a client of Redis, which is to work in a database of its own.

        Args:
            client: A client or pool of redis.asyncio.
            described: What errors call it.
        """
        ...


class Leased(Sandbox):
    """The sandbox of a client of Redis."""

    async def open(self) -> None:
        """Lease the database, and let what connects from now on select it."""


class Isolation(Sandbox, Gateway):
    """What test mode gives to one lifespan: the way of its clients, and a no to what has none."""

    def refusal(
        self,
        resource: Resource[Any],
        value: object,
        needs: Iterable[object],
        driver: Driver[Any] | None,
    ) -> Sandbox | None:
        """Return what refuses blocks for *value*; None where it reaches nothing, or can be undone."""

    def finish(self) -> None:
        """Close all that there is, with the lifespan."""


class Tls(NamedTuple):
    """How the gateway encrypts what goes to a server."""

    context: ssl.SSLContext
    """Whom it trusts, and what it shows of itself."""
    is_required: bool = True
    """Else it is done without where the server can't."""
    name: str | None = None
    """Whom its certificate has to name, where that is not the host."""


class Lock(Protocol):
    """A lock that one process has at a time, for as long as it is heard of."""

    async def open(self, lease: float) -> None:
        """Prepare for `acquire`, before which it is called each time: connect, where that is needed."""
        ...

    async def acquire(self, lease: float) -> int | None:
        """Try to get it for *lease* seconds; return a number that grows, or None if it is taken."""
        ...

    async def pause(self, seconds: float) -> None:
        """Wait for so long, or until there is a sign that it is lost."""
        ...

    async def renew(self, lease: float) -> bool:
        """Keep it for *lease* seconds more; False is that it is lost, an error that nobody knows."""
        ...

    async def release(self) -> None:
        """Give it up, and all that was opened for it; it may be lost."""
        ...


class Driver(Generic[T]):
    """All that is known of one kind of value. Override what differs, then `register` it.

    Each of ``close``, ``wait_closed`` and ``terminate`` may be sync or return an awaitable.
    """

    async def open(self, value: T) -> T:
        """Open what a factory returned, and return the open value."""
        return value

    def watch(self, value: T) -> None:
        """Prepare for `holders`: called of a value that a generator or context manager opened."""

    async def check(self, value: T) -> None:
        """Raise unless the open value really works: one round trip, no side effect."""

    def close(self, value: T) -> Awaitable[object] | None:
        """Begin to close: take no new work; may wait for what is under way."""

    def wait_closed(self, value: T) -> Awaitable[object] | None:
        """Wait until it is closed."""

    def terminate(self, value: T) -> Awaitable[object] | None:
        """Cut it off at once: what is left when it did not open, or did not close in time."""

    def describe(self, value: T) -> str:
        """Return what it is in a few words, with no password."""
        return type(value).__name__

    def sandbox(self, value: T) -> Sandbox | None:
        """Prepare an open value for test mode, in place; None where nothing needs to be undone."""
        return None

    def redirect(self, value: T, gateway: Gateway) -> Sandbox | None:
        """Let the connections to PostgreSQL that *value* makes from now on go by way of *gateway*.

        Called in test mode, before `open`. Return what is told of blocks, where it wants to be.
        """
        return None

    async def reconnect(self, value: T) -> None:
        """Close the idle connections that *value* made before `redirect`."""

    def holders(self, value: T) -> Sequence[str]:
        """Return who still holds parts of it: code lines, with their tasks where known."""
        return ()

    def lock(self, value: T, key: str) -> Lock | None:
        """Return a lock of that name on the value's server, or None where that has none."""
        return None

    def transient(self, error: BaseException) -> bool:
        """Return whether a failed opening may succeed when tried again."""
        return False

    def salvage(self, error: BaseException) -> None:
        """Cut off what a failed opening built half-way and only its traceback still knows."""


_BUILT_IN = {
    "asyncpg.pool.Pool": "asyncpg",
    "asyncpg.connection.Connection": "asyncpg.connection_driver",
    "aiosqlite.core.Connection": "aiosqlite",
    "aiopg.pool.Pool": "aiopg",
    "aiopg.connection.Connection": "aiopg.connection_driver",
    "psycopg.Connection": "psycopg_connection.sync_driver",
    "psycopg.AsyncConnection": "psycopg_connection.async_driver",
    "psycopg2.extensions.connection": "psycopg2.connection_driver",
    "psycopg2.pool.AbstractConnectionPool": "psycopg2.pool_driver",
    "lifekit.embedded.Server": "embedded.driver",
    "psycopg_pool.pool_async.AsyncConnectionPool": "psycopg",
    "psycopg_pool.pool.ConnectionPool": "psycopg.sync_driver",
    "redis.asyncio.client.Redis": "redis",
    "redis.asyncio.cluster.RedisCluster": "redis",
    "redis.asyncio.connection.ConnectionPool": "redis",
    "httpx.AsyncClient": "httpx",
    "httpx2.AsyncClient": "httpx",
    "sqlalchemy.engine.base.Engine": "sqlalchemy.sync_driver",
    "sqlalchemy.ext.asyncio.engine.AsyncEngine": "sqlalchemy",
}
_PACKAGES = {name.partition(".")[0]: module for name, module in _BUILT_IN.items() if "." not in module}
_registered: dict[type, Driver[Any]] = {}


def register(kind: type[T], driver: Driver[T]) -> None:
    """Let *driver* handle values of the type *kind* and of its subclasses.

    It wins over a built-in driver for the same type; for a subclass the nearest base decides.
    """
    _registered[kind] = driver


def find(value: T) -> Driver[T] | None:
    """Return the driver for *value*, or None where no driver knows its type."""
    for kind in type(value).__mro__:
        if "_made_by_lifekit" in vars(kind):  # of the next one, whose name it has
            continue
        if kind in _registered:
            return _registered[kind]
        module = _BUILT_IN.get(f"{kind.__module__}.{kind.__qualname__}")
        if module is not None:
            built_in: Driver[T] = load(module)
            return built_in
    return None


def judge(error: BaseException) -> bool | None:
    """Return whether *error* may pass by itself, or None where nothing is known of its package.

    The package of its own class decides, which may be no pool's: single connections raise it too.
    """
    known: bool | None = load("_failures.known")(error)
    return known


def registered() -> Iterator[Driver[Any]]:
    """Yield the registered drivers, each once."""
    yield from dict.fromkeys(_registered.values())


def loaded() -> Iterator[Driver[Any]]:
    """Yield the drivers of what the application has imported, and the registered ones."""
    yield from registered()
    for package, module in _PACKAGES.items():
        if sys.modules.get(package) is not None:
            with suppress(ImportError):  # a stand-in for the package, which no driver fits
                yield load(module)


def load(module: str) -> Any:
    """Return an attribute of a driver's module, by its name: ``driver`` unless another is named."""
    name, _, attribute = module.partition(".")
    return getattr(importlib.import_module(f"lifekit.drivers.{name}"), attribute or "driver")
