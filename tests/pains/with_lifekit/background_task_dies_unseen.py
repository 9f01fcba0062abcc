"""A background task with an owner dies: what lifekit makes of it."""

import asyncio
from collections.abc import AsyncGenerator

from fastapi import FastAPI
from fastapi.testclient import TestClient

from lifekit import Registry

registry = Registry()


async def refresh() -> None:
    raise ConnectionError("the queue is gone")


@registry.resource
async def refresher() -> AsyncGenerator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(refresh())
        yield
        task.cancel()


app = FastAPI(lifespan=registry.lifespan)


@app.get("/health")
async def health() -> str:
    return "fine"


with TestClient(app) as client:
    client.get("/health")
    print(client.get("/health").json())
