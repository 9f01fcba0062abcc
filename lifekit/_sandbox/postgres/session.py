"""The session that all clients of one database share in a block: whose turn it is, what is undone.

One real transaction is open for as long as the block lasts, and never commits. What a client does has a
savepoint in it, of a name that nobody else knows:

- what it does outside of a transaction has the savepoint to itself: a failure undoes it alone;
- a transaction of the client's is the savepoint from its BEGIN to its end, and until then the client
  has the session to itself, but for times in which nobody can tell: see `Conversation.parks`.

What is to be done with the savepoint afterwards goes ahead of what comes next, in the same bytes. If
anything else ever ends the real transaction, the savepoint goes with it: then those first bytes fail,
the server skips what follows them, and the block has been escaped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count, takewhile
from secrets import token_hex
from typing import TYPE_CHECKING, Protocol

from .advisory import LOCKS, unlock_all_but
from .messages import BIND_COMPLETE, SYNC, Parse, complete, error_fields, query, run_prepared
from .notifications import COVERED, Capture
from .own import ANSWERS, ARE_DEFAULT, CLOSE_CURSORS, IF_PERMITTED, texts
from .real import Client, Exchange, RealConnection
from .settings import LIMITS, setting

if TYPE_CHECKING:
    from .conversation import Conversation  # to which it gives turns

PATIENCE = 5.0
"""Seconds for which a client waits for another one whose transaction is open and does nothing."""


class Timer(Protocol):
    """What ends a wait."""

    def cancel(self) -> None:
        """Forget it."""


class Savepoint(Enum):
    """What has to be done before anything else may have the savepoint."""

    MISSING = auto()  # to begin the real transaction
    BROKEN = auto()  # to begin it anew, for its beginning was cancelled
    CLEAN = auto()  # nothing
    DONE = auto()  # to release it and set it anew: what was done since stays
    FAILED = auto()  # to roll back to it
    NESTED = auto()  # to set that of the block which has begun inside another one
    NESTED_BROKEN = auto()  # to do so anew, for that was cancelled


_TO_CLEAN = {
    (Savepoint.MISSING, False): ("begin", "limits", "set"),
    (Savepoint.BROKEN, False): ("rollback", "begin", "limits", "set"),
    (Savepoint.CLEAN, False): (),
    (Savepoint.DONE, False): ("release", "set"),
    (Savepoint.FAILED, False): ("undo",),
    (Savepoint.MISSING, True): ("begin", "limits", "settings", "set"),
    (Savepoint.BROKEN, True): ("rollback", "begin", "limits", "settings", "set"),
    (Savepoint.CLEAN, True): ("release", "settings", "set"),
    (Savepoint.DONE, True): ("release", "settings", "set"),
    (Savepoint.FAILED, True): ("undo", "release", "settings", "set"),
    (Savepoint.NESTED, False): ("block", "set"),
    (Savepoint.NESTED, True): ("block", "settings", "set"),
    (Savepoint.NESTED_BROKEN, False): ("undo", "block", "set"),
    (Savepoint.NESTED_BROKEN, True): ("undo", "block", "settings", "set"),
}
_IF_CANCELLED = {
    Savepoint.MISSING: Savepoint.BROKEN,
    Savepoint.BROKEN: Savepoint.BROKEN,
    Savepoint.FAILED: Savepoint.FAILED,
    Savepoint.NESTED: Savepoint.NESTED_BROKEN,
    Savepoint.NESTED_BROKEN: Savepoint.NESTED_BROKEN,
}
"""How the savepoint stands if what sets it is cancelled. Where it was released, all is lost."""
CANCELED = "57014"


_UNTOUCHED = frozenset((Savepoint.MISSING, Savepoint.BROKEN, Savepoint.NESTED))
"""How the savepoint stands for a block that has not used the session."""


@dataclass
class _Outer:
    """How a session stood when a block began inside another one."""

    savepoint: Savepoint
    used: bool
    schema_changed: bool
    applied: dict[str, str | None]
    locks: str | None
    """The advisory locks, which the block inside is to keep."""
    listens_in: tuple[bool, bool]
    """Whether that is wanted, and done."""


_OTHER_STATUS = "its transaction is not as it was before the block"
_numbers = count(1)  # of all sessions: a real connection may have been that of another one


class Session:
    """One real connection that the clients of one database share in blocks, one after the other."""

    def __init__(
        self,
        real: RealConnection,
        later: Callable[[float, Callable[[], None]], Timer],
    ) -> None:
        """*later* calls something after some seconds."""
        self.real, self._later = real, later
        self.savepoint = Savepoint.MISSING
        self.holder: Conversation | None = None
        self.escape: str | None = None
        """What PostgreSQL said when something had ended the real transaction."""
        self.activity = 0
        """Grows with all that is done: by it who waits sees whether anything happens."""
        self.unnamed: object = None
        """Whose unnamed statement the server has."""
        self.deferrable: tuple[str, str] | None = None
        """The constraints that a commit may have to check, and those that wait for it."""
        self.base: dict[str, str | None] = {}
        """Of what any client has set: as it was before."""
        self.applied: dict[str, str | None] = {}
        """As it is now."""
        self.garbage: list[bytes] = []
        """What closes statements that nobody has any more: one answer each."""
        self.generation = 0
        """Of statements: those of an earlier one may mean what has been undone."""
        self.schema_changed = False
        """Whether the innermost block has."""
        self.is_open = False
        """Whether a block has it."""
        self._used = False
        self._outer: list[_Outer] = []  # of the blocks around the innermost one
        self._has_differed = False  # the schema, for a block around that, or one that is undone
        self._locks: str | None = None  # the advisory ones
        self._locks_known = -1  # at which activity
        self._queue: deque[Conversation] = deque()
        self._timers: dict[Conversation, Timer] = {}
        self._cancelling = 0
        self._own_exchanges = 0  # of those under way: what blocks need, which keeps nothing waiting
        self._if_cancelled: Savepoint | None = None  # of the guard that is about to be sent
        self.capture = Capture(f"lifekit_{token_hex(8)}")
        real.noticed = self._noticed
        name = self.capture.schema.encode()
        prepared = texts(name)
        self._own = {what: name + b"_" + what.encode() for what in prepared}
        self._prepare = b"".join(
            Parse(self._own[what], text, b"\0\0").encode() for what, text in prepared.items()
        )
        self._is_prepared = False
        self._runs = {what: run_prepared(name) for what, name in self._own.items()}
        self._are_default: bool | None = None  # the limits, as far as is known
        self._newest: str | None = None  # of the constraints
        self._usual: dict[object, tuple[bytes, int, tuple[bytes, int]]] = {}
        self._ahead = b"", 0  # the answer to the guard that is about to be sent, and its parts

    def unique_name(self) -> bytes:
        """Return a name that no other statement or portal of the session has."""
        return b"lifekit_%d" % next(_numbers)

    # -- whose turn it is --------------------------------------------------------------------------

    def acquire(self, client: Conversation) -> bool:
        """Return whether *client* has the turn now; else it is called, by `resume`, when it has."""
        holder = self.holder
        if holder is client:
            return not self._cancelling
        if holder is not None and holder.parks():
            self._park(holder)
        if self.holder is None and not self._cancelling:
            self.holder = client
            self._forget(client)
            return True
        if client not in self._timers:
            self._queue.append(client)
            self._wait(client)
            if self.holder is not None and not self.holder.is_active:
                client.refuse_at_once(self.holder)
        return False

    def is_free_for(self, client: Conversation) -> bool:
        """Return whether *client* would have the turn at once, and takes it from nobody."""
        if self._cancelling:
            return False
        return self.holder is client or (self.holder is None and not self._queue)

    def has_waiting(self, client: Conversation) -> bool:
        """Return whether a client waits for its turn."""
        return client in self._timers

    def release(self, client: Conversation) -> None:
        """Take the turn back, and give it to who waits longest."""
        if self.holder is client:
            self.holder = None
        self._serve()

    def rests(self, client: Conversation) -> None:
        """Let others have the turn while *client* does nothing, if they wait and it parks."""
        if self._queue and self.holder is client and client.parks():
            self._park(client)
            self._serve()

    def leave(self, client: Conversation) -> None:
        """Take a client out that waits no more, or has gone."""
        self._forget(client)
        self.release(client)

    def _park(self, client: Conversation) -> None:
        self.holder = None
        if (savepoint := client.park()) is not None:
            self.savepoint = savepoint

    def _serve(self) -> None:
        while self.holder is None and self._queue and not self._cancelling:
            client = self._queue[0]
            self._forget(client)
            client.resume()

    def _forget(self, client: Conversation) -> None:
        timer = self._timers.pop(client, None)
        if timer is not None:
            timer.cancel()
            self._queue.remove(client)

    def _wait(self, client: Conversation) -> None:
        seen = self.activity

        def look() -> None:
            holder = self.holder
            if self.activity != seen or holder is None or holder.is_active:
                self._wait(client)
                return
            self._forget(client)
            client.refuse_to_wait(holder)

        self._timers[client] = self._later(PATIENCE, look)

    # -- what is sent ------------------------------------------------------------------------------

    def guard(self, settings: Mapping[str, str | None], *, read_only: bool) -> tuple[bytes, int]:
        """Return what sets a clean savepoint under some settings, and how many answers it gets."""
        other, capture = self._other(settings), self.capture
        installs = capture.is_wanted and not (
            capture.is_installed and self.savepoint is not Savepoint.BROKEN
        )
        steps = _TO_CLEAN[self.savepoint, bool(other) or installs]
        self._if_cancelled = None if "release" in steps else _IF_CANCELLED.get(self.savepoint)
        self.savepoint = Savepoint.FAILED  # until what follows has ended well
        if self._is_prepared and not (other or installs or read_only):
            sent, answers, self._ahead = self._usual_guard(steps)
            return sent, answers
        sent, answers = b"", 0
        if not self._is_prepared:
            sent, answers, self._is_prepared = self._prepare, len(self._own), True
        for what in steps:
            if what == "settings":
                own = self._set_up(other, installs=installs)
                sent += b"".join(map(self.unprepared, own))
                answers += 3 * len(own)
            else:
                sent += self._runs[what]
                answers += 2
        if read_only:
            sent += self._runs["read_only"]
            answers += 2
        return sent, answers

    def _usual_guard(self, steps: tuple[str, ...]) -> tuple[bytes, int, tuple[bytes, int]]:
        # It is the same each time, and so is its answer.
        key = steps, self._are_default
        if key not in self._usual:
            whats = ["limit" if what == "limits" and self._are_default else what for what in steps]
            sent = b"".join(self._runs[what] for what in whats)
            known = list(takewhile(ANSWERS.__contains__, whats))
            ahead = b"".join(BIND_COMPLETE + complete(ANSWERS[what]) for what in known)
            self._usual[key] = sent, 2 * len(whats), (ahead, 2 * len(known))
        return self._usual[key]

    def _set_up(self, other: dict[str, str | None], *, installs: bool) -> list[str]:
        own: list[str] = []
        if other:
            self.applied.update(other)
            level = {"lifekit.level": ""} if "client_min_messages" in other else {}
            own.append(setting({**other, **level}))
        if installs:
            self.capture.is_installed = True
            own.append(self.capture.install)
        if installs or (self.capture.is_installed and COVERED & other.keys()):
            own.append(self.capture.cover)
        return own

    def unprepared(self, text: str) -> bytes:
        """Return what runs a statement that nobody has prepared: three answers."""
        self.unnamed = None
        return Parse(b"", text.encode("utf-8", "surrogateescape"), b"\0\0").encode() + run_prepared(b"")

    def _noticed(self, body: bytes) -> bool:
        holder = self.holder
        return not self.capture.is_wanted or holder is None or holder.carrier.noticed(body)

    def _other(self, settings: Mapping[str, str | None]) -> dict[str, str | None]:
        if not (settings or self.applied):
            return {}
        wanted = {name: settings.get(name, self.base[name]) for name in {*settings, *self.applied}}
        return {
            name: value
            for name, value in wanted.items()
            if value != self.applied.get(name, self.base[name])
        }

    def collect(self) -> tuple[bytes, int]:
        """Return what closes the garbage, and how many answers it gets."""
        if not self.garbage:
            return b"", 0
        sent, answers = b"".join(self.garbage), len(self.garbage)
        self.garbage.clear()
        return sent, answers

    def send(
        self,
        client: Client | None,
        ended: Callable[[Exchange], None],
        data: bytes,
        drop: int,
        *,
        again: int = 0,
        simple: bool = False,
    ) -> Exchange:
        """Begin an exchange; *ended* is called at its end."""
        self.activity += 1
        self._used = True
        if_cancelled, self._if_cancelled = self._if_cancelled, None

        def at_its_end(exchange: Exchange) -> None:
            self.activity += 1
            if exchange.guard_failed or exchange.status == "I":
                code = error_fields(exchange.error or b"").get("C")
                if code == CANCELED and if_cancelled is not None:
                    exchange.was_cancelled, self.savepoint = True, if_cancelled
                else:
                    self._escaped(exchange)
            ended(exchange)

        exchange = Exchange(client, at_its_end, drop=drop, again=again, simple=simple)
        (exchange.ahead, exchange.ahead_parts), self._ahead = self._ahead, (b"", 0)
        self.real.begin(exchange, data)
        return exchange

    def own(self, what: str) -> bytes:
        """Return what runs one of the statements that the session has prepared: two answers."""
        return self._runs[what]

    @property
    def failing(self) -> bytes:
        """What fails, for a client whose transaction has."""
        return self.own("fail") + SYNC

    # -- commits -------------------------------------------------------------------------------------

    def take_deferrable(self, rows: Sequence[Sequence[str | None]]) -> None:
        """Take note of what a commit may have to check."""
        named, deferred = rows[0] if rows and len(rows[0]) == 2 else ("", "")
        self.deferrable = named or "", deferred or ""

    def at_commit(self, *, checks: bool, cursors: bool, by_name: bool) -> list[str]:
        """Return the statements that do what a commit does: check constraints, close cursors."""
        # By their names, where the role may use their schemas: ALL would hold for constraints as well
        # that are made later.
        named, deferred = self.deferrable or ("", "")
        found = [f"SET CONSTRAINTS {named if by_name else 'ALL'} IMMEDIATE"] if checks and named else []
        found += [CLOSE_CURSORS] if cursors else []
        if checks and deferred:
            again = f"SET CONSTRAINTS {deferred} DEFERRED"
            found += [again if by_name else IF_PERMITTED % again]
        return found

    def _escaped(self, exchange: Exchange) -> None:
        if self.escape is None:
            said = error_fields(exchange.error or b"").get("M", "the transaction was over")
            self.escape = said

    @property
    def is_busy(self) -> bool:
        """Whether an answer to a client is to come, or a cancellation under way."""
        return len(self.real.exchanges) > self._own_exchanges or self._cancelling > 0

    # -- cancelling ----------------------------------------------------------------------------------

    def is_at(self, exchange: Exchange) -> bool:
        """Return whether the server works at that for sure, and not at what goes ahead of it."""
        exchanges = self.real.exchanges
        return bool(exchanges) and exchanges[0] is exchange and not exchange.drop

    def cancel_begins(self) -> None:
        """Let nothing else be sent until a cancellation has arrived: it would hit that."""
        self._cancelling += 1

    def cancel_ended(self) -> None:
        """Take note that it has arrived."""
        self._cancelling -= 1
        if self.holder is not None:
            self.holder.resume()
        self._serve()

    # -- a block -----------------------------------------------------------------------------------

    @property
    def may_differ(self) -> bool:
        """Whether what clients know of rows may not be true any more."""
        return self.schema_changed or self._has_differed

    @property
    def used_since(self) -> int | None:
        """Which of the blocks, counted from the outermost one, has used it first."""
        used = [*(each.used for each in self._outer), self._used]
        return used.index(True) + 1 if True in used else None

    def begin(self, sets: Collection[str]) -> None:
        """Begin a block; what that needs is sent with the first statement.

        *sets* are the names of what has been set on the connection.
        """
        self.is_open = True
        self.savepoint = Savepoint.MISSING
        self._used = self.schema_changed = self._has_differed = False
        self._locks, self._locks_known = None, -1
        self.capture.is_wanted = self.capture.is_installed = False
        if self._are_default is None or not LIMITS.isdisjoint(sets):
            self._learn_limits()
        self.base.clear()
        self.applied.clear()

    def begin_inside(self) -> None:
        """Begin a block inside the one that there is, where nothing is under way."""
        self._park_holder()
        outer = _Outer(
            self.savepoint,
            self._used,
            self.schema_changed,
            dict(self.applied),
            self._locks,
            (self.capture.is_wanted, self.capture.is_installed),
        )
        if self.savepoint not in _UNTOUCHED and self.activity != self._locks_known:
            self._learn_locks(outer)
        self._outer.append(outer)
        self._has_differed |= self.schema_changed
        self._used = self.schema_changed = False
        if self.savepoint is Savepoint.CLEAN:
            self.savepoint = Savepoint.NESTED

    def _learn_locks(self, outer: _Outer) -> None:
        def learned(exchange: Exchange) -> None:
            self._own_exchanges -= 1
            self._locks = outer.locks = exchange.rows[0][0] if exchange.rows else None
            self._locks_known = self.activity

        self.unnamed = None
        guard, answers = self.guard(self.applied, read_only=False)
        outer.savepoint = self.savepoint = Savepoint.CLEAN
        self._own_exchanges += 1
        self.send(None, learned, guard + query(LOCKS.encode()), answers, simple=True)

    def _learn_limits(self) -> None:
        # The answer comes before that of any statement, and is late for the first block only.
        def learned(exchange: Exchange) -> None:
            self._own_exchanges -= 1
            self._are_default = exchange.rows == [["t"]]

        self._are_default = False
        self._own_exchanges += 1
        self.real.begin(Exchange(None, learned, simple=True), query(ARE_DEFAULT.encode()))

    def _park_holder(self) -> None:
        if self.holder is not None:
            self._park(self.holder)

    def end(self, ended: Callable[[str | None], None]) -> None:
        """Undo everything; *ended* gets what is wrong with the connection, None if nothing is."""
        self.is_open = False
        self._forget_schema()
        if self._used:
            self._undo(("rollback",), "I", None, ended)
        elif self._own_exchanges:  # whose answers are not for its client
            self._own_exchanges += 1

            def answered(exchange: Exchange) -> None:
                self._own_exchanges -= 1
                ended(self.escape)

            self.real.begin(Exchange(None, answered), SYNC)
        else:
            ended(None)

    def end_inside(self, ended: Callable[[str | None], None]) -> None:
        """Undo the innermost block, and no more."""
        self._park_holder()
        used, outer = self._used, self._outer.pop()
        self._has_differed |= self.schema_changed
        self._forget_schema()
        self._used, self.schema_changed, self.applied = outer.used, outer.schema_changed, outer.applied
        self.capture.is_wanted, self.capture.is_installed = outer.listens_in
        self.savepoint = outer.savepoint
        if not used:
            ended(None)
            return
        self._locks, self._locks_known = outer.locks, self.activity
        if outer.savepoint in (Savepoint.MISSING, Savepoint.BROKEN):
            self.savepoint = Savepoint.MISSING
            self._undo(("rollback",), "I", outer, ended)
        else:
            self._undo(("undo_block", "release_block"), "T", outer, ended)

    def _forget_schema(self) -> None:
        if self.schema_changed:
            self.generation += 1
            self.deferrable = None

    def _undo(
        self,
        steps: tuple[str, ...],
        status: str,
        outer: _Outer | None,
        ended: Callable[[str | None], None],
    ) -> None:
        closed, answers = self.collect()
        data = closed + b"".join([self._runs[what] for what in steps]) + self._runs["discard"]
        if outer is not None and outer.locks is not None:
            self.unnamed = None
            unlock = unlock_all_but(outer.locks).encode()
            data += Parse(b"", unlock, b"\0\0").encode() + run_prepared(b"") + self._runs["newest"]
        else:
            data += self._runs["unlock"]

        def undone(exchange: Exchange) -> None:
            self._own_exchanges -= 1
            newest = exchange.rows[-1][-1] if exchange.rows else None
            if newest != self._newest:  # somebody has changed the schema for good
                self._newest, self.deferrable = newest, None
            if exchange.error is not None or exchange.status != status:
                ended(error_fields(exchange.error or b"").get("M", _OTHER_STATUS))
            else:
                ended(self.escape)

        self._own_exchanges += 1
        self.real.begin(Exchange(None, undone, drop=answers), data + SYNC)
