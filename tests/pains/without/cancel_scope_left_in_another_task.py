"""A task group in an async fixture: its two halves run in two tasks."""

import asyncio
from collections.abc import AsyncGenerator

import anyio
from anyio.abc import TaskGroup


async def workers() -> AsyncGenerator[TaskGroup]:
    async with anyio.create_task_group() as group:
        yield group


async def set_up(fixture: AsyncGenerator[TaskGroup]) -> None:
    await anext(fixture)


async def tear_down(fixture: AsyncGenerator[TaskGroup]) -> None:
    await anext(fixture, None)


with asyncio.Runner() as runner:
    fixture = workers()
    runner.run(set_up(fixture))
    runner.run(tear_down(fixture))
