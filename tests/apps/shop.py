"""Applications for any server and event loop: one for each way that a lifespan can go."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from lifekit import Registry, Resource

from .notes import note, note_event, told


class Store:
    """A value that refuses to be read after its closing."""

    def __init__(self) -> None:
        self.is_open = True

    def read(self) -> str:
        if not self.is_open:
            raise RuntimeError("read after it was closed")
        return "read"

    async def aclose(self) -> None:
        self.is_open = False


async def hold(request: Request) -> PlainTextResponse:
    """Answer, once told, with what is read from the request's own store."""
    store: Store = request.state.store
    note("asked")
    await told()
    text = store.read()
    note("answered")
    return PlainTextResponse(text)


def application() -> tuple[Starlette, Registry, Resource[Store]]:
    """An application whose registry has one resource as yet, ``store``."""
    registry = Registry(on_event=note_event)
    store = registry.resource(name="store")(Store)
    app = Starlette(routes=[Route("/hold", hold)], lifespan=registry.lifespan)
    return app, registry, store


steady, steady_registry, steady_store = application()


@steady_registry.resource(steady_store, name="queue")
async def queue(store: Store) -> AsyncIterator[Store]:
    """Opens and closes at once."""
    yield store
    store.read()


failing, failing_registry, failing_store = application()


@failing_registry.resource(failing_store, name="queue")
async def failing_queue(store: Store) -> Store:
    """Fails to open, and says too much."""
    raise ConnectionError(f"no answer from {os.environ['QUEUE_URL']}")


stuck_opening, stuck_opening_registry, stuck_opening_store = application()


@stuck_opening_registry.resource(stuck_opening_store, name="queue", start_timeout=0.5)
async def stuck_opening_queue(store: Store) -> Store:
    """Is never open."""
    await anyio.sleep_forever()
    raise AssertionError


stuck_closing, stuck_closing_registry, stuck_closing_store = application()


@stuck_closing_registry.resource(stuck_closing_store, name="queue", close_timeout=0.5)
async def stuck_closing_queue(store: Store) -> AsyncIterator[Store]:
    """Is never closed."""
    yield store
    await anyio.sleep_forever()
