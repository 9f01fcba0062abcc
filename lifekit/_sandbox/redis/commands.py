"""What a Redis command reaches: refused where that is more than one database, renamed where it can be.

Channels belong to a whole server; inside a block they have a prefix on their way out, which is taken
off on the way in. Scripts are sent with a few words before them that do both to what they call.
"""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast
from weakref import WeakSet

from lifekit._core.errors import SandboxUnsupportedError

_INSTEAD = (
    "Do it before the sandbox begins, or run this test without one: "
    '@pytest.mark.lifekit(isolation="none").'
)
_ELSEWHERE = "A client may do it that is declared with @registry.resource(…, sandbox=False)."
_REACH = "it reaches beyond the one database that this client has under test"
_UNKNOWN = "lifekit does not know what it reaches"
_SERVER = "it is about the server, where it would outlast the test and touch others"
_SEES = "it shows what every client of the server does"

_WAYS_OUT: Mapping[str, str] = {
    "FLUSHALL": "FLUSHDB empties the database that this client has.",
    "SELECT": "Make a client for each database, with its `db`, as a resource of its own.",
    "RESET": "Give the connection back: it puts the server's side of it in order.",
}
_PLAIN = """
    APPEND BITCOUNT BITFIELD BITFIELD_RO BITOP BITPOS DECR DECRBY DELEX DELIFEQ DIGEST GET GETBIT GETDEL
    GETEX GETRANGE GETSET INCR INCRBY INCRBYFLOAT INCREX LCS MGET MSET MSETEX MSETNX PSETEX SET SETBIT
    SETEX SETNX SETRANGE STRLEN SUBSTR HDEL HEXISTS HEXPIRE HEXPIREAT HEXPIRETIME HGET HGETALL HGETDEL
    HGETEX HINCRBY HINCRBYFLOAT HKEYS HLEN HMGET HMSET HPERSIST HPEXPIRE HPEXPIREAT HPEXPIRETIME HPTTL
    HRANDFIELD HSCAN HSET HSETEX HSETNX HSTRLEN HTTL HVALS BLMOVE BLMOVEM BLMPOP BLPOP BRPOP BRPOPLPUSH
    LINDEX LINSERT LLEN LMOVE LMOVEM LMPOP LPOP LPOS LPUSH LPUSHX LRANGE LREM LSET LTRIM RPOP RPOPLPUSH
    RPUSH RPUSHX SADD SCARD SDIFF SDIFFCARD SDIFFSTORE SINTER SINTERCARD SINTERSTORE SISMEMBER SMEMBERS
    SMISMEMBER SMOVE SPOP SRANDMEMBER SREM SSCAN SUNION SUNIONCARD SUNIONSTORE BZMPOP BZPOPMAX BZPOPMIN
    ZADD ZCARD ZCOUNT ZDIFF ZDIFFSTORE ZINCRBY ZINTER ZINTERCARD ZINTERSTORE ZLEXCOUNT ZMPOP ZMSCORE
    ZPOPMAX ZPOPMIN ZRANDMEMBER ZRANGE ZRANGEBYLEX ZRANGEBYSCORE ZRANGESTORE ZRANK ZREM ZREMRANGEBYLEX
    ZREMRANGEBYRANK ZREMRANGEBYSCORE ZREVRANGE ZREVRANGEBYLEX ZREVRANGEBYSCORE ZREVRANK ZSCAN ZSCORE
    ZUNION ZUNIONSTORE GEOADD GEODIST GEOHASH GEOPOS GEORADIUS GEORADIUSBYMEMBER GEORADIUSBYMEMBER_RO
    GEORADIUS_RO GEOSEARCH GEOSEARCHSTORE XACK XACKDEL XADD XAUTOCLAIM XCFGSET XCLAIM XDEL XDELEX XGROUP
    XINFO XLEN XNACK XPENDING XRANGE XREAD XREADGROUP XREVRANGE XSETID XTRIM ARCOUNT ARDEL ARDELRANGE
    ARGET ARGETRANGE ARGREP ARINFO ARINSERT ARLASTITEMS ARLEN ARMGET ARMSET ARNEXT AROP ARRING ARSCAN
    ARSEEK ARSET PFADD PFCOUNT PFMERGE VADD VCARD VDIM VEMB VGETATTR VINFO VISMEMBER VLINKS VRANDMEMBER
    VRANGE VREM VSETATTR VSIM DBSIZE DEL DUMP EXISTS EXPIRE EXPIREAT EXPIRETIME FLUSHDB KEYS OBJECT
    PERSIST PEXPIRE PEXPIREAT PEXPIRETIME PTTL RANDOMKEY RENAME RENAMENX RESTORE SCAN SORT SORT_RO TOUCH
    TTL TYPE UNLINK COMMAND ECHO FCALL FCALL_RO INFO LASTSAVE LOLWUT PING QUIT ROLE TIME WAIT WAITAOF
"""
PLAIN = frozenset(_PLAIN.split())
"""Commands that reach the one database, or nothing: most need not be looked at."""
_MODULES = ("BF.", "CF.", "CMS.", "JSON.", "TDIGEST.", "TOPK.", "TS.")
"""How commands of modules begin that reach the one database. FT. reaches the server's indexes."""
_BEYOND = frozenset({"FLUSHALL", "MIGRATE", "MOVE", "RESET", "SELECT", "SWAPDB"})
_OF_SERVER = frozenset(
    {"BGREWRITEAOF", "BGSAVE", "DEBUG", "FAILOVER", "PFDEBUG", "PSYNC", "REPLCONF", "REPLICAOF"}
    | {"SAVE", "SENTINEL", "SHUTDOWN", "SLAVEOF", "SYNC"}
)
# Of what else has subcommands, these read, or concern one connection alone.
_HARMLESS: Mapping[str, frozenset[str]] = {
    name: frozenset(harmless.split()) | {"HELP"}
    for name, harmless in {
        "ACL": "CAT DRYRUN GENPASS GETUSER LIST USERS WHOAMI",
        "CLIENT": "CACHING CAPA GETNAME GETREDIR ID INFO LIST NO-EVICT NO-TOUCH SETINFO SETNAME "
        "TRACKING TRACKINGINFO UNBLOCK",
        "CLUSTER": "COUNTKEYSINSLOT GETKEYSINSLOT INFO KEYSLOT MYID NODES SHARDS SLOTS",
        "COMMANDLOG": "GET LEN",
        "CONFIG": "GET",
        "FUNCTION": "DUMP LIST STATS",
        "LATENCY": "DOCTOR GRAPH HISTOGRAM HISTORY LATEST",
        "MEMORY": "DOCTOR MALLOC-STATS PURGE STATS USAGE",
        "MODULE": "LIST",
        "SCRIPT": "EXISTS LOAD SHOW",
        "SLOWLOG": "GET LEN",
    }.items()
}
# What stays with a connection that is given back, of which nobody else may see anything.
_LASTING = frozenset({"ASKING", "AUTH", "HELLO", "HIMPORT", "READONLY", "READWRITE"})
_LASTING_OF_CLIENT = frozenset(
    {"CACHING", "CAPA", "NO-EVICT", "NO-TOUCH", "SETINFO", "SETNAME", "TRACKING"}
)

SUBSCRIBING = frozenset({"PSUBSCRIBE", "SSUBSCRIBE", "SUBSCRIBE"})
UNSUBSCRIBING = frozenset({"PUNSUBSCRIBE", "SUNSUBSCRIBE", "UNSUBSCRIBE"})
_RUNNING: Mapping[str, str] = {
    "EVAL": "EVAL",
    "EVAL_RO": "EVAL_RO",
    "EVALSHA": "EVAL",
    "EVALSHA_RO": "EVAL_RO",
}
_WAITING = frozenset(
    {"BLMOVE", "BLMOVEM", "BLMPOP", "BLPOP", "BRPOP", "BRPOPLPUSH", "BZMPOP", "BZPOPMAX", "BZPOPMIN"}
)
_IN_TRANSACTION: Mapping[str, bool] = {
    "DISCARD": False,
    "EXEC": False,
    "MULTI": True,
    "UNWATCH": False,
    "WATCH": True,
}


_KNOWN = PLAIN.union(
    {"COPY", "MONITOR", "PUBLISH", "PUBSUB", "SPUBLISH"}, _LASTING, _OF_SERVER, _HARMLESS
) | SUBSCRIBING.union(UNSUBSCRIBING, _RUNNING, _IN_TRANSACTION)


@functools.lru_cache(maxsize=4096)
def words(first: str | bytes) -> tuple[str, ...]:
    """Return the words of a command's first argument, which may be ``CONFIG GET``."""
    text = first if isinstance(first, str) else first.decode("utf-8", "surrogateescape")
    return tuple(text.split())


def split(args: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
    """Return a command's name, in capitals, and what follows, each an argument of its own."""
    found = words(args[0]) if isinstance(args[0], str | bytes) else (str(args[0]),)
    if not found:
        return "", tuple(args)
    return found[0].upper(), (*found[1:], *args[1:])


def lasts(name: str, rest: Sequence[Any]) -> bool:
    """Return whether a command leaves something on its connection."""
    return name in _LASTING or (name == "CLIENT" and _word(rest) in _LASTING_OF_CLIENT)


def in_transaction(name: str) -> bool | None:
    """Return whether a connection is in a transaction after a command; None where it says nothing."""
    return _IN_TRANSACTION.get(name)


def waits(name: str, rest: Sequence[Any]) -> bool:
    """Return whether a command waits at the server for what others do."""
    if name in {"XREAD", "XREADGROUP"}:
        return "BLOCK" in map(_text, rest)
    return name in _WAITING


def refuse(name: str, rest: Sequence[Any], *, in_block: bool) -> None:
    """Raise `SandboxUnsupportedError` for a command that would leave the database.

    In a block it is also raised for what would outlive that, as it is about the server.
    """
    if name in _BEYOND or (name == "COPY" and any(_text(each) == "DB" for each in rest[2:])):
        raise refusal("COPY … DB" if name == "COPY" else name)
    if not (name in _KNOWN or name.startswith(_MODULES)):
        raise refusal(name, _UNKNOWN)
    if not in_block:
        return
    if name in _OF_SERVER:
        raise refusal(name, _SERVER)
    if name == "MONITOR":
        raise refusal(name, _SEES)
    if name in _HARMLESS and _word(rest) not in _HARMLESS[name] and not lasts(name, rest):
        raise refusal(f"{name} {_word(rest)}", _SERVER)


def refusal(name: str, why: str = _REACH) -> SandboxUnsupportedError:
    """Return the error for a command that is refused."""
    way_out = _WAYS_OUT.get(name, _ELSEWHERE if why in {_REACH, _UNKNOWN} else _INSTEAD)
    return SandboxUnsupportedError(f"{name} is refused in the sandbox: {why}. {way_out}")


class Channels:
    """The names of channels and patterns, as the application has them and as the server does.

    They are a server's, whichever database a client has, so that the clients of a lifespan share them.
    Keyspace notifications (``__keyspace@0__:key``) have leased numbers in the place of own ones.
    """

    def __init__(self) -> None:
        self.end: bytes = b"lifekit-" + secrets.token_hex(4).encode()
        """The channel on which PubSubs that may outlive a block hear of its end."""
        self.prefix: bytes = self.end + b":"
        self.numbers: dict[bytes, bytes] = {}
        """The leased number in the place of each own one."""
        self.ended: int = 0
        """How many blocks have ended."""
        self.listeners: WeakSet[Any] = WeakSet()
        """The connections that hear of it."""

    def out(self, name: bytes) -> bytes:
        """Return what the server shall know the channel or pattern *name* as."""
        found = _KEYSPACE.match(name)
        if found is None:
            return self.prefix + name
        if found[2] in {None, b"*"}:  # of what it hears, `owns` tells what is for the application
            return name
        return _renumbered(found, self.numbers) or self.prefix + name

    def back(self, name: Any) -> Any:
        """Return what the application calls what the server knows as *name*, bytes or str."""
        if isinstance(name, str):
            return self.back(name.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")
        if not isinstance(name, bytes):
            return name
        if name.startswith(self.prefix):
            return name[len(self.prefix) :]
        found = _KEYSPACE.match(name)
        own = {leased: own for own, leased in self.numbers.items()}
        return (found and _renumbered(found, own)) or name

    def owns(self, name: Any) -> bool:
        """Return whether *name*, as the server knows it, is one of this lifespan's."""
        return bool(self.back(name) != name or name == self.end)

    def reply(self, reply: Any) -> Any:
        """Return a reply, or a message, with the names that the application knows."""
        if isinstance(reply, list):
            items = cast(Any, reply)
            if items and _text(items[0]) in _MESSAGES:  # the last is what was published
                return [items[0], *map(self.back, items[1:-1]), items[-1]]
            return [self.reply(each) for each in items]
        if isinstance(reply, dict):
            pairs = cast(Any, reply)
            return {self.back(key): self.reply(value) for key, value in pairs.items()}
        return self.back(reply)


def rename(name: str, rest: tuple[Any, ...], channels: Channels, encode: Any) -> tuple[Any, ...]:
    """Return a command's arguments with the channels as the server shall know them."""
    if name in SUBSCRIBING or name in UNSUBSCRIBING:
        return tuple(channels.out(bytes(encode(each))) for each in rest)
    if not rest:
        return rest
    if name in {"PUBLISH", "SPUBLISH"}:
        return channels.prefix + bytes(encode(rest[0])), *rest[1:]
    if name == "PUBSUB":
        first, ask = rest[0], _word(rest)
        if ask in {"CHANNELS", "SHARDCHANNELS"}:
            pattern = bytes(encode(rest[1])) if len(rest) > 1 else b"*"
            return first, channels.prefix + pattern
        if ask in {"NUMSUB", "SHARDNUMSUB"}:
            return first, *(channels.out(bytes(encode(each))) for each in rest[1:])
    return rest


def script(
    name: str, rest: tuple[Any, ...], scripts: Mapping[str, bytes], channels: Channels, encode: Any
) -> tuple[str, tuple[Any, ...]]:
    """Return how a script is run, guarded if it must be; one that is not known is left unknown."""
    if name not in _RUNNING or not rest:
        return name, rest
    text = bytes(encode(rest[0]))
    if name.startswith("EVALSHA"):
        known = scripts.get(text.decode("latin-1").lower())
        if known is None:  # the server may have it, and would run it unguarded
            return name, (b"0" * 40, *rest[1:])
        text = known
    if is_plain(text):
        return name, rest
    return _RUNNING[name], (_guarded(text, channels.prefix), *rest[1:])


@functools.lru_cache(maxsize=1024)
def is_plain(text: bytes) -> bool:
    """Return whether a script calls harmless commands only, by their names: it needs no guard."""
    called = {name.decode("latin-1").upper() for _, name in _CALL.findall(text)}
    return called <= PLAIN and not _CALLING.search(_CALL.sub(b"", text))


def script_text(name: str, rest: Sequence[Any], encode: Any) -> bytes | None:
    """Return the script that a command makes known to the server, if any."""
    if name in {"EVAL", "EVAL_RO"} and rest:
        return bytes(encode(rest[0]))
    if name == "SCRIPT" and len(rest) > 1 and _word(rest) == "LOAD":
        return bytes(encode(rest[1]))
    return None


def refused_in_script(error: Exception) -> SandboxUnsupportedError | None:
    """Return the error for what a guarded script was refused, if that is what the server tells."""
    found = _REFUSED.search(str(error))
    if found is None:
        return None
    return refusal(found[1], _REACH if found[1] in _KNOWN | _BEYOND else _UNKNOWN)


_MESSAGES = frozenset(
    f"{kind}{what}".upper()
    for kind in ("", "p", "s")
    for what in ("message", "subscribe", "unsubscribe")
)
_KEYSPACE = re.compile(rb"__key(space|event|\*)(?:@(\d+|\*))?__:")


def _renumbered(found: re.Match[bytes], numbers: Mapping[bytes, bytes]) -> bytes | None:
    number = numbers.get(found[2])
    return number and b"__key%b@%b__:%b" % (found[1], number, found.string[found.end() :])


_CALL = re.compile(rb"\b(?:redis|server)\.p?call\s*\(\s*(['\"])(\w+)\1\s*(?=[,)])")
_CALLING = re.compile(rb"\b(?:redis|server)\b(?!\.\w)|call\b|\b(?:_G|\w*fenv|load\w*)\b")
_REFUSED = re.compile(r"lifekit refuses ([A-Z0-9_.]+)")
# What no script may call, the server refuses in its own words.
_IN_SCRIPTS = " ".join(sorted(_KNOWN - {"LATENCY", "PUBSUB", "SLOWLOG"}))
_MODULES_IN_SCRIPTS = ", ".join(f"['{each}']=1" for each in _MODULES)
_GUARD = (
    "local redis, server = (function(real) "
    f"local known = ' {_IN_SCRIPTS} ' "
    f"local modules = {{{_MODULES_IN_SCRIPTS}}} "
    "local function guard(...) local name, first = ... "
    "if type(name) ~= 'string' then return ... end "
    "local upper = string.upper(name) "
    "local refuse = not (string.find(known, ' ' .. upper .. ' ', 1, true) "
    "or modules[string.match(upper, '^%%u+%%.')]) "
    "if upper == 'COPY' then for _, each in ipairs({...}) do "
    "if _ > 3 and string.upper(tostring(each)) == 'DB' then refuse = 1 end end end "
    "if refuse then error('lifekit refuses ' .. upper, 0) end "
    "if (upper == 'PUBLISH' or upper == 'SPUBLISH') and first then "
    "return name, '%s' .. first, select(3, ...) end "
    "return ... end "
    "local guarded = setmetatable({call = function(...) return real.call(guard(...)) end, "
    "pcall = function(...) return real.pcall(guard(...)) end}, {__index = real}) "
    "return guarded, guarded end)(redis) "
)


def _guarded(text: bytes, prefix: bytes) -> bytes:
    # On the line of the script's first, so that the lines in its errors are right.
    head, newline, body = text.partition(b"\n") if text.startswith(b"#!") else (b"", b"", text)
    return head + newline + (_GUARD % prefix.decode()).encode() + body


def _word(rest: Sequence[Any]) -> str:
    return _text(rest[0]) if rest else ""


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1").upper()
    return value.upper() if isinstance(value, str) else ""


def lines_of(clients: bytes | str) -> Iterable[dict[str, str]]:
    """Yield the fields of each client that ``CLIENT LIST`` names."""
    text = clients.decode("utf-8", "replace") if isinstance(clients, bytes) else clients
    for line in text.splitlines():
        pairs = (field.partition("=") for field in line.split(" "))
        yield {name: value for name, _, value in pairs}
