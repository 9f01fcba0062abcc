"""A fixture with a task group: it is set up in one task and torn down in another."""

from collections.abc import AsyncGenerator

import anyio
import anyio.lowlevel
import pytest
import pytest_asyncio
from anyio.abc import TaskGroup


@pytest_asyncio.fixture
async def workers() -> AsyncGenerator[TaskGroup]:
    async with anyio.create_task_group() as group:
        yield group


@pytest.mark.asyncio
async def test_start(workers: TaskGroup) -> None:
    workers.start_soon(anyio.lowlevel.checkpoint)
