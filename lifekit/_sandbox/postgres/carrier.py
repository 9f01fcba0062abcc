"""What carries one client's statements to the session, and does there what a commit would.

It knows how the client's transaction stands on the session: whether that has the savepoint, and what
has to be done when it ends. Its methods are steps of the conversation's generator, and stop where they
wait.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from . import messages, settings
from .control import NO_TRANSACTION, UNSUPPORTED, Ends, Failure, Transaction
from .listening import Listening
from .messages import SYNC, Backend, Parse, ProtocolError
from .notifications import COUNTER, COVERED, listens
from .real import Exchange
from .session import Savepoint, Session
from .sql import Verb, read

if TYPE_CHECKING:
    from .conversation import Conversation  # which it carries

INTERNAL: Final = "XX000"
ESCAPED = "lifekit's sandbox: something ended its transaction behind its back"
_MEANS_NOTHING = re.compile(r"\s*set\s+(local|constraints)\b", re.IGNORECASE)
"""Outside of transactions, of which PostgreSQL warns."""
_TOUCHES = re.compile("advisory|cursor|config", re.IGNORECASE)
_UNKNOWN_SETTING = "lifekit's sandbox: set_config() with a name that is not in the text"
_FIXED_SETTING = "lifekit's sandbox reads what is sent: standard_conforming_strings can't be changed"
_FIXED_SETTING_HINT = "Write E'...' where a backslash is to escape."
_UNKNOWN_SETTING_HINT = "Write the name as a constant: set_config('app.user', $1, true)."

Steps = Generator[None, None, None]


class ServerFailed(Exception):
    """The server has refused something, and the client has been told."""


class Batch:
    """What a client has said since its last Sync or Flush, for the server."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.again: list[bytes] = []
        """Statements that the session does not know, which go ahead."""
        self.names_again: list[bytes] = []
        """The client's names of those."""
        self.parsed: list[bytes] = []
        """The names of those that the client prepares itself."""
        self.describes: list[bytes | None] = []
        """The names of statements that are described; None of a portal."""
        self.texts: list[str] = []
        """Of what it executes."""
        self.only_reads = True
        self.prepares_unnamed = False
        self.uses_unnamed = False  # the one of before
        self.syncs = False  # the client's Sync ends it


class Carrier:
    """How one client stands on the session."""

    def __init__(self, conversation: Conversation, session: Session) -> None:
        self.conversation, self.session = conversation, session
        self.transaction = Transaction()
        self.active: Exchange | None = None
        """What the server works at."""
        self.has_savepoint = False
        """The session's."""
        self.executed = False
        """Outside of a transaction, since the savepoint was set."""
        relay = conversation.client.relay
        client = conversation.client
        self.touched = bool(client.settings or client.channels or (relay is not None and relay.sets))
        """Whether a reset of its session would change anything."""
        self.refusal: Failure | None = None
        """Why it is not to wait for its turn any longer."""
        self._wrote = False
        self._is_read_only = False  # the session's savepoint
        # What it has set for itself, and committed.
        self._settings: dict[str, str | None] = dict(conversation.client.settings)
        self._marks: dict[int, dict[str, str | None]] = {}  # those, as each block inside began
        self._locals: dict[str, str | None] = {}  # as they were before the transaction set them
        self._sets: set[str] = set()  # what the transaction has set for the session
        self._has_cursors = False  # which a commit closes
        self._lifts_limits = False  # by which the real transaction would be ended
        self.listening = Listening(conversation, session, self._ask)
        self._set_defaults()

    # -- its turn ------------------------------------------------------------------------------------

    def _turn(self) -> Steps:
        if self.session.escape is not None:
            raise Failure(INTERNAL, ESCAPED, self.session.escape)
        while not self.session.acquire(self.conversation):
            yield
            if self.refusal is not None:
                refusal, self.refusal = self.refusal, None
                raise refusal
        if not self.has_savepoint and any(name not in self.session.base for name in self._settings):
            yield from self._learn_base()
        if self.transaction.failed and not self.has_savepoint:
            # It failed before another had the session: the server is to refuse what follows.
            yield from self._own(self.session.failing)

    def _learn_base(self) -> Steps:
        # How what it has set otherwise stands without it.
        own, self._settings = self._settings, {}
        names = [name for name in own if name not in self.session.base]
        row = yield from self._ask(settings.asking(names, self.session.capture.views), len(names))
        self.session.base.update(zip(names, row, strict=True))
        self._settings, self.has_savepoint = own, False
        self.session.savepoint = Savepoint.CLEAN

    def park(self) -> Savepoint | None:
        """Leave the savepoint to another; return how that stands, None where it was not used."""
        if not self.has_savepoint:
            return None
        self.has_savepoint = False
        transaction = self.transaction
        undoes = transaction.wrote or transaction.failed or self._is_read_only
        return Savepoint.FAILED if undoes else Savepoint.CLEAN

    def mark(self, depth: int) -> None:
        """Note what it has set, for a block begins inside of the one that it is in."""
        self._marks[depth] = dict(self._settings)

    def back(self, depth: int) -> None:
        """Have set what it had before the block inside of *depth*, or what its client has."""
        before = self._marks.pop(depth + 1, None)
        self._settings = dict(self.conversation.client.settings) if before is None else before
        self._set_defaults()

    def rests(self) -> None:
        """Give the session back, for a Sync or a Query is over."""
        if self.transaction.is_open:
            self.session.rests(self.conversation)
        else:
            self._forget()
            self.has_savepoint = self.executed = self._wrote = False
            self.session.release(self.conversation)

    def abandon(self) -> None:
        """Undo what was not committed, and give the session back."""
        if self.has_savepoint:
            self.session.savepoint = Savepoint.FAILED
        self.session.leave(self.conversation)

    # -- what is sent --------------------------------------------------------------------------------

    def carry(self, batch: Batch) -> Steps:
        """Send what the client has said, and wait for the answer.

        Raises:
            ServerFailed: That was an error.
            Failure: It can't be sent.
        """
        yield from self._turn()
        yield from self._before(batch.texts, only_reads=batch.only_reads)
        guard, answers = self._guard()
        if batch.uses_unnamed and self.session.unnamed is not self.conversation:
            batch.again.insert(0, self.conversation.unnamed_again())
        if batch.prepares_unnamed or batch.uses_unnamed:
            self.session.unnamed = self.conversation
        self._note(batch.texts, only_reads=batch.only_reads)
        self.listening.is_at(batch.texts)
        data = b"".join((guard, *batch.again, *batch.sent, SYNC))
        again = len(batch.again)
        exchange = self.session.send(self.conversation, self._ended, data, answers, again=again)
        exchange.describes = batch.describes
        yield from self._answer(exchange)
        if exchange.error is not None:
            self.conversation.did_not_prepare(batch, exchange.parsed)
        self._check(exchange)
        yield from self._limit_again()
        if not (self.executed or self.transaction.is_open):
            # It has prepared and described, which leaves nothing open.
            self.has_savepoint = False
            self.session.savepoint = Savepoint.CLEAN
            self.session.release(self.conversation)

    def run(
        self, data: bytes, text: str, *, only_reads: bool, holds: bool = False
    ) -> Generator[None, None, bytes]:
        """Send a Query, or a FunctionCall, and wait for the answer.

        Return the end of it, where that is held back until the commit has been done.

        Raises:
            ServerFailed: It was an error.
            Failure: It can't be sent.
        """
        yield from self._turn()
        yield from self._before([text], only_reads=only_reads)
        guard, answers = self._guard()
        self.session.unnamed = None  # a Query ends it
        self._note([text], only_reads=only_reads)
        self.listening.is_at([text])
        exchange = self.session.send(self.conversation, self._ended, guard + data, answers, simple=True)
        exchange.holds = holds and not only_reads and not self.transaction.is_open
        yield from self._answer(exchange)
        self._check(exchange)
        yield from self._limit_again()
        return exchange.held

    def goes_at_once(self, *, only_reads: bool) -> bool:
        """Return whether the session is free, and nothing has to be asked before, or at the commit."""
        session, transaction = self.session, self.transaction
        if session.escape is not None or self.executed or not session.is_free_for(self.conversation):
            return False
        if not self.has_savepoint and (self._settings or transaction.failed):
            return False
        if only_reads:
            return not self._has_cursors
        if session.deferrable is None:
            return False
        return transaction.is_open or not (
            session.deferrable[0] or self._has_cursors or session.capture.is_wanted
        )

    @property
    def commits_at_once(self) -> bool:
        """Whether a commit has nothing to do on the session."""
        if self.listening.pending.events or self._locals or self._sets or self._has_cursors:
            return False
        wrote = self.has_savepoint and self.transaction.wrote
        return not wrote or self.session.deferrable == ("", "")

    def hurry(self, data: bytes, ended: Callable[[], None], *, only_reads: bool, simple: bool) -> None:
        """Send one statement to which nothing else has to be done; *ended* is called at its end."""
        self.session.acquire(self.conversation)
        guard, answers = self._guard()
        if simple:
            self.session.unnamed = None  # a Query ends it
        if self.session.capture.is_wanted:
            self.listening.is_at(())
        transaction = self.transaction
        if transaction.is_open:
            transaction.used = True
            transaction.wrote |= not only_reads

        def at_its_end(exchange: Exchange) -> None:
            self.active = None
            if exchange.error is not None or exchange.status == "I":
                with suppress(ServerFailed):
                    self._check(exchange)
            elif not transaction.is_open:
                self.session.savepoint = Savepoint.CLEAN if only_reads else Savepoint.DONE
            ended()

        self.active = self.session.send(
            self.conversation, at_its_end, guard + data, answers, simple=simple
        )

    def _limit_again(self) -> Steps:
        if self._lifts_limits:
            self._lifts_limits = False
            yield from self._own(self.session.own("limits") + SYNC)
        yield from self.listening.after()

    def description(self, prepared: bytes, name: bytes) -> Generator[None, None, bytes]:
        """Prepare a statement on the session, and return what rows it gives now.

        Raises:
            ServerFailed: It can't be prepared any more.
        """
        yield from self._turn()
        data = prepared + messages.describe(ord("S"), name) + SYNC
        exchange = yield from self._own(data)
        if exchange.error is not None:
            self._tell(exchange)
        return exchange.described

    def check_syntax(self, text: bytes) -> Steps:
        """Have PostgreSQL read all of a script, for it is run in parts.

        Raises:
            ServerFailed: It has an error.
        """
        # A Parse refuses it either way: for its syntax, or because it has several statements.
        yield from self._turn()
        works = not self.transaction.failed
        if works:
            yield from self._own(self.session.own("check") + SYNC)
        self.session.unnamed = None
        exchange = yield from self._own(Parse(b"", text, b"\0\0").encode() + SYNC)
        said = messages.error_fields(exchange.error or b"")
        if "cannot insert multiple commands" not in said.get("M", ""):
            self._tell(exchange)
        if works:
            undo = self.session.own("uncheck") + self.session.own("release_check")
            yield from self._own(undo + SYNC)

    def fail(self) -> Steps:
        """Have the client's transaction fail, for the gateway has refused a part of it."""
        transaction = self.transaction
        if not transaction.is_open:
            if self.has_savepoint:
                self.session.savepoint = Savepoint.FAILED
        elif not transaction.failed:
            transaction.failed = True
            if self.has_savepoint:
                yield from self._own(self.session.failing)

    def _guard(self) -> tuple[bytes, int]:
        sent, answers = self.session.collect()
        if self.has_savepoint:
            return sent, answers
        self.has_savepoint = True
        self.executed = self._wrote = False
        transaction = self.transaction
        read_only = transaction.read_only if transaction.is_open else transaction.reads_by_default
        self._is_read_only = read_only
        first, more = self.session.guard(self._settings, read_only=read_only)
        return first + sent, more + answers

    def _answer(self, exchange: Exchange) -> Steps:
        self.active = exchange
        while exchange.status is None:
            yield
        self.active = None

    def _ended(self, exchange: Exchange) -> None:
        if self.active is exchange:
            self.conversation.resume()

    def _check(self, exchange: Exchange) -> None:
        if exchange.was_cancelled:
            self.has_savepoint = False
            self.conversation.send(messages.message(Backend.ERROR, exchange.error or b""))
            self.transaction.failed = self.transaction.is_open
            raise ServerFailed
        if exchange.guard_failed:
            refused = Failure(INTERNAL, ESCAPED, self.session.escape or "")
            self.conversation.send(refused.message)
        if self.transaction.is_open:
            self.transaction.failed = exchange.status == "E"
        if exchange.error is not None:
            self._has_failed()
            raise ServerFailed

    def _has_failed(self) -> None:
        if self.transaction.is_open:
            self.transaction.failed = True
        else:
            self.session.savepoint = Savepoint.FAILED

    # -- the gateway's own -----------------------------------------------------------------------------

    def _own(self, data: bytes, *, simple: bool = False) -> Generator[None, None, Exchange]:
        guard, answers = self._guard()
        exchange = self.session.send(None, self._ended, guard + data, answers, simple=simple)
        yield from self._answer(exchange)
        if exchange.was_cancelled:
            self._check(exchange)
        return exchange

    def _ask(self, sql: str, columns: int) -> Generator[None, None, list[str | None]]:
        # Its last row. Its failure is the client's.
        self.session.unnamed = None
        query = messages.query(sql.encode("utf-8", "surrogateescape"))
        exchange = yield from self._own(query, simple=True)
        if exchange.error is not None:
            self._tell(exchange)
        row = exchange.rows[-1] if exchange.rows else []
        if columns and len(row) != columns:
            raise ProtocolError("an answer without what was asked for")
        return row

    def _tell(self, exchange: Exchange) -> None:
        self.conversation.send(messages.message(Backend.ERROR, exchange.error or b""))
        self._has_failed()
        raise ServerFailed

    # -- before and after what it sends ----------------------------------------------------------------

    def _before(self, texts: list[str], *, only_reads: bool) -> Steps:
        if not self.transaction.is_open and len(texts) == 1:
            statements = read(texts[0]).statements  # several are a transaction together
            if len(statements) == 1 and (what := statements[0].needs_transaction) is not None:
                raise Failure(NO_TRANSACTION, f"{what} can only be used in transaction blocks")
            if len(statements) == 1 and (match := _MEANS_NOTHING.match(texts[0])) is not None:
                text = f"SET {match[1].upper()} can only be used in transaction blocks"
                self.conversation.send(messages.warning(NO_TRANSACTION, text))
        yield from self._listen(texts)
        # Some things can't be asked any more when it has run.
        if not only_reads and self.session.deferrable is None and not self.transaction.failed:
            yield from self._learn_deferrable()
        changes = [found for text in texts if (found := settings.sets(text))]
        if not changes:
            return
        if any(each.is_unknown for each in changes):
            raise Failure(UNSUPPORTED, _UNKNOWN_SETTING, hint=_UNKNOWN_SETTING_HINT)
        if any(each.is_fixed for each in changes):
            raise Failure(UNSUPPORTED, _FIXED_SETTING, hint=_FIXED_SETTING_HINT)
        self._lifts_limits |= any(each.is_limit for each in changes)
        if any(each.resets_all for each in changes):
            self.listening.pending.without_numbers()
        base = self.session.base
        unknown = [name for each in changes for name in each.session if name not in base]
        unknown += [name for each in changes for name in each.local if name not in self._locals]
        if unknown:
            unknown = list(dict.fromkeys(unknown))
            row = yield from self._ask(settings.asking(unknown), len(unknown))
            for name, value in zip(unknown, row, strict=True):
                base.setdefault(name, value)
                if any(name in each.local for each in changes):
                    self._locals[name] = value
        for each in changes:
            for name in base if each.resets_all else each.session:
                self._locals.pop(name, None)
                self._sets.add(name)

    def _learn_deferrable(self) -> Steps:
        exchange = yield from self._own(self.session.own("deferrable") + SYNC)
        if exchange.guard_failed:
            raise Failure(INTERNAL, ESCAPED, self.session.escape or "")
        if exchange.error is not None:
            self._tell(exchange)
        self.session.take_deferrable(exchange.rows)

    def _note(self, texts: Iterable[str], *, only_reads: bool) -> None:
        transaction, session = self.transaction, self.session
        for text in texts:
            script = read(text)
            self.touched = self.touched or script.session or _TOUCHES.search(text) is not None
            if script.schema:
                session.schema_changed = True
                session.deferrable = None
            for statement in script.statements:
                transaction.has_savepoints |= statement.verb is Verb.SAVEPOINT
                self.listening.pending.note(statement)
                self._has_cursors |= statement.needs_transaction == "DECLARE CURSOR"
            if transaction.is_open:
                transaction.used = True
                transaction.wrote |= not only_reads
            else:
                self.executed = True
                self._wrote |= not only_reads

    # -- notifications -------------------------------------------------------------------------------

    def _listen(self, texts: list[str]) -> Steps:
        session = self.session
        if any(map(listens, texts)):
            self.conversation.client.hub.listens(self.conversation.client)
            if not (session.capture.is_installed or self.transaction.failed):
                yield from self._install()
        if session.capture.is_wanted:
            yield from self.listening.before(texts)

    def _install(self) -> Steps:
        # What sets the savepoint does that as well, for the whole block.
        session, transaction = self.session, self.transaction
        if transaction.is_open and transaction.parks:
            session.savepoint = self.park() or session.savepoint
        if self.has_savepoint:  # it is done for the rest of the transaction, and once more behind it
            own = (session.capture.install, session.capture.cover)
            yield from self._own(b"".join(map(session.unprepared, own)) + SYNC)

    def noticed(self, body: bytes) -> bool:
        """Take note of what a notice of the server's tells; return whether the client gets it."""
        name = "client_min_messages"
        return self.listening.noticed(body, self._settings.get(name) or self.session.base.get(name))

    def _publish(self) -> None:
        if (refused := self.listening.publish()) is not None:
            self.conversation.send(refused.message)
            self._has_failed()
            raise ServerFailed

    # -- ends ----------------------------------------------------------------------------------------

    def begins(self) -> None:
        """Take note that a transaction has begun: what came before it in one message is part of it."""
        if self.executed:
            self.transaction.used, self.transaction.wrote = True, self._wrote
            self.executed = self._wrote = False

    def becomes_read_only(self) -> Steps:
        """Have the session refuse writes, until the savepoint goes."""
        if self.has_savepoint and self.transaction.read_only and not self._is_read_only:
            self._is_read_only = True
            yield from self._own(self.session.own("read_only") + SYNC)

    def commit(self) -> Steps:
        """Do what PostgreSQL does at a commit, for that of the session never comes.

        Raises:
            ServerFailed: A constraint does not hold.
        """
        if self.has_savepoint:
            yield from self._commit_on_session()
        self._publish()
        self._forget()

    def _commit_on_session(self) -> Steps:
        wrote = self.transaction.wrote if self.transaction.is_open else self._wrote
        if wrote and self.session.deferrable is None:
            yield from self._learn_deferrable()
        by_name = not (
            {"role", "session_authorization"} & {*self._locals, *self._sets, *self._settings}
        )
        sql = self.session.at_commit(checks=wrote, cursors=self._has_cursors, by_name=by_name)
        asked = list(self._sets)
        sql += [settings.setting(self._locals)] if self._locals else []
        counts = self.session.capture.is_wanted and (bool(sql) or self.listening.pending.is_numbered)
        sql += [settings.asking([*asked, COUNTER] if counts else asked)] if asked or counts else []
        if not sql:
            return
        covers = self.session.capture.is_wanted and COVERED & {*self._locals, *self._sets}
        if covers:
            yield from self.listening.uncover()
        row = yield from self._ask("; ".join(sql), len(asked) + counts)
        yield from self.listening.after()
        if counts:
            self.listening.pending.settle(int(row.pop() or 0))
        if asked:
            self._settings.update(zip(asked, row, strict=True))
            self._set_defaults()
            self.session.applied.update(zip(asked, row, strict=True))

    def commit_implicit(self) -> Steps:
        """Do so for what was done outside of a transaction, up to a Sync or by a Query."""
        if self.transaction.is_open or not self.executed:
            return
        yield from self.commit()
        if self.has_savepoint:
            self.session.savepoint = Savepoint.DONE if self._wrote else Savepoint.CLEAN

    def ended(self, how: Ends) -> None:
        """Take note of the end of the client's transaction."""
        self._forget()
        if self.has_savepoint:
            self.has_savepoint = False
            if how is Ends.UNDONE or (self.transaction.was_read_only and not self.transaction.wrote):
                self.session.savepoint = Savepoint.FAILED
            else:
                kept = Savepoint.DONE if self.transaction.wrote else Savepoint.CLEAN
                self.session.savepoint = kept
        self.transaction.wrote = False

    def reset(self) -> None:
        """Take note that the client's own settings are as they were."""
        self._settings.clear()
        self._set_defaults()

    def _set_defaults(self) -> None:
        read_only = self._settings.get("default_transaction_read_only")
        isolation = self._settings.get("default_transaction_isolation")
        self.transaction.reads_by_default = read_only == "on"
        self.transaction.default_isolation = isolation

    def _forget(self) -> None:
        self._locals.clear()
        self._sets.clear()
        self.listening.clear()
        self._has_cursors = False
