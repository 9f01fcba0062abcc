"""What a sandboxed test costs, beside the same by hand and beside other fixtures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import redis.asyncio as redis
from anyio.from_thread import start_blocking_portal

from lifekit import Registry, embedded
from lifekit.testing import sandboxing

from .measure import Row, interleave, on, paired_ratio

ROOT = Path(__file__).parents[2]


async def seconds(times: int, act: Callable[[], Awaitable[object]]) -> float:
    """Return the seconds of one *act* of so many."""
    began = perf_counter()
    for _ in range(times):
        await act()
    return (perf_counter() - began) / times


def redis_isolation(*, rounds: int = 100, times: int = 20) -> list[Row]:
    """Compare a block around one command with the command and a FLUSHDB."""

    async def measured() -> list[Row]:
        registry = Registry("notes")
        async with embedded.valkey() as server:

            @registry.resource
            def cache() -> redis.Redis:
                return redis.from_url(server.url)

            by_itself: Any = redis.from_url(f"{server.url.rpartition('/')[0]}/9")
            with sandboxing():
                async with registry.lifespan() as lifespan:
                    client = lifespan[cache]

                    async def by_hand() -> None:
                        await by_itself.set("key", "value")
                        await by_itself.flushdb()

                    async def in_a_block() -> None:
                        async with lifespan.sandbox():
                            await client.set("key", "value")

                    floor, ours = await interleave(
                        rounds, partial(seconds, times, by_hand), partial(seconds, times, in_a_block)
                    )
            await by_itself.aclose()
        what = "a sandboxed test of one Redis command: command, FLUSHDB"
        ratio = paired_ratio(floor, ours)
        return [Row(what, min(floor), min(ours), ratio, "us", most=1.5, key="sandbox/redis")]

    return on("asyncio", measured)


# -- whole suites --------------------------------------------------------------------------------

BODY = """
import pytest

@pytest.mark.parametrize("number", range({tests}))
async def test_a_link(client, number):
    made = await client.post("/links", json={{"url": "https://example.org/"}})
    assert made.status_code == 201
"""
BY_HAND = """
import contextlib, httpx2, pytest_asyncio
from shortener.main import app
from shortener import resources

@contextlib.asynccontextmanager
async def opened():
    async with app.router.lifespan_context(app) as state:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client, state["db"]
"""
PLUGIN = """
import shortener.main, lifekit.testing._pytest, httpx2  # as the others, before the first test
import lifekit._sandbox.postgres.sandbox, lifekit._sandbox.redis.client
"""
FUNCTION_SCOPED = """
@pytest_asyncio.fixture
async def client():
    async with opened() as (client, _):
        yield client
"""
SESSION_SCOPED = """
@pytest_asyncio.fixture(scope="session")
async def started():
    async with opened() as both:
        yield both

@pytest_asyncio.fixture
async def rolled_back(started):
    _, pool = started
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            yield connection
        finally:
            await transaction.rollback()

@pytest_asyncio.fixture
async def client(started, rolled_back):
    return started[0]
"""
INI = """
[pytest]
asyncio_mode = auto
asyncio_default_test_loop_scope = {scope}
asyncio_default_fixture_loop_scope = {scope}
lifekit_app = shortener.main:app
lifekit_workers = false
"""
TIMING = """
import gc

def pytest_collection_finish(session):
    gc.collect()  # of what was imported, which some test would do, of one suite or of the other

def pytest_runtest_logreport(report):
    global took
    took += report.duration

took = 0.0

def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"tests took {took:.6f} s")
"""


def suite_seconds(
    urls: dict[str, str], conftest: str, *options: str, tests: int, scope: str = "session"
) -> float:
    """Run so many tests of the example under pytest, and return what they took themselves."""
    with TemporaryDirectory(prefix="lifekit-suite-") as folder:
        where = Path(folder)
        (where / "test_links.py").write_text(BODY.format(tests=tests))
        (where / "conftest.py").write_text(conftest + TIMING)
        (where / "pytest.ini").write_text(INI.format(scope=scope))
        path = os.pathsep.join([str(ROOT / "docs" / "examples"), str(ROOT)])
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:valkey", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *options],
            cwd=where,
            env={**os.environ, **urls, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
    found = re.search(r"tests took ([\d.]+) s", done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert found is not None
    return float(found[1])


def suites(*, rounds: int = 9, tests: int = 200) -> list[Row]:
    """Compare the example's tests with the plugin, and with fixtures written by hand."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(embedded.postgres()) as postgres,
        portal.wrap_async_context_manager(embedded.valkey()) as valkey,
    ):
        urls = {"DATABASE_URL": postgres.url, "REDIS_URL": valkey.url}
        run = partial(suite_seconds, urls, tests=tests)
        ours, session = list[float](), list[float]()
        turns = [(ours, PLUGIN), (session, BY_HAND + SESSION_SCOPED)]
        for _ in range(rounds):
            for took, conftest in turns:
                took.append(run(conftest))
            turns.reverse()  # who comes first finds the machine in another state
        slowest = run(BY_HAND + FUNCTION_SCOPED, scope="function")
        two = [run(PLUGIN, "-n", "2") for _ in range(min(rounds, 3))]
    fastest = min(ours)
    return [
        Row(
            f"{tests} tests: function-scoped fixtures",
            slowest,
            fastest,
            fastest / slowest,
            "ms",
            most=0.05,
            key="suite/function-scoped",
            each=tests,
        ),
        Row(
            f"{tests} tests: session-scoped, one connection rolled back",
            min(session),
            fastest,
            paired_ratio(session, ours),
            "ms",
            most=1.05,
            key="suite/session-scoped",
            each=tests,
        ),
        Row(f"{tests} tests with -n 2: in one process", fastest, min(two), min(two) / fastest, "ms"),
    ]
