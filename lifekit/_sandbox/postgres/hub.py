"""All connections of a gateway: who stands where, as blocks begin and end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from secrets import compare_digest, token_bytes
from typing import NamedTuple, Protocol

from . import messages, session
from .control import UNSUPPORTED
from .conversation import Conversation
from .messages import CancelRequest, Startup
from .real import Belongs, RealConnection, Relay
from .session import Session, Timer
from .virtual import Socket, VirtualConnection

GOES_AHEAD = 0.05
"""Seconds in which the server surely does what goes ahead of a statement: it sets a savepoint."""
_LEFT_OPEN = (
    "when the sandbox ended, a connection was in the midst of a transaction or a statement, and it did "
    "not end within the time that it was given. It was closed."
)
_POOLED = (
    "lifekit's sandbox has no connection of its own: a pooler, as PgBouncer, stands before the server. "
    "What one block sets and prepares would stay on the pooler's connections. Let the tests connect to "
    "the server itself."
)
FIRST_NUMBER = 1 << 30
"""No process of a server has the number of a client."""
UNREACHABLE = "08006"
_UNTIL_CANCELLED = 2.0
"""Seconds until what was cancelled has surely ended."""
TOO_LATE = "57P01"


class Outside(Protocol):
    """What does the input and output for a hub."""

    def encrypt(self, client: VirtualConnection) -> None:
        """Answer a client that asks for encryption."""

    def connect(self, client: VirtualConnection, first: Startup) -> None:
        """Reach the server for a client, and call `VirtualConnection.connected`."""

    def gone(self, client: VirtualConnection) -> None:
        """Forget a client."""

    def later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call something after some seconds."""
        ...

    def explain(self, waiting: int, holding: int) -> tuple[str, bool]:
        """Return who has a client for which another one waits, and whether that wait can't end."""
        ...


class Begun(NamedTuple):
    """How the beginning of a block went."""

    busy: str | None = None
    """Who was in the midst of something, so that it did not begin."""
    lost: str | None = None
    """Why the block around it is lost, so that it did not begin."""
    has_closed: bool = False
    """Whether connections have been lost since the last one."""


class Hub:
    """The clients, and the sessions that they share: one for each server, database and user."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        self.clients: dict[int, VirtualConnection] = {}
        self.depth = 0
        """How many blocks there are, each inside the one before."""
        self.unsent: list[VirtualConnection] = []
        """The clients that are to be sent something."""
        self._sessions: dict[Belongs, Session] = {}
        self._lenders: dict[Session, Relay] = {}
        self._orphans: set[Relay] = set()  # whose clients have gone while they were lent
        self._numbers = FIRST_NUMBER - 1
        self._at_rest: Callable[[], None] | None = None
        """What is done as soon as nothing is under way: a block begins inside another one, or ends."""
        self._ended: Callable[[list[str]], None] | None = None
        self._lost: tuple[int, str] | None = None  # of which block the work is lost, and why
        self._is_refused = False  # the block that was to begin: its end has nothing to undo
        self._waiting: deque[Callable[[], None]] = deque()  # for the end that is under way
        self._overdue: Timer | None = None  # what ends the wait for those that are busy
        self._wrong: list[str] = []  # of those that are undone
        self.schema_undone = False
        """Whether the last block that ended had changed a schema."""

    def _later(self, seconds: float, call: Callable[[], None]) -> Timer:
        def ring() -> None:
            call()
            self.flush()

        return self._outside.later(seconds, ring)

    def flush(self) -> None:
        """Send what was answered. To be called at the end of each event that comes from outside."""
        while self.unsent:
            clients, self.unsent = self.unsent, []
            for client in clients:
                client.flush()

    @property
    def is_open(self) -> bool:
        """Whether there is a block."""
        return self.depth > 0

    @property
    def is_turning(self) -> bool:
        """Whether a block is about to begin inside another one, or to end."""
        return self._at_rest is not None

    @property
    def schema_changed(self) -> bool:
        """Whether the block has changed a schema: then clients know what is not true any more."""
        return any(each.schema_changed for each in self._sessions.values())

    @property
    def can_begin(self) -> bool:
        """Whether nothing is under way that the beginning of a block has to wait for."""
        return (
            self._ended is None
            and not self.is_turning
            and (not self.depth or self._all_rest(self.depth))
        )

    @property
    def can_end(self) -> bool:
        """Whether nothing is under way that the end of the innermost block has to wait for."""
        return not (self.is_turning or self._is_refused) and self._all_rest(self.depth - 1)

    def _all_rest(self, depth: int) -> bool:
        for client in self.clients.values():
            if not self._rests(client, depth):
                return False
        return not any(each.is_busy for each in self._sessions.values())

    @staticmethod
    def _rests(client: VirtualConnection, depth: int) -> bool:
        # So that there may be so many blocks, whatever it says next.
        said = client.conversation
        if client.is_asking or said is None:
            return not client.is_asking
        return said.may_move if depth else said.is_over

    # -- clients -----------------------------------------------------------------------------------

    def new_client(self, socket: Socket) -> VirtualConnection:
        """Take a client that has just reached the gateway."""
        self._numbers += 1
        client = VirtualConnection(self, socket, self._numbers, token_bytes(4))
        self.clients[client.number] = client
        return client

    def has_seen(self, number: int) -> bool:
        """Return whether a client has that number, or had it."""
        return FIRST_NUMBER <= number <= self._numbers

    def explain(self, waiting: VirtualConnection, holding: VirtualConnection) -> tuple[str, bool]:
        """Return who has a client for which another one waits, and whether that wait can't end."""
        return self._outside.explain(waiting.number, holding.number)

    def encrypt(self, client: VirtualConnection) -> None:
        """Answer a client that asks for encryption."""
        self._outside.encrypt(client)

    def connect(self, client: VirtualConnection, first: Startup) -> None:
        """Reach the server for a client that has said who it is."""
        if b"replication" in first.options:
            text = "lifekit's gateway does not carry replication"
            client.send(messages.error(UNSUPPORTED, text, severity="FATAL"))
            client.close()
            return
        self._outside.connect(client, first)

    def unreachable(self, client: VirtualConnection, why: str) -> None:
        """Tell a client that the server can't be reached."""
        client.send(messages.error(UNREACHABLE, why, severity="FATAL"))
        client.close()
        self.flush()

    def refuse_pooler(self, client: VirtualConnection) -> None:
        """Tell a client that it may have another connection to the server with each transaction."""
        client.send(messages.error(UNSUPPORTED, _POOLED, severity="FATAL"))
        client.close()
        self._wrong.append(_POOLED)
        self.rests_in_block()

    def lost(self, client: VirtualConnection, relay: Relay) -> None:
        """Take note that the server ended a connection."""
        relay.is_lost = True
        for each, lender in list(self._lenders.items()):
            if lender is relay:
                self._lose(each, "the server closed it")
                for other in self._clients_of(each):
                    other.close()
                self._give_back(relay, broken=False)  # the server has undone it
        client.close()
        self._go_on()

    def _lose(self, lost: Session, why: str) -> None:
        self._drop(lost)
        if lost.used_since is not None and self._lost is None and lost.is_open:
            self._lost = lost.used_since, why

    def _clients_of(self, shared: Session) -> list[VirtualConnection]:
        return [
            each
            for each in self.clients.values()
            if each.conversation is not None and each.conversation.session is shared
        ]

    def gone(self, client: VirtualConnection) -> None:
        """Take note that a client has closed its connection."""
        self.clients.pop(client.number, None)
        self._outside.gone(client)
        if client.relay is not None:
            if client.relay.lent is not None:
                self._orphans.add(client.relay)
            else:
                self._close(client.relay)

    def close(self) -> None:
        """End all connections."""
        for client in list(self.clients.values()):
            client.close()
        for relay in self._orphans:
            self._close(relay)
        self._orphans.clear()

    def _close(self, relay: Relay) -> None:
        for each, lender in list(self._lenders.items()):
            if lender is relay:
                self._drop(each)
        relay.send(messages.TERMINATE)
        relay.close()

    def _drop(self, dropped: Session) -> None:
        self._lenders.pop(dropped, None)
        self._sessions = {key: each for key, each in self._sessions.items() if each is not dropped}

    # -- cancelling ----------------------------------------------------------------------------------

    def cancel(self, request: CancelRequest) -> None:
        """End what a client does, where the request knows its secret."""
        client = self.clients.get(request.number)
        if client is not None and compare_digest(client.secret, request.secret):
            self.cancel_client(client)

    @staticmethod
    def cancel_client(client: VirtualConnection) -> None:
        """End what a client does."""
        if client.conversation is not None:
            client.conversation.cancel()
        elif client.relay is not None:
            client.relay.cancel(lambda: None)

    def cancel_active(self, conversation: Conversation, *, is_late: bool = False) -> None:
        """End what the server does for a client in a block; nothing else is sent until it knows."""
        shared, active = conversation.session, conversation.carrier.active
        if shared not in self._lenders or active is None:
            return
        if not shared.is_at(active) and not is_late:
            # It is cancelled when the server has done what goes ahead, which it does not tell at once.
            def again() -> None:
                if conversation.carrier.active is active:
                    self.cancel_active(conversation, is_late=True)

            self._later(GOES_AHEAD, again)
            return

        def arrived() -> None:
            shared.cancel_ended()
            self._go_on()
            self.flush()

        shared.cancel_begins()
        self._lenders[shared].cancel(arrived)

    # -- blocks --------------------------------------------------------------------------------------

    def begin(self, begun: Callable[[Begun], None] = lambda _: None) -> None:
        """Begin a block: clients that are idle are in it with the next thing that they say.

        What a session is still to undo of the block before goes ahead on the same connection. Inside
        of another block it begins when nothing is under way, and *begun* is called then. It has to be
        ended even if it did not begin.
        """
        if self._ended is not None:
            self._waiting.append(partial(self.begin, begun))
            return
        if self.depth:
            self._begin_inside(begun)
            return
        self.depth = 1
        for client in self.clients.values():
            client.ask_for_channels()
        waiting = {client.relay for client in self.clients.values() if client.stays_outside()}
        for each in list(self._sessions.values()):
            lender = self._lenders[each]
            if lender.is_idle and lender not in waiting:
                self._lend(each)
            else:  # its client is in the midst of something, which stays outside
                self._drop(each)
        begun(Begun())

    def _begin_inside(self, begun: Callable[[Begun], None]) -> None:
        def begin() -> None:
            self.depth += 1
            for each in self._sessions.values():
                each.begin_inside()
            for client in self.clients.values():
                if client.conversation is not None:
                    client.conversation.mark()
            self._turned()
            begun(Begun())

        def refuse() -> None:
            found = [each for each in self.clients.values() if not self._rests(each, self.depth)]
            who = self._outside.explain(0, found[0].number)[0] if found else ""
            self._is_refused = True
            self._turned()
            begun(Begun(busy=f" {who}".rstrip()))

        for each in list(self._sessions.values()):
            if each.escape is not None:
                self._cut(each)
        if self._lost is not None:
            self._is_refused = True
            begun(Begun(lost=self._lost[1]))
            return
        self._wait_for_rest(begin, refuse)

    def _wait_for_rest(self, then: Callable[[], None], late: Callable[[], None]) -> None:
        self._at_rest = then
        self._go_on()
        if self._at_rest is not None:
            self._overdue = self._later(session.PATIENCE, late)
        self.flush()

    def _turned(self) -> None:
        self._at_rest = None
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None
        if self.depth:
            for client in list(self.clients.values()):
                client.released()

    def _lend(self, shared: Session) -> None:
        lender = self._lenders[shared]
        lender.lent = shared.real
        shared.begin(lender.sets)
        for _ in range(1, self.depth):
            shared.begin_inside()
        clients = self._clients_at(lender.belongs[:2])
        shared.capture.is_wanted = any(each.is_listener for each in clients)

    def schema_changes(self) -> None:
        """Take note that a client changes it outside of blocks."""
        for each in self._sessions.values():
            each.deferrable = None

    def forgets(self, relay: Relay) -> None:
        """Take note that what is prepared on a connection is forgotten: the next block begins anew."""
        for each, lender in list(self._lenders.items()):
            if lender is relay:
                self._drop(each)

    def wakes(self, client: VirtualConnection, *, is_late: bool = False) -> None:
        """Move a client that says something into the block, unless it is in the midst of something.

        One that *is_late* has said it before the end began that is under way.
        """
        if not (self.is_open or (is_late and self._ended is not None)) or not client.is_idle:
            return
        assert client.relay is not None
        key = client.relay.belongs
        client.ask_for_channels(lends=key not in self._sessions)
        if client.is_asking:
            return
        if key not in self._sessions:
            shared = Session(RealConnection(client.relay.send, client.send), self._later)
            self._sessions[key] = shared
            self._lenders[shared] = client.relay
            self._lend(shared)
        shared = self._sessions[key]
        if client.knows_settings(self._lenders[shared]):
            client.enter(shared)

    # -- notifications -------------------------------------------------------------------------------

    def _clients_at(self, place: tuple[object, bytes]) -> list[VirtualConnection]:
        # Whoever has come to that server and database, as whichever user.
        return [
            each
            for each in self.clients.values()
            if each.relay is not None and each.relay.is_ready and each.relay.belongs[:2] == place
        ]

    def listens(self, client: VirtualConnection) -> None:
        """Take note that a client in a block listens to something."""
        assert client.relay is not None
        for key, each in self._sessions.items():
            each.capture.is_wanted |= key[:2] == client.relay.belongs[:2]

    def is_heard(self, sender: VirtualConnection, channel: str) -> bool:
        """Return whether another client than *sender* listens to a channel, or may do so."""
        assert sender.relay is not None
        others = self._clients_at(sender.relay.belongs[:2])
        return any(each.may_hear(channel) for each in others if each is not sender)

    def deliver(self, sender: VirtualConnection, channel: str, notification: bytes) -> None:
        """Let who listens to a channel have what was sent to it."""
        assert sender.relay is not None
        for each in self._clients_at(sender.relay.belongs[:2]):
            each.hear(channel, notification)

    # -- the end of a block --------------------------------------------------------------------------

    def end(self, ended: Callable[[list[str]], None]) -> None:
        """End the block: have everything undone, then call *ended* with what went wrong.

        What is under way is waited for, though not forever: it belongs to the block. The answer to
        ROLLBACK is not: without it nothing lasts, and no client is served outside before it has come.
        """
        if self._ended is not None:
            self._waiting.append(partial(self.end, ended))
            return
        if self._is_refused or self.is_turning:  # it did not begin, or has not yet
            self._is_refused = self.schema_undone = False
            self._turned()
            ended([])
            return
        self.depth -= 1
        self._ended = ended
        self._wait_for_rest(self._undo, self._end_the_rest)

    def rests_in_block(self) -> None:
        """Take note that a client has come to the end of what it was at."""
        if self._at_rest is not None:
            self._later(0, self._go_on)

    def _go_on(self) -> None:
        if self._at_rest is None:
            return
        if not self.depth:
            for client in list(self.clients.values()):
                if client.conversation is not None and client.conversation.is_over:
                    client.leave()
        if self._all_rest(self.depth):
            self._at_rest()

    def _end_the_rest(self) -> None:
        for client in list(self.clients.values()):
            if client.conversation is not None and not self._rests(client, self.depth):
                who, _ = self._outside.explain(0, client.number)
                self._wrong.append(f"{_LEFT_OPEN} {who}".strip())
                self.cut_off(client)
            elif client.is_asking:
                self.cut_off(client)
            if not self.depth:
                client.leave()
        if self.depth and self._at_rest is not None:
            # What they did is cancelled: that takes a moment, and the outer block is to stay.
            self._overdue = self._later(_UNTIL_CANCELLED, self._cut_the_rest)
            self._go_on()
        elif not self.depth:
            self._cut_the_rest()

    def _cut_the_rest(self) -> None:
        for each in list(self._sessions.values()):
            if each.is_busy and each.is_open:
                # What does not end is not trusted any more.
                self._cut(each)
        self._undo()

    def cut_off(self, client: VirtualConnection) -> None:
        """End a client's connection, and tell it why."""
        text = "lifekit's sandbox ended while this was under way"
        client.send(messages.error(TOO_LATE, text, severity="FATAL"))
        client.close()

    def _undo(self) -> None:
        self.schema_undone = self.schema_changed
        for each in [each for each in self._sessions.values() if each.is_open]:
            if each.escape is not None:
                self._wrong.append(each.escape)
            if not self.depth:
                each.end(partial(self._undone, each, self._lenders[each]))
            elif each.escape is not None:
                self._cut(each)
            else:
                each.end_inside(partial(self._undone_inside, each))
                for client in self._clients_of(each):
                    client.back()
        if self._lost is not None and self._lost[0] > self.depth:
            self._lost = None  # it would be undone by now
        ended, self._ended = self._ended, None
        wrong, self._wrong = self._wrong, []
        self._turned()
        assert ended is not None
        ended(wrong)
        while self._waiting and self._ended is None:
            self._waiting.popleft()()

    def _undone(self, each: Session, relay: Relay, problem: str | None) -> None:
        if each.is_open or each.real.exchanges:  # the next block has it already, or had it
            self._undone_inside(each, problem)
        else:
            self._give_back(relay, broken=problem is not None)

    @staticmethod
    def _undone_inside(each: Session, problem: str | None) -> None:
        if problem is not None:
            each.escape = problem

    def _cut(self, each: Session) -> None:
        relay = self._lenders[each]
        self._lose(each, each.escape or "what was under way there did not end")
        relay.lent = None
        relay.close()
        for client in list(self.clients.values()):
            if client.relay is relay or client in self._clients_of(each):
                self.cut_off(client)

    def _give_back(self, relay: Relay, *, broken: bool) -> None:
        relay.lent = None
        if broken or relay in self._orphans:
            self._orphans.discard(relay)
            self._close(relay)
        for client in list(self.clients.values()):
            if client.relay is relay and broken:
                self.cut_off(client)
            elif client.relay is relay:
                client.released()
