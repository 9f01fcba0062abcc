"""What the tests of one client compare its applications in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, cast

import anyio
import anyio.lowlevel
import pytest

from lifekit.embedded import Server

from .differential import Worlds, worlds_of

SLEEPING = "FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"


async def asleep(ask: Callable[[str], Any], statement: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Start a statement that sleeps; return its task once the server is at it, or it has failed.

    *ask* gives the first value of a query.
    """
    youngest = f"SELECT coalesce(max(query_start), '-infinity') > %s {SLEEPING}"
    before = ask(f"SELECT coalesce(max(query_start), '-infinity')::text {SLEEPING}")
    task = asyncio.create_task(statement)
    with anyio.fail_after(60):
        while not task.done() and not ask(youngest.replace("%s", f"'{before}'")):
            await anyio.lowlevel.checkpoint()
    return task


@pytest.fixture(scope="module")
def worlds(request: pytest.FixtureRequest, postgres: Server) -> Iterator[Worlds]:
    """Production and a sandbox for the module's ``CLIENT``."""
    module: Any = cast(Any, request).module
    with worlds_of(postgres, module.CLIENT) as worlds:
        yield worlds
