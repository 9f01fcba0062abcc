"""A database number of a Redis server that one lifespan has for its own.

The lease is a client name, held by a connection that stays open: it ends with its process, however
that ends, and leaves no key behind. Setting the name and looking who else has it is one transaction,
so that of two who ask at once one sees the other.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, cast

from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from lifekit import embedded
from lifekit._core.errors import SandboxBusyError, SandboxEscapedError, SandboxUnsupportedError, summary
from lifekit._util.sockets import is_cut

from .commands import Channels, lines_of

MARK = "lifekit:test-server"
"""A key in database 0 by which users say that a server is for tests."""

_SECONDS = 5.0
_NAME = "lifekit-lease-"
FAILURES = (exceptions.RedisError, OSError)  # TimeoutError is an OSError
"""What may come of asking the server."""


class Link:
    """A connection of the sandbox's own."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        connection.retry = Retry(NoBackoff(), 0)
        connection.health_check_interval = 0
        connection.socket_timeout = None  # a limit in `ask` costs a third of what redis-py's own does
        connection.socket_connect_timeout = _SECONDS

    async def connect(self) -> None:
        """Connect."""
        async with asyncio.timeout(_SECONDS):
            await self._connection.connect()

    async def ask(self, *commands: tuple[Any, ...] | bytes) -> list[Any]:
        """Send commands, packed or not, in one message, and return the replies.

        A refusal stands as an exception.
        """
        connection = self._connection
        if self.is_lost():
            raise exceptions.ConnectionError("the connection is closed")
        for each in commands:
            packed = [each] if isinstance(each, bytes) else connection.pack_command(*each)
            connection._writer.writelines(packed)
        replies: list[Any] = []
        async with asyncio.timeout(_SECONDS):
            for _ in commands:
                try:
                    replies.append(await connection.read_response(disable_decoding=True))
                except exceptions.ResponseError as error:
                    replies.append(error)
        return replies

    def is_lost(self) -> bool:
        """Return whether the connection is known to be gone; this asks nobody."""
        reader, writer = self._connection._reader, self._connection._writer
        return reader is None or writer is None or reader.at_eof() or writer.is_closing()

    def is_cut(self) -> bool:
        """Return whether the server has closed the connection, which is idle."""
        return is_cut(self._connection._writer.get_extra_info("socket"))

    def cut(self) -> None:
        """Close the connection at once."""
        cut(self._connection)


def cut(connection: Any) -> None:
    """Close a connection of redis.asyncio at once."""
    if (passing := getattr(connection, "_filter", None)) is not None:
        passing.left()
    if connection._writer is not None:
        connection._writer.transport.abort()
    connection._reader = connection._writer = None


Snapshot = bytes
"""The command that puts a database back as it was, packed, since that takes longer than the rest."""


class Lease:
    """A database number that one lifespan has for its own, and what its blocks found there.

    It is on it from its opening to its closing. Clients of one database share a lease, as they do that.
    """

    def __init__(self, own: int, server: str, channels: Channels) -> None:
        self.own = own
        self.number: int = 0
        self.channels = channels
        self.sandboxes: list[Any] = []
        self.touched: bool = False
        """Whether something was sent since what the database holds was last known."""
        self.abandoned: set[int] = set()
        """Connections that ended amid a command, of which the server may have read nothing yet."""
        self._server = server
        self._link: Link | None = None
        self._found: list[Snapshot] = []  # of each block that runs, the outermost first
        self._holds: Snapshot = _EMPTY  # as of when nothing was sent

    @property
    def in_block(self) -> bool:
        """Whether a block runs."""
        return bool(self._found)

    async def open(self, link: Link, kept: Collection[int]) -> None:
        """Lease a number that nobody else has."""
        former, self._link = self.number or None, None
        self.number = await take(link, self.own, kept, self._server, former)
        self._link = link
        self.channels.numbers[b"%d" % self.own] = b"%d" % self.number

    def is_lost(self) -> bool:
        """Return whether another may have the number by now."""
        return self._link is None or self._link.is_lost() or self._link.is_cut()

    async def begin(self, depth: int) -> None:
        """Begin a block, unless it has begun for another client: the one of that depth.

        Raises:
            SandboxEscapedError: The lease was lost, with what the database held.
        """
        if self.is_lost():
            if self.touched:
                raise self._lost("its connection broke")
            await self._renew()
        if depth <= len(self._found):
            return
        if self.touched:
            *_, kept = await self._ask(*self._kills(), ("EVAL", _SAVE, 0))
            self._holds, self.touched = _packed("EVAL", _RESTORE, 0, *kept) if kept else _EMPTY, False
        self._found.append(self._holds)

    @property
    def _depth(self) -> int:
        return max((each.depth for each in self.sandboxes), default=0)

    def is_as_found(self) -> bool:
        """Return whether the database holds what the innermost block found."""
        if self.touched or self.is_lost() or len(self._found) != self._depth:
            return False
        return self._found[-1] == self._holds

    def end_as_found(self) -> None:
        """End it, once no client is in it any more."""
        del self._found[self._depth :]

    async def end(self) -> None:
        """Put back what the innermost block found, once no client is in it any more.

        Raises:
            SandboxEscapedError: That could not be done.
        """
        depth = self._depth
        while len(self._found) > depth:
            found = self._found.pop()
            if self.is_lost():
                self._holds, self.touched = found, False
                with suppress(Exception):  # the server may be there, and what was done with it
                    async with asyncio.timeout(_SECONDS):
                        await self._renew()
                raise self._lost("its connection broke")
            if self.touched or found != self._holds:
                await self._put_back(found)

    async def _put_back(self, found: Snapshot) -> None:
        commands: list[tuple[Any, ...] | bytes] = [*self._kills(), found]
        listeners = self.channels.listeners
        if listeners:  # what they have not read yet came before this
            self.channels.ended += 1
            commands.append(("PUBLISH", self.channels.end, self.channels.ended))
        try:
            heard = (await self._ask(*commands))[-1]
            for _ in range(100):
                if not listeners or heard >= len(listeners):
                    break
                [heard] = await self._ask(commands[-1])  # a subscription was on its way
        except exceptions.ResponseError as error:
            self.give_up()  # so that the next block is on one that holds what it should
            raise SandboxEscapedError(
                f"database {self.number} could not be put back as the test found it: {summary(error)}"
            ) from error
        finally:
            self._holds, self.touched = found, False

    async def _ask(self, *commands: tuple[Any, ...] | bytes) -> list[Any]:
        assert self._link is not None
        try:
            replies = await self._link.ask(*commands)
        except FAILURES as error:
            self._link.cut()
            raise self._lost(summary(error)) from error
        for command, reply in zip(commands, replies, strict=True):
            if isinstance(reply, Exception) and command[0] != "CLIENT":  # that went by itself
                raise reply
        return replies

    def _kills(self) -> list[tuple[Any, ...]]:
        kills: list[tuple[Any, ...]] = [("CLIENT", "KILL", "ID", each) for each in self.abandoned]
        self.abandoned.clear()
        return kills

    async def _renew(self) -> None:
        """Lease another number, with what the lost one held."""
        if self._link is not None:
            self._link.cut()
        for each in self.sandboxes:
            each.cut()
        link = Link(self.sandboxes[0].connection())
        try:
            await link.connect()
            await self.open(link, {self.own})
        except BaseException:
            link.cut()
            raise
        await self._ask(self._holds)

    def _lost(self, why: str) -> SandboxEscapedError:
        return SandboxEscapedError(
            f"the sandbox lost its lease on database {self.number} before it could put back what the "
            f"test found: {why}. "
            "Either the server went away (what does its log say?), or it closes connections that are "
            "idle or that somebody kills: let `timeout` be 0 in its configuration. What this test did "
            "may have been seen, or changed, by who leased the number since."
        )

    async def are_blocked(self, clients: Collection[int]) -> bool:
        """Return whether connections wait at the server: none is about to get what it waits for."""
        [listed] = await self._ask(("CLIENT", "LIST", "ID", *clients))
        blocked = {each["id"] for each in lines_of(listed) if "b" in each["flags"]}
        return blocked >= {str(each) for each in clients}

    async def leave(self, sandbox: Any) -> bool:
        """Give the number up, empty, once nobody of the lifespan needs it, and return whether."""
        if sandbox in self.sandboxes:
            self.sandboxes.remove(sandbox)
        if self.sandboxes:
            return False
        if not self.is_lost():
            with suppress(SandboxEscapedError, exceptions.ResponseError):
                await self._ask(*self._kills(), ("FLUSHDB",))
        self.give_up()
        return True

    def give_up(self) -> None:
        """Give the number up as it is. What it held before the blocks that run is put into the next."""
        if self._link is not None:
            self._link.cut()
        if self._found:
            self._holds, self.touched = self._found[0], False
            self._found.clear()


def _packed(*args: str | int | bytes) -> bytes:
    """Return a command as it is sent."""
    packed = [each if isinstance(each, bytes) else str(each).encode() for each in args]
    return b"*%d\r\n" % len(packed) + b"".join(b"$%d\r\n%b\r\n" % (len(each), each) for each in packed)


_EMPTY = _packed("FLUSHDB")
"""Of each key: its name, when it expires in milliseconds of the epoch or 0, its dump."""
_SAVE = """
local now, found = redis.call('TIME'), {}
now = now[1] * 1000 + math.floor(now[2] / 1000)
for _, key in ipairs(redis.call('KEYS', '*')) do
  local left, dump = redis.call('PTTL', key), redis.call('DUMP', key)
  if dump then
    found[#found + 1] = key
    found[#found + 1] = left >= 0 and string.format('%.0f', now + left) or '0'
    found[#found + 1] = dump
  end
end
return found
"""
_RESTORE = """
redis.call('FLUSHDB')
for i = 1, #ARGV, 3 do redis.call('RESTORE', ARGV[i], ARGV[i + 1], ARGV[i + 2], 'ABSTTL') end
"""


async def take(
    link: Link,
    own: int,
    kept: Collection[int],
    server: str,
    former: int | None = None,
) -> int:
    """Lease a number that nobody else has, and empty it.

    *own* is what the application's settings say, *kept* are the numbers that must not be touched;
    *former* is the number of a lease that was lost, which still has to be emptied.

    Raises:
        SandboxUnsupportedError: The server is not marked as one for tests.
        SandboxBusyError: All are leased.
    """
    await link.ask(("SELECT", 0))
    marked, where, databases, keyspace, clients = await link.ask(
        ("EXISTS", MARK),
        ("CONFIG", "GET", "dir"),
        ("CONFIG", "GET", "databases"),
        ("INFO", "keyspace"),
        ("CLIENT", "LIST"),
    )
    if marked != 1 and not embedded.is_embedded_valkey(_setting(where, b"")):
        raise SandboxUnsupportedError(
            f"the sandbox of a redis client flushes a database, and {server} is not marked as a "
            "server for tests. If nobody needs what its databases hold, those aside that the "
            f"application's own settings name, mark it: redis-cli -n 0 SET {MARK} yes. Else let the "
            "tests run one of their own, `lifekit.embedded.valkey()`, or take a fake: "
            "`lifekit.testing.fake_redis`."
        )
    full = {int(line[2:].split(b":")[0]) for line in keyspace.splitlines() if line.startswith(b"db")}
    leased = {client["name"] for client in lines_of(clients) if client["name"].startswith(_NAME)}
    taken = {int(name.removeprefix(_NAME).partition(":")[0]) for name in leased}
    free = set(range(1, int(_setting(databases, b"16")))) - set(kept) - {own} - taken
    who = f"{os.getpid()}@{socket.gethostname()}".replace(" ", "-")
    # Applications' own settings name low numbers, some of them of clients that open later.
    for number in sorted(free, key=lambda each: (each != former, each in full, -each)):
        *_, done = await link.ask(
            ("MULTI",),
            ("CLIENT", "SETNAME", f"{_NAME}{number}:{who}"),
            ("CLIENT", "LIST"),
            ("EXEC",),
        )
        if isinstance(done, Exception):
            raise done
        clients = done[1]
        named = [c for c in lines_of(clients) if c["name"].startswith(f"{_NAME}{number}:")]
        if len(named) == 1:
            for reply in await link.ask(("SELECT", number), ("FLUSHDB",)):
                if isinstance(reply, Exception):
                    raise reply
            return number
    _, clients = await link.ask(("CLIENT", "SETNAME", ""), ("CLIENT", "LIST"))
    raise _all_leased(server, clients)


def _all_leased(server: str, clients: bytes) -> SandboxBusyError:
    holders = [client for client in lines_of(clients) if client["name"].startswith(_NAME)]
    lines = [f"  {c['name'].removeprefix(_NAME)} from {c['addr']}\n" for c in holders]
    return SandboxBusyError(
        f"each database of {server} is leased to a test run, or is one that the application's own "
        f"settings name:\n{''.join(sorted(lines))}(number, process and host, address). Let one end, or "
        "give the server more: `databases 64` in its configuration."
    )


def _setting(reply: Any, default: bytes) -> bytes:
    """Return the value in a reply to CONFIG GET, *default* where the server keeps it to itself."""
    if isinstance(reply, Exception) or not reply:
        return default
    return bytes(_second(reply))


def _second(reply: Any) -> Any:
    """Return the one value in a reply of pairs: a mapping under RESP3, a list before."""
    return next(iter(cast(Mapping[Any, Any], reply).values())) if isinstance(reply, dict) else reply[1]
