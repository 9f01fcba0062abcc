"""The handle: what `@registry.resource` turns a factory into."""

from __future__ import annotations

import inspect
from asyncio import _get_running_loop  # pyright: ignore[reportPrivateUsage]
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, cast

from .running import current, find, find_for

if TYPE_CHECKING:
    from starlette import requests

    from .registry import Registry  # which makes it

T_co = TypeVar("T_co", covariant=True)

_current = current.get

Step = str | Callable[[Any], object]
"""How a declaration says what to do with a value: a method's name, or a function of the value."""

Transient = tuple[type[Exception], ...] | Callable[[Any], object]
"""What a declaration says of failures that may pass."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a declaration may say beside its factory; None leaves it to the registry or driver."""

    start_timeout: float | None = None
    close_timeout: float | None = None
    retry: int = 0
    transient: Transient | None = None
    check: Step | None = None
    close: Step | None = None
    wait_closed: Step | None = None
    terminate: Step | None = None
    required: bool = True
    renew_every: float | None = None
    sandbox: bool = True


if not TYPE_CHECKING:

    class _Requests:
        # What annotations name as `requests` when somebody evaluates them. `import lifekit` does not
        # import starlette.
        @property
        def HTTPConnection(self) -> type:
            from starlette.requests import HTTPConnection

            return HTTPConnection

    requests = _Requests()


class _NotTheValue:
    # Stands for what a value may have and a handle has not: `hasattr` says so, too.
    def __init__(self, use: str) -> None:
        self.use = use

    def __get__(self, handle: Resource[Any] | None, owner: type) -> object:
        if handle is None:
            raise AttributeError
        raise AttributeError(_not_the_value(handle, self.use))


def _not_the_value(handle: Resource[Any], use: str) -> str:
    name = handle.name
    return (
        f"{name} ({handle.location}) is a handle, not the value: `{use.format(name)}` is asked of the "
        f"value.\nTake that first: `{use.format(name + '.get()')}`, or `{name}: Annotated[…, "
        f"Depends({name})]` in a route, or `lifespan[{name}]` where there is a lifespan."
    )


async def is_async() -> None:
    """Stand for what a handle wraps, which is nothing: a call of it is awaited."""


class RequestSignature:
    """The signature of a dependency, which takes the request, or nothing."""

    # FastAPI asks `inspect.signature(handle)` which parameters to inject, and goes by the type;
    # injectors that know no requests go by the default. Built when asked, so that `import lifekit`
    # does not import starlette.
    def __get__(self, handle: object, owner: type) -> inspect.Signature | None:
        if handle is None:
            return None
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameter = inspect.Parameter(
            "connection", kind, default=None, annotation=requests.HTTPConnection
        )
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

    __signature__: ClassVar[RequestSignature] = RequestSignature()

    def get(self, wrong: None = None) -> T_co:
        """Return the live value, anywhere in the event loop of the lifespan that opened it.

        Threads have it too: those that were started from there, and others where it is open in one
        event loop of the process only. With several lifespans a request finds its own, other code the
        innermost ``async with``.

        Raises:
            NotOpenError: No lifespan has opened it.
            WrongLoopError: It is open in another event loop.
        """
        if wrong is not None:  # meant for the value: cache.get(key)
            raise TypeError(_not_the_value(self, "{}.get(…)"))
        if lifespans := _current():
            lifespan = lifespans[0]
            if lifespan.loop is _get_running_loop():
                try:
                    return lifespan.live[self]  # type: ignore[no-any-return]
                except KeyError:
                    pass
        return find(self)

    async def __call__(self, connection: requests.HTTPConnection | None) -> T_co:
        """Return the value that the request's own lifespan holds: what ``Depends`` calls.

        Injectors that know no requests call it without one: then it is `get`.
        """
        if connection is None:
            return self.get()
        try:
            return connection.scope["state"][self.registry.key].live[self]  # type: ignore[no-any-return]
        except KeyError:
            return find_for(self, connection.scope)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            # Only for what it has not.
            text = f"a handle has no attribute {name!r}"
            if not (name.startswith("__") or name in type(self).__slots__):
                text = _not_the_value(self, "{}." + name)
            raise AttributeError(text, name=name, obj=self)

        # FastAPI looks for it at each dependency of each request, and finding something is cheaper
        # than `__getattr__` is. What it does with it is to ask whether that is async.
        __wrapped__ = staticmethod(is_async)
        __getitem__ = _NotTheValue("{}[…]")
        __aenter__ = _NotTheValue("async with {}")
        __aexit__ = _NotTheValue("async with {}")
        __enter__ = _NotTheValue("with {}")
        __exit__ = _NotTheValue("with {}")

    def __copy__(self) -> Self:
        return self  # a copy would be no key to any value

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __repr__(self) -> str:
        return f"<Resource {self.name!r} of {self.registry.name!r}, {self.location}>"


# Injectors that are given `handle.get` must not ask for what it refuses. Those that know no requests,
# such as taskiq, call a handle with nothing, which for type checkers would make a factory of it.
Resource.get.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
)
cast("Any", Resource).__call__.__defaults__ = (None,)
