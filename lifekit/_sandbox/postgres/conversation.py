"""What one client says in a block, and what is answered: by the session, or here.

What controls a transaction never reaches the server. All else does, under names of the session's own,
up to the client's next Sync or Flush, or to the next thing that is answered here. A Flush is sent as a
Sync: inside of the real transaction that commits nothing. An error makes the rest be skipped, up to the
Sync, as the server itself does.

It is one generator, which stops where it waits: for the client, for its turn, for the server. Whatever
may have changed resumes it, and it looks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING

from . import control, messages, names
from .carrier import Batch, Carrier, ServerFailed, Steps
from .control import UNSUPPORTED, Failure, Local, answer, control_of, has_local, is_local
from .copying import Copying
from .messages import READY, Backend, Bind, Frontend, Parse
from .notifications import Ear, found, has_parts, stands_alone
from .real import Exchange
from .refusals import ACTIVE_TRANSACTION, CYCLE, IDLE, LOCK_NOT_AVAILABLE, OTHER_ROWS, WAY_OUT, hinted
from .session import CANCELED, Savepoint, Session
from .sql import Statement, Verb, read

if TYPE_CHECKING:
    from .virtual import VirtualConnection  # whose conversation it is

NO_STATEMENT, NO_PORTAL, DUPLICATE_STATEMENT = "26000", "34000", "42P05"
_STATEMENT = ord("S")
_ROLLBACK, _SET = Statement("ROLLBACK", Verb.ROLLBACK), Statement("SET", Verb.SET_TRANSACTION)
_ALONE = frozenset((Frontend.QUERY, Frontend.FUNCTION_CALL))  # which no Sync follows


class Conversation:
    """One client in one block."""

    def __init__(self, client: VirtualConnection, session: Session) -> None:
        self.client, self.session = client, session
        self.carrier = Carrier(self, session)
        self.transaction = self.carrier.transaction
        self.ear = Ear(client.channels or (), client.send)
        self._inbox: deque[tuple[int, bytes]] = deque()
        self._batch = Batch()
        self._portals: dict[bytes, bytes | Local] = {}
        self._bound: dict[bytes, str] = {}  # the texts of portals
        self._unnamed: tuple[Bind, Parse, Batch] | None = None  # that portal, until it is executed
        self._copying = Copying(session.real.send)
        self._sql = names.PreparedBySql()
        self._is_between = True  # the client may stop here
        self._runs = self._called = self._hurries = False  # the last one by the short way
        self._steps = self._converse()
        next(self._steps)

    # -- how far it is -----------------------------------------------------------------------------

    @property
    def is_active(self) -> bool:
        """Whether the server works for it."""
        return self.carrier.active is not None

    @property
    def rests(self) -> bool:
        """Whether nothing is under way."""
        return self._is_between and not self._inbox

    @property
    def is_over(self) -> bool:
        """Whether nothing is under way, no transaction either."""
        return self._is_between and not (self._inbox or self.transaction.is_open)

    @property
    def may_move(self) -> bool:
        """Whether it may be in another block with what it says next, and nobody can tell."""
        return self.is_over or (self.rests and self.transaction.parks)

    def parks(self) -> bool:
        """Return whether another client may have the session for now."""
        return self.rests and self.transaction.is_open and self.transaction.parks

    def park(self) -> Savepoint | None:
        """Leave the savepoint to another; return how that stands, None where it was not used."""
        return self.carrier.park()

    def mark(self) -> None:
        """Note how it stands, for a block begins inside of the one that it is in."""
        self._sql.mark(self.client.hub.depth)
        self.carrier.mark(self.client.hub.depth)
        self.ear.mark(self.client.hub.depth)

    def back(self) -> None:
        """Stand as before a block that ends inside of another one."""
        self.carrier.back(self.client.hub.depth)
        self.ear.back(self.client.hub.depth)
        closed, again = self._sql.back(self.client.hub.depth)
        self.session.garbage += closed
        self.client.prepared = again | self.client.prepared

    def over(self) -> None:
        """End, with the block."""
        self._steps.close()
        self.back()
        self.session.leave(self)

    def gone(self) -> None:
        """End, because the client has gone: what it has not committed is undone."""
        if not self.is_active:
            self._abandon()
        elif self._copying.is_on:  # the server reads, and heeds nothing else
            self._copying.fail()
        else:
            self.client.hub.cancel_active(self)

    def _abandon(self) -> None:
        self._steps.close()
        self.session.garbage += [messages.close(b"S", name) for name in self.client.known.values()]
        self.client.known.clear()
        self.session.garbage += self._sql.close_all()
        self.carrier.abandon()
        self.client.hub.rests_in_block()

    def resume(self) -> None:
        """Go on, as far as that is possible now."""
        # What is sent may be answered at once, by a client that is joined in memory.
        self._called = True
        if self._runs:
            return
        self._runs = True
        try:
            while self._called:
                self._called = False
                if self.client.closed:
                    active = self.carrier.active
                    if active is None or active.status is not None:
                        self._abandon()
                    return
                next(self._steps)
        finally:
            self._runs = False

    # -- what it waits for -------------------------------------------------------------------------

    def take(self, kind: int, whole: bytes) -> None:
        """Take a message of the client's, to work at when it is resumed."""
        if self._copying.is_on and not self._inbox:
            self._copy(kind, whole)
            return
        self._inbox.append((kind, whole[5:]))

    def _message(self) -> Generator[None, None, tuple[int, bytes]]:
        while not self._inbox or self._hurries:
            yield
        return self._inbox.popleft()

    def refuse_to_wait(self, holder: Conversation) -> None:
        """Say that the one who has the session does nothing in its transaction."""
        who, _ = self.client.hub.explain(self.client, holder.client)
        self._refuse(IDLE, holder, who)

    def refuse_at_once(self, holder: Conversation) -> None:
        """Say so, where it can be seen that the one who has the session waits for this."""
        who, is_impossible = self.client.hub.explain(self.client, holder.client)
        if is_impossible:
            self.session.leave(self)
            self._refuse(CYCLE, holder, who)

    def _refuse(self, text: str, holder: Conversation, who: str) -> None:
        who = who or f"It is connection {holder.client.number}."
        self.carrier.refusal = Failure(LOCK_NOT_AVAILABLE, text, who, WAY_OUT)
        self.resume()

    def cancel(self) -> None:
        """End what it does, or waits for."""
        if self.is_active:
            self.client.hub.cancel_active(self)
        elif self.session.has_waiting(self):
            self.session.leave(self)
            self.carrier.refusal = Failure(CANCELED, "canceling statement due to user request")
            self.resume()

    # -- the short way -----------------------------------------------------------------------------

    @property
    def is_free(self) -> bool:
        """Whether nothing has been said of which more is to come."""
        return self._is_between and not (self._inbox or self._hurries or self._copying.is_on)

    def hurries(self, bound: bytes | None, *, is_whole: bool) -> None:
        """Take note that something is sent at once: what is bound to the unnamed portal, or a Query."""
        self._is_between, self._hurries = False, True
        if bound is not None and self.transaction.is_open:
            self._portals[b""], self._bound[b""] = b"", bound.decode("utf-8", "surrogateescape")
            self.transaction.has_portals |= not is_whole

    def controls_at_once(self, statement: Statement) -> bool:
        """Begin or end a transaction, where the server does not have to know; return whether it was."""
        verb, failed = statement.verb, self.transaction.failed
        if verb is Verb.BEGIN and self.transaction.is_open:
            return False
        if verb is Verb.COMMIT and (failed or not self.carrier.commits_at_once):
            return False
        self._control_now(statement)
        self._end()
        return True

    def has_hurried(self) -> None:
        """Go on: it has been answered."""
        self._hurries = False
        if self.client.closed:
            self._abandon()
            return
        self._end()
        if self._inbox:
            self.resume()

    # -- what it says ------------------------------------------------------------------------------

    def _converse(self) -> Steps:
        while True:
            self._is_between = not (self._batch.sent or self.carrier.executed)
            kind, body = yield from self._message()
            self._is_between = False
            try:
                yield from self._say(kind, body)
                continue
            except Failure as failure:
                self.client.send(failure.message)
                yield from self.carrier.fail()
            except ServerFailed:
                pass
            self._batch = Batch()
            while kind not in _ALONE and kind != Frontend.SYNC:
                kind, body = yield from self._message()
            self._end()

    def _say(self, kind: int, body: bytes) -> Steps:
        match kind:
            case Frontend.PARSE:
                yield from self._parse(Parse.read(body))
            case Frontend.BIND:
                yield from self._bind(Bind.read(body))
            case Frontend.DESCRIBE:
                yield from self._describe(*messages.read_target(body))
            case Frontend.EXECUTE:
                yield from self._execute(*messages.read_execute(body))
            case Frontend.CLOSE:
                yield from self._close(*messages.read_target(body))
            case Frontend.FLUSH:
                yield from self._flush()
            case Frontend.SYNC:
                yield from self._flush(syncs=True)
                yield from self.carrier.commit_implicit()
                self._end()
            case Frontend.QUERY:
                yield from self._flush()
                yield from self._query(messages.read_query(body))
                self._end()
            case Frontend.FUNCTION_CALL:
                yield from self._flush()
                whole = messages.message(kind, body)
                yield from self.carrier.run(whole, "", only_reads=False)
                yield from self.carrier.commit_implicit()
                self._end()
            case Frontend.COPY_DATA | Frontend.COPY_DONE | Frontend.COPY_FAIL:
                pass  # of a COPY that has failed: the server ignores it as well
            case _:
                raise messages.ProtocolError(f"a message {bytes([kind])!r} after the login")

    def _end(self) -> None:
        # A Sync, or a Query, is over. What the client answers may come before this returns.
        self._is_between = True
        if not self.transaction.is_open:
            self._drop_portals()
            self.ear.tell()
        self.carrier.rests()
        self.client.send(READY[self.transaction.status])
        self.client.hub.rests_in_block()

    def _flush(self, *, syncs: bool = False) -> Steps:
        if not self._batch.sent:
            return
        batch = self._batch
        batch.syncs = syncs
        try:
            yield from self.carrier.carry(batch)
        finally:
            self._batch = Batch()
            self._copying.end()

    def unnamed_again(self) -> bytes:
        """Return what prepares the client's unnamed statement."""
        return self._encoded(self.client.prepared[b""])

    def did_not_prepare(self, batch: Batch, parsed: int) -> None:
        """Take note that of a batch only so many statements were prepared."""
        for name in batch.parsed[parsed:]:
            self.client.prepared.pop(name, None)
            self.client.forget_on_session(name)
        for name in batch.names_again:
            self.client.forget_on_session(name)

    # -- statements and portals ------------------------------------------------------------------------

    def _parse(self, prepared: Parse) -> Steps:
        name = prepared.name
        if name and name in self.client.prepared:
            shown = name.decode("utf-8", "replace")
            yield from self._flush()
            raise Failure(DUPLICATE_STATEMENT, f'prepared statement "{shown}" already exists')
        if control_of(prepared) is not None:
            yield from self._flush()
            self._remember(prepared)
            self.client.send(messages.PARSE_COMPLETE)
            return
        self._remember(prepared)
        self._batch.sent.append(self._encoded(prepared))
        self._batch.parsed.append(name)

    def _remember(self, prepared: Parse) -> None:
        self.client.prepared[prepared.name] = prepared
        self.client.stale.add(prepared.name)
        if prepared.name:
            self.client.forget_on_session(prepared.name)
        else:
            self._batch.prepares_unnamed = True

    def _name(self, name: bytes) -> bytes:
        # What a statement is called on the session. The unnamed one is everybody's there.
        if not name:
            return b""
        known = self.client.known
        if name not in known:
            known[name] = self.session.unique_name()
        return known[name]

    def _encoded(self, prepared: Parse) -> bytes:
        script = read(prepared.text.decode("utf-8", "surrogateescape"))
        name = self._name(prepared.name)
        prepared = replace(prepared, text=found(prepared.text))
        if script.session and len(script.statements) == 1:
            text = self._renamed(prepared.text.decode("utf-8", "surrogateescape"))
            prepared = replace(prepared, text=text.encode("utf-8", "surrogateescape"))
        return prepared.encode(name)

    def _statement(self, name: bytes) -> tuple[Parse, Local | None]:
        # What the client has prepared, which is prepared on the session, too, unless it may be local.
        prepared = self.client.prepared.get(name)
        if prepared is None:
            shown = name.decode("utf-8", "replace")
            told = f'prepared statement "{shown}"' if name else "unnamed prepared statement"
            raise Failure(NO_STATEMENT, f"{told} does not exist")
        control = control_of(prepared)
        if control is not None:
            return prepared, control
        if name:
            if name not in self.client.known:
                self._batch.again.append(self._encoded(prepared))
                self._batch.names_again.append(name)
        elif not self._batch.prepares_unnamed:
            self._batch.uses_unnamed = True
        return prepared, None

    def _bind(self, bound: Bind) -> Steps:
        if bound.statement not in self.client.prepared:
            yield from self._flush()
        yield from self._check_rows(bound.statement)
        prepared, control = self._statement(bound.statement)
        if control is not None and is_local(control, self.transaction):
            yield from self._flush()
            self._portals[bound.portal] = control
            self.client.send(messages.BIND_COMPLETE)
            return
        text = prepared.text.decode("utf-8", "surrogateescape")
        if self._batch.texts and self.session.capture.is_wanted and stands_alone(text):
            yield from self._flush()
            self._statement(bound.statement)
        statement = self._name(bound.statement)
        if control is not None:  # SAVEPOINT and the like, for this once
            self._batch.again.append(prepared.encode(b""))
            self._batch.prepares_unnamed = True
            statement = b""
        # Under the client's own name, by which SQL may speak of it: nobody else has the session then.
        portal = self._portals[bound.portal] = bound.portal
        self._bound[portal] = text
        self._batch.sent.append(bound.encode(portal, statement))
        if not portal:
            self._unnamed = (bound, prepared, self._batch) if control is None else None

    def _check_rows(self, name: bytes) -> Steps:
        # Where the schema has changed since, PostgreSQL says so to who expects other rows. What is
        # prepared anew is another statement, and would not know.
        known, session = self.client.known, self.session
        expected = self.client.descriptions.get(name)
        if expected is None or name in known or not session.may_differ:
            return
        yield from self._flush()
        prepared = self.client.prepared[name]
        again = self._encoded(prepared)
        found = yield from self.carrier.description(again, known[name])
        if found != expected:
            raise Failure(UNSUPPORTED, OTHER_ROWS, source="RevalidateCachedQuery")

    def _describe(self, what: int, name: bytes) -> Steps:
        if what == _STATEMENT:
            if name not in self.client.prepared:
                yield from self._flush()
            _, control = self._statement(name)
            if control is not None:
                yield from self._flush()
                self.client.send(messages.NO_PARAMETERS + messages.NO_DATA)
            else:
                self._batch.sent.append(messages.describe(what, self._name(name)))
                self._batch.describes.append(name)
            return
        portal = yield from self._portal(name)
        if not isinstance(portal, bytes):
            yield from self._flush()
            self.client.send(messages.NO_DATA)
        else:
            self._batch.sent.append(messages.describe(what, portal))
            self._batch.describes.append(None)

    def _portal(self, name: bytes) -> Generator[None, None, bytes | Local]:
        # One that a DECLARE made has on the session the name that the client gave it.
        portal = self._portals.get(name, name or None)
        if portal is None:
            yield from self._flush()
            raise Failure(NO_PORTAL, 'portal "" does not exist')
        return portal

    def _execute(self, name: bytes, rows: bytes) -> Steps:
        portal = yield from self._portal(name)
        if isinstance(portal, names.Forgets):
            yield from self._flush()
            yield from self._forget(portal.tag)
            return
        if isinstance(portal, Statement):
            yield from self._flush()
            yield from self._control(portal)
            return
        if not portal and self._unnamed is not None:
            self._bind_again(*self._unnamed)
        text = self._bound.get(portal, "")
        self.transaction.has_portals |= rows != b"\0\0\0\0"
        self._batch.texts.append(text)
        self._batch.only_reads &= bool(text) and read(text).reads
        self._batch.sent.append(messages.execute(portal, rows))
        if self.session.capture.is_wanted and stands_alone(text):
            yield from self._flush()

    def _bind_again(self, bound: Bind, prepared: Parse, batch: Batch) -> None:
        # After a Flush in between: what the gateway itself says, it says by the unnamed portal as well.
        self._unnamed = None
        if batch is not self._batch and self.client.prepared.get(bound.statement) is prepared:
            self._statement(bound.statement)
            self._batch.again.append(bound.encode(b"", self._name(bound.statement)))

    def _close(self, what: int, name: bytes) -> Steps:
        yield from self._flush()
        if what == _STATEMENT:
            self.client.prepared.pop(name, None)
            self.client.stale.add(name)
            self.client.forget_on_session(name)
        else:
            portal = self._portals.pop(name, name)
            if isinstance(portal, bytes):
                self.session.garbage.append(messages.close(b"P", portal))
        self.client.send(messages.CLOSE_COMPLETE)

    def _drop_portals(self) -> None:
        named = [portal for portal in self._portals.values() if isinstance(portal, bytes) and portal]
        self.session.garbage += [messages.close(b"P", name) for name in named]
        self._portals.clear()
        self._bound.clear()

    # -- simple queries ------------------------------------------------------------------------------

    def _query(self, text: bytes) -> Steps:
        if text == control.RESET and not (self.transaction.is_open or self.carrier.touched):
            self.ear.channels.clear()
            self.client.send(control.RESET_DONE)
            return
        decoded = text.decode("utf-8", "surrogateescape")
        script = read(decoded)
        if not script.statements:
            self.client.send(messages.message(Backend.EMPTY_QUERY))
            return
        text = found(text)
        transaction = self.transaction
        if len(script.statements) == 1 and (script.session or script.local):
            decoded = self._renamed(decoded)
            if (forgets := names.forgets(decoded)) is not None:
                yield from self._forget(forgets.tag)
                return
            text = decoded.encode("utf-8", "surrogateescape")
        parts = self.session.capture.is_wanted and text != control.RESET and has_parts(script)
        if not (parts or has_local(script, transaction)):
            end = yield from self._run(text, decoded, only_reads=script.reads, holds=True)
            yield from self.carrier.commit_implicit()
            if end:
                self.client.send(end)
            if text == control.RESET:
                self.carrier.touched = False
                self.ear.channels.clear()
            return
        if len(script.statements) > 1:
            yield from self.carrier.check_syntax(text)
        for statement in script.statements:
            if is_local(statement, transaction):
                yield from self._control(statement)
            else:
                each = statement.text.encode("utf-8", "surrogateescape")
                yield from self._run(each, statement.text, only_reads=False)
        yield from self.carrier.commit_implicit()

    def _run(
        self, text: bytes, decoded: str, *, only_reads: bool, holds: bool = False
    ) -> Generator[None, None, bytes]:
        try:
            query = messages.query(text)
            return (yield from self.carrier.run(query, decoded, only_reads=only_reads, holds=holds))
        finally:
            self._copying.end()

    def _renamed(self, text: str) -> str:
        text, prepared = names.renamed(text, f"lifekit_{self.client.number}_")
        if prepared is not None:
            self._sql.known.add(prepared.encode("utf-8", "surrogateescape"))
        return text

    def _forget(self, tag: str) -> Steps:
        # DEALLOCATE ALL would be that of all clients, and DISCARD ALL does not run in a transaction.
        if self.transaction.failed:
            yield from self._control(_SET)  # which says so
        if tag == "DISCARD ALL" and self.transaction.is_open:
            raise Failure(ACTIVE_TRANSACTION, "DISCARD ALL cannot run inside a transaction block")
        self.session.garbage += [messages.close(b"S", name) for name in self.client.known.values()]
        self.session.garbage += self._sql.close_all()
        self.client.known.clear()
        self._sql.forgotten.update(self.client.prepared)
        self.client.prepared.clear()
        if tag == "DISCARD ALL":
            self.carrier.reset()
            self.ear.channels.clear()
        self.client.send(messages.complete(tag))

    # -- transactions ----------------------------------------------------------------------------------

    def _control(self, statement: Statement) -> Steps:
        transaction = self.transaction
        if statement.verb is Verb.COMMIT and transaction.is_open and not transaction.failed:
            try:
                yield from self.carrier.commit()
            except ServerFailed:
                self._control_now(_ROLLBACK, b"")
                raise
        self._control_now(statement)
        if statement.read_only:
            yield from self.carrier.becomes_read_only()

    def _control_now(self, statement: Statement, said: bytes | None = None) -> None:
        answered, ended = answer(statement, self.transaction)
        if ended is not None:
            self._drop_portals()
            self.carrier.ended(ended)
        elif statement.verb is Verb.BEGIN:
            self.carrier.begins()
        self.client.send(answered if said is None else said)

    # -- COPY ------------------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Send to the client."""
        self.client.send(data)

    def described(self, name: bytes | None, description: bytes) -> None:
        """Take note of what the client knows of the rows of a statement."""
        self.client.described(name, description)

    def refused(self, error: bytes) -> bytes:
        """Return an error of the server's, with a hint where it is the sandbox's doing."""
        return hinted(error, in_transaction=self.transaction.is_open)

    def copy_begins(self, exchange: Exchange) -> None:
        """Send the client's data, of which some may have come before the server asked for it."""
        self._copying.begin(exchange)
        if self.client.closed:
            self.gone()
        while self._inbox and self._copying.is_on:
            kind, body = self._inbox.popleft()
            self._copy(kind, messages.message(kind, body))

    def _copy(self, kind: int, whole: bytes) -> None:
        if self._copying.take(kind, whole) and not self._batch.syncs:
            self._inbox.append((kind, b""))
