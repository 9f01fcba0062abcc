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
from enum import Enum, auto
from itertools import count, takewhile
from secrets import token_hex
from typing import TYPE_CHECKING, Protocol

from .messages import BIND_COMPLETE, SYNC, Parse, complete, error_fields, query, run_prepared
from .notifications import COVERED, Capture
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
}
_IF_CANCELLED = {
    Savepoint.MISSING: Savepoint.BROKEN,
    Savepoint.BROKEN: Savepoint.BROKEN,
    Savepoint.FAILED: Savepoint.FAILED,
}
"""How the savepoint stands if what sets it is cancelled. Where it was released, all is lost."""
_ANSWERS = {
    "begin": "BEGIN",
    "limit": "SET",
    "set": "SAVEPOINT",
    "release": "RELEASE",
    "undo": "ROLLBACK",
    "rollback": "ROLLBACK",
}
CANCELED = "57014"
_NO_LIMIT = """CASE current_setting('{0}', true) WHEN '0' THEN '0' ELSE
    CASE WHEN current_setting('{0}', true) IS NOT NULL THEN set_config('{0}', '0', true) END END"""
_LIMITS = (
    "SELECT CASE current_setting('lock_timeout') WHEN '0' "
    "THEN set_config('lock_timeout', '9999', true) END, "
    + ", ".join(
        _NO_LIMIT.format(name)  # of which older servers know not all
        for name in (
            "idle_in_transaction_session_timeout",
            "idle_session_timeout",
            "transaction_timeout",
        )
    )
).encode()
"""The real transaction may be idle and long, and waits for no lock forever."""
_ARE_DEFAULT = """SELECT bool_and(setting = '0') FROM pg_catalog.pg_settings
WHERE name IN ('lock_timeout', 'idle_in_transaction_session_timeout', 'idle_session_timeout',
    'transaction_timeout')"""
"""Whether all of those are off, so that one of them is all that has to be set."""
_UNLOCK = b"""SELECT pg_catalog.pg_advisory_unlock_all(),
    (SELECT max(oid) FROM pg_catalog.pg_constraint)"""
"""And tell the newest constraint, by which a change of the schema from elsewhere shows."""
_CLOSE_CURSORS = """DO $lifekit$ DECLARE commands text; BEGIN
SELECT string_agg('CLOSE ' || quote_ident(name), ';') INTO commands FROM pg_catalog.pg_cursors
WHERE NOT is_holdable AND name !~ '^lifekit_';
IF commands IS NOT NULL THEN EXECUTE commands; END IF; END $lifekit$"""
_IF_PERMITTED = """DO $lifekit$ BEGIN %s;
EXCEPTION WHEN insufficient_privilege THEN NULL; END $lifekit$"""
_DEFERRABLE = """SELECT string_agg(DISTINCT name, ', '),
    string_agg(DISTINCT name, ', ') FILTER (WHERE condeferred)
FROM (SELECT format('%I.%I', nspname, conname) AS name, condeferred
    FROM pg_catalog.pg_constraint JOIN pg_catalog.pg_namespace AS n ON n.oid = connamespace
    WHERE condeferrable AND conparentid = 0) AS each"""
"""The names of all constraints that a commit may have to check, and of those that wait for it."""


def _texts(name: bytes) -> dict[str, bytes]:
    # Of what a session prepares, with its savepoint's name.
    return {
        "rollback": b"ROLLBACK",
        "begin": b"BEGIN",
        "limits": _LIMITS,
        "limit": b"SET LOCAL lock_timeout = 9999",
        "set": b"SAVEPOINT " + name,
        "release": b"RELEASE SAVEPOINT " + name,
        "undo": b"ROLLBACK TO SAVEPOINT " + name,
        "read_only": b"SET TRANSACTION READ ONLY",
        "fail": b"SELECT 1/0",
        "check": b"SAVEPOINT " + name + b"_check",
        "uncheck": b"ROLLBACK TO SAVEPOINT " + name + b"_check",
        "release_check": b"RELEASE SAVEPOINT " + name + b"_check",
        "deferrable": _DEFERRABLE.encode(),
        "discard": b"DISCARD SEQUENCES",
        "unlock": _UNLOCK,
    }


_numbers = count(1)  # of all sessions: a real connection may have been that of another one


class Session:
    """One real connection that the clients of one database share in blocks, one after the other."""

    def __init__(
        self, real: RealConnection, later: Callable[[float, Callable[[], None]], Timer]
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
        self.is_open = False
        """Whether a block has it."""
        self._used = False
        self._queue: deque[Conversation] = deque()
        self._timers: dict[Conversation, Timer] = {}
        self._cancelling = 0
        self._if_cancelled: Savepoint | None = None  # of the guard that is about to be sent
        self.capture = Capture(f"lifekit_{token_hex(8)}")
        real.noticed = self._noticed
        name = self.capture.schema.encode()
        texts = _texts(name)
        self._own = {what: name + b"_" + what.encode() for what in texts}
        self._prepare = b"".join(
            Parse(self._own[what], text, b"\0\0").encode() for what, text in texts.items()
        )
        self._is_prepared = False
        self._runs = {what: run_prepared(name) for what, name in self._own.items()}
        self._undo = b"".join(self._runs[what] for what in ("rollback", "discard", "unlock")) + SYNC
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
            known = list(takewhile(_ANSWERS.__contains__, whats))
            ahead = b"".join(BIND_COMPLETE + complete(_ANSWERS[what]) for what in known)
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

    def ask_for_deferrable(self, guard: bytes, answers: int) -> None:
        """Ask what a commit may have to check; the answer comes before any other."""

        def answered(exchange: Exchange) -> None:
            if self.deferrable is not None:  # else a change of the schema has come behind it
                self.take_deferrable(exchange.rows)

        self.deferrable = "", ""
        self.send(None, answered, guard + self.own("deferrable") + SYNC, answers)

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
        found += [_CLOSE_CURSORS] if cursors else []
        if checks and deferred:
            again = f"SET CONSTRAINTS {deferred} DEFERRED"
            found += [again if by_name else _IF_PERMITTED % again]
        return found

    def _escaped(self, exchange: Exchange) -> None:
        if self.escape is None:
            said = error_fields(exchange.error or b"").get("M", "the transaction was over")
            self.escape = said

    @property
    def is_busy(self) -> bool:
        """Whether an answer of the server is to come, or a cancellation under way."""
        return bool(self.real.exchanges) or self._cancelling > 0

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

    def begin(self, sets: Collection[str]) -> None:
        """Begin a block; what that needs is sent with the first statement.

        *sets* are the names of what has been set on the connection.
        """
        self.is_open = True
        self.savepoint = Savepoint.MISSING
        self._used = self.schema_changed = False
        self.capture.is_wanted = self.capture.is_installed = False
        if self._are_default is None or not LIMITS.isdisjoint(sets):
            self._learn_limits()
        self.base.clear()
        self.applied.clear()

    def _learn_limits(self) -> None:
        # The answer comes before that of any statement, and is late for the first block only.
        def learned(exchange: Exchange) -> None:
            self._are_default = exchange.rows == [["t"]]

        self._are_default = False
        self.real.begin(Exchange(None, learned, simple=True), query(_ARE_DEFAULT.encode()))

    def end(self, ended: Callable[[str | None], None]) -> None:
        """Undo everything; *ended* gets what is wrong with the connection, None if nothing is."""
        self.is_open = False
        if not self._used:
            ended(None)
            return
        if self.schema_changed:
            self.generation += 1
            self.deferrable = None
        closed, answers = self.collect()

        def undone(exchange: Exchange) -> None:
            newest = exchange.rows[-1][-1] if exchange.rows else None
            if newest != self._newest:  # somebody has changed the schema for good
                self._newest, self.deferrable = newest, None
            if exchange.error is not None or exchange.status != "I":
                ended(error_fields(exchange.error or b"").get("M", "it is still in a transaction"))
            else:
                ended(self.escape)

        exchange = Exchange(None, undone, drop=answers)
        self.real.begin(exchange, closed + self._undo)
