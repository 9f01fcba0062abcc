"""What lifekit knows about redis.asyncio's clients and pools, from redis-py 8.1 and 5.0."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import anyio
from redis import exceptions
from redis.asyncio import ConnectionPool, Redis, RedisCluster, SSLConnection

from lifekit._core.drivers import Driver, Gateway, Leased, Sandbox, judge
from lifekit._core.errors import DeclarationError
from lifekit._util.loops import running_loop
from lifekit._util.redact import redact

Client = Redis | RedisCluster | ConnectionPool

_MEND = "Make the client in the factory, so that each lifespan gets its own."


class RedisLock:
    """A key that expires, with a token as its value; and a key for the number, which stays."""

    def __init__(self, client: Any, key: str) -> None:
        self._client, self._token = client, secrets.token_hex(16)
        self._keys = (f"lifekit:{{{key}}}:leader", f"lifekit:{{{key}}}:number")  # in one slot

    async def open(self, lease: float) -> None:
        """Do nothing: the client connects when it sends something."""

    async def acquire(self, lease: float) -> int | None:
        """Set the key where nobody has."""
        number = await self._run(_ACQUIRE, lease)
        return int(number) if number else None

    async def pause(self, seconds: float) -> None:
        """Wait: nothing tells before the key itself does."""
        await anyio.sleep(seconds)

    async def renew(self, lease: float) -> bool:
        """Let it expire later, where it is still this one's."""
        return bool(await self._run(_RENEW, lease))

    async def release(self) -> None:
        """Delete it, where it is still this one's; else it expires."""
        with suppress(exceptions.RedisError, OSError):
            await self._run(_RELEASE, 0)

    async def _run(self, script: str, lease: float) -> Any:
        return await self._client.eval(script, 2, *self._keys, self._token, round(lease * 1000))


# A server that began less than a lease ago may have forgotten who led: nobody does until then. The
# number is no less than the time, lest it begins anew where the server has forgotten it as well.
_ACQUIRE = """
local key, number, token, lease = KEYS[1], KEYS[2], ARGV[1], tonumber(ARGV[2])
local info = redis.pcall('INFO', 'server')
local up = type(info) == 'string' and tonumber(string.match(info, 'uptime_in_seconds:(%d+)'))
if up and up * 1000 < lease or not redis.call('SET', key, token, 'NX', 'PX', lease) then return 0 end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local next = math.max(tonumber(redis.call('GET', number) or '0') + 1, now)
redis.call('SET', number, string.format('%.0f', next))
return next
"""
_RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
_RELEASE = (
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
)


class RedisDriver(Driver[Client]):
    """Clients of redis.asyncio, of one server and of a cluster, and pools that clients are given."""

    def __init__(self) -> None:
        self._leased: WeakKeyDictionary[Any, Leased] = WeakKeyDictionary()

    async def open(self, value: Client) -> Client:
        """Take a client that works in no other loop; one of a cluster learns its nodes."""
        client: Any = value
        if not _is_here(client):
            raise DeclarationError(f"this redis client is connected in another event loop. {_MEND}")
        if isinstance(value, RedisCluster):
            if not client.nodes_manager.startup_nodes:  # as `_seal` leaves it
                raise DeclarationError(f"this redis cluster client is closed already. {_MEND}")
            await client.initialize()
        else:
            pool = _pool(client)
            for connection in _connections(client):  # undoes `_seal`
                connection.redis_connect_func = pool.connection_kwargs.get("redis_connect_func")
        return value

    async def check(self, value: Client) -> None:
        """Send a PING, in a cluster to each node."""
        client: Any = Redis(connection_pool=value) if isinstance(value, ConnectionPool) else value
        await client.ping()

    async def close(self, value: Client) -> None:
        """Close the client with its pool, even if that was made apart and given to it."""
        client: Any = value
        connections = _seal(client)
        if isinstance(value, RedisCluster):
            await client.aclose()
        elif isinstance(value, ConnectionPool):
            await client.disconnect()
        else:
            await client.aclose(close_connection_pool=True)
        # RedisCluster.aclose() does nothing while the client means to look at the nodes again.
        _cut(connections)

    def terminate(self, value: Client) -> None:
        """Abort every connection, idle or in use."""
        client: Any = value
        if not _is_here(client):
            return  # `open` refused it: it is another's
        _cut(_seal(client))
        if isinstance(value, RedisCluster):
            client._initialize = True  # its mark of being closed, for which `__del__` looks
        elif isinstance(value, Redis):
            client.connection = None  # the only one of `single_connection_client`: likewise

    def describe(self, value: Client) -> str:
        """Return where it connects to."""
        return redact(_description(value))

    def redirect(self, value: Client, gateway: Gateway) -> Sandbox | None:
        """Let the client work in a database that its lifespan leases."""
        leased = self._leased[value] = gateway.lease(value, self.describe(value))
        return leased

    async def reconnect(self, value: Client) -> None:
        """Lease that database, and let what connects from now on select it."""
        if _is_here(value):  # else `open` refuses it: it is another's
            await self._leased[value].open()

    def lock(self, value: Client, key: str) -> RedisLock:
        """Return a lock with a lease: a key that expires."""
        return RedisLock(
            Redis(connection_pool=value) if isinstance(value, ConnectionPool) else value, key
        )

    def transient(self, error: BaseException) -> bool:
        """Return whether the server is starting, stopping or full, or a cluster is forming."""
        return judge(error) is True


def _pool(client: Any) -> Any:
    return client if isinstance(client, ConnectionPool) else client.connection_pool


def _connections(client: Any) -> Sequence[Any]:
    if isinstance(client, RedisCluster):
        manager = client.nodes_manager
        # A node may stand in both as two objects, each with connections of its own.
        nodes: Any = [*manager.startup_nodes.values(), *manager.nodes_cache.values()]
        return list({connection for node in nodes for connection in node._connections})
    pool = _pool(client)
    return [*pool._available_connections, *pool._in_use_connections]


def _is_here(client: Any) -> bool:
    loop = running_loop()
    writers = (connection._writer for connection in _connections(client))
    return all(writer is None or writer._loop is loop for writer in writers)


def _seal(client: Any) -> Sequence[Any]:
    """Keep what is under way from connecting again, and return all connections.

    A command that loses its connection is sent again over a new one, up to ten times, and PubSub
    reconnects in any case: either would outlive the closing.
    """
    connections = _connections(client)
    if isinstance(client, RedisCluster):
        client.nodes_manager.startup_nodes.clear()
        busy: Sequence[Any] = connections
    else:
        busy = list(_pool(client)._in_use_connections)
    for connection in busy:
        connection.retry._retries = 0
        connection.redis_connect_func = _refuse
    return connections


async def _refuse(_: object) -> None:
    raise exceptions.ConnectionError("the client is closed")


def _cut(connections: Sequence[Any]) -> None:
    for connection in connections:
        if connection._writer is not None:
            connection._writer.transport.abort()
        connection._reader = connection._writer = None


def _description(client: Any) -> str:
    if isinstance(client, RedisCluster):
        nodes = {**client.nodes_manager.startup_nodes, **client.nodes_manager.nodes_cache}
        return f"redis cluster client, redis://{','.join(nodes)}"
    pool = _pool(client)
    if hasattr(pool, "service_name"):
        return f"redis client, sentinel service {pool.service_name}"
    given: dict[str, Any] = pool.connection_kwargs
    if "path" in given:
        return f"redis client, unix://{given['path']}?db={given.get('db') or 0}"
    scheme = "rediss" if issubclass(pool.connection_class, SSLConnection) else "redis"
    login = f"{given.get('username') or ''}{':***' if given.get('password') else ''}"
    host, port = given.get("host", "localhost"), given.get("port", 6379)
    return f"redis client, {scheme}://{login}{login and '@'}{host}:{port}/{given.get('db') or 0}"


driver: RedisDriver = RedisDriver()
