"""Where the running lifespans are, and which of them a piece of code means."""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from lifekit._util.loops import running_loop

from .errors import NotOpenError, WrongLoopError

if TYPE_CHECKING:
    from .lifespan import Lifespan  # which it looks for
    from .resource import Resource  # whose lifespan is looked for

T = TypeVar("T")

current: ContextVar[tuple[Lifespan, ...]] = ContextVar("lifekit.current", default=())
"""The lifespans of this context, the innermost first."""


everywhere: dict[object, tuple[Lifespan, ...]] = {}
"""The lifespans that run in each event loop of the process, the latest last."""


class Start(NamedTuple):
    """In which start of which application a lifespan begins, as far as the stack tells."""

    app: int | None = None
    frames: frozenset[int] = frozenset()
    is_up: Callable[[Lifespan], object] = bool
    """Called when all is open."""


def find(resource: Resource[T]) -> T:
    """Return the value of *resource* in the lifespan that the calling code means.

    Raises:
        NotOpenError: No lifespan has opened it.
        WrongLoopError: It is open in another event loop.
    """
    here = running_loop()
    elsewhere: Lifespan | None = None
    for lifespan in _candidates(resource, here):
        if not lifespan.declares(resource) or lifespan.process != os.getpid():
            continue
        # A thread without a loop of its own got here with its starter's context, which for a thread of
        # a pool may be that of its first use, whose lifespan is over.
        if lifespan.loop is here or (
            here is None and lifespan in resource.registry.running.get(lifespan.loop, ())
        ):
            return lifespan[resource]  # it is this one's, or nobody's
        if resource in lifespan.live:
            elsewhere = elsewhere or lifespan
    if elsewhere is None and here is not None:
        others = [each for many in resource.registry.running.copy().values() for each in many]
        elsewhere = next((each for each in others if resource in each.live), None)
    if elsewhere is None:
        if here is None:
            return _find_from_thread(resource)
        raise _not_open(resource, here)
    raise wrong_loop(resource.name, elsewhere, here)


def wrong_loop(name: str, lifespan: Lifespan, here: object) -> WrongLoopError:
    """Return the error for code that runs in the loop *here* and means *lifespan*'s."""
    return WrongLoopError(
        f"{name} was opened in {_loop_name(lifespan.loop)}, by the lifespan at {lifespan.location}; "
        f"this code runs in {_loop_name(here)}. A connection belongs to the loop that opened it: run "
        "this code in that loop, or open a lifespan in this one.",
        resource=name,
        opened_at=lifespan.location,
    )


def why_not_open(lifespan: Lifespan, resource: Resource[Any]) -> str:
    """Return why *lifespan* has no value of *resource*."""
    if not lifespan.declares(resource):
        return (
            f"{resource.name} ({resource.location}) belongs to the registry "
            f"{resource.registry.name!r}, and this is a lifespan of {lifespan.registry.name!r}. "
            "Include that registry, or open a lifespan of it."
        )
    state = "not entered yet" if lifespan._engine is None else "closing or closed"  # pyright: ignore[reportPrivateUsage]
    if lifespan._engine is not None and not lifespan._engine.stopping:  # pyright: ignore[reportPrivateUsage]
        state = "still starting"
    return (
        f"{resource.name} ({resource.location}) is not open: its lifespan, made at "
        f"{lifespan.location}, is {state}. "
        "Use it inside `async with registry.lifespan()`."
    )


def _loop_name(loop: object) -> str:
    return f"{type(loop).__name__} {id(loop):#x}"


def _find_from_thread(resource: Resource[T]) -> T:
    # A thread whose context knows no lifespan, for that was entered in a task of its own: the loop that
    # started the thread knows, if AnyIO did it.
    from anyio import from_thread

    try:
        return from_thread.run_sync(find, resource)
    except RuntimeError:  # no worker thread of AnyIO's
        return _find_in_process(resource)


def _find_in_process(resource: Resource[T]) -> T:
    # Other threads change `running`; a copy is made in one step.
    innermost: list[Lifespan] = []
    for loop, lifespans in resource.registry.running.copy().items():
        here = [each for each in lifespans if each.process == os.getpid()]
        if here and not getattr(loop, "is_closed", bool)():
            is_open = (each for each in reversed(here) if resource in each.live)
            innermost.append(next(is_open, here[-1]))
    found = [each for each in innermost if resource in each.live] or innermost
    if len(found) > 1:
        raise NotOpenError(_ambiguous(resource, found), resource=resource.name)
    if not found:
        raise _not_open(resource, None)
    return found[0][resource]


def find_for(resource: Resource[T], scope: MutableMapping[str, Any]) -> T:
    """Return the value of *resource* for a request whose own state does not hold it.

    Raises:
        NotOpenError: No lifespan has opened it.
        WrongLoopError: It is open in another event loop.
    """
    try:
        return find(resource)
    except NotOpenError as error:
        error.add_note(_request_hint(resource, scope))
        raise


def _candidates(resource: Resource[Any], here: object | None) -> Iterator[Lifespan]:
    yield from current.get()
    if here is not None:
        yield from reversed(resource.registry.running.get(here, ()))


def _ambiguous(resource: Resource[Any], found: list[Lifespan]) -> str:
    name = resource.name
    return (
        f"{name} ({resource.location}) is open in {len(found)} event loops, and this thread belongs to "
        f"none of them: by the lifespans at {', '.join(each.location for each in found)}.\n"
        "Start the thread with the context of the code that starts it: asyncio.to_thread(function), "
        "anyio.to_thread.run_sync(function), or loop.run_in_executor(None, "
        "contextvars.copy_context().run, function). Or pass it the value: "
        f"function({name}.get())."
    )


def _not_open(resource: Resource[Any], here: object | None) -> NotOpenError:
    name, registry = resource.name, resource.registry.name
    lines = [f"{name} ({resource.location}) is not open: no lifespan of {registry!r} runs here."]
    if _importing():
        lines.append(
            "At import time there are no values yet: this code runs while a module is imported. Ask "
            "in a function that is called later, or let it take the value as a parameter."
        )
    elif here is not None:
        lines.append(
            "In an application: FastAPI(lifespan=registry.lifespan), on the outermost application if "
            "it is mounted, and a server that runs lifespans. In tests: `with TestClient(app) as "
            "client` (without `with` it runs no lifespan), and around httpx's ASGITransport, which "
            "never runs one, `async with registry.lifespan()`. Elsewhere: `async with "
            "registry.lifespan()` around the code that asks."
        )
    elif threading.current_thread() is threading.main_thread():
        lines.append(
            "No event loop runs here. Write `async with registry.lifespan():` around the code, in a "
            "coroutine that asyncio.run() runs."
        )
    else:
        lines.append(
            "This thread has no event loop, and no lifespan of the registry runs in this process. "
            "Start the thread inside `async with registry.lifespan():`, and end it there."
        )
    return NotOpenError("\n".join(lines), resource=name)


def _importing() -> bool:
    frame: FrameType | None = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        # What a loop runs is no import, even where a module that is imported runs that loop.
        if frame.f_globals.get("__name__", "").startswith(("asyncio.", "trio.")):
            return False
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _request_hint(resource: Resource[Any], scope: MutableMapping[str, Any]) -> str:
    state = scope.get("state")
    router = getattr(scope.get("app"), "router", None)
    given = _opens(getattr(router, "lifespan_context", None), resource)
    if given and router is not scope.get("router", router):
        return (
            "This application is mounted in another one, and Starlette runs the lifespan of the "
            "outermost application alone. Give it that one: FastAPI(lifespan=registry.lifespan), or "
            "lifespan=combine(registry.lifespan, its_own) with lifekit.asgi.combine."
        )
    if state and resource.registry.key in state:
        return "The lifespan that serves this request is not open now: it is closing, or closed."
    if (scope.get("client") or ("",))[0] == "testclient":
        return (
            "This request came through a TestClient that ran no lifespan of this registry: write "
            "`with TestClient(app) as client:`, and FastAPI(lifespan=registry.lifespan)."
        )
    if state and not given:
        return "The application was started with another lifespan: FastAPI(lifespan=registry.lifespan)."
    carries = "This request carries no lifespan state: "
    if given:
        return carries + (
            "its server or test transport ran no lifespan for the application, which has one. uvicorn "
            "runs none with --lifespan off, daphne and httpx's ASGITransport never do."
        )
    return carries + (
        "its server or test transport ran no lifespan (uvicorn --lifespan off, daphne, httpx's "
        "ASGITransport), or the application has another one: FastAPI(lifespan=registry.lifespan)."
    )


def _opens(slot: object, resource: Resource[Any]) -> bool:
    """Return whether what stands in a lifespan slot is a lifespan of *resource*, or contains one."""
    if isinstance(slot, tuple):
        slots = cast("Any", slot)
        return any(_opens(each, resource) for each in slots)
    owner = getattr(slot, "__self__", None)
    if isinstance(owner, type(resource.registry)):
        return resource in owner.plan().resources
    if not callable(slot):
        return False
    cells = getattr(inspect.unwrap(slot), "__closure__", None) or ()
    return any(_opens(each.cell_contents, resource) for each in cells)
