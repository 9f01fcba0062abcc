"""One real connection, in one transaction that never commits, for all that an application does.

The application sees connections of its own, the lanes. What they send goes over the real connection,
one statement at a time, behind a savepoint:

- A statement outside of a transaction has the savepoint to itself: its failure undoes it alone.
- A transaction of the application is the savepoint from its BEGIN to its end, and until then the lane
  has the connection to itself. BEGIN, COMMIT and ROLLBACK never reach the server.
- What is to be done with the savepoint afterwards waits for the next statement, and goes before that
  in one message; the last of it the end of the test makes needless.
- The end of a block begins the real transaction of the next, which saves that a message if it is soon.

Nobody else knows the savepoint's name. Whatever else might end the real transaction takes the savepoint
with it, which the next use of it notices, at the end of the block at the latest.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from enum import Enum, auto
from itertools import count
from typing import TYPE_CHECKING, Protocol

from lifekit._errors import (
    SandboxBusyError,
    SandboxEscapedError,
    SandboxUnsupportedError,
    summary,
)

from ._holders import ALONE, busy, waits_for_this
from ._uncut import Uncut

if TYPE_CHECKING:
    from ._lane import Lane

PATIENCE = 5.0
"""Seconds that a statement waits for a transaction in which nothing happens."""

FRESH = 0.05
"""Seconds for which a block may use the real transaction that the end of the last one began."""

SYNTAX_ERROR = "42601"
ACTIVE_TRANSACTION = "25001"
NO_TRANSACTION = "25P01"
FAILED_TRANSACTION = "25P02"
INVALID_TERMINATION = "2D000"
NO_SAVEPOINT = "3B001"
LOCK_NOT_AVAILABLE = "55P03"

_LIMITS = """SELECT set_config(name, CASE name WHEN 'lock_timeout' THEN '9999' ELSE '0' END, false)
FROM pg_catalog.pg_settings WHERE name = 'lock_timeout' AND setting = '0' OR setting <> '0'
AND name IN ('idle_in_transaction_session_timeout', 'idle_session_timeout', 'transaction_timeout')"""
"""The real transaction may be idle and long, and waits for no lock for ever."""
_HAS_DEFERRABLE = """SELECT 'yes' FROM pg_catalog.pg_constraint WHERE condeferrable LIMIT 1"""
_DEFER_AGAIN = """DO $lifekit$ DECLARE names text; BEGIN
SELECT string_agg(DISTINCT format('%I.%I', nspname, conname), ', ') INTO names
FROM pg_catalog.pg_constraint JOIN pg_catalog.pg_namespace AS n ON n.oid = connamespace
WHERE condeferred AND conparentid = 0;
IF names IS NOT NULL THEN EXECUTE 'SET CONSTRAINTS ' || names || ' DEFERRED'; END IF;
EXCEPTION WHEN insufficient_privilege THEN NULL; END $lifekit$"""
_CLOSE_CURSORS = """DO $lifekit$ DECLARE commands text; BEGIN
SELECT string_agg('CLOSE ' || quote_ident(name), ';') INTO commands FROM pg_catalog.pg_cursors
WHERE NOT is_holdable;
IF commands IS NOT NULL THEN EXECUTE commands; END IF; END $lifekit$"""
_numbers = count()


class Wire(Protocol):
    """The real connection, as its driver has it."""

    async def control(self, sql: str) -> None:
        """Send statements in one message; whatever they return is dropped."""

    async def ask(self, sql: str) -> str | None:
        """Return the one value that a query gives, a text or NULL."""
        ...

    def error(self, sqlstate: str, message: str) -> Exception:
        """Return the error by which the driver tells of a refusal by the server."""
        ...

    def lost(self) -> bool:
        """Return whether the connection is gone."""
        ...


class Savepoint(Enum):
    """How the savepoint stands that a statement outside of a transaction, or a transaction, has."""

    NONE = auto()  # the block has no real transaction yet
    CLEAN = auto()  # nothing was done since it was set
    KEPT = auto()  # what was done since has to stay
    UNDONE = auto()  # what was done since has to go


class Shared:
    """The real connection: whose turn it is, and how the savepoint stands."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.savepoint: Savepoint = Savepoint.NONE
        self.deferrable: bool | None = None  # None where it has to be asked
        self.dirty: bool = False
        self.wrote: bool = False  # or may have, since the block began
        self.acts: int = 0
        self._savepoint = f"lifekit_{secrets.token_hex(8)}"
        self._begun_at: float | None = None  # where the real transaction runs
        self._used = False
        self._clock = asyncio.get_running_loop().time
        self._lock = asyncio.Lock()
        self._holder: Lane | None = None
        self.waiting: int = 0
        self._escape: BaseException | None = None
        self._names: set[str] = set()
        self._limited = False
        self.is_open: bool = False  # in a block

    def begin(self) -> None:
        """Begin a block; what is sent for it goes with its first statement."""
        self.is_open = True
        # now() is when the real transaction began.
        if self._begun_at is not None and self._clock() - self._begun_at <= FRESH:
            self.savepoint = Savepoint.CLEAN

    async def _begin(self) -> None:
        if not self._limited:
            await self.wire.control(_LIMITS)
            self._limited = True
        undo = "" if self._begun_at is None else "ROLLBACK; "
        await self.wire.control(f"{undo}BEGIN; SAVEPOINT {self._savepoint}")
        self._begun_at = self._clock()
        self.savepoint = Savepoint.CLEAN

    async def end(self) -> None:
        """Undo everything, once all its lanes are given back or abandoned.

        Raises:
            SandboxEscapedError: The real transaction was ended by something else.
        """
        self.is_open = False
        async with self._lock:
            await self._end()

    async def _end(self) -> None:
        used, self._used = self._used, False
        escape, self._escape = self._escape, None
        self.savepoint = Savepoint.NONE
        if not used or self._begun_at is None or self.wire.lost():
            return
        undo = f"ROLLBACK TO {self._savepoint}"
        # What a rollback leaves: locks of the session, what sequences gave, prepared statements.
        rest = ["SELECT pg_advisory_unlock_all()", "DISCARD SEQUENCES"] if self.wrote else []
        rest += [f"DEALLOCATE {name}" for name in self._names]
        again = [] if self.dirty else ["BEGIN", f"SAVEPOINT {self._savepoint}"]
        self._names.clear()
        self.wrote = False
        try:
            await self.wire.control("; ".join([undo, *rest, "ROLLBACK", *again]))
            self._begun_at = self._clock() if again else None
        except Exception as error:
            self._begun_at = None
            if self.wire.lost():  # then the server has undone it
                return
            with suppress(Exception):
                await self.wire.control("; ".join(["ROLLBACK", *rest]))
            escape = escape or error
        if escape is not None:
            raise SandboxEscapedError(_ESCAPED) from escape

    def schema_changed(self) -> None:
        """Forget what is known of the schema, for a statement may change it."""
        self.dirty = True
        self.deferrable = None

    def unique_name(self) -> str:
        """Return a name for a prepared statement, which the end of the block deallocates."""
        name = f"lifekit_{next(_numbers)}"
        self._names.add(name)
        return name

    def forget_name(self, name: str) -> None:
        """Note that the statement of that name was deallocated."""
        self._names.discard(name)

    # -- whose turn it is --------------------------------------------------------------------------

    def busy_for(self, lane: Lane) -> bool:
        """Return whether somebody else has the connection."""
        holder = self._holder
        if holder is lane or (holder is not None and holder.lends()):
            return False
        return self._lock.locked() or self.waiting > 0

    async def turn(self, lane: Lane) -> None:
        """Wait until the connection is free, and take it."""
        if self._holder is not None and self._holder.lends():
            self._holder.holding = False
            self.savepoint = Savepoint.CLEAN
        elif self._lock.locked() or self.waiting:  # a lock that is free may be promised already
            self.waiting += 1
            try:
                await self._wait(lane)
            finally:
                self.waiting -= 1
        else:
            await self._lock.acquire()
        if lane.closed or not self.is_open:
            self._holder = None
            self._lock.release()
            raise SandboxEscapedError(f"the sandbox ended before this statement ran, on {lane}")
        self._holder = lane
        self.acts += 1

    def leave(self, lane: Lane) -> None:
        """Give the connection back."""
        if self._holder is lane:
            self._holder = None
            self._lock.release()

    def rests(self, lane: Lane) -> None:
        """Let others have the connection, if they wait and the lane's transaction lends it."""
        if lane.lends():
            lane.holding = False
            self.savepoint = Savepoint.CLEAN
            self.leave(lane)

    async def _wait(self, lane: Lane) -> None:
        while True:
            holder = self._holder
            if holder is not None and holder.in_transaction and waits_for_this(holder.task):
                raise busy(lane, holder)
            acts = self.acts
            # Where nobody has it, somebody was promised it, and will have it soon.
            seconds = PATIENCE if holder is not None else 0.01
            try:
                async with asyncio.timeout(seconds):
                    await self._lock.acquire()
                return
            except TimeoutError:
                if acts == self.acts and holder is not None and holder.in_transaction:
                    raise busy(lane, holder, PATIENCE) from None

    # -- the savepoint -----------------------------------------------------------------------------

    async def clean_savepoint(self) -> None:
        """Set the savepoint anew, so that what follows can be undone alone."""
        self._used = True
        match self.savepoint:
            case Savepoint.CLEAN:
                return
            case Savepoint.NONE:
                await Uncut(self._begin())
                return
            case Savepoint.KEPT:
                sql = f"RELEASE SAVEPOINT {self._savepoint}; SAVEPOINT {self._savepoint}"
            case Savepoint.UNDONE:
                sql = f"ROLLBACK TO SAVEPOINT {self._savepoint}"
        await self.control(sql, leads_to=Savepoint.CLEAN)

    async def defers(self) -> bool:
        """Return whether a commit may have constraints to check."""
        if self.deferrable is None:
            self.deferrable = await Uncut(self.wire.ask(_HAS_DEFERRABLE)) is not None
        return self.deferrable

    async def setting(self, name: str) -> str:
        """Return the value of a setting."""
        asked = f"SELECT current_setting({literal(name)}, true)"
        return await Uncut(self.wire.ask(asked)) or ""

    async def check_deferred(self, then: str) -> None:
        """Check the constraints that a commit would check, and defer again what begins deferred."""
        try:
            await self.control(f"SET CONSTRAINTS ALL IMMEDIATE; {then}; {_DEFER_AGAIN}")
        except BaseException:
            self.savepoint = Savepoint.UNDONE
            raise

    async def set_limits(self) -> None:
        """Let the real transaction be idle, and long, but wait for no lock for ever."""
        await self.control(_LIMITS)

    async def close_cursors(self) -> None:
        """Close the cursors that end with a transaction."""
        await self.control(_CLOSE_CURSORS)

    async def control(self, sql: str, *, leads_to: Savepoint | None = None) -> None:
        """Send the sandbox's own statements."""
        try:
            await Uncut(self._send(sql, leads_to))
        except Exception as error:
            if sqlstate(error) in {NO_TRANSACTION, NO_SAVEPOINT}:
                self._escape = error
                raise SandboxEscapedError(_ESCAPED) from error
            raise

    async def _send(self, sql: str, leads_to: Savepoint | None) -> None:
        await self.wire.control(sql)
        if leads_to is not None:  # also when nobody waits for it any more
            self.savepoint = leads_to

    def explain(self, error: BaseException, *, in_transaction: bool) -> None:
        """Raise the sandbox's own error where a statement failed only because of the sandbox."""
        code = sqlstate(error)
        if code in {ACTIVE_TRANSACTION, INVALID_TERMINATION} and not in_transaction:
            raise SandboxUnsupportedError(f"{summary(error)}\n{_NEEDS_NONE}") from error
        if code == LOCK_NOT_AVAILABLE and "lock timeout" in str(error):
            raise SandboxBusyError(f"{summary(error)}\n{_LOCKED}") from error


def sqlstate(error: BaseException) -> str | None:
    """Return the code that PostgreSQL gives an error."""
    found: str | None = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return found


def literal(value: str) -> str:
    """Return a text as SQL has it."""
    quoted = value.replace("'", "''")
    return f"'{quoted}'" if "\\" not in value else "E'" + quoted.replace("\\", "\\\\") + "'"


_ESCAPED = (
    "something ended the sandbox's transaction behind its back, and what was done before may have been "
    "committed: look at the database. The likely culprit is a COMMIT or ROLLBACK where the sandbox "
    "could not see it. Use the driver's own calls for transactions, or run the test without a sandbox: "
    f"{ALONE}."
)
_LOCKED = (
    "Another transaction has the lock and did not end within ten seconds: in the sandbox most likely "
    "that of another pool in this test, which has a transaction of its own, or of another test process "
    "on the same database that uses the same rows or unique keys. Let both go through one pool, or let "
    f"each process make keys of its own; or run the test without a sandbox: {ALONE}."
)
_NEEDS_NONE = (
    "PostgreSQL runs this outside of transactions only, and in the sandbox all runs inside one. Run "
    f"the test without a sandbox: {ALONE}."
)
