"""Which lifespans the requests of an application mean: those that began for it."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from functools import partial
from threading import Lock
from types import FrameType, new_class
from typing import TYPE_CHECKING, Any, cast

from lifekit._util.asgi import ASGIApp as ASGIApp
from lifekit._util.asgi import Scope

from .errors import DeclarationError
from .mounted import tell_of_unrun
from .overrides import entered, refuse_useless
from .running import Start, current

if TYPE_CHECKING:
    from .lifespan import Lifespan  # which a request means
    from .node import Variables  # which the lifespan has
    from .resource import Resource  # which errors name


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


class _Incomplete(dict[str, Any]):
    # A request's state in which something is missing, for `request.state.name` to say why.
    def __init__(self, state: dict[str, Any], lifespan: Lifespan) -> None:
        super().__init__((name, state[name]) for name in state if name not in lifespan.missing)
        self._lifespan = lifespan

    def __missing__(self, name: str) -> Any:
        if name in self._lifespan.missing:
            return self._lifespan[name]
        raise KeyError(name)


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
                    elif lifespan.renewed:
                        state.update(lifespan.renewed)
                    if lifespan.missing:
                        scope["state"] = state = _Incomplete(state, lifespan)
        if not lifespans:
            await kind.__call__(self, scope, receive, send)
            return
        if entered:
            for each in lifespans:
                refuse_useless(each)
        token = current.set(lifespans + current.get())
        tokens = [variable.set(value) for variable, value in variables] if variables else None
        generations = [each.generation for each in lifespans]
        for generation in generations:
            generation.begin(scope)
        try:
            await kind.__call__(self, scope, receive, send)
        finally:
            for generation in generations:
                generation.end(scope)
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
