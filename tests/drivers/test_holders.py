"""Who holds a pool's connections: asked while it runs, and told by what waits for one in vain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import aiopg
import asyncpg
import psycopg_pool
import pytest
from sqlalchemy.exc import TimeoutError as QueueTimeout
from sqlalchemy.ext.asyncio import create_async_engine

from lifekit import Lifespan, NotOpenError, Registry, Resource, drivers
from lifekit.embedded import Server

pytestmark = pytest.mark.anyio

MOST = 2
"""Connections that each pool hands out."""

Take = Callable[[Any, float], Awaitable[Any]]
Back = Callable[[Any, Any], Awaitable[object]]


class Kind(NamedTuple):
    """One kind of pool."""

    make: Callable[[str], Any]
    take: Take
    give_back: Back
    timed_out: type[Exception] | None
    """What its own limit of so many seconds raises, where it has one."""


async def _release(pool: Any, connection: Any) -> None:
    await pool.release(connection)


def _engine(dialect: str) -> Kind:
    def make(url: str) -> Any:
        url = url.replace("postgresql", f"postgresql+{dialect}")
        return create_async_engine(url, pool_size=1, max_overflow=MOST - 1)

    async def take(engine: Any, seconds: float) -> Any:
        engine.pool._timeout = seconds
        return await engine.connect()

    async def give_back(_: Any, connection: Any) -> None:
        await connection.close()

    return Kind(make, take, give_back, QueueTimeout)


def _asyncpg(url: str) -> Any:
    return asyncpg.create_pool(url, min_size=0, max_size=MOST)


def _aiopg(url: str) -> Any:
    return aiopg.create_pool(url, minsize=0, maxsize=MOST)


def _psycopg(url: str) -> Any:
    return psycopg_pool.AsyncConnectionPool(url, min_size=1, max_size=MOST, open=False)


async def _acquire(pool: Any, seconds: float) -> Any:
    return await pool.acquire(timeout=seconds)


async def _acquire_of_aiopg(pool: Any, _: float) -> Any:
    return await pool.acquire()


async def _getconn(pool: Any, seconds: float) -> Any:
    return await pool.getconn(timeout=seconds)


async def _putconn(pool: Any, connection: Any) -> None:
    await pool.putconn(connection)


KINDS = {
    "asyncpg": Kind(_asyncpg, _acquire, _release, TimeoutError),
    "aiopg": Kind(_aiopg, _acquire_of_aiopg, _release, None),
    "psycopg": Kind(_psycopg, _getconn, _putconn, psycopg_pool.PoolTimeout),
    "engine-asyncpg": _engine("asyncpg"),
    "engine-psycopg": _engine("psycopg"),
}


class Drained(NamedTuple):
    """A pool in a lifespan, all of whose connections are held here."""

    lifespan: Lifespan
    handle: Resource[Any]
    take: Take
    timed_out: type[Exception] | None


@pytest.fixture
def anyio_backend() -> object:
    """The drivers are asyncio's own."""
    return ("asyncio", {"use_uvloop": False})


@pytest.fixture(params=KINDS)
async def drained(request: pytest.FixtureRequest, postgres: Server) -> AsyncIterator[Drained]:
    """A pool of each kind."""
    kind = KINDS[request.param]
    registry = Registry()

    @registry.resource
    def pool() -> Any:
        return kind.make(postgres.url)

    async with registry.lifespan() as lifespan:
        assert lifespan.holders(pool) == ()
        held = [await kind.take(lifespan[pool], 60) for _ in range(MOST)]
        yield Drained(lifespan, pool, kind.take, kind.timed_out)
        for connection in held:
            await kind.give_back(lifespan[pool], connection)
        assert lifespan.holders(pool) == ()


def said(error: BaseException | None) -> str:
    """The notes of an error, and of those that it came from."""
    notes: list[str] = []
    while error is not None:
        notes += getattr(error, "__notes__", ())
        error = error.__cause__ or error.__context__
    return "\n".join(notes)


async def test_a_lifespan_is_asked_who_holds_the_connections(drained: Drained) -> None:
    """By its handle or by its name; the driver says the same."""
    lifespan, handle = drained.lifespan, drained.handle
    holders = lifespan.holders(handle)
    assert len(holders) == MOST
    assert all("test_holders.py" in line for line in holders)
    assert holders == lifespan.holders("pool")
    driver = drivers.find(lifespan[handle])
    assert driver is not None
    assert [*driver.holders(lifespan[handle])] == [*holders]


async def test_an_acquire_that_times_out_names_who_holds_the_connections(drained: Drained) -> None:
    """By the pool's own limit."""
    if drained.timed_out is None:
        pytest.skip("its acquire has no limit of its own")
    with pytest.raises(drained.timed_out) as caught:
        await drained.take(drained.lifespan[drained.handle], 0.01)
    notes = said(caught.value)
    assert f"lifekit: its {MOST} connections are held by" in notes
    assert notes.count("test_holders.py") == MOST


async def test_so_does_one_that_a_limit_around_it_ends(drained: Drained) -> None:
    """The note is at the cancellation, from which the `TimeoutError` comes."""
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.01):
            await drained.take(drained.lifespan[drained.handle], 60)
    assert f"lifekit: its {MOST} connections are held by" in said(caught.value)


async def test_a_wait_that_ends_for_another_reason_says_nothing_of_holders(postgres: Server) -> None:
    """There was a connection to be had: here the server does not let it begin."""
    registry = Registry()
    stuck = asyncio.Event()

    async def setup(_: Any) -> None:
        await stuck.wait()

    @registry.resource(check=_unchecked)
    def pool() -> Any:
        return asyncpg.create_pool(postgres.url, min_size=0, max_size=MOST, setup=setup)

    async with registry.lifespan() as lifespan:
        with pytest.raises(TimeoutError) as caught:
            await lifespan[pool].acquire(timeout=0.01)
        assert "lifekit" not in said(caught.value)


def _unchecked(_: Any) -> None:
    """The check would be stuck as well."""


async def test_the_note_shows_ten_and_how_many_more(postgres: Server) -> None:
    """Whoever has a hundred connections does not want a hundred lines."""
    registry = Registry()

    @registry.resource
    def pool() -> asyncpg.Pool:
        return asyncpg.create_pool(postgres.url, min_size=0, max_size=12)

    async with registry.lifespan() as lifespan:
        held = [await lifespan[pool].acquire() for _ in range(12)]
        with pytest.raises(TimeoutError) as caught:
            await lifespan[pool].acquire(timeout=0.01)
        for connection in held:
            await lifespan[pool].release(connection)
    note = said(caught.value)
    assert note.startswith("lifekit: its 12 connections are held by")
    assert note.count("test_holders.py") == 10
    assert note.endswith("and 2 more")


async def test_what_no_driver_knows_is_held_by_nobody_that_is_known() -> None:
    """And what is not open has no holders, as it has no value."""
    registry = Registry()

    @registry.resource
    def numbers() -> list[int]:
        return [1]

    lifespan = registry.lifespan()
    with pytest.raises(NotOpenError):
        lifespan.holders(numbers)
    async with lifespan:
        assert lifespan.holders(numbers) == ()
        with pytest.raises(KeyError):
            lifespan.holders("letters")
    with pytest.raises(NotOpenError):
        lifespan.holders(numbers)


async def test_during_an_override_the_holders_are_those_of_what_stands_in(postgres: Server) -> None:
    """And afterwards those of the resource's own value."""
    registry = Registry()

    def make() -> Any:
        return asyncpg.create_pool(postgres.url, min_size=0, max_size=MOST)

    pool = registry.resource(name="pool")(make)
    async with registry.lifespan() as lifespan, lifespan[pool].acquire():
        async with lifespan.override(pool, factory=make):
            assert lifespan.holders(pool) == ()
        assert len(lifespan.holders(pool)) == 1
