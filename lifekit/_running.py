"""Where the running lifespans are, and which of them a piece of code means."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from ._backend import running_loop
from ._errors import NotOpenError, WrongLoopError

if TYPE_CHECKING:
    from ._lifespan import Lifespan
    from ._resource import Resource

T = TypeVar("T")

current: ContextVar[tuple[Lifespan, ...]] = ContextVar("lifekit.current", default=())
"""The lifespans of this context, the innermost first."""


def find(resource: Resource[T]) -> T:
    """Return the value of *resource* in the lifespan that the calling code means.

    Raises:
        NotOpenError: No lifespan has opened it.
        WrongLoopError: It is open in another event loop.
    """
    here = running_loop()
    elsewhere: Lifespan | None = None
    for lifespan in _candidates(resource, here):
        if not lifespan.declares(resource):
            continue
        # A thread without a loop of its own got here with its starter's context.
        if here is None or lifespan.loop is here:
            return lifespan[resource]  # it is this one's, or nobody's
        if resource in lifespan.live:
            elsewhere = elsewhere or lifespan
    if elsewhere is None and here is not None:
        others = [each for many in list(resource.registry.running.values()) for each in many]
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


def _loop_name(loop: object) -> str:
    return f"{type(loop).__name__} {id(loop):#x}"


def _find_from_thread(resource: Resource[T]) -> T:
    # A worker thread whose context knows no lifespan, for that was entered in a task of its own:
    # the loop that started the thread knows.
    from anyio import from_thread

    try:
        return from_thread.run_sync(find, resource)
    except RuntimeError:  # no worker thread of AnyIO's
        raise _not_open(resource, None) from None


def find_for(resource: Resource[T], scope: MutableMapping[str, Any]) -> T:
    """Return the value of *resource* for a request whose own state does not hold it.

    Raises:
        NotOpenError: No lifespan has opened it.
        WrongLoopError: It is open in another event loop.
    """
    try:
        return find(resource)
    except NotOpenError as error:
        error.add_note(_request_hint(scope))
        raise


def _candidates(resource: Resource[Any], here: object | None) -> Iterator[Lifespan]:
    yield from current.get()
    if here is not None:
        yield from reversed(resource.registry.running.get(here, ()))


def _not_open(resource: Resource[Any], here: object | None) -> NotOpenError:
    name, registry = resource.name, resource.registry.name
    lines = [f"{name} ({resource.location}) is not open: no lifespan of {registry!r} runs here."]
    if here is None:
        lines.append(
            "No event loop runs in this thread. At import time there are no values yet: take it in a "
            "function. In a thread of your own, start it with asyncio.to_thread or "
            "anyio.to_thread.run_sync, which carry the context along."
        )
    else:
        lines.append(
            "In an application: FastAPI(lifespan=registry.lifespan). In tests: "
            "`with TestClient(app) as client` (without `with` it runs no lifespan), and around "
            "httpx's ASGITransport, which never runs one, `async with registry.lifespan()`. "
            "Elsewhere: `async with registry.lifespan()` around the code that asks."
        )
    return NotOpenError("\n".join(lines), resource=name)


def _request_hint(scope: MutableMapping[str, Any]) -> str:
    if (scope.get("client") or ("",))[0] == "testclient":
        return (
            "This request came through a TestClient that ran no lifespan of this registry: write "
            "`with TestClient(app) as client:`, and FastAPI(lifespan=registry.lifespan)."
        )
    if "state" not in scope:
        return (
            "This request carries no lifespan state: its server or test transport (httpx's "
            "ASGITransport?) ran no lifespan for the application."
        )
    return "The application was started with another lifespan: FastAPI(lifespan=registry.lifespan)."
