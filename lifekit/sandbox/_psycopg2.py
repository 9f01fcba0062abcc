"""The real connection of aiopg's sandbox, and the cursors of psycopg2 that its lanes have of it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import aiopg
import psycopg2
from psycopg2 import errors, extensions

from lifekit._errors import SandboxEscapedError, SandboxUnsupportedError

from ._shared import Shared
from ._uncut import Uncut

_Raw: Any = extensions.connection
_RawCursor: Any = extensions.cursor
_quote_ident: Any = extensions.quote_ident  # pyright: ignore

_STOPPING = 5.0
"""Seconds that a statement may take to stop once it is cancelled."""


class RealConnection(aiopg.Connection):
    """The real connection of a sandbox, and what its lanes share."""

    def __init__(self, pool: Any) -> None:
        options = dict(pool._conn_kwargs)
        options["connection_factory"] = _mixed(_SharedRaw, options.get("connection_factory"), _Raw)
        super().__init__(
            pool._dsn,
            pool._timeout,
            enable_json=pool._enable_json,
            enable_hstore=pool._enable_hstore,
            enable_uuid=pool._enable_uuid,
            **options,
        )
        self.shared: Shared = Shared(self)
        self._pool = pool
        self._own: Any = None

    @property
    def _conn(self) -> Any:
        self.shared_raw.reached = None
        return self.shared_raw

    @_conn.setter
    def _conn(self, raw: Any) -> None:
        self.shared_raw = raw

    def lost(self) -> bool:
        """Return whether the connection is gone."""
        return bool(self.closed)

    async def control(self, sql: str) -> None:
        """Send statements in one message; whatever they return is dropped."""
        if self._own is None:
            self._own = self._conn.cursor(cursor_factory=_RawCursor)
        await self.run(self._own, sql, [])

    async def ask(self, sql: str) -> str | None:
        """Return the one value that a query gives, a text; None for NULL, and for no row."""
        await self.control(sql)
        row = self._own.fetchone()
        return cast("str | None", row[0] if row else None)

    def error(self, sqlstate: str, message: str) -> Exception:
        """Return the error by which psycopg2 tells of a refusal by the server."""
        refusal: Any = errors.lookup(sqlstate)(f"{message}\n")
        refusal.__setstate__({"pgcode": sqlstate, "pgerror": f"ERROR:  {message}\n"})
        return cast(Exception, refusal)

    async def run(self, cursor: Any, sql: str | bytes, notices: list[str]) -> None:
        """Execute *sql*; cancelled, it waits until the server has let it go."""
        waiter: asyncio.Future[None] = self._create_waiter("lifekit")
        raw = self._conn
        raw.notices = notices
        try:
            _RawCursor.execute(cursor, sql)
            self._ready(self._weakref)
            await asyncio.shield(waiter)
        except asyncio.CancelledError:
            await Uncut(self._stop(waiter))
            raise
        except psycopg2.ProgrammingError as error:
            if str(error).startswith("can't execute COPY"):
                self.close()  # it is of no use any more
            raise
        finally:
            self._waiter = None

    async def _stop(self, waiter: asyncio.Future[None]) -> None:
        if not waiter.done():
            asking = asyncio.create_task(self._cancel_on_server())
            await asyncio.wait([waiter, asking], timeout=_STOPPING)
            asking.cancel()
            if not waiter.done():
                self.close()
        waiter.exception()

    async def _cancel_on_server(self) -> None:
        # Not by libpq's own request, for which the whole process waits.
        pool = self._pool
        features = dict.fromkeys(["enable_json", "enable_hstore", "enable_uuid"], False)
        with suppress(psycopg2.Error, TimeoutError):
            async with (
                aiopg.connect(pool._dsn, timeout=_STOPPING, **features, **pool._conn_kwargs) as beside,
                beside.cursor(cursor_factory=_RawCursor) as cursor,
            ):
                await cursor.execute("SELECT pg_cancel_backend(%s)", [self._conn.get_backend_pid()])


class _SharedRaw:
    """What the psycopg2 connection is mixed with: it tells each lane what is its own.

    Functions of psycopg2 want a connection that is real, so that all lanes show the same one.
    """

    reached: Any = None
    """The `LaneConnection` that showed it most recently; None when that was the real connection."""

    def cursor(self, name: Any = None, cursor_factory: Any = None, **options: Any) -> Any:
        base = cast(Any, super())
        if self.reached is None:
            return base.cursor(name, cursor_factory, **options)
        if self.reached.closed:
            raise psycopg2.InterfaceError("connection already closed")
        kind = _mixed(Gate, cursor_factory, type(base.cursor()))
        made = base.cursor(name, cursor_factory=kind, **options)
        made.lane = self.reached
        return made

    @property
    def closed(self) -> int:
        gone = self.reached is not None and self.reached.lane.closed
        return 1 if gone else cast(int, cast(Any, super()).closed)

    def close(self) -> None:
        (cast(Any, super()) if self.reached is None else self.reached).close()

    def isexecuting(self) -> bool:
        if self.reached is None:
            return cast(bool, cast(Any, super()).isexecuting())
        return cast(bool, self.reached.executes())

    def cancel(self) -> None:
        if self.reached is None or self.reached.executes_now():
            cast(Any, super()).cancel()

    def get_transaction_status(self) -> int:
        if self.reached is not None and self.reached.lane.closed:
            return extensions.TRANSACTION_STATUS_UNKNOWN
        if self.reached is None or self.reached.lane.holding:
            return cast(int, cast(Any, super()).get_transaction_status())
        if self.reached.executes():
            return extensions.TRANSACTION_STATUS_ACTIVE
        if self.reached.lane.in_transaction:
            return extensions.TRANSACTION_STATUS_INTRANS
        return extensions.TRANSACTION_STATUS_IDLE

    @property
    def notices(self) -> Any:
        return cast(Any, super()).notices if self.reached is None else self.reached.noticed

    @notices.setter
    def notices(self, notices: Any) -> None:
        if self.reached is None:
            _Raw.notices.__set__(self, notices)
        else:
            self.reached.noticed = notices


def _reading(name: str) -> Any:
    """Make the method *name* of a cursor, which reads rows."""
    read: Callable[..., Any] = getattr(_RawCursor, name)

    def method(self: Gate, *args: Any, **options: Any) -> Any:
        self.refuse_closed()
        if self.told is not None:
            raise psycopg2.ProgrammingError("no results to fetch")
        return read(self, *args, **options)

    return method


def _telling(name: str, otherwise: object) -> Any:
    """Make the attribute *name* of a cursor; *otherwise* is what a command leaves there."""
    attribute: Any = getattr(_RawCursor, name)
    return property(lambda self: attribute.__get__(self) if self.told is None else otherwise)


class Gate(_RawCursor):  # type: ignore[misc]
    """What the cursors of lanes are mixed with: they give away what they are to execute."""

    lane: Any = None
    told: str | None = None
    """The command tag of what was not sent."""
    query: bytes | None = None

    def execute(self, query: Any, vars: Any = None) -> None:  # noqa: A002
        """Give the text, as the server would get it, to the lane."""
        self.refuse_closed()
        if query:
            self.query = None
        text: bytes = _RawCursor.mogrify(self, query, vars)
        if not hasattr(self.lane, "take"):
            raise SandboxEscapedError(
                "this cursor was made inside a sandbox that has ended. Make one when it is needed, for "
                "as long as it is: async with connection.cursor() as cursor."
            )
        self.lane.take(self, text)
        self.query = text

    def callproc(self, procname: str, parameters: Any = None) -> Any:
        """Give the lane the SELECT that psycopg2 makes of it."""
        values: Any = parameters or []
        places = ["%s"] * len(values)
        if isinstance(values, dict):
            named = cast("dict[str, Any]", values)
            places = [f"{_quote_ident(name, self)}:=%s" for name in named]
            values = list(named.values())
        Gate.execute(self, f"SELECT * FROM {procname}({','.join(places)})", values or None)
        return parameters

    def refuse_closed(self) -> None:
        """Raise if it, or its connection, is closed."""
        if self.closed:
            raise psycopg2.InterfaceError("cursor already closed")

    def scroll(self, value: int, mode: str = "relative") -> None:
        """Go to another row; what was not sent has none."""
        self.refuse_closed()
        if self.told is not None and mode in ("relative", "absolute"):
            raise psycopg2.ProgrammingError("scroll destination out of bounds")
        _RawCursor.scroll(self, value, mode)

    def nextset(self) -> None:
        """Refuse, as psycopg2 does."""
        self.refuse_closed()
        _RawCursor.nextset(self)

    @property
    def closed(self) -> bool:
        """Whether it, or its connection, is closed."""
        return bool(_RawCursor.closed.__get__(self) or (self.lane is not None and self.lane.closed))

    @property
    def statusmessage(self) -> str | None:
        """The command tag, also of what was not sent."""
        sent: str | None = _RawCursor.statusmessage.__get__(self)
        return sent if self.told is None else self.told

    fetchone = _reading("fetchone")
    fetchmany = _reading("fetchmany")
    fetchall = _reading("fetchall")
    __next__ = _reading("__next__")
    description = _telling("description", None)
    rowcount = _telling("rowcount", -1)
    rownumber = _telling("rownumber", 0)


def _mixed(added: type, given: Any, default: Any) -> Any:
    """Return the class *added* to what the application gave as its factory."""
    if given is not None and not isinstance(given, type):
        raise SandboxUnsupportedError(
            f"the factory {given!r} is not a class, and the sandbox extends classes only. Give it one."
        )
    return _made(added, given or default)


@functools.cache
def _made(added: type, kind: Any) -> Any:
    # A user's kind of cursor sees what lies below it through the gate.
    bases = (added,) if kind is _RawCursor else (kind, added) if added is Gate else (added, kind)
    return type(kind.__name__, bases, {"__module__": kind.__module__, "__doc__": kind.__doc__})
