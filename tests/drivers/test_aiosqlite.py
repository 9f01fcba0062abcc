"""The driver of aiosqlite's connections."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiosqlite
import anyio
import pytest

from lifekit import Registry
from lifekit.drivers.aiosqlite import driver

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def awaited() -> aiosqlite.Connection:
    return await aiosqlite.connect(":memory:")


@pytest.mark.parametrize("make", [awaited, lambda: aiosqlite.connect(":memory:")])
async def test_a_connection_opens_works_and_is_closed(make: Callable[[], Any]) -> None:
    """Be it awaited by the factory or not."""
    registry = Registry("drivers")
    store = registry.resource(name="store")(make)
    async with registry.lifespan() as lifespan:
        connection = lifespan[store]
        await driver.check(connection)
        assert (await lifespan.health()).ready
    with pytest.raises(ValueError, match=r"closed|no active"):
        await connection.execute("SELECT 1")


async def test_it_is_described_by_its_database(tmp_path: Path) -> None:
    async with aiosqlite.connect(tmp_path / "shop.db") as connection:
        assert driver.describe(connection) == f"aiosqlite connection, {tmp_path / 'shop.db'}"


async def test_the_check_fails_where_it_is_closed() -> None:
    connection = await awaited()
    await driver.close(connection)
    with pytest.raises(ValueError, match=r"closed|no active"):
        await driver.check(connection)


async def test_a_statement_in_the_midst_of_its_work_is_cut_off() -> None:
    """And the thread ends, which else would keep the process alive."""
    connection: Any = await awaited()
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    await connection.set_progress_handler(lambda: driver.terminate(connection), 1000)
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        await connection.execute_fetchall(endless)
    await anyio.to_thread.run_sync(connection._thread.join)
