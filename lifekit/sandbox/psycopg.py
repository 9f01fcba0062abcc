"""The sandbox of psycopg's pools, learned from psycopg 3.3 and psycopg_pool 3.3.

Inside a block the pool is the same object, with other connections: objects of its own connection class
that are lanes of the one real connection. So the pool's own code limits, queues, times out and resets
them, and psycopg's own code makes transactions, cursors and prepared statements of them.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from psycopg import errors
from psycopg.pq import TransactionStatus
from psycopg_pool import AsyncNullConnectionPool, PoolClosed

from lifekit._errors import SandboxEscapedError
from lifekit._sandbox import refuse_stragglers
from lifekit._stack import caller_frame
from lifekit.drivers import Sandbox
from lifekit.drivers.psycopg import Pool, called_like

from ._holders import escaped_strays, lets_go
from ._psycopg_connection import LaneConnection, RealConnection
from ._shared import Shared
from ._sockets import is_cut

_USE = "async with pool.connection() as connection"
_STATE = (
    *("_pool", "_waiting", "_nconns", "_nconns_min", "_growing", "_closed"),
    "connection_class",
)
"""What a pool works with: inside of a block it has its own."""


class PoolSandbox(Sandbox):
    """The sandbox of one pool."""

    def __init__(self, pool: Any) -> None:
        self.active: bool = False
        self.shared: Shared | None = None
        self._pool = pool
        # By the sandbox, for a pool believes a lane to be in the transaction of the real connection.
        self._configure, pool._configure = pool._configure, None
        self._real: Any = None
        self._inside: dict[str, Any] | None = None
        self.outside: dict[str, Any] = {}
        self._guarded: list[Any] = []

    async def begin(self) -> None:
        """Put connections in the pool that are lanes of one real connection."""
        pool = self._pool
        if pool.closed:
            return
        if self._real is not None and not self._real.closed and is_cut(self._real.pgconn.socket):
            await self._real.close()
        if self._real is None or self._real.closed:
            self._inside = None
            self._real = await pool._connect()
            self._real._pool = None
            self.shared = Shared(RealConnection(self._real))
        if self._inside is None:
            self._inside = self._made_inside()
        assert self.shared is not None
        self.shared.begin()
        self.outside = self._put_in(self._inside) | {"_growing": False}
        for connection in pool._out:
            self._guarded.append(connection)
            connection.wait = partial(_refuse_outside, connection)
        self.active = True
        await self._serve(self.outside["_waiting"])  # workers, who get lanes as well

    async def end(self) -> None:
        """Take them out, and undo what they did."""
        if not self.active:
            return
        assert self.shared is not None
        await lets_go(lambda: not self._held())
        strays = self._held()
        told = escaped_strays([each.lane for each in strays], _USE) if strays else None
        for connection in strays:
            connection.stray = True
            self._pool._out.discard(connection)
            await connection.give_up()
        self.active = False
        self._inside = self._put_in(self.outside)
        idle = self._inside["_pool"]
        self._inside |= {"_growing": False, "_closed": False, "_nconns": len(idle)}
        for connection in self._guarded:
            del connection.wait
        self._guarded.clear()
        await self._serve(self._inside["_waiting"])
        try:
            await self.shared.end()
        finally:
            if self.shared.dirty:  # what was prepared, or is known of types, may be of no use
                self._inside = None
                await self._real.close()
        if told is not None:
            raise told

    async def close(self) -> None:
        """Close the real connection."""
        with suppress(SandboxEscapedError):
            await self.end()
        if self._real is not None:
            await self._real.close()

    def terminate(self) -> None:
        """Cut the real connection off."""
        if self.active:
            self.active = False
            self._put_in(self.outside)
        if self._real is not None:
            self._real.pgconn.finish()

    def has(self, connection: Any) -> bool:
        """Return whether it is inside of the block as long as that runs, and outside otherwise."""
        if isinstance(connection, LaneConnection):
            return self.active and connection.real is self._real
        return not self.active

    async def configure(self, connection: Any) -> None:
        """Do with a new connection what the pool's `configure` does."""
        if self._configure is not None:
            await self._configure(connection)
            _check_left_idle(connection, f"configure function {self._configure}")

    async def _serve(self, waiting: deque[Any]) -> None:
        """Give connections of this side's to who has waited for one of the other's."""
        pool = self._pool
        pool._waiting.extend(waiting)
        waiting.clear()
        while pool._waiting and pool._pool:
            await pool._add_to_pool(pool._pool.popleft())
        if pool._waiting:
            pool._maybe_grow_pool()

    def _held(self) -> list[LaneConnection]:
        return [
            each for each in self._pool._out if isinstance(each, LaneConnection) and not each.closed
        ]

    def _made_inside(self) -> dict[str, Any]:
        kind = self._pool.connection_class
        attributes = {
            "__doc__": kind.__doc__,
            "__module__": kind.__module__,
            "real": self._real,
            "shared": self.shared,
            "numbers": itertools.count(),
            "is_in_use": staticmethod(lambda: self.active),
        }
        lanes = type(kind.__name__, (LaneConnection, kind), attributes)
        values = (deque[Any](), deque[Any](), 0, 0, False, False, lanes)
        return dict(zip(_STATE, values, strict=True))

    def _put_in(self, state: dict[str, Any]) -> dict[str, Any]:
        before = {name: getattr(self._pool, name) for name in _STATE}
        for name, value in state.items():
            setattr(self._pool, name, value)
        return before


def _check_left_idle(connection: Any, what: str) -> None:
    status = TransactionStatus(connection.info.transaction_status)
    if status != TransactionStatus.IDLE:
        raise errors.ProgrammingError(f"connection left in status {status.name} by {what}: discarded")


async def _refuse_outside(connection: Any, gen: Any, *args: Any, **options: Any) -> Any:
    """Let a connection that was acquired before the block do nothing but undo, and hear."""
    idle = connection.pgconn.transaction_status == TransactionStatus.IDLE
    if gen.__name__ in ("_rollback_gen", "notifies") or (idle and gen.__name__ == "_commit_gen"):
        return await connection.__class__.wait(connection, gen, *args, **options)
    gen.close()
    raise SandboxEscapedError(
        "this connection was acquired before the sandbox began, and what it does would last. "
        "Acquire one when it is needed, for as long as it is: async with pool.connection() as …."
    )


@functools.cache
def _sandboxed(kind: Any) -> Any:
    """Return the class that a pool of *kind* gets, so that it asks its sandbox for connections."""

    base = Pool if TYPE_CHECKING else kind

    class Sandboxed(base):  # type: ignore[misc,valid-type]
        _sandbox: PoolSandbox
        _closed: bool
        _nconns: int

        async def getconn(self, timeout: float | None = None) -> Any:  # noqa: ASYNC109
            refuse_stragglers("a pool of psycopg")
            frame = caller_frame("psycopg_pool", "asyncio")
            while True:
                connection = await super().getconn(timeout)
                if self._sandbox.has(connection):
                    break
                await self.putconn(connection)  # the block began or ended while it was on its way
            if isinstance(connection, LaneConnection):
                connection.lane.acquired(frame)
            else:
                try:
                    refuse_stragglers("a pool of psycopg")  # who waited until the block was over
                except BaseException:
                    await self.putconn(connection)
                    raise
            return connection

        async def putconn(self, conn: Any) -> None:
            if not getattr(conn, "stray", False):
                await super().putconn(conn)

        async def _connect(self, timeout: float | None = None) -> Any:  # noqa: ASYNC109
            connection = await super()._connect(timeout)
            await self._sandbox.configure(connection)
            return connection

        async def _get_ready_connection(self, timeout: float | None) -> Any:  # noqa: ASYNC109
            connection = await super()._get_ready_connection(timeout)
            if connection is not None and not self._sandbox.has(connection):
                self._nconns -= 1  # a null pool has made it, and counts it on the wrong side
                if self._sandbox.active:
                    self._sandbox.outside["_nconns"] += 1
            elif connection is None and self._sandbox.active and self._nconns < self._max_size:
                self._nconns += 1
                connection = await self._connect()
            return connection

        async def _maybe_close_connection(self, conn: Any) -> bool:
            return self._sandbox.has(conn) and await super()._maybe_close_connection(conn)

        async def _putconn(self, conn: Any, from_getconn: bool) -> None:
            if isinstance(conn, LaneConnection):  # not later, by a worker, when the block may be over
                await self._return_connection(conn, from_getconn)
            else:
                await super()._putconn(conn, from_getconn)

        async def _return_connection(self, conn: Any, from_getconn: bool) -> None:
            if isinstance(conn, LaneConnection):
                await self._reset_connection(conn)
                if not self._sandbox.has(conn):
                    await conn.give_up()
                elif not conn.closed:
                    await self._add_to_pool(conn)
                elif self._waiting:
                    await self._add_to_pool(await self._connect())
                else:
                    self._nconns -= 1
            elif self._sandbox.active:
                await super()._reset_connection(conn)
                await self._add_outside(conn)
            else:
                await super()._return_connection(conn, from_getconn)

        async def _add_to_pool(self, conn: Any) -> None:
            if self._sandbox.has(conn):
                await super()._add_to_pool(conn)
            elif isinstance(conn, LaneConnection):  # it was in the making when the block ended,
                await conn.give_up()
            else:  # or began
                await self._add_outside(conn)

        async def _add_outside(self, conn: Any) -> None:
            outside = self._sandbox.outside
            conn._pool = None
            if isinstance(self, AsyncNullConnectionPool):  # which keeps none
                await conn.close()
            if conn.closed:
                outside["_nconns"] -= 1
            else:
                outside["_pool"].append(conn)

        async def _reset_connection(self, conn: Any) -> None:
            if not isinstance(conn, LaneConnection):
                await super()._reset_connection(conn)
                return
            try:
                await conn.recover()
                if conn.runs():
                    await conn.give_up()
                if conn.lane.in_transaction and not conn.closed:
                    await conn.rollback()
                if self._reset is not None and not conn.closed:
                    await self._reset(conn)
                    _check_left_idle(conn, f"reset function {self._reset}")
            except (Exception, asyncio.CancelledError):  # as the pool does
                await self._close_connection(conn)
            if conn.closed:
                conn.lane.abandon()

        async def close(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109
            if not self._sandbox.active:
                await super().close(timeout)
            elif not self._closed:
                self._closed = True
                while self._pool:
                    await self._close_connection(self._pool.popleft())
                while self._waiting:
                    await self._waiting.popleft().fail(PoolClosed(f"the pool {self.name!r} is closed"))

    return called_like(kind, Sandboxed)


def sandbox(pool: Any) -> PoolSandbox:
    """Make *pool* ask a sandbox for connections, and return that."""
    pool._sandbox = made = PoolSandbox(pool)
    pool.__class__ = _sandboxed(pool.__class__)
    return made
