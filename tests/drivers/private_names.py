"""Every private name of a PostgreSQL client's package that lifekit touches, and why.

A name without its line here is found by a test; one that a release took away is found by another.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Private:
    """One name.

    Args:
        owner: Where it is: a module, and a class of it.
        name: The name.
        versions: Of the package, in which it was seen.
        reason: What lifekit needs it for.
        in_tests: Whether that is for test mode; else for the opening and closing of any lifespan.
    """

    owner: str
    name: str
    versions: str
    reason: str
    in_tests: bool = False


_ASYNCPG = "0.29 to 0.32"
_AIOPG = "1.4"
_PSYCOPG2 = "2.9"
_PSYCOPG = "3.2 and 3.3"
_SQLALCHEMY = "2.0 and 2.1"

NAMES: list[Private] = [
    Private("asyncpg.pool.Pool", "_connect", _ASYNCPG, "connects for a lock, or by way of the gateway"),
    Private("asyncpg.connection.Connection", "_addr", _ASYNCPG, "names the server"),
    Private("asyncpg.connection.Connection", "_params", _ASYNCPG, "names the server"),
    Private("psycopg2.pool.AbstractConnectionPool", "_used", _PSYCOPG2, "tells what is out", True),
    Private("psycopg2.pool.AbstractConnectionPool", "_args", _PSYCOPG2, "names the server"),
    Private("psycopg2.pool.AbstractConnectionPool", "_kwargs", _PSYCOPG2, "names the server"),
    Private("asyncpg.pool.Pool", "_acquire", _ASYNCPG, "notes who takes a connection", True),
    Private("asyncpg.pool.Pool", "_holders", _ASYNCPG, "tells what is out", True),
    Private("asyncpg.pool.PoolConnectionHolder", "_con", _ASYNCPG, "tells what is out", True),
    Private("asyncpg.pool.Pool", "_loop", _ASYNCPG, "refuses a pool of another loop"),
    Private("asyncpg.pool.Pool", "_closed", _ASYNCPG, "cuts off a pool that is opening"),
    Private("asyncpg.pool.Pool", "_async__init__", _ASYNCPG, "finds a pool that failed to open"),
    Private("asyncpg.pool.Pool", "_connect_args", _ASYNCPG, "names the server"),
    Private("asyncpg.pool.Pool", "_connect_kwargs", _ASYNCPG, "names the server"),
    Private(
        "asyncpg.pool.PoolConnectionHolder", "_max_inactive_time", _ASYNCPG, "drops what still arrives"
    ),
    Private("aiopg.pool.Pool", "_dsn", _AIOPG, "names the server"),
    Private("aiopg.pool.Pool", "_conn_kwargs", _AIOPG, "names the server"),
    Private("aiopg.pool.Pool", "_timeout", _AIOPG, "connects for a lock"),
    Private("aiopg.pool.Pool", "_acquire", _AIOPG, "notes who takes a connection", True),
    Private("aiopg.pool.Pool", "_used", _AIOPG, "tells what is out", True),
    Private("aiopg.pool.Pool", "_loop", _AIOPG, "refuses a pool of another loop"),
    Private("aiopg.pool.Pool", "_closing", _AIOPG, "refuses a closed pool"),
    Private("aiopg.pool.Pool", "_closed", _AIOPG, "cuts everything off"),
    Private("aiopg.pool.Pool", "_cond", _AIOPG, "wakes who waits for a pool that is cut off"),
    Private("aiopg.pool.Pool", "_free", _AIOPG, "cuts everything off"),
    Private("aiopg.pool.Pool", "_terminated", _AIOPG, "cuts everything off"),
    Private("aiopg.pool.Pool", "_fill_free_pool", _AIOPG, "lets nothing arrive at a closed pool"),
    Private("psycopg_pool.base.BasePool", "_closed", _PSYCOPG, "cuts everything off"),
    Private("psycopg_pool.base.BasePool", "_opened", _PSYCOPG, "refuses a closed pool"),
    Private("psycopg_pool.base.BasePool", "_pool", _PSYCOPG, "cuts everything off"),
    Private(
        "psycopg_pool.pool_async.AsyncConnectionPool", "_waiting", _PSYCOPG, "wakes who waits for it"
    ),
    Private("psycopg_pool.pool_async.AsyncConnectionPool", "_connect", _PSYCOPG, "fails early", True),
    Private("psycopg_pool.pool_async.AsyncConnectionPool", "_sched_runner", _PSYCOPG, "ends its tasks"),
    Private("psycopg_pool.pool_async.AsyncConnectionPool", "_workers", _PSYCOPG, "ends its tasks"),
    Private("psycopg.BaseConnection", "_connect_gen", _PSYCOPG, "is the door of psycopg", True),
    # `asyncpg.connect_utils._connect` and `psycopg2._connect` are the doors of those: functions.
    Private("sqlalchemy.pool.base.Pool", "_invoke_creator", _SQLALCHEMY, "connects for a lock"),
    Private("sqlalchemy.engine.base.OptionEngineMixin", "_proxied", _SQLALCHEMY, "is one engine", True),
    Private(
        "sqlalchemy.pool.base._ConnectionFairy", "_connection_record", _SQLALCHEMY, "cuts off", True
    ),
    Private("sqlalchemy.pool.impl.QueuePool", "_pool", _SQLALCHEMY, "closes what is idle", True),
    Private("sqlalchemy.util.queue.AsyncAdaptedQueue", "_queue", _SQLALCHEMY, "closes it", True),
    Private(
        "sqlalchemy.connectors.asyncio.AsyncAdapt_dbapi_connection",
        "_connection",
        _SQLALCHEMY,
        "knows the loop of what is idle",
        True,
    ),
    Private("asyncpg.connection.Connection", "_loop", _ASYNCPG, "knows the loop of what is idle", True),
    Private("sqlalchemy.pool.impl.QueuePool", "_max_overflow", _SQLALCHEMY, "names the limit"),
]

MOST_IN_TESTS = 15
"""Of test mode. Whoever needs one more looks for a public way first."""

OWN = frozenset(("_given", "_out", "_returned", "_failed", "_watched_in", "_use", "_noted", "_dispose"))
"""What lifekit itself puts on pools, and calls on its own classes."""

ELSEWHERE = frozenset(("_replace", "_getframe", "_children", "_fut_waiter", "_tasks"))
"""Of the standard library: who waits for whom, and on what line."""
