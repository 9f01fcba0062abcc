"""A task group of the application: both its halves run in one task."""

from collections.abc import AsyncGenerator

import anyio
import anyio.lowlevel
import pytest
from anyio.abc import TaskGroup
from fastapi import FastAPI

from lifekit import Lifespan, Registry

registry = Registry()


@registry.resource
async def workers() -> AsyncGenerator[TaskGroup]:
    async with anyio.create_task_group() as group:
        yield group


app = FastAPI(lifespan=registry.lifespan)


@pytest.mark.asyncio
async def test_start(lifespan: Lifespan) -> None:
    lifespan[workers].start_soon(anyio.lowlevel.checkpoint)
