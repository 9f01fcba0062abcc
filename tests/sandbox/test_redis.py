"""The sandbox of redis.asyncio's clients, on real Valkey servers, and of fakeredis's."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.lowlevel
import pytest
from redis import Redis as SyncRedis
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Connection, ConnectionPool, Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from lifekit import Registry, drivers, embedded
from lifekit._core.errors import SandboxBusyError, SandboxEscapedError, SandboxUnsupportedError
from lifekit._sandbox.redis.client import sandbox
from lifekit._sandbox.redis.commands import is_plain
from lifekit.testing import sandboxing
from lifekit.testing._fake_redis import fake_redis
from tests.drivers.conftest import below, until

from ..depth import LOOPS

pytestmark = pytest.mark.anyio

LEASE = "lifekit-lease-"


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> object:
    """redis.asyncio is asyncio's own."""
    return request.param


class Admin:
    """The server as one sees it who has nothing to do with sandboxes."""

    def __init__(self, url: str) -> None:
        self.url = url
        kind: Any = SyncRedis
        self.client: Any = kind.from_url(url, decode_responses=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def leases(self) -> list[int]:
        """The numbers that are leased."""
        names = [each["name"] for each in self.client.client_list()]
        return sorted(int(name[len(LEASE) :].split(":")[0]) for name in names if name.startswith(LEASE))

    def full(self) -> set[str]:
        """The databases that are not empty."""
        return set(self.client.info("keyspace"))

    def runs(self, command: str) -> bool:
        """Whether this is some connection's last command."""
        return any(each["cmd"] == command for each in self.client.client_list())

    def kill(self, **wanted: str) -> None:
        """Let the server end the connections of which this is true."""
        for each in self.client.client_list():
            if all(each[key].startswith(value) for key, value in wanted.items()):
                self.client.client_kill_filter(_id=each["id"])


@pytest.fixture
def admin(valkey: embedded.Server) -> Iterator[Admin]:
    """The run's server, with something in its database 0 that must stay."""
    found = Admin(valkey.url)
    found.flushall()
    found.set("kept", "1")
    yield found
    assert found.get("kept") == "1"
    assert found.dbsize() == 1
    assert found.full() == {"db0"}
    found.close()


def connect(url: str, kind: Any = Redis, **options: Any) -> Any:
    """A client of the text kind."""
    return kind.from_url(url, **{"decode_responses": True, **options})


def pool_of(url: str, kind: Any = ConnectionPool, **options: Any) -> Any:
    """A pool that is made apart from its client."""
    return kind.from_url(url, **options)


@asynccontextmanager
async def opened(*factories: Callable[[], Any]) -> AsyncGenerator[Any]:
    """A sandboxed lifespan of what the factories make: `.lifespan`, `.clients`, `.sandbox()`."""
    registry = Registry()
    handles: list[Any] = []
    for index, factory in enumerate(factories):

        def made(factory: Callable[[], Any] = factory) -> Any:
            return factory()

        handles.append(registry.resource(name=f"client{index}")(made))
    with sandboxing():
        async with registry.lifespan() as lifespan:
            yield lifespan.sandbox, *(lifespan[handle] for handle in handles)


# -- what is undone ---------------------------------------------------------------------------------


async def filled(cache: Any) -> None:
    """What an application puts there while it starts, of every type."""
    await cache.set("flag", "on")
    await cache.set("session", "1", ex=1000)
    await cache.hset("prices", mapping={"a": "1", "b": "2"})
    await cache.rpush("list", "a", "b")
    await cache.sadd("set", "a", "b")
    await cache.zadd("ranks", {"a": 1.5, "b": 2})
    await cache.setbit("bits", 7, 1)
    await cache.pfadd("seen", "a")
    await cache.xadd("jobs", {"n": "1"}, id="1-1")
    await cache.xadd("jobs", {"n": "2"}, id="2-1")
    await cache.xgroup_create("jobs", "workers", id="0")
    await cache.xreadgroup("workers", "one", {"jobs": ">"}, count=1)


async def state_of(cache: Any) -> dict[str, Any]:
    """All that a database holds."""
    keys = sorted(await cache.keys())
    groups = await cache.xinfo_groups("jobs") if "jobs" in keys else None
    pending = await cache.xpending("jobs", "workers") if groups else None
    times = {key: await cache.expiretime(key) for key in keys}
    return {"keys": keys, "groups": groups, "pending": pending, "times": times}


async def test_each_block_finds_what_the_start_left_and_nothing_else(admin: Admin) -> None:
    """Of every type, with times and consumer groups; nothing reaches the database of the settings."""
    client = connect(admin.url)
    async with opened(lambda: client) as (block, cache):
        assert cache is client
        await filled(cache)
        found = await state_of(cache)
        for change in (
            "FLUSHDB",
            "DEL flag list set",
            "EXPIRE flag 5",
            "PERSIST session",
            "XREADGROUP GROUP workers two STREAMS jobs >",
            "XGROUP DESTROY jobs workers",
        ):
            async with block():
                assert await state_of(cache) == found
                await cache.execute_command(*change.split())
                await cache.set("mine", "1")
            assert await state_of(cache) == found
        async with block():
            assert await cache.zscore("ranks", "a") == 1.5
            assert await cache.hgetall("prices") == {"a": "1", "b": "2"}
            assert await cache.lrange("list", 0, -1) == ["a", "b"]
            assert await cache.xreadgroup("workers", "one", {"jobs": ">"})
        assert admin.keys() == ["kept"]
    assert admin.leases() == []


async def test_blocks_nest(admin: Admin) -> None:
    """Each puts back what it found, also where the outer one did nothing after the inner one."""
    async with opened(*[lambda: connect(admin.url)] * 2) as (_, cache, other):
        sandboxes = [each.connection_pool._sandbox for each in (cache, other)]

        async def begin() -> None:
            for each in sandboxes:
                await each.begin()

        async def end() -> None:
            for each in reversed(sandboxes):
                await each.end()

        await cache.set("start", "1")
        await begin()
        await cache.set("outer", "1")
        for _ in "12":
            await begin()
            assert sorted(await other.keys()) == ["outer", "start"]
            await other.flushdb()
            await cache.set("inner", "1")
            await end()
        assert sorted(await cache.keys()) == ["outer", "start"]
        await begin()
        await end()
        await end()
        assert await cache.keys() == ["start"]
        await begin()
        await begin()
        await cache.set("inner", "1")
        await end()
        await end()
        assert await cache.keys() == ["start"]


async def test_a_block_in_which_nothing_was_done_ends_at_once(admin: Admin) -> None:
    """No other does, whether it is the inner one or the outer one."""
    async with opened(lambda: connect(admin.url)) as (_, cache):
        sandbox = cache.connection_pool._sandbox
        await cache.set("start", "1")
        await sandbox.begin()
        assert sandbox.end_at_once()
        await sandbox.begin()
        await cache.set("outer", "1")
        await sandbox.begin()
        assert sandbox.end_at_once()
        assert not sandbox.end_at_once()
        assert sorted(await cache.keys()) == ["outer", "start"]
        await sandbox.begin()
        await cache.set("inner", "1")
        assert not sandbox.end_at_once()
        await sandbox.end()
        assert sorted(await cache.keys()) == ["outer", "start"]
        await sandbox.end()
        assert await cache.keys() == ["start"]


async def test_what_is_done_outside_of_blocks_stays_for_the_next_ones(admin: Admin) -> None:
    """On the leased database, until the lifespan ends; a generator's end is there as well."""

    async def cache() -> AsyncGenerator[Any]:
        client = connect(admin.url)
        yield client
        await client.set("late", "1")
        await client.aclose()

    async with opened(cache) as (block, client):
        for number in range(3):
            await client.incr("counted")
            async with block():
                assert await client.get("counted") == str(number + 1)
                await client.delete("counted")
    assert admin.full() == {"db0"}


async def test_a_sandbox_that_was_cut_off_takes_another_lease(admin: Admin) -> None:
    """What the next block does is undone as well."""
    async with opened(lambda: connect(admin.url)) as (block, cache):
        async with block():
            await cache.set("inside", "1")
            cache.connection_pool._sandbox.terminate()
        async with block():
            assert await cache.keys() == []
            await cache.set("inside", "1")
        assert await cache.keys() == []


async def test_a_lease_killed_between_blocks_is_taken_anew(admin: Admin) -> None:
    """Also where the loop did not run since, and has not heard of it."""
    async with opened(lambda: connect(admin.url)) as (block, cache):
        await cache.set("start", "1")
        for number in range(3):
            if number:
                admin.kill(name=LEASE)
            async with block():
                assert await cache.keys() == ["start"]
                await cache.set("inside", "1")


async def test_what_only_a_lost_lease_held_is_told_of(admin: Admin) -> None:
    """No block begins without what the start left there."""
    async with opened(lambda: connect(admin.url)) as (block, cache):
        await cache.set("start", "1")
        admin.kill(name=LEASE)
        for _ in "12":
            with pytest.raises(SandboxEscapedError, match=r"lost its lease on database \d+ before"):
                await block().__aenter__()
    beside = Admin(f"{admin.url[:-1]}15")
    beside.flushdb()
    beside.close()


async def test_a_block_after_another_needs_one_message(admin: Admin) -> None:
    """One FLUSHDB, at the end; a block in which nothing was sent needs not even that."""
    async with opened(lambda: connect(admin.url)) as (block, cache):
        async with block():
            await cache.get("a")
        for sends in (True, False):
            before = admin.info("commandstats")
            async with block():
                if sends:
                    await cache.get("a")
            after = admin.info("commandstats")
            grown = {name: each["calls"] - before[name]["calls"] for name, each in after.items()}
            grown = {name: n for name, n in grown.items() if n and name != "cmdstat_info"}
            assert grown == ({"cmdstat_get": 1, "cmdstat_flushdb": 1} if sends else {})


async def test_a_pool_is_a_value_too(admin: Admin) -> None:
    """It is opened, checked, undone and closed as a client is; clients of it are in the block."""
    registry = Registry()

    @registry.resource
    def pool() -> Any:
        return pool_of(admin.url)

    @registry.resource(pool)
    def cache(pool: Any) -> Redis:
        return Redis(connection_pool=pool)

    with sandboxing():
        async with registry.lifespan() as lifespan:
            for _ in "12":
                async with lifespan.sandbox():
                    other = Redis(connection_pool=lifespan[pool])
                    assert await other.incr("a") == 1
                    assert await lifespan[cache].get("a") == b"1"
    closed = pool_of("redis://127.0.0.1:1")
    driver: Any = drivers.find(closed)
    assert driver.describe(closed) == "redis client, redis://127.0.0.1:1/0"
    with pytest.raises(exceptions.ConnectionError):
        await driver.check(closed)


def pools(url: str) -> dict[str, Callable[[], Any]]:
    """The ways in which applications make clients."""
    address = urlsplit(url)
    plain = {"host": address.hostname, "port": address.port, "password": address.password}
    return {
        "arguments": lambda: Redis(**plain),  # type: ignore[arg-type]
        "resp2": lambda: connect(url, protocol=2),
        "bytes": lambda: connect(url, decode_responses=False),
        "pool": lambda: Redis(connection_pool=pool_of(url)),
        "blocking": lambda: Redis(connection_pool=pool_of(url, BlockingConnectionPool, timeout=60)),
        "single": lambda: connect(url, single_connection_client=True),
    }


@pytest.mark.parametrize("how", ["arguments", "resp2", "bytes", "pool", "blocking", "single"])
async def test_however_the_client_is_made(how: str, admin: Admin) -> None:
    """Commands, pipelines, transactions, locks, scripts, PubSub: all are inside."""
    async with opened(pools(admin.url)[how]) as (block, cache):
        for _ in range(2):
            async with block():
                await use_everything(cache)
                assert admin.keys() == ["kept"]
            assert await cache.dbsize() == 0


async def use_everything(cache: Any) -> None:
    """Do what applications do, and check that it works."""
    assert await cache.set("a", "1")
    async with cache.pipeline(transaction=True) as pipeline:
        await pipeline.watch("a")
        pipeline.multi()
        pipeline.incr("a").incr("a")
        assert await pipeline.execute() == [2, 3]
    async with cache.pipeline(transaction=False) as pipeline:
        assert await pipeline.set("b", "1").dbsize().execute() == [True, 2]
    async with cache.lock("lock", timeout=60):
        assert await cache.exists("lock")
    double = cache.register_script("return redis.call('INCRBY', KEYS[1], ARGV[1])")
    assert await double(keys=["a"], args=[4]) == 7
    async with cache.client() as single:
        assert int(await single.get("a")) == 7
    async with cache.pubsub(ignore_subscribe_messages=True) as pubsub:
        await pubsub.subscribe("news")
        await heard(cache, "news")
        await cache.publish("news", "x")
        message = await next_message(pubsub)
        assert message["channel"] in {"news", b"news"}
        assert message["data"] in {"x", b"x"}


async def heard(cache: Any, channel: str, count: int = 1) -> None:
    """Wait until the server knows of a subscription."""
    with anyio.fail_after(60):
        while (await cache.pubsub_numsub(channel))[0][1] < count:
            await anyio.lowlevel.checkpoint()


async def next_message(pubsub: Any) -> Any:
    """Return what arrives next."""
    with anyio.fail_after(60):
        while (message := await pubsub.get_message(timeout=1)) is None:
            pass
    return message


async def test_clients_of_one_database_share_it_in_the_block_too(admin: Admin) -> None:
    """A queue that one client fills and another empties; a third has another database."""
    other = admin.url[:-1] + "1"
    made = [
        partial(connect, admin.url),
        partial(connect, admin.url, protocol=2),
        partial(connect, other),
    ]
    async with opened(*made) as (block, first, second, third):
        for _ in range(2):
            async with block():
                await first.rpush("queue", "job")
                assert await second.lpop("queue") == "job"
                await second.set("a", "1")
                assert await third.exists("a") == 0
                assert len(admin.leases()) == 2
                assert 1 not in admin.leases()
    assert admin.leases() == []


async def test_two_clients_of_one_pool_are_one(admin: Admin) -> None:
    """The pool is what is sandboxed; whoever has it is inside."""
    pool = pool_of(admin.url)
    async with opened(*[lambda: Redis(connection_pool=pool)] * 2) as (block, first, second):
        async with block():
            await first.set("a", "1")
            assert await second.get("a") == b"1"
        assert await second.get("a") is None


async def test_limits_of_a_pool_bite_inside(admin: Admin) -> None:
    """`max_connections` and the time that one waits for a connection."""

    def small() -> Any:
        pool = pool_of(admin.url, BlockingConnectionPool, max_connections=1, timeout=0.01)
        return Redis(connection_pool=pool)

    async with opened(small) as (block, cache), block(), cache.client() as single:
        await single.ping()
        with pytest.raises(exceptions.ConnectionError, match="No connection available"):
            await cache.ping()


async def test_aclose_by_the_application_closes_what_is_inside(admin: Admin) -> None:
    """As in production, the client connects again when it is used again."""
    async with opened(lambda: connect(admin.url)) as (block, cache):
        await cache.get("a")
        async with block():
            await cache.set("a", "1")
            await cache.aclose()
            assert await cache.get("a") == "1"
        assert await cache.get("a") is None


async def test_a_single_connection_that_was_cancelled_or_refused_is_given_back(admin: Admin) -> None:
    """It connects anew for the next command; what was never sent owes no reply; names go with it."""
    # redis 8 goes on waiting for the reply, cancelled or not, until its time limit.
    single = {"single_connection_client": True, "socket_timeout": 1}
    async with opened(lambda: connect(admin.url, **single)) as (block, cache):
        async with block():
            task = asyncio.create_task(cache.blpop(["queue"]))
            await until(lambda: admin.runs("blpop"))
            task.cancel()
            await asyncio.wait([task])
            await cache.client_setname("mine")
        for command in ("FLUSHALL", "SELECT 1"):
            async with block():
                assert not await cache.client_getname()
                async with cache.pipeline() as pipeline:
                    pipeline.set("a", "1").execute_command(command)
                    with pytest.raises(SandboxUnsupportedError):
                        await pipeline.execute()
                with pytest.raises(exceptions.DataError):
                    await cache.set("a", None)
                assert await cache.dbsize() == 0


async def test_what_a_connection_was_told_is_not_seen_by_the_next_block(admin: Admin) -> None:
    """Client names, and transactions that nobody ended."""
    async with opened(lambda: connect(admin.url)) as (block, cache):
        async with block():
            await cache.client_setname("mine")
        async with block():
            assert not await cache.client_getname()
            assert await cache.execute_command("MULTI") == "OK"
        async with block():
            assert await cache.set("a", "1") is True


# -- what is refused --------------------------------------------------------------------------------

REFUSED = {
    "SELECT 1": "SELECT",
    "FLUSHALL": "FLUSHALL",
    "flushall async": "FLUSHALL",
    "SWAPDB 0 1": "SWAPDB",
    "MOVE a 1": "MOVE",
    "COPY a b DB 1": "COPY … DB",
    "COPY a b replace db 1": "COPY … DB",
    "MIGRATE h 1 a 0 1": "MIGRATE",
    "CONFIG SET maxmemory 1": "CONFIG SET",
    "CONFIG RESETSTAT": "CONFIG RESETSTAT",
    "SCRIPT FLUSH": "SCRIPT FLUSH",
    "SCRIPT KILL": "SCRIPT KILL",
    "FUNCTION FLUSH": "FUNCTION FLUSH",
    "FUNCTION LOAD x": "FUNCTION LOAD",
    "ACL SETUSER x": "ACL SETUSER",
    "CLIENT KILL 1": "CLIENT KILL",
    "CLIENT PAUSE 1": "CLIENT PAUSE",
    "CLIENT REPLY OFF": "CLIENT REPLY",
    "CLUSTER RESET": "CLUSTER RESET",
    "DEBUG SLEEP 0": "DEBUG",
    "SHUTDOWN": "SHUTDOWN",
    "REPLICAOF NO ONE": "REPLICAOF",
    "BGSAVE": "BGSAVE",
    "MONITOR": "MONITOR",
    "RESET": "RESET",
    "SLOWLOG RESET": "SLOWLOG RESET",
    "LATENCY RESET": "LATENCY RESET",
    "MODULE LOAD x": "MODULE LOAD",
}
ALLOWED = [
    "CONFIG GET maxmemory",
    "CLIENT ID",
    "SCRIPT EXISTS x",
    "FUNCTION LIST",
    "COPY a b",
    "FLUSHDB",
]


async def test_commands_that_reach_further_are_refused_before_they_are_sent(admin: Admin) -> None:
    """However they are written, and in pipelines; the client works on."""
    async with opened(lambda: connect(admin.url)) as (block, cache):
        async with block():
            await cache.set("a", "1")
            for command, name in REFUSED.items():
                first, *rest = command.split()
                for args in (
                    [first, *rest],
                    [command],
                    [command.encode()],
                    [first.lower().encode(), *rest],
                ):
                    with pytest.raises(
                        SandboxUnsupportedError, match=f"^{name} is refused in the sandbox: "
                    ):
                        await cache.execute_command(*args)
            for command in ALLOWED:
                await cache.execute_command(*command.split())
            for transaction in (True, False):
                with pytest.raises(SandboxUnsupportedError, match="FLUSHDB empties"):
                    await cache.pipeline(transaction=transaction).set("b", "1").flushall().execute()
            assert await cache.dbsize() == 0
        await cache.execute_command("SCRIPT", "FLUSH")


class NewerConnection(Connection):
    """As a newer release of redis-py might send: not by what lifekit knows."""

    how = "pack_command"

    async def send_command(self, *args: Any, **options: Any) -> None:
        """Send a command in one of several ways."""
        kind: Any = Connection
        packed: Any = b"".join(kind.pack_command(self, *args))
        connection: Any = self
        await connection.connect()
        writer = connection._writer
        if args[0] not in {"SET", "FLUSHALL"}:
            await super().send_command(*args, **options)
        elif self.how == "write":
            writer.write(packed)
        elif self.how == "writelines":
            writer.writelines([packed])
        else:
            await self.send_packed_command(packed)


@pytest.mark.parametrize("how", ["write", "writelines", "send_packed_command"])
async def test_what_is_sent_in_another_way_is_refused(how: str, admin: Admin) -> None:
    """Whatever a newer release does, nothing reaches the socket that passed no filter."""
    kind = type("Newer", (NewerConnection,), {"how": how})
    pool = pool_of(admin.url, connection_class=kind, retry=Retry(NoBackoff(), 0))
    async with opened(lambda: Redis(connection_pool=pool)) as (block, cache), block():
        for command in (["SET", "a", "1"], ["FLUSHALL"]):
            with pytest.raises(SandboxUnsupportedError, match="in a way that lifekit does not know"):
                await cache.execute_command(*command)
        assert await cache.dbsize() == 0


async def test_a_connection_that_lacks_what_lifekit_knows_is_refused(admin: Admin) -> None:
    """And one whose `redis_connect_func` does not select the database."""

    async def greets(connection: Any) -> None:
        connection._parser.on_connect(connection)
        args = ("HELLO", 3, "AUTH", "default", urlsplit(admin.url).password)
        await connection.send_command(*args, check_health=False)
        await connection.read_response()

    client = connect(admin.url, redis_connect_func=greets, retry=Retry(NoBackoff(), 0))
    held: Any = sandbox(client, "redis client", client)
    await held.open()
    with pytest.raises(SandboxUnsupportedError, match="in a way that lifekit does not know"):
        await client.set("a", "1")
    await held.closed()
    pool = pool_of(admin.url, connection_class=type("Other", (), {}))
    other: Any = sandbox(pool, "redis client", pool)
    await other.open()
    with pytest.raises(SandboxUnsupportedError, match="a Other of redis-py works in a way"):
        await other.begin()


SCRIPTS = [
    "redis.call('SELECT', 0) redis.call('SET', 'leak', 1)",
    "local name = 'sel' .. 'ect' return redis.pcall(name, 0)",
    "#!lua flags=no-writes\nreturn server.call('flushall')",
    "return redis.call('COPY', KEYS[1], 'b', 'DB', 0)",
    "local call = redis.call return call('move', KEYS[1], 0)",
]


@pytest.mark.parametrize("text", SCRIPTS)
async def test_what_scripts_call_is_refused_too(text: str, admin: Admin) -> None:
    """By the server, for only it knows what a script calls; by EVALSHA as well."""
    async with opened(lambda: connect(admin.url)) as (block, cache):
        digest = await cache.script_load(text)
        async with block():
            await cache.set("a", "1")
            with pytest.raises(SandboxUnsupportedError, match="is refused in the sandbox"):
                await cache.eval(text, 1, "a")
            with pytest.raises(SandboxUnsupportedError, match="is refused in the sandbox"):
                await cache.evalsha(digest, 1, "a")
            assert await cache.get("a") == "1"


NEEDS_NO_GUARD = {
    "return redis.call('SET', KEYS[1], ARGV[1])": True,
    "#!lua\nlocal x = server.pcall( \"get\" , 'a') return cjson.encode(redis.sha1hex('SELECT'))": True,
    "return redis.call('SELECT', 0)": False,
    "return redis.call('select', 0)": False,
    "return redis.call('SEL' .. 'ECT', 0)": False,
    "return redis.call('COPY', 'a', 'b', 'DB', 0)": False,
    "return redis.call('PUBLISH', 'a', 'b')": False,
    "return redis.call(KEYS[1])": False,
    "return redis.call('\\83ELECT', 0)": False,
    "local r = redis return r.call('SELECT', 0)": False,
    "local f = redis.call return f('SELECT', 0)": False,
    "return redis['call']('SELECT', 0)": False,
    "return redis['c' .. 'all']('SELECT', 0)": False,
    "return redis.call 'FLUSHALL'": False,
    "return redis . call('FLUSHALL')": False,
    "return _G['re' .. 'dis']['c' .. 'all']('SELECT', 0)": False,
}


@pytest.mark.parametrize("text", NEEDS_NO_GUARD)
def test_scripts_that_name_harmless_commands_are_run_as_they_are(text: str) -> None:
    """So that errors, digests and the server's cache are those of production; others are guarded."""
    assert is_plain(text.encode()) is NEEDS_NO_GUARD[text]


async def test_scripts_work_as_they_do_outside(admin: Admin) -> None:
    """Replies, digests, errors with their lines, what a script publishes; unknown ones are unknown."""
    async with opened(lambda: connect(admin.url)) as (block, cache):
        broken, twice = (
            "local a = 1\nlocal b = nil + a",
            "return {KEYS[1], redis.sha1hex(''), ARGV[1] * 2}",
        )
        with pytest.raises(exceptions.ResponseError, match="user_script:2:"):
            await cache.eval(broken, 0)
        unseen = admin.script_load("return 'never seen by the client'")
        plain = await cache.eval(twice, 1, "k", 21)
        async with block():
            with pytest.raises(exceptions.ResponseError, match="user_script:2:"):
                await cache.eval(broken, 0)
            with pytest.raises(exceptions.ResponseError, match=r"on @user_script:3\."):
                await cache.eval("local a = 1\n\nreturn redis.call('LPUSH', 'a')", 0)
            with pytest.raises(exceptions.ResponseError, match="specify at least one argument"):
                await cache.eval("return redis.call()", 0)
            assert await cache.eval(twice, 1, "k", 21) == plain
            digest = await cache.script_load("return redis.call('GET', KEYS[1])")
            assert await cache.script_exists(digest) == [True]
            await cache.set("a", "1")
            assert await cache.evalsha(digest, 1, "a") == "1"
            assert await cache.evalsha_ro(digest, 1, "a") == "1"
            with pytest.raises(exceptions.NoScriptError):
                await cache.evalsha(unseen, 0)
            async with cache.pubsub(ignore_subscribe_messages=True) as pubsub:
                await pubsub.subscribe("news")
                await heard(cache, "news")
                assert await cache.eval("return redis.call('PUBLISH', 'news', 'x')", 0) == 1
                assert (await next_message(pubsub))["channel"] == "news"


# -- pub/sub ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"protocol": 2}, {"decode_responses": False}])
async def test_channels_are_apart_and_have_their_own_names(options: Any, admin: Admin) -> None:
    """Messages, confirmations, patterns, sharded channels, handlers and PUBSUB."""
    outside = admin.pubsub()
    outside.psubscribe("*")
    outside.get_message(timeout=60)
    async with opened(lambda: connect(admin.url, **options)) as (block, cache):
        encode = str if options.get("decode_responses", True) else str.encode
        async with block():
            handled: list[Any] = []
            async with cache.pubsub() as pubsub:
                await pubsub.subscribe("news")
                await pubsub.psubscribe(**{"n?ws": handled.append})
                await pubsub.ssubscribe("shard")
                confirmed = [await next_message(pubsub) for _ in range(3)]
                assert [m["type"] for m in confirmed] == ["subscribe", "psubscribe", "ssubscribe"]
                assert [m["channel"] for m in confirmed] == [
                    encode(n) for n in ("news", "n?ws", "shard")
                ]
                assert await cache.pubsub_channels() == [encode("news")]
                assert await cache.pubsub_channels("x*") == []
                assert await cache.pubsub_numsub("news") == [(encode("news"), 1)]
                assert admin.publish("news", "outside") == 1
                assert await cache.publish("news", "inside") == 3  # one is outside, and hears all
                assert await cache.spublish("shard", "s") == 1
                messages = {
                    (m["channel"], m["data"]) for m in [await next_message(pubsub) for _ in "12"]
                }
                assert messages == {(encode("news"), encode("inside")), (encode("shard"), encode("s"))}
                assert [(m["pattern"], m["channel"]) for m in handled] == [
                    (encode("n?ws"), encode("news"))
                ]
                await pubsub.unsubscribe("news")
                assert (await next_message(pubsub))["channel"] == encode("news")
    assert outside.get_message(timeout=60)["data"] == "outside"
    seen = outside.get_message(timeout=0.01)
    assert seen is None or seen["channel"].startswith("lifekit-")
    outside.close()


@pytest.mark.parametrize(("encoding", "name"), [("latin-1", "nüws"), ("shift_jis", "nソws")])
async def test_channels_in_other_encodings(encoding: str, name: str, admin: Admin) -> None:
    """Names and messages are what the application's own encoding makes of them."""
    async with (
        opened(lambda: connect(admin.url, encoding=encoding)) as (block, cache),
        block(),
        cache.pubsub(ignore_subscribe_messages=True) as pubsub,
    ):
        await pubsub.subscribe(name)
        await heard(cache, name)
        await cache.publish(name, name)
        message = await next_message(pubsub)
        assert (message["channel"], message["data"]) == (name, name)
        assert await cache.pubsub_channels() == [name]


async def test_push_handlers_hear_what_the_application_shall(admin: Admin) -> None:
    """Of RESP3: with the application's own names, and nothing of a block that has ended."""
    pushed: list[Any] = []

    async def handler(message: Any) -> None:
        pushed.append(message)

    async with (
        opened(lambda: connect(admin.url)) as (block, cache),
        cache.pubsub(push_handler_func=handler) as pubsub,
    ):
        await pubsub.subscribe("news")
        while not pushed:
            await pubsub.get_message(timeout=1)
        async with block():
            await cache.publish("news", "unread")
        async with block():
            await cache.publish("news", "mine")
            while len(pushed) < 2:
                await pubsub.get_message(timeout=1)
    assert pushed == [["subscribe", "news", 1], ["message", "news", "mine"]]


async def test_clients_of_several_databases_have_the_same_channels(admin: Admin) -> None:
    """Channels are a server's; keyspace notifications tell the number of each client's own database."""
    admin.config_set("notify-keyspace-events", "KEA")
    other = admin.url[:-1] + "1"
    async with opened(lambda: connect(admin.url), lambda: connect(other)) as (block, first, second):
        listener = first.pubsub(ignore_subscribe_messages=True)
        async with listener:
            await listener.subscribe("news")
            await heard(first, "news")
            for _ in "12":
                async with block(), second.pubsub() as pubsub:
                    assert await second.pubsub_channels() == ["news"]
                    assert await second.execute_command("publish news", "x") == 1
                    assert (await next_message(listener))["data"] == "x"
                    await pubsub.psubscribe("__keyevent@0__:*", "__keyspace@*__:*")
                    confirmed = [(await next_message(pubsub))["channel"] for _ in "12"]
                    assert confirmed == ["__keyevent@0__:*", "__keyspace@*__:*"]
                    admin.set("kept", "1")
                    await first.set("a", "1")
                    await second.set("b", "1")
                    seen = {(await next_message(pubsub))["channel"] for _ in "123"}
                    assert seen == {"__keyevent@0__:set", "__keyspace@0__:a", "__keyspace@1__:b"}
    admin.config_set("notify-keyspace-events", "")


async def test_keyspace_notifications_speak_of_the_applications_own_number(admin: Admin) -> None:
    """They are delivered as they would be outside, where the server sends them."""
    admin.config_set("notify-keyspace-events", "KEA")
    async with opened(lambda: connect(admin.url)) as (block, cache), block():
        for pattern in ("__keyspace@0__:*", "__keyspace@*__:*", "__key*__:*"):
            async with cache.pubsub() as pubsub:
                await pubsub.psubscribe(pattern)
                assert (await next_message(pubsub))["channel"] == pattern
                await cache.set("a", "1")
                message = await next_message(pubsub)
                assert (message["pattern"], message["channel"]) == (pattern, "__keyspace@0__:a")
    admin.config_set("notify-keyspace-events", "")


@pytest.mark.parametrize("options", [{}, {"protocol": 2}])
async def test_a_listener_of_the_lifespan_hears_the_test_and_nothing_else(
    options: Any, admin: Admin
) -> None:
    """A worker subscribes at startup; in a block it handles the block's messages, in the sandbox."""
    async with opened(lambda: connect(admin.url, **options)) as (block, cache):
        done: asyncio.Queue[str] = asyncio.Queue()

        async def work(pubsub: Any) -> None:
            async for message in pubsub.listen():
                await cache.incr("handled")
                done.put_nowait(f"{message['channel']} {message['data']}")

        async with cache.pubsub(ignore_subscribe_messages=True) as pubsub:
            await pubsub.subscribe("jobs")
            await pubsub.psubscribe("late*")
            await heard(cache, "jobs")
            worker = asyncio.create_task(work(pubsub))
            await cache.publish("jobs", "0")
            assert await done.get() == "jobs 0"
            await cache.delete("handled")
            for number in "123":
                async with block():
                    admin.publish("jobs", "from outside")
                    await cache.publish("jobs", number)
                    assert await done.get() == f"jobs {number}"
                    await cache.publish("later", number)
                    assert await done.get() == f"later {number}"
                    assert await cache.get("handled") == "2"
                assert done.empty()
            worker.cancel()


async def test_messages_that_nobody_read_in_their_block_are_dropped(admin: Admin) -> None:
    """A worker that was slow does not handle one test's message in the next."""
    async with opened(lambda: connect(admin.url)) as (block, cache), cache.pubsub() as pubsub:
        await pubsub.subscribe("jobs")
        assert (await next_message(pubsub))["type"] == "subscribe"
        async with block():
            await cache.publish("jobs", "unread")
        async with block():
            await pubsub.subscribe("more")
            assert (await next_message(pubsub))["channel"] == "more"
            await cache.publish("more", "mine")
            assert (await next_message(pubsub))["data"] == "mine"
            await pubsub.unsubscribe("jobs")
            assert (await next_message(pubsub))["type"] == "unsubscribe"
        await cache.publish("more", "outside")
        assert (await next_message(pubsub))["data"] == "outside"


@pytest.mark.parametrize("wait", ["blpop", "xread"])
async def test_a_worker_of_the_lifespan_takes_the_tests_jobs(wait: str, admin: Admin) -> None:
    """It waits for a job as a block begins, and as it ends: both look to it like time that is up."""
    async with opened(lambda: connect(admin.url)) as (block, cache):
        done: asyncio.Queue[str] = asyncio.Queue()

        async def job() -> Any:
            if wait == "blpop":
                found = await cache.blpop(["queue"], timeout=60)
                return found and found[1]
            found = await cache.xread({"queue": "0"}, block=60_000, count=1)
            return found and found[0][1][0][1]["job"] if found else None

        async def work() -> None:
            while True:
                if (found := await job()) is not None:
                    await cache.delete("queue")
                    await cache.incr("done")
                    done.put_nowait(found)

        async def push(name: str) -> None:
            await (
                cache.rpush("queue", name) if wait == "blpop" else cache.xadd("queue", {"job": name})
            )

        worker = asyncio.create_task(work())
        await until(lambda: admin.runs(wait))
        for number in "123":
            async with block():
                await push(number)
                assert await done.get() == number
                assert await cache.get("done") == "1"
            assert admin.full() == {"db0"}
            assert done.empty()
        await push("real")
        assert await done.get() == "real"
        assert await cache.getdel("done") == "1"
        worker.cancel()


# -- what escapes -----------------------------------------------------------------------------------


async def test_connections_not_given_back_are_named_and_cut(admin: Admin) -> None:
    """With the line and the task that acquired each; the next block works."""
    async with opened(lambda: connect(admin.url)) as (block, cache):
        pipeline, pubsub = cache.pipeline(), cache.pubsub()
        lines: list[str] = []
        tasks: list[Any] = []
        with pytest.raises(SandboxEscapedError, match="had not been given back") as caught:
            async with block():
                lines.append(below())
                await pipeline.watch("a")
                lines.append(below())
                await pubsub.subscribe("news")
                tasks.append(asyncio.create_task(cache.blpop(["queue"]), name="popping"))
                await until(lambda: admin.runs("blpop"))
        for line in lines:
            assert f"acquired at {line}\n" in str(caught.value)
        assert "(task 'popping')" in str(caught.value)
        with pytest.raises((SandboxEscapedError, exceptions.ConnectionError)):
            await tasks[0]
        with pytest.raises(SandboxEscapedError, match="inside a sandbox that has ended"):
            await pubsub.subscribe("more")
        async with block():
            await cache.set("a", "1")
            await pubsub.aclose()
            await pipeline.aclose()
        assert admin.full() == {"db0"}


async def test_code_that_outlives_its_block_is_refused(admin: Admin) -> None:
    """Outside of a block, and in the next one."""
    async with opened(lambda: connect(admin.url)) as (block, cache):
        resume = asyncio.Event()

        async def late() -> None:
            await resume.wait()
            await cache.set("late", "1")

        async with block():
            tasks = [asyncio.create_task(late()) for _ in "12"]
        resume.set()
        async with block():
            for task in tasks:
                with pytest.raises(
                    SandboxEscapedError, match="a redis client is used by code that was"
                ):
                    await task
        assert await cache.exists("late") == 0


async def test_a_connection_from_before_the_block_is_inside(admin: Admin) -> None:
    """It is on the leased database, and goes on afterwards."""
    async with opened(lambda: connect(admin.url)) as (block, cache), cache.pipeline() as pipeline:
        await pipeline.watch("a")
        async with block():
            assert await pipeline.set("a", "1")
            assert await cache.get("a") == "1"
        assert await pipeline.get("a") is None


async def test_a_connection_that_the_factory_acquired_is_refused(admin: Admin) -> None:
    """What it does is done in the database of the settings."""

    async def cache() -> AsyncGenerator[Any]:
        async with connect(admin.url) as client, client.pipeline() as pipeline:
            await pipeline.watch("a")
            yield client

    async with opened(cache) as (block, _):
        with pytest.raises(SandboxEscapedError, match="was acquired before lifekit had the client"):
            await block().__aenter__()


async def test_a_cancelled_command_leaves_nothing(admin: Admin) -> None:
    """Its bytes may reach the server after the flush, so that what is left of it is killed first."""
    async with opened(lambda: connect(admin.url)) as (block, cache):
        for _ in range(20):
            async with block():
                await cache.get("a")
                with anyio.move_on_after(0):
                    await cache.set("a", "1" * 100_000)
                task = asyncio.create_task(cache.set("b", "1"))
                await until(lambda task=task: cache.connection_pool._in_use_connections or task.done())  # type: ignore[misc]
                task.cancel()
            assert admin.full() == {"db0"}


async def test_who_waits_for_a_connection_over_the_end_gets_none(admin: Admin) -> None:
    """It would be one of outside."""

    def small() -> Any:
        pool = pool_of(admin.url, BlockingConnectionPool, max_connections=1)
        return Redis(connection_pool=pool)

    async with opened(small) as (block, cache):
        tasks: list[Any] = []
        with pytest.raises(SandboxEscapedError, match="had not been given back"):
            async with block():
                tasks.append(asyncio.create_task(cache.blpop(["queue"])))
                await until(lambda: admin.runs("blpop"))
                tasks.append(asyncio.create_task(cache.set("late", "1")))
                await until(lambda: cache.connection_pool._condition._waiters)
        with pytest.raises((SandboxEscapedError, exceptions.ConnectionError)):
            await tasks[0]
        with anyio.fail_after(60), pytest.raises(SandboxEscapedError, match="by code that was started"):
            await tasks[1]
        await cache.ping()


# -- leases -----------------------------------------------------------------------------------------

PROGRAM = """
import asyncio, sys
from lifekit._sandbox.redis.client import sandbox
from redis.asyncio import Redis

async def main():
    client = Redis.from_url(sys.argv[1])
    held = sandbox(client, "redis client", client)
    await held.open()
    await held.begin()
    await client.set("mine", 1)
    print(held.lease.number, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(await client.dbsize(), flush=True)
    await held.end()
    await client.aclose()
    await held.closed()

asyncio.run(main())
"""


def program(url: str) -> subprocess.Popen[str]:
    """Another process with a lease, which ends when its input does."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", PROGRAM, url], stdin=pipe, stdout=pipe, text=True)


def test_processes_lease_different_numbers_and_a_killed_one_gives_its_own_back(admin: Admin) -> None:
    """Three start at once; the number of the one that was killed is leased and flushed again."""
    started = [program(admin.url) for _ in "123"]
    try:
        numbers = [int(process.stdout.readline()) for process in started]  # type: ignore[union-attr]
        assert sorted(numbers) == admin.leases()
        assert len(set(numbers)) == 3
        started[0].send_signal(signal.SIGKILL)
        assert started[0].wait(60) == -signal.SIGKILL
        for process in started[1:]:
            assert process.communicate(timeout=60)[0] == "1\n"
            assert process.returncode == 0
        assert f"db{numbers[0]}" in admin.full()
    finally:
        for process in started:
            process.kill()
            process.communicate()

    async def take_all() -> None:
        held: list[Any] = []
        for _ in range(15):
            client = connect(admin.url)
            held.append(sandbox(client, "redis client", client))
        await asyncio.gather(*(each.open() for each in held))
        assert admin.leases() == list(range(1, 16))
        assert admin.full() == {"db0"}
        more: Any = sandbox(client := connect(admin.url), "redis client", client)
        with pytest.raises(SandboxBusyError, match=rf"(?s)  1:{os.getpid()}@.* from 127.*databases 64"):
            await more.open()
        for each in held:
            await each.closed()

    asyncio.run(take_all())


@pytest.mark.parametrize("more", [True, False])
async def test_a_lost_lease_is_told_and_taken_anew(more: bool, admin: Admin) -> None:
    """What the block did may be seen by who leases the number next, so that the test fails."""
    async with opened(lambda: connect(admin.url)) as (block, cache):
        await cache.set("start", "1")
        with pytest.raises(SandboxEscapedError, match=r"lost its lease on database \d+ before"):
            async with block():
                await cache.set("a", "1")
                admin.kill(name=LEASE)
        if more:
            async with block():
                assert await cache.keys() == ["start"]
                await cache.set("a", "1")


async def test_a_server_that_dies_in_a_block_is_one_clear_error() -> None:
    """Nothing hangs, not even the closing."""
    async with embedded.valkey() as server:
        assert server.pid is not None
        with anyio.fail_after(60):
            async with opened(lambda: connect(server.url, retry_on_timeout=False)) as (block, cache):
                with pytest.raises(SandboxEscapedError, match=r"lost its lease on database \d+"):
                    async with block():
                        await cache.set("a", "1")
                        os.kill(server.pid, signal.SIGKILL)
                        with pytest.raises(exceptions.ConnectionError):
                            await cache.get("a")


async def test_a_server_that_hangs_in_a_block_is_told_within_seconds(monkeypatch: Any) -> None:
    """The sandbox's own connection has a time limit, whatever the application's are."""
    async with embedded.valkey() as server:
        assert server.pid is not None
        async with opened(lambda: connect(server.url, socket_timeout=None)) as (block, cache):
            with anyio.fail_after(60), pytest.raises(SandboxEscapedError, match="TimeoutError"):
                async with block():
                    await cache.set("a", "1")
                    monkeypatch.setattr("lifekit._sandbox.redis.lease._SECONDS", 0.1)
                    os.kill(server.pid, signal.SIGSTOP)
            monkeypatch.undo()
            os.kill(server.pid, signal.SIGCONT)


async def test_a_server_that_nobody_marked_is_not_flushed() -> None:
    """It says how to mark one; a key in its database 0 does."""
    async with embedded.valkey(args=["--dir", "/"]) as server:
        admin = Admin(server.url)
        async with opened(lambda: connect(server.url)) as (block, cache):
            with pytest.raises(
                SandboxUnsupportedError,
                match=rf"127\.0\.0\.1:{urlsplit(server.url).port}/0 is not marked .*"
                "redis-cli -n 0 SET lifekit:test-server yes",
            ):
                async with block():
                    raise AssertionError("it began")
            assert admin.info("commandstats").keys().isdisjoint({"cmdstat_flushdb", "cmdstat_flushall"})
            await cache.set("a", "1")
        assert admin.getdel("a") == "1"
        admin.set("lifekit:test-server", "yes")
        async with opened(lambda: connect(server.url)) as (block, cache), block():
            await cache.set("a", "1")
        assert admin.full() == {"db0"}
        admin.close()


async def test_numbers_in_use_are_left_alone(admin: Admin) -> None:
    """Those that an open client is set to, and, while there are others, those that hold data."""
    first, second = (admin.url[:-1] + number for number in "12")
    beside = Admin(first)
    beside.set("theirs", "1")
    async with opened(lambda: connect(admin.url), lambda: connect(second)) as (block, cache, _):
        async with block():
            await cache.set("a", "1")
            assert admin.leases() == [14, 15]
        assert beside.get("theirs") == "1"
    beside.flushdb()
    beside.close()


async def test_a_cluster_is_refused_with_the_way_out() -> None:
    """By its client, and by a client of one server that turns out to be part of one."""
    told = "a cluster has one database.*Override the resource"
    client = RedisCluster(host="127.0.0.1", port=1)
    held = sandbox(client, "redis cluster client", client)
    assert held is not None
    with pytest.raises(SandboxUnsupportedError, match=told):
        await held.begin()
    async with (
        embedded.valkey(args=["--cluster-enabled", "yes"]) as server,
        opened(lambda: connect(server.url)) as (block, _),
    ):
        with pytest.raises(SandboxUnsupportedError, match=told):
            await block().__aenter__()


async def test_the_client_is_as_it_was_once_its_lifespan_is_closed(admin: Admin) -> None:
    """One made at import serves lifespan after lifespan, sandboxed or not."""
    pool = pool_of(admin.url)
    client: Any = Redis(connection_pool=pool)
    for _ in range(2):
        async with opened(lambda: client) as (block, cache):
            async with block():
                await cache.set("a", "1")
            assert await cache.exists("a") == 0
        assert type(pool) is ConnectionPool
    await client.ping()
    await client.aclose(close_connection_pool=True)


async def test_an_opening_that_is_cancelled_leaves_no_lease(admin: Admin) -> None:
    """However far it got."""
    for rounds in range(40):
        client = connect(admin.url)
        held: Any = sandbox(client, "redis client", client)
        task = asyncio.create_task(held.open())
        for _ in range(rounds):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await client.aclose()
        await held.closed()
    await until(lambda: admin.leases() == [])


# -- fakeredis --------------------------------------------------------------------------------------


async def test_a_fake_is_undone_as_well() -> None:
    """Each has a server of its own."""
    made = partial(fake_redis, decode_responses=True)
    async with opened(made, made) as (block, cache, other):
        await cache.set("outside", "1")
        assert await other.keys() == []
        await cache.hset("hash", "a", "1")
        for _ in range(2):
            async with block():
                assert sorted(await cache.keys()) == ["hash", "outside"]
                await cache.hset("hash", "b", "2")
                await cache.delete("outside")
                async with cache.pipeline() as pipeline:
                    assert await pipeline.incr("inside").execute() == [1]
        assert await cache.hgetall("hash") == {"a": "1"}
        assert await cache.get("outside") == "1"


async def test_a_fake_takes_the_place_of_a_client_by_an_override() -> None:
    """As a factory, so that each lifespan gets its own; and it is a client for `isinstance`."""
    registry = Registry()

    @registry.resource
    def cache() -> Redis:
        return Redis(port=1)

    for _ in range(2):
        with registry.override(cache, factory=fake_redis):
            async with registry.lifespan() as lifespan:
                assert isinstance(lifespan[cache], Redis)
                assert await lifespan[cache].incr("a") == 1


async def test_a_fake_connection_that_is_not_given_back_is_told() -> None:
    """As of a real one."""
    async with opened(fake_redis) as (block, cache):
        pubsub = cache.pubsub()
        with pytest.raises(SandboxEscapedError, match="1 connections of a fake redis client"):
            async with block():
                await pubsub.subscribe("news")


def test_without_fakeredis_the_error_says_what_to_install(monkeypatch: Any) -> None:
    """It is no dependency of lifekit's."""
    monkeypatch.setitem(sys.modules, "fakeredis", None)
    with pytest.raises(RuntimeError, match="pip install fakeredis"):
        fake_redis()
