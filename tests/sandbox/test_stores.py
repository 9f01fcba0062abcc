"""Values that reach a database, a cache or a queue, and that no sandbox undoes."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pg8000.native  # type: ignore[import-untyped]
import pytest
from databases import Database
from redis import Redis as SyncRedis
from sqlalchemy import create_engine

from lifekit import Driver, Registry, SandboxUnsupportedError, drivers, embedded
from lifekit.testing import sandboxing

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def made_of(package: str, *bases: type) -> Any:
    """A value of a class as that package might have it."""
    return type("Client", bases, {"__module__": package})()


async def begins(registry: Registry) -> None:
    """Open a lifespan in test mode, and begin a block."""
    with sandboxing():
        async with registry.lifespan() as lifespan, lifespan.sandbox():
            pass


def registry_of(make: Callable[[], Any], **options: Any) -> Registry:
    registry = Registry("stores")
    registry.resource(name="store", **options)(make)
    return registry


def left_open(value: object) -> None:
    """What a fabricated value needs as its closing."""


class Own(sqlite3.Connection):
    """As an application may derive it."""


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "sqlite3": (lambda: sqlite3.connect(":memory:"), "sqlite3.Connection, which reaches a database"),
    "a subclass": (lambda: Own(":memory:"), "test_stores.Own, which reaches a database"),
    "sync redis": (lambda: SyncRedis(port=1), "redis.client.Redis, which reaches a cache"),
    "pymongo": (lambda: made_of("pymongo.asynchronous.mongo_client"), "which reaches a database"),
    "nats": (lambda: made_of("nats.aio.client"), "which reaches a queue"),
    "databases": (lambda: Database("sqlite://"), "databases.core.Database, which reaches a database"),
    "a namespace": (lambda: made_of("google.cloud.firestore_v1"), ""),
    "firestore": (lambda: made_of("google.cloud.firestore"), "which reaches a database"),
    "azure": (lambda: made_of("azure.servicebus.aio"), "which reaches a queue"),
    "s3": (lambda: made_of("botocore.client"), "a service that keeps what it is sent"),
    "fakeredis": (lambda: made_of("fakeredis._clients", SyncRedis), ""),
    "in memory": (lambda: made_of("taskiq.brokers.inmemory_broker"), ""),
    "a server": (lambda: embedded.Server("redis://x", None), ""),
    "plain": (lambda: made_of("shop.links"), ""),
    "a class": (lambda: sqlite3.Connection, ""),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_a_value_that_cannot_be_undone_is_refused_when_a_block_begins(what: str) -> None:
    """By the name of the resource, its line and its type, with the ways out; what reaches nothing
    is not."""
    make, text = REFUSED[what]
    registry = registry_of(make, close=left_open)
    if not text:
        await begins(registry)
        return
    with pytest.raises(SandboxUnsupportedError) as caught:
        await begins(registry)
    told = str(caught.value)
    assert told.startswith("store (")
    assert "test_stores.py" in told
    assert text in told
    for way_out in ("registry.override(store", "mock(store)", 'isolation="none"', "sandbox=False"):
        assert way_out in told


async def test_an_engine_of_another_database_is_refused_with_all_ways_out() -> None:
    def make() -> Any:
        return create_engine("sqlite+pysqlcipher://", module=sqlite3)

    with pytest.raises(SandboxUnsupportedError, match=r"on sqlite\+pysqlcipher can't.*sandbox=False"):
        await begins(registry_of(make))


async def test_outside_of_blocks_and_without_test_mode_nothing_is_refused() -> None:
    registry = registry_of(lambda: sqlite3.connect(":memory:"))
    with sandboxing():
        async with registry.lifespan():
            pass
    async with registry.lifespan() as lifespan:
        assert lifespan["store"].execute("SELECT 1").fetchone() == (1,)


async def test_what_is_built_from_such_a_value_is_left_to_that() -> None:
    """A collection reaches no more than its client, which may last; a class of one's own holds it."""
    registry = Registry("stores")

    @registry.resource(sandbox=False)
    def client() -> Any:
        return made_of("pymongo.mongo_client")

    @registry.resource(client)
    def orders(client: Any) -> Any:
        return made_of("pymongo.collection")

    @registry.resource(orders)
    def shop(orders: Any) -> Any:
        return {"orders": orders}

    @registry.resource(client)
    def borrowed(client: Any) -> Any:
        return client

    await begins(registry)


async def test_a_driver_that_can_undo_is_asked_instead() -> None:
    """One of the user's own wins over the list; one that undoes nothing does not."""
    kind: Any = made_of("nats.aio.client").__class__

    class Undoing(Driver[Any]):
        def sandbox(self, value: Any) -> None:
            return None

    registry = registry_of(kind)
    drivers.register(kind, Undoing())
    await begins(registry)
    drivers.register(kind, Driver())
    with pytest.raises(SandboxUnsupportedError, match="reaches a queue"):
        await begins(registry)


async def test_a_value_given_in_its_place_is_fine() -> None:
    registry = Registry("stores")

    @registry.resource
    def store() -> sqlite3.Connection:
        raise AssertionError("it was opened")

    with registry.override(store, sqlite3.connect(":memory:")):
        await begins(registry)


async def test_what_may_last_is_left_alone_though_it_could_be_undone(postgres: Any) -> None:
    """A pool that is declared with `sandbox=False` commits for real, in a block as well."""
    registry = registry_of(lambda: asyncpg.create_pool(postgres.url, min_size=1), sandbox=False)
    with sandboxing():
        async with registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                await lifespan["store"].execute("CREATE TABLE lasting (n int)")
            await lifespan["store"].execute("DROP TABLE lasting")


async def test_what_connects_by_a_client_that_is_undone_is_undone(postgres: embedded.Server) -> None:
    registry = Registry("stores")

    @registry.resource(close="disconnect")
    async def library() -> Any:
        database: Any = Database(postgres.url)
        await database.connect()
        return database

    @registry.resource
    def connection() -> Any:
        at = urlsplit(postgres.url)
        return pg8000.native.Connection(
            at.username or "", at.hostname or "", at.path[1:], at.port or 5432, at.password
        )

    with sandboxing():
        async with registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                await lifespan[library].execute("CREATE TABLE stores (n int)")
                assert lifespan[connection].run("SELECT count(*) FROM stores") == [[0]]
            found = "SELECT to_regclass('stores') IS NULL"
            assert await lifespan[library].fetch_val(found) is True
            assert lifespan[connection].run(found) == [[True]]
