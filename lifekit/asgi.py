"""What is ASGI's. FastAPI and Starlette need nothing of it: their lifespan slot is enough."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ._core.errors import DeclarationError, LifekitError
from ._core.mounted import lifespan_of
from ._util.asgi import ASGIApp as ASGIApp
from ._util.asgi import Scope
from ._util.loops import running_loop

if TYPE_CHECKING:
    from ._core.lifespan import Lifespan
    from ._core.registry import Registry

__all__ = ["combine", "health", "lifespan_of"]

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


def health(registry: Registry, *, details: bool = False) -> ASGIApp:
    """Return an ASGI application with ``/livez`` and ``/readyz``: ``app.mount("/", health(registry))``.

    Each answers with 200 or 503, and JSON with ``ready`` and ``live``. ``/readyz`` runs the checks of
    the resources; ``/livez`` does not, so that a database that is down restarts no process.

    Args:
        registry: The registry whose lifespan is meant: the one that serves the request.
        details: Tell of each resource and worker, in ``resources``.
    """

    async def answer(
        scope: Scope,
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            raise LifekitError(f"lifekit.asgi.health serves HTTP, and no {scope['type']}")
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
        found, status = _lifespan_of(registry, scope), 404
        body: dict[str, Any] = {}
        if scope["method"] not in ("GET", "HEAD"):
            status = 405
        elif path in ("/livez", "/readyz"):
            whole = None
            if found is not None:
                checks = found.checks()
                whole = await checks.health() if path == "/readyz" else checks.known()
            body = {"ready": whole is not None and whole.ready, "live": whole is None or whole.live}
            if details and whole is not None:
                body["resources"] = {name: asdict(each) for name, each in whole.resources.items()}
            status = 200 if body[path[1:-1]] else 503
        text = json.dumps(body).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(text)).encode()),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else text})

    return answer


def _lifespan_of(registry: Registry, scope: Scope) -> Lifespan | None:
    state: dict[str, Any] = scope.get("state") or {}
    running = registry.running.get(running_loop(), ())
    found: Lifespan | None = state.get(registry.key) or (running[-1] if running else None)
    return found
