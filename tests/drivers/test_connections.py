"""Single connections to PostgreSQL as values: opened, checked, closed, cut off, described."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

import psycopg2.pool
import pytest

from lifekit import DeclarationError, Registry, StartupError, drivers
from lifekit.embedded import Server
from tests.sandbox.connections import VALUES, Connection

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    """These clients are asyncio's."""
    return "asyncio", {"use_uvloop": False}


@pytest.fixture(params=VALUES, ids=lambda each: each.name)
def kind(request: pytest.FixtureRequest) -> Connection:
    """Each kind of connection."""
    return request.param  # type: ignore[no-any-return]


def driver_of(value: Any) -> Any:
    """Return its driver."""
    return drivers.find(value)


async def test_it_is_checked_and_closed_by_its_lifespan(kind: Connection, postgres: Server) -> None:
    registry = Registry("single")

    @registry.resource
    async def connection() -> Any:
        return await kind.connect(postgres.url)

    async with registry.lifespan() as lifespan:
        value = lifespan[connection]
        assert await kind.run(value, "SELECT 7") == 7
        assert not value.closed if hasattr(value, "closed") else not value.is_closed()
    assert driver_of(value).is_closed(value)


async def test_a_closed_one_is_refused(kind: Connection, postgres: Server) -> None:
    made = await kind.connect(postgres.url)
    await kind.close(made)
    registry = Registry("closed")
    registry.resource(name="connection")(lambda: made)
    with pytest.raises(StartupError) as caught:
        async with registry.lifespan():
            raise AssertionError
    assert isinstance(caught.value.exceptions[0], DeclarationError)
    assert "is closed already" in str(caught.value.exceptions[0])


async def test_one_whose_session_has_ended_does_not_pass_its_check(
    kind: Connection, postgres: Server
) -> None:
    ended = await kind.connect(postgres.url)
    other = await kind.connect(postgres.url)
    number = driver_of(ended).number(ended)
    await kind.run(other, f"SELECT pg_terminate_backend({number}, 60000)")
    await kind.close(other)
    registry = Registry("ended")
    registry.resource(name="connection")(lambda: ended)
    with pytest.raises(StartupError):
        async with registry.lifespan():
            raise AssertionError


async def test_it_can_be_cut_off(kind: Connection, postgres: Server) -> None:
    value = await kind.connect(postgres.url)
    driver_of(value).terminate(value)
    await asyncio.sleep(0)
    assert driver_of(value).is_closed(value)
    driver_of(value).terminate(value)


async def test_it_is_described_without_its_password(kind: Connection, postgres: Server) -> None:
    value = await kind.connect(postgres.url)
    described = driver_of(value).describe(value)
    server = urlsplit(postgres.url)
    assert f"lifekit@127.0.0.1:{server.port}/lifekit" in described
    assert server.password not in described
    await kind.close(value)


async def test_a_pool_of_psycopg2_is_closed_once_nothing_is_out(postgres: Server) -> None:
    """And described; who has its connections is known."""
    registry = Registry("pool", close_timeout=60)

    @registry.resource
    def pool() -> psycopg2.pool.ThreadedConnectionPool:
        return psycopg2.pool.ThreadedConnectionPool(1, 2, postgres.url)

    async with registry.lifespan() as lifespan:
        value = lifespan[pool]
        driver: Any = driver_of(value)
        assert driver.describe(value).startswith("psycopg2 pool of 1 to 2, postgresql://lifekit:***@")
        taken = value.getconn()
        assert ["test_connections.py" in each for each in lifespan.holders(pool)] == [True]
        asyncio.get_running_loop().call_later(0.05, value.putconn, taken)
    assert value.closed
    assert taken.closed
