"""The sandbox of redis.asyncio's clients, learned from `connection.py` and `client.py` of redis-py 8.1.

Inside a block the client's pool is the same object with other connections, which select a leased
database. So whoever holds the client or its pool is inside, and the pool's own code limits, queues
and retries. Each connection, of either kind, is mixed with a gate at which every command passes, be
it of a pipeline, a lock, a script or a PubSub.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary, WeakSet

from redis.asyncio import RedisCluster

from lifekit._errors import SandboxError, SandboxEscapedError, SandboxUnsupportedError
from lifekit._sandbox import current_block, refuse_stragglers
from lifekit.drivers import Sandbox

from ._redis_commands import Channels
from ._redis_gate import checkouts, guard, mixed
from ._redis_lease import FAILURES, Lease, Link, cut, take

_SECONDS = 5.0
_open: WeakSet[RedisSandbox] = WeakSet()
_leases: WeakKeyDictionary[object, dict[bytes, dict[int, Lease]]] = WeakKeyDictionary()
"""Of each lifespan, by server and number: clients of one database share a lease, as they do that."""


class _Connections(NamedTuple):
    """What a pool works with: inside of a block other connections than outside."""

    available: list[Any]
    in_use: Any


class RedisSandbox(Sandbox):
    """The sandbox of one client of one server."""

    nests = False

    def __init__(self, client: Any, described: str) -> None:
        self.active: bool = False
        self.lease: Lease | None = None
        self._cut_off: int | None = None  # the number of a block that was, which nobody emptied
        self.own: int = int(client.connection_pool.connection_kwargs.get("db") or 0)
        self.other: _Connections = _Connections([], set())
        """The connections that the pool has when it is not as it is now."""
        self._client = client
        self._pool = client.connection_pool
        self._single: Any = None
        self._may_ask = asyncio.Event()
        self._may_ask.set()
        self._shared: dict[bytes, dict[int, Lease]] = {}
        self._described = described
        self._kind: Any = type(self._pool)
        _open.add(self)
        for connection in (*self._pool._available_connections, *self._pool._in_use_connections):
            guard(connection, self)
        self._pool.__class__ = mixed(SandboxedPool, self._pool.__class__)
        self._pool._sandbox = self

    async def begin(self) -> None:
        """Put connections in the pool that select the leased database."""
        if self.lease is None or self._must_leave(self.lease):
            block = current_block.get()
            if block is not None:
                lifespan = block.lifespan
                self._shared = _leases.setdefault(lifespan, {})
            await self._take_lease()
        assert self.lease is not None
        self.lease.active.add(self)
        self._swap()
        self._single, self._client.connection = self._client.connection, None
        self.active = True
        await self._wake()
        await self._let_listeners_hear(self.lease)
        await self.lease.unblock([each for each in self.other.in_use if each._gate.waits])

    def _must_leave(self, lease: Lease) -> bool:
        # A lifespan that opened since may have the number as its own.
        return lease.is_lost() or lease.is_cut() or lease.number in {each.own for each in _open}

    async def end(self) -> None:
        """Take them out, and empty the database."""
        if not self.active:
            return
        assert self.lease is not None
        lease, single = self.lease, self._client.connection
        self._client.connection = self._single
        if single is not None and not single._gate.owed:
            self._pool._in_use_connections.discard(single)
            self._pool._available_connections.append(single)
        await self._let_go(lease)
        strays = list(self._pool._in_use_connections)
        told = self._told(checkouts.lines(strays)) if strays else None
        self._leave_block(strays)
        self._may_ask.set()
        await self._wake()
        try:
            if not lease.active:
                if lease.dirty:
                    for sandbox in lease.sandboxes:
                        sandbox.drop_inside()
                await lease.undo()
        except SandboxEscapedError as error:
            if told is not None:
                error.add_note(str(told))
            with suppress(Exception):  # the server may be there, and what was done with it
                async with asyncio.timeout(_SECONDS):
                    await self._take_lease()
            raise
        if told is not None:
            raise told

    async def _let_go(self, lease: Lease) -> None:
        """Let tasks that are about to end do so, and send workers that wait for a job outside."""
        for _ in range(10):
            busy: set[Any] = set()
            for turn in range(150):  # rounds of the loop, then 50 ms for what needs more than the loop
                busy = set(self._pool._in_use_connections)
                if all(each._gate.is_guest and each._gate.waits for each in busy):
                    break
                await asyncio.sleep(0 if turn < 100 else 0.001)
            else:
                return  # strays
            if not busy:
                return
            self._may_ask.clear()
            with suppress(*FAILURES):
                waited = await lease.unblock(list(busy))
                for turn in range(1100):  # its answer may take a moment
                    if not waited & self._pool._in_use_connections:
                        break
                    await asyncio.sleep(0 if turn < 100 else 0.001)
                if waited == busy:
                    return
            self._may_ask.set()  # one has got a job, which it may end

    async def may_ask(self, is_guest: bool) -> None:
        """Wait, where a worker would ask for a connection of a block that ends."""
        if is_guest:
            await self._may_ask.wait()

    def _told(self, lines: Iterable[str]) -> SandboxEscapedError:
        return SandboxEscapedError(
            f"when the sandbox of the {self._described} ended, this had not been given back:\n"
            + "".join(f"  a connection acquired at {line}\n" for line in lines)
            + "Its code outlived the test. Let the test wait for it, or the application where it "
            "starts it; and give it back whatever happens: `async with client.pubsub() as pubsub`, "
            "`async with client.pipeline() as pipeline`. It was closed."
        )

    async def close(self) -> None:
        """Give up the lease, and leave the pool as it was."""
        with suppress(SandboxEscapedError):
            await self.end()
        self.terminate()
        _open.discard(self)
        if isinstance(self._pool, SandboxedPool):
            cast(Any, self._pool).__class__ = self._kind

    def terminate(self) -> None:
        """Cut off what is inside, and give up the lease; the next block takes another."""
        self._may_ask.set()
        if self.active:
            self._client.connection = self._single
            self._leave_block(list(self._pool._in_use_connections))
        self.drop_inside()
        if self.lease is not None:
            self._cut_off = self.lease.number
            self.lease.leave(self)
            self.lease = None

    def drop_inside(self) -> None:
        """Cut idle connections off that know the leased database."""
        for connection in self.other.available:
            cut(connection)
        self.other.available.clear()

    def guarded(self, connection: Any) -> Any:
        """Make a new connection one of the block that runs, or one of outside."""
        guard(connection, self)
        if self.active and self.lease is not None:
            connection.db = self.lease.number
            connection._gate.inside = True
        return connection

    def _swap(self) -> None:
        pool = self._pool
        before = _Connections(pool._available_connections, pool._in_use_connections)
        pool._available_connections, pool._in_use_connections = self.other
        self.other = before

    async def _wake(self) -> None:
        condition: asyncio.Condition | None = getattr(self._pool, "_condition", None)
        if condition is not None:  # others wait for a connection of those that are not there any more
            async with condition:
                condition.notify_all()

    def _leave_block(self, strays: Iterable[Any]) -> None:
        assert self.lease is not None
        idle: list[Any] = self._pool._available_connections
        for connection in strays:
            connection._gate.is_over = True
            cut(connection)
            self.lease.dirty = True
        for connection in [each for each in idle if each._gate.is_worn()]:
            self.lease.dirty |= bool(connection._gate.owed)
            cut(connection)
            idle.remove(connection)
        self._pool._in_use_connections = set()
        self._swap()
        self.active = False
        self.lease.active.discard(self)

    async def _take_lease(self) -> None:
        self.drop_inside()
        former = self.lease.number if self.lease is not None else self._cut_off
        if self.lease is not None:
            for connection in self._pool._in_use_connections:
                if connection._gate.is_joined:  # to a number that may be another's by now
                    cut(connection)
                    connection._gate.renew()
            self.lease.leave(self)
            self.lease = None
        connection = self._kind.make_connection(self._pool)
        link = Link(connection)
        try:
            await link.connect()
            [info] = await link.ask(("INFO", "server"))
            facts = {
                name: value
                for line in bytes(info).splitlines()
                for name, _, value in [line.partition(b":")]
            }
            if b"cluster" in facts.get(b"redis_mode", facts.get(b"server_mode", b"")):
                raise _no_cluster(self._described)
            leases = self._shared.setdefault(facts[b"run_id"], {})
            lease = leases.get(self.own)
            if lease is None or self._must_leave(lease) or not lease.sandboxes:
                kept = {sandbox.own for sandbox in _open}
                channels = next((each.channels for each in leases.values()), None) or Channels()
                lease = await take(link, self.own, kept, self._described, channels, former)
                leases[self.own] = lease
            else:
                link.cut()
        except BaseException:
            link.cut()
            raise
        lease.sandboxes.add(self)
        self.lease = lease

    async def _let_listeners_hear(self, lease: Lease) -> None:
        """Let PubSubs that subscribed outside hear what is published inside, from now on."""
        joining = [each for each in self.other.in_use if each._gate.may_join(each)]
        if not joining:
            return
        before = await lease.count_listeners()
        for connection in joining:
            connection._gate.join(connection, lease)
        try:
            async with asyncio.timeout(_SECONDS):
                while await lease.count_listeners() < before + len(joining):
                    pass
        except TimeoutError:
            raise SandboxError(
                f"a PubSub of the {self._described} that subscribed before the sandbox could not be "
                f"told of it within {_SECONDS:.0f} s: is its connection alive?"
            ) from None


class SandboxedPool:
    """What the class of a pool is mixed with, so that it asks its sandbox."""

    # No slots: a pool has a dictionary, and its layout must not change.
    _sandbox: RedisSandbox
    _in_use_connections: Any

    def make_connection(self) -> Any:
        """Make a connection of this side."""
        return self._sandbox.guarded(cast(Any, super()).make_connection())

    async def get_connection(self, *args: Any, **options: Any) -> Any:
        """Return a connection of this side, to who may have one."""
        refuse_stragglers("a redis client")
        site = checkouts.here()
        is_guest = current_block.get() is None
        while True:
            await self._sandbox.may_ask(is_guest)
            connection = await cast(Any, super()).get_connection(*args, **options)
            connection._gate.is_guest, connection._gate.waits = is_guest, False
            checkouts.note(connection, site)
            try:
                refuse_stragglers("a redis client")
            except SandboxEscapedError:
                await self.release(connection)
                raise
            if connection._gate.inside is self._sandbox.active:
                return connection
            await self.release(connection)  # a block has begun or ended since it was asked for

    async def release(self, connection: Any, *args: Any, **options: Any) -> None:
        """Take a connection back to its own side."""
        if connection._gate.is_over:
            return
        if connection._gate.inside is self._sandbox.active:
            await cast(Any, super()).release(connection, *args, **options)
        else:
            self._sandbox.other.in_use.discard(connection)
            self._sandbox.other.available.append(connection)


class ClusterSandbox(Sandbox):
    """There is none for a cluster."""

    def __init__(self, described: str) -> None:
        self._described = described

    async def begin(self) -> None:
        """Say so."""
        raise _no_cluster(self._described)


class FakeSandbox(Sandbox):
    """The sandbox of a client of fakeredis: each block has a server of its own."""

    nests = False

    def __init__(self, client: Any) -> None:
        self._client = client
        self._pool = client.connection_pool
        self._outside: tuple[Any, ...] | None = None

    async def begin(self) -> None:
        """Put an empty server in the place of the client's."""
        from fakeredis import FakeServer

        given = self._pool.connection_kwargs
        self._outside = self._put_in(
            FakeServer(server_type=given.get("server_type", "redis")), [], set(), None
        )

    async def end(self) -> None:
        """Put the client's own server back."""
        if self._outside is None:
            return
        for _ in range(100):
            if not self._pool._in_use_connections - {self._client.connection}:
                break
            await asyncio.sleep(0)
        _, available, in_use, single = self._put_in(*self._outside)
        self._outside = None
        for connection in (*available, *in_use):
            await connection.disconnect(nowait=True)
        if strays := in_use - {single}:
            raise SandboxEscapedError(
                f"when the sandbox ended, {len(strays)} connections of a fake redis client had not "
                "been given back. Close what took them: `async with client.pubsub() as pubsub`."
            )

    def _put_in(self, server: Any, available: Any, in_use: Any, single: Any) -> tuple[Any, ...]:
        pool, client = self._pool, self._client
        given = pool.connection_kwargs
        before = (
            given.get("server"),
            pool._available_connections,
            pool._in_use_connections,
            client.connection,
        )
        pool._available_connections, pool._in_use_connections = available, in_use
        given["server"], client.connection = server, single
        return before


def _no_cluster(described: str) -> SandboxUnsupportedError:
    return SandboxUnsupportedError(
        f"the sandbox can't undo what a {described} does: a cluster has one database, which it can't "
        "lease. Override the resource in tests, with a client of one server: `registry.override(cache, "
        "factory=lifekit.testing.fake_redis)`, or a `Redis` of a server for tests."
    )


def sandbox(client: Any, described: str) -> Sandbox | None:
    """Return a client's sandbox; None where the client shares its pool with one that has it."""
    if isinstance(client, RedisCluster):
        return ClusterSandbox(described)
    if any(kind.__module__.startswith("fakeredis.") for kind in type(client).__mro__):
        return FakeSandbox(client)
    if isinstance(client.connection_pool, SandboxedPool):
        return None
    return RedisSandbox(client, described)
