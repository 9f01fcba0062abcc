"""One connection as a client sees it, whichever real connection carries it.

Outside of a block that is one of its own, over which everything passes; only the statements that the
client has prepared are noted, because a real connection that it is moved to has to know them. In a
block a `Conversation` takes its messages one by one. It is moved when it is idle, and not before.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

from . import express, messages
from .conversation import Conversation
from .messages import Frames, Frontend, Parse, ProtocolError
from .notifications import CHANNELS, channels_in, listens
from .real import Relay
from .settings import asking, sets

if TYPE_CHECKING:
    from .hub import Hub  # which makes it, and knows the others
    from .session import Session  # which the hub gives it

PROTOCOL_VIOLATION = "08P01"

_CHANGES = re.compile(rb"set|discard|deallocate|listen|create|alter|drop", re.IGNORECASE)
"""What is in a text that changes the session's own state, or the schema."""
_FORGETS = re.compile(rb"\b(discard|deallocate)\b", re.IGNORECASE)
_SCHEMA = re.compile(rb"\b(create|alter|drop)\b", re.IGNORECASE)
_ENDS = frozenset((Frontend.SYNC, Frontend.QUERY, Frontend.FUNCTION_CALL))
"""What the server answers with a ReadyForQuery."""


class Socket(Protocol):
    """How the client is reached."""

    def write(self, data: bytes) -> object:
        """Send."""

    def close(self) -> object:
        """Send what is left, and end."""


class VirtualConnection:
    """What one client sees as its connection to PostgreSQL."""

    def __init__(self, hub: Hub, socket: Socket, number: int, secret: bytes) -> None:
        """*number* and *secret* are what it needs to cancel."""
        self.hub, self.number, self.secret = hub, number, secret
        self.relay: Relay | None = None
        self.conversation: Conversation | None = None
        self.closed = False
        self.prepared: dict[bytes, Parse] = {}
        """The statements that the client has prepared, by its own names."""
        self.stale: set[bytes] = set()
        """Of those names the ones that its own connection does not have, or has for something else."""
        self.known: dict[bytes, bytes] = {}
        """What they are called on the session."""
        self.descriptions: dict[bytes, bytes] = {}
        """What it knows of the rows of those statements that were described to it."""
        self.known_to: tuple[Session, int] | None = None
        """On which session, and in which generation of it."""
        self.settings: dict[str, str | None] = {}
        """What differs on its own connection from that which is lent."""
        self.is_asking = False
        """Whether its own connection is asked for that, or for its channels."""
        self.channels: set[str] | None = set()
        """What its own connection listens to; None where that is to be asked."""
        self._may_listen = False  # for it has listened to something outside of blocks
        self._unheard: list[tuple[str, bytes]] = []  # notifications that came while it is asked
        self._asked: frozenset[str] = frozenset()  # for which those are known
        self._socket = socket
        self._frames = Frames(Frontend.ALL)
        self._unsent: list[bytes] = []
        self._held = b""  # what came while its own connection was still another's
        self._is_held: bool | None = None  # inside of a block, or outside of all
        self._begun = b""  # of its first message, and what came before the server was reached

    def send(self, data: bytes) -> None:
        """Send to the client, at the end of the event that is worked at."""
        if self.closed:
            return
        if not self._unsent:
            self.hub.unsent.append(self)
        self._unsent.append(data)

    def flush(self) -> None:
        """Send what is to be sent in one piece."""
        data = self._unsent[0] if len(self._unsent) == 1 else b"".join(self._unsent)
        self._unsent.clear()
        self._socket.write(data)

    def key_data(self) -> bytes:
        """Return what the client needs to cancel."""
        return messages.key_data(self.number, self.secret)

    def described(self, name: bytes | None, description: bytes) -> None:
        """Take note of what it knows of the rows of a statement."""
        if name:
            self.descriptions[name] = description

    # -- where it stands ---------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether it may be moved into a block: nothing is under way on its own connection."""
        return self.relay is not None and self.relay.is_ready and self.relay.is_idle

    def stays_outside(self) -> bool:
        """Return whether it has said something that is for its own connection, still another's."""
        if self._held:
            self._is_held = False
        return bool(self._held)

    def enter(self, session: Session) -> None:
        """Stand on the session from now on."""
        self.meets(session)
        self.conversation = Conversation(self, session)

    def meets(self, session: Session) -> None:
        """Forget what the session has for its statements, if that is of another one or undone."""
        if self.known_to != (session, session.generation):
            self.known_to = session, session.generation
            self.known.clear()

    def back(self) -> None:
        """Stand on the session as before the block that ends there."""
        assert self.conversation is not None
        self.conversation.back()
        self.meets(self.conversation.session)

    def leave(self) -> None:
        """Stand on its own connection again; what it was in the midst of is over."""
        conversation, self.conversation = self.conversation, None
        if conversation is not None:
            conversation.over()

    def close(self) -> None:
        """End it, from either side."""
        if self.closed:
            return
        self.closed = True
        if self.conversation is not None:
            self.conversation.gone()
        if self._unsent:
            self.hub.unsent.remove(self)
            self.flush()
        self._socket.close()
        self.hub.gone(self)

    # -- what comes from the client ----------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Take what the client sends; what is no PostgreSQL ends its connection."""
        if self.closed:
            return
        try:
            if self.relay is None:
                self._begin(data)
            elif not self.relay.is_ready:
                self.relay.send(data)
            else:
                self._take(data)
        except ProtocolError as error:
            self.send(messages.error(PROTOCOL_VIOLATION, f"{error}", severity="FATAL"))
            self.close()

    def _begin(self, data: bytes) -> None:
        self._begun += data
        while not self.closed and (found := messages.read_startup(self._begun)) is not None:
            first, self._begun = found
            if isinstance(first, messages.EncryptionRequest):
                self.hub.encrypt(self)
            elif isinstance(first, messages.CancelRequest):
                self.hub.cancel(first)
                self.close()
            else:
                self.hub.connect(self, first)
                return

    def connected(self, relay: Relay, first: messages.Startup) -> None:
        """Log in to the server, which asks the client itself for what that takes."""
        if first.minor:
            self.send(messages.NEGOTIATE)
        self.relay = relay
        relay.log_in(first)
        early, self._begun = self._begun, b""
        if early:
            self.receive(early)

    def released(self) -> None:
        """Take note that its own connection is its own again."""
        unheard, self._unheard = self._unheard, []
        for channel, notification in unheard:
            self.hear(channel, notification)
        held, self._held = self._held, b""
        if held:
            self.receive(held)
        if not self._held:
            self._is_held = None

    def _take(self, data: bytes) -> None:
        assert self.relay is not None
        lent = self.relay.lent is not None
        stays = not self.hub.is_open or self._is_held is False
        if self.is_asking or (lent and self.conversation is None and stays):
            self._held += data  # or a block is being undone there
            return
        if self.hub.is_turning and self._is_held is not True and self._may_wait():
            self._held += data
            return
        data, found = self._frames.feed(data)
        if not found:
            return
        if self.conversation is None and self._is_held is not False:
            self.hub.wakes(self, is_late=self._is_held is True)
        conversation = self.conversation
        if self.is_asking:
            self._held, self._is_held = data + self._held, True
            return
        if conversation is None:
            self._relay(data, found)
            return
        if express.takes(conversation, data, found):
            return
        for kind, begin, end in found:
            if kind == Frontend.TERMINATE:
                conversation.resume()
                self.close()
                return
            conversation.take(kind, data[begin:end])
        conversation.resume()

    def _may_wait(self) -> bool:
        # Until the block has begun, or has ended, in which it is to be with what it says now.
        conversation = self.conversation
        if conversation is not None:
            return self.hub.is_open and conversation.may_move
        return self.hub.is_open and self.is_idle

    def _relay(self, data: bytes, found: list[tuple[int, int, int]]) -> None:
        assert self.relay is not None
        if self.stale:
            self._prepare_again(self.relay)
        if self._may_listen:
            self.channels = None
        for kind, begin, end in found:
            if kind in _ENDS:
                self.relay.awaited += 1
                if kind == Frontend.QUERY:
                    self._note_settings(data[begin + 5 : end - 1])
            elif kind == Frontend.PARSE:
                prepared = Parse.read(data[begin + 5 : end])
                self._note_settings(prepared.text)
                self.prepared[prepared.name] = prepared
                self.forget_on_session(prepared.name)
            elif kind == Frontend.DESCRIBE:
                what, name = messages.read_target(data[begin + 5 : end])
                self.relay.describes.append(name if what == ord("S") else None)
            elif kind == Frontend.CLOSE:
                what, name = messages.read_target(data[begin + 5 : end])
                if what == ord("S"):
                    self.prepared.pop(name, None)
                    self.forget_on_session(name)
        self.relay.send(data)

    def _note_settings(self, text: bytes) -> None:
        if _CHANGES.search(text) is None:
            return
        if _SCHEMA.search(text) is not None:
            self.hub.schema_changes()
        assert self.relay is not None
        if _FORGETS.search(text) is not None:
            self.hub.forgets(self.relay)
        decoded = text.decode("utf-8", "surrogateescape")
        if listens(decoded):
            self._may_listen, self.channels = True, None
        self.relay.sets |= sets(decoded).session
        self._asked = frozenset()

    def knows_settings(self, lender: Relay) -> bool:
        """Return whether it is known what it has set otherwise than who has lent the session.

        If not, that is asked, and it wakes again.
        """
        relay = self.relay
        assert relay is not None
        names = frozenset(relay.differs_from(lender))
        if relay is lender or not names:
            self.settings = {}
            return True
        if names == self._asked:
            return True
        asked = sorted(names)

        def got(row: list[str | None]) -> None:
            if len(row) == len(asked):
                self.settings = dict(zip(asked, row, strict=True))
            self._asked, self.is_asking = names, False
            self.released()
            self.hub.rests_in_block()

        self.is_asking = True
        relay.ask_for(messages.query(asking(asked).encode()), got)
        return False

    # -- what it listens to --------------------------------------------------------------------------

    def ask_for_channels(self, *, lends: bool = False, tries: int = 5) -> None:
        """Ask its own connection what that listens to, unless that is known.

        If it is to lend it, ask as well whether that is always the same one of the server's.
        """
        if self.is_asking or not self.is_idle:
            return
        assert self.relay is not None
        if self.channels is not None and (self.relay.is_same or not lends):
            return
        if self.relay.lent is not None:  # what it listens to comes true outside of blocks
            return
        relay = self.relay

        def got(row: list[str | None]) -> None:
            self.is_asking = False
            if len(row) != 2 and tries > 1:  # it was cancelled, as what the client waits for is
                self.ask_for_channels(lends=lends, tries=tries - 1)
                return
            process, listened = row if len(row) == 2 else (None, None)
            relay.is_same = relay.is_of(process)
            if not (relay.is_same or relay.is_lost):
                self.hub.refuse_pooler(self)
                return
            self.channels = channels_in(listened)
            self.released()
            self.hub.rests_in_block()

        self.is_asking = True
        relay.ask_for(messages.query(CHANNELS.encode()), got)

    @property
    def is_listener(self) -> bool:
        """Whether it may listen to anything."""
        if self.conversation is not None:
            return bool(self.conversation.ear.channels)
        return self._may_listen

    def may_hear(self, channel: str) -> bool:
        """Return whether it listens to a channel, as far as that is known."""
        if self.conversation is not None:
            return channel in self.conversation.ear.channels
        return self.channels is None or channel in self.channels

    def hear(self, channel: str, notification: bytes) -> None:
        """Take a notification, which it gets if it listens to that and belongs to the block."""
        if (conversation := self.conversation) is not None:
            at_once = conversation.rests and not conversation.transaction.is_open
            conversation.ear.hear(channel, notification, at_once=at_once)
            return
        self.ask_for_channels()
        if self.is_asking:
            self._unheard.append((channel, notification))
        elif self.channels is not None and channel in self.channels and self.is_idle:
            self.send(notification)

    # -- what it has prepared --------------------------------------------------------------------------

    def forget_on_session(self, name: bytes) -> None:
        """Take note that what the session has for a name is something else now."""
        self.descriptions.pop(name, None)
        if (old := self.known.pop(name, None)) is not None and self.known_to is not None:
            self.known_to[0].garbage.append(messages.close(b"S", old))

    def _prepare_again(self, relay: Relay) -> None:
        for name in self.stale:
            again = messages.close(b"S", name)
            if name in self.prepared:
                again += self.prepared[name].encode()
            relay.ask(again + messages.SYNC)
        self.stale.clear()
