"""The handle: what `@registry.resource` turns a factory into."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ._running import current, find, find_for

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

    from ._registry import Registry

T_co = TypeVar("T_co", covariant=True)

Step = str | Callable[[Any], object]
"""How a declaration says what to do with a value: a method's name, or a function of the value."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a declaration may say beside its factory; None leaves it to the registry or driver."""

    start_timeout: float | None = None
    close_timeout: float | None = None
    retry: int = 0
    check: Step | None = None
    close: Step | None = None
    wait_closed: Step | None = None
    terminate: Step | None = None


class _Signature:
    # FastAPI asks `inspect.signature(handle)` which parameters to inject. Built when asked, so
    # that `import lifekit` does not import starlette.
    def __get__(self, handle: Resource[Any] | None, owner: type) -> inspect.Signature | None:
        if handle is None:
            return None
        from starlette.requests import HTTPConnection

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameter = inspect.Parameter("connection", kind, annotation=HTTPConnection)
        return inspect.Signature([parameter])


@dataclass(frozen=True, slots=True, eq=False, repr=False, weakref_slot=True)
class Resource(Generic[T_co]):
    """A declared resource: a typed handle that holds no live value and belongs to no event loop.

    It is an ordinary FastAPI dependency, ``Depends(handle)``, in routes and in websockets.
    """

    name: str
    """Its name in its registry, in ``request.state``, in logs and in errors."""
    factory: Callable[..., object] = field(compare=False)
    needs: tuple[Resource[Any], ...]
    after: tuple[Resource[Any], ...]
    options: Options
    registry: Registry
    location: str
    """The code line that defines it."""

    __signature__: ClassVar[_Signature] = _Signature()

    def get(self) -> T_co:
        """Return the live value, anywhere in the event loop of the lifespan that opened it.

        Worker threads that were started from there, as those of sync routes are, have it too. With
        several lifespans a request finds its own, other code the innermost ``async with``.

        Raises:
            NotOpenError: No lifespan has opened it.
            WrongLoopError: It is open in another event loop.
        """
        lifespans = current.get()
        if lifespans and lifespans[0].loop is asyncio._get_running_loop():
            try:
                return lifespans[0].live[self]  # type: ignore[no-any-return]
            except KeyError:
                pass
        return find(self)

    async def __call__(self, connection: HTTPConnection) -> T_co:
        """Return the value that the request's own lifespan holds: what ``Depends`` calls."""
        try:
            return connection.scope["state"][self.registry.key].live[self]  # type: ignore[no-any-return]
        except KeyError:
            return find_for(self, connection.scope)

    def __repr__(self) -> str:
        return f"<Resource {self.name!r} of {self.registry.name!r}, {self.location}>"
