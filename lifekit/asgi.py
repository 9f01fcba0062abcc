"""What is ASGI's. FastAPI and Starlette need nothing of it: their lifespan slot is enough."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from functools import partial
from threading import Lock
from types import FrameType, new_class
from typing import TYPE_CHECKING, Any, cast

from ._backend import running_loop
from ._errors import DeclarationError, LifekitError
from ._mounted import ASGIApp as ASGIApp
from ._mounted import Scope as Scope
from ._mounted import lifespan_of, tell_of_unrun
from ._overrides import entered, refuse_useless
from ._running import Start, current

if TYPE_CHECKING:
    from ._lifespan import Lifespan
    from ._node import Variables
    from ._registry import Registry
    from ._resource import Resource

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


def bind_requests(app: Any, lifespan: Lifespan) -> None:
    """Let the requests of a Starlette application mean the lifespan that begins for it.

    Raises:
        DeclarationError: Another one began in the same start, and opens some of the same resources.
    """
    lifespan.start = Start(None if app is None else id(app), _framework_frames())
    if app is None:
        return
    lifespan.start = lifespan.start._replace(is_up=partial(tell_of_unrun, app))
    for first in current.get():
        if first not in first.registry.running.get(first.loop, ()):
            continue  # it is over, and other frames may be where its own were
        shared = next(filter(first.declares, lifespan.registry.plan().resources), None)
        same_app = first.start.app in (None, lifespan.start.app)
        if shared is not None and same_app and first.start.frames & lifespan.start.frames:
            raise DeclarationError(_begun_twice(shared, first.registry.name, lifespan.registry.name))
    if hasattr(type(app), "build_middleware_stack"):  # pyright: ignore[reportUnknownArgumentType]
        _surround(app, lifespan.registry.key)


_surrounding = Lock()


def _surround(app: Any, key: str) -> None:
    # Servers have the application itself, and Python looks for `__call__` in its class. Whatever stands
    # inside goes when somebody builds the middleware anew: a lifespan that sets `middleware_stack`, or
    # OpenTelemetry's instrumentor, which puts back a `build_middleware_stack` that it found.
    with _surrounding:
        kind = cast("Any", type(app))
        outermost: Any = app
        if not hasattr(kind, "_lifekit_keys"):
            known = (each for each in kind.__subclasses__() if "_lifekit_keys" in vars(each))
            try:
                object.__setattr__(app, "__class__", next(known, None) or with_request_context(kind))
            except Exception:  # a class of the user's that can't be derived from, or changed
                outermost = _middleware_of(app)
        if key not in outermost._lifekit_keys:
            object.__setattr__(outermost, "_lifekit_keys", (*outermost._lifekit_keys, key))


def _middleware_of(app: Any) -> Any:
    if not hasattr(app.middleware_stack, "_lifekit_keys"):
        stack = app.middleware_stack or app.build_middleware_stack()
        app.middleware_stack = with_request_context(_Middleware)(stack)
    return app.middleware_stack


class _Middleware:
    # What is inside of an application, surrounded where the application itself can't be.
    def __init__(self, stack: ASGIApp) -> None:
        self._stack = stack

    async def __call__(
        self,
        scope: Scope,
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        await self._stack(scope, receive, send)


def with_request_context(kind: type[Any]) -> type[Any]:
    """Return a class of applications whose requests have their own lifespans as the current ones."""

    async def __call__(
        self: Any,
        scope: Scope,
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        lifespans: tuple[Lifespan, ...] = ()
        variables: Variables = ()
        state: dict[str, Any] | None = scope.get("state")
        if state and scope["type"] != "lifespan":
            for key in self._lifekit_keys:
                lifespan: Lifespan | None = state.get(key)
                if lifespan is not None:
                    lifespans = (lifespan, *lifespans)
                    if lifespan.variables:
                        variables += lifespan.variables
                    if lifespan.patches:  # the server copied the state when the lifespan began
                        state.update(lifespan)
        if not lifespans:
            await kind.__call__(self, scope, receive, send)
            return
        if entered:
            for each in lifespans:
                refuse_useless(each)
        token = current.set(lifespans + current.get())
        tokens = [variable.set(value) for variable, value in variables] if variables else None
        try:
            await kind.__call__(self, scope, receive, send)
        finally:
            current.reset(token)
            while tokens:
                tokens[-1].var.reset(tokens.pop())

    # All else is as it was: code that looks at the application sees the class that it had.
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    body = {**names, "__slots__": (), "_lifekit_keys": (), "__call__": __call__}
    return new_class(kind.__name__, (kind,), exec_body=lambda own: own.update(body))


_FRAMEWORKS = frozenset({"starlette", "fastapi"})


def _framework_frames() -> frozenset[int]:
    # The lifespans that FastAPI merged are entered inside each other, in frames of its own: what begins
    # in one of those is the same start. Two starts in one task share only frames of their caller.
    frames: list[int] = []
    frame: FrameType | None = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        if frame.f_globals.get("__package__") in _FRAMEWORKS:
            frames.append(id(frame))
        frame = frame.f_back
    return frozenset(frames)


def _begun_twice(shared: Resource[Any], first: str, second: str) -> str:
    return (
        f"{shared.name} ({shared.location}) would be opened twice in one start of the application: by "
        f"a lifespan of {first!r}, and by one of {second!r}.\n"
        "FastAPI runs the application's lifespan and that of each router as often as it includes the "
        "router, and these are of one registry, or of two that include one. Let the application alone "
        "have it: FastAPI(lifespan=registry.lifespan), and APIRouter() without a lifespan."
    )
