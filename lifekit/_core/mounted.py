"""The lifespan of another ASGI application: run by a resource, or missed by one that is mounted."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import anyio

from lifekit import events
from lifekit._util.asgi import ASGIApp, Scope
from lifekit._util.redact import redact

from .errors import LifekitError, name_of

if TYPE_CHECKING:
    from .lifespan import Lifespan  # which its notice names

_run: list[object] = []
"""The applications whose lifespans `lifespan_of` runs now."""


@asynccontextmanager
async def lifespan_of(app: ASGIApp) -> AsyncGenerator[dict[str, Any]]:
    """Return the lifespan of another ASGI application, for a factory to return.

    A server runs the lifespan of the application that it serves, and of none that is mounted in it. The
    resource's value is the state that the other one's lifespan yields.

    Args:
        app: The application, such as ``mcp.streamable_http_app()`` of FastMCP.

    Raises:
        LifekitError: At the start: it said that it failed, or has no lifespan; at the end: it said that
            it did not stop cleanly.
        BaseException: What it raised itself.
    """
    async with _Conversation(app).running() as state:
        yield state


class _Conversation:
    """What is said to an application, and what it answers, by ASGI's lifespan protocol."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._state: dict[str, Any] = {}
        self._asked = self._up = False
        self._refusal: str | None = None
        self._error: BaseException | None = None
        self._answered, self._stop = anyio.Event(), anyio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[dict[str, Any]]:
        failure: BaseException | None = None
        # A task of its own: the scopes that the application holds open it leaves where it entered them.
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._talk)
            await self._answered.wait()
            if self._up:
                _run.append(self._app)
                try:
                    yield self._state
                except (Exception, KeyboardInterrupt, SystemExit) as error:
                    failure = error  # out of the group, which would wrap it
                finally:
                    _run.remove(self._app)
                    self._stop.set()
            else:
                self._tasks.cancel_scope.cancel()  # it has said all, whether it returns or not
        failure = failure or self._error
        if failure is None and not self._up:
            failure = LifekitError(self._refused())
        if failure is not None:
            raise failure

    async def _talk(self) -> None:
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self._state,
        }
        try:
            await self._app(scope, self._receive, self._send)
            if self._refusal is not None:
                self._error = LifekitError(self._refused())
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            self._error = error
            if not self._asked and isinstance(error, Exception):
                self._error = LifekitError(self._has_none("it raised " + name_of(error)))
                self._error.__cause__ = error
        self._answered.set()
        if self._error is not None and not self._stop.is_set():
            self._tasks.cancel_scope.cancel()  # what is around the `yield`, as a group that dies does

    def _refused(self) -> str:
        if self._refusal is None:
            return self._has_none("it ended")
        what = "stop cleanly" if self._up else "start"
        return f"{self._name()} did not {what}: {self._refusal or 'it gave no reason'}"

    async def _receive(self) -> Scope:
        if not self._asked:
            self._asked = True
            return {"type": "lifespan.startup"}
        await self._stop.wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Scope) -> None:
        if message["type"] == "lifespan.startup.complete":
            self._up = True
            self._answered.set()
        elif message["type"] in ("lifespan.startup.failed", "lifespan.shutdown.failed"):
            self._refusal = redact(message.get("message") or "")
            self._answered.set()

    def _name(self) -> str:
        return f"the application {name(self._app)}"

    def _has_none(self, what: str) -> str:
        return (
            f"{self._name()} has no lifespan: called for one, {what} before it said that it is up. "
            "Leave out lifespan_of(…)."
        )


def name(app: object) -> str:
    """Return how a message calls an application."""
    title: object = getattr(app, "title", None) or getattr(app, "__name__", None)
    return repr(title) if isinstance(title, str) else f"<{type(app).__qualname__}>"


# -- what is mounted, and starts with nobody -------------------------------------------------------


def tell_of_unrun(app: Any, lifespan: Lifespan) -> None:
    """Warn of each application mounted in *app* whose own lifespan nobody runs."""
    for path, mounted in _mounted(app):
        slot = mounted.router.lifespan_context
        if any(mounted is each for each in _run) or _opens_the_same(slot, lifespan):
            continue
        events.logger.warning(
            f"{lifespan.registry.name}: {name(mounted)}, mounted at {path or '/'}, has a lifespan that "
            "nobody runs: a server runs that of the outermost application alone. Let a resource do it: "
            "@registry.resource / def mounted(): return lifekit.asgi.lifespan_of(app)."
        )


def _mounted(app: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    routes = cast("list[Any]", getattr(app, "routes", None) or [])
    for route in routes:
        inner = getattr(route, "_base_app", None)  # Starlette's Mount, under its middleware
        if inner is None:
            continue
        path = f"{prefix}{getattr(route, 'path', '')}"
        if _has_lifespan(inner):
            yield path, inner
        yield from _mounted(inner, path)


def _has_lifespan(app: Any) -> bool:
    router = getattr(app, "router", None)
    slot = getattr(router, "lifespan_context", None)
    if slot is None:
        return False
    if type(slot).__name__ != "_DefaultLifespan":
        return True
    # FastAPI's own, and that of Starlette before 1.0, call functions that were registered.
    return bool(getattr(router, "on_startup", None) or getattr(router, "on_shutdown", None))


def _opens_the_same(slot: object, lifespan: Lifespan) -> bool:
    registry: Any = getattr(slot, "__self__", None)
    return isinstance(registry, type(lifespan.registry)) and all(
        map(lifespan.declares, registry.plan().resources)
    )
