"""An outbox that is delivered, a list that is purged, and a stream of what happens."""

from __future__ import annotations

# --8<-- [start:workers]
import asyncio
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

import lifekit
from lifekit import Registry
from lifekit.asgi import health

registry = Registry("shop")


@registry.resource
def jobs() -> asyncio.Queue[str]:
    return asyncio.Queue()


@registry.resource
def delivered() -> list[str]:
    return []


async def each(jobs: asyncio.Queue[str]) -> AsyncIterator[str]:
    while True:
        yield await jobs.get()


@registry.worker(jobs, delivered, drain=5.0)
async def outbox(jobs: asyncio.Queue[str], delivered: list[str]) -> None:
    async for job in lifekit.stopping().until(each(jobs)):
        delivered.append(job)


@registry.worker(delivered, every=60.0)
async def purge(delivered: list[str]) -> None:
    del delivered[:-100]


# --8<-- [end:workers]

# --8<-- [start:stream]
app = FastAPI(lifespan=registry.lifespan)


async def ticks() -> AsyncIterator[str]:
    while True:
        yield "data: tick\n\n"
        await asyncio.sleep(1)


@app.get("/events")
async def events() -> StreamingResponse:
    stream = lifekit.stopping().until(ticks())
    return StreamingResponse(stream, media_type="text/event-stream")


# --8<-- [end:stream]

# --8<-- [start:health]
app.mount("/health", health(registry))  # /health/livez and /health/readyz
# --8<-- [end:health]
