"""What each connection of a sandboxed client passes, of those inside and of those outside.

Every command is packed by its connection, be it of a pipeline, a lock, a script or a PubSub, and every
reply is read by it: that is where this stands.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from typing import Any, Protocol, cast

from redis import exceptions

from lifekit._errors import SandboxEscapedError
from lifekit.drivers._checkouts import Checkouts, named_like

from . import _redis_commands as commands
from ._redis_lease import Lease

checkouts = Checkouts("redis")
_scripts: dict[str, bytes] = {}
"""Scripts that went through a gate, by their digest."""
_HIDDEN: Any = object()


class Side(Protocol):
    """The sandbox, as its gates see it."""

    active: bool
    lease: Lease | None


class Gate:
    """What passes through one connection."""

    def __init__(self, sandbox: Side) -> None:
        self.sandbox = sandbox
        self.inside: bool = False
        self.is_over: bool = False
        self.connecting: bool = False
        self.is_guest: bool = False
        """Whether who uses it is no part of a test: a worker that was started before."""
        self.waits: bool = False
        self.renew()

    def renew(self) -> None:
        """Forget what the server forgets when a connection ends."""
        self.client_id: str | None = None
        """The server's own number of the connection, where it was asked."""
        self.owed = 0
        """Replies to commands that were sent, and have not been read."""
        self.is_joined = False
        self.heard: dict[str, set[bytes]] = {}
        self._lasting = self._in_transaction = self._names = self._hears = False
        self._ended = 0

    def is_worn(self) -> bool:
        """Return whether another test could see who used the connection before."""
        return bool(self.owed or self._lasting or self._in_transaction)

    def pack(self, connection: Any, args: tuple[Any, ...], pack: Any) -> Any:
        """Pack a command as it shall be sent."""
        name, rest = commands.split(args)
        encode = connection.encoder.encode
        self.waits = commands.waits(name, rest)
        text = commands.script_text(name, rest, encode)
        if text is not None:
            _scripts[hashlib.sha1(text, usedforsecurity=False).hexdigest()] = text
        if not self.inside:
            return self._pack_outside(connection, name, rest, args, pack)
        lease = self.sandbox.lease
        assert lease is not None
        lease.touched = True
        if self.is_over:
            if name in _CLEANING_UP:
                raise exceptions.ConnectionError("this connection is closed")
            raise _too_late()
        if (state := commands.in_transaction(name)) is not None:
            self._in_transaction = state
        elif commands.lasts(name, rest):
            commands.refuse(name, rest)
            self._lasting = True
        elif commands.is_special(name):
            commands.refuse(name, rest)
            rest = commands.rename(name, rest, lease.channels, encode)
            name, rest = commands.script(name, rest, _scripts, lease.channels, encode)
            args = (name, *rest)
        packed = pack(*args)
        if name in commands.SUBSCRIBING or name in commands.UNSUBSCRIBING:
            self._names = self._hears = self._lasting = True
        else:
            self._names |= name == "PUBSUB"
            self.owed += 1
        return packed

    def received(self, reply: Any) -> Any:
        """Return a reply as the application shall see it; `_HIDDEN` where it shall not."""
        lease = self.sandbox.lease
        self.owed -= self.inside
        if lease is None or not (self._names or self.is_joined):
            return reply
        channels = lease.channels
        kind = _kind(reply) if self._hears or self.is_joined else ""
        if kind in _PUBLISHED:
            return channels.reply(reply) if self._is_heard(reply, channels) else _HIDDEN
        if self.inside:
            return channels.reply(reply)
        return _HIDDEN if kind in _CONFIRMATIONS and channels.owns(reply[1]) else reply

    def _is_heard(self, message: Any, channels: commands.Channels) -> bool:
        """Return whether the application shall see what was published."""
        if self.inside or not channels.owns(message[-2]):
            return channels.owns(message[-2]) if self.inside else not self.sandbox.active
        if message[-2] in {channels.end, channels.end.decode()}:
            self._ended += 1
            return False
        return self._ended == channels.ended and self.sandbox.active

    def may_join(self, connection: Any) -> bool:
        """Return whether the connection is subscribed outside, and does not hear the lease yet."""
        return not self.is_joined and any(self.heard.values()) and connection.is_connected

    def join(self, connection: Any, lease: Lease) -> None:
        """Subscribe, beside the channels that are subscribed, to those of the lease."""
        self._note_joined(lease)
        pack = cast(Any, super(SandboxedConnection, connection)).pack_command
        for name, heard in self.heard.items():
            if more := self._inside(lease, heard):
                connection._writer.writelines(pack(name, *more))
        connection._writer.writelines(pack("SUBSCRIBE", lease.channels.end))

    def left(self) -> None:
        """Take note that the connection ends."""
        lease = self.sandbox.lease
        if lease is not None:
            lease.dirty |= self.inside and self.owed > 0
        self.renew()

    def _note_joined(self, lease: Lease) -> None:
        self.is_joined = True
        self._ended = lease.channels.ended
        lease.channels.is_heard = True

    def _inside(self, lease: Lease, names: Iterable[bytes]) -> list[bytes]:
        sent = ((name, lease.channels.out(name)) for name in sorted(names))
        return [inside for name, inside in sent if inside != name]

    def _pack_outside(
        self, connection: Any, name: str, rest: tuple[Any, ...], args: tuple[Any, ...], pack: Any
    ) -> Any:
        lease = self.sandbox.lease
        subscribing, unsubscribing = name in commands.SUBSCRIBING, name in commands.UNSUBSCRIBING
        if not subscribing and not unsubscribing:
            if self.sandbox.active and name not in _CLEANING_UP:
                [site] = checkouts.lines([connection])
                raise SandboxEscapedError(
                    f"{name} is sent on a connection that was acquired before the sandbox began, at "
                    f"{site}, and what it does would last. Acquire one when it is needed, for as long "
                    "as it is: a client does so by itself for each command, pipeline and lock."
                )
            return pack(*args)
        encode = connection.encoder.encode
        channels = {bytes(encode(each)) for each in rest}
        heard = self.heard.setdefault(name if subscribing else name.replace("UNS", "S"), set())
        if subscribing:
            heard |= channels
        else:
            heard -= channels or set(heard)
        if lease is None:
            return pack(*args)
        if not self.is_joined and not subscribing:
            return pack(*args)
        sent = [*pack(name, *rest, *self._inside(lease, channels))]
        if not self.is_joined:
            self._note_joined(lease)
            sent += pack("SUBSCRIBE", lease.channels.end)
        elif name == "UNSUBSCRIBE" and not rest:
            sent += pack("SUBSCRIBE", lease.channels.end)
        return sent


def _kind(reply: Any) -> str:
    first = cast(Any, reply)[0] if isinstance(reply, list) and reply else ""
    return first.decode("latin-1") if isinstance(first, bytes) else str(first)


_PUBLISHED = frozenset({"message", "pmessage", "smessage"})
_CONFIRMATIONS = frozenset(name.lower() for name in (*commands.SUBSCRIBING, *commands.UNSUBSCRIBING))
_CLEANING_UP = frozenset({"DISCARD", "PING", "QUIT", "UNWATCH"})


def _too_late() -> SandboxEscapedError:
    return SandboxEscapedError(
        "this connection was acquired inside a sandbox that has ended, and was closed then. Its code "
        "outlived the test. Let the test wait for it, or the application where it starts it."
    )


class SandboxedConnection:
    """What the class of a connection is mixed with, so that everything passes the gate."""

    __slots__ = ()  # the layout must not change
    _gate: Gate

    def pack_command(self, *args: Any) -> Any:
        """Pack a command as the gate lets it pass."""
        pack = cast(Any, super()).pack_command
        return pack(*args) if self._gate.connecting else self._gate.pack(self, args, pack)

    def pack_commands(self, commands: Any) -> Any:
        """Pack a pipeline; one of which a command is refused is not sent at all."""
        owed = self._gate.owed
        try:
            return cast(Any, super()).pack_commands(commands)
        except Exception:
            self._gate.owed = owed
            raise

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """Return the next reply that the application shall see."""
        gate, read = self._gate, cast(Any, super()).read_response
        if gate.connecting:
            return await read(*args, **options)
        while True:
            try:
                reply = await read(*args, **options)
            except exceptions.ResponseError as error:
                gate.owed -= gate.inside
                if gate.inside and (refused := commands.refused_in_script(error)) is not None:
                    raise refused from None
                raise
            if (reply := gate.received(reply)) is not _HIDDEN:
                return reply

    async def on_connect(self) -> None:
        """Greet the server, which no gate stands before."""
        await self._greet("on_connect")

    async def on_connect_check_health(self, *args: Any, **options: Any) -> None:
        """Do so, in newer versions of redis-py."""
        await self._greet("on_connect_check_health", *args, **options)

    async def _greet(self, method: str, *args: Any, **options: Any) -> None:
        gate = self._gate
        outer, gate.connecting = gate.connecting, True
        try:
            await getattr(super(), method)(*args, **options)
        finally:
            gate.connecting = outer

    async def connect(self) -> None:
        """Connect, unless the block is over."""
        if self._gate.is_over:
            raise _too_late()
        await cast(Any, super()).connect()

    async def connect_check_health(self, *args: Any, **options: Any) -> None:
        """Do so, in newer versions of redis-py."""
        if self._gate.is_over:
            raise _too_late()
        await cast(Any, super()).connect_check_health(*args, **options)

    async def disconnect(self, *args: Any, **options: Any) -> None:
        """Disconnect."""
        self._gate.left()
        await cast(Any, super()).disconnect(*args, **options)


def guard(connection: Any, sandbox: Side) -> None:
    """Let all that is sent on a connection pass the gate of a sandbox."""
    if not isinstance(connection, SandboxedConnection):
        connection.__class__ = mixed(SandboxedConnection, connection.__class__)
    cast(Any, connection)._gate = Gate(sandbox)


@functools.cache
def mixed(mixin: Any, kind: Any) -> Any:
    """Return the class of a connection or a pool, mixed with what belongs to its sandbox."""
    return type(kind.__name__, (mixin, kind), {"__slots__": (), **named_like(kind)})
