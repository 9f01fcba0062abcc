"""What drivers say, as the documentation has it: each message is one that a program really gives.

Most of these programs are the pains, whose texts ``tests/pains`` shows. The others are here.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiopg
import asyncpg
import httpx
import pytest
import redis.asyncio as redis
import uvicorn
from fastapi import FastAPI
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from uvicorn.lifespan.on import LifespanOn

from lifekit.embedded import Server

from .pages import DOCS, entries, pattern, plain, sections, words
from .pains.test_pains import PAINS

PAGE = DOCS / "errors-of-drivers.md"
NOWHERE = "127.0.0.1:1"


@dataclass(frozen=True)
class Servers:
    """Where the servers are."""

    postgres: str
    valkey: str

    @property
    def sqlalchemy(self) -> str:
        """What SQLAlchemy calls the first."""
        return self.postgres.replace("postgresql:", "postgresql+asyncpg:")


Program = Callable[[Servers], Awaitable[object]]
PROGRAMS: list[Program] = []


def program(function: Program) -> Program:
    """Let it be run: it raises, or returns, what is said."""
    PROGRAMS.append(function)
    return function


def _warned(caught: list[warnings.WarningMessage]) -> str:
    return "\n".join(f"{each.category.__name__}: {each.message}" for each in caught)


# -- asyncio -------------------------------------------------------------------------------------


@program
async def a_future_of_another_loop(_: Servers) -> None:
    other = asyncio.new_event_loop()
    try:
        await other.create_future()
    finally:
        other.close()


@program
async def run_in_a_loop(_: Servers) -> None:
    work = asyncio.sleep(0)
    try:
        asyncio.run(work)
    finally:
        work.close()


@program
async def a_runner_in_a_loop(_: Servers) -> None:
    work = asyncio.sleep(0)
    try:
        asyncio.Runner().run(work)
    finally:
        work.close()


@program
async def another_loop_in_a_loop(_: Servers) -> None:
    other, work = asyncio.new_event_loop(), asyncio.sleep(0)
    try:
        other.run_until_complete(work)
    finally:
        work.close()
        other.close()


@program
async def a_lock_of_another_loop(_: Servers) -> None:
    lock = asyncio.Lock()

    async def compete() -> None:
        async with lock:
            waiting = asyncio.ensure_future(lock.acquire())
            await asyncio.sleep(0)
            waiting.cancel()

    await asyncio.to_thread(asyncio.run, compete())
    async with lock:
        await lock.acquire()


@program
async def run_until_complete_in_a_loop(_: Servers) -> None:
    asyncio.get_running_loop().run_until_complete(asyncio.get_running_loop().create_future())


@program
async def no_loop_in_a_thread(_: Servers) -> None:
    await asyncio.to_thread(asyncio.get_running_loop)


@program
async def no_current_loop_in_a_thread(_: Servers) -> None:
    await asyncio.to_thread(asyncio.get_event_loop)


@program
async def closed_without_await(servers: Servers) -> str:
    client = redis.from_url(servers.valkey)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        client.aclose()  # type: ignore[unused-coroutine] # pyright: ignore
        gc.collect()
    await client.aclose()
    return _warned(caught)


# -- asyncpg -------------------------------------------------------------------------------------


@program
async def a_statement_of_a_closed_connection(servers: Servers) -> None:
    connection = await asyncpg.connect(servers.postgres)
    statement = await connection.prepare("SELECT 1")
    await connection.close()
    await statement.fetch()


@program
async def pool_is_closing(servers: Servers) -> None:
    pool: Any = await asyncpg.create_pool(servers.postgres, min_size=1)
    lent = await pool.acquire()
    closing = asyncio.create_task(pool.close())
    await asyncio.sleep(0)
    try:
        await pool.acquire()
    finally:
        await pool.release(lent)
        await closing


@program
async def pool_is_closed(servers: Servers) -> None:
    async with asyncpg.create_pool(servers.postgres, min_size=1) as pool:
        pass
    await pool.fetchval("SELECT 1")


@program
async def released_to_the_pool(servers: Servers) -> None:
    async with asyncpg.create_pool(servers.postgres, min_size=1) as pool:
        async with pool.acquire() as connection:
            pass
        await connection.fetchval("SELECT 1")


@asynccontextmanager
async def _connected(servers: Servers) -> AsyncGenerator[asyncpg.Connection]:
    connection = await asyncpg.connect(servers.postgres)
    try:
        yield connection
    finally:
        await connection.close()


@program
async def connection_is_closed(servers: Servers) -> None:
    async with _connected(servers) as connection:
        pass
    await connection.fetchval("SELECT 1")


@program
async def cut_off_by_the_server(servers: Servers) -> None:
    async with _connected(servers) as connection, _connected(servers) as other:
        query = asyncio.create_task(connection.fetchval("SELECT pg_sleep(50)"))
        active = "SELECT 1 FROM pg_stat_activity WHERE pid = $1 AND state = 'active'"
        while not await other.fetchval(active, connection.get_server_pid()):
            pass
        await other.fetchval("SELECT pg_terminate_backend($1)", connection.get_server_pid())
        await query


@program
async def a_transaction_by_hand(servers: Servers) -> None:
    async with _connected(servers) as connection:
        await connection.execute("BEGIN")
        async with connection.transaction():
            pass


@program
async def a_statement_of_before(servers: Servers) -> None:
    async with _connected(servers) as connection, _connected(servers) as other:
        await connection.execute("CREATE TEMPORARY TABLE before (a int)")
        await connection.execute("DROP TABLE IF EXISTS statement_of_before")
        await connection.execute("CREATE TABLE statement_of_before (a int)")
        try:
            await connection.fetch("SELECT * FROM statement_of_before")
            await other.execute("ALTER TABLE statement_of_before ALTER a TYPE text")
            async with connection.transaction():  # outside of one it is prepared anew
                await connection.fetch("SELECT * FROM statement_of_before")
        finally:
            await other.execute("DROP TABLE statement_of_before")


@program
async def asyncpg_finds_no_server(_: Servers) -> None:
    await asyncpg.connect(f"postgresql://u:p@{NOWHERE}/db")


# -- aiopg and psycopg ---------------------------------------------------------------------------


@program
async def aiopg_after_the_close(servers: Servers) -> None:
    async with aiopg.create_pool(servers.postgres, minsize=1) as pool:
        pass
    await pool.acquire()


@program
async def aiopg_in_two_tasks(servers: Servers) -> None:
    async with aiopg.connect(servers.postgres) as connection, connection.cursor() as cursor:
        first = asyncio.create_task(cursor.execute("SELECT pg_sleep(0.1)"))
        await asyncio.sleep(0)
        try:
            await cursor.execute("SELECT 1")
        finally:
            await first


@program
async def aiopg_finds_no_server(_: Servers) -> None:
    await aiopg.connect(f"postgresql://u:p@{NOWHERE}/db")


@program
async def psycopg_not_open(servers: Servers) -> None:
    async with AsyncConnectionPool(servers.postgres, open=False).connection():
        pass


@program
async def psycopg_closed(servers: Servers) -> None:
    pool = AsyncConnectionPool(servers.postgres, min_size=1, open=False)
    await pool.open()
    await pool.close()
    async with pool.connection():
        pass


@program
async def psycopg_all_in_use(servers: Servers) -> None:
    pool = AsyncConnectionPool(servers.postgres, min_size=1, timeout=0.05, open=False)
    async with pool, pool.connection(timeout=60), pool.connection():
        pass


@program
async def psycopg_finds_no_server(_: Servers) -> None:
    pool = AsyncConnectionPool(f"postgresql://u:p@{NOWHERE}/db", open=False)
    try:
        await pool.open(wait=True, timeout=0.05)
    finally:
        await pool.close()


# -- SQLAlchemy ----------------------------------------------------------------------------------


@asynccontextmanager
async def _engine(servers: Servers, **options: Any) -> AsyncGenerator[AsyncEngine]:
    engine = create_async_engine(servers.sqlalchemy, **options)
    try:
        yield engine
    finally:
        await engine.dispose()


class Base(DeclarativeBase):
    """What the one table below is declared with."""


class Read(Base):
    """A row that is read after its commit."""

    __tablename__ = "read_after_commit"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


@program
async def sqlalchemy_reads_after_a_commit(servers: Servers) -> None:
    async with _engine(servers) as engine, engine.connect() as connection:
        await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            row = Read(id=1, text="hello")
            session.add(row)
            await session.commit()
            assert row.text


@program
async def sqlalchemy_session_in_two_tasks(servers: Servers) -> None:
    async with _engine(servers) as engine:
        session = AsyncSession(engine)
        both = (session.execute(text("SELECT 1")) for _ in range(2))
        told = await asyncio.gather(*both, return_exceptions=True)
        await session.close()
    raise next(each for each in told if isinstance(each, Exception))


@program
async def sqlalchemy_all_in_use(servers: Servers) -> None:
    async with (
        _engine(servers, pool_size=1, max_overflow=0, pool_timeout=0.05) as engine,
        engine.connect(),
        engine.connect(),
    ):
        pass


@program
async def sqlalchemy_connection_is_garbage(servers: Servers) -> str:
    async with _engine(servers) as engine:
        connection = await engine.connect()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del connection
            gc.collect()
        return _warned(caught)


# -- Redis ---------------------------------------------------------------------------------------


@program
async def redis_finds_no_server(_: Servers) -> None:
    async with redis.from_url(f"redis://{NOWHERE}") as client:
        await client.get("key")


@program
async def redis_waits_longer_than_its_socket(servers: Servers) -> None:
    client: Any = redis.from_url(servers.valkey, socket_connect_timeout=60)
    async with client:
        await client.ping()
        client.connection_pool._available_connections[0].socket_timeout = 0.05
        await client.blpop(["nothing"], timeout=60)


@program
async def redis_has_no_connection_left(servers: Servers) -> None:
    client: Any = redis.from_url(servers.valkey, max_connections=1)
    async with client, client.pubsub() as subscriber:
        await subscriber.subscribe("news")
        await client.get("key")


@program
async def redis_closed_as_of_old(servers: Servers) -> str:
    client = redis.from_url(servers.valkey)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        await client.close()
    return _warned(caught)


# -- ASGI ----------------------------------------------------------------------------------------


@program
async def httpx_after_the_close(_: Servers) -> None:
    async with httpx.AsyncClient() as client:
        pass
    await client.get("http://example.org")


@program
async def starlette_has_no_handlers(_: Servers) -> None:
    arguments: dict[str, Any] = {"on_startup": []}
    Starlette(**arguments)


@program
async def starlette_adds_no_handlers(_: Servers) -> None:
    app: Any = Starlette()
    app.add_event_handler("startup", print)


@program
async def fastapi_handlers_are_deprecated(_: Servers) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FastAPI().on_event("startup")  # pyright: ignore[reportDeprecated]
    return _warned(caught)


@program
async def uvicorn_asks_for_a_lifespan(_: Servers) -> str:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    lines: list[str] = []
    handler = Lines()
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        for mode in ("auto", "on"):
            config: Any = uvicorn.Config(fails, lifespan=mode, log_config=None)
            await LifespanOn(config).startup()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return "\n".join(lines)


# -- pytest --------------------------------------------------------------------------------------

SUITE = """
import pytest

@pytest.fixture
async def db(): yield

async def test_runs_nowhere(): ...

def test_asks(db): ...
"""


def pytest_without_a_plugin(folder: Path) -> str:
    """Return what pytest says of async tests that nothing runs."""
    return _pytest(folder)


def pytest_asyncio_without_a_setting(folder: Path) -> str:
    """Return what pytest-asyncio says when no scope is set."""
    return _pytest(folder, "-p", "pytest_asyncio.plugin", "-W", "default")


def _pytest(folder: Path, *options: str) -> str:
    (folder / "test_suite.py").write_text(SUITE, "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    told = subprocess.run(
        [*command, *options, "test_suite.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return told.stdout + told.stderr


SUITES = [pytest_without_a_plugin, pytest_asyncio_without_a_setting]


# -- the page ------------------------------------------------------------------------------------


def _says(function: Program, servers: Servers) -> str:
    async def main() -> str:
        try:
            told = str(await function(servers))
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        return plain(told.replace(str(errno.ECONNREFUSED), "111"))

    logging.getLogger("psycopg.pool").disabled = True  # it warns of what is meant here
    return asyncio.run(main())


@pytest.fixture(scope="module")
def said(postgres: Server, valkey: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each program says."""
    servers = Servers(postgres.url, valkey.url)
    told = {each.__name__: _says(each, servers) for each in PROGRAMS}
    folder = tmp_path_factory.mktemp("suite")
    return told | {each.__name__: plain(each(folder)) for each in SUITES}


def _messages() -> list[str]:
    """Return the messages on the page: those in blocks, or else in the heading."""
    found: list[str] = []
    for section in sections(PAGE).values():
        for headings, texts in entries(section):
            found += texts or headings
    return found


PAINFUL = re.compile(
    r"(Error|Warning|Mismatch): \S|nclosed |destroyed|fixture '|different loop|taking over"
    r"|Invalid transaction|has no attribute"
)
"""What in the texts of the pains is a message."""


NOT_SAID_HERE: list[str] = [
    *(["a different loop than the one specified"] if sys.version_info >= (3, 12) else []),
    *(["ResourceWarning: loop is closed"] if sys.version_info[:2] == (3, 12) else []),
    *(["object MagicMock can't be"] if sys.version_info >= (3, 14) else []),
    *(["'MagicMock' object can't be"] if sys.version_info < (3, 14) else []),
]


def _is_a_pain(message: str) -> bool:
    texts = [" ".join(map(plain, pain.texts)) for pain in PAINS]
    return any(all(part in text for part in words(message)) for text in texts)


@pytest.mark.parametrize("name", [each.__name__ for each in (*PROGRAMS, *SUITES)])
def test_what_a_program_says_is_on_the_page(name: str, said: dict[str, str]) -> None:
    assert any(pattern(message).search(said[name]) for message in _messages()), said[name]


@pytest.mark.parametrize("message", _messages())
def test_a_message_on_the_page_is_given_by_a_program(message: str, said: dict[str, str]) -> None:
    if any(part in message for part in NOT_SAID_HERE):
        pytest.skip("another Python says so")
    shown = [name for name, told in said.items() if pattern(message).search(told)]
    assert shown or _is_a_pain(message)


@pytest.mark.parametrize(
    "pain", sorted({each for pain in PAINS for each in pain.texts if PAINFUL.search(each)})
)
def test_every_message_of_a_pain_is_on_the_page(pain: str) -> None:
    parts = [part for message in _messages() for part in words(message) if len(part.split()) > 1]
    assert any(part in plain(pain) for part in parts) or any(
        plain(pain) in message for message in _messages()
    )


def test_a_heading_has_the_words_of_a_message_below_it() -> None:
    """Which is how a search finds them, and what stands in its list."""
    for section in sections(PAGE).values():
        for headings, texts in entries(section):
            parts = [part.strip(" .") for heading in headings for part in words(heading)]
            texts = texts or headings
            assert [part for part in parts if part not in " ".join(texts)] == [], headings
