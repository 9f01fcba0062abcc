"""The conftest.py that Tortoise ORM's tests want and its sdist lacks: a database for them.

All of them share one, which is emptied after each.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from importlib import import_module
from typing import Any

import pytest_asyncio

_context: Any = import_module("tortoise.context")
_config: Any = import_module("tortoise.backends.base.config_generator")


async def _set_up(context: Any) -> None:
    url = os.environ["DATABASE_URL"].replace("postgresql:", "asyncpg:", 1)
    modules = {"models": ["tests.testmodels"]}
    config = _config.generate_config(url, app_modules=modules, connection_label="models")
    await context.init(config=config, use_tz=True, timezone="UTC")
    await context.generate_schemas(safe=True)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared() -> AsyncGenerator[Any]:
    """A context for the run."""
    async with _context.TortoiseContext() as context:
        await _set_up(context)
        yield context


@pytest_asyncio.fixture(loop_scope="session")
async def db(shared: Any) -> AsyncGenerator[Any]:
    """The shared context; what is done to it is deleted."""
    token = _context._current_context.set(shared)
    before, _context._global_context = _context._global_context, shared
    try:
        yield shared
    finally:
        await shared.db().execute_script(_deletions(shared))
        _context._global_context = before
        _context._current_context.reset(token)


def _deletions(context: Any) -> str:
    tables = [model._meta.db_table for model in context.apps.get_models_iterable()]
    rows = "; ".join(f'DELETE FROM "{table}"' for table in tables)
    return f"SET session_replication_role = replica; {rows}; RESET session_replication_role"


@pytest_asyncio.fixture(loop_scope="session")
async def db_isolated() -> AsyncGenerator[Any]:
    """A context of the test's own."""
    async with _context.TortoiseContext() as context:
        await _set_up(context)
        yield context
        await context.db().execute_script(_deletions(context))


db_simple = db_truncate = db
