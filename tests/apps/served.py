"""An application whose resources and requests write down each of their steps.

MODE names what does not end by itself: the start ("start"), a closing ("closing"), a closing that
ignores its cancellation too ("deaf"). Without DATABASE_URL it has no drivers, which are asyncio's, so
that trio can serve it too.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from lifekit import Registry

from .notes import note, note_event, told

MODE = os.environ.get("MODE", "")

registry = Registry(start_timeout=60, close_timeout=60, grace=120, on_event=note_event)


class Nothing:
    """What stands in for either where neither is there."""


factories: tuple[Callable[[], Any], Callable[[], Any]] = (Nothing, Nothing)
if "DATABASE_URL" in os.environ:
    from .stores import open_client, open_pool

    factories = open_pool, open_client

db = registry.resource(name="db")(factories[0])
cache = registry.resource(name="cache")(factories[1])


@registry.resource(
    db,
    cache,
    start_timeout=float(os.environ.get("START_TIMEOUT", "60")),
    close_timeout=float(os.environ.get("CLOSE_TIMEOUT", "60")),
)
async def ledger(db: Any, cache: Any) -> AsyncGenerator[None]:
    """What saves at its end, which takes several turns of the loop."""
    if MODE == "start":
        await told("start")
    yield
    if MODE == "closing":
        await told("close", saying="turn")
    if MODE == "deaf":
        with anyio.CancelScope(shield=True):
            await anyio.sleep_forever()
    for _ in range(5):
        await anyio.sleep(0.01)
    if "DATABASE_URL" in os.environ:
        await db.fetchval("SELECT 42")
        await cache.ping()
    note("saved")


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncGenerator[Any]:
    """Keep the process alive when its resources are closed, where EXIT says so."""
    async with registry.lifespan() as state:
        yield state
    if "EXIT" in os.environ:
        await told("exit")


async def quick(request: Request) -> PlainTextResponse:
    """Answer at once."""
    return PlainTextResponse("here")


async def in_background() -> None:
    """Go on behind an answer."""
    note("background")
    await told("background")
    note("background done")


async def hold(request: Request) -> PlainTextResponse:
    """Answer once told, and go on behind the answer."""
    note("asked")
    await told()
    note("answered")
    return PlainTextResponse("held", background=BackgroundTask(in_background))


async def stream(request: Request) -> StreamingResponse:
    """Answer without an end."""

    async def numbers() -> AsyncGenerator[bytes]:
        number = 0
        note("streaming")
        try:
            while True:
                yield b"%d\n" % number
                number += 1
                await anyio.sleep(0.02)
        finally:
            note("stream ended")

    return StreamingResponse(numbers())


app = Starlette(
    routes=[Route("/", quick), Route("/hold", hold), Route("/stream", stream)], lifespan=lifespan
)
