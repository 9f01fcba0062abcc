"""An application sees the same in the sandbox of redis.asyncio as in production; and nothing lasts."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import BlockingConnectionPool, Redis

from lifekit import Registry, embedded
from lifekit.testing import sandboxing

from ..depth import TIMES
from .differential import POOL, Limit, Op, Seen, assert_same, calm, sequences_of

OTHER = POOL
"""Who has a database of its own; the others share one."""

LIBRARY = """#!lua name=shop
server.register_function('total', function(keys, args)
    return server.call('INCRBY', keys[1], args[1]) end)
server.register_function{
    function_name='peek', callback=function(keys) return server.call('TYPE', keys[1]) end,
    flags={'no-writes'}}
"""


def connected(url: str) -> list[Any]:
    """Clients of each kind that applications make, by who acts with them."""
    kind: Any = Redis
    pools: Any = BlockingConnectionPool
    return [
        kind.from_url(url, decode_responses=True),
        kind(connection_pool=pools.from_url(url, protocol=2, max_connections=20, timeout=60)),
        kind.from_url(url, single_connection_client=True, decode_responses=True, protocol=2),
        kind.from_url(url[:-1] + "1"),
    ]


COMMANDS = {
    "strings": """
        SET s one|SET s two XX|SET s three NX|SET s 4 GET|SET s one EX 100|GET s|GETSET s 5|APPEND s x
        STRLEN s|SETRANGE s 3 yy|GETRANGE s 0 2|MSET s 1 s2 2|MSETNX s2 1 s3 2|MGET s s2 none|INCR n
        INCRBY n 5|DECR n|INCRBYFLOAT n 1.5|INCR s|GETDEL s|GETEX s EX 50|GETEX s PERSIST
        SETEX s2 100 v|SETBIT bits 7 1|BITCOUNT bits|BITOP NOT bits2 bits|PFADD hll a b|PFCOUNT hll
        LCS s s2|SET s|GET|SET s v EX nonsense|SET s v EX 0|PSETEX s2 100000 v|SUBSTR s 0 1|DIGEST s
    """,
    "hashes": """
        HSET h a 1 b 2|HSET h a|HGET h a|HGETALL h|HINCRBY h a 2|HINCRBY h b x|HDEL h a|HKEYS h
        HVALS h|HMGET h a b c|HLEN h|HEXISTS h a|HSETNX h c 3|HSCAN h 0|HRANDFIELD h2|HSTRLEN h b
        HSET s a 1|HINCRBYFLOAT h a 0.5
    """,
    "lists": """
        LPUSH l a b c|RPUSH l d|RPUSH l2 e|LPOP l|RPOP l 2|LRANGE l 0 -1|LLEN l|LINDEX l 0|LSET l 0 z
        LSET l 9 z|LINSERT l BEFORE a y|LREM l 0 a|LTRIM l 0 1|LMOVE l l2 LEFT RIGHT|RPOPLPUSH l l2
        LPOS l b|LPUSHX none a|LMPOP 2 l l2 LEFT|LPUSH s a|BLPOP l 0.01|BRPOP l l2 0.01|LPOP l2
        BLMOVE l l2 LEFT RIGHT 0.01|BLMPOP 0.01 2 l l2 LEFT|BRPOPLPUSH l l2 0.01|BLPOP none -1
        BLPOP s 0.01|BLPOP l nonsense
    """,
    "sets": """
        SADD t a b|SADD t c|SREM t a|SMEMBERS t|SISMEMBER t a|SMISMEMBER t a z|SCARD t|SADD t2 b d
        SINTER t t2|SUNION t t2|SDIFF t t2|SINTERSTORE t3 t t2|SINTERCARD 2 t t2|SMOVE t t2 a
        SSCAN t 0|SPOP t3|SRANDMEMBER t4|SADD s a
    """,
    "sorted sets": """
        ZADD z 1 a 2 b|ZADD z NX 3 c|ZADD z GT CH 5 a|ZADD z INCR 1 a|ZADD z x a|ZSCORE z a|ZRANK z b
        ZRANGE z 0 -1 WITHSCORES|ZRANGE z 1 3 BYSCORE|ZREVRANGE z 0 -1|ZRANGEBYSCORE z -inf +inf
        ZINCRBY z 2 b|ZREM z a|ZCARD z|ZCOUNT z 1 3|ZPOPMIN z|ZPOPMAX z 2|ZUNIONSTORE z2 1 z
        ZMSCORE z a q|ZSCAN z 0|BZPOPMIN z 0.01|BZPOPMAX z z2 0.01|BZMPOP 0.01 1 z MIN|ZRANDMEMBER z9
        ZLEXCOUNT z - +|ZRANGESTORE z3 z 0 0|GEOADD g 13.361389 38.115556 palermo|GEOPOS g palermo
        GEODIST g a b|GEOSEARCH g FROMLONLAT 15 37 BYRADIUS 500 km
    """,
    "streams": """
        XADD x 1-1 f v|XADD x 2-1 f w|XADD x * f now|XADD x 1-1 f again|XADD x MAXLEN 2 3-* f v|XLEN x
        XRANGE x - +|XREVRANGE x + - COUNT 1|XDEL x 1-1|XTRIM x MAXLEN 1|XREAD COUNT 2 STREAMS x 0
        XREAD BLOCK 10 STREAMS x $|XGROUP CREATE x g 0 MKSTREAM|XGROUP CREATE x g 0|XGROUP DESTROY x g
        XGROUP CREATECONSUMER x g c1|XGROUP DELCONSUMER x g c1|XGROUP SETID x g $
        XREADGROUP GROUP g c1 COUNT 1 STREAMS x >|XREADGROUP GROUP g c1 STREAMS x 0|XACK x g 1-1 2-1
        XREADGROUP GROUP g c2 BLOCK 10 STREAMS x >|XPENDING x g|XPENDING x g - + 5|XCLAIM x g c2 0 1-1
        XAUTOCLAIM x g c2 0 0|XINFO STREAM x|XINFO GROUPS x|XINFO CONSUMERS x g|XSETID x 9-9
        XREADGROUP GROUP none c STREAMS x >|XADD s * a b
    """,
    "keys": """
        DEL s l|UNLINK h t|EXISTS s l h|TYPE l|TYPE none|RENAME s s2|RENAME none s|RENAMENX s s2
        KEYS *|KEYS [hl]*|SCAN 0 COUNT 1000|SCAN 0 COUNT 1000 TYPE list|SCAN 0 MATCH s* COUNT 1000
        RANDOMKEY|DBSIZE|FLUSHDB|TOUCH s l|COPY s s2|COPY s s2 REPLACE|EXPIRE s 100|EXPIRE s 100 GT
        PEXPIRE l 90000|TTL s|PTTL l|PTTL none|EXPIREAT s 33177117420|EXPIRETIME s|PEXPIRETIME s
        PERSIST s|PEXPIRE h -1|OBJECT ENCODING s|OBJECT ENCODING l|OBJECT REFCOUNT l|OBJECT IDLETIME s
        OBJECT FREQ s|DUMP s|SORT l ALPHA|SORT l BY nosort GET #|SORT_RO t ALPHA|SORT l ALPHA STORE l3
        MEMORY USAGE s|RESTORE r 0 nonsense|DEL n|DEL x|FLUSHDB ASYNC
    """,
    "connection": """
        PING|PING hello|ECHO x|CLIENT SETNAME mine|CLIENT GETNAME|CLIENT ID
        CLIENT SETINFO lib-name app|CLIENT NO-EVICT on|CLIENT NO-TOUCH on|CLIENT TRACKINGINFO
        CLIENT GETREDIR|CLIENT UNBLOCK 99999|CLIENT INFO|CLIENT LIST|CLIENT CACHING YES|AUTH nonsense
        ACL WHOAMI|ACL CAT nonsense|READONLY|READWRITE|ASKING|QUIT|LOLWUT VERSION 1
        CLIENT TRACKING off
    """,
    "server": """
        CONFIG GET maxmemory|CONFIG GET databases|TIME|COMMAND COUNT|INFO keyspace|INFO server
        WAIT 0 1|ROLE|LASTSAVE|SLOWLOG LEN|LATENCY LATEST|MODULE LIST|COMMAND INFO get
        COMMAND GETKEYS GET a|FUNCTION LIST|FUNCTION STATS|SCRIPT EXISTS none|NONSENSE a b|COPY s db
        MEMORY DOCTOR|OBJECT HELP|CLUSTER INFO|PUBSUB CHANNELS|PUBSUB CHANNELS n*
        PUBSUB NUMSUB news none|PUBSUB NUMPAT|PUBSUB SHARDCHANNELS|PUBSUB SHARDNUMSUB shard
        PUBSUB NUMSUB|PUBSUB NONSENSE|PUBSUB
    """,
    "refused": """
        CONFIG SET maxmemory 0|CONFIG RESETSTAT|FUNCTION LOAD nonsense|CLIENT REPLY ON
        CLIENT KILL ID 99999|CLIENT NONSENSE|CLIENT PAUSE 0|DEBUG SLEEP 0|FUNCTION FLUSH|SCRIPT FLUSH
        SELECT 0|SELECT 1|MOVE s 1|SWAPDB 0 1|COPY s s2 DB 1|FLUSHALL
    """,
    "publish": """
        PUBLISH news hi|PUBLISH none hi|PUBLISH news|SPUBLISH shard hi|PUBLISH nest x|PUBLISH news two
    """,
    "calls": """
        FCALL total 1 n 3|FCALL total 1 s 3|FCALL_RO peek 1 s|FCALL_RO total 1 n 1|FCALL none 0|FCALL
    """,
}
PER_KIND = {
    kind: [each.strip() for each in re.split(r"[|\n]", text) if each.strip()]
    for kind, text in COMMANDS.items()
}
ORDINARY = [each for kind in list(PER_KIND)[:7] for each in PER_KIND[kind]]

SCRIPTS: list[str] = [
    "return redis.call('SET', KEYS[1], ARGV[1])",
    "return redis.call('GET', KEYS[1])",
    "local made = {}\nfor i = 1, 3 do\n  made[i] = redis.call('INCRBY', 'n', i)\nend\nreturn made",
    "local a = 1\nreturn redis.call('LPUSH', KEYS[1])",
    "local push = 'LPUSH'\nreturn redis.call(push, KEYS[1])",
    "local a = 1\n\nreturn redis.call('HGET', KEYS[1], 'a') .. nil",
    "return redis.pcall('LPUSH', KEYS[1], 'x')",
    "return redis.pcall('NONSENSE')",
    "return redis.call('NONSENSE', 1)",
    "return redis.call()",
    "return redis.call({}, 1)",
    "return redis.call('set', 'f', 1.5)",
    "error('boom')",
    "error({err = 'MINE own error'})",
    "return redis.error_reply('OWN it failed')",
    "return redis.status_reply('GOOD')",
    "return {1, 'two', 3.7, false, true, {4, nil, 5}}",
    "return redis.sha1hex(ARGV[1])",
    "return cjson.encode({KEYS[1], tonumber(ARGV[1])})",
    "redis.call('SET', KEYS[1], ARGV[1])\nlocal x = nil\nreturn x + 1",
    "undefined = 1",
    "return undefined",
    "this is no script",
    "return redis.call('PUBLISH', 'news', ARGV[1])",
    "return redis.call('publish', 7, 'seven')",
    "return redis.call('PUBLISH', 'news')",
    "return redis.pcall('BLPOP', KEYS[1], 1)",
    "local all = redis.call('KEYS', '*') table.sort(all) return all",
    "return redis.call('COPY', KEYS[1], 'db')",
    "redis.setresp(3) return redis.call('HGETALL', 'h')",
    "return {redis.acl_check_cmd('GET', 'a'), redis.LOG_DEBUG, redis.REDIS_VERSION}",
    "#!lua flags=no-writes\nreturn redis.call('SET', KEYS[1], 1)",
    "#!lua flags=no-writes\nreturn server.call('STRLEN', 's')",
    "#!lua\nreturn redis.call('GET')",
    "#!lua name=wrong\nreturn 1",
    "#!nonsense\nreturn 1",
    "return redis.call('SELECT', 1)",
    "return redis.pcall('FLUSHALL')",
    "return redis.call('PUBSUB', 'CHANNELS')",
    "return redis.call('CLIENT', 'SETNAME', 'x')",
    "local ok, told = pcall(redis.call, 'INCR', KEYS[1]) return {ok, type(told)}",
    "local s = server return s.call('EXISTS', KEYS[1])",
    "return redis.call('EVAL', 'return 1', 0)",
    "-- only a remark",
    "",
]
KEYS = ["s", "n", "l", "h"]


class Application:
    """Does what it is told with clients, and writes down what it sees."""

    def __init__(self, clients: Sequence[Any], watcher: Any, number: int) -> None:
        self.clients = clients
        self.watcher = watcher
        self.number = number
        self.pipelines: dict[int, Any] = {}
        self.pubsubs: dict[int, Any] = {}
        self.handled: list[Any] = []
        self.worker: asyncio.Task[None] | None = None
        self.listener: Any = None

    # What an application starts with, and what the operations of the test find.

    async def start(self) -> None:
        """What stands while the application runs: a worker and a listener."""
        self.listener = self.clients[0].pubsub()
        await self.listener.subscribe("news")
        await self.listener.psubscribe("n*")
        await self.read(self.listener)
        self.worker = asyncio.create_task(self.work(self.clients[1]))
        await self.blocked(1)

    async def work(self, client: Any) -> None:
        while True:
            found = await client.blpop(["jobs"], timeout=60)
            if found is not None:
                await client.rpush("answers", found[1] + b"!")

    async def stop(self) -> None:
        assert self.worker is not None
        self.worker.cancel()
        await asyncio.gather(self.worker, return_exceptions=True)
        await self.listener.aclose()

    async def blocked(self, count: int) -> None:
        """Wait until so many clients wait at the server."""
        async with asyncio.timeout(60):
            while (await self.watcher.info("clients"))["blocked_clients"] != count:
                pass

    async def do(self, op: Op) -> Seen:
        """What the application sees of one operation."""
        try:
            async with asyncio.timeout(60):
                return "fine", plain(await getattr(self, op.what)(op.who, *op.args))
        except Exception as error:
            return told(error)

    async def run(self, who: int, command: str) -> Any:
        return settled(command, await self.clients[who].execute_command(*command.split()))

    async def whole(self, who: int, command: str) -> Any:
        """The command's first two words in one, of bytes."""
        first, *rest = command.encode().split(maxsplit=2)
        args = [b" ".join([first, *rest[:1]]).lower(), *(rest[1].split() if rest[1:] else [])]
        return settled(command, await self.clients[who].execute_command(*args))

    async def piped(self, who: int, commands: Sequence[str], transaction: bool, raises: bool) -> Any:
        async with self.clients[who].pipeline(transaction=transaction) as pipeline:
            for command in commands:
                pipeline.execute_command(*command.split())
            return settled_all(commands, await pipeline.execute(raise_on_error=raises))

    async def method(self, who: int, name: str, *args: Any, **options: Any) -> Any:
        found = getattr(self.clients[who], name)(*args, **options)
        if hasattr(found, "__aiter__"):
            return sorted([each async for each in found])
        return settled(name, await found)

    async def closed(self, who: int) -> Any:
        """The client closes its pool, which no worker or listener has."""
        if who in (2, OTHER) and who not in {*self.pubsubs, *self.pipelines}:
            await self.clients[who].aclose()

    # A transaction with WATCH, of which others see what they do.

    async def watch(self, who: int, *keys: str) -> Any:
        self.pipelines.setdefault(who, self.clients[who].pipeline())
        return await self.pipelines[who].watch(*keys)

    async def immediate(self, who: int, command: str) -> Any:
        if who in self.pipelines:
            found = self.pipelines[who].execute_command(*command.split())
            return settled(command, await found) if hasattr(found, "__await__") else "queued"
        return None

    async def multi(self, who: int) -> Any:
        if who in self.pipelines:
            self.pipelines[who].multi()

    async def execute(self, who: int) -> Any:
        if who in self.pipelines:
            return unordered(await self.pipelines[who].execute(raise_on_error=False))
        return None

    async def unwatch(self, who: int) -> Any:
        if who in self.pipelines:
            return await self.pipelines[who].unwatch()
        return None

    async def drop(self, who: int) -> Any:
        if who in self.pipelines:
            await self.pipelines.pop(who).aclose()

    async def transaction(self, who: int, key: str, meddler: int) -> Any:
        """One that is tried again, because another wrote what it watches."""
        tries: list[int] = []

        async def body(pipeline: Any) -> None:
            tries.append(await pipeline.exists(key))
            if len(tries) < 3:
                await self.clients[meddler].rpush("l", "meddled")
            pipeline.multi()
            pipeline.llen("l").dbsize()

        return await self.clients[who].transaction(body, key, "l"), tries

    # Scripts.

    def script(self, index: int) -> str:
        return f"{SCRIPTS[index]} -- {self.number}"  # not in the server's cache yet

    async def evaluated(self, who: int, index: int, key: str) -> Any:
        return await self.clients[who].eval(self.script(index), 1, key, 5)

    async def registered(self, who: int, index: int, key: str) -> Any:
        return await self.clients[who].register_script(self.script(index))(keys=[key], args=[5])

    async def by_digest(self, who: int, index: int, key: str, readonly: bool) -> Any:
        digest = self.clients[who].register_script(self.script(index)).sha
        run = self.clients[who].evalsha_ro if readonly else self.clients[who].evalsha
        return await run(digest, 1, key, 5)

    async def loaded(self, who: int, index: int) -> Any:
        return await self.clients[who].script_load(self.script(index))

    async def known(self, who: int, index: int) -> Any:
        return await self.clients[who].script_exists(
            self.clients[who].register_script(self.script(index)).sha
        )

    # Waiting, and being cancelled.

    async def pushed(self, who: int, pop: str, pusher: int, push: str) -> Any:
        """Wait for what another pushes."""
        task = asyncio.create_task(self.run(who, pop))
        for _ in range(1000):
            await asyncio.sleep(0)
            if task.done() or (await self.watcher.info("clients"))["blocked_clients"] > 1:
                break
        if not task.done() and who != OTHER:
            seen = await self.run(1 if who == pusher else pusher, push)
            return seen, await task
        task.cancel()
        done = await asyncio.gather(task, return_exceptions=True)
        await self.blocked(1)
        return done

    async def cancelled(self, who: int, pop: str, push: str) -> Any:
        """Wait, be cancelled, and take nothing of what comes afterwards."""
        task = asyncio.create_task(self.run(who, pop))
        for _ in range(1000):
            await asyncio.sleep(0)
            if task.done() or (await self.watcher.info("clients"))["blocked_clients"] > 1:
                break
        task.cancel()
        done = await asyncio.gather(task, return_exceptions=True)
        await self.blocked(1)
        return done, await self.run(who, push)

    async def interrupted(self, who: int, command: str, turns: int) -> Any:
        """Cancelled somewhere in a command; what it would have seen nobody sees."""
        task = asyncio.create_task(self.run(who, command))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return await self.run(who, "ECHO after")

    async def at_once(self, who: int, *commands: str) -> Any:
        each = (self.run(index % 4, command) for index, command in enumerate(commands))
        return await asyncio.gather(*each, return_exceptions=True)

    async def locked(self, who: int, other: int) -> Any:
        lock = self.clients[who].lock("lock", timeout=50, blocking=False)
        rival = self.clients[other].lock("lock", timeout=50, blocking=False)
        seen = [await lock.acquire(), await rival.acquire(), await lock.owned(), await rival.locked()]
        seen.append(await lock.reacquire())
        await lock.release()
        seen.append(await rival.acquire())
        await self.clients[who].delete("lock")
        await rival.release()
        return seen

    # Publishing and hearing.

    async def subscribe(self, who: int, method: str, *names: str) -> Any:
        if who not in self.pubsubs:
            self.pubsubs[who] = self.clients[who].pubsub()
        await getattr(self.pubsubs[who], method)(*names)
        return await self.read(self.pubsubs[who])

    async def handle(self, who: int, method: str, name: str) -> Any:
        """Subscribe with a handler."""
        if who not in self.pubsubs:
            self.pubsubs[who] = self.clients[who].pubsub()
        await getattr(self.pubsubs[who], method)(**{name: self.handled.append})
        return await self.read(self.pubsubs[who])

    async def hear(self, who: int) -> Any:
        return await self.read(self.pubsubs[who]) if who in self.pubsubs else None

    async def leave(self, who: int) -> Any:
        if who in self.pubsubs:
            await self.pubsubs.pop(who).aclose()
        return None

    async def listened(self, who: int) -> Any:
        """What the listener has heard that the application started with."""
        return await self.read(self.listener)

    async def employ(self, who: int, *jobs: str) -> Any:
        """Give the worker jobs that the application started with, and take what it made of them."""
        seen: list[Any] = []
        for job in jobs if who != OTHER else ():
            await self.clients[who].rpush("jobs", job)
            seen.append(await self.clients[who].blpop(["answers"], timeout=60))
        await self.blocked(1)
        return seen

    async def read(self, pubsub: Any) -> list[Any]:
        """What has come; the answer to a PING comes behind it."""
        await pubsub.ping()
        seen: list[Any] = []
        while True:
            message = await pubsub.get_message(timeout=20)
            if message is not None and message["type"] in ("pong", "P"):
                break
            seen.append(message)
            if seen[-3:] == [None] * 3:
                break
        seen += self.handled
        self.handled.clear()
        return [
            each and (each["type"], each["pattern"], each["channel"], each["data"]) for each in seen
        ]

    async def begin(self) -> Any:
        """What each client's connection was told before, which is nothing."""
        return [await self.do(Op("run", who, ("CLIENT GETNAME",))) for who in range(4)]

    async def finish(self) -> list[Any]:
        """Look at what there is, and give everything back."""
        seen = [await self.do(Op("listened", 0))]
        seen += [await self.do(Op("hear", who)) for who in sorted(self.pubsubs)]
        seen += [await self.do(Op("drop", who)) for who in sorted(self.pipelines)]
        seen += [await self.do(Op("leave", who)) for who in sorted(self.pubsubs)]
        for who in (0, OTHER):
            await self.do(Op("run", who, ("PING",)))  # QUIT may be what the connection did last
            for key in sorted(map(text_of, await self.clients[who].keys())):
                kind = text_of(await self.clients[who].type(key))
                for command in (READ[kind], "PTTL {}"):
                    seen.append((key, await self.do(Op("run", who, (command.format(key),)))))
        return seen


READ = {
    "string": "GET {}",
    "hash": "HGETALL {}",
    "list": "LRANGE {} 0 -1",
    "set": "SMEMBERS {}",
    "zset": "ZRANGE {} 0 -1 WITHSCORES",
    "stream": "XRANGE {} - +",
}


# What is another each time.


def told(error: Exception) -> Seen:
    text = re.sub(r"(0x)?[0-9a-f]{8,}|127\.0\.0\.1:\d+", "", str(error))
    return type(error).__name__, text


def plain(value: Any) -> Any:
    """What can be compared of an answer."""
    if isinstance(value, Exception):
        return told(value)
    if isinstance(value, BaseException):
        return repr(value)
    if isinstance(value, dict):
        clocks = ("idle", "inactive", "seen-time", "active-time", "clock_seconds")
        return {
            plain(key): "time" if text_of(key) in clocks else plain(each)
            for key, each in value.items()  # pyright: ignore
        }
    if isinstance(value, list | tuple | set | frozenset):
        each: Any = map(plain, value)  # pyright: ignore
        return sorted(each, key=repr) if isinstance(value, set | frozenset) else list(each)
    if isinstance(value, int) and value > 1_000_000_000_000:
        return "now"
    if isinstance(value, str | bytes):
        return re.sub(r"\d{13}-\d+|\d{13}", "now", text_of(value)), type(value).__name__
    return value if value is None or isinstance(value, int | float) else type(value).__name__


def text_of(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


CHANGING = {"PTTL", "TTL", "OBJECT IDLETIME", "TIME", "CLIENT ID", "LASTSAVE", "time", "client_id"}
UNORDERED = {
    "FUNCTION LIST",
    "KEYS",
    "SCAN",
    "SMEMBERS",
    "SINTER",
    "SUNION",
    "SDIFF",
    "PUBSUB CHANNELS",
    "keys",
}


def settled(command: str, value: Any) -> Any:
    """An answer without what chance gives."""
    two = " ".join(command.split()[:2])
    if {command, two, two.split()[0]} & CHANGING:
        return value if isinstance(value, int) and value < 1 else type(value).__name__
    if two == "RANDOMKEY" or command == "randomkey":
        return value is None
    if {command, two, two.split()[0]} & UNORDERED:
        return unordered(value)
    if two.startswith(("XPENDING x", "XCLAIM")):
        return [each[:2] if isinstance(each, list) else each for each in value]  # pyright: ignore
    return value


def settled_all(commands: Sequence[str], values: Sequence[Any]) -> list[Any]:
    return [settled(*each) for each in zip(commands, values, strict=True)]


def unordered(value: Any) -> Any:
    if isinstance(value, list | tuple):
        items: list[Any] = [unordered(each) for each in value]  # pyright: ignore
        return sorted(items, key=repr)
    if isinstance(value, dict):
        return {key: unordered(each) for key, each in value.items()}  # pyright: ignore
    return value


METHODS: list[tuple[Any, ...]] = [
    ("ping",),
    ("hset", "h", "a", "1"),
    ("dbsize",),
    ("flushdb",),
    ("flushall",),
    ("scan_iter", "s*"),
    ("hscan_iter", "h"),
    ("mget", ["s", "n"]),
    ("randomkey",),
    ("client_getname",),
    ("client_setname", "mine"),
    ("client_id",),
    ("time",),
    ("pubsub_channels",),
    ("pubsub_numsub", "news", "shard"),
    ("config_get", "maxmemory"),
    ("publish", "news", "by method"),
    ("swapdb", 0, 1),
    ("move", "s", 1),
    ("setex", "s", 100, "v"),
    ("set", "s", 1.5),
    ("incrbyfloat", "n", 0.5),
    ("set", "s", None),
    ("lpush", "l", b"\xff", 3),
    ("lrange", "l", 0, -1),
    ("xreadgroup", "g", "c1", {"x": ">"}, None, 10),
    ("echo", ""),
]

commands = st.one_of(*(st.sampled_from(each) for each in PER_KIND.values()))
ordinary = st.sampled_from(ORDINARY)
clients = st.sampled_from([0, 1, 2])
pops = st.sampled_from(
    [
        *("BLPOP l2 5", "BLPOP l2 0", "BRPOP q l2 5", "BLMOVE l2 l LEFT RIGHT 5", "BZPOPMIN z2 5"),
        *("BLMPOP 5 1 l2 LEFT", "XREAD BLOCK 5000 STREAMS x $"),
        "XREADGROUP GROUP g c1 BLOCK 5000 STREAMS x >",
    ]
)
pushes = {"BZ": "ZADD z2 1 a", "XR": "XADD x * f v"}
names = st.lists(
    st.sampled_from(["news", "nest", "shard", "__keyspace@0__:s", "__keyevent@0__:set"]), max_size=2
)
patterns = st.lists(st.sampled_from(["n*", "ne?t", "*", "__keyspace@0__:*", "h[ae]llo"]), max_size=2)


def pushes_for(pop: str) -> str:
    return pushes.get(pop[:2], "RPUSH l2 pushed")


acts: dict[str, st.SearchStrategy[tuple[Any, ...]]] = {
    "run": st.tuples(commands),
    "whole": st.tuples(commands),
    "piped": st.tuples(
        st.lists(st.one_of(ordinary, ordinary, commands), max_size=4), st.booleans(), st.booleans()
    ),
    "method": st.sampled_from(METHODS),
    "watch": st.lists(st.sampled_from(KEYS), min_size=1, max_size=2).map(tuple),
    "immediate": st.tuples(ordinary),
    "multi": st.just(()),
    "execute": st.just(()),
    "unwatch": st.just(()),
    "drop": st.just(()),
    "transaction": st.tuples(st.sampled_from(KEYS), clients),
    "evaluated": st.tuples(st.integers(0, len(SCRIPTS) - 1), st.sampled_from(KEYS)),
    "registered": st.tuples(st.integers(0, len(SCRIPTS) - 1), st.sampled_from(KEYS)),
    "by_digest": st.tuples(st.integers(0, len(SCRIPTS) - 1), st.sampled_from(KEYS), st.booleans()),
    "loaded": st.tuples(st.integers(0, len(SCRIPTS) - 1)),
    "known": st.tuples(st.integers(0, len(SCRIPTS) - 1)),
    "pushed": pops.flatmap(lambda pop: st.tuples(st.just(pop), clients, st.just(pushes_for(pop)))),
    "cancelled": pops.map(lambda pop: (pop, pushes_for(pop))),
    "interrupted": st.tuples(
        st.sampled_from(["GET s", "LRANGE l 0 -1", "PING", "DBSIZE"]), st.integers(0, 12)
    ),
    "at_once": st.sampled_from(
        [
            ("INCR n2", "LLEN l", "EXISTS s", "DBSIZE"),
            ("GET s", "BLPOP none 0.01", "HGETALL h", "SET s v", "PING", "SMEMBERS t"),
        ]
    ),
    "locked": st.tuples(clients),
    "closed": st.just(()),
    "subscribe": st.one_of(
        st.tuples(st.sampled_from(["subscribe", "unsubscribe"]), names),
        st.tuples(st.sampled_from(["psubscribe", "punsubscribe"]), patterns),
        st.tuples(st.sampled_from(["ssubscribe", "sunsubscribe"]), st.just(["shard"])),
    ).map(lambda each: (each[0], *each[1])),
    "handle": st.sampled_from([("subscribe", "news"), ("psubscribe", "n*"), ("ssubscribe", "shard")]),
    "hear": st.just(()),
    "leave": st.just(()),
    "listened": st.just(()),
    "employ": st.lists(st.sampled_from(["dig", "cook"]), min_size=1, max_size=2).map(tuple),
}
OFTEN = ["run"] * 14 + ["piped", "subscribe", "hear", "watch", "evaluated"] * 2
sequences = sequences_of(acts, OFTEN, of_pool="nobody")


def said(op: Op) -> str:
    """What an operation tells the server, in capitals."""
    return repr(op).upper() + script_of(op).upper()


def script_of(op: Op) -> str:
    """The script that an operation is about, if it is about one."""
    return SCRIPTS[int(op.args[0])] if op.what in BY_SCRIPT else ""


def is_guarded(op: Op) -> bool:
    """Whether an operation is about a script that publishes, or whose commands only it knows."""
    guarded = r"PUBLISH|publish|COPY|= server|\(redis|call\(push|\(\)|\(\{"
    return re.search(guarded, script_of(op)) is not None


HEARING = {"subscribe", "handle", "hear", "finish"}
BY_SCRIPT = {"evaluated", "registered", "by_digest", "loaded", "known"}
REFUSED = re.compile(
    r"\b(SELECT|MOVE|SWAPDB|FLUSHALL|COPY S S2 DB|DEBUG|CONFIG[ _](SET|RESETSTAT)|FUNCTION (LOAD|FLUSH)"
    r"|SCRIPT FLUSH|(?<!CLIENT )(?<!PUBSUB )NONSENSE|CLIENT (REPLY|KILL|PAUSE|NONSENSE)"
    r"|PUBSUB', 'CHANNELS)\b"
)
WHOLE_SERVER = re.compile(r"CLIENT (LIST|INFO)|INFO (KEYSPACE|SERVER)|PUBSUB NUMPAT|MEMORY DOCTOR")

LIMITS = [
    Limit(
        "refused: what reaches beyond a database, and what nobody knows",
        lambda op, here, there, before: (
            there[0] == "SandboxUnsupportedError" and REFUSED.search(said(op)) is not None
        ),
    ),
    Limit(
        "in an error of what a script calls, the line is 1 where it publishes, or its command is not "
        "written as text; the server knows it by another digest",
        lambda op, here, there, before: (
            is_guarded(op)
            and (
                op.what == "known"
                or (re.sub(r"script:\d+\.$", "", here[-1]) == re.sub(r"script:1\.$", "", there[-1]))
            )
        ),
        ends=False,
    ),
    Limit(
        "a pattern hears keyspace notifications if it begins with __key",
        lambda op, here, there, before: (
            op.what in HEARING and "__key" in repr(here) and "'*'" in repr([*before, op])
        ),
        ends=False,
    ),
    Limit(
        "CLIENT LIST, CLIENT INFO, INFO and PUBSUB NUMPAT tell of the whole server",
        lambda op, here, there, before: (
            here[0] == there[0] == "fine" and WHOLE_SERVER.search(said(op)) is not None
        ),
        ends=False,
    ),
]


class Worlds:
    """Production, and a sandbox on another server of which somebody else uses two databases."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self.runner = runner
        self.number = itertools.count()
        self.complaints: list[str] = []

    async def open(self) -> None:
        self.stack = AsyncExitStack()
        enter = self.stack.enter_async_context
        self.urls = [(await enter(embedded.valkey())).url for _ in "12"]
        kind: Any = Redis
        self.admins = [kind.from_url(url, decode_responses=True) for url in self.urls]
        for admin in self.admins:
            self.stack.push_async_callback(admin.aclose)
            await admin.config_set("notify-keyspace-events", "KEA")
            await admin.function_load(LIBRARY)
        for number in (0, 1):
            theirs = kind.from_url(self.urls[1][:-1] + str(number))
            await theirs.mset({"s": "theirs", "kept": "1"})
            await theirs.aclose()
        registry = Registry("stateful")

        def made(index: int) -> Callable[[], Any]:
            def client() -> Any:
                return connected(self.urls[1])[index]

            return client

        handles = [registry.resource(name=f"client{who}")(made(who)) for who in range(4)]
        with sandboxing():
            self.lifespan = await enter(registry.lifespan())
        self.boxed = [self.lifespan[handle] for handle in handles]
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: self.complaints.append(context["message"])
        )

    async def close(self) -> None:
        await self.stack.aclose()

    async def in_production(self, ops: Sequence[Op], number: int) -> list[Any]:
        """What an application sees."""
        admin = self.admins[0]
        await admin.flushall()
        await admin.function_load(LIBRARY, replace=True)
        clients = connected(self.urls[0])
        application = Application(clients, admin, number)
        try:
            await application.start()
            seen = [await application.begin()]
            seen += [await application.do(op) for op in ops]
            seen += await application.finish()
            await application.stop()
        finally:
            for client in clients:
                await client.aclose(close_connection_pool=True)
        return seen + self.heard()

    async def in_sandbox(self, ops: Sequence[Op], number: int) -> list[Any]:
        """What it sees in the sandbox, which leaves nothing."""
        application = Application(self.boxed, self.admins[1], number)
        await application.start()
        await application.read(application.listener)
        before = await self.holds()
        async with self.lifespan.sandbox():
            await application.blocked(1)
            seen = [await application.begin()]
            seen += [await application.do(op) for op in ops]
            seen += await application.finish()
        await application.blocked(1)
        try:
            assert (now := await self.holds()) == before, f"{before} became {now}"
            assert await application.read(application.listener) == []
        finally:
            await application.stop()
        return seen + self.heard()

    def heard(self) -> list[Any]:
        complaints, self.complaints[:] = self.complaints[:], []
        return complaints

    async def holds(self) -> Any:
        """All that is on the sandboxed server, leases aside."""
        admin = self.admins[1]
        clients = await admin.client_list()
        found: list[Any] = [
            (await admin.info("keyspace")).keys(),
            [await admin.dump(key) for key in ("s", "kept")],
            [name for name in await admin.pubsub_channels() if not name.startswith("lifekit-")],
            {name for each in clients if "lifekit-" not in (name := each["name"])} - {""},
            await admin.config_get("maxmemory"),
            len(await admin.function_list()),
        ]
        return found

    def compare(self, ops: Sequence[Op]) -> None:
        """Do *ops* here and there."""
        number = next(self.number)
        produced = self.runner.run(self.in_production(ops, number))
        boxed = self.runner.run(self.in_sandbox(ops, number))
        assert_same(ops, produced, boxed, LIMITS)


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    with asyncio.Runner() as runner:
        worlds = Worlds(runner)
        runner.run(worlds.open())
        yield worlds
        runner.run(worlds.close())


@settings(calm, max_examples=20, derandomize=True)
@given(sequences)
def test_an_application_sees_the_same_as_in_production(worlds: Worlds, sequence: list[Op]) -> None:
    """Results, errors and their texts, whatever it does; afterwards the server is as before."""
    worlds.compare(sequence)


@pytest.mark.parametrize("kind", sorted(PER_KIND.keys() - {"refused"}))
def test_every_command(worlds: Worlds, kind: str) -> None:
    """The same, for each there is, with what those before it made, whatever kind of client asks."""
    worlds.compare([Op("run", who, (each,)) for who, each in enumerate_kinds(kind)])


def enumerate_kinds(kind: str) -> Iterator[tuple[int, str]]:
    """Each command, by one client after the other."""
    return zip(itertools.cycle([0, 1, 2, 0, OTHER]), PER_KIND[kind])


@pytest.mark.long
@pytest.mark.timeout(1200)
@settings(calm, max_examples=40 * TIMES, derandomize=True)
@given(sequences)
def test_many_applications_see_the_same_as_in_production(worlds: Worlds, sequence: list[Op]) -> None:
    """The same, with many more."""
    worlds.compare(sequence)
