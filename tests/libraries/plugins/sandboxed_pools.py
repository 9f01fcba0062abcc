"""A pytest plugin: what a library does over a pool is undone when the library closes the pool.

With `outliving` a pool is for many tests, and who opened it says where the block of each begins and
ends. Either way the database has to hold afterwards what it held before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, cast

import aiopg
import asyncpg

from lifekit import drivers
from lifekit.drivers import Sandbox

_PATIENCE = 2.0  # seconds: a task of a test that failed may hold a connection for ever

_OURS = "NOT IN ('pg_catalog', 'information_schema', 'pg_toast')"
_TABLES = f"""SELECT oid::regclass::text FROM pg_class
WHERE relkind = 'r' AND relpersistence <> 't' AND relnamespace::regnamespace::text {_OURS} ORDER BY 1"""
_SCHEMA = """SELECT concat_ws(' ', (SELECT count(*) FROM pg_class WHERE relpersistence <> 't'),
(SELECT count(*) FROM pg_proc), (SELECT count(*) FROM pg_constraint), (SELECT count(*) FROM pg_trigger),
(SELECT count(*) FROM pg_type WHERE typnamespace::regnamespace::text !~ '^pg_(toast_)?temp'))"""


class _Open(NamedTuple):
    pool: Any
    sandbox: Sandbox
    held: dict[str, str] | None


_open: dict[int, _Open] = {}
_outliving: list[list[Sandbox]] = []


@contextmanager
def outliving() -> Generator[list[Sandbox]]:
    """Yield the list that takes the sandboxes of the pools which open in the block, not begun."""
    _outliving.append([])
    try:
        yield _outliving[-1]
    finally:
        _outliving.pop()


async def held(pool: Any) -> dict[str, str]:
    """Return what the database of a pool holds: each table's rows, shortened, and its schema's size."""
    found = {"schema": (await _ask(pool, _SCHEMA))[0]}
    for table in await _ask(pool, _TABLES):
        rows = "md5(string_agg(t::text, ',' ORDER BY t::text))"
        found[table] = (await _ask(pool, f"SELECT concat(count(*), ' ', {rows}) FROM {table} t"))[0]
    return found


async def _ask(pool: Any, sql: str) -> list[str]:
    async with pool.acquire() as connection:
        if isinstance(pool, asyncpg.Pool):
            return [row[0] for row in await connection.fetch(sql)]
        async with connection.cursor() as cursor:
            await cursor.execute(sql)
            return [row[0] for row in await cursor.fetchall()]


async def _opened(pool: Any) -> None:
    driver = drivers.find(pool)
    assert driver is not None
    sandbox = driver.sandbox(pool)
    assert sandbox is not None
    if _outliving:
        _outliving[-1].append(sandbox)
        _open[id(pool)] = _Open(pool, sandbox, None)
    else:
        _open[id(pool)] = _Open(pool, sandbox, await held(pool))
        await sandbox.begin()


async def _closing(pool: Any, close: Callable[[], Awaitable[object]]) -> None:
    """Close a pool in its block, as the library does, and then the real one."""
    if id(pool) not in _open:
        await close()
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE):
            await close()
    left = _open.pop(id(pool), None)
    if left is not None:
        try:
            await left.sandbox.end()
            assert left.held in (None, await held(pool)), "what the test did lasts"
        finally:
            await left.sandbox.close()
            if not isinstance(pool, asyncpg.Pool):
                pool.close()
            await close()


def _watch_asyncpg(kind: Any) -> None:
    open_, close, terminate = kind._async__init__, kind.close, kind.terminate

    async def opening(pool: Any) -> Any:
        new = not (pool._initialized or pool._initializing)
        await open_(pool)
        if new:
            await _opened(pool)
        return pool

    async def closing(pool: Any) -> None:
        await _closing(pool, lambda: cast(Awaitable[object], close(pool)))

    def terminating(pool: Any) -> None:
        left = _open.pop(id(pool), None)
        if left is not None:
            left.sandbox.terminate()
        terminate(pool)

    kind._async__init__, kind.close, kind.terminate = opening, closing, terminating


def _watch_aiopg(kind: Any) -> None:
    open_, wait_closed = kind.from_pool_fill.__func__, kind.wait_closed

    async def opening(cls: Any, *args: Any, **options: Any) -> Any:
        pool = await open_(cls, *args, **options)
        await _opened(pool)
        return pool

    async def closing(pool: Any) -> None:
        await _closing(pool, lambda: cast(Awaitable[object], wait_closed(pool)))

    kind.from_pool_fill, kind.wait_closed = classmethod(opening), closing


_watch_asyncpg(asyncpg.Pool)
_watch_aiopg(aiopg.Pool)
