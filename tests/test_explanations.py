"""What the explanations and the comparison say is so: their programs, their tests, their tables."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiopg
import anyio
import asyncpg
import pytest
import redis.asyncio as redis
from explanation.together import app as together
from psycopg_pool import AsyncConnectionPool
from sqlalchemy.ext.asyncio import create_async_engine

from lifekit import testing
from lifekit.embedded import Server

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
PAGES = [*sorted((DOCS / "explanation").glob("*.md")), DOCS / "compare.md"]
LISTS = {"client_loops": 2, "closed_loop": 3, "half_closed": 2}
"""Each program that a page shows, and how many lines it prints."""
ON_ASYNCIO = pytest.mark.parametrize("anyio_backend", ["asyncio"])


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=EXAMPLES,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def _rows(page: Path, header: str) -> list[list[str]]:
    """Return the cells of the table whose header line begins so, without its header."""
    _, found, rest = page.read_text("utf-8").partition(f"\n| {header} |")
    assert found, f"no table on {page.name} begins with {header!r}"
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# -- programs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", LISTS)
def test_what_a_program_prints_is_on_the_page(program: str) -> None:
    done = _run(f"explanation.{program}")
    pages = "".join(page.read_text("utf-8") for page in PAGES)
    shown = [
        block
        for block in re.findall(r"^```text\n(.*?)\n```$", pages, re.M | re.S)
        if re.fullmatch(re.escape(block).replace("…", ".*?"), done.stdout.strip())
    ]

    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == LISTS[program]
    assert len(shown) == 1, done.stdout


SERVED = [
    pytest.param(("test_by_hand_async", "test_by_hand_sync"), "4 passed", (), id="by-hand"),
    pytest.param(
        ("test_with_lifekit",),
        "3 passed",
        ("-p", "lifekit.pytest_plugin", "-o", "lifekit_app=explanation.with_lifekit:app"),
        id="with-lifekit",
    ),
]


@pytest.mark.long
@pytest.mark.parametrize(("modules", "passed", "options"), SERVED)
def test_a_cure_on_the_page_passes(
    modules: tuple[str, ...],
    passed: str,
    options: tuple[str, ...],
    postgres: Server,
    valkey: Server,
) -> None:
    done = _run(
        "pytest",
        *("-q", "-c", os.devnull, "--rootdir", str(EXAMPLES), "-p", "no:cacheprovider", "-W", "error"),
        *("-p", "pytest_asyncio.plugin", "-o", "asyncio_default_fixture_loop_scope=function"),
        *options,
        *(f"explanation/{module}.py" for module in modules),
        DATABASE_URL=postgres.url,
        REDIS_URL=valkey.url,
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )
    assert passed in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


# -- comparison ----------------------------------------------------------------------------------


def test_the_comparison_is_what_its_programs_show() -> None:
    done = _run("explanation.claims")
    measured = [line.strip("|").split(" | ") for line in done.stdout.splitlines()]

    assert done.returncode == 0, done.stderr
    assert _rows(DOCS / "compare.md", "it holds that") == [
        [cell.strip() for cell in row] for row in measured
    ]


MODULES = {
    "svcs": ("svcs.aiohttp", "svcs.flask", "svcs.starlette", "svcs.fastapi"),
    "dishka": tuple(
        f"dishka.integrations.{name}"
        for name in ("aiogram", "aiohttp", "celery", "click", "faststream", "flask", "grpcio")
    ),
    "wireup": tuple(
        f"wireup.integration.{name}"
        for name in ("aiohttp", "celery", "click", "django", "fastmcp", "flask", "typer")
    ),
    "dependency-injector": tuple(f"dependency_injector.ext.{name}" for name in ("aiohttp", "flask")),
    "that-depends": tuple(f"that_depends.integrations.{name}" for name in ("fastapi", "faststream")),
}


@pytest.mark.parametrize("library", MODULES)
def test_a_library_has_the_integrations_that_the_page_names(library: str) -> None:
    for module in MODULES[library]:
        package = importlib.util.find_spec(module.partition(".")[0])
        assert package is not None
        assert package.origin is not None
        file = Path(package.origin).parent.joinpath(*module.split(".")[1:])
        assert file.with_suffix(".py").is_file() or file.is_dir(), module


def test_every_example_is_on_a_page_or_run() -> None:
    pages = "".join(page.read_text("utf-8") for page in PAGES)
    files = {file.name for file in (EXAMPLES / "explanation").glob("*.py")} - {"__init__.py"}
    assert {name for name in files if f"explanation/{name}" not in pages} == set()


@ON_ASYNCIO
@pytest.mark.anyio
async def test_a_container_builds_on_what_a_lifespan_opened() -> None:
    """The example of two libraries together answers, and answers anew when it runs again."""
    for _ in range(2):
        async with testing.client(together) as client:
            answers = [(await client.get("/ada")).json() for _ in range(2)]
        assert answers == ["hello ada, number 1", "hello ada, number 2"]


# -- what each driver does when it is closed -------------------------------------------------------


@ON_ASYNCIO
@pytest.mark.anyio
async def test_aiopg_closes_nothing_until_it_is_waited_for(postgres: Server) -> None:
    """And then waits for what is lent. terminate() closes that, and does not wake who waits."""
    pool = await aiopg.create_pool(postgres.url, minsize=3)
    lent = await pool.acquire()
    pool.close()
    idle = pool.freesize
    waiting = asyncio.create_task(pool.wait_closed())
    await anyio.wait_all_tasks_blocked()

    assert (idle, pool.freesize, waiting.done(), lent.closed) == (2, 0, False, False)
    pool.terminate()
    await anyio.wait_all_tasks_blocked()
    assert (lent.closed, waiting.done()) == (True, False)
    waiting.cancel()
    await pool.wait_closed()


@ON_ASYNCIO
@pytest.mark.anyio
async def test_asyncpg_closes_none_before_all_are_back_and_all_when_cancelled(postgres: Server) -> None:
    """Its one call is both phases."""
    pool: Any = await asyncpg.create_pool(postgres.url, min_size=3)
    await pool.acquire()
    closing = asyncio.create_task(pool.close())
    await anyio.wait_all_tasks_blocked()
    with pytest.raises(asyncpg.InterfaceError, match="pool is closing"):
        await pool.acquire()

    assert not closing.done()
    assert [holder.is_connected() for holder in pool._holders].count(True) == 3
    closing.cancel()
    await asyncio.wait([closing])
    assert [holder.is_connected() for holder in pool._holders].count(True) == 0


@ON_ASYNCIO
@pytest.mark.anyio
async def test_psycopg_leaves_open_what_is_lent(postgres: Server) -> None:
    """It has no second phase."""
    pool = AsyncConnectionPool(postgres.url, min_size=2, open=False)
    await pool.open(wait=True)
    lent = await pool.getconn()
    await pool.close()

    assert not lent.closed
    await lent.close()


@ON_ASYNCIO
@pytest.mark.anyio
async def test_sqlalchemy_leaves_open_what_is_lent_even_when_that_is_given_back(
    postgres: Server,
) -> None:
    """It goes back to a pool that nobody has any more."""
    engine = create_async_engine(postgres.url.replace("postgresql:", "postgresql+asyncpg:"))
    lent = await engine.connect()
    driver: Any = (await lent.get_raw_connection()).driver_connection
    await engine.dispose()
    await lent.close()

    assert not driver.is_closed()
    await driver.close()


@ON_ASYNCIO
@pytest.mark.anyio
async def test_redis_closes_what_is_in_use_and_connects_again(valkey: Server) -> None:
    """Whoever uses it afterwards does not notice."""
    client: Any = redis.from_url(valkey.url)
    in_use = await client.connection_pool.get_connection()
    await client.aclose()

    assert not in_use.is_connected
    assert await client.ping()
    await client.aclose()
