"""A real connection to PostgreSQL, without its socket: what was sent, and whose answer comes.

Outside of a block each client has one of its own, a `Relay`, over which everything passes as it is. In
a block one of those carries the statements of all clients of its database, one after the other: then it
is a `RealConnection`, and what comes back belongs to the oldest `Exchange`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from .messages import HEADER, SYNC, Backend, Frames, Startup, startup, without_channel_binding
from .messages import message as encode


class Client(Protocol):
    """Who gets answers."""

    def send(self, data: bytes) -> None:
        """Send to the client."""

    def described(self, name: bytes | None, description: bytes) -> None:
        """Take note of what it knows of the rows of a statement."""

    def refused(self, error: bytes) -> bytes:
        """Return what it gets of an error of the server's."""
        ...

    def copy_begins(self, exchange: Exchange) -> None:
        """Take note that the server wants the client's data."""


class Exchange:
    """All that is sent up to one Sync, or one Query, and its answer up to one ReadyForQuery."""

    ahead: bytes = b""
    """How the first of the parts that are dropped are answered, where nothing goes wrong."""
    ahead_parts: int = 0
    """How many those are."""
    holds: bool = False
    """Whether the end of the answer is held back, for the client may get an error instead."""
    held: bytes = b""
    instead: bytes = b""
    """What the client gets in place of what has just come."""
    parsed: int = 0
    """How many of the client's own statements are prepared."""
    status: str | None = None
    """That of the transaction when it has ended: I, T or E."""
    described: bytes = b""
    """The rows of the statement, where there is no client."""
    error: bytes | None = None
    was_cancelled: bool = False
    """In its first parts, which does no harm."""
    guard_failed: bool = False
    """Whether the error is one of those first parts."""
    describes: Sequence[bytes | None] = ()
    """The names of the client's statements that are described; None of a portal."""
    described_so_far: int = 0
    rows: Sequence[list[str | None]] = ()
    """Where there is no client."""

    def __init__(
        self,
        client: Client | None,
        ended: Callable[[Exchange], None],
        *,
        drop: int = 0,
        again: int = 0,
        simple: bool = False,
    ) -> None:
        """*client* gets the answer, but for its first parts; *ended* is called at its end.

        Of *drop* parts it gets nothing at all, of *again* more the errors. *simple* is it where a
        Query ends it, and no Sync.
        """
        self.client, self.ended, self.simple = client, ended, simple
        self.drop, self.again = drop, again


class RealConnection:
    """One that several clients share."""

    def __init__(
        self,
        send: Callable[[bytes], object],
        notified: Callable[[bytes], object] = lambda _: None,
    ) -> None:
        """*send* sends to the server; *notified* gets what is for whoever it was lent by."""
        self.send, self._notified = send, notified
        self.noticed: Callable[[bytes], bool] = lambda _: True
        """Gets each notice, and says whether the client is to have it."""
        self.exchanges: deque[Exchange] = deque()
        self._frames = Frames(Backend.ALL, _MANY)

    def begin(self, exchange: Exchange, data: bytes) -> None:
        """Send what begins an exchange."""
        self.exchanges.append(exchange)
        self.send(data)

    def receive(self, data: bytes) -> None:
        """Give what the server sent to whom it belongs.

        Raises:
            ProtocolError: It is not PostgreSQL's protocol.
        """
        if self.exchanges and self.exchanges[0].ahead and not self._frames.held:
            exchange = self.exchanges[0]
            if data.startswith(exchange.ahead):  # as it nearly always does
                data = data[len(exchange.ahead) :]
                exchange.drop -= exchange.ahead_parts
                exchange.ahead = b""
        data, found = self._frames.feed(data)
        begin = 0  # of what the client of the oldest exchange is still to get
        for kind, at, end in found:
            if not self.exchanges:
                begin = end
                if kind == Backend.NOTIFICATION:
                    self._notified(data[at:end])
                continue
            exchange = self.exchanges[0]
            if exchange.drop:
                exchange.ahead = b""
                begin = at
                if kind not in _ENDS:
                    if kind in Backend.COMPLETE:
                        exchange.drop -= 1
                    elif kind == Backend.NOTIFICATION:
                        self._notified(data[at:end])
                    begin = end
                    continue
            elif kind in _PLAIN and not (exchange.again or exchange.holds):
                continue
            if not self._passes(exchange, kind, data, at, end):
                self._pass(exchange, data, begin, at)
                begin = end
                if exchange.instead and exchange.client is not None:
                    exchange.client.send(exchange.instead)
                    exchange.instead = b""
            if kind == Backend.READY:
                self.exchanges.popleft()
                exchange.status = chr(data[end - 1])
                exchange.ended(exchange)
            elif kind == Backend.COPY_IN and exchange.client is not None:
                self._pass(exchange, data, begin, end)
                begin = end
                exchange.client.copy_begins(exchange)
        if self.exchanges and not self.exchanges[0].drop:
            self._pass(self.exchanges[0], data, begin, len(data))

    def _passes(self, exchange: Exchange, kind: int, data: bytes, at: int, end: int) -> bool:
        if kind == Backend.READY:
            return False
        if kind == Backend.NOTIFICATION:
            self._notified(data[at:end])
            return False
        if kind in Backend.UNASKED:
            return kind != Backend.NOTICE or self.noticed(data[at + HEADER : end])
        if kind == Backend.ERROR:
            exchange.error = data[at + 5 : end]
            exchange.guard_failed = exchange.drop > 0
            if exchange.guard_failed and exchange.simple:
                # The server skips all up to a Sync, the Query too, which is as well: nothing would
                # undo what that does.
                self.send(SYNC)
            elif exchange.client is not None:
                exchange.error = exchange.client.refused(_OWN_NAME.sub(b"", exchange.error))
                exchange.instead = encode(kind, exchange.error)
                return False
            return not exchange.guard_failed
        if exchange.again:
            exchange.again -= kind in Backend.COMPLETE
            return False
        exchange.parsed += kind == Backend.PARSE_COMPLETE
        if kind in _DESCRIPTIONS:
            if exchange.client is None:
                exchange.described = data[at:end]
            elif exchange.described_so_far < len(exchange.describes):
                name = exchange.describes[exchange.described_so_far]
                exchange.described_so_far += 1
                exchange.client.described(name, data[at:end])
        if exchange.client is not None and exchange.holds:
            if exchange.held:
                exchange.client.send(exchange.held)
                exchange.held = b""
            if kind == Backend.COMMAND_COMPLETE:
                exchange.held = data[at:end]
                return False
        return True

    def _pass(self, exchange: Exchange, data: bytes, begin: int, end: int) -> None:
        if begin >= end:
            return
        if exchange.client is None:
            exchange.rows = [*exchange.rows, *_rows(data, begin, end)]
        else:
            exchange.client.send(data[begin:end])


def _rows(data: bytes, begin: int, end: int) -> list[list[str | None]]:
    # Of whole messages.
    found: list[list[str | None]] = []
    while begin < end:
        last = begin + 1 + int.from_bytes(data[begin + 1 : begin + HEADER], "big")
        if data[begin] == Backend.DATA_ROW:
            found.append(_columns(data[begin + HEADER : last]))
        begin = last
    return found


def _columns(body: bytes) -> list[str | None]:
    found: list[str | None] = []
    at = 2
    while at + 4 <= len(body):
        length = int.from_bytes(body[at : at + 4], "big", signed=True)
        at += 4
        text = body[at : at + length].decode("utf-8", "surrogateescape")
        found.append(None if length < 0 else text)
        at += max(length, 0)
    return found


_NO_SETTINGS = frozenset((b"user", b"database", b"replication"))
_OPTION = re.compile(r"(?:-c\s*|--)([\w.]+)=")
_DESCRIPTIONS = frozenset((Backend.ROW_DESCRIPTION, Backend.NO_DATA))
_ENDS = frozenset((Backend.ERROR, Backend.READY))
_MANY = frozenset((Backend.DATA_ROW, Backend.COPY_DATA))
_PLAIN = frozenset((Backend.BIND_COMPLETE, Backend.COMMAND_COMPLETE, Backend.CLOSE_COMPLETE))
"""What a client gets as it is, and nothing else comes of."""
_OWN_NAME = re.compile(rb"lifekit_\d+_")
"""What the session's names of statements begin with that SQL prepares."""


Belongs = tuple[object, bytes, bytes]
"""A server, a database of it, and a user."""


class Relay:
    """The one of a single client. Everything passes; only what ends an answer is looked at."""

    belongs: Belongs

    def __init__(
        self,
        client: RelayClient,
        server: object,
        send: Callable[[bytes], object],
        close: Callable[[], object],
        cancel: Callable[[bytes, Callable[[], None]], None],
    ) -> None:
        """*server* is what tells it from others; *send* sends to it, *close* ends the connection.

        *cancel* brings key data to the server, and calls when the server has taken it.
        """
        self._server, self._bring = server, cancel
        self.options: dict[bytes, bytes] = {}
        """What its session began with."""
        self.sets: set[str] = set()
        """The names of what was set since, outside of blocks."""
        self.is_lost = False
        """Whether the server has ended the connection."""
        self._send, self._close = send, close
        self.lent: RealConnection | None = None
        """In a block: it carries all clients of its database."""
        self._key = b""  # what cancels its statements
        self.is_ready = False
        """Whether the login is over."""
        self.is_same = False
        """Whether it is known to be one connection of the server's, and no pooler's."""
        self.awaited = 1  # answers that are still to end; the login's is the first
        self.status = "I"
        self.describes: deque[bytes | None] = deque()
        """The names of statements whose rows the server is asked to describe; None of a portal."""
        self._client = client
        self._frames = Frames(Backend.ALL, _MANY)
        self._got: Callable[[list[str | None]], None] | None = None  # of the last of those
        self._row: list[str | None] = []
        self._hidden = 0  # answers that the client does not get, and that come first

    def log_in(self, first: Startup) -> None:
        """Ask the server for a session."""
        user = first.options[b"user"]
        self.options = dict(first.options)
        self.belongs = self._server, first.options.get(b"database") or user, user
        self.send(startup(first.options))

    def send(self, data: bytes) -> None:
        """Send to the server."""
        if not self.is_lost:
            self._send(data)

    def cancel(self, ended: Callable[[], None]) -> None:
        """End what the server does for it; *ended* is called when the server knows."""
        self._bring(self._key, ended)

    def close(self) -> None:
        """End the connection."""
        if not self.is_lost:
            self.is_lost = True
            self._close()

    def ask(self, data: bytes) -> None:
        """Send what the client is not to hear of, while it is idle; one Sync ends it."""
        self._hidden += 1
        self.awaited += 1
        self.send(data)

    def differs_from(self, other: Relay) -> set[str]:
        """Return the names of settings that may differ on the two."""
        found = self.sets | other.sets
        for name in self.options.keys() | other.options.keys():
            mine, others = self.options.get(name, b""), other.options.get(name, b"")
            if mine == others:
                continue
            if name == b"options":
                found.update(_OPTION.findall(f"{mine!r} {others!r}"))
            elif name not in _NO_SETTINGS:
                found.add(name.decode("utf-8", "replace"))
        return found

    def ask_for(self, query: bytes, got: Callable[[list[str | None]], None]) -> None:
        """Send a Query of the gateway's own, while it is idle; *got* gets its last row."""
        self._got, self._row = got, []
        self.ask(query)

    def is_of(self, process: str | None) -> bool:
        """Return whether the server has told at the login that its process has that number."""
        return process == str(int.from_bytes(self._key[:4], "big"))

    @property
    def is_idle(self) -> bool:
        """Whether no answer is awaited, and no transaction open."""
        return not self.awaited and self.status == "I"

    def receive(self, data: bytes) -> None:
        """Pass on what the server sent.

        Raises:
            ProtocolError: It is not PostgreSQL's protocol.
        """
        if self.lent is not None:
            self.lent.receive(data)
            return
        data, found = self._frames.feed(data)
        if not self.is_ready:
            data, found = self._login(data, found)
        shown = 0  # from where on the client gets it
        for kind, begin, end in found:
            if kind in _DESCRIPTIONS and self.describes and not self._hidden:
                self._client.described(self.describes.popleft(), data[begin:end])
            elif kind == Backend.READY:
                self._note_row(data, shown, begin)
                self.describes.clear()
                self.awaited = max(self.awaited - 1, 0)
                self.status = chr(data[end - 1])
                if self._hidden:
                    self._hidden -= 1
                    shown = end
                    if not self._hidden and self._got is not None:
                        got, self._got = self._got, None
                        got(self._row)
        if self._hidden:
            self._note_row(data, shown, len(data))
        elif shown < len(data):
            self._client.send(data[shown:])

    def _note_row(self, data: bytes, begin: int, end: int) -> None:
        if self._hidden and self._got is not None and (rows := _rows(data, begin, end)):
            self._row = rows[-1]

    def _login(
        self, data: bytes, found: Sequence[tuple[int, int, int]]
    ) -> tuple[bytes, list[tuple[int, int, int]]]:
        # What the client learns of the session is the gateway's; that may change the lengths.
        parts: list[bytes] = []
        ready: list[tuple[int, int, int]] = []
        at = 0
        for kind, begin, end in found:
            part, body = data[begin:end], data[begin + 5 : end]
            if kind == Backend.KEY_DATA:
                self._key, part = body, self._client.key_data()
            elif kind == Backend.AUTHENTICATION:
                part = encode(kind, without_channel_binding(body))
            parts.append(part)
            at += len(part)
            if kind == Backend.READY:
                self.is_ready = True
                ready.append((kind, at - len(part), at))
        return b"".join(parts), ready


class RelayClient(Protocol):
    """Whose relay it is."""

    def described(self, name: bytes | None, description: bytes) -> None:
        """Take note of what it knows of the rows of a statement."""

    def send(self, data: bytes) -> None:
        """Send to the client."""

    def key_data(self) -> bytes:
        """Return what the client needs to cancel, in place of the server's own."""
        ...
