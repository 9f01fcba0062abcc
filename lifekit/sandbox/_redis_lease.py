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
from typing import Any, cast

from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from lifekit import embedded
from lifekit._errors import SandboxBusyError, SandboxEscapedError, SandboxUnsupportedError, summary

from ._redis_commands import Channels, lines_of
from ._sockets import is_cut

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

    async def ask(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Send commands in one message, and return the replies; a refusal stands as an exception."""
        connection = self._connection
        if self.is_lost():
            raise exceptions.ConnectionError("the connection is closed")
        connection._writer.writelines(connection.pack_commands(commands))
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
    if connection._writer is not None:
        connection._writer.transport.abort()
    connection._reader = connection._writer = None


class Lease:
    """A database number, its own for as long as the link lives."""

    def __init__(self, link: Link, number: int, server: str, channels: Channels) -> None:
        self.number = number
        self.server = server
        self.channels = channels
        self.sandboxes: set[Any] = set()
        self.active: set[Any] = set()
        self.touched: bool = False
        self.dirty: bool = False
        self._link = link

    def is_lost(self) -> bool:
        """Return whether another may have the number by now."""
        return self._link.is_lost()

    def is_cut(self) -> bool:
        """Return whether the server has ended it, of which the loop may know nothing yet."""
        return self._link.is_cut()

    async def undo(self) -> None:
        """Empty the database.

        Raises:
            SandboxEscapedError: It could not be.
        """
        if self.is_lost():
            raise self._lost("its connection broke")
        if not self.touched:
            return
        commands: list[tuple[Any, ...]] = [("FLUSHDB",)]
        if self.channels.is_heard:  # what they have not read yet came before this
            commands.append(("PUBLISH", self.channels.end, ""))
            self.channels.ended += 1
        try:
            if self.dirty:
                commands = [*await self._rest(), *commands]
            replies = await self._link.ask(*commands)
        except FAILURES as error:
            self._link.cut()
            raise self._lost(summary(error)) from error
        self.touched = self.dirty = False
        for command, reply in zip(commands, replies, strict=True):
            if isinstance(reply, Exception) and command[0] != "CLIENT":
                raise SandboxEscapedError(
                    f"database {self.number} could not be emptied at the end: {summary(reply)}"
                ) from reply

    async def _rest(self) -> list[tuple[Any, ...]]:
        # A connection that was cut may still have sent what the server has not read.
        [clients] = await self._link.ask(("CLIENT", "LIST"))
        return [
            ("CLIENT", "KILL", "ID", client["id"])
            for client in lines_of(clients)
            if client.get("db") == str(self.number) and not client["name"].startswith(_NAME)
        ]

    def _lost(self, why: str) -> SandboxEscapedError:
        return SandboxEscapedError(
            f"the sandbox lost its lease on database {self.number} before it could empty it: {why}. "
            "Either the server went away (what does its log say?), or it closes connections that are "
            "idle or that somebody kills: let `timeout` be 0 in its configuration. What this test did "
            "may have been seen, or changed, by who leased the number since."
        )

    async def count_listeners(self) -> int:
        """Return how many connections the server knows to hear what ends a block."""
        [reply] = await self._link.ask(("PUBSUB", "NUMSUB", self.channels.end))
        return int(_second(reply))

    async def unblock(self, connections: Collection[Any]) -> set[Any]:
        """Let commands that wait end as if their time were over; return where there was one."""
        asked = [each for each in connections if each.is_connected]
        if not asked:
            return set()
        if any(each._gate.client_id is None for each in asked):
            [clients] = await self._link.ask(("CLIENT", "LIST"))
            known = {client["addr"]: client["id"] for client in lines_of(clients)}
            for each in asked:
                each._gate.client_id = known.get(_address(each), "0")
        replies = await self._link.ask(*(("CLIENT", "UNBLOCK", each._gate.client_id) for each in asked))
        return {each for each, reply in zip(asked, replies, strict=True) if reply == 1}

    def leave(self, sandbox: Any) -> None:
        """Give the number up, once nobody of the lifespan needs it."""
        self.sandboxes.discard(sandbox)
        self.active.discard(sandbox)
        if not self.sandboxes:
            self._link.cut()


async def take(
    link: Link,
    own: int,
    kept: Collection[int],
    server: str,
    channels: Channels,
    former: int | None = None,
) -> Lease:
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
    for number in sorted(free, key=lambda each: (each != former, each in full, each)):
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
            channels.numbers[b"%d" % own] = b"%d" % number
            return Lease(link, number, server, channels)
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


def _address(connection: Any) -> str:
    name = connection._writer.get_extra_info("sockname")
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else ""


def _setting(reply: Any, default: bytes) -> bytes:
    """Return the value in a reply to CONFIG GET, *default* where the server keeps it to itself."""
    if isinstance(reply, Exception) or not reply:
        return default
    return bytes(_second(reply))


def _second(reply: Any) -> Any:
    """Return the one value in a reply of pairs: a mapping under RESP3, a list before."""
    return next(iter(cast(Mapping[Any, Any], reply).values())) if isinstance(reply, dict) else reply[1]
