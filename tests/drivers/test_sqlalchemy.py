"""The driver of SQLAlchemy's async engines, on a real PostgreSQL server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, StaticPool

from lifekit import drivers
from lifekit._core.errors import DeclarationError
from lifekit._core.transient import is_transient
from lifekit.drivers.sqlalchemy import driver

from .conftest import Sessions, below, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    """SQLAlchemy's engines are asyncio's own."""
    return ("asyncio", {"use_uvloop": False})


class Engines:
    """Engines whose connections the server can tell by the test's name."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def new(self, dialect: str = "asyncpg", **options: Any) -> AsyncEngine:
        """An engine that nobody opened."""
        arguments: dict[str, Any] = {"application_name": self._sessions.name}
        if dialect == "asyncpg":
            arguments = {"server_settings": arguments}
        url = self._sessions.url.replace("postgresql://", f"postgresql+{dialect}://")
        return create_async_engine(url, connect_args=arguments, **options)

    async def open(self, dialect: str = "asyncpg", **options: Any) -> AsyncEngine:
        """An engine that the driver opened."""
        return await driver.open(self.new(dialect, **options))


@pytest.fixture
def engines(sessions: Sessions) -> Engines:
    """Makes engines."""
    return Engines(sessions)


@pytest.fixture(params=["asyncpg", "psycopg"])
async def engine(request: pytest.FixtureRequest, engines: Engines) -> AsyncIterator[AsyncEngine]:
    """An open engine, on each driver."""
    engine = await engines.open(request.param)
    yield engine
    driver.terminate(engine)


async def works(engine: AsyncEngine) -> None:
    """It answers."""
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT 7")) == 7


# -- open, check -----------------------------------------------------------------------------------


async def test_the_driver_is_found_by_the_type() -> None:
    """And for an engine that derives from another, too."""
    engine = create_async_engine("postgresql+asyncpg://nowhere")
    assert drivers.find(engine) is driver
    assert drivers.find(engine.execution_options(isolation_level="AUTOCOMMIT")) is driver


@pytest.mark.parametrize("kind", [AsyncAdaptedQueuePool, NullPool, StaticPool])
async def test_an_open_engine_keeps_the_class_of_its_pool(kind: Any, engines: Engines) -> None:
    """By isinstance, by name, and by the name of its logger, also when the engine was disposed of."""
    engine = await engines.open(poolclass=kind)
    await works(engine)
    await engine.dispose()
    await works(engine)
    assert isinstance(engine.pool, kind)
    assert type(engine.pool).__name__ == kind.__name__
    pool: Any = engine.pool
    assert pool.logger.name == f"{kind.__module__}.{kind.__name__}"
    await driver.close(engine)


async def test_check_passes_on_an_engine_that_works(engine: AsyncEngine) -> None:
    """And gives back the connection that it used."""
    await driver.check(engine)
    assert driver.holders(engine) == []


async def test_open_refuses_an_engine_with_connections_of_another_loop(engines: Engines) -> None:
    """Made and used at import time."""

    def elsewhere() -> AsyncEngine:
        async def used() -> AsyncEngine:
            engine = engines.new()
            await works(engine)
            return engine

        with asyncio.Runner() as runner:
            engine = runner.run(used())
            anyio.from_thread.run(refused, engine)
            runner.run(engine.dispose())
        return engine

    async def refused(engine: AsyncEngine) -> None:
        with pytest.raises(DeclarationError, match=r"another event loop\. Return create_async_engine"):
            await driver.open(engine)
        driver.terminate(engine)  # leaves what is another's alone

    engine = await anyio.to_thread.run_sync(elsewhere)
    await driver.open(engine)  # disposed of, it may come here
    await works(engine)
    await driver.close(engine)


async def test_an_engine_at_work_in_another_loop_survives_its_refusal(engines: Engines) -> None:
    """Two lifespans are handed one engine: the second is refused, the first goes on."""

    async def refuse(engine: AsyncEngine) -> None:
        with pytest.raises(DeclarationError):
            await driver.open(engine)
        driver.terminate(engine)

    def first_lifespan() -> None:
        with asyncio.Runner() as runner:
            engine = runner.run(engines.open())
            anyio.from_thread.run(refuse, engine)
            runner.run(works(engine))
            runner.run(driver.close(engine))

    await anyio.to_thread.run_sync(first_lifespan)


# -- close, holders --------------------------------------------------------------------------------


async def test_holders_are_lines_of_the_application(engine: AsyncEngine) -> None:
    """Not SQLAlchemy's, whether it was a connection, a session, or sync code."""
    expected = [below()]
    connection = await engine.connect()
    session = AsyncSession(engine)
    expected.append(below())
    await session.execute(text("SELECT 1"))
    third = AsyncSession(engine)

    def sync(session: Any) -> None:
        session.execute(text("SELECT 1"))

    await third.run_sync(sync)
    found = driver.holders(engine)
    assert [line for line in found if ".sync" not in line] == sorted(expected)
    assert len(found) == 3
    for each in (connection, session, third):
        await each.close()
    assert driver.holders(engine) == []


async def test_holders_outlast_a_dispose_by_the_application(engine: AsyncEngine) -> None:
    """A connection that is out stays open."""
    line = below()
    connection = await engine.connect()
    await engine.dispose()
    assert driver.holders(engine) == [line]
    await connection.close()
    assert driver.holders(engine) == []


@pytest.mark.parametrize("detached", [False, True])
async def test_close_waits_for_the_connections_that_are_out(
    detached: bool, engine: AsyncEngine, sessions: Sessions
) -> None:
    """Which dispose() alone would leave open."""
    if detached and engine.driver == "psycopg":
        pytest.skip("SQLAlchemy itself never closes it")
    connection = await engine.connect()
    if detached:
        await (await connection.get_raw_connection()).detach() if False else None
        (await connection.get_raw_connection()).detach()
    closing = asyncio.create_task(driver.close(engine))
    await until(lambda: sessions.count() == 1)
    assert not closing.done()
    assert await connection.scalar(text("SELECT 7")) == 7
    await connection.close()
    await closing
    await sessions.none_left()


async def test_an_engine_opens_again_once_it_closed(engine: AsyncEngine) -> None:
    """One made at import serves a lifespan after the other."""
    await driver.close(engine)
    await driver.open(engine)
    await works(engine)
    await driver.close(engine)


async def test_a_derived_engine_leaves_the_pool_to_the_other(engines: Engines) -> None:
    """Both are resources: the one that closes first disturbs nobody who uses the other."""
    engine = await engines.open()
    derived = await driver.open(engine.execution_options(isolation_level="AUTOCOMMIT"))
    async with engine.connect() as connection:
        await driver.close(derived)
        driver.terminate(await driver.open(derived))
        assert await connection.scalar(text("SELECT 7")) == 7
    await driver.close(engine)


# -- terminate -------------------------------------------------------------------------------------


async def test_terminate_cuts_every_connection(engine: AsyncEngine, sessions: Sessions) -> None:
    """Idle, in use, waited for; and lets none arrive any more."""
    connection = await engine.connect()
    await works(engine)
    busy = await engine.connect()
    query = asyncio.create_task(busy.execute(text("SELECT pg_sleep(60)")))
    await until(lambda: sessions.count("active"))
    driver.terminate(engine)
    with pytest.raises(DBAPIError):
        await query
    with pytest.raises(DBAPIError):
        await connection.execute(text("SELECT 1"))
    with pytest.raises(InvalidRequestError, match="cut off when its lifespan ended"):
        await engine.connect()
    await until(lambda: sessions.count("idle%") == 0)
    if engine.driver == "psycopg":  # the server sleeps on, and notices when it has the answer
        sessions.end_all()
    await sessions.none_left()
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    await connection.close()
    await busy.close()
    logging.getLogger("sqlalchemy.pool").setLevel(logging.NOTSET)


async def test_terminate_drops_a_connection_that_is_on_its_way(
    engines: Engines, sessions: Sessions
) -> None:
    """It is closed when it arrives."""
    engine = await engines.open()
    connecting = asyncio.create_task(engine.connect().start())
    await anyio.lowlevel.checkpoint()
    driver.terminate(engine)
    with pytest.raises(InvalidRequestError):
        await connecting
    await sessions.none_left()


# -- what it says ----------------------------------------------------------------------------------


async def test_describe_hides_the_password(engines: Engines) -> None:
    """Wherever the URL has it."""
    url = "postgresql+asyncpg://me:hunter2@db.example/shop?password=hunter3"
    engine = create_async_engine(url, pool_size=2, max_overflow=1)
    said = driver.describe(engine)
    assert said.startswith("SQLAlchemy engine of up to 3 connections, postgresql+asyncpg://me:***@db.")
    assert "hunter" not in said
    assert "of up to" not in driver.describe(create_async_engine(url, poolclass=NullPool))
    told = driver.describe(
        create_async_engine(f"{url}&odbc_connect=UID%3Dme%3BPWD%3Dhunter4&host=/run")
    )
    assert told.endswith("/shop?host=%2Frun")


async def test_what_may_pass_is_transient(engines: Engines, sessions: Sessions) -> None:
    """A server that is not there; not a wrong password, not a missing database."""
    for url, transient in [
        ("postgresql+asyncpg://me@127.0.0.1:1/x", True),
        (
            sessions.url.replace("postgresql", "postgresql+asyncpg").replace("lifekit:", "lifekit:no"),
            False,
        ),
        (
            sessions.url.replace("postgresql", "postgresql+asyncpg").rpartition("/")[0] + "/absent",
            False,
        ),
    ]:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            await driver.check(create_async_engine(url))
        assert is_transient(caught.value) is transient


async def test_a_server_that_hangs_up_is_transient(engine: AsyncEngine, sessions: Sessions) -> None:
    """SQLAlchemy wraps the driver's error."""
    async with engine.connect() as connection:
        await connection.scalar(text("SELECT 1"))
        sessions.end_all()
        with pytest.raises(DBAPIError) as caught:
            await connection.scalar(text("SELECT 1"))
    assert is_transient(caught.value) or isinstance(caught.value, OperationalError)
