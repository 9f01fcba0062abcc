"""The pytest plugin on real servers: however tests and runs die, and with several at once."""

from __future__ import annotations

import re
from collections.abc import Iterator

import asyncpg
import pytest
import redis.asyncio as redis
from anyio.from_thread import start_blocking_portal

from lifekit import embedded

from .plugin_cases.inner import ANYIO, ASYNCIO, HINT, SHOP, Inner

pytest_plugins = ["pytester"]


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Inner:
    return Inner(pytester, monkeypatch)


@pytest.fixture
def servers(
    postgres: embedded.Server, valkey: embedded.Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A table and a counter that must be as they were when the test is over."""
    monkeypatch.setenv("SHOP_POSTGRES", postgres.url)
    monkeypatch.setenv("SHOP_REDIS", valkey.url)

    async def before() -> None:
        connection = await asyncpg.connect(postgres.url)
        await connection.execute("DROP TABLE IF EXISTS sold")
        await connection.execute("CREATE TABLE sold (thing text PRIMARY KEY)")
        await connection.execute("INSERT INTO sold VALUES ('first')")
        await connection.close()

    async def after() -> tuple[list[str], int]:
        connection = await asyncpg.connect(postgres.url)
        things = [row["thing"] for row in await connection.fetch("SELECT thing FROM sold")]
        await connection.execute("DROP TABLE sold")
        await connection.close()
        client = redis.from_url(valkey.url)
        keys = await client.exists("sold")
        await client.aclose()
        return things, int(keys)

    with start_blocking_portal() as portal:
        portal.call(before)
        yield
        assert portal.call(after) == (["first"], 0)


DEATHS = """
import asyncio, os, signal
import pytest, pytest_asyncio
from tests.testing.plugin_cases.shop import db

async def sells(client):
    assert (await client.post("/sold/one")).json() == [2, 1]

@pytest_asyncio.fixture
async def breaks_early(client):
    await sells(client)
    raise ValueError

@pytest_asyncio.fixture
async def breaks_late(client):
    yield
    assert (await client.post("/sold/two")).json() == [3, 2]
    raise ValueError

async def test_fails(client):
    await sells(client)
    pytest.fail("so it is")

async def test_fixture_breaks(breaks_early): ...

async def test_fixture_breaks_late(breaks_late, client): await sells(client)

async def test_transaction_is_left_open(client, lifespan):
    await sells(client)
    connection = await lifespan[db].acquire()
    await connection.transaction().start()
    await connection.execute("INSERT INTO sold VALUES ('stray')")

@pytest.mark.timeout(100, method="signal")
async def test_takes_too_long(client, lifespan):
    async with lifespan[db].acquire() as connection, connection.transaction():
        await connection.execute("INSERT INTO sold VALUES ('late')")
        signal.setitimer(signal.ITIMER_REAL, 0.001)  # of pytest-timeout
        await asyncio.sleep(200)

async def test_works(client): await sells(client)

def test_sync_fails(sync_client):
    assert sync_client.post("/sold/one").json() == [2, 1]
    raise ValueError

def test_sync_works(sync_client):
    assert sync_client.post("/sold/one").json() == [2, 1]

async def test_exits(client):
    await sells(client)
    pytest.exit("enough")
"""


@pytest.mark.long
@pytest.mark.usefixtures("servers")
def test_however_a_test_dies_the_servers_hold_what_they_held(inner: Inner) -> None:
    """Those after it find nothing of it, and nothing is left when the run is over."""
    inner.ini(
        SHOP,
        asyncio_mode="auto",
        asyncio_default_test_loop_scope="session",
        asyncio_default_fixture_loop_scope="session",
    )
    result = inner.run_apart(*ASYNCIO, "-p", "pytest_timeout", "-rE", test_it=DEATHS)
    result.assert_outcomes(passed=4, failed=3, errors=4)
    result.stdout.fnmatch_lines(
        [
            "SandboxEscapedError: when the sandbox ended, this had not been given back:",
            "*acquired at test_it.py:29 in test_transaction_is_left_open*",
            "*Exit: enough*",
        ]
    )


INTERRUPTED = """
import os, signal, asyncio
import pytest

@pytest.mark.{plugin}
async def test_it(client):
    assert (await client.post("/sold/one")).json() == [2, 1]
    {act}
    await asyncio.sleep(60)

@pytest.fixture
def anyio_backend(): return "asyncio"
"""
CTRL_C = "os.kill(os.getpid(), signal.SIGINT)"


@pytest.mark.long
@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("act", [CTRL_C, "os._exit(9)"], ids=["interrupt", "kill"])
@pytest.mark.parametrize("plugin", ["asyncio", "anyio"])
def test_when_the_run_dies_the_servers_hold_what_they_held(inner: Inner, plugin: str, act: str) -> None:
    inner.ini(SHOP)
    result = inner.run_apart(*ASYNCIO, *ANYIO, test_it=INTERRUPTED.format(plugin=plugin, act=act))
    assert result.ret != 0
    assert "passed" not in result.stdout.str()


PARALLEL = """
import pytest

@pytest.mark.parametrize("number", range(10))
@pytest.mark.asyncio
async def test_async(client, number):
    assert (await client.post(f"/sold/{number}")).json() == [2, 1]
    assert (await client.post(f"/sold/more{number}")).json() == [3, 2]

@pytest.mark.parametrize("number", range(10))
def test_sync(sync_client, number):
    assert sync_client.post(f"/sold/sync{number}").json() == [2, 1]
"""


@pytest.mark.long
@pytest.mark.usefixtures("servers")
def test_workers_of_xdist_share_one_database_and_one_redis(inner: Inner) -> None:
    """Each works in its own transaction and database number, and the summary is about all of them."""
    inner.ini(SHOP)
    result = inner.run_apart(*ASYNCIO, "-p", "xdist.plugin", "-n", "2", test_it=PARALLEL)
    result.assert_outcomes(passed=20)
    told = re.search(HINT, result.stdout.str())
    assert told is not None
    assert told.groups()[:2] == ("10", "pytest-asyncio")
