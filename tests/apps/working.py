"""An application with a worker, an endless stream and websocket, which end when told of the stop.

CRASH names the worker's fate: it crashes as soon as the file ``crash`` is there.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

import lifekit
from lifekit import Registry, asgi

from .notes import note, note_event, told

registry = Registry(
    on_event=note_event,
    close_timeout=60,
    grace=120,
    drain_delay=float(os.environ.get("DELAY", "0")),
)


@registry.resource
async def ledger() -> AsyncGenerator[str]:
    yield "ledger"


@registry.worker(ledger, restart="never", drain=60.0)
async def outbox(ledger: str) -> None:
    async with anyio.create_task_group() as tasks:
        if "CRASH" in os.environ:
            tasks.start_soon(_crash)
        await lifekit.stopping().wait()
        note("noticed")
        tasks.cancel_scope.cancel()


async def _crash() -> None:
    await told("crash")
    raise RuntimeError("the outbox is broken")


async def stream(request: Request) -> StreamingResponse:
    """Answer without an end, but for that of the application."""

    async def numbers() -> AsyncGenerator[bytes]:
        async for _ in lifekit.stopping().until(_ticks()):
            yield b"tick\n"
        note("stream ended")

    return StreamingResponse(numbers())


async def socket(websocket: WebSocket) -> None:
    """Say something now and then, until the application ends."""
    await websocket.accept()
    async for _ in lifekit.stopping().until(_ticks()):
        await websocket.send_text("tick")
    note("websocket ended")
    await websocket.close(1001, "the application stops")


async def _ticks() -> AsyncGenerator[None]:
    yield
    await anyio.sleep_forever()


async def quick(request: Request) -> PlainTextResponse:
    """Answer at once."""
    return PlainTextResponse("here")


app = Starlette(
    routes=[
        Route("/", quick),
        Route("/stream", stream),
        WebSocketRoute("/socket", socket),
        Mount("/health", asgi.health(registry)),
    ],
    lifespan=registry.lifespan,
)
