"""Lifespans over real PostgreSQL and Valkey servers, on their good days and their bad ones."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any, cast
from urllib.parse import urlsplit
from uuid import uuid4

import aiopg
import anyio
import asyncpg
import httpx
import pytest
import redis.asyncio as redis
from anyio.abc import ByteStream
from anyio.streams.stapled import MultiListener

from lifekit import (
    DeadlineError,
    DeclarationError,
    Registry,
    ShutdownError,
    StartupError,
    embedded,
    events,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(
    params=[("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})],
    ids=["asyncio", "uvloop"],
)
def anyio_backend(request: pytest.FixtureRequest) -> object:
    """The drivers are asyncio's own."""
    return request.param


class Clients:
    """What the servers know of the connections that one test makes."""

    def __init__(self, postgres: embedded.Server, valkey: embedded.Server) -> None:
        self.name = uuid4().hex
        self.postgres = f"{postgres.url}?application_name={self.name}"
        self.valkey = valkey.url
        self._admin = postgres.url

    async def in_postgres(self) -> int:
        """Return how many connections PostgreSQL has of this test."""
        connection = await asyncpg.connect(self._admin)
        try:
            query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"
            return int(await connection.fetchval(query, self.name))
        finally:
            await connection.close()

    async def in_valkey(self) -> int:
        """Return how many connections Valkey has of this test."""
        async with redis.from_url(self.valkey) as client:
            clients: list[dict[str, str]] = await cast("Any", client).client_list()
            return sum(each["name"] == self.name for each in clients)

    async def assert_none(self) -> None:
        """Wait until both servers have seen every connection end: they notice a little later."""
        with anyio.fail_after(60):
            while await self.in_postgres() or await self.in_valkey():
                await anyio.lowlevel.checkpoint()


@pytest.fixture
def clients(postgres: embedded.Server, valkey: embedded.Server) -> Clients:
    """The servers' side of the test."""
    return Clients(postgres, valkey)


def declare(clients: Clients, **options: Any) -> Registry:
    """Declare a pool of each kind, and what needs them all."""
    registry = Registry(**options)

    @registry.resource
    def db() -> asyncpg.Pool:
        return asyncpg.create_pool(clients.postgres, min_size=3)

    @registry.resource
    async def reports() -> aiopg.Pool:
        return await aiopg.create_pool(clients.postgres, minsize=2)

    @registry.resource
    def cache() -> redis.Redis:
        return redis.from_url(clients.valkey, client_name=clients.name)

    @registry.resource
    def http() -> httpx.AsyncClient:
        return httpx.AsyncClient()

    @registry.resource(db, reports, cache, http)
    def everything(
        db: asyncpg.Pool, reports: aiopg.Pool, cache: redis.Redis, http: httpx.AsyncClient
    ) -> tuple[asyncpg.Pool, aiopg.Pool, redis.Redis, httpx.AsyncClient]:
        return db, reports, cache, http

    return registry


async def test_every_connection_is_there_while_it_runs_and_gone_after_every_stop(
    clients: Clients,
) -> None:
    registry = declare(clients)
    for _ in range(3):
        async with registry.lifespan() as lifespan:
            assert await lifespan["db"].fetchval("SELECT 1") == 1
            async with lifespan["reports"].acquire() as connection, connection.cursor() as cursor:
                await cursor.execute("SELECT 2")
                assert await cursor.fetchone() == (2,)
            assert await lifespan["cache"].ping()
            assert await clients.in_postgres() == 5
            assert await clients.in_valkey() == 1
        await clients.assert_none()


async def test_a_failed_start_leaves_no_connection(clients: Clients) -> None:
    registry = declare(clients)

    @registry.resource(*registry.plan().resources)
    def last(*_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(StartupError) as caught:
        async with registry.lifespan():
            pass
    assert caught.value.opened == ("db", "reports", "cache", "http", "everything")
    assert caught.value.rollback is None
    await clients.assert_none()


async def test_a_cancelled_start_leaves_no_connection(clients: Clients) -> None:
    registry = declare(clients)

    @registry.resource
    async def slow() -> None:
        await anyio.sleep_forever()

    with anyio.CancelScope() as scope:

        def when_opened(event: events.Event) -> None:
            if isinstance(event, events.Opened) and event.resource == "db":
                scope.cancel()

        registry.on_event = when_opened
        async with registry.lifespan():
            pass
    assert scope.cancelled_caught
    await clients.assert_none()


async def relay(listener: MultiListener[Any], port: int) -> None:
    """Pass what *listener* accepts on to *port*: the door of a server that comes up late."""

    async def pump(source: ByteStream, target: ByteStream) -> None:
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            while True:
                await target.send(await source.receive())
        await target.aclose()

    async def serve(stream: ByteStream) -> None:
        async with (
            await anyio.connect_tcp("127.0.0.1", port) as target,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(pump, stream, target)
            tasks.start_soon(pump, target, stream)

    async with listener:
        await listener.serve(serve)


async def test_a_server_that_is_not_up_yet_is_waited_for(clients: Clients) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    server = urlsplit(clients.postgres)
    assert server.port is not None
    retries: list[events.Retrying] = []
    refused = anyio.Event()

    def hear(event: events.Event) -> None:
        if isinstance(event, events.Retrying):
            retries.append(event)
            refused.set()

    registry = Registry(on_event=hear)

    @registry.resource(retry=20)
    def db() -> asyncpg.Pool:
        return asyncpg.create_pool(
            clients.postgres.replace(f":{server.port}/", f":{port}/"), min_size=1
        )

    async def come_up() -> None:
        await refused.wait()
        await relay(
            await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port), server.port or 0
        )

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(come_up)
        async with registry.lifespan() as lifespan:
            assert await lifespan[db].fetchval("SELECT 1") == 1
        tasks.cancel_scope.cancel()
    assert isinstance(retries[0].error, ConnectionRefusedError)
    await clients.assert_none()


async def awaited(url: str) -> asyncpg.Pool:
    """Return an open pool."""
    return await asyncpg.create_pool(url)


async def entered(url: str) -> AsyncGenerator[asyncpg.Pool]:
    """Open and close it itself."""
    async with asyncpg.create_pool(url) as pool:
        yield pool


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # uvloop and aiopg trip over a port so dead
@pytest.mark.parametrize("make", [asyncpg.create_pool, awaited, entered, aiopg.create_pool])
async def test_a_failed_start_names_the_server_once(make: Any) -> None:
    """Wherever the pool fails to open, and however often."""
    registry = Registry()
    url = "postgresql://ann:Sesame-open@127.0.0.1:1/shop"
    registry.resource(name="db", retry=1)(lambda: make(url))
    with pytest.raises(StartupError) as caught:
        async with registry.lifespan():
            pass
    assert str(caught.value).count("lifekit: opening a") == 1
    assert url.replace("Sesame-open", "***") in str(caught.value)


@pytest.mark.parametrize("kind", ["asyncpg", "aiopg", "redis"])
async def test_a_wrong_password_fails_at_once_and_shows_in_no_text(
    clients: Clients, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "lifekit")
    log: list[events.Event] = []
    registry = Registry(on_event=log.append)

    def wrong(url: str) -> str:
        secret = urlsplit(url).password
        assert secret is not None
        return url.replace(secret, "Sesame-open")

    if kind == "asyncpg":
        registry.resource(retry=5, name="db")(lambda: asyncpg.create_pool(wrong(clients.postgres)))
    elif kind == "aiopg":
        registry.resource(retry=5, name="db")(lambda: aiopg.create_pool(wrong(clients.postgres)))
    else:
        registry.resource(retry=5, name="db")(lambda: redis.from_url(wrong(clients.valkey)))
    with pytest.raises(StartupError) as caught:
        async with registry.lifespan():
            pass
    assert not [event for event in log if isinstance(event, events.Retrying)]
    texts = [str(caught.value), repr(caught.value), repr(registry), caplog.text, *map(repr, log)]
    assert not [text for text in texts if "Sesame-open" in text]
    assert "db" in str(caught.value)
    await clients.assert_none()


async def test_servers_that_are_killed_while_serving_do_not_stop_the_stop() -> None:
    # asyncpg drops a future of its own when a server dies while it connects.
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    async with embedded.postgres() as postgres, embedded.valkey() as valkey:
        registry = declare(Clients(postgres, valkey), close_timeout=60)
        async with registry.lifespan() as lifespan:
            db: asyncpg.Pool = lifespan["db"]
            assert postgres.pid is not None
            assert valkey.pid is not None
            os.kill(postgres.pid, signal.SIGQUIT)
            os.kill(valkey.pid, signal.SIGKILL)
            with anyio.fail_after(60), suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                while True:  # until the server is seen to be gone
                    await db.fetchval("SELECT 1")


@pytest.mark.parametrize("factory", ["function", "generator"])
@pytest.mark.parametrize("driver", [asyncpg, aiopg])
async def test_a_connection_never_given_back_is_named_and_cut_off(
    clients: Clients, driver: Any, factory: str
) -> None:
    registry = Registry(close_timeout=0.3)

    async def yielded() -> AsyncGenerator[Any]:
        async with driver.create_pool(clients.postgres) as pool:
            yield pool

    def returned() -> Any:
        return driver.create_pool(clients.postgres)

    make: Any = returned if factory == "function" else yielded
    pool: Any = registry.resource(name="pool")(make)

    async def careless() -> None:
        await pool.get().acquire()  # and never given back

    with pytest.raises(ShutdownError) as caught:
        async with registry.lifespan():
            await careless()
    (error,) = caught.value.exceptions
    assert isinstance(error, DeadlineError)
    line = careless.__code__.co_firstlineno + 1
    (holder,) = error.holders
    assert f"test_real_servers.py:{line} in " in holder
    assert "careless" in holder
    assert holder in str(caught.value)
    assert any("pool.py" in frame for frame in error.stack)
    await clients.assert_none()


async def test_a_pool_made_for_another_lifespan_is_refused_with_its_definitions_line(
    clients: Clients,
) -> None:
    shared = asyncpg.create_pool(clients.postgres, min_size=1)
    registry = Registry()
    registry.resource(name="db")(lambda: shared)
    async with registry.lifespan():
        pass
    with pytest.raises(StartupError, match=r"db \(.*test_real_servers.py:\d+\)") as caught:
        async with registry.lifespan():
            pass
    assert isinstance(caught.value.exceptions[0], DeclarationError)


async def test_a_task_group_over_a_real_pool_closes_before_it(clients: Clients) -> None:
    registry = Registry()
    rows: list[int] = []

    @registry.resource
    def db() -> asyncpg.Pool:
        return asyncpg.create_pool(clients.postgres, min_size=1)

    @registry.resource(db)
    async def worker(db: asyncpg.Pool) -> AsyncGenerator[None]:
        async def work() -> None:
            rows.append(await db.fetchval("SELECT 7 FROM pg_sleep(0.05)"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            yield  # the group waits for what is under way

    async with registry.lifespan():
        pass
    assert rows == [7]
    await clients.assert_none()
