"""The sandbox of redis.asyncio's clients, learned from `connection.py` and `client.py` of redis-py 8.1.

As a client opens, before the application writes anything with it, its pool is put on a leased database,
and stays there until it closes. Each block keeps what the database held, and puts it back. All that the
pool's connections send passes a filter, be it of a pipeline, a lock, a script or a PubSub.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

from redis.asyncio import RedisCluster

from lifekit._core.block import refuse_stragglers
from lifekit._core.drivers import Leased
from lifekit._core.errors import SandboxError, SandboxEscapedError, SandboxUnsupportedError
from lifekit.drivers._checkouts import Checkout, Checkouts

from .commands import Channels
from .gate import FilteredConnection, filtered, mixed
from .lease import Lease, Link, cut

checkouts: Checkouts = Checkouts("redis")
_sandboxes: WeakKeyDictionary[Any, RedisSandbox] = WeakKeyDictionary()
"""By pool."""
_leases: WeakKeyDictionary[object, Leases] = WeakKeyDictionary()
"""By gateway, of which each lifespan has one."""
_HOOKS = ("on_connect", "pack_command", "pack_commands", "read_response", "disconnect", "_writer")


class Leases:
    """Those of one lifespan."""

    def __init__(self) -> None:
        self.lock: asyncio.Lock = asyncio.Lock()
        self.by_server: dict[bytes, dict[int, Lease]] = {}


class RedisSandbox(Leased):
    """The sandbox of one pool, and of the clients that have it."""

    def __init__(self, pool: Any, described: str, leases: Leases) -> None:
        self.own: int = int(pool.connection_kwargs.get("db") or 0)
        self.lease: Lease | None = None
        self.clients: list[Any] = []
        """Those that may keep a connection of the pool for themselves."""
        self.is_over: bool = False
        self._users = 0
        self._pool = pool
        self._described = described
        self._leases = leases
        self._kind: Any = type(pool)
        self._connection_class: Any = pool.connection_class
        self._refusal: SandboxError | None = None
        self._begun: list[bool] = []  # of each block, whether it began

    @property
    def depth(self) -> int:
        """How many blocks it is in."""
        return sum(self._begun)

    def share(self, client: Any) -> None:
        """Note that one more value has the pool."""
        self._users += 1
        self.clients.append(client)

    def serves(self, leases: Leases) -> bool:
        """Return whether it is that of a lifespan's pool, still."""
        return self._leases is leases and not self.is_over

    # -- the leased database ---------------------------------------------------------------------------

    async def open(self) -> None:
        """Put the pool on a leased database.

        Where there can be none, the next block says why.

        Raises:
            SandboxBusyError: All are leased.
        """
        async with self._leases.lock:
            if self.lease is None and self._refusal is None and not self.is_over:
                await self._move_in()

    async def _move_in(self) -> None:
        pool = self._pool
        kept = {client.connection for client in self.clients if getattr(client, "connection", None)}
        if not all(hasattr(self._connection_class, each) for each in _HOOKS):
            self._refusal = _unknown_release(self._connection_class)
        elif set(pool._in_use_connections) - kept:
            self._refusal = _acquired_before(self._described)
        else:
            try:
                self.lease = await self._join()
            except SandboxUnsupportedError as error:
                self._refusal = error
        if self.lease is None:
            return
        for connection in (*pool._available_connections, *pool._in_use_connections):
            await connection.disconnect()
        self._forget_connections()
        pool.connection_class = filtered(self._connection_class, self.lease)
        pool.__class__ = mixed(SandboxedPool, self._kind)
        pool._sandbox = self

    async def _join(self) -> Lease:
        """Return the lease of the clients of this database, a new one where there is none."""
        link = Link(self.connection())
        try:
            await link.connect()
            [info] = await link.ask(("INFO", "server"))
            lines = [line.partition(b":") for line in bytes(info).splitlines()]
            facts = {name: value for name, _, value in lines}
            if b"cluster" in facts.get(b"redis_mode", facts.get(b"server_mode", b"")):
                raise _no_cluster(self._described)
            shared = self._leases.by_server.setdefault(facts[b"run_id"], {})
            lease = shared.get(self.own)
            if lease is not None and lease.sandboxes:
                link.cut()
            else:
                channels = next((each.channels for each in shared.values()), None)
                lease = Lease(self.own, self._described, channels or Channels())
                await lease.open(link, {each.own for each in [*_open]})
                shared[self.own] = lease
        except BaseException:
            link.cut()
            raise
        lease.sandboxes.append(self)
        return lease

    def connection(self) -> Any:
        """Return a connection of the sandbox's own."""
        options = {"encoding": "utf-8", "decode_responses": False}
        return self._connection_class(**{**self._pool.connection_kwargs, **options})

    def cut(self) -> None:
        """Cut all connections off; those that are in use connect again when they are used."""
        for connection in (*self._pool._available_connections, *self._pool._in_use_connections):
            cut(connection)

    def _forget_connections(self) -> None:
        self._pool._available_connections.clear()
        self._pool._in_use_connections.clear()
        for client in self.clients:
            if hasattr(client, "connection"):
                client.connection = None

    # -- blocks ----------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Keep what the database holds.

        Raises:
            SandboxUnsupportedError: The client could not be put on a leased one.
            SandboxEscapedError: The lease was lost, with what it held.
        """
        self._begun.append(False)
        if self._refusal is not None:
            raise self._refusal
        assert self.lease is not None
        if self not in self.lease.sandboxes:  # it was cut off
            self.lease.sandboxes.append(self)
        await self.lease.begin(self.depth + 1)
        self._begun[-1] = True

    async def end(self) -> None:
        """Cut off what the block did not give back, and put back what it found."""
        if not self._begun or not self._begun.pop():
            return
        assert self.lease is not None
        await self._let_go(self.lease)
        strays = [each for each in self._in_use() if _is_stray(each)]
        told = self._told(strays) if strays else None
        for connection in strays:
            cut(connection)
            connection._filter.is_over = True
            self._pool._in_use_connections.discard(connection)
        idle = self._pool._available_connections
        for connection in [each for each in idle if each._filter.is_dirty]:
            cut(connection)
            idle.remove(connection)
        for connection in self._kept_by_clients():
            if connection._filter.is_dirty:
                cut(connection)
        await self._wake()
        try:
            await self.lease.end()
        except SandboxEscapedError as error:
            if told is not None:
                error.add_note(str(told))
            raise
        if told is not None:
            raise told

    def end_at_once(self) -> bool:
        """Do so where the block has left nothing to cut off, and nothing to put back."""
        if self.lease is None or not (self._begun and self._begun[-1]) or self._in_use():
            return False
        connections = [*self._pool._available_connections, *self._kept_by_clients()]
        if any(each._filter.is_dirty for each in connections) or not self.lease.is_as_found():
            return False
        self._begun.pop()
        self.lease.end_as_found()
        return True

    def _kept_by_clients(self) -> list[Any]:
        kept = (getattr(client, "connection", None) for client in self.clients)
        return [each for each in kept if isinstance(each, FilteredConnection)]

    def _in_use(self) -> list[Any]:
        kept = self._kept_by_clients()
        return [each for each in self._pool._in_use_connections if each not in kept]

    async def _let_go(self, lease: Lease) -> None:
        """Let tasks that are about to end do so, and workers that were given a job take it."""
        for _ in range(10):
            for turn in range(150):  # rounds of the loop, then 50 ms for what needs more than the loop
                if not any(map(_is_busy, self._in_use())):
                    break
                await asyncio.sleep(0 if turn < 100 else 0.001)
            waiting = [each._filter for each in self._in_use() if each._filter.waits]
            clients = [each.client_id for each in waiting if each.pending_replies and each.client_id]
            if not clients or not lease.touched or await lease.are_blocked(clients):
                return
            await asyncio.sleep(0)

    async def _wake(self) -> None:
        condition: asyncio.Condition | None = getattr(self._pool, "_condition", None)
        if condition is not None:  # who waits for one of those that were cut off
            async with condition:
                condition.notify_all()

    def _told(self, strays: Iterable[Any]) -> SandboxEscapedError:
        return SandboxEscapedError(
            f"when the sandbox of the {self._described} ended, this had not been given back:\n"
            + "".join(f"  a connection acquired at {line}\n" for line in checkouts.lines(strays))
            + "Its code outlived the test. Let the test wait for it, or the application where it "
            "starts it; and give it back whatever happens: `async with client.pubsub() as pubsub`, "
            "`async with client.pipeline() as pipeline`. It was closed."
        )

    # -- its end ---------------------------------------------------------------------------------------

    async def closed(self) -> None:
        """Give up the lease, and leave the pool as it was, once nobody has it any more."""
        self._users -= 1
        if self._users > 0:
            return
        while self._begun:
            with suppress(SandboxEscapedError):
                await self.end()
        self.restore()
        if self.lease is not None and await self.lease.leave(self):
            for shared in self._leases.by_server.values():
                if shared.get(self.own) is self.lease:
                    del shared[self.own]

    def terminate(self) -> None:
        """Cut all off, and give up the lease; the next block takes another."""
        self._begun.clear()
        if self.lease is not None:
            self.cut()
            self.lease.give_up()

    def restore(self) -> None:
        """Leave the pool as it was."""
        self.is_over = True
        _open.discard(self)
        if isinstance(self._pool, SandboxedPool):
            self.cut()
            self._forget_connections()
            pool: Any = self._pool
            pool.__class__, pool.connection_class = self._kind, self._connection_class


_open: WeakSet[RedisSandbox] = WeakSet()
"""Whose own databases are not leased."""


def _is_stray(connection: Any) -> bool:
    checkout: Checkout | None = connection._filter.checkout
    return checkout is not None and checkout.block is not None and checkout.block.over


def _is_busy(connection: Any) -> bool:
    passing = connection._filter
    if _is_stray(connection):
        return True
    return passing.pending_replies > 0 and not (passing.waits and passing.is_outside)


class SandboxedPool:
    """What the class of a pool is mixed with, so that it is told who takes its connections."""

    # No slots: a pool has a dictionary, and its layout must not change.
    _sandbox: RedisSandbox

    async def get_connection(self, *args: Any, **options: Any) -> Any:
        """Return a connection, to who may have one."""
        refuse_stragglers("a redis client")
        checkout = checkouts.here()
        connection = await cast("Any", super()).get_connection(*args, **options)
        connection._filter.checkout = checkout
        checkouts.note(connection, checkout)
        try:
            refuse_stragglers("a redis client")
        except SandboxEscapedError:
            await self.release(connection)
            raise
        return connection

    async def release(self, connection: Any, *args: Any, **options: Any) -> None:
        """Take a connection back, unless it was cut off."""
        if not connection._filter.is_over:
            connection._filter.checkout = None
            await cast("Any", super()).release(connection, *args, **options)


class ClusterSandbox(Leased):
    """There is none for a cluster."""

    def __init__(self, described: str) -> None:
        self._described = described

    async def begin(self) -> None:
        """Say so."""
        raise _no_cluster(self._described)


class FakeSandbox(Leased):
    """The sandbox of a client of fakeredis: a copy of what its server holds."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._pool = getattr(client, "connection_pool", client)
        self._found: list[dict[Any, dict[Any, Any]]] = []
        self._before: list[set[Any]] = []

    @property
    def _server(self) -> Any:
        # Without one of their own, fakes share that of their address, which a connection finds.
        return self._pool.connection_kwargs.get("server") or self._pool.make_connection()._server

    async def begin(self) -> None:
        """Keep what the server holds."""
        databases: dict[Any, Any] = self._server.dbs
        self._found.append({number: copy.deepcopy(dict(db)) for number, db in databases.items()})
        self._before.append(set(self._pool._in_use_connections))

    async def end(self) -> None:
        """Put it back."""
        if not self._found:
            return
        found, before = self._found.pop(), self._before.pop()
        before = {*before, getattr(self._client, "connection", None)}
        for _ in range(100):
            if not self._pool._in_use_connections - before:
                break
            await asyncio.sleep(0)
        strays = self._pool._in_use_connections - before
        for connection in strays:
            await connection.disconnect(nowait=True)
        with self._server.lock:
            for number, database in self._server.dbs.items():
                database.clear()
                database.update(found.get(number, {}))
        if strays:
            raise SandboxEscapedError(
                f"when the sandbox ended, {len(strays)} connections of a fake redis client had not "
                "been given back. Close what took them: `async with client.pubsub() as pubsub`."
            )


def _no_cluster(described: str) -> SandboxUnsupportedError:
    return SandboxUnsupportedError(
        f"the sandbox can't undo what a {described} does: a cluster has one database, which it can't "
        "lease. Override the resource in tests, with a client of one server: `registry.override(cache, "
        "factory=lifekit.testing.fake_redis)`, or a `Redis` of a server for tests."
    )


def _acquired_before(described: str) -> SandboxError:
    return SandboxEscapedError(
        f"a connection of the {described} was acquired before lifekit had the client, so that what it "
        "does would be permanent. Let the factory return the client before anything is acquired, or "
        "acquire it in a resource that needs the client."
    )


def _unknown_release(kind: type) -> SandboxError:
    return SandboxUnsupportedError(
        f"a {kind.__name__} of redis-py works in a way that lifekit does not know, so that the sandbox "
        "can't undo what it does. Is redis-py newer than lifekit? Else declare the client with "
        "@registry.resource(…, sandbox=False)."
    )


def sandbox(value: Any, described: str, gateway: object) -> Leased:
    """Return the sandbox of a client or a pool; *gateway* is that of its lifespan."""
    if isinstance(value, RedisCluster):
        return ClusterSandbox(described)
    pool = getattr(value, "connection_pool", value)
    if any(kind.__module__.startswith("fakeredis.") for kind in pool.connection_class.__mro__):
        return FakeSandbox(value)
    leases = _leases.setdefault(gateway, Leases())
    found = _sandboxes.get(pool)
    if found is None or not found.serves(leases):
        if found is not None:
            found.restore()
        found = _sandboxes[pool] = RedisSandbox(pool, described, leases)
        _open.add(found)
    found.share(value)
    return found
