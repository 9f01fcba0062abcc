"""The sandbox of asyncpg's pools, learned from `pool.py` and `connection.py` of asyncpg 0.32.

Inside a block the pool is the same object with other holders. Their connections are ordinary
`asyncpg.Connection` objects, over a protocol that is a lane of the one real connection. So the pool's
own code limits, queues, times out and resets them, and the connection's own code makes transactions,
cursors and prepared statements of them.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

from asyncpg import exceptions
from asyncpg.pool import PoolConnectionHolder

from lifekit._errors import SandboxBusyError, SandboxEscapedError
from lifekit._sandbox import current_block, refuse_stragglers
from lifekit.drivers import Sandbox
from lifekit.drivers._loans import named_like
from lifekit.drivers.asyncpg import loans

from ._holders import escaped_strays, lets_go
from ._lane import Lane
from ._shared import Shared
from ._sockets import cuts_of

_SECONDS = 60.0
"""For the sandbox's own statements, which wait for no lock and do little."""


class RealConnection:
    """The real connection of a sandbox, an `asyncpg.Connection`, and what its lanes share."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.shared: Shared = Shared(self)
        self._is_cut: Callable[[], bool] | None = None

    async def control(self, sql: str) -> None:
        """Send statements in one message; whatever they return is dropped."""
        await self.connection._protocol.query(sql, _SECONDS)

    async def ask(self, sql: str) -> str | None:
        """Return the one value that a query gives, a text or NULL."""
        # Without a name: the application may deallocate those that have one.
        protocol, kind = self.connection._protocol, self.connection._protocol.get_record_class()
        statement = await protocol.prepare("", sql, _SECONDS, record_class=kind)
        statement._init_types()
        statement._init_codecs()
        rows = await protocol.bind_execute(statement, (), "", 1, False, _SECONDS)
        answer: str | None = rows[0][0] if rows else None
        return answer

    def error(self, sqlstate: str, message: str) -> Exception:
        """Return the error by which asyncpg tells of a refusal by the server."""
        fields = {"S": "ERROR", "V": "ERROR", "C": sqlstate, "M": message}
        refusal: Any = exceptions.PostgresError
        return cast(Exception, refusal.new(fields))

    def lost(self) -> bool:
        """Return whether the connection is gone."""
        return bool(self.connection.is_closed())

    def is_cut(self) -> bool:
        """Return whether the server has closed the connection, which is idle."""
        if self._is_cut is None:
            self._is_cut = cuts_of(self.connection._transport.get_extra_info("socket"))
        return self._is_cut()


def connect(shared: Shared, real: Any) -> Any:
    """Return a connection, of the class of the *real* one, that is a lane of it."""
    protocol = _LaneProtocol(shared, real)
    connection = type(real)(
        protocol, real._transport, real._loop, real._addr, real._config, real._params
    )
    protocol.reset_query = connection.get_reset_query()
    return connection


def lane_of(connection: Any) -> Lane | None:
    """Return the lane of a connection that `connect` made, None once it is closed."""
    return getattr(connection._protocol, "lane", None)


def _is_busy(connection: Any) -> bool:
    lane = lane_of(connection)
    return lane is not None and (lane.in_transaction or connection._protocol.is_busy)


def _running(
    name: str, timeout_at: int, answer: Callable[[str, tuple[Any, ...], dict[str, Any]], Any]
) -> Any:
    """Make the method *name* of a protocol, which runs a prepared statement or a COPY."""

    async def run(self: _LaneProtocol, state: Any, *args: Any, **options: Any) -> Any:
        lane, text = self.lane, state if isinstance(state, str) else state.query
        if not self.is_busy and lane.goes_directly(text):
            self.is_busy = True
            try:
                return await getattr(self.real, name)(state, *args, **options)
            except BaseException as error:
                lane.doubtful = True
                lane.shared.explain(error, in_transaction=True)
                raise
            finally:
                self.is_busy = False
                lane.rests()
        timeout = options.get("timeout", args[timeout_at] if "timeout" not in options else None)
        send = partial(getattr(self.real, name), state, *args, **options)
        return await self.one_at_a_time(
            lane.run(text, send, lambda tag: answer(tag, args, options)), timeout
        )

    return run


def _aside(name: str) -> Any:
    """Make the method *name* of a protocol, which closes something."""

    async def run(self: _LaneProtocol, *args: Any) -> Any:
        send = partial(getattr(self.real, name), *args)
        return await self.one_at_a_time(self.lane.aside(send), None)

    return run


def _tag(tag: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return tag


def _no_rows(tag: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return []


def _extra(tag: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    wanted = options["return_extra"] if "return_extra" in options else args[3]
    return ([], tag.encode(), True) if wanted else []


class _LaneProtocol:
    """What stands in for the protocol of a connection: a lane of the real connection's."""

    def __init__(self, shared: Shared, real: Any) -> None:
        self.lane: Lane = Lane(shared, "asyncpg")
        self.reset_query = ""
        self.queries_count: int = 0
        self.real = real._protocol
        self._config = real._config
        self.is_busy: bool = False
        # What each statement asks for, sooner than by __getattr__.
        self._get_timeout = self.real._get_timeout
        self.get_record_class = self.real.get_record_class

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    bind_execute = _running("bind_execute", 4, _extra)
    bind_execute_many = _running("bind_execute_many", 2, _no_rows)
    execute = _running("execute", 3, _no_rows)
    copy_out = _running("copy_out", 1, _tag)
    copy_in = _running("copy_in", 4, _tag)
    close_portal = _aside("close_portal")

    _bind = _running("bind", 2, _no_rows)

    async def bind(self, *args: Any) -> Any:
        """Open a cursor."""
        self.lane.has_cursors = True
        self.lane.keeps_hold()  # it does not outlive the savepoint
        return await self._bind(*args)

    _close_statement = _aside("close_statement")

    async def close_statement(self, state: Any, seconds: Any) -> Any:
        """Deallocate a prepared statement."""
        self.lane.shared.forget_name(state.name)
        return await self._close_statement(state, seconds)

    async def query(self, query: str, seconds: Any) -> str:
        """Run a message of the simple protocol."""
        if query == self.reset_query and not self.lane.touched_session:
            return "RESET"
        send = partial(self.real.query, timeout=seconds)
        tag: str = await self.one_at_a_time(self.lane.run_script(query, send), seconds)
        if query == self.reset_query:
            self.lane.touched_session = False
        return tag

    async def prepare(self, name: str, query: str, seconds: Any, **options: Any) -> Any:
        """Have a statement parsed."""
        # The real connection has one statement without a name, and each of its lanes may want one.
        unique = name or self.lane.shared.unique_name()
        send = partial(self.real.prepare, unique, query, seconds, **options)
        try:
            return await self.one_at_a_time(self.lane.prepare(send), seconds)
        except BaseException:
            self.lane.shared.forget_name(unique)
            raise

    async def one_at_a_time(self, act: Coroutine[Any, Any, Any], seconds: Any) -> Any:
        if self.is_busy or self.lane.closed:
            act.close()
            raise exceptions.InterfaceError(
                "cannot perform operation: another operation is in progress"
                if self.is_busy
                else "cannot perform operation: connection is closed"
            )
        self.is_busy = True
        self.queries_count += 1
        try:
            if not self.lane.must_wait():
                return await act
            if not isinstance(seconds, int | float):
                seconds = self._config.command_timeout if seconds is None else None
            async with asyncio.timeout(seconds):
                return await act
        finally:
            self.is_busy = False

    def is_in_transaction(self) -> bool:
        """Return whether the application is in a transaction of its own."""
        return self.lane.in_transaction

    def is_connected(self) -> bool:
        """Return whether the connection is open."""
        return not self.lane.closed and bool(self.real.is_connected())

    async def close(self, seconds: Any) -> None:
        """Close what the application sees as its connection."""
        self.abort()

    def abort(self) -> None:
        """Close it at once."""
        if self.is_busy and not self.lane.must_wait():
            self.real._request_cancel()
        self.lane.abandon()


class _Moved(Exception):
    """What a task waited for is of a block that has ended."""


_connecting: ContextVar[PoolSandbox | None] = ContextVar("lifekit.asyncpg.connecting", default=None)


class _InsideHolder(PoolConnectionHolder):
    """A place in a pool for a lane."""

    __slots__ = ()

    async def connect(self) -> None:
        pool: Any = self._pool
        sandbox: PoolSandbox = pool._sandbox
        if not sandbox.active or self not in pool._holders:
            raise _Moved
        token = _connecting.set(sandbox)
        try:
            await super().connect()
        finally:
            _connecting.reset(token)

    async def release(self, timeout: float | None) -> None:  # noqa: ASYNC109
        connection = cast(Any, self)._con
        if connection is not None and connection.is_closed():
            connection.terminate()  # else asyncpg before 0.32 loses this place
        else:
            await super().release(timeout)


@functools.cache
def _sorted(kind: Any) -> Any:
    """Return the class of a pool's queue that takes back only what is of its own side."""

    class Queue(kind):  # type: ignore[misc]
        outside: Any = None  # of a queue of inside holders, which are its own
        own: Sequence[Any] = ()

        def put_nowait(self, holder: Any) -> None:
            if holder in self.own or (self.outside is None and not isinstance(holder, _InsideHolder)):
                kind.put_nowait(self, holder)
            elif self.outside is not None and not isinstance(holder, _InsideHolder):
                self.outside.put_nowait(holder)  # it was out when the block began

    return Queue


class _Inside(NamedTuple):
    """What a pool works with: inside of a block other holders than outside."""

    holders: list[Any]
    queue: Any
    closing: bool = False
    closed: bool = False


class PoolSandbox(Sandbox):
    """The sandbox of one pool."""

    def __init__(self, pool: Any) -> None:
        self.active: bool = False
        self._pool = pool
        self._own: RealConnection | None = None
        self._used: RealConnection | None = None  # its own, or that of another pool
        self._key: object = None
        self._inside: _Inside | None = None
        self._outside: _Inside | None = None
        self._twins: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # of connections acquired before
        self._redirected: list[tuple[Any, Any, Any]] = []

    async def begin(self) -> None:
        """Put connections in the pool that are lanes of one real connection."""
        pool = self._pool
        if pool._closing or pool._closed:
            return
        before, self._used = self._used, await self._real()
        if self._inside is None or self._used is not before:
            self._inside = self._made_inside()
            self._twins.clear()
        held = self._held()
        self._outside = self._put_in(self._inside)
        for connection in held:
            self._redirect(connection)
        self.active = True
        if self._used is self._own:
            self._used.shared.begin()

    async def end(self) -> None:
        """Take them out, and undo what they did."""
        if not self.active:
            return
        assert self._used is not None
        strays = self._strays()
        if strays:
            await lets_go(lambda: not self._strays())
            strays = self._strays()
        told = escaped_strays(strays, "async with pool.acquire() as connection") if strays else None
        self._put_back()
        if self._used is self._own:
            try:
                await self._used.shared.end()
            except BaseException as error:
                raise told or error from None
            finally:
                if self._used.shared.dirty:  # what was prepared or is known of types may be wrong now
                    await self._used.connection.close(timeout=_SECONDS)
        if told is not None:
            raise told

    async def close(self) -> None:
        """Close the real connection."""
        with suppress(SandboxEscapedError):
            await self.end()
        if self._own is not None:
            await self._own.connection.close(timeout=_SECONDS)

    def terminate(self) -> None:
        """Cut the real connection off."""
        if self.active:
            self._put_back()
        if self._own is not None:
            self._own.connection.terminate()

    async def _real(self) -> RealConnection:
        """Return the real connection for a block: pools of one database and user share one."""
        block = current_block.get()
        commons: dict[object, Any] = block.commons if block is not None else {}
        shared: RealConnection | None = commons.get(self._key)
        if shared is not None and not shared.lost():
            return shared
        if self._own is None or self._own.lost() or self._own.is_cut():
            pool = self._pool
            connection = await pool._get_new_connection()
            self._own = RealConnection(connection)
            given = (
                pool._connect_kwargs.get("server_settings"),
                pool._init,
                pool._setup,
                pool._connect,
            )
            login = (connection._addr, connection._params.database, connection._params.user)
            like = (connection._config, connection._protocol.get_record_class(), pool._reset)
            self._key = repr((pool._connection_class, login, like, given))
        real: RealConnection = commons.setdefault(self._key, self._own)
        return self._own if real.lost() else real

    async def connect(self) -> Any:
        """Return a new connection of the application's."""
        assert self._used is not None
        connection = connect(self._used.shared, self._used.connection)
        if self._pool._init is not None:
            connection._protocol.lane.acquired()
            await self._pool._init(connection)
        return connection

    def refuse_hopeless(self) -> None:
        """Raise where the running task waits for a connection, and has them all itself."""
        if self._pool._queue.empty():
            lanes = [lane_of(connection) for connection in self._held()]
            here = asyncio.current_task()
            if lanes and all(lane is not None and lane.task is here for lane in lanes):
                raise SandboxBusyError(
                    "this acquire() waits for ever, in production as well: the pool's "
                    f"{len(lanes)} connections are all held by the task that asks for one more.\n"
                    + "".join(f"  acquired at {lane}\n" for lane in lanes)
                    + "Pass a connection on instead of acquiring another, or raise max_size."
                )

    def _held(self) -> list[Any]:
        pool = self._pool
        if pool._queue.full():
            return []
        return [holder._con for holder in pool._holders if not holder.is_idle()]

    def _strays(self) -> list[Lane]:
        lanes = [lane_of(connection) for connection in self._held()]
        lanes += [lane_of(connection) for connection, _, _ in self._redirected if _is_busy(connection)]
        return [lane for lane in lanes if lane is not None]

    def _made_inside(self) -> _Inside:
        pool = self._pool
        outside: Any = pool._queue

        holders = [
            _InsideHolder(pool, max_queries=pool._max_queries, max_inactive_time=0, setup=pool._setup)
            for _ in pool._holders
        ]
        queue = type(outside)(maxsize=pool._maxsize)
        queue.outside, queue.own = outside, holders
        for holder in holders:
            queue.put_nowait(holder)
        return _Inside(holders, queue)

    def _put_in(self, inside: _Inside) -> _Inside:
        pool = self._pool
        before = _Inside(pool._holders, pool._queue, pool._closing, pool._closed)
        pool._holders, pool._queue, pool._closing, pool._closed = inside
        return before

    def _redirect(self, connection: Any) -> None:
        # Acquired before the block, it is a lane as well while that lasts. What it prepared itself, it
        # prepared elsewhere.
        real = connection._protocol
        if real is None:
            return
        self._redirected.append((connection, real, connection._stmt_cache))
        if real.is_in_transaction():
            connection._protocol = OutsideProtocol(real, connection.get_reset_query(), "ROLLBACK")
            return
        twin = self._twins.get(connection)
        if twin is None:
            assert self._used is not None
            twin = connect(self._used.shared, self._used.connection)
            twin._aborted = True  # it only gives what it has
            self._twins[connection] = twin
        connection._protocol, connection._stmt_cache = twin._protocol, twin._stmt_cache
        twin._protocol.lane.acquired_before(loans.of(connection))

    def _put_back(self) -> None:
        assert self._outside is not None
        waiting = [each for each in self._pool._queue._getters if not each.done()]
        for getter in waiting:
            getter.set_exception(_Moved())
        for connection in self._held():
            connection.terminate()
        for connection, protocol, statements in self._redirected:
            lane = lane_of(connection)
            if connection._protocol is None or (lane is not None and lane.closed):
                self._twins.pop(connection, None)
                protocol.abort()  # for the application closed it
                continue
            if _is_busy(connection):
                connection._top_xact = None
                connection._protocol.abort()
                del self._twins[connection]
            connection._protocol, connection._stmt_cache = protocol, statements
        self._redirected.clear()
        self.active = False
        inside = self._put_in(self._outside)._replace(closing=False, closed=False)
        self._inside = inside if inside.queue.full() else None


_SENDS = {"bind", "bind_execute", "bind_execute_many", "copy_in", "copy_out", "execute", "prepare"}


class OutsideProtocol:
    """Stands before a connection that was in a transaction when the block began."""

    def __init__(self, protocol: Any, *allowed: str) -> None:
        self._real = protocol
        self._allowed = allowed  # what releases it

    def __getattr__(self, name: str) -> Any:
        return self._refuse if name in _SENDS else getattr(self._real, name)

    async def query(self, query: str, seconds: Any) -> Any:
        """Let only a release pass."""
        if query not in self._allowed:
            await self._refuse()
        return await self._real.query(query, seconds)

    async def _refuse(self, *args: Any, **options: Any) -> Any:
        raise SandboxEscapedError(
            "this connection was in a transaction when the sandbox began, and what that does would "
            "last. End the transaction first, or begin it inside the sandbox."
        )


class SandboxedPool:
    """What the class of a pool is mixed with, so that it asks its sandbox for connections."""

    __slots__ = ()  # the layout must not change
    _sandbox: PoolSandbox

    async def _acquire(self, seconds: float | None) -> Any:
        connection: Any = None
        while connection is None:
            refuse_stragglers("a pool of asyncpg")
            if self._sandbox.active and seconds is None:
                self._sandbox.refuse_hopeless()
            try:
                connection = await cast(Any, super())._acquire(seconds)
            except _Moved:
                continue
            inside = isinstance(connection._holder, _InsideHolder)
            if inside != self._sandbox.active:  # a block began or ended while it waited
                if inside:
                    connection._con.terminate()
                else:
                    await cast(Any, self).release(connection)
                connection = None
        lane = lane_of(connection._con)
        if lane is not None:
            lane.acquired()
        return connection

    def _get_new_connection(self) -> Awaitable[Any]:
        if _connecting.get() is self._sandbox:
            return self._sandbox.connect()
        return cast(Awaitable[Any], cast(Any, super())._get_new_connection())


def sandbox(pool: Any) -> PoolSandbox:
    """Make *pool* ask a sandbox for connections, and return that."""
    made = PoolSandbox(pool)
    kind: Any = pool.__class__
    attributes = {"__slots__": (), **named_like(kind), "_sandbox": made}
    pool.__class__ = type(kind.__name__, (SandboxedPool, kind), attributes)
    pool._queue.__class__ = _sorted(pool._queue.__class__)
    return made
