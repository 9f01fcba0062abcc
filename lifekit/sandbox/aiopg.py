"""The sandbox of aiopg's pools, learned from `pool.py` and `connection.py` of aiopg 1.4.

Inside a block the pool is the same object with other connections in it. They are `aiopg.Connection`
objects, and have cursors of psycopg2 like any; but what such a cursor is to execute goes to a lane of
the one real connection, whose cursor it is. So the pool's own code limits, queues and discards them,
and aiopg's own code makes transactions of the SQL that it sends. psycopg2 has all rows as soon as a
statement is done, so that cursors stay readable while another lane's statement runs.
"""

from __future__ import annotations

import asyncio
import re
import sys
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NamedTuple, cast

import aiopg
import psycopg2
from aiopg.utils import ClosableQueue, create_completed_future
from psycopg2 import errors, extensions

from lifekit._errors import (
    SandboxBusyError,
    SandboxError,
    SandboxEscapedError,
    SandboxUnsupportedError,
)
from lifekit._sandbox import current_block, refuse_stragglers
from lifekit._stack import caller_frame
from lifekit.drivers import Sandbox
from lifekit.drivers.aiopg import loans

from ._holders import escaped_strays, lets_go
from ._lane import Lane
from ._psycopg2 import Gate, RealConnection
from ._shared import PATIENCE
from ._sockets import is_cut
from ._sql import Script, Verb, read

_COPY = re.compile(r"(?:\s|--[^\n]*\n|/\*.*?\*/)*copy\b.*\b(stdin|stdout)\b", re.IGNORECASE | re.DOTALL)
_MODES = re.compile(r"\btransaction\b", re.IGNORECASE)
_NO_COPY = "can't execute COPY {0}: use the copy_{1}() method instead"


class _Sent(str):
    """A command tag that the server gave."""

    __slots__ = ()


class LaneConnection(aiopg.Connection):
    """One of the application's connections: a lane of the real one."""

    def __init__(self, sandbox: PoolSandbox) -> None:  # instead of the one that connects
        pool = sandbox.pool
        self._loop = pool._loop
        self._waiter = None
        self._fileno = None
        self._timeout = pool._timeout
        self._last_usage = self._loop.time()
        self._writing = False
        self._echo = pool._echo
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self._notifies, self._notifies_proxy = queue, ClosableQueue(queue, self._loop)
        self._weakref = weakref.ref(self)
        self.join(sandbox)
        self._dsn = self._real.dsn

    def join(self, sandbox: PoolSandbox) -> None:
        """Be a lane from now on."""
        self.lane: Lane = Lane(sandbox.used.shared, "aiopg")
        self.noticed: Any = []
        self._sandbox = sandbox
        self._real: Any = sandbox.used
        self._taken: tuple[Any, bytes] | None = None
        self._limit: asyncio.Timeout | None = None
        self._cut: bool = False

    @property
    def _conn(self) -> Any:
        raw = self._real.shared_raw
        raw.reached = self
        return raw

    def executes(self) -> bool:
        """Return whether a statement is under way, or was when it was closed."""
        return self._waiter is not None or self._cut

    def executes_now(self) -> bool:
        """Return whether its statement has its turn."""
        return self._waiter is not None and not self.lane.must_wait()

    def take(self, cursor: Any, text: bytes) -> None:
        """Note what a cursor is to execute, for `_poll`."""
        if self._waiter is None or self._limit is not None:
            raise SandboxUnsupportedError(
                "this runs a statement on the psycopg2 cursor itself, where the sandbox can't see "
                "its end: await the execute() of aiopg's cursor instead."
            )
        self._taken = cursor, text

    def _create_waiter(self, func_name: str) -> asyncio.Future[None]:
        refuse_stragglers("a connection of aiopg")
        cursor = sys._getframe(1).f_locals.get("self")  # pyright: ignore[reportPrivateUsage]
        if not (self._sandbox.active and isinstance(getattr(cursor, "raw", None), Gate)):
            raise SandboxEscapedError(
                "this cursor, or its connection, is not of the running sandbox, and what it does would "
                "last. Make one when it is needed, for as long as it is: async with pool.acquire() as "
                "connection, connection.cursor() as cursor."
            )
        return super()._create_waiter(func_name)

    async def _poll(self, waiter: asyncio.Future[None], timeout: float | None) -> None:  # noqa: ASYNC109
        assert waiter is self._waiter
        try:
            async with asyncio.timeout(timeout) as self._limit:
                await self._perform()
        except (asyncio.CancelledError, TimeoutError) as error:
            closed = self.lane.closed
            self._limit = None
            self.close()
            if closed and isinstance(error, TimeoutError):  # by `_close`
                raise psycopg2.OperationalError("Connection closed") from None
            raise
        except extensions.QueryCanceledError as error:
            context = {"message": error.pgerror, "exception": error, "future": waiter}
            self._loop.call_exception_handler(context)
            raise asyncio.CancelledError from None
        except psycopg2.Error as error:
            self._notifies_proxy.close(error)
            raise
        finally:
            self._waiter = self._limit = self._taken = None
            if self.lane.closed:
                self.lane.abandon()

    async def _perform(self) -> None:
        assert self._taken is not None
        (cursor, text), lane = self._taken, self.lane
        codec = extensions.encodings[self._real.encoding]

        async def send(sql: str) -> str:
            cursor.told = None
            for statement in read(sql).statements:
                if copy := _COPY.match(statement.text):
                    ways = ("FROM", "from") if copy[1].lower() == "stdin" else ("TO", "to")
                    raise psycopg2.ProgrammingError(_NO_COPY.format(*ways))
            await self._real.run(cursor, sql.encode(codec, "surrogateescape"), self.noticed)
            return _Sent(cursor.statusmessage or "")

        sql = text.decode(codec, "surrogateescape")
        before, cursor.told = lane.in_transaction, ""
        try:
            tag = await lane.run_script(sql, send)
        except BaseException as error:
            cursor.told = ""
            script = read(sql)
            if isinstance(error, errors.ActiveSqlTransaction) and len(script.statements) == 1:
                self._warn(script, "", before)  # of a second BEGIN, whose modes came too late
            raise
        if not isinstance(tag, _Sent):
            cursor.told = tag
        self._warn(read(sql), tag, before)

    def _warn(self, script: Script, tag: str, in_transaction: bool) -> None:
        warnings = _warnings(script, tag, in_transaction)
        self.noticed += [f"WARNING:  {each}\n" for each in warnings]

    def _close(self) -> None:
        if self.lane.closed:
            return
        self.lane.closed, self._cut = True, self.executes()
        self._notifies_proxy.close(psycopg2.OperationalError("Connection closed"))
        if self._limit is None:
            self.lane.abandon()
        elif not self._limit.expired():  # `_poll` abandons it when the statement has ended
            self._limit.reschedule(self._loop.time())

    def __del__(self) -> None:
        # It may be collected while another asks the connection that they share.
        raw = self._real.shared_raw
        asking = raw.reached
        super().__del__()
        raw.reached = asking


def _warnings(script: Script, tag: str, in_transaction: bool) -> Iterator[str]:
    """Yield what the server would have sent beside the tag, but for the real transaction."""
    inside = in_transaction
    for statement in script.statements:
        if statement.verb is Verb.BEGIN:
            if inside:
                yield "there is already a transaction in progress"
            inside = True
        elif statement.verb in (Verb.COMMIT, Verb.ROLLBACK):
            if not inside:
                yield "there is no transaction in progress"
            inside = statement.chain
    if len(script.statements) == 1 and not inside:  # else they are a transaction together
        verb, text = script.statements[0].verb, script.statements[0].text
        if verb is Verb.SET_CONSTRAINTS:
            yield "SET CONSTRAINTS can only be used in transaction blocks"
        elif verb is Verb.SET_TRANSACTION and _MODES.search(text):
            yield "SET TRANSACTION can only be used in transaction blocks"
        elif script.local and tag == "SET":
            yield "SET LOCAL can only be used in transaction blocks"


class _Refusing(aiopg.Connection):
    """A connection that was at work when the block began."""

    def _create_waiter(self, func_name: str) -> asyncio.Future[None]:
        raise SandboxEscapedError(
            "this connection was in a transaction, or in a query, when the sandbox began, and what "
            "that does would last. End it first, or begin it inside the sandbox."
        )


# -- the pool --------------------------------------------------------------------------------------


class _Inside(NamedTuple):
    """What a pool works with: inside of a block other connections than outside."""

    free: deque[Any]
    used: set[Any]
    terminated: set[Any]
    closing: bool = False
    closed: bool = False


class PoolSandbox(Sandbox):
    """The sandbox of one pool."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.active: bool = False
        self.used: Any = None
        """The real connection of its block: its own, or that of another pool."""
        self._own: Any = None
        self._inside: _Inside | None = None
        self._outside: _Inside | None = None
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()
        self._redirected: list[tuple[Any, Any, Any]] = []
        self._waking: set[object] = set()

    async def begin(self) -> None:
        """Put connections in the pool that are lanes of one real connection."""
        pool = self.pool
        if pool._closing or pool._closed:
            return
        before, self.used = self.used, await self._real()
        if self.used is not before:
            self._drop_lanes()
        if self._inside is None:
            self._inside = _Inside(deque(maxlen=pool._free.maxlen), set(), set())
        async with pool._cond:  # nobody is connecting now
            self._outside = self._put_in(self._inside)
            self.active = True
            for connection in self._outside.used:
                self._redirect(connection)
            if self.used is self._own:
                self.used.shared.begin()
            await pool._fill_free_pool(False)

    async def _real(self) -> Any:
        """Return the real connection for a block: pools that connect alike share one."""
        pool, block = self.pool, current_block.get()
        commons: dict[object, Any] = block.commons if block is not None else {}
        features = pool._enable_json, pool._enable_hstore, pool._enable_uuid
        key = repr(("aiopg", pool._dsn, pool._conn_kwargs, features, pool._on_connect))
        real = commons.get(key)
        if real is None or real.lost():
            if self._own is not None and not self._own.lost() and is_cut(self._own.shared_raw.fileno()):
                self._own.close()
            if self._own is None or self._own.lost():
                self._own = await self._connect()
            real = commons[key] = self._own
        return real

    async def _connect(self) -> Any:
        real = RealConnection(self.pool)
        await real
        try:
            if self.pool._on_connect is not None:
                await self.pool._on_connect(real)
        except BaseException:
            real.close()
            raise
        return real

    async def end(self) -> None:
        """Take them out, and undo what they did."""
        if not self.active:
            return
        if self._strays():
            await lets_go(lambda: not self._strays())
        strays = self._strays()
        told = escaped_strays(strays, "async with pool.acquire() as connection") if strays else None
        self._put_back()
        if self.used is self._own:
            try:
                await self._own.shared.end()
            finally:
                if self._own.shared.dirty:  # the session may hold what a rollback leaves
                    self._drop()
        if told is not None:
            raise told

    def _drop(self) -> None:
        self._drop_lanes()
        if self._own is not None and not self._own.closed:
            self._own.close()

    def _drop_lanes(self) -> None:
        if self._inside is not None:
            for connection in self._inside.free:
                connection.close()
            self._inside = None

    async def close(self) -> None:
        """Close the real connection."""
        with suppress(SandboxEscapedError):
            await self.end()
        self._drop()

    def terminate(self) -> None:
        """Cut the real connection off."""
        if self.active:
            self._put_back()
        self._drop()

    async def fill(self, beyond_minimum: bool) -> None:
        """Do what the pool does before it gives a connection: drop old ones, make new ones."""
        pool = self.pool
        if pool._closed:
            raise RuntimeError("Cannot acquire connection after closing pool")
        now = pool._loop.time()
        for connection in list(pool._free):
            if -1 < pool._recycle < now - connection.last_usage:
                connection.close()
            if connection.closed:
                pool._free.remove(connection)
        while pool.size < pool.minsize:
            await self._add()
        if beyond_minimum and not pool._free and (not pool.maxsize or pool.size < pool.maxsize):
            await self._add()

    async def _add(self) -> None:
        pool = self.pool
        if self.used.closed:
            raise SandboxError(
                "the server closed the sandbox's one connection, and undid with that what was done in "
                "this block. The next block connects anew."
            )
        connection = LaneConnection(self)
        connection.lane.acquired()
        pool._acquiring += 1
        self._made.add(connection)
        try:
            if pool._on_connect is not None:
                await pool._on_connect(connection)
            if connection.closed:
                raise psycopg2.OperationalError("Connection closed")
        except BaseException:
            connection.close()
            raise
        finally:
            pool._acquiring -= 1
        pool._free.append(connection)
        pool._cond.notify()

    def refuse_hopeless(self) -> None:
        """Raise where the running task waits for a connection, and has them all itself."""
        pool, here = self.pool, asyncio.current_task()
        if pool._free or not pool.maxsize or pool.size < pool.maxsize:
            return
        # A short time limit tells as much, in the application's own terms.
        if pool.timeout is not None and pool.timeout <= PATIENCE:
            return
        lanes = [connection.lane for connection in pool._used]
        if all(lane.task is here for lane in lanes):
            raise SandboxBusyError(
                f"this acquire() waits in vain, in production as well: the pool's {len(lanes)} "
                "connections are all held by the task that asks for one more.\n"
                + "".join(f"  acquired at {lane}\n" for lane in lanes)
                + "Pass a connection on instead of acquiring another, or raise maxsize."
            )

    def _strays(self) -> list[Lane]:
        # Not only what the pool knows: it loses what it warns of, where warnings are errors.
        lanes = [connection for connection, kind, _ in self._redirected if kind is LaneConnection]
        return [
            connection.lane
            for connection in [*lanes, *self._made]
            if connection.lane.in_transaction or connection in self.pool._used
        ]

    def _put_in(self, inside: _Inside) -> _Inside:
        pool = self.pool
        before = _Inside(pool._free, pool._used, pool._terminated, pool._closing, pool._closed)
        pool._free, pool._used, pool._terminated, pool._closing, pool._closed = inside
        return before

    def _redirect(self, connection: Any) -> None:
        # Acquired before the block, it is a lane as well while that lasts.
        if connection.closed:
            return
        idle = connection.raw.get_transaction_status() == extensions.TRANSACTION_STATUS_IDLE
        kind: Any = LaneConnection if idle and connection._waiter is None else _Refusing
        self._redirected.append((connection, kind, connection._notifies_proxy))
        connection.__class__ = kind
        if kind is LaneConnection:
            connection._notifies_proxy = ClosableQueue(asyncio.Queue(), self.pool._loop)
            self.pool._loop.remove_reader(connection._fileno)
            connection.join(self)
            connection.lane.acquired_before(loans.of(connection))

    def _put_back(self) -> None:
        assert self._outside is not None
        pool = self.pool
        for connection in set(self._made).difference(pool._free):
            connection.close()
        for connection, kind, notifies in self._redirected:
            closed = connection.closed
            if kind is LaneConnection:
                connection.close()
                connection._notifies_proxy = notifies
                pool._loop.add_reader(connection._fileno, connection._ready, connection._weakref)
            connection.__class__ = aiopg.Connection
            if closed:  # by the application
                connection.close()
        self._redirected.clear()
        self.active = False
        inside = self._put_in(self._outside)
        self._inside = _Inside(inside.free, set(), set())
        for connection in inside.free:
            connection.noticed = []
        if pool._cond._waiters:
            task = pool._loop.create_task(_wake(pool._cond))
            self._waking.add(task)
            task.add_done_callback(self._waking.discard)

    @contextmanager
    def outside(self, connection: Any) -> Generator[None]:
        """Let the pool work with what it has outside, if the connection is of that."""
        outside = self._outside if self.active else None
        if outside is None or connection not in outside.used | outside.terminated:
            yield
            return
        inside = self._put_in(outside)
        try:
            yield
        finally:
            self._outside = self._put_in(inside)


async def _wake(condition: Any) -> None:
    async with condition:
        condition.notify_all()


class SandboxedPool:
    """What the class of a pool is mixed with, so that it asks its sandbox for connections."""

    _sandbox: PoolSandbox

    def _acquire(self) -> Any:
        # Called where acquire() is, even if wait_for() then awaits it in a task of its own.
        return self._acquire_lane(caller_frame("aiopg"))

    async def _acquire_lane(self, frame: FrameType) -> Any:
        refuse_stragglers("a pool of aiopg")
        if self._sandbox.active:
            self._sandbox.refuse_hopeless()
        connection = await cast(Any, super())._acquire()
        if isinstance(connection, LaneConnection):
            connection.lane.acquired(frame)
        return connection

    async def _fill_free_pool(self, override_min: bool) -> None:
        refuse_stragglers("a pool of aiopg")  # who waited until now, too
        if self._sandbox.active:
            await self._sandbox.fill(override_min)
        else:
            await cast(Any, super())._fill_free_pool(override_min)

    def release(self, conn: Any) -> Any:
        """Take a connection back, in the block or outside, where it is from."""
        pool: Any = self
        if isinstance(conn, LaneConnection) and conn.closed and not self._sandbox.active:
            return create_completed_future(pool._loop)  # a stray, which the end of the block closed
        with self._sandbox.outside(conn):
            return cast(Any, super()).release(conn)


def sandbox(pool: Any) -> PoolSandbox:
    """Make *pool* ask a sandbox for connections, and return that."""
    made = PoolSandbox(pool)
    kind: Any = type(pool)  # pyright: ignore[reportUnknownVariableType]
    pool.__class__ = type(
        kind.__name__, (SandboxedPool, kind), {"__doc__": kind.__doc__, "_sandbox": made}
    )
    return made
