"""The conftest.py that Tortoise ORM's tests want and its sdist lacks: databases for them.

Most tests share one database. What they do is undone by the sandbox where there is one, and otherwise
by deleting all rows.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

import asyncpg
import pytest_asyncio

_context: Any = import_module("tortoise.context")
_config: Any = import_module("tortoise.backends.base.config_generator")
_pools: Any = sys.modules.get("sandboxed_pools")


class Shared(NamedTuple):
    """A context of Tortoise for many tests, and the sandboxes of its pools."""

    context: Any
    sandboxes: list[Any]


@asynccontextmanager
async def _database() -> AsyncGenerator[str]:
    server, _, _ = os.environ["DATABASE_URL"].rpartition("/")
    name = f"test_{uuid.uuid4().hex}"
    admin = await asyncpg.connect(os.environ["DATABASE_URL"])
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        yield f"{server}/{name}".replace("postgresql:", "asyncpg:", 1)
        await admin.execute(f"DROP DATABASE {name} (FORCE)")
    finally:
        await admin.close()


async def _set_up(context: Any, url: str) -> None:
    modules = {"models": ["tests.testmodels"]}
    config = _config.generate_config(url, app_modules=modules, connection_label="models")
    await context.init(config=config, use_tz=True, timezone="UTC")
    await context.generate_schemas(safe=False)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared() -> AsyncGenerator[Shared]:
    """One database for the run, which the sandboxed tests have to leave as it is."""
    async with _database() as url, _context.TortoiseContext() as context:
        with _pools.outliving() if _pools else nullcontext([]) as sandboxes:
            await _set_up(context, url)
        pool = context.db()._pool
        before = await _pools.held(pool) if _pools else None
        yield Shared(context, sandboxes)
        assert before is None or before == await _pools.held(pool), "what a test did lasts"


@pytest_asyncio.fixture(loop_scope="session")
async def db(shared: Shared) -> AsyncGenerator[Any]:
    """The shared context; what is done to it is undone."""
    context = shared.context
    token = _context._current_context.set(context)
    before, _context._global_context = _context._global_context, context
    for sandbox in shared.sandboxes:
        await sandbox.begin()
    try:
        yield context
    finally:
        for sandbox in shared.sandboxes:
            await sandbox.end()
        if not shared.sandboxes:
            await context.db().execute_script(_deletions(context))
        _context._global_context = before
        _context._current_context.reset(token)


def _deletions(context: Any) -> str:
    tables = [model._meta.db_table for model in context.apps.get_models_iterable()]
    rows = "; ".join(f'DELETE FROM "{table}"' for table in tables)
    return f"SET session_replication_role = replica; {rows}; RESET session_replication_role"


@pytest_asyncio.fixture(loop_scope="session")
async def db_isolated() -> AsyncGenerator[Any]:
    """A context, and a database of its own."""
    async with _database() as url, _context.TortoiseContext() as context:
        await _set_up(context, url)
        yield context


db_simple = db_truncate = db
