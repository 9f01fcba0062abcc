"""The asyncpg driver, on a real PostgreSQL server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.from_thread
import anyio.to_thread
import asyncpg
import pytest
from asyncpg import exceptions

from lifekit._core.errors import DeclarationError
from lifekit._core.transient import is_transient
from lifekit.drivers.asyncpg import driver

from ..depth import LOOPS
from .conftest import Sessions, below, ended, until

pytestmark = pytest.mark.anyio

Pool = asyncpg.Pool


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> object:
    """asyncpg is asyncio's own."""
    return request.param


class Pools:
    """Pools whose connections the server can tell by the test's name."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def new(self, kind: Any = asyncpg.Pool, **options: Any) -> Pool:
        """A pool as create_pool() makes it: not open yet, of one or two connections."""
        given: dict[str, Any] = {
            "min_size": 1,
            "max_size": 2,
            "max_queries": 50000,
            "max_inactive_connection_lifetime": 300.0,
            "setup": None,
            "init": None,
            "loop": None,
            "connection_class": asyncpg.Connection,
            "record_class": asyncpg.Record,
            "server_settings": {"application_name": self._sessions.name},
        }
        pool: Pool = kind(self._sessions.url, **{**given, **options})
        return pool

    async def open(self, kind: Any = asyncpg.Pool, **options: Any) -> Pool:
        """A pool that the driver opened."""
        return await driver.open(self.new(kind, **options))


@pytest.fixture
def pools(sessions: Sessions) -> Pools:
    """Makes pools."""
    return Pools(sessions)


def third_fails() -> Callable[[Any], Any]:
    """An `init` that fails on the third connection, and takes a while on the others."""
    calls = 0

    async def init(connection: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise LookupError("the third one")
        await connection.execute("SELECT 1")

    return init


class Plain(asyncpg.Pool):
    """A user's subclass, whose instances have a __dict__."""


class Slotted(asyncpg.Pool):
    """A user's subclass with slots of its own."""

    __slots__ = ("extra",)


class Final(asyncpg.Pool):
    """A user's subclass that nobody may subclass."""

    def __init_subclass__(cls) -> None:
        raise RuntimeError("no more")


# -- open -------------------------------------------------------------------------------------


async def test_open_awaits_what_create_pool_returned(sessions: Sessions) -> None:
    """The pool that a factory returned is open, and is still the same object."""
    settings = {"application_name": sessions.name}
    pool = asyncpg.create_pool(sessions.url, min_size=2, max_size=2, server_settings=settings)
    assert await driver.open(pool) is pool
    assert sessions.count() == 2
    await pool.close()


async def test_open_takes_a_pool_that_the_factory_awaited(pools: Pools) -> None:
    """`return await asyncpg.create_pool(...)` works as well."""
    pool = await pools.new()
    assert await driver.open(pool) is pool
    await pool.close()


async def test_an_open_pool_is_still_a_pool(pools: Pools) -> None:
    """Its class passes for the one it had: by isinstance, by name and by the text of its help."""
    pool = await pools.open(min_size=0)
    assert isinstance(pool, asyncpg.Pool)
    assert (type(pool).__name__, type(pool).__doc__) == ("Pool", asyncpg.Pool.__doc__)
    await pool.close()


async def test_pools_of_one_class_share_their_noting_class(pools: Pools) -> None:
    """Opening many pools makes no more classes."""
    first, second = await pools.open(min_size=0), await pools.open(min_size=0)
    assert type(first) is type(second)
    await first.close()
    await second.close()


@pytest.mark.parametrize("kind", [Plain, Slotted])
async def test_a_users_subclass_stays_itself_and_is_noted(kind: type, pools: Pools) -> None:
    """A subclass keeps its type and its name, and its holders are known."""
    pool = await pools.open(kind)
    assert isinstance(pool, kind)
    assert type(pool).__name__ == kind.__name__
    line = below()
    connection = await pool.acquire()
    assert driver.holders(pool) == [line]
    await pool.release(connection)
    await pool.close()


async def test_a_class_that_cannot_be_subclassed_works_unnoted(pools: Pools) -> None:
    """No tracking is no reason to fail."""
    pool = await pools.open(Final)
    assert type(pool) is Final
    async with pool.acquire():
        assert driver.holders(pool) == ["an unknown line"]
    await pool.close()


async def test_open_refuses_a_pool_that_is_closed(pools: Pools) -> None:
    """A pool made at import time and closed by an earlier lifespan: the message says the mend."""
    pool = await pools.new(min_size=0)
    await pool.close()
    with pytest.raises(DeclarationError, match=r"closed already\. Return asyncpg\.create_pool"):
        await driver.open(pool)


async def test_open_refuses_a_pool_of_another_loop(pools: Pools) -> None:
    """A pool made at import time belongs to no lifespan's loop."""
    loop = asyncio.new_event_loop()
    with pytest.raises(DeclarationError, match=r"another event loop\. Return asyncpg\.create_"):
        await driver.open(pools.new(loop=loop))
    loop.close()


async def test_a_pool_at_work_in_another_loop_survives_its_refusal(pools: Pools) -> None:
    """Two lifespans are handed one pool: the second is refused, the first goes on."""

    async def refuse(pool: Pool) -> None:
        with pytest.raises(DeclarationError):
            await driver.open(pool)
        driver.terminate(pool)

    def first_lifespan() -> None:
        with asyncio.Runner() as runner:
            pool = runner.run(pools.open())
            anyio.from_thread.run(refuse, pool)
            assert runner.run(pool.fetchval("SELECT 7")) == 7
            runner.run(pool.close())

    await anyio.to_thread.run_sync(first_lifespan)


# -- what did not open --------------------------------------------------------------------------


async def test_a_pool_that_failed_half_way_leaves_no_connection(
    pools: Pools, sessions: Sessions
) -> None:
    """Not even those that were still on their way when one of them failed."""
    before = asyncio.all_tasks()
    pool = pools.new(min_size=5, max_size=5, init=third_fails())
    with pytest.raises(LookupError):
        await driver.open(pool)
    driver.terminate(pool)
    await ended(before)
    await sessions.none_left()


async def test_a_pool_that_failed_half_way_in_a_factory_is_salvaged(
    pools: Pools, sessions: Sessions
) -> None:
    """`return await asyncpg.create_pool(...)` failed: nobody has the pool, its traceback does."""
    before = asyncio.all_tasks()

    async def factory() -> Pool:
        return await pools.new(min_size=5, max_size=5, init=third_fails())

    with pytest.raises(LookupError) as caught:
        await factory()
    driver.salvage(caught.value)
    await ended(before)
    await sessions.none_left()


async def test_salvage_leaves_alone_a_pool_that_is_open(pools: Pools) -> None:
    """One that is merely used where something fails goes on."""
    pool = await pools.open()
    with pytest.raises(exceptions.UndefinedTableError) as caught:
        await pool.execute("SELECT * FROM absent")
    driver.salvage(caught.value)
    assert await pool.fetchval("SELECT 7") == 7
    await pool.close()


async def test_a_cancelled_opening_leaves_no_connection(pools: Pools, sessions: Sessions) -> None:
    """A deadline that strikes in the middle of the opening."""
    begun = asyncio.Event()

    async def stuck(_: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    pool = pools.new(init=stuck)
    opening = asyncio.create_task(driver.open(pool))
    await begun.wait()
    opening.cancel()
    await asyncio.wait([opening])
    driver.terminate(pool)
    await sessions.none_left()


async def test_an_opening_that_was_left_behind_opens_nothing(pools: Pools, sessions: Sessions) -> None:
    """It ignored its cancellation: once terminated, the pool closes what still arrives."""
    connecting, go_on = asyncio.Event(), asyncio.Event()

    async def setup(_: object) -> None:
        connecting.set()
        await go_on.wait()

    pool = pools.new(min_size=2, init=setup)
    opening = asyncio.create_task(driver.open(pool))
    await connecting.wait()
    driver.terminate(pool)
    go_on.set()
    await asyncio.wait([opening])
    opening.exception()
    await sessions.none_left()


# -- check, close -------------------------------------------------------------------------------


async def test_check_passes_on_a_pool_that_works(pools: Pools) -> None:
    """And gives back the connection that it used."""
    pool = await pools.open()
    await driver.check(pool)
    assert driver.holders(pool) == []
    await pool.close()


async def test_check_finds_out_what_a_lazy_pool_hides(pools: Pools) -> None:
    """With min_size=0 a pool opens without a single connection."""
    pool = await pools.open(min_size=0, database="absent")
    with pytest.raises(exceptions.InvalidCatalogNameError):
        await driver.check(pool)
    await pool.close()


async def test_close_waits_for_the_connections_that_are_out(pools: Pools, sessions: Sessions) -> None:
    """And then closes them all."""
    pool = await pools.open(min_size=2)
    connection = await pool.acquire()
    closing = asyncio.ensure_future(driver.close(pool))
    await until(pool.is_closing)
    assert sessions.count() == 2
    assert not closing.done()
    await pool.release(connection)
    await closing
    assert driver.wait_closed(pool) is None
    await sessions.none_left()


# -- terminate ----------------------------------------------------------------------------------


async def never_opened(pools: Pools) -> Pool:
    """Returned by a factory, then something else failed."""
    return pools.new()


async def idle(pools: Pools) -> Pool:
    """Open and not used."""
    return await pools.open()


async def in_use(pools: Pools) -> Pool:
    """One connection is out and forgotten, one idle."""
    pool = await pools.open(min_size=2)
    await pool.acquire()
    return pool


async def closed(pools: Pools) -> Pool:
    """Closed as it should be."""
    pool = await pools.open()
    await pool.close()
    return pool


async def terminated(pools: Pools) -> Pool:
    """Terminated once already."""
    pool = await in_use(pools)
    driver.terminate(pool)
    return pool


async def closing(pools: Pools) -> Pool:
    """Its close() is waiting."""
    pool = await in_use(pools)
    waiting = asyncio.ensure_future(driver.close(pool))
    await until(pool.is_closing)
    asyncio.get_running_loop().call_soon(waiting.cancel)  # so that the test leaves no task
    return pool


async def cancelled_close(pools: Pools) -> Pool:
    """Its close() ran out of time."""
    pool = await in_use(pools)
    with anyio.move_on_after(0.01):
        await driver.close(pool)
    return pool


async def interrupted_close(pools: Pools) -> Pool:
    """Its close() was dropped: asyncpg marks the pool as closed and leaves its connections."""
    pool = await in_use(pools)
    waiting: Any = pool.close()
    waiting.send(None)
    waiting.close()
    assert pool.get_size() == 2
    return pool


@pytest.mark.parametrize(
    "state",
    [
        never_opened,
        idle,
        in_use,
        closed,
        terminated,
        closing,
        cancelled_close,
        interrupted_close,
    ],
)
async def test_terminate_cuts_every_connection_in_any_state(
    state: Any, pools: Pools, sessions: Sessions
) -> None:
    """It raises nothing and leaves nothing."""
    driver.terminate(await state(pools))
    await sessions.none_left()


@pytest.mark.skipif(not hasattr(asyncpg.Pool, "_maintain_min_size"), reason="new in 0.32")
async def test_terminate_ends_the_task_that_replaces_lost_connections(
    pools: Pools, sessions: Sessions
) -> None:
    """asyncpg keeps up min_size by itself, in a task of its own."""
    before = asyncio.all_tasks()
    replacing = asyncio.Event()

    async def init(_: object) -> None:
        if lost:
            replacing.set()
            await asyncio.Event().wait()

    lost = False
    pool = pools.new(init=init)
    await driver.open(pool)
    lost = True
    sessions.end_all()
    await replacing.wait()
    driver.terminate(pool)
    await ended(before)
    await sessions.none_left()


async def test_a_query_on_a_terminated_connection_fails_at_once(
    pools: Pools, sessions: Sessions
) -> None:
    """Whoever holds it is not left waiting."""
    pool = await pools.open()
    async with pool.acquire() as connection:
        query = asyncio.create_task(connection.execute("SELECT pg_sleep(60)"))
        await until(lambda: sessions.count("active"))
        driver.terminate(pool)
        with pytest.raises(exceptions.ConnectionDoesNotExistError):
            await query


# -- holders ------------------------------------------------------------------------------------


async def test_nobody_holds_what_was_given_back(pools: Pools) -> None:
    """A connection is named while it is out, and no longer."""
    pool = await pools.open()
    async with pool.acquire():
        assert len(driver.holders(pool)) == 1
    assert driver.holders(pool) == []
    await pool.close()


async def test_a_holder_is_named_by_its_line_function_and_task(pools: Pools) -> None:
    """Acquired with `async with`."""
    pool = await pools.open()
    line = below()
    async with pool.acquire():
        assert driver.holders(pool) == [line]
    await pool.close()


@pytest.mark.parametrize("seconds", [None, 5.0])
async def test_a_forgotten_connection_is_named(seconds: float | None, pools: Pools) -> None:
    """Acquired, dropped, never given back, with a timeout or without."""
    pool = await pools.open()

    async def slow_report() -> str:
        line = below()
        await pool.acquire(timeout=seconds)
        return line

    line = await asyncio.create_task(slow_report(), name="nightly")
    assert driver.holders(pool) == [line]
    assert line.endswith("slow_report (task 'nightly')")
    driver.terminate(pool)


async def test_a_query_on_the_pool_itself_is_named(pools: Pools, sessions: Sessions) -> None:
    """`pool.fetch()` acquires inside asyncpg; the line is the one that called it."""
    pool = await pools.open()
    lines: list[str] = []

    async def report() -> None:
        lines.append(below())
        await pool.fetch("SELECT pg_sleep(60)")

    reporting = asyncio.create_task(report())
    await until(lambda: sessions.count("active"))
    assert driver.holders(pool) == lines
    driver.terminate(pool)
    await asyncio.wait([reporting])
    assert reporting.exception()


async def test_an_acquire_that_is_a_task_of_its_own_has_no_line(pools: Pools) -> None:
    """gather() acquires in tasks where no line of the application is on the stack."""
    pool = await pools.open()
    connections = await asyncio.gather(pool.acquire(), pool.acquire())
    held = driver.holders(pool)
    assert [line.partition(" (task ")[0] for line in held] == ["an unknown line"] * 2
    for connection in connections:
        await pool.release(connection)
    await pool.close()


async def test_every_holder_has_its_line_in_a_fixed_order(pools: Pools) -> None:
    """One line for each connection, sorted."""
    pool = await pools.open()
    first = below()
    async with pool.acquire():
        second = below()
        async with pool.acquire():
            assert driver.holders(pool) == sorted([first, second])
    await pool.close()


# -- describe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(
    ("args", "given", "text"),
    [
        (("postgresql://shop:hush@db:5432/shop",), {}, "postgresql://shop:***@db:5432/shop"),
        (("postgresql://shop@db/shop",), {}, "postgresql://shop@db/shop"),
        (("postgresql://u:hush@a:1,b:2/x?password=hush",), {}, "postgresql://u:***@a:1,b:2/x"),
        (
            (),
            {"host": "db", "port": 5433, "user": "shop", "password": "hush", "database": "shop"},
            "postgresql://shop:***@db:5433/shop",
        ),
        ((), {"host": ["a", "b"], "database": "shop"}, "postgresql://a,b/shop"),
        (("postgresql://shop@db/shop",), {"password": "hush"}, "postgresql://shop:***@db/shop"),
        (("postgresql://db/shop",), {"password": "hush"}, "postgresql://:***@db/shop"),
        ((), {"host": ["a", "b"], "port": [1, 2], "database": "x"}, "postgresql://a,b:1,2/x"),
        ((), {}, "the server that PGHOST names"),
        ((), {"password": "hush"}, "the server that PGHOST names"),
        (("postgresql://shop:hu#sh@db/shop",), {}, "a malformed DSN"),
        (("postgresql://shop:hu/sh@db/shop",), {}, "a malformed DSN"),
        (("postgresql://shop:[hush@db/shop",), {}, "a malformed DSN"),
    ],
)
async def test_describe_tells_the_sizes_and_the_server(
    args: tuple[str], given: dict[str, Any], text: str
) -> None:
    """However the pool was told where to connect, and never a password."""
    pool = asyncpg.create_pool(*args, min_size=2, max_size=10, **given)
    assert driver.describe(pool) == f"asyncpg pool of 2 to 10, {text}"


# -- transient ----------------------------------------------------------------------------------


async def failure(pool: Pool) -> Exception:
    """What the opening of *pool* fails with."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        await driver.open(pool)
    driver.terminate(pool)
    return caught.value


async def test_a_wrong_password_is_not_transient_and_not_shown(sessions: Sessions) -> None:
    """Trying again would only lock the account."""
    address = urlsplit(sessions.url)
    dsn = f"postgresql://lifekit:wrongsecret@{address.hostname}:{address.port}/lifekit"
    error = await failure(asyncpg.create_pool(dsn))
    assert isinstance(error, exceptions.InvalidPasswordError)
    assert not is_transient(error)
    assert "wrongsecret" not in str(error)


@pytest.mark.parametrize("wrong", [{"database": "absent"}, {"user": "absent"}])
async def test_an_absent_database_or_role_is_not_transient(wrong: dict[str, str], pools: Pools) -> None:
    """It will not come by itself."""
    error = await failure(pools.new(**wrong))
    assert isinstance(error, exceptions.PostgresError)
    assert not is_transient(error)


@pytest.mark.parametrize("down", [{"host": "127.0.0.1", "port": 1}, {"host": "/tmp/absent"}])
async def test_a_server_that_is_not_up_is_transient(down: dict[str, Any], pools: Pools) -> None:
    """Refused on TCP, or without its socket's file."""
    assert is_transient(await failure(pools.new(**down)))


async def test_a_full_server_is_transient(pools: Pools, sessions: Sessions) -> None:
    """Others will leave: here a role that may have no connection at all."""
    role = f"full_{sessions.name}"
    sessions.run(f"CREATE ROLE {role} LOGIN PASSWORD 'hush' CONNECTION LIMIT 0")
    error = await failure(pools.new(user=role, password="hush"))
    assert isinstance(error, exceptions.TooManyConnectionsError)
    assert driver.transient(error)
    sessions.run(f"DROP ROLE {role}")


async def test_a_server_that_hangs_up_is_transient() -> None:
    """A proxy without a server behind it."""

    def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    pool = asyncpg.create_pool(host="127.0.0.1", port=port, user="shop", ssl=False)
    assert is_transient(await failure(pool))
    server.close()
    await server.wait_closed()


async def test_a_connection_that_the_server_ended_is_transient(sessions: Sessions) -> None:
    """As at `pg_ctl stop -m fast`, in the middle of a check."""
    connection = await asyncpg.connect(sessions.url)
    sessions.run("SELECT pg_terminate_backend(%s, 5000)", connection.get_server_pid())
    with pytest.raises(exceptions.PostgresConnectionError) as caught:
        await connection.execute("SELECT 1")
    assert driver.transient(caught.value)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (exceptions.CannotConnectNowError("the database system is starting up"), True),
        (exceptions.AdminShutdownError("terminating connection"), True),
        (exceptions.ProtocolViolationError("no such user"), False),
        (exceptions.InterfaceError("pool is closed"), False),
        (LookupError("a bug"), False),
    ],
)
def test_only_a_server_that_is_not_ready_is_transient(error: Exception, passes: bool) -> None:
    """What a real server can't be made to say on demand."""
    assert driver.transient(error) is passes
