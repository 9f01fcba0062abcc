"""A pytest plugin: what a library does over a pool is undone when the library closes the pool.

With `outliving` a pool is for many tests, and who opened it says where the block of each begins and
ends. Either way the database has to hold afterwards what it held before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, cast

import aiopg
import asyncpg

from lifekit import drivers
from lifekit._sandbox.postgres.sandbox import PostgresSandbox
from lifekit.drivers import Sandbox

_PATIENCE = 2.0  # seconds: a task of a test that failed may hold a connection for ever

_OURS = "NOT IN ('pg_catalog', 'information_schema', 'pg_toast')"
_TABLES = f"""SELECT oid::regclass::text FROM pg_class
WHERE relkind = 'r' AND relpersistence <> 't' AND relnamespace::regnamespace::text {_OURS} ORDER BY 1"""
_SCHEMA = """SELECT concat_ws(' ', (SELECT count(*) FROM pg_class WHERE relpersistence <> 't'),
(SELECT count(*) FROM pg_proc), (SELECT count(*) FROM pg_constraint), (SELECT count(*) FROM pg_trigger),
(SELECT count(*) FROM pg_type WHERE typnamespace::regnamespace::text !~ '^pg_(toast_)?temp'))"""


class _Both(Sandbox):
    """The sandbox of a lifespan that has one pool."""

    def __init__(self, pool: Any) -> None:
        driver: Any = drivers.find(pool)
        self.postgres = PostgresSandbox()
        self.pool: Any = driver.redirect(pool, self.postgres)
        self.reconnect = partial(driver.reconnect, pool)

    async def begin(self) -> None:
        await self.postgres.begin()
        await self.pool.begin()

    async def end(self) -> None:
        try:
            await self.pool.end()
        finally:
            await self.postgres.end()

    def terminate(self) -> None:
        self.postgres.finish()


class _Open(NamedTuple):
    pool: Any
    sandbox: _Both
    held: dict[str, str] | None


_open: dict[int, _Open] = {}
_outliving: list[list[_Both]] = []


@contextmanager
def outliving() -> Generator[list[_Both]]:
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
    # By a connection of its own: the pool may be closed.
    if hasattr(pool, "_connect_args"):  # asyncpg's
        connection = await asyncpg.connect(*pool._connect_args, **pool._connect_kwargs)
        try:
            return [row[0] for row in await connection.fetch(sql)]
        finally:
            await connection.close()
    async with aiopg.connect(**pool._given) as other, other.cursor() as cursor:
        await cursor.execute(sql)
        return [row[0] for row in await cursor.fetchall()]


async def _opened(pool: Any, sandbox: _Both) -> None:
    driver: Any = drivers.find(pool)
    driver.watch(pool)
    if _outliving:
        _outliving[-1].append(sandbox)
        _open[id(pool)] = _Open(pool, sandbox, None)
    else:
        _open[id(pool)] = _Open(pool, sandbox, await held(pool))
        await sandbox.begin()


async def _closing(pool: Any, close: Callable[[], Awaitable[object]]) -> None:
    """Close a pool in its block, as the library does, and undo what was done."""
    left = _open.pop(id(pool), None)
    with suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE if left is not None else None):
            await close()
    if left is not None:
        try:
            await left.sandbox.end()
            assert left.held in (None, await held(pool)), "what the test did lasts"
        finally:
            left.sandbox.terminate()


def _watch_asyncpg(kind: Any) -> None:
    open_, close, terminate = kind._async__init__, kind.close, kind.terminate

    async def opening(pool: Any) -> Any:
        new = not (pool._initialized or pool._initializing)
        sandbox = _Both(pool) if new else None
        await open_(pool)
        if sandbox is not None:
            await _opened(pool, sandbox)
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
        sandbox = _Both(pool)
        await sandbox.reconnect()
        await _opened(pool, sandbox)
        return pool

    async def closing(pool: Any) -> None:
        await _closing(pool, lambda: cast(Awaitable[object], wait_closed(pool)))

    kind.from_pool_fill, kind.wait_closed = classmethod(opening), closing


_watch_asyncpg(asyncpg.Pool)
_watch_aiopg(aiopg.Pool)
