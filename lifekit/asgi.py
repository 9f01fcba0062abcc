"""What is ASGI's. FastAPI and Starlette need nothing of it: their lifespan slot is enough."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

from ._errors import DeclarationError
from ._running import current

__all__ = ["combine"]

Scope = MutableMapping[str, Any]
ASGIApp = Callable[
    [Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]
]
State = Mapping[str, Any]


def combine(
    *lifespans: Callable[[Any], AbstractAsyncContextManager[State | None]],
) -> Callable[[Any], AbstractAsyncContextManager[State]]:
    """Make one lifespan of several: ``FastAPI(lifespan=combine(registry.lifespan, old_lifespan))``.

    They are entered in order and left in reverse; what they yield is merged into one state.

    Raises:
        DeclarationError: At the start, where two of them yield the same key.
    """

    @asynccontextmanager
    async def combined(app: Any) -> AsyncGenerator[State]:
        state: dict[str, Any] = {}
        async with AsyncExitStack() as stack:
            for lifespan in lifespans:
                yielded: State | None = await stack.enter_async_context(lifespan(app))
                more = dict(yielded or {})
                if twice := state.keys() & more.keys():
                    raise DeclarationError(
                        f"two of the combined lifespans yield {', '.join(sorted(twice))}: one would "
                        "hide the other in request.state. Rename one."
                    )
                state |= more
            yield state

    return combined


class RequestContext:
    """ASGI middleware by which `Resource.get` means the lifespan that serves the request."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self.key = key

    async def __call__(
        self,
        scope: Scope,
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        """Serve a request with its lifespan as the current one."""
        lifespan = scope.get("state", {}).get(self.key) if scope["type"] != "lifespan" else None
        if lifespan is None:
            return await self.app(scope, receive, send)
        if lifespan.patches:  # the server copied the state when the lifespan began
            scope = {**scope, "state": {**scope["state"], **lifespan}}
        token = current.set((lifespan, *current.get()))
        try:
            return await self.app(scope, receive, send)
        finally:
            current.reset(token)


def bind_requests(app: Any, key: str) -> None:
    """Put a `RequestContext` around a Starlette application whose lifespan begins; once is enough.

    Its middleware is built by then, unless the lifespan is entered by hand; and the lifespan is the
    only thing that the user names.
    """
    if not hasattr(app, "build_middleware_stack"):
        return
    stack = app.middleware_stack or app.build_middleware_stack()
    layer = stack
    while isinstance(layer, RequestContext):
        if layer.key == key:
            return
        layer = layer.app
    app.middleware_stack = RequestContext(stack, key)
