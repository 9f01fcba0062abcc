"""The driver of psycopg 3's pools, on a real PostgreSQL server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool, AsyncNullConnectionPool, PoolTimeout

from lifekit import Registry, ShutdownError, StartupError, drivers
from lifekit._core.errors import DeadlineError, DeclarationError
from lifekit._core.transient import is_transient
from lifekit.drivers.psycopg import driver

from ..depth import LOOPS
from .conftest import Sessions, below, ended, until

pytestmark = pytest.mark.anyio

Pool = AsyncConnectionPool[Any]


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> object:
    """psycopg is asyncio's own here."""
    return request.param


class Pools:
    """Pools whose connections the server can tell by the test's name."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions

    def new(self, kind: Any = AsyncConnectionPool, **options: Any) -> Pool:
        """A pool that is not open yet, of one or two connections."""
        given: dict[str, Any] = {"min_size": 1, "max_size": 2, "open": False, **options}
        kwargs: dict[str, Any] = {"application_name": self.sessions.name}
        kwargs.update(given.pop("kwargs", {}))
        pool: Pool = kind(self.sessions.url, kwargs=kwargs, **given)
        return pool

    async def open(self, kind: Any = AsyncConnectionPool, **options: Any) -> Pool:
        """A pool that the driver opened."""
        return await driver.open(self.new(kind, **options))


@pytest.fixture
def pools(sessions: Sessions) -> Pools:
    """Makes pools."""
    return Pools(sessions)


@pytest.fixture
def refusing() -> Iterator[str]:
    """The conninfo of a port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"postgresql://somebody:secret@127.0.0.1:{taken.getsockname()[1]}/some"


@pytest.fixture
def silent() -> Iterator[str]:
    """The conninfo of a server that accepts and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"postgresql://somebody@127.0.0.1:{server.getsockname()[1]}/some"


async def end(pool: Pool) -> None:
    """Close a pool as a lifespan does."""
    await driver.close(pool)
    await driver.wait_closed(pool)


def left(before: set[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    """The tasks that are still there and were not before."""
    return {task for task in asyncio.all_tasks() - before if not task.done()}


# -- open -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AsyncConnectionPool, AsyncNullConnectionPool])
async def test_the_driver_is_found_for_both_kinds_of_pools(kind: Any, pools: Pools) -> None:
    """By their type."""
    assert drivers.find(pools.new(kind, min_size=0)) is driver


async def test_open_fills_the_pool_and_returns_the_same_one(pools: Pools) -> None:
    """All of min_size are there, and the pool passes for what it was."""
    pool = pools.new(min_size=2)
    assert await driver.open(pool) is pool
    assert pools.sessions.count() == 2
    assert isinstance(pool, AsyncConnectionPool)
    assert type(pool).__qualname__ == "AsyncConnectionPool"
    await end(pool)


async def test_open_takes_a_pool_that_the_factory_opened(pools: Pools) -> None:
    """`await pool.open()` inside the factory is no harm."""
    pool = pools.new()
    await pool.open(wait=True)
    assert await driver.open(pool) is pool
    assert pools.sessions.count() == 1
    await end(pool)


async def test_open_takes_a_pool_whose_constructor_opened_it(pools: Pools) -> None:
    """It warns by itself where it was told to; lifekit adds no warning."""
    with pytest.warns(RuntimeWarning, match="constructor"):
        pool = pools.new(open=True)
    await end(await driver.open(pool))


async def test_open_without_a_word_about_open_warns_of_nothing(pools: Pools) -> None:
    """The pool would warn at its first use, and its use here is lifekit's."""
    pool = await driver.open(pools.new(open=None))
    await driver.check(pool)
    await end(pool)


async def test_open_refuses_a_pool_of_another_loop(pools: Pools) -> None:
    """It would work, and fail to close."""
    there = asyncio.new_event_loop()
    pool = pools.new()
    await asyncio.to_thread(there.run_until_complete, pool.open(wait=True))
    with pytest.raises(DeclarationError, match=r"another event loop.*open=False"):
        await driver.open(pool)
    await driver.terminate(pool)  # which is not its business
    assert not pool.closed
    await asyncio.to_thread(there.run_until_complete, pool.close())
    there.close()


async def test_open_refuses_a_closed_pool(pools: Pools) -> None:
    """A pool opens once."""
    pool = await pools.open()
    await end(pool)
    with pytest.raises(DeclarationError, match=r"closed already.*open=False"):
        await driver.open(pool)


async def test_a_wrong_password_fails_at_once_and_says_so(pools: Pools) -> None:
    """Not after 30 seconds of PoolTimeout, and the pool's tasks are gone."""
    before = asyncio.all_tasks()
    pool = pools.new(kwargs={"password": "wrong"}, min_size=2)
    async with asyncio.timeout(60):
        with pytest.raises(psycopg.OperationalError, match="password authentication failed") as caught:
            await driver.open(pool)
    assert not isinstance(caught.value, PoolTimeout)
    assert not is_transient(caught.value)
    assert pool.closed
    assert not left(before)


@pytest.mark.parametrize("turns", range(5))
async def test_terminate_ends_a_scheduler_that_has_just_been_told_something(
    pools: Pools, turns: int
) -> None:
    """As it has been where a connection failed: it may swallow a cancellation then."""
    before = asyncio.all_tasks()
    pool: Any = pools.new(min_size=0)
    await driver.open(pool)
    await asyncio.sleep(0)  # so that it waits
    await pool._sched.enter(60, None)
    for _ in range(turns):
        await asyncio.sleep(0)
    async with asyncio.timeout(60):
        await driver.terminate(pool)
    assert not left(before)


async def test_a_refused_connection_is_transient(refusing: str) -> None:
    """It fails at once as well: whether to try again is for `retry` to say."""
    before = asyncio.all_tasks()
    pool: Pool = AsyncConnectionPool(refusing, open=False)
    async with asyncio.timeout(60):
        with pytest.raises(psycopg.OperationalError) as caught:
            await driver.open(pool)
    assert is_transient(caught.value)
    assert not left(before)


async def test_an_opening_that_is_cut_off_leaves_no_task(silent: str) -> None:
    """The workers end that wait for a server's first word."""
    before = asyncio.all_tasks()
    registry = Registry()

    @registry.resource(start_timeout=0.05)
    def db() -> Pool:
        return AsyncConnectionPool(silent, open=False)

    with pytest.raises(StartupError) as caught:
        async with registry.lifespan():
            pass
    assert caught.group_contains(DeadlineError)
    assert not left(before)


async def test_a_factory_whose_own_opening_is_cut_off_leaves_no_task(silent: str) -> None:
    """Nobody but the traceback knows that pool."""
    before = asyncio.all_tasks()
    registry = Registry()

    @registry.resource(start_timeout=0.05)
    async def db() -> Pool:
        pool: Pool = AsyncConnectionPool(silent, open=False)
        await pool.open(wait=True)
        return pool

    with pytest.raises(StartupError):
        async with registry.lifespan():
            pass
    await ended(before)


# -- close ------------------------------------------------------------------------------------


async def test_close_waits_for_a_connection_that_is_out(pools: Pools) -> None:
    """The pool's own close() would leave it behind."""
    pool = await pools.open()
    closing: asyncio.Task[None]
    async with pool.connection() as connection:
        closing = asyncio.create_task(end(pool))
        await until(lambda: pool.closed)
        await connection.execute("SELECT 1")
        assert not closing.done()
    await closing
    await pools.sessions.none_left()


async def test_holders_name_line_and_task_of_each_connection_that_is_out(pools: Pools) -> None:
    """For `connection()` and for `getconn()`, and for none that came back."""
    pool = await pools.open()
    async with pool.connection():
        pass
    assert driver.holders(pool) == []
    line = below()
    async with pool.connection():
        other = below()
        connection = await pool.getconn()
        assert driver.holders(pool) == sorted([line, other])
        await pool.putconn(connection)
        assert driver.holders(pool) == [line]
    await end(pool)


async def test_a_deadline_names_the_holder_and_terminate_cuts_it(pools: Pools) -> None:
    """The shutdown goes on without it."""
    registry = Registry(close_timeout=0.05)

    @registry.resource
    def db() -> Pool:
        return pools.new()

    before = asyncio.all_tasks()
    taken: list[Any] = []
    with pytest.raises(ShutdownError) as caught:
        async with registry.lifespan() as lifespan:
            taken.append(below())
            taken.append(await lifespan[db].getconn())
    line, connection = taken
    assert line in str(caught.value.exceptions[0])
    assert connection.closed
    assert not left(before)
    await pools.sessions.none_left()


async def test_terminate_wakes_who_waits_for_a_connection(pools: Pools) -> None:
    """With the pool's own error."""
    pool = await pools.open(max_size=1)
    await pool.getconn()
    waiting = asyncio.create_task(pool.getconn())
    await until(lambda: pool.get_stats()["requests_waiting"])
    await driver.terminate(pool)
    with pytest.raises(psycopg.OperationalError, match="is closed"):
        await waiting
    await driver.terminate(pool)
    await pools.sessions.none_left()


async def test_a_null_pool_opens_and_closes(pools: Pools) -> None:
    """It keeps nothing, and is waited for as well."""
    pool = await pools.open(AsyncNullConnectionPool, min_size=0)
    async with pool.connection():
        assert len(driver.holders(pool)) == 1
    await end(pool)
    await pools.sessions.none_left()


# -- texts ------------------------------------------------------------------------------------


async def test_describe_hides_the_password(pools: Pools) -> None:
    """And tells the sizes and the server, whatever way it was given."""
    url = urlsplit(pools.sessions.url)
    text = driver.describe(pools.new())
    assert text.startswith("psycopg pool of 1 to 2, postgresql://")
    assert f"{url.hostname}:{url.port}{url.path}" in text

    def told(conninfo: Any, **options: Any) -> str:
        pool: Pool = AsyncConnectionPool(conninfo, open=False, min_size=1, **options)
        return driver.describe(pool).partition(", ")[2]

    assert told("host=h user=u password=hush dbname=d") == "postgresql://u:***@h/d"
    assert told("host=h", kwargs={"user": "u", "password": "hush"}) == "postgresql://u:***@h/"
    assert told("") == "the server that PGHOST names"
    assert told("host='hush") == "a malformed conninfo"
    assert told(lambda: "password=hush") == "the server that a function names"


@pytest.mark.parametrize(
    ("text", "transient"),
    [
        ("connection failed: FATAL:  the database system is starting up", True),
        ("connection failed: FATAL:  sorry, too many clients already", True),
        ("connection timeout expired", True),
        ('connection failed: FATAL:  password authentication failed for user "u"', False),
        ('connection failed: FATAL:  database "x" does not exist', False),
    ],
)
def test_what_may_pass_is_transient(text: str, transient: bool) -> None:
    """A server that is not there yet, not one that refuses."""
    assert is_transient(psycopg.OperationalError(text)) is transient
