"""What each connection of a sandboxed client passes: the commands that it sends, and what it hears.

Learned from `connection.py` of redis-py 8.1 and 5.0. Every command is packed by its connection, be it
of a pipeline, a lock, a script or a PubSub, and every reply is read by it: that is where this stands.
What reaches the socket in another way is refused there.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any, cast

from redis import exceptions

from lifekit._core.errors import SandboxEscapedError, SandboxUnsupportedError
from lifekit.drivers._checkouts import Checkout, named_like

from . import commands
from .lease import Lease

_scripts: dict[str, bytes] = {}
"""Scripts that went through a filter, by their digest."""
_HIDDEN: Any = object()
_CLEANING_UP = frozenset({"DISCARD", "PING", "QUIT", "UNWATCH"})
_PUBLISHED = frozenset({b"message", b"pmessage", b"smessage"})
_CONFIRMED = frozenset(
    name.lower().encode() for name in (*commands.SUBSCRIBING, *commands.UNSUBSCRIBING)
)
_COUNTED = _CONFIRMED - {b"ssubscribe", b"sunsubscribe"}


class Packed(list[bytes]):
    """Commands as they passed the filter."""


class Filter:
    """What passes through one connection."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.checkout: Checkout | None = None
        """Who has the connection now."""
        self.is_over: bool = False
        """Whether its block has ended, and the connection with it."""
        self.connecting: bool = False
        self._forget()

    def _forget(self) -> None:
        self.client_id: int | None = None
        """The server's number of the connection; there is none before it is on the leased database."""
        self.pending_replies: int = 0
        self.waits: bool = False
        """Whether its last command waits at the server."""
        self.listens: bool = False
        self.is_raw: bool = False
        """Whether replies are read as bytes, since names of channels are in them."""
        self._hears_ends = False
        self._ends = 0
        self._lasting = self._in_transaction = False

    @property
    def is_outside(self) -> bool:
        """Whether who has the connection was started outside of any block."""
        return self.checkout is None or self.checkout.block is None

    @property
    def is_dirty(self) -> bool:
        """Whether who has the connection next could see who had it before."""
        return bool(self.pending_replies or self._lasting or self._in_transaction)

    def left(self) -> None:
        """Take note that the connection ends."""
        if self.pending_replies and self.client_id is not None:
            self.lease.abandoned.add(self.client_id)
        self.lease.channels.listeners.discard(self)
        self._forget()

    # -- what is sent ----------------------------------------------------------------------------------

    def pack(self, connection: Any, args: tuple[Any, ...], pack: Any) -> Packed:
        """Pack a command as it shall be sent.

        Raises:
            SandboxUnsupportedError: It reaches beyond the leased database.
            SandboxEscapedError: The block has ended in which the connection was acquired.
        """
        name, rest = commands.split(args)
        if self.is_over:
            if name in _CLEANING_UP:
                raise exceptions.ConnectionError("this connection is closed")
            raise too_late()
        self.lease.touched = True
        self.waits = commands.waits(name, rest)
        if name in commands.PLAIN:
            packed = Packed(pack(*args))
        else:
            packed = self._pack_special(connection, name, rest, args, pack)
        if not self.listens:
            self.pending_replies += 1
        return packed

    def _pack_special(
        self, connection: Any, name: str, rest: tuple[Any, ...], args: tuple[Any, ...], pack: Any
    ) -> Packed:
        commands.refuse(name, rest, in_block=self.lease.in_block)
        encode, channels = connection.encoder.encode, self.lease.channels
        if (state := commands.in_transaction(name)) is not None:
            self._in_transaction = state
            return Packed(pack(*args))
        if commands.lasts(name, rest):
            self._lasting = True
            return Packed(pack(*args))
        text = commands.script_text(name, rest, encode)
        if text is not None:
            _scripts[hashlib.sha1(text, usedforsecurity=False).hexdigest()] = text
        renamed = commands.rename(name, rest, channels, encode)
        run, given = commands.script(name, renamed, _scripts, channels, encode)
        packed = Packed(pack(run, *given))
        self.is_raw |= name == "PUBSUB"
        if name in commands.SUBSCRIBING or name in commands.UNSUBSCRIBING:
            self.listens = self.is_raw = self._lasting = True
            if self.is_outside:  # it may outlive blocks, whose messages end with them
                if not self._hears_ends:
                    self._hears_ends, self._ends = True, channels.ended
                    channels.listeners.add(self)
                    return Packed([*pack("SUBSCRIBE", channels.end), *packed])
                if name == "UNSUBSCRIBE" and not rest:
                    packed += pack("SUBSCRIBE", channels.end)
        return packed

    def refuse_unless_packed(self, data: object) -> None:
        """Refuse what did not pass the filter, on its way to the socket.

        Raises:
            SandboxUnsupportedError: It did not.
        """
        if self.connecting or (type(data) is Packed and self.client_id is not None):
            return
        raise SandboxUnsupportedError(
            "a redis connection sends something in a way that lifekit does not know, so that it can't "
            "tell what would be permanent. Is redis-py newer than lifekit, or is there a "
            "`redis_connect_func` that does not call `connection.on_connect()`? Else declare the "
            "client with @registry.resource(…, sandbox=False)."
        )

    # -- what is heard ---------------------------------------------------------------------------------

    def received(self, reply: Any, connection: Any) -> Any:
        """Return a reply as the application shall see it; `_HIDDEN` where it shall not."""
        if not self.listens:
            self.pending_replies -= 1
            return _decoded(self.lease.channels.reply(reply), connection) if self.is_raw else reply
        channels = self.lease.channels
        items: list[Any] = [*cast("Any", reply)] if isinstance(reply, list) else []
        kind = items[0] if items else None
        if kind in _PUBLISHED:
            if items[-2] == channels.end:
                self._ends = int(items[-1])
                return _HIDDEN
            is_late = self._hears_ends and self._ends != channels.ended
            if is_late or not channels.owns(items[-2]):
                return _HIDDEN
        elif kind in _CONFIRMED and items[1] == channels.end:
            return _HIDDEN
        elif kind in _COUNTED and self._hears_ends:
            items = [*items[:-1], max(items[-1] - 1, 0)]
        return _decoded(channels.reply(items or reply), connection)

    def let_handler_hear(self, connection: Any) -> bool:
        """Let the application's own push handler, if there is one, hear what it shall; return that."""
        parser = connection._parser
        handler = getattr(parser, "pubsub_push_handler_func", None)
        if handler is None or getattr(handler, "__self__", None) is parser:
            return False
        if not isinstance(handler, _PushHandler):
            parser.set_pubsub_push_handler(_PushHandler(self, connection, handler))
        return True


class _PushHandler:
    """A handler of what a server sends by itself."""

    def __init__(self, passing: Filter, connection: Any, handler: Any) -> None:
        self._filter, self._connection, self._handler = passing, connection, handler

    async def __call__(self, message: Any) -> Any:
        """Handle a message, unless the application shall not see it."""
        seen = self._filter.received(message, self._connection)
        return None if seen is _HIDDEN else await self._handler(seen)


def _decoded(value: Any, connection: Any) -> Any:
    """Return what was read as bytes as the connection's options say."""
    if isinstance(value, bytes):
        return connection.encoder.decode(value)
    if isinstance(value, list):
        return [_decoded(each, connection) for each in cast("Any", value)]
    if isinstance(value, dict):
        pairs = cast("Any", value).items()
        return {_decoded(key, connection): _decoded(each, connection) for key, each in pairs}
    return value


def too_late() -> SandboxEscapedError:
    """Return the error of who uses a connection whose block has ended."""
    return SandboxEscapedError(
        "this connection was acquired inside a sandbox that has ended, and was closed then. Its code "
        "outlived the test. Let the test wait for it, or the application where it starts it."
    )


class _FilteredWriter:
    """A connection's stream to the server, on which nothing is written that passed no filter."""

    def __init__(self, writer: Any, passing: Filter) -> None:
        self._writer, self._filter = writer, passing

    def writelines(self, data: Any) -> None:
        """Write what was packed."""
        self._filter.refuse_unless_packed(data)
        self._writer.writelines(data)

    def write(self, data: Any) -> None:
        """Write."""
        self._filter.refuse_unless_packed(data)
        self._writer.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


class FilteredConnection:
    """What the class of a pool's connections is mixed with, so that everything passes a filter."""

    _lease: Lease
    _filter: Filter

    def __init__(self, *args: Any, **options: Any) -> None:
        self._filter = Filter(self._lease)
        super().__init__(*args, **options)

    @property
    def _writer(self) -> Any:
        return cast("Any", super())._writer

    @_writer.setter
    def _writer(self, writer: Any) -> None:
        if writer is not None:
            writer = _FilteredWriter(writer, self._filter)
        cast("Any", super(FilteredConnection, type(self)))._writer.__set__(self, writer)

    def pack_command(self, *args: Any) -> Any:
        """Pack a command as the filter lets it pass."""
        pack = cast("Any", super()).pack_command
        return pack(*args) if self._filter.connecting else self._filter.pack(self, args, pack)

    def pack_commands(self, commands: Any) -> Any:
        """Pack a pipeline; one of which a command is refused is not sent at all."""
        pending, packed = self._filter.pending_replies, Packed()
        try:
            for command in commands:
                packed += self.pack_command(*command)
        except Exception:
            self._filter.pending_replies = pending
            raise
        return packed

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """Return the next reply that the application shall see."""
        passing, read = self._filter, cast("Any", super()).read_response
        while True:
            if passing.connecting:
                return await read(*args, **options)
            handled = passing.listens and passing.let_handler_hear(self)
            if passing.is_raw and not args and not options.get("disable_decoding"):
                options["disable_decoding"] = True
            try:
                reply = await read(*args, **options)
            except exceptions.ResponseError as error:
                passing.pending_replies -= not passing.listens
                if (refused := commands.refused_in_script(error)) is not None:
                    raise refused from None
                raise
            seen = reply if handled else passing.received(reply, self)
            if seen is not _HIDDEN:
                return seen

    async def on_connect(self) -> None:
        """Greet the server, and select the leased database."""
        await self._greet("on_connect")

    async def on_connect_check_health(self, *args: Any, **options: Any) -> None:
        """Do so, in newer versions of redis-py."""
        await self._greet("on_connect_check_health", *args, **options)

    async def _greet(self, method: str, *args: Any, **options: Any) -> None:
        passing, connection = self._filter, cast("Any", self)
        if passing.connecting:  # one of them by the other
            await getattr(super(), method)(*args, **options)
            return
        connection.db = self._lease.number
        passing.connecting = True
        try:
            await getattr(super(), method)(*args, **options)
            await connection.send_command("CLIENT ID", check_health=False)  # in any encoding
            passing.client_id = await connection.read_response()
        finally:
            passing.connecting = False

    async def connect(self) -> None:
        """Connect, unless the block is over."""
        if self._filter.is_over:
            raise too_late()
        await cast("Any", super()).connect()

    async def connect_check_health(self, *args: Any, **options: Any) -> None:
        """Do so, in newer versions of redis-py."""
        if self._filter.is_over:
            raise too_late()
        await cast("Any", super()).connect_check_health(*args, **options)

    async def disconnect(self, *args: Any, **options: Any) -> None:
        """Disconnect."""
        self._filter.left()
        await cast("Any", super()).disconnect(*args, **options)


def filtered(kind: Any, lease: Lease) -> Any:
    """Return a class of connections that is *kind*, with all that they send filtered."""
    return type(kind.__name__, (FilteredConnection, kind), {"_lease": lease, **named_like(kind)})


@functools.cache
def mixed(mixin: Any, kind: Any) -> Any:
    """Return the class of a pool, mixed with what belongs to its sandbox."""
    return type(kind.__name__, (mixin, kind), {"__slots__": (), **named_like(kind)})
