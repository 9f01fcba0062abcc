"""A task group as a resource: both halves run in one task, wherever its lifespan ends."""

import asyncio
from collections.abc import AsyncGenerator

import anyio
from anyio.abc import TaskGroup

from lifekit import Lifespan, Registry

registry = Registry()


@registry.resource
async def workers() -> AsyncGenerator[TaskGroup]:
    async with anyio.create_task_group() as group:
        yield group


async def set_up(fixture: Lifespan) -> None:
    await fixture.__aenter__()


async def tear_down(fixture: Lifespan) -> None:
    await fixture.__aexit__(None, None, None)
    print("torn down")


with asyncio.Runner() as runner:
    fixture = registry.lifespan()
    runner.run(set_up(fixture))
    runner.run(tear_down(fixture))
