"""Fleets: processes of which one leads, killed, stopped and cut off; real locks, by each driver."""

from __future__ import annotations

import inspect
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import aiopg
import anyio
import asyncpg
import psycopg2
import pytest
import redis.asyncio as redis
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine

import lifekit
from lifekit import CrashError, DeclarationError, Lifespan, Registry, Worker, testing
from lifekit._core import leading
from lifekit.drivers import _lock
from lifekit.embedded import Server

from .depth import TIMES
from .fleets import LIMIT, disturb, fleet_of, until

pytestmark = pytest.mark.anyio
LOCKED = """select count(*) from pg_locks join pg_database on pg_database.oid = database
where locktype = 'advisory' and datname = current_database()"""


@pytest.fixture
def anyio_backend() -> str:
    """The drivers are asyncio's own."""
    return "asyncio"


def _sqlalchemy(url: str, driver: str) -> Any:
    return create_async_engine(url.replace("postgresql:", f"postgresql+{driver}:"))


MAKERS: dict[str, Callable[[str], Any]] = {
    "asyncpg": lambda url: asyncpg.create_pool(url, min_size=1),
    "aiopg": lambda url: aiopg.create_pool(url, minsize=1),
    "psycopg": lambda url: AsyncConnectionPool(url, open=False),
    "psycopg, by functions": lambda url: AsyncConnectionPool(lambda: url, open=False),
    "sqlalchemy, asyncpg": lambda url: _sqlalchemy(url, "asyncpg"),
    "sqlalchemy, psycopg": lambda url: _sqlalchemy(url, "psycopg"),
    "redis": redis.from_url,
    "redis pool": lambda url: redis.from_url(url).connection_pool,
}
every_kind = pytest.mark.parametrize("kind", MAKERS)


class Fleet:
    """A registry whose worker leads, by a lock of one kind; its lifespans stand in for processes."""

    def __init__(self, kind: str, postgres: Server, valkey: Server) -> None:
        self.numbers: list[int] = []
        self.registry = Registry("fleet")
        self.url = valkey.url if kind.startswith("redis") else postgres.url

        @self.registry.resource
        def lock() -> Any:
            return MAKERS[kind](self.url)

        @self.registry.worker(leader=lock)
        async def lead() -> None:
            self.numbers.append(lifekit.leadership().number)
            await anyio.sleep_forever()

        self.lock: Any = lock
        self.lead: Worker = lead

    async def until(self, lifespan: Lifespan, state: str) -> None:
        """Wait until its worker is in that state."""
        await until(lambda: lifespan[self.lead].state == state)


async def _no_sessions(postgres: Server) -> None:
    """Wait until the server has noticed that no lock's session is left."""
    connection = await asyncpg.connect(postgres.url)
    try:
        gone = (
            "select not exists (select from pg_stat_activity where application_name like 'lifekit %.%')"
        )
        await until(lambda: connection.fetchval(gone))
    finally:
        await connection.close()


@every_kind
async def test_one_leads_and_the_next_has_a_higher_number(
    kind: str, postgres: Server, valkey: Server
) -> None:
    fleet = Fleet(kind, postgres, valkey)
    async with fleet.registry.lifespan() as second:
        async with fleet.registry.lifespan() as first:
            await until(
                lambda: {e[fleet.lead].state for e in (first, second)} == {"running", "standby"}
            )
            async with lifekit.exclusive(fleet.lock, f"migrations by {kind}'s") as held:
                assert held.number > 0
        await fleet.until(second, "running")
    async with fleet.registry.lifespan() as third:
        await fleet.until(third, "running")
    assert fleet.numbers == sorted(set(fleet.numbers))
    assert len(fleet.numbers) >= 2
    await _no_sessions(postgres)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if not kind.startswith("redis")])
async def test_a_leader_whose_session_ends_is_cancelled_and_leads_anew(
    kind: str, postgres: Server, valkey: Server
) -> None:
    fleet = Fleet(kind, postgres, valkey)
    async with fleet.registry.lifespan() as lifespan:
        await fleet.until(lifespan, "running")
        connection = await asyncpg.connect(postgres.url)
        await connection.fetch(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = $1",
            "lifekit fleet.lead",
        )
        await connection.close()
        await until(lambda: len(fleet.numbers) > 1)
    assert fleet.numbers == sorted(set(fleet.numbers))
    await _no_sessions(postgres)


async def test_a_leader_whose_key_is_gone_is_cancelled_and_leads_anew(
    postgres: Server, valkey: Server
) -> None:
    fleet = Fleet("redis", postgres, valkey)
    async with fleet.registry.lifespan() as lifespan:
        await fleet.until(lifespan, "running")
        client = lifespan[fleet.lock]
        assert await client.get("lifekit:{fleet.lead}:leader")
        await client.delete("lifekit:{fleet.lead}:leader", "lifekit:{fleet.lead}:number")
        await until(lambda: len(fleet.numbers) > 1)
        assert await client.pttl("lifekit:{fleet.lead}:leader") <= 1000 * leading.LEASE
    async with redis.from_url(valkey.url) as client:
        assert not await client.exists("lifekit:{fleet.lead}:leader")
    assert fleet.numbers == sorted(set(fleet.numbers))


LOCKLESS: dict[str, Callable[[str], Any]] = {
    "Engine": create_engine,
    "AsyncEngine": lambda url: create_async_engine("sqlite+aiosqlite://"),
    "Connection": asyncpg.connect,
    "connection": psycopg2.connect,
}


@pytest.mark.parametrize("name", LOCKLESS)
async def test_a_value_that_can_hold_no_lock_is_refused_by_name(postgres: Server, name: str) -> None:
    registry = Registry("fleet")

    @registry.resource
    async def db() -> Any:
        made = LOCKLESS[name](postgres.url)
        return await made if inspect.isawaitable(made) else made

    @registry.worker(leader=db)
    async def lead() -> None: ...

    with pytest.raises(CrashError, match=f"lead: a {name} can hold no lock"):
        async with registry.lifespan():
            await anyio.sleep_forever()


async def test_in_a_sandbox_a_leader_leads_at_once_and_takes_no_lock(postgres: Server) -> None:
    registry, numbers = Registry("fleet"), list[int]()

    @registry.resource
    def db() -> asyncpg.Pool:
        return asyncpg.create_pool(postgres.url, min_size=1)

    @registry.worker(db, leader=db)
    async def lead(db: asyncpg.Pool) -> None:
        numbers.append(lifekit.leadership().number)
        await anyio.sleep_forever()

    @registry.worker(db)
    async def migrate(db: asyncpg.Pool) -> None:
        async with lifekit.exclusive(db, "migrations"):
            assert await db.fetchval(LOCKED) == 0

    with testing.sandboxing():
        async with registry.lifespan() as lifespan:
            for _ in range(2):
                async with lifespan.sandbox():
                    await until(
                        lambda: (lifespan[lead].state, lifespan[migrate].state) == ("running", "ended")
                    )
                    await _no_sessions(postgres)
    assert len(numbers) == 2


async def test_the_example_reports_in_one_process_of_several(
    postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from how_to import leading as example

    monkeypatch.setenv("DATABASE_URL", postgres.url)
    async with example.registry.lifespan() as first, example.registry.lifespan() as second:
        done = {"waiting", "standby"}
        await until(lambda: {each[example.report].state for each in (first, second)} == done)
        row = await first[example.db].fetchrow("SELECT name, leader FROM reports")
        assert row is not None
        assert row["name"] == "hourly"


# -- what stands between ---------------------------------------------------------------------------


@asynccontextmanager
async def _terminated(pool: asyncpg.Pool) -> AsyncGenerator[None]:
    yield
    pool.terminate()


class _Pooler:
    """Sessions as they look through a pooler: what a client is told of is the pooler's own."""

    def __init__(self, pool: asyncpg.Pool, *, shares: bool) -> None:
        self.pool, self.shares = pool, shares
        self.shared: Any = None
        self.ended: list[_Through] = []

    async def connect(self) -> _Through:
        if self.shared is None or not self.shares:
            self.shared = await self.pool.acquire()
        return _Through(self, self.shared)


class _Through(_lock.AsyncpgSession):
    def __init__(self, pooler: _Pooler, connection: Any) -> None:
        super().__init__(connection)
        self.number = -1
        self._pooler = pooler

    async def close(self) -> None:
        self.terminate()

    def terminate(self) -> None:
        self._pooler.ended.append(self)


async def test_a_pooler_that_shares_sessions_is_refused_and_another_is_not(postgres: Server) -> None:
    async with asyncpg.create_pool(postgres.url, min_size=1, max_size=4) as pool, _terminated(pool):
        sharing = _Pooler(pool, shares=True)
        lock = _lock.PostgresLock(sharing.connect, "shop.purge")
        with pytest.raises(
            DeclarationError, match=r"shop\.purge: .* a pooler in transaction mode, such as"
        ):
            await lock.open(10.0)
        assert len(sharing.ended) == 2
        apart = _Pooler(pool, shares=False)
        lock = _lock.PostgresLock(apart.connect, "shop.purge")
        await lock.open(10.0)
        assert await lock.acquire(10.0)
        assert len(apart.ended) == 2  # closed, then cut off
        await lock.release()


POOLER = """
[databases]
* = host={address.hostname} port={address.port} user={address.username} password={address.password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
auth_file = {directory}/users.txt
pool_mode = {mode}
ignore_startup_parameters = extra_float_digits
logfile = {directory}/log
"""


@contextmanager
def _pgbouncer(postgres: Server, mode: str) -> Generator[str]:
    """Run a real one; give the URL by which clients reach the server through it."""
    program = shutil.which("pgbouncer")
    if program is None:
        pytest.skip("pgbouncer is not installed: apt install pgbouncer")
    address, port = urlsplit(postgres.url), random.randrange(20_000, 30_000)
    with TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)  # it runs as somebody else than root
        Path(directory, "users.txt").write_text(f'"{address.username}" ""\n')
        config = POOLER.format(address=address, port=port, directory=directory, mode=mode)
        Path(directory, "ini").write_text(config)
        user = ["-u", "nobody"] if os.getuid() == 0 else []
        pooler = subprocess.Popen([program, "-q", *user, f"{directory}/ini"])
        try:
            yield f"postgresql://{address.username}@127.0.0.1:{port}{address.path}"
        finally:
            pooler.terminate()
            pooler.wait(LIMIT)


@pytest.mark.parametrize("mode", ["transaction", "session"])
async def test_pgbouncer_is_refused_in_transaction_mode_alone(postgres: Server, mode: str) -> None:
    with _pgbouncer(postgres, mode) as url:

        async def connects() -> bool:
            with suppress(OSError):
                await (await asyncpg.connect(url, statement_cache_size=0)).close()
                return True
            return False

        await until(connects)
        async with asyncpg.create_pool(url, min_size=1, statement_cache_size=0) as pool:
            if mode == "session":
                async with lifekit.exclusive(pool, "migrations") as held:
                    assert held.number > 0
                return
            with pytest.raises(DeclarationError, match="a pooler in transaction mode, such as Pg"):
                async with lifekit.exclusive(pool, "migrations"):
                    pytest.fail("it is not exclusive")


# -- processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("asyncpg", "killed"),
        ("redis", "stopped"),
        pytest.param("asyncpg", "stopped", marks=pytest.mark.long),
        pytest.param("asyncpg", "disconnected", marks=pytest.mark.long),
        pytest.param("redis", "killed", marks=pytest.mark.long),
        pytest.param("sqlalchemy", "terminated", marks=pytest.mark.long),
    ],
)
async def test_when_a_leader_is_gone_another_leads_and_never_two_at_once(
    kind: str, how: str, postgres: Server, valkey: Server
) -> None:
    async with fleet_of(kind, postgres, valkey, lease=2.0) as fleet:
        for _ in range(3):
            fleet.start()
        number, leader = await fleet.leader()
        await disturb(fleet, how, leader)
        next_number, other = await fleet.leader(after=number)
        assert how == "disconnected" or other != leader
        if how == "stopped":
            os.kill(leader, signal.SIGCONT)
        before = await fleet.rows.fetchval("select count(*) from written")
        more = f"select count(*) > {before + 10} from written"
        await until(lambda: fleet.rows.fetchval(more))
        await until(lambda: fleet.rows.fetchval("select exists (select from migrated)"))
        migrations = await fleet.rows.fetchval("select count(*) from migrated")
        await fleet.check()
        assert next_number > number
        assert migrations == 1 or how == "stopped"  # which it may have been in the midst of it


@pytest.mark.proof
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["asyncpg", "sqlalchemy", "redis"])
async def test_never_two_at_once_however_often_leaders_are_gone(
    kind: str, postgres: Server, valkey: Server
) -> None:
    rounds = 200 * TIMES
    lease, waited = 2.0, list[float]()
    async with fleet_of(kind, postgres, valkey, lease) as fleet:
        for _ in range(8):
            fleet.start()
        number, leader = await fleet.leader()
        for _ in range(rounds):
            ways = ["killed", "stopped", "terminated", *["disconnected"] * (kind != "redis")]
            how = random.choice(ways)
            began = time.monotonic()
            await disturb(fleet, how, leader)
            stopped = leader if how == "stopped" else None
            number, leader = await fleet.leader(after=number)
            waited.append(time.monotonic() - began)
            print(f"{how}: {waited[-1]:.2f} s")
            if stopped is not None:
                os.kill(stopped, signal.SIGCONT)
            await anyio.sleep(random.uniform(0, lease / 4))
        await fleet.check()
    waited.sort()
    print(f"{kind}: a new leader after {waited[rounds // 2]:.2f} s, {waited[-1]:.2f} s at most")
