"""The aiopg driver, on a real PostgreSQL server."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import aiopg
import anyio
import anyio.from_thread
import anyio.to_thread
import psycopg2
import pytest
from psycopg2 import errors

from lifekit._core.errors import DeclarationError
from lifekit.drivers.aiopg import driver

from ..depth import LOOPS
from .conftest import Sessions, below, ended, until

pytestmark = pytest.mark.anyio


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> object:
    """aiopg is asyncio's own."""
    return request.param


class Pools:
    """Pools whose connections the server can tell by the test's name."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions

    def new(self, **options: Any) -> Awaitable[aiopg.Pool]:
        """What create_pool() returns, for one or two connections."""
        given: dict[str, Any] = {"minsize": 1, "maxsize": 2, "enable_hstore": False, **options}
        return aiopg.create_pool(self.sessions.url, application_name=self.sessions.name, **given)

    async def open(self, **options: Any) -> aiopg.Pool:
        """A pool that the driver opened."""
        return await driver.open(await self.new(**options))


@pytest.fixture
def pools(sessions: Sessions) -> Pools:
    """Makes pools."""
    return Pools(sessions)


async def close(pool: aiopg.Pool) -> None:
    """Both phases, as the engine runs them."""
    driver.close(pool)
    await driver.wait_closed(pool)


def third_fails() -> Callable[[aiopg.Connection], Awaitable[None]]:
    """An `on_connect` that fails on the third connection."""
    calls = 0

    async def on_connect(_: aiopg.Connection) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise LookupError("the third one")

    return on_connect


# -- open -------------------------------------------------------------------------------------


async def test_open_takes_what_create_pool_gave(pools: Pools, sessions: Sessions) -> None:
    """The pool is open already, and stays the same object and a Pool by isinstance and name."""
    pool = await pools.new(minsize=2)
    assert await driver.open(pool) is pool
    assert isinstance(pool, aiopg.Pool)
    assert (type(pool).__name__, type(pool).__doc__) == ("Pool", aiopg.Pool.__doc__)
    assert sessions.count() == 2
    await close(pool)


async def test_pools_of_one_class_share_their_noting_class(pools: Pools) -> None:
    """Opening many pools makes no more classes."""
    first, second = await pools.open(minsize=0), await pools.open(minsize=0)
    assert type(first) is type(second)
    await close(first)
    await close(second)


async def test_a_users_subclass_stays_itself_and_is_noted(sessions: Sessions) -> None:
    """A subclass keeps its type and its name, and its holders are known."""

    class Mine(aiopg.Pool):
        """A user's own."""

    pool: Any = await Mine.from_pool_fill(
        sessions.url,
        1,
        1,
        60.0,
        enable_json=True,
        enable_hstore=False,
        enable_uuid=True,
        echo=False,
        on_connect=None,
        pool_recycle=-1,
    )
    await driver.open(pool)
    assert isinstance(pool, Mine)
    assert type(pool).__name__ == "Mine"
    line = below()
    async with pool.acquire():
        assert driver.holders(pool) == [line]
    await close(pool)


async def test_open_refuses_a_pool_that_is_closed(pools: Pools) -> None:
    """A pool made elsewhere and closed by an earlier lifespan: the message says the mend."""
    pool = await pools.new(minsize=0)
    pool.close()
    with pytest.raises(DeclarationError, match=r"closed already\. Return aiopg\.create_pool"):
        await driver.open(pool)
    await pool.wait_closed()
    with pytest.raises(DeclarationError, match=r"closed already\. Return aiopg\.create_pool"):
        await driver.open(pool)


async def test_a_pool_at_work_in_another_loop_survives_its_refusal(pools: Pools) -> None:
    """Two lifespans are handed one pool: the second is refused, the first goes on."""

    async def refuse(pool: aiopg.Pool) -> None:
        with pytest.raises(DeclarationError, match=r"another event loop\. Return aiopg\.create"):
            await driver.open(pool)
        driver.terminate(pool)

    def first_lifespan() -> None:
        with asyncio.Runner() as runner:
            pool = runner.run(pools.open())
            anyio.from_thread.run(refuse, pool)
            runner.run(driver.check(pool))
            runner.run(close(pool))

    await anyio.to_thread.run_sync(first_lifespan)


# -- what did not open --------------------------------------------------------------------------


async def test_a_pool_that_failed_half_way_is_salvaged(pools: Pools, sessions: Sessions) -> None:
    """It was never returned, and aiopg leaves open what it had opened."""
    with pytest.raises(LookupError) as caught:
        await pools.new(minsize=5, maxsize=5, on_connect=third_fails())
    assert sessions.count() == 3
    driver.salvage(caught.value)
    await sessions.none_left()
    del caught
    gc.collect()  # what is left warns when it is collected, and a warning is an error


async def test_a_pool_that_fails_on_a_full_server_is_salvaged(pools: Pools, sessions: Sessions) -> None:
    """The server refuses the third connection."""
    role = f"full_{sessions.name}"
    sessions.run(f"CREATE ROLE {role} LOGIN PASSWORD 'hush' CONNECTION LIMIT 2")
    with pytest.raises(psycopg2.OperationalError) as caught:
        await pools.new(minsize=5, maxsize=5, user=role, password="hush")
    assert sessions.count() == 2
    driver.salvage(caught.value)
    await sessions.none_left()
    sessions.run(f"DROP ROLE {role}")


async def test_a_cancelled_opening_is_salvaged(pools: Pools, sessions: Sessions) -> None:
    """A deadline that strikes in the middle of the opening."""
    begun = asyncio.Event()

    async def stuck(_: aiopg.Connection) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def factory() -> aiopg.Pool:
        return await pools.new(on_connect=stuck)

    opening = asyncio.create_task(factory())
    await begun.wait()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await opening
    driver.salvage(caught.value)
    await sessions.none_left()


async def test_salvage_leaves_alone_a_pool_that_is_open(pools: Pools) -> None:
    """One that is merely used where something fails goes on."""
    pool = await pools.open()
    with pytest.raises(errors.UndefinedTable) as caught:
        async with pool.acquire() as connection, connection.cursor() as cursor:
            await cursor.execute("SELECT * FROM absent")
    driver.salvage(caught.value)
    await driver.check(pool)
    await close(pool)


# -- check, close -------------------------------------------------------------------------------


async def test_check_asks_the_server(pools: Pools, sessions: Sessions) -> None:
    """And gives back the connection that it used."""
    pool = await pools.open()
    await driver.check(pool)
    asked = "SELECT query FROM pg_stat_activity WHERE application_name = %s"
    assert sessions.run(asked, sessions.name) == "SELECT 1"
    assert driver.holders(pool) == []
    await close(pool)


async def test_check_finds_out_what_a_lazy_pool_hides(pools: Pools) -> None:
    """With minsize=0 a pool opens without a single connection."""
    pool = await pools.open(minsize=0, dbname="absent")
    with pytest.raises(psycopg2.OperationalError, match="does not exist"):
        await driver.check(pool)
    await close(pool)


async def test_close_lets_no_one_in_and_wait_closed_waits(pools: Pools, sessions: Sessions) -> None:
    """Two phases: from the first on nobody acquires, after the second nothing is open."""
    pool = await pools.open(minsize=2)
    connection = await pool.acquire()
    driver.close(pool)
    with pytest.raises(RuntimeError, match="after closing pool"):
        await pool.acquire()
    waiting = asyncio.ensure_future(driver.wait_closed(pool))
    await until(lambda: sessions.count() == 1)  # the idle one is closed
    assert not waiting.done()
    await pool.release(connection)
    await waiting
    await sessions.none_left()


# -- terminate ----------------------------------------------------------------------------------


async def idle(pools: Pools) -> aiopg.Pool:
    """Open and not used."""
    return await pools.open()


async def in_use(pools: Pools) -> aiopg.Pool:
    """One connection is out and forgotten, one idle."""
    pool = await pools.open(minsize=2)
    await pool.acquire()
    return pool


async def closed(pools: Pools) -> aiopg.Pool:
    """Closed as it should be."""
    pool = await pools.open()
    await close(pool)
    return pool


async def terminated(pools: Pools) -> aiopg.Pool:
    """Terminated once already."""
    pool = await in_use(pools)
    driver.terminate(pool)
    return pool


async def terminated_by_aiopg(pools: Pools) -> aiopg.Pool:
    """Terminated by its own method, which leaves the idle connection open."""
    pool = await in_use(pools)
    pool.terminate()
    return pool


async def closing(pools: Pools) -> aiopg.Pool:
    """Between the phases."""
    pool = await in_use(pools)
    driver.close(pool)
    return pool


async def cancelled_wait(pools: Pools) -> aiopg.Pool:
    """Its wait_closed() ran out of time."""
    pool = await closing(pools)
    with anyio.move_on_after(0.01):
        await driver.wait_closed(pool)
    return pool


async def holding_a_closed_one(pools: Pools) -> aiopg.Pool:
    """Whoever holds a connection has closed it."""
    pool = await pools.open(minsize=2)
    (await pool.acquire()).close()
    return pool


async def cut_off_by_the_server(pools: Pools) -> aiopg.Pool:
    """The server has ended every connection."""
    pool = await in_use(pools)
    pools.sessions.end_all()
    await pools.sessions.none_left()
    return pool


@pytest.mark.parametrize(
    "state",
    [
        idle,
        in_use,
        closed,
        terminated,
        terminated_by_aiopg,
        closing,
        cancelled_wait,
        holding_a_closed_one,
        cut_off_by_the_server,
    ],
)
async def test_terminate_cuts_every_connection_in_any_state(
    state: Any, pools: Pools, sessions: Sessions
) -> None:
    """It raises nothing and leaves nothing."""
    before = asyncio.all_tasks()
    pool = await state(pools)
    driver.terminate(pool)
    await ended(before)
    await sessions.none_left()
    assert (pool.closed, pool.size) == (True, 0)


async def test_terminate_ends_the_waiting_for_a_forgotten_connection(
    pools: Pools, sessions: Sessions
) -> None:
    """aiopg's own does not: its wait_closed() waits on for ever."""
    pool = await in_use(pools)
    driver.close(pool)
    waiting = asyncio.ensure_future(driver.wait_closed(pool))
    await until(lambda: sessions.count() == 1)
    driver.terminate(pool)
    await asyncio.wait_for(waiting, 60)


async def test_a_terminated_connection_can_be_given_back(pools: Pools, sessions: Sessions) -> None:
    """Whoever holds it gets an error from its query, and none from leaving its block."""
    pool = await pools.open()

    async def report() -> None:
        async with pool.acquire() as connection, connection.cursor() as cursor:
            await cursor.execute("SELECT pg_sleep(60)")

    reporting = asyncio.create_task(report())
    await until(lambda: sessions.count("active"))
    driver.terminate(pool)
    with pytest.raises(psycopg2.OperationalError, match="Connection closed"):
        await reporting
    sessions.end_all()  # asleep, the server would not notice for a minute


async def test_all_who_wait_for_a_terminated_pool_are_told(pools: Pools, sessions: Sessions) -> None:
    """aiopg would leave one waiting, and connect anew for the other."""
    connected = 0

    async def on_connect(_: aiopg.Connection) -> None:
        nonlocal connected
        connected += 1

    pool: Any = await pools.open(minsize=1, maxsize=1, on_connect=on_connect)
    await pool.acquire()
    waiting = [asyncio.create_task(driver.check(pool)) for _ in range(2)]
    await until(lambda: len(pool._cond._waiters) == 2)
    driver.terminate(pool)
    for task in waiting:
        with pytest.raises(RuntimeError, match="after closing pool"):
            await task
    assert connected == 1
    await sessions.none_left()


async def test_a_connection_that_arrives_after_terminate_is_closed(
    pools: Pools, sessions: Sessions
) -> None:
    """It was on its way: only the task that waits for it knows it."""
    connecting, go_on = asyncio.Event(), asyncio.Event()

    async def on_connect(_: aiopg.Connection) -> None:
        connecting.set()
        await go_on.wait()

    pool = await pools.open(minsize=0, on_connect=on_connect)
    acquiring = asyncio.create_task(driver.check(pool))
    await connecting.wait()
    tasks = asyncio.all_tasks()
    driver.terminate(pool)
    assert asyncio.all_tasks() == tasks  # none that would wait for that connection as well
    go_on.set()
    with pytest.raises(RuntimeError, match="after closing pool"):
        await acquiring
    await sessions.none_left()
    assert pool.size == 0


async def test_a_terminated_pool_that_was_never_noted_lets_no_one_in(pools: Pools) -> None:
    """One that a factory opened, and yields, the driver never opened."""
    pool = await pools.new()
    driver.terminate(pool)
    with pytest.raises(RuntimeError, match="after closing pool"):
        await pool.acquire()


async def test_terminate_leaves_alone_who_has_a_closed_connections_descriptor(
    pools: Pools, sessions: Sessions
) -> None:
    """A descriptor that is free is given to the next who asks; closing twice would cut that off."""
    pool = await pools.open()
    connection = await pool.acquire()
    descriptor = connection.raw.fileno()
    connection.close()
    ours, theirs = socket.socketpair()
    assert descriptor in {ours.fileno(), theirs.fileno()}
    if descriptor == theirs.fileno():
        ours, theirs = theirs, ours
    heard = asyncio.Event()
    asyncio.get_running_loop().add_reader(descriptor, heard.set)
    driver.terminate(pool)
    theirs.send(b"x")
    await asyncio.wait_for(heard.wait(), 60)
    asyncio.get_running_loop().remove_reader(descriptor)
    ours.close()
    theirs.close()
    await sessions.none_left()


# -- holders ------------------------------------------------------------------------------------


async def test_nobody_holds_what_was_given_back(pools: Pools) -> None:
    """A connection is named while it is out, and no longer."""
    pool = await pools.open()
    async with pool.acquire():
        assert len(driver.holders(pool)) == 1
    assert driver.holders(pool) == []
    await close(pool)


async def test_a_holder_is_named_by_its_line_function_and_task(pools: Pools) -> None:
    """Acquired with `async with`."""
    pool = await pools.open()
    line = below()
    async with pool.acquire():
        assert driver.holders(pool) == [line]
    await close(pool)


async def test_a_forgotten_connection_is_named(pools: Pools) -> None:
    """Acquired, dropped, never given back."""
    pool = await pools.open()

    async def slow_report() -> str:
        line = below()
        await pool.acquire()
        return line

    line = await asyncio.create_task(slow_report(), name="nightly")
    assert driver.holders(pool) == [line]
    assert line.endswith("slow_report (task 'nightly')")
    driver.terminate(pool)


async def test_a_holder_with_a_timeout_is_named(pools: Pools) -> None:
    """On Python 3.11 wait_for() acquires in a task of its own; the line is still the user's."""
    pool = await pools.open()
    line = below()
    connection = await asyncio.wait_for(pool.acquire(), 60)
    assert driver.holders(pool) == [line]
    await pool.release(connection)
    await close(pool)


async def test_a_cursor_of_the_pool_itself_is_named(pools: Pools) -> None:
    """`pool.cursor()` acquires inside aiopg; the line is the one that called it."""
    pool = await pools.open()
    line = below()
    with await pool.cursor():
        assert driver.holders(pool) == [line]
    await close(pool)


async def test_every_holder_has_its_line_in_a_fixed_order(pools: Pools) -> None:
    """One line for each connection, sorted."""
    pool = await pools.open()
    first = below()
    async with pool.acquire():
        second = below()
        async with pool.acquire():
            assert driver.holders(pool) == sorted([first, second])
    await close(pool)


# -- describe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(
    ("dsn", "given", "text"),
    [
        ("postgresql://shop:hush@db:5432/shop", {}, "postgresql://shop:***@db:5432/shop"),
        ("host=db user=shop password='hu sh' dbname=shop", {}, "postgresql://shop:***@db/shop"),
        ("postgresql://shop:hu#sh@db/shop", {}, "postgresql://shop:***@db/shop"),
        ("postgresql://shop@db/shop", {"password": "hush"}, "postgresql://shop:***@db/shop"),
        (None, {"host": "db", "port": 5433, "database": "shop"}, "postgresql://db:5433/shop"),
        (None, {}, "the server that PGHOST names"),
        ("password=hush bogus=1", {}, "a malformed DSN"),
    ],
)
async def test_describe_tells_the_sizes_and_the_server(
    dsn: str | None, given: dict[str, Any], text: str
) -> None:
    """However the pool was told where to connect, and never a password."""
    pool = await aiopg.create_pool(dsn, minsize=0, maxsize=10, **given)
    assert driver.describe(pool) == f"aiopg pool of 0 to 10, {text}"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_describe_tells_of_a_pool_without_a_limit() -> None:
    """To aiopg a maxsize of 0 means that there is none."""
    pool = await aiopg.create_pool("host=db", minsize=0, maxsize=0)
    assert driver.describe(pool) == "aiopg pool of 0 to any number, postgresql://db/"


# -- transient ----------------------------------------------------------------------------------


async def failure(dsn: str, **options: Any) -> psycopg2.OperationalError:
    """What the opening of a pool fails with."""
    with pytest.raises(psycopg2.OperationalError) as caught:
        await aiopg.create_pool(dsn, **options)
    return caught.value


async def test_a_wrong_password_is_not_transient_and_not_shown(sessions: Sessions) -> None:
    """Trying again would only lock the account."""
    address = urlsplit(sessions.url)
    dsn = f"postgresql://lifekit:wrongsecret@{address.hostname}:{address.port}/lifekit"
    error = await failure(dsn)
    assert "password authentication failed" in str(error)
    assert not driver.transient(error)
    assert "wrongsecret" not in str(error)


@pytest.mark.parametrize("wrong", [{"dbname": "absent"}, {"user": "absent"}])
async def test_an_absent_database_or_role_is_not_transient(
    wrong: dict[str, str], sessions: Sessions
) -> None:
    """It will not come by itself."""
    assert not driver.transient(await failure(sessions.url, **wrong))


@pytest.mark.parametrize(
    "dsn", ["host=127.0.0.1 port=1", "host=/tmp/absent", "host=127.0.0.1,/tmp/absent port=1,2"]
)
async def test_a_server_that_is_not_up_is_transient(dsn: str) -> None:
    """Refused on TCP, or without its socket's file, on one host or on all."""
    assert driver.transient(await failure(dsn))


async def test_a_full_server_is_transient(sessions: Sessions) -> None:
    """Others will leave: here a role that may have no connection at all."""
    role = f"full_{sessions.name}"
    sessions.run(f"CREATE ROLE {role} LOGIN PASSWORD 'hush' CONNECTION LIMIT 0")
    assert driver.transient(await failure(sessions.url, user=role, password="hush"))
    sessions.run(f"DROP ROLE {role}")


async def test_a_server_that_hangs_up_is_transient() -> None:
    """A proxy without a server behind it."""

    def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert driver.transient(await failure(f"host=127.0.0.1 port={port} user=shop"))
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("FATAL:  the database system is starting up\n", True),
        ("FATAL:  the database system is shutting down\n", True),
        ("FATAL:  the database system is not yet accepting connections\n", True),
        ("FATAL:  sorry, too many clients already\n", True),
        ("timeout expired\n", True),
        ("could not connect to server: No such file or directory\n", True),
        ('FATAL:  database "shop" is not currently accepting connections\n', False),
        ('FATAL:  database "timeout expired" does not exist\n', False),
        ("Connection refused\nFATAL:  password authentication failed for user\n", False),
        ('could not open certificate file "x": No such file or directory\n', False),
        ("fe_sendauth: no password supplied\n", False),
    ],
)
def test_only_a_server_that_is_not_ready_is_transient(text: str, passes: bool) -> None:
    """What a real server can't be made to say on demand, in libpq's words."""
    assert driver.transient(psycopg2.OperationalError(text)) is passes


def test_other_errors_are_not_transient() -> None:
    """Whatever they say."""
    assert not driver.transient(LookupError("Connection refused"))
