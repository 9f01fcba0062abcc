"""What lifekit knows about psycopg's pools, from `pool_async.py` of psycopg_pool 3.2 and 3.3."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Sequence
from contextlib import suppress
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import AsyncConnectionPool, ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests
from psycopg_pool.pool_async import StopWorker

from lifekit._core.block import refuse_stragglers
from lifekit._core.drivers import Gateway, Sandbox, judge
from lifekit._core.errors import DeclarationError, SandboxEscapedError
from lifekit._util.loops import running_loop
from lifekit._util.redact import redact

from ._checkouts import Checkout, Checkouts, Pooled, called_like, pool_sandbox
from ._doors import by_way_of
from ._lock import PostgresLock, PsycopgSession

if TYPE_CHECKING:
    Pool = AsyncConnectionPool[Any]
    SyncPool = ConnectionPool[Any]
else:
    Pool = AsyncConnectionPool
    SyncPool = ConnectionPool

T = TypeVar("T")

checkouts: Checkouts = Checkouts("psycopg_pool")
_MEND = (
    "Return AsyncConnectionPool(..., open=False) from the factory, so that each lifespan gets its own."
)
_MEND_SYNC = (
    "Return ConnectionPool(..., open=False) from the factory, so that each lifespan gets its own."
)
_FOR_EVER = 10.0**9
"""Seconds: the lifespan's own deadline is the one that ends an opening."""


@functools.cache
def _noting(kind: Any) -> Any:
    """Return the class that an open pool of *kind* gets, so that it notes who has its connections."""

    # Of that one base: beside another the layout would differ from that of some of the pools.
    base = Pool if TYPE_CHECKING else kind

    class Noting(base):  # type: ignore[misc,valid-type]
        _out: set[Any]
        _returned: asyncio.Event
        _failed: asyncio.Future[Any] | None

        __slots__ = ()

        async def getconn(self, timeout: float | None = None) -> Any:  # noqa: ASYNC109
            checkout = checkouts.here()
            refuse_stragglers("a pool of psycopg")
            try:
                connection = await super().getconn(timeout)
            except (PoolTimeout, TooManyRequests, asyncio.CancelledError) as error:
                _note_holders(self, error)  # cancelled, it becomes a TimeoutError
                raise
            _note_taken(self, connection, checkout)
            try:
                refuse_stragglers("a pool of psycopg")  # the sandbox may have ended meanwhile
            except SandboxEscapedError:
                await self.putconn(connection)
                raise
            return connection

        async def putconn(self, conn: Any) -> None:
            try:
                await super().putconn(conn)
            finally:
                self._out.discard(conn)
                self._returned.set()

        async def _connect(self, timeout: float | None = None) -> Any:  # noqa: ASYNC109
            try:
                return await super()._connect(timeout)
            except Exception as error:
                # The pool logs it and tries again, for as long as its opening may last.
                if self._failed is not None and not self._failed.done():
                    self._failed.set_result(error)
                raise

    return called_like(kind, Noting)


@functools.cache
def _noting_sync(kind: Any) -> Any:
    """Return the same for a pool that blocks."""
    base = SyncPool if TYPE_CHECKING else kind

    class Noting(base):  # type: ignore[misc,valid-type]
        _out: set[Any]

        __slots__ = ()

        def getconn(self, timeout: float | None = None) -> Any:
            checkout = checkouts.here()
            refuse_stragglers("a pool of psycopg")
            try:
                connection = super().getconn(timeout)
            except (PoolTimeout, TooManyRequests) as error:
                _note_holders(self, error)
                raise
            _note_taken(self, connection, checkout)
            try:
                refuse_stragglers("a pool of psycopg")  # the sandbox may have ended meanwhile
            except SandboxEscapedError:
                self.putconn(connection)
                raise
            return connection

        def putconn(self, conn: Any) -> None:
            try:
                super().putconn(conn)
            finally:
                self._out.discard(conn)

    return called_like(kind, Noting)


def _note_holders(pool: Any, error: BaseException) -> None:
    if 0 < pool.max_size <= len(out := _out(pool)):
        checkouts.note_holders(error, out)


def _note_taken(pool: Any, connection: Any, checkout: Checkout) -> None:
    checkouts.note(connection, checkout)
    pool._out.add(connection)


class _Pools(Pooled[T]):
    """What pools of both kinds have in common."""

    checkouts = checkouts
    use = "with pool.connection() as connection"

    def describe(self, value: T) -> str:
        """Return its sizes and its server."""
        pool: Any = value
        return redact(f"psycopg pool of {pool.min_size} to {pool.max_size}, {_server(pool)}")

    def transient(self, error: BaseException) -> bool:
        """Return whether the server is starting, stopping or full, or hung up on us."""
        return judge(error) is True

    def redirect(self, value: T, gateway: Gateway) -> Sandbox:
        """Let the pool connect by way of the gateway."""
        redirect(value, gateway)
        return pool_sandbox(gateway, self, value)

    def out(self, value: T) -> Sequence[Any]:
        """Return the connections that are out."""
        return _out(value)

    def number(self, connection: Any) -> int:
        """Return its server's process."""
        return connection.info.backend_pid  # type: ignore[no-any-return]

    def is_in_transaction(self, connection: Any) -> bool:
        """Return whether a transaction is open on it."""
        return connection.info.transaction_status.name in ("ACTIVE", "INTRANS", "INERROR")


class SyncPsycopgDriver(_Pools[SyncPool]):
    """Pools of psycopg 3 that block, as `ConnectionPool(..., open=False)` makes them."""

    async def open(self, value: SyncPool) -> SyncPool:
        """Open a pool, in a thread, and watch it."""
        pool: Any = value
        if value.closed and pool._opened:
            raise DeclarationError(f"this psycopg pool is closed already. {_MEND_SYNC}")
        self.watch(value)
        await anyio.to_thread.run_sync(
            functools.partial(value.open, wait=True, timeout=_FOR_EVER), abandon_on_cancel=True
        )
        return value

    def watch(self, value: SyncPool) -> None:
        """Let the pool note who acquires its connections."""
        pool: Any = value
        if not hasattr(pool, "_out"):
            pool._out = set()
            with suppress(Exception):  # a subclass whose layout or metaclass forbids it goes unnoted
                pool.__class__ = _noting_sync(pool.__class__)

    async def check(self, value: SyncPool) -> None:
        """Run one `SELECT 1`, in a thread."""

        def ask() -> None:
            with value.connection() as connection:
                connection.execute("SELECT 1")

        await anyio.to_thread.run_sync(ask)

    async def close(self, value: SyncPool) -> None:
        """Hand out no more connections, and close the idle ones."""
        await anyio.to_thread.run_sync(value.close)

    async def wait_closed(self, value: SyncPool) -> None:
        """Wait for every connection that is out, of which no event tells."""
        while _out(value):  # noqa: ASYNC110
            await anyio.sleep(0.01)

    def terminate(self, value: SyncPool) -> None:
        """Hand out no more connections, and wait for nothing."""
        value.close(timeout=0)

    async def reconnect(self, value: SyncPool) -> None:
        """Close the idle connections, and let those that are out be closed when they come back."""
        if not value.closed:
            await anyio.to_thread.run_sync(value.drain)

    async def take_back(self, value: SyncPool, connection: Any) -> None:
        """Let the pool know that it is closed. Who is in the midst of a statement gives it back."""
        if connection.info.transaction_status.name != "ACTIVE":
            connection.close()
            value.putconn(connection)


class PsycopgDriver(_Pools[Pool]):
    """Pools of psycopg 3, as `AsyncConnectionPool(..., open=False)` makes them."""

    use = "async with pool.connection() as connection"

    async def open(self, value: Pool) -> Pool:
        """Open a pool that is this lifespan's own, and watch it."""
        pool: Any = value
        if _loop(pool) not in (None, running_loop()):
            raise DeclarationError(f"this psycopg pool belongs to another event loop. {_MEND}")
        if value.closed and pool._opened:
            raise DeclarationError(f"this psycopg pool is closed already. {_MEND}")
        self.watch(value)
        pool._failed = failed = asyncio.get_running_loop().create_future()
        await value.__aenter__()  # open() would warn where the constructor was to open it
        full = asyncio.create_task(value.wait(timeout=_FOR_EVER))
        try:
            await asyncio.wait({full, failed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            pool._failed = None
            full.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(full, return_exceptions=True)
        if failed.done():
            await self.terminate(value)
            raise failed.result()
        return value

    def watch(self, value: Pool) -> None:
        """Let the pool note who acquires its connections."""
        pool: Any = value
        if not hasattr(pool, "_out"):
            pool._out, pool._returned, pool._failed = set(), asyncio.Event(), None
            pool._watched_in = running_loop()
            with suppress(Exception):  # a subclass whose layout or metaclass forbids it goes unnoted
                pool.__class__ = _noting(pool.__class__)

    async def check(self, value: Pool) -> None:
        """Run one `SELECT 1`."""
        async with value.connection() as connection:
            await connection.execute("SELECT 1")

    async def close(self, value: Pool) -> None:
        """Hand out no more connections, and close the idle ones."""
        tasks = _tasks(value)
        try:
            await value.close()
        finally:
            _cancel(tasks)  # those that did not stop: the pool gives up on them

    async def wait_closed(self, value: Pool) -> None:
        """Wait for every connection that is out."""
        pool: Any = value
        while _out(pool):
            pool._returned.clear()
            await pool._returned.wait()

    async def terminate(self, value: Pool) -> None:
        """Cut every connection off, idle or out, and end the tasks that the pool runs."""
        pool: Any = value
        if getattr(pool, "_watched_in", None) is not running_loop():
            return  # `open` refused it: it is another's, or dead
        tasks = _cut(pool)
        while pool._waiting:
            await pool._waiting.popleft().fail(PoolClosed(f"the pool {pool.name!r} is closed"))
        await asyncio.gather(*tasks, return_exceptions=True)

    async def reconnect(self, value: Pool) -> None:
        """Close the idle connections, and let those that are out be closed when they come back."""
        if not value.closed:
            await value.drain()

    async def take_back(self, value: Pool, connection: Any) -> None:
        """Let the pool know that it is closed. Who is in the midst of a statement gives it back."""
        if connection.info.transaction_status.name != "ACTIVE":
            connection.pgconn.finish()
            await value.putconn(connection)

    def lock(self, value: Pool, key: str) -> PostgresLock:
        """Return an advisory lock, on a connection that is made as the pool makes its own."""
        pool: Any = value

        async def connect() -> PsycopgSession:
            given: list[Any] = [pool.conninfo, pool.kwargs]
            for at, each in enumerate(given):
                made = each() if callable(each) else each
                given[at] = await made if inspect.isawaitable(made) else made
            options: dict[str, Any] = {**(given[1] or {}), "autocommit": True}
            return PsycopgSession(await pool.connection_class.connect(given[0] or "", **options))

        return PostgresLock(connect, key)

    def salvage(self, error: BaseException) -> None:
        """Cut off a pool whose opening failed inside a factory: its tasks would go on."""
        waits = Pool.wait.__code__
        for frame, _ in walk_tb(error.__traceback__):
            if frame.f_code is waits:
                _cut(frame.f_locals["self"])


def redirect(pool: Any, gateway: Gateway) -> None:
    """Let a pool connect by way of the gateway, in whichever thread or task it does."""

    kind: Any = type  # which it changes, to note who acquires
    given: Any = pool

    def at_once(timeout: float | None = None) -> Any:
        with by_way_of(gateway):
            return kind(pool)._connect(pool, timeout)

    async def by_gateway(timeout: float | None = None) -> Any:  # noqa: ASYNC109
        with by_way_of(gateway):
            return await kind(pool)._connect(pool, timeout)

    given._connect = at_once if isinstance(pool, ConnectionPool) else by_gateway


def _loop(pool: Any) -> object | None:
    """Return the loop that an open pool belongs to."""
    tasks = _tasks(pool)
    return tasks[0].get_loop() if tasks else None


def _tasks(pool: Any) -> list[asyncio.Task[None]]:
    return [task for task in (pool._sched_runner, *pool._workers) if task is not None]


def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
        # Python 3.11's wait_for() swallows a cancellation that comes in the turn in which what it waits
        # for is done, and the pool's scheduler then waits again.
        task.get_loop().call_soon(task.cancel)


def _out(pool: Any) -> list[Any]:
    return [each for each in getattr(pool, "_out", ()) if not each.closed]


def _cut(pool: Any) -> list[asyncio.Task[None]]:
    """Close all that the pool has; return its tasks, which end soon."""
    pool._closed = True
    tasks = _tasks(pool)
    pool._sched_runner, pool._workers = None, []
    for _ in tasks:
        # A worker that is cancelled in the midst of something takes the next thing from the queue.
        pool.run_task(StopWorker(pool))
    _cancel(tasks)
    for connection in [*pool._pool, *_out(pool)]:
        connection.pgconn.finish()
    pool._pool.clear()
    if hasattr(pool, "_out"):
        pool._out.clear()
        pool._returned.set()
    return tasks


def _server(pool: Any) -> str:
    """Return where a pool connects to: its conninfo, and the arguments that win over it."""
    conninfo, given = pool.conninfo, pool.kwargs
    if callable(conninfo) or callable(given):
        return "the server that a function names"
    arguments: dict[str, Any] = given or {}
    names = ("user", "password", "host", "port", "dbname")
    try:
        more = {key: arguments[key] for key in names if key in arguments}
        found = conninfo_to_dict(conninfo, **more)
    except psycopg.ProgrammingError:
        return "a malformed conninfo"
    user, host, port, database = (found.get(name) or "" for name in ("user", "host", "port", "dbname"))
    if not (host or user or database):
        return "the server that PGHOST names"
    login = f"{user}{':***' if found.get('password') else ''}@" if user else ""
    return f"postgresql://{login}{host}{':' if port else ''}{port}/{database}"


driver: PsycopgDriver = PsycopgDriver()
sync_driver: SyncPsycopgDriver = SyncPsycopgDriver()
