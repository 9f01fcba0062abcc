"""One real connection, in one transaction that never commits, for all that an application does.

The application sees connections of its own, the lanes. What they send goes over the real connection,
one statement at a time, behind a savepoint:

- A statement outside of a transaction has the savepoint to itself: its failure undoes it alone.
- A transaction of the application is the savepoint from its BEGIN to its end, and until then the lane
  has the connection to itself. BEGIN, COMMIT and ROLLBACK never reach the server.
- What is to be done with the savepoint afterwards waits for the next statement, and goes before that
  in one message; the last of it the end of the test makes needless.

A guard savepoint stands around everything. Whatever else might end the real transaction takes the
guard with it, which the end of the block notices.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from enum import Enum, auto
from types import FrameType
from typing import Any, Protocol, TypeVar
from weakref import ref

from lifekit._errors import SandboxBusyError, SandboxEscapedError, SandboxUnsupportedError, summary
from lifekit._stack import Site, caller_frame, suspended_frames

from ._sql import Script, Statement, Verb, read

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds that a statement waits for a transaction in which nothing happens."""

ACTIVE_TRANSACTION = "25001"
NO_TRANSACTION = "25P01"
FAILED_TRANSACTION = "25P02"
INVALID_TERMINATION = "2D000"
NO_SAVEPOINT = "3B001"

_SAVEPOINT = "lifekit_savepoint"
_HAS_DEFERRABLE = "SELECT EXISTS (SELECT FROM pg_catalog.pg_constraint WHERE condeferrable)"
_DEFER_AGAIN = """DO $lifekit$ DECLARE names text; BEGIN
SELECT string_agg(DISTINCT format('%I.%I', nspname, conname), ', ') INTO names
FROM pg_catalog.pg_constraint JOIN pg_catalog.pg_namespace AS n ON n.oid = connamespace
WHERE condeferred AND conparentid = 0;
IF names IS NOT NULL THEN EXECUTE 'SET CONSTRAINTS ' || names || ' DEFERRED'; END IF; END $lifekit$"""


class Wire(Protocol):
    """The real connection, as its driver has it."""

    async def control(self, sql: str) -> None:
        """Send statements in one message; whatever they return is dropped."""

    async def ask(self, sql: str) -> bool:
        """Return the one value that a query gives."""

    def error(self, sqlstate: str, message: str) -> Exception:
        """Return the error by which the driver tells of a refusal by the server."""

    def lost(self) -> bool:
        """Return whether the connection is gone."""


class Savepoint(Enum):
    """How the savepoint stands that a statement outside of a transaction, or a transaction, has."""

    NONE = auto()  # not even the real transaction began
    CLEAN = auto()  # nothing was done since it was set
    KEPT = auto()  # what was done since has to stay
    UNDONE = auto()  # what was done since has to go


class Lane:
    """One of the application's connections."""

    def __init__(self, shared: Shared, package: str) -> None:
        self.shared = shared
        self.in_transaction = False
        self.read_only = False
        self.used = False  # since the transaction began
        self.doubtful = False  # whether the transaction still works
        self.touched_session = False
        self.closed = False
        self._package = package
        self._site: Site | None = None
        self._task: Callable[[], asyncio.Task[Any] | None] = _nobody

    def acquired(self, frame: FrameType | None = None) -> None:
        """Note who has it from now on."""
        self._site = Site(frame or caller_frame(self._package, "asyncio"))
        self._is_used_here()

    def _is_used_here(self) -> None:
        task = _current_task()
        self._task = ref(task) if task is not None else _nobody

    @property
    def task(self) -> asyncio.Task[Any] | None:
        """The task that acquired it, or began its transaction."""
        return self._task()

    def __str__(self) -> str:
        task = self._task()
        name = f" (task {task.get_name()!r})" if task is not None else ""
        return f"{self._site or 'an unknown line'}{name}"

    def must_wait(self) -> bool:
        """Return whether its next statement can't run at once."""
        return self.shared.busy_for(self)

    def unique_name(self) -> str:
        """Return a name for a statement that has none, which the end of the block deallocates."""
        return self.shared.unique_name()

    def holder(self) -> str:
        """Return who has it: the line that acquired it, the task, its coroutine, where that stands."""
        task = self._task()
        if task is None or task.done() or task is _current_task():
            return str(self)
        coroutine = task.get_coro()
        name = getattr(coroutine, "__qualname__", type(coroutine).__name__)
        # The last line that is not asyncio's, where it waits in the end.
        stands = [
            frame
            for frame in suspended_frames(coroutine)
            if frame.f_globals.get("__name__", "").partition(".")[0] not in sys.stdlib_module_names
        ]
        return f"{self}, which runs {name}{f' and stands at {Site(stands[-1])}' if stands else ''}"

    async def run(self, text: str, send: Callable[[], Awaitable[T]], answer: Callable[[str], T]) -> T:
        """Run what one message says.

        Args:
            text: The SQL that is sent.
            send: Sends it over the real connection.
            answer: Makes what *send* would return of the command tag, where nothing is sent.
        """
        script = read(text)
        if script.plain:
            return await self._plain(script, send)
        if len(script.statements) == 1:
            return await self._controlling(script, script.statements[0], send, answer)
        raise SandboxUnsupportedError(
            "this text has transaction control among other statements, and the sandbox takes them one "
            "by one: send each by itself, or use the driver's own calls for transactions.\n"
            f"  {_shortened(text)}"
        )

    async def run_script(self, text: str, send: Callable[[str], Awaitable[str]]) -> str:
        """Run a message that may hold several statements; *send* sends one text and gives its tag."""
        script = read(text)
        if script.plain or len(script.statements) == 1:
            return await self.run(text, lambda: send(text), str)
        self._refuse_mixed(script, text)
        tag = ""
        for statement in script.statements:
            tag = await self.run(statement.text, lambda: send(statement.text), str)  # noqa: B023
        return tag

    def _refuse_mixed(self, script: Script, text: str) -> None:
        # Outside of BEGIN and COMMIT several statements of one message are one transaction, too, and
        # control in their midst splits it in ways that nobody means.
        inside = self.in_transaction
        for statement in script.statements:
            if statement.verb is Verb.BEGIN:
                inside = True
            elif statement.verb in {Verb.COMMIT, Verb.ROLLBACK}:
                inside = statement.chain
            elif not inside:
                raise SandboxUnsupportedError(
                    "this text begins or ends a transaction and has statements outside of it, which "
                    "the sandbox does not take apart: send them by themselves.\n"
                    f"  {_shortened(text)}"
                )

    async def _plain(self, script: Script, send: Callable[[], Awaitable[T]]) -> T:
        shared = self.shared
        if script.session:
            self.touched_session = True
        if script.schema:
            shared.schema_changed()
        if self.in_transaction:
            self.used = True
            shared.acts += 1
            try:
                return await send()
            except BaseException:
                self.doubtful = True
                raise
        await shared.turn(self)
        try:
            await shared.clean_savepoint()
            shared.savepoint = Savepoint.UNDONE
            try:
                result = await send()
            except Exception as error:
                shared.refuse_what_needs_no_transaction(error)
                raise
            shared.savepoint = Savepoint.KEPT
            if await shared.defers():
                await shared.check_deferred()
            return result
        finally:
            shared.leave(self)

    async def prepare(self, send: Callable[[], Awaitable[T]]) -> T:
        """Have a statement parsed: it may fail as if it ran, and does nothing."""
        if self.in_transaction:
            try:
                return await send()
            except BaseException:
                self.doubtful = True
                raise
        await self.shared.turn(self)
        try:
            await self.shared.clean_savepoint()
            self.shared.savepoint = Savepoint.UNDONE
            result = await send()
            self.shared.savepoint = Savepoint.CLEAN
            return result
        finally:
            self.shared.leave(self)

    async def aside(self, send: Callable[[], Awaitable[T]]) -> T:
        """Do what has nothing to do with transactions, when nobody else uses the connection."""
        if self.in_transaction:
            return await send()
        await self.shared.turn(self)
        try:
            return await send()
        finally:
            self.shared.leave(self)

    # -- transactions ------------------------------------------------------------------------------

    async def _controlling(
        self,
        script: Script,
        statement: Statement,
        send: Callable[[], Awaitable[T]],
        answer: Callable[[str], T],
    ) -> T:
        match statement.verb:
            case Verb.BEGIN:
                return answer(await self.begin(statement))
            case Verb.COMMIT:
                return answer(await self.commit(chain=statement.chain))
            case Verb.ROLLBACK:
                return answer(await self.rollback(chain=statement.chain))
            case Verb.SET_TRANSACTION:
                return answer(await self._set_transaction(statement))
            case Verb.SET_CONSTRAINTS:
                if not self.in_transaction:
                    return answer("SET CONSTRAINTS")  # with a warning that it does nothing
                self.shared.deferrable = True
            case Verb.SAVEPOINT | Verb.RELEASE | Verb.ROLLBACK_TO:
                self._refuse_savepoint(statement)
            case Verb.LISTEN | Verb.TWO_PHASE:
                raise SandboxUnsupportedError(_UNSUPPORTED[statement.verb])
            case _:
                pass
        return await self._plain(script, send)

    async def begin(self, modes: Statement | None = None) -> str:
        """Begin a transaction, and have the connection alone until it ends."""
        tag = "START TRANSACTION" if modes and modes.text.lstrip()[:1] in "sS" else "BEGIN"
        if self.in_transaction:
            if self.doubtful:
                await self.shared.control("SELECT")  # raises if the transaction has failed
            return tag
        await self.shared.turn(self)
        try:
            await self.shared.clean_savepoint()
            self.shared.savepoint = Savepoint.UNDONE
            self.read_only = bool(modes and modes.read_only)
            if self.read_only:
                await self.shared.control("SET TRANSACTION READ ONLY")
        except BaseException:
            self.shared.leave(self)
            raise
        self.in_transaction = True
        self.used = self.doubtful = False
        self._is_used_here()
        return tag

    async def commit(self, *, chain: bool = False) -> str:
        """End the transaction as a commit does, and return the command tag."""
        if not self.in_transaction:
            return "COMMIT"
        shared = self.shared
        if not await self._works():
            return await self.rollback(chain=chain)
        if self.read_only:  # it has nothing to keep, and only a rollback takes back READ ONLY
            shared.savepoint = Savepoint.UNDONE
        else:
            shared.savepoint = Savepoint.KEPT
            try:
                if await shared.defers():
                    await shared.check_deferred()
            except BaseException:
                await self._end(chain=False)
                raise
        await self._end(chain=chain)
        return "COMMIT"

    async def rollback(self, *, chain: bool = False) -> str:
        """Undo the transaction, and return the command tag."""
        if self.in_transaction:
            self.shared.savepoint = Savepoint.UNDONE
            await self._end(chain=chain)
        return "ROLLBACK"

    def abandon(self) -> None:
        """Undo the transaction of a connection that was closed."""
        self.closed = True
        if self.in_transaction:
            self.shared.savepoint = Savepoint.UNDONE
            self.in_transaction = False
            self.shared.leave(self)

    async def _end(self, *, chain: bool) -> None:
        if chain:
            await self.shared.clean_savepoint()
            self.shared.savepoint = Savepoint.UNDONE
            self.used = self.doubtful = False
            if self.read_only:
                await self.shared.control("SET TRANSACTION READ ONLY")
            return
        self.in_transaction = False
        self.shared.leave(self)

    async def _works(self) -> bool:
        if self.doubtful:
            try:
                await self.shared.control("SELECT")
            except Exception as error:
                if sqlstate(error) != FAILED_TRANSACTION:
                    raise
                return False
        return True

    async def _set_transaction(self, statement: Statement) -> str:
        if self.in_transaction:
            if statement.isolation is not None and self.used:
                self.doubtful = True
                raise self.shared.wire.error(
                    ACTIVE_TRANSACTION,
                    "SET TRANSACTION ISOLATION LEVEL must be called before any query",
                )
            if statement.read_only is not None:
                await self.shared.control(
                    f"SET TRANSACTION READ {'ONLY' if statement.read_only else 'WRITE'}"
                )
                self.read_only = statement.read_only and not self.used
        return "SET"

    def _refuse_savepoint(self, statement: Statement) -> None:
        if not self.in_transaction:
            what = {
                Verb.SAVEPOINT: "SAVEPOINT",
                Verb.RELEASE: "RELEASE SAVEPOINT",
                Verb.ROLLBACK_TO: "ROLLBACK TO SAVEPOINT",
            }[statement.verb]
            raise self.shared.wire.error(
                NO_TRANSACTION, f"{what} can only be used in transaction blocks"
            )
        if (statement.name or "").startswith("lifekit_"):
            raise SandboxUnsupportedError(
                f"a savepoint of the application can't be called {statement.name!r}: the sandbox's own "
                "are. Give it another name."
            )


class Shared:
    """The real connection: whose turn it is, and how the savepoint stands."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.savepoint = Savepoint.NONE
        self.deferrable: bool | None = None  # None where it has to be asked
        self.dirty_schema = False
        self.acts = 0
        self._guard = f"lifekit_guard_{secrets.token_hex(4)}"
        self._lock = asyncio.Lock()
        self._holder: Lane | None = None
        self._escape: BaseException | None = None
        self._names: list[str] = []

    async def end(self) -> None:
        """Undo everything, once all its lanes are given back or abandoned.

        Raises:
            SandboxEscapedError: The real transaction was ended by something else.
        """
        async with self._lock:
            await self._end()

    async def _end(self) -> None:
        escape, self._escape = self._escape, None
        begun, self.savepoint = self.savepoint is not Savepoint.NONE, Savepoint.NONE
        if not begun or self.wire.lost():
            return
        # What a rollback leaves: advisory locks of the session, and prepared statements.
        rest = ["SELECT pg_advisory_unlock_all()", *(f"DEALLOCATE {name}" for name in self._names)]
        self._names.clear()
        try:
            await self.wire.control("; ".join([f"ROLLBACK TO {self._guard}", "ROLLBACK", *rest]))
        except Exception as error:
            if self.wire.lost():  # then the server has undone it
                return
            with suppress(Exception):
                await self.wire.control("; ".join(["ROLLBACK", *rest]))
            escape = escape or error
        if escape is not None:
            raise SandboxEscapedError(_ESCAPED) from escape

    def schema_changed(self) -> None:
        """Forget what is known of the schema, for a statement may change it."""
        self.dirty_schema = True
        self.deferrable = None

    def unique_name(self) -> str:
        """Return a name for a prepared statement, which the end of the block deallocates."""
        self._names.append(f"lifekit_{len(self._names)}")
        return self._names[-1]

    # -- whose turn it is --------------------------------------------------------------------------

    def busy_for(self, lane: Lane) -> bool:
        """Return whether somebody else has the connection."""
        return self._lock.locked() and self._holder is not lane

    async def turn(self, lane: Lane) -> None:
        """Wait until the connection is free, and take it."""
        if self._lock.locked():
            await self._wait(lane)
        else:
            await self._lock.acquire()
        if lane.closed:
            self._lock.release()
            raise SandboxEscapedError(f"the sandbox ended before this statement ran, on {lane}")
        self._holder = lane
        self.acts += 1

    def leave(self, lane: Lane) -> None:
        """Give the connection back."""
        if self._holder is lane:
            self._holder = None
            self._lock.release()

    async def _wait(self, lane: Lane) -> None:
        while True:
            holder = self._holder
            if holder is not None and holder.in_transaction and _waits_for(holder.task, lane):
                raise SandboxBusyError(_busy(lane, holder, _SAME))
            acts = self.acts
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._lock.acquire()
                return
            except TimeoutError:
                if acts == self.acts and holder is not None and holder.in_transaction:
                    text = _busy(lane, holder, _IDLE.format(PATIENCE))
                    raise SandboxBusyError(text) from None

    # -- the savepoint -----------------------------------------------------------------------------

    async def clean_savepoint(self) -> None:
        """Set the savepoint anew, so that what follows can be undone alone."""
        match self.savepoint:
            case Savepoint.CLEAN:
                return
            case Savepoint.NONE:
                sql = f"BEGIN; SAVEPOINT {self._guard}; SAVEPOINT {_SAVEPOINT}"
            case Savepoint.KEPT:
                sql = f"RELEASE SAVEPOINT {_SAVEPOINT}; SAVEPOINT {_SAVEPOINT}"
            case Savepoint.UNDONE:
                sql = f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}"
        await self.control(sql, leads_to=Savepoint.CLEAN)

    async def defers(self) -> bool:
        """Return whether a commit may have constraints to check."""
        if self.deferrable is None:
            self.deferrable = await self._uncut(self.wire.ask(_HAS_DEFERRABLE))
        return self.deferrable

    async def check_deferred(self) -> None:
        """Check the constraints that a commit would check, and defer again what begins deferred."""
        try:
            await self.control(f"SET CONSTRAINTS ALL IMMEDIATE; {_DEFER_AGAIN}")
        except BaseException:
            self.savepoint = Savepoint.UNDONE
            raise

    async def control(self, sql: str, *, leads_to: Savepoint | None = None) -> None:
        """Send the sandbox's own statements."""

        async def send() -> None:
            await self.wire.control(sql)
            if leads_to is not None:  # also when nobody waits for it any more
                self.savepoint = leads_to

        try:
            await self._uncut(send())
        except Exception as error:
            if sqlstate(error) in {NO_TRANSACTION, NO_SAVEPOINT}:
                self._escape = error
                raise SandboxEscapedError(_ESCAPED) from error
            raise

    async def _uncut(self, coroutine: Coroutine[Any, Any, T]) -> T:
        # Cancelled in its midst, nobody would know how the savepoint stands.
        task = asyncio.create_task(coroutine)
        cancelled: asyncio.CancelledError | None = None
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError as error:
                cancelled = error
            except Exception:
                break
        if cancelled is not None:
            task.cancelled() or task.exception()
            raise cancelled
        return task.result()

    def refuse_what_needs_no_transaction(self, error: Exception) -> None:
        """Raise the sandbox's own error where a statement fails for being in a transaction."""
        if sqlstate(error) in {ACTIVE_TRANSACTION, INVALID_TERMINATION}:
            raise SandboxUnsupportedError(f"{summary(error)}\n{_NEEDS_NONE}") from error


async def lets_go(is_free: Callable[[], bool]) -> None:
    """Let tasks that are about to end do so, for a hundred rounds of the event loop."""
    for _ in range(100):
        if is_free():
            return
        await asyncio.sleep(0)


def escaped_strays(what: str, lanes: Iterable[Lane]) -> SandboxEscapedError:
    """Return the error for what was not given back when the block ended."""
    lines = [
        f"  a {what}{' in a transaction' if lane.in_transaction else ''} acquired at {lane.holder()}"
        for lane in lanes
    ]
    return SandboxEscapedError(
        "when the sandbox ended, this had not been given back:\n"
        + "\n".join(lines)
        + "\nIts code outlived the test. Let the test wait for it, or the application where it starts "
        "it; and give it back whatever happens: async with pool.acquire() as connection. It was closed."
    )


def sqlstate(error: BaseException) -> str | None:
    """Return the code that PostgreSQL gives an error."""
    found: str | None = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return found


def _nobody() -> None:
    return None


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _waits_for(task: asyncio.Task[Any] | None, lane: Lane) -> bool:
    """Return whether *task* can't go on before the running one, which asks for *lane*, does."""
    here = _current_task()
    seen: set[object] = set()
    waiting: list[object] = [task]
    while waiting:
        each = waiting.pop()
        if each is None or each in seen:
            continue
        if each is here:
            return True
        seen.add(each)
        waiting += _awaited(each)
    return False


def _awaited(future: object) -> Iterator[object]:
    yield getattr(future, "_fut_waiter", None)
    yield from getattr(future, "_children", ())  # gather's
    if isinstance(future, asyncio.Task):
        for frame in suspended_frames(future.get_coro()):
            group = frame.f_locals.get("self")
            if type(group).__name__ == "TaskGroup":  # asyncio's and AnyIO's
                yield from getattr(group, "_tasks", ())


def _busy(lane: Lane, holder: Lane, why: str) -> str:
    return (
        "this statement waits for a transaction that can't end before it.\n"
        f"  the statement is on the connection acquired at {lane},\n"
        f"  the transaction on the one acquired at {holder}.\n{why}"
    )


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) < 120 else f"{line[:117]}..."


_ALONE = '@pytest.mark.lifekit(isolation="none"), on a database of its own'
_SAME = (
    "The code that asks is what the transaction waits for. In production these are two connections, "
    "and the second does not see what the first has not committed yet. Pass the connection on to what "
    "runs inside its transaction, or commit first. A test that is about two connections at once runs "
    f"without a sandbox: {_ALONE}."
)
_IDLE = (
    "Nothing happened in it for {:.3g} s: most likely its code waits for this statement. In production "
    "these are two connections; in the sandbox a transaction has the one real connection to itself. "
    "Pass the connection on to what runs inside its transaction, or end that first. A test that is "
    f"about two connections at once runs without a sandbox: {_ALONE}."
)
_ESCAPED = (
    "something ended the sandbox's transaction behind its back, and what was done before may have been "
    "committed: look at the database. The likely culprit is a COMMIT or ROLLBACK where the sandbox "
    "could not see it. Use the driver's own calls for transactions, or run the test without a sandbox: "
    f"{_ALONE}."
)
_NEEDS_NONE = (
    "PostgreSQL runs this outside of transactions only, and in the sandbox all runs inside one. Run "
    f"the test without a sandbox: {_ALONE}."
)
_UNSUPPORTED = {
    Verb.LISTEN: (
        "LISTEN can't work in the sandbox: PostgreSQL delivers notifications when a transaction "
        "commits, and here none does. Call what handles the notification directly, or run the test "
        f"without a sandbox: {_ALONE}."
    ),
    Verb.TWO_PHASE: (
        "a prepared transaction outlives its connection, and so it would the sandbox. Run the test "
        f"without one: {_ALONE}."
    ),
}
