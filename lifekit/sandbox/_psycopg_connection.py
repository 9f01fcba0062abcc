"""A connection of psycopg's that is a lane of the real one.

All that psycopg does with a server are generators that `AsyncConnection.wait()` runs, so that is the
gate. There a generator may also yield a `_Call`, which is awaited: that is how statements take their
turn, and how BEGIN and COMMIT turn into savepoints. What is sent is sent over the real `PGconn`, which
the connections share.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Any, cast

from psycopg import AsyncConnection, ConnectionInfo, errors, generators
from psycopg._cursor_base import BaseCursor
from psycopg._pipeline_base import BasePipeline
from psycopg._preparing import Prepare, PrepareManager
from psycopg._server_cursor_base import ServerCursorMixin
from psycopg.pq import ConnStatus, ExecStatus, Format, TransactionStatus
from psycopg.sql import Composable
from psycopg.transaction import BaseTransaction

from lifekit._errors import SandboxEscapedError, SandboxUnsupportedError

from ._holders import ALONE
from ._lane import Lane
from ._shared import NO_TRANSACTION, Shared
from ._sql import read

_NO_CURSOR = "34000"
_CLOSING_SECONDS = 1.0
"""How long a connection that is closed waits for the statement that it has cancelled."""

_Gen = Generator[Any, Any, Any]


class RealConnection:
    """The real connection of a sandbox, a psycopg `AsyncConnection`."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    async def control(self, sql: str) -> None:
        """Send statements in one message; whatever they return is dropped."""
        await self._send(sql)

    async def ask(self, sql: str) -> str | None:
        """Return the one value that a query gives, a text or NULL."""
        (result,) = await self._send(sql)
        value = result.get_value(0, 0) if result.ntuples else None
        return None if value is None else value.decode(self.connection.pgconn._encoding)

    async def _send(self, sql: str) -> list[Any]:
        # Not by a cursor, which would begin a transaction of its own.
        connection = self.connection

        def run() -> _Gen:
            connection._check_connection_ok()
            connection.pgconn.send_query(sql.encode(connection.pgconn._encoding))
            return (yield from generators.execute(connection.pgconn))

        results: list[Any] = await connection.wait(run())
        for result in results:
            if result.status == ExecStatus.FATAL_ERROR:
                raise errors.error_from_result(result, encoding=connection.pgconn._encoding)
        return results

    def error(self, sqlstate: str, message: str) -> Exception:
        """Return the error by which psycopg tells of a refusal by the server."""
        return errors.lookup(sqlstate)(message)

    def lost(self) -> bool:
        """Return whether the connection is gone."""
        return bool(self.connection.closed)


class _Call:
    """What a generator yields to have it awaited, and gets the result of."""

    def __init__(self, call: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self.call = call


class _Tag(str):
    """The command tag of what was not sent."""

    __slots__ = ()


class _Prepared(PrepareManager):
    """A connection's prepared statements, with names that the others on the real one don't have."""

    def __init__(self, numbers: Iterator[int]) -> None:
        super().__init__()
        self._numbers = numbers

    def get(self, query: Any, prepare: bool | None = None) -> tuple[Prepare, bytes]:
        found, name = super().get(query, prepare)
        return found, b"lifekit_%d" % next(self._numbers) if found is Prepare.SHOULD else name

    def clear(self) -> bool:
        mine = [*filter(None, self._to_flush), *self._names.values()]
        cleared = super().clear()
        if cleared:  # by DEALLOCATE ALL, which would take those of the others along
            self._to_flush.clear()
            self._to_flush.extend(mine)
        return cleared


class _Seen:
    """The real `PGconn`, in the state that the application's connection is in."""

    def __init__(self, connection: LaneConnection) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection.pgconn, name)

    @property
    def status(self) -> int:
        return ConnStatus.BAD if self._connection.closed else self._connection.pgconn.status

    @property
    def transaction_status(self) -> TransactionStatus:
        return self._connection.seen_status()


class LaneConnection(AsyncConnection[Any]):
    """What a pool's connection class is mixed with inside a block: a lane of the real connection."""

    real: Any
    shared: Shared
    numbers: Iterator[int]
    is_in_use: Callable[[], bool]

    def __init__(self, pgconn: Any, *args: Any, **options: Any) -> None:
        super().__init__(pgconn, *args, **options)
        self.lane: Lane = Lane(self.shared, "psycopg_pool")
        self.stray: bool = False
        self._prepared = _Prepared(self.numbers)
        self._notices = pgconn.notice_handler
        self._granted: bytes | None = None
        self._waits: asyncio.Timeout | None = None  # while a task waits in here

    @classmethod
    def _connect_gen(cls, *args: Any, **options: Any) -> Any:
        return cls(cls.real.pgconn)
        yield

    # -- what the application sees -----------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """`True` if the connection is closed."""
        return self._closed or self.pgconn.status == ConnStatus.BAD

    @property
    def info(self) -> ConnectionInfo:
        """A `ConnectionInfo` attribute to inspect connection properties."""
        return ConnectionInfo(cast(Any, _Seen(self)))

    def seen_status(self) -> TransactionStatus:
        """Return the transaction status as it would be on a connection of its own."""
        if self.closed:
            return TransactionStatus.UNKNOWN
        if self.lane.holding:
            return TransactionStatus(self.pgconn.transaction_status)
        if self.lane.in_transaction:
            return TransactionStatus.INTRANS
        return TransactionStatus.ACTIVE if self._granted else TransactionStatus.IDLE

    def cursor(self, *args: Any, **options: Any) -> Any:
        """Return a new cursor."""
        return _adopted(super().cursor(*args, **options))

    async def close(self) -> None:
        """Close the connection, and give the real one back."""
        if self.closed:
            return
        pool: Any = getattr(self, "_pool", None)
        if pool is not None and getattr(pool, "close_returns", False):
            await pool.putconn(self)
            return
        await self.give_up()

    async def give_up(self) -> None:
        """End what runs on it, or waits for its turn, and undo its transaction."""
        if self._waits is not None:
            self._waits.reschedule(0)
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSING_SECONDS), self.lock:
                    pass
        await self.recover()
        if self.runs():  # the server undoes all when it is cut
            self.pgconn.finish()
        self._closed = True
        self.lane.abandon()

    async def recover(self) -> None:
        """Cancel what still runs on it, and read what that has left."""
        if self.runs():
            await self._try_cancel()
            with suppress(TimeoutError, errors.Error):
                async with asyncio.timeout(_CLOSING_SECONDS), self.lock:
                    while self.runs() and await self._drive(_left(self.pgconn)):
                        pass

    def runs(self) -> bool:
        """Return whether something runs on it, or was left to be read."""
        mine = self._granted is not None or self.lane.holding
        return mine and self.pgconn.transaction_status == TransactionStatus.ACTIVE

    def _should_cancel(self) -> bool:
        return super()._should_cancel() and self.runs()

    def _check_connection_ok(self) -> None:
        if self._closed:
            raise errors.OperationalError("the connection is closed")
        super()._check_connection_ok()

    def pipeline(self) -> Any:
        """Refuse."""
        raise SandboxUnsupportedError(_NO_PIPELINE)

    def notifies(self, **options: Any) -> Any:
        """Refuse, as LISTEN is."""

        async def refuse() -> AsyncIterator[Any]:
            self._check_connection_ok()
            await self.lane.run("LISTEN lifekit", _nothing, _Tag)
            yield

        return refuse()

    # -- the gate ----------------------------------------------------------------------------------

    async def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:  # noqa: ASYNC109
        """Run a generator of psycopg's, and await what it yields to be awaited."""
        self._check_connection_ok()
        if not self.is_in_use():
            raise SandboxEscapedError(_OVER)
        self._take_in(gen)
        waits = self._waits = asyncio.timeout(None)
        try:
            async with waits:
                return await self._run(gen, interval, timeout)
        except BaseException as error:
            self.lane.doubtful = True
            if waits.expired():
                raise errors.OperationalError("connection socket closed") from error
            raise
        finally:
            self._waits = None
            # psycopg may swallow the error of what it has cancelled.
            failed = self.pgconn.transaction_status == TransactionStatus.INERROR
            self.lane.doubtful |= failed and self.lane.holding

    async def _run(self, gen: Any, interval: float, timeout: float | None) -> Any:  # noqa: ASYNC109
        step: Callable[[], Any] = partial(gen.send, None)
        while True:
            call, value = await self._drive(_part(gen, step), interval, timeout)
            if call is None:
                return value
            try:
                step = partial(gen.send, await call.call())
            except BaseException as error:
                step = partial(gen.throw, error)

    async def _drive(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:  # noqa: ASYNC109
        self.pgconn.notice_handler = self._notices
        value, error = await super().wait(_caught(gen), interval, timeout)
        if error is not None:
            raise error
        return value

    def _take_in(self, gen: Any) -> None:
        """Take in whose generator it is: also what the application made without the connection."""
        frame = getattr(gen, "gi_frame", None)
        owner = frame.f_locals.get("self") if frame is not None else None
        if isinstance(owner, BaseCursor):
            _adopted(cast(Any, owner))
        elif isinstance(owner, BaseTransaction):
            cast(Any, owner).pgconn = _Seen(self)
        elif isinstance(owner, BasePipeline):
            raise SandboxUnsupportedError(_NO_PIPELINE)
        elif owner is not self:
            self.has_its_turn()

    def has_its_turn(self) -> None:
        """Raise unless what arrives now is for this connection; after a failure psycopg reads on."""
        if not self.lane.holding:
            raise errors.OperationalError("nothing was sent on this connection")

    def through(self, query: bytes, step: Callable[[], Any]) -> _Gen:
        """Run *step*, which sends *query*, when its turn comes, or give a `_Tag` in its stead."""

        send = partial(self._send, query, step)
        if self.runs():  # a failure, or a cancellation, has left it so: libpq takes nothing
            return (yield _Call(send))
        text = query.decode(self._encoding)
        return (yield _Call(lambda: self.lane.run(text, send, _Tag)))

    def aside(self, step: Callable[[], Any]) -> _Gen:
        """Run *step*, which sends what is no statement and does nothing, when its turn comes."""
        return (yield _Call(lambda: self.lane.prepare(partial(self._send, b"aside", step))))

    async def _send(self, query: bytes, step: Callable[[], Any]) -> Any:
        self._granted = query
        pipeline, self._pipeline = self._pipeline, None
        try:
            return await self._drive(step())
        finally:
            self._granted = None
            self._pipeline = pipeline

    def passes(self, query: bytes) -> None:
        """Raise unless *query* may go to the server now."""
        if self._granted == query:
            return
        if not self.lane.holding:
            raise SandboxUnsupportedError(_NOT_ADOPTED)
        script = read(query.decode(self._encoding))
        if not script.plain:
            raise SandboxUnsupportedError(_CONTROL_WITHIN)
        if script.schema:
            self.shared.schema_changed()
        self.lane.used = True
        self.lane.keeps_hold()  # what comes in several messages lends nothing
        self.shared.acts += 1

    @asynccontextmanager
    async def alone(self) -> AsyncGenerator[None]:
        """Have the connection for what takes several messages, and is done or undone as a whole."""
        if not self._autocommit or self.lane.in_transaction:
            yield
            return
        await self.lane.begin()
        self.lane.keeps_hold()
        try:
            yield
        except BaseException:
            await self.recover()
            if not self.runs():  # else the pool closes it
                with suppress(errors.Error):  # what the server did lasts, whoever failed then
                    await self.lane.commit()
            raise
        await self.lane.commit()

    @property
    def _encoding(self) -> str:
        pgconn: Any = self.pgconn
        return cast(str, pgconn._encoding)

    # -- what psycopg itself sends -----------------------------------------------------------------

    def _exec_command(self, command: Any, result_format: Format = Format.TEXT) -> _Gen:
        self._check_connection_ok()
        if isinstance(command, Composable):
            command = command.as_bytes(self)
        elif isinstance(command, str):
            command = command.encode(self._encoding)
        step = partial(super()._exec_command, command, result_format)
        if self._granted is not None:
            return (yield from step())
        result = yield from self.through(command, step)
        return None if isinstance(result, _Tag) else result

    def _start_query(self) -> _Gen:
        if not self._autocommit and not self.lane.in_transaction:
            yield from self._exec_command(self._get_tx_start_command())
        if self.lane.in_transaction and not self.lane.holding:
            yield _Call(self.lane.regain)

    def _check_intrans_gen(self, attribute: str) -> _Gen:
        if self.lane.in_transaction:
            yield from super()._check_intrans_gen(attribute)

    def _rollback_gen(self) -> _Gen:
        yield from super()._rollback_gen()
        if self.lane.in_transaction:  # psycopg left it at that: something ended the real one
            yield from self._exec_command(b"ROLLBACK")

    def _deallocate(self, name: bytes | None) -> _Gen:
        step = partial(super()._deallocate, name)
        yield from self.aside(step)

    def _tpc_begin_gen(self, xid: Any) -> _Gen:
        yield from self._exec_command(b"PREPARE TRANSACTION 'lifekit'")

    @asynccontextmanager
    async def _pipeline_nolock(self) -> AsyncGenerator[Any]:
        # By executemany(): one statement after another. Cancelled in pipeline mode, the real
        # connection could not be brought back.
        async with self.alone():
            self._pipeline = pipeline = cast(Any, _Unpiped())
            try:
                yield pipeline
            finally:
                self._pipeline = None


class _Unpiped:
    """A pipeline in which nothing waits."""

    def _communicate_gen(self) -> _Gen:
        yield from ()

    def _fetch_gen(self, *, flush: bool) -> _Gen:
        yield from ()


def _part(gen: Any, step: Callable[[], Any]) -> Generator[Any, Any, tuple[_Call | None, Any]]:
    """Run *gen* until it ends, or yields what is to be awaited."""
    try:
        wanted = step()
        while not isinstance(wanted, _Call):
            wanted = gen.send((yield wanted))
    except StopIteration as end:
        return None, end.value
    return wanted, None


def _left(pgconn: Any) -> _Gen:
    """Read what a statement has left that was cancelled; a COPY that began nevertheless is ended."""
    results = yield from generators.fetch_many(pgconn)
    match results[-1].status if results else None:
        case ExecStatus.COPY_IN:
            yield from generators.copy_end(pgconn, b"cancelled")
        case ExecStatus.COPY_OUT:
            while isinstance((yield from generators.copy_from(pgconn)), memoryview):
                pass
        case _:
            pass
    return results


def _caught(gen: Any) -> Generator[Any, Any, tuple[Any, Exception | None]]:
    # After a cancellation psycopg waits for the end, and an error would make it close the connection.
    try:
        return cast(Any, (yield from gen)), None
    except errors.Error as error:
        return None, error


async def _nothing() -> None:
    return None


class _LaneCursor:
    """What the class of a cursor is mixed with."""

    __slots__ = ()
    _conn: Any

    def _maybe_prepare_gen(self, pgq: Any, **options: Any) -> _Gen:
        this, parent = cast(Any, self), cast(Any, super())
        step = partial(parent._maybe_prepare_gen, pgq, **options)
        run: _Gen = self._conn.through(pgq.query, step)
        tag = yield from run
        if isinstance(tag, _Tag):
            this._query = pgq
            this._set_results([this._pgconn.make_empty_result(ExecStatus.COMMAND_OK)])
            this._statusmessage = tag.encode()
            if tag == "ROLLBACK":
                self._conn._prepared.clear()

    # All that a cursor sends goes by one of these.

    def _execute_send(self, query: Any, **options: Any) -> None:
        self._conn.passes(query.query)
        cast(Any, super())._execute_send(query, **options)

    def _send_prepare(self, name: bytes, query: Any) -> None:
        self._conn.passes(query.query)
        cast(Any, super())._send_prepare(name, query)

    def _send_query_prepared(self, name: bytes, pgq: Any, **options: Any) -> None:
        self._conn.passes(pgq.query)
        cast(Any, super())._send_query_prepared(name, pgq, **options)

    def _stream_fetchone_gen(self, first: bool) -> _Gen:
        self._conn.has_its_turn()
        fetch: _Gen = cast(Any, super())._stream_fetchone_gen(first)
        return (yield from fetch)

    async def stream(self, *args: Any, **options: Any) -> AsyncIterator[Any]:
        """Iterate row-by-row on a result from the database."""
        async with self._conn.alone(), aclosing(cast(Any, super()).stream(*args, **options)) as rows:
            async for row in rows:
                yield row

    @asynccontextmanager
    async def copy(self, *args: Any, **options: Any) -> AsyncGenerator[Any]:
        """Initiate a COPY operation and return an object to manage it."""
        async with self._conn.alone(), cast(Any, super()).copy(*args, **options) as copy:
            yield copy


class _LaneServerCursor(_LaneCursor):
    """What the class of a server-side cursor is mixed with."""

    __slots__ = ()

    async def execute(self, *args: Any, **options: Any) -> Any:
        """Open a cursor to execute a query to the database."""
        parent = cast(Any, super())
        if not cast(Any, self)._withhold:
            return await parent.execute(*args, **options)
        async with self._conn.alone():
            return await parent.execute(*args, **options)

    def _declare_gen(self, query: Any, *args: Any, **options: Any) -> _Gen:
        conn = self._conn
        if not conn._autocommit or conn.lane.in_transaction:
            yield from cast(Any, super())._declare_gen(query, *args, **options)
        else:
            raise conn.shared.wire.error(
                NO_TRANSACTION, "DECLARE CURSOR can only be used in transaction blocks"
            )

    def _describe_gen(self) -> _Gen:
        yield from self._conn.aside(cast(Any, super())._describe_gen)

    def _fetch_gen(self, num: int | None) -> _Gen:
        self._still_there()
        fetch: _Gen = cast(Any, super())._fetch_gen(num)
        return (yield from fetch)

    def _scroll_gen(self, value: int, mode: str) -> _Gen:
        self._still_there()
        yield from cast(Any, super())._scroll_gen(value, mode)

    def _close_gen(self) -> _Gen:
        if cast(Any, self)._withhold or self._conn.lane.in_transaction:
            yield from cast(Any, super())._close_gen()

    def _still_there(self) -> None:
        # The server would still have it: what ended was not a transaction to it.
        this = cast(Any, self)
        if this._described and not this._withhold and not self._conn.lane.in_transaction:
            message = f'cursor "{this._name}" does not exist'
            raise self._conn.shared.wire.error(_NO_CURSOR, message)


def _adopted(cursor: Any) -> Any:
    if not isinstance(cursor, _LaneCursor):
        cursor.__class__ = _mixed(cursor.__class__)
    return cursor


@functools.cache
def _mixed(kind: Any) -> type:
    server_side = ServerCursorMixin in kind.__mro__
    mixin: Any = _LaneServerCursor if server_side else _LaneCursor
    return type(kind.__name__, (mixin, kind), {"__slots__": (), "__doc__": kind.__doc__})


_OVER = (
    "this connection was given back inside a sandbox that has ended. Use it no longer than for the "
    "block that acquires it: async with pool.connection() as …."
)
_NO_PIPELINE = (
    "pipeline mode does not work in the sandbox, where connections share a real one. Use "
    f"executemany(), which does, or run the test without a sandbox: {ALONE}."
)
_NOT_ADOPTED = (
    "this cursor was not made by its connection, which has to know of it in the sandbox: "
    "connection.cursor(), with connection.cursor_factory for another class."
)
_CONTROL_WITHIN = (
    "the sandbox takes transaction control by execute() alone: not by stream(), copy() or a "
    "server-side cursor."
)
