"""Mocks that know what a resource is: `unittest.mock`, told by the type what each call gives."""

from __future__ import annotations

import asyncio
import dis
import functools
import inspect
import sys
import types
import typing
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from typing import Any, Final, cast
from unittest.mock import AsyncMock, MagicMock, NonCallableMagicMock

from lifekit._core.errors import OverrideError
from lifekit._core.factory import signature_of
from lifekit._core.resource import Resource
from lifekit._util.annotations import (
    AWAITED,
    ENTERED,
    ITERATED,
    ITSELF,
    UNKNOWN,
    Unclear,
    annotations_of,
    class_of,
    entered_as,
    is_parameter,
    resolve_if_possible,
    return_of,
    value_type,
)
from lifekit._util.call_sites import caller
from lifekit._util.loops import running_loop

# asyncpg annotates none of these.
UNSAID: Final = {
    "asyncpg.pool.Pool.acquire": ("asyncpg", "Connection", ("__await__", "__aenter__")),
    "asyncpg.connection.Connection.transaction": ("asyncpg.transaction", "Transaction", ()),
    "asyncpg.connection.Connection.cursor": ("asyncpg.cursor", "CursorFactory", ()),
    "asyncpg.connection.Connection.prepare": ("asyncpg.prepared_stmt", "PreparedStatement", ()),
}


def mock(handle: Resource[Any]) -> Any:
    """Return a mock of the handle's type, as its factory's return annotation names it.

    It is configured and asked as every `unittest.mock` is, and opens nothing. Calls are checked
    against the real signatures, attributes that the type lacks are refused, and
    ``isinstance(fake, TheType)`` holds. A method's ``return_value`` is what the application has in
    the end: after ``await``, after ``as`` in ``async with``, item by item in ``async for``::

        fake = mock(cache)
        fake.get.return_value = "x"               # assert await fake.get("k") == "x"
        fake.get.side_effect = ConnectionError()  # raised by the await
        fake.scan_iter.return_value = ["a", "b"]  # async for key in fake.scan_iter()

        connection = mock(db).acquire.return_value       # `await pool.acquire()`, and the same
        connection.fetchval.return_value = 3             # by `async with pool.acquire() as …`
        cursor.__aiter__.return_value = [(1,), (2,)]     # async for row in cursor

    Where nothing is configured, a call gives a mock of its annotated type, None where that is
    None, and where none is known a mock that can be called, awaited and entered, to give itself.
    What is awaited gives the event loop a turn, as a server would, so that time limits work.

    The return type is Any, since no type has both the value's methods and theirs' ``return_value``.

    Args:
        handle: The resource to mock.

    Raises:
        OverrideError: No handle, or a factory whose annotation does not name one class.
    """
    if not isinstance(handle, Resource):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OverrideError(
            f"{caller()}: a {type(handle).__name__} can't be mocked; name the resource by its handle, "
            "the name that @registry.resource decorates."
        )
    try:
        kind = value_type(handle.factory)
    except Unclear as why:
        raise _unclear(handle, str(why)) from None
    return _value(kind, {})


def _unclear(handle: Resource[Any], why: str) -> OverrideError:
    name = handle.name
    return OverrideError(
        f"{caller()}: mock({name}) can't tell what {name} ({handle.location}) is: its factory {why}. "
        f"Annotate the factory with the class that it makes: def {name}(…) -> TheClass: …"
    )


@dataclass(frozen=True)
class Gives:
    """What a call gives: how the application comes by the value, and the value's annotation.

    No ``uses`` means that the call itself returns it.
    """

    value: object = UNKNOWN
    uses: tuple[str, ...] = ()
    fluent: bool = False


@dataclass(frozen=True)
class About:
    """What a mock stands for: an instance of ``kind``, or a method of ``owner``, or nothing known."""

    kind: type | None = None
    owner: Any = None
    called: Callable[..., Any] | None = None
    gives: Gives = Gives()


def _gives(function: Any, owner: type) -> Gives:
    inner: Any = inspect.unwrap(function)
    if (unsaid := UNSAID.get(_named(inner))) is not None:
        module, name, uses = unsaid
        return Gives(getattr(import_module(module), name), uses)
    annotation = return_of(inner, owner)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    first = arguments[0] if arguments else UNKNOWN
    if inspect.iscoroutinefunction(function):
        return Gives(annotation)
    if inspect.iscoroutinefunction(inner):  # a decorator's sync wrapper, which passes it on
        return Gives(annotation, ("__await__",))
    if inspect.isasyncgenfunction(function):
        return Gives(UNKNOWN, ("__aiter__",))
    if inspect.isasyncgenfunction(inner):
        # Made by contextlib it can be entered only; what others make of it may be awaited too.
        entered = function.__globals__.get("__name__") == "contextlib"
        return Gives(first, ("__aenter__",) if entered else ("__await__", "__aenter__", "__aiter__"))
    if inspect.isgeneratorfunction(inner) and inner is not function:
        return Gives(first, ("__enter__",))
    if origin in AWAITED or annotation in AWAITED or annotation is typing.Awaitable:
        return Gives(arguments[-1] if arguments else UNKNOWN, ("__await__",))
    if origin in ITERATED:
        return Gives(UNKNOWN, ("__aiter__",))
    if origin in ENTERED:
        return Gives(first, (ENTERED[origin],))
    if origin in {typing.Union, types.UnionType}:
        awaited = [each for each in arguments if typing.get_origin(each) in AWAITED]
        if awaited:
            return Gives(typing.get_args(awaited[0])[-1], ("__await__",), fluent=True)
    for enter in ("__aenter__", "__enter__"):
        if is_parameter(annotation, enter):
            uses = tuple(use for use in USES if hasattr(origin, use))
            return Gives(entered_as(annotation, enter), uses)
    return Gives(annotation)


class Part(NonCallableMagicMock):
    """Stands for a value, or is shared by what does: each child is made when first asked for."""

    def __init__(self, *, about: About, **options: Any) -> None:
        self.__dict__["_lifekit"] = about
        super().__init__(unsafe=True, **options)
        if about.called is None and (about.kind is None or hasattr(about.kind, "__await__")):
            type(self).__await__ = _itself

    def __getattr__(self, name: str) -> Any:
        about: About = self.__dict__["_lifekit"]
        constant = inspect.getattr_static(about.kind, name, None) if about.kind is not None else None
        if isinstance(constant, _CONSTANT) and not name.startswith("__"):
            return constant
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise self._lacks(name) from None

    def __setattr__(self, name: str, value: object) -> None:
        try:
            super().__setattr__(name, value)
        except AttributeError:
            raise self._lacks(name) from None

    def _lacks(self, name: str) -> AttributeError:
        about: About = self.__dict__["_lifekit"]
        return AttributeError(f"{_named(about.kind or about.called)} has no attribute {name!r}")

    def __repr__(self) -> str:
        about: About = self.__dict__["_lifekit"]
        return f"<mock of {_named(about.kind or about.called)}>"

    def _get_child_mock(self, **options: Any) -> Any:
        # unittest.mock calls it for whatever it has not made yet: attributes, results, magic methods.
        about: About = self.__dict__["_lifekit"]
        name: str = options["_new_name"]
        if name == "()":
            return _result(about.gives.value, about.owner, about.kind, self, options)
        if name.startswith("__") and name.endswith("__"):
            made = _MAGIC.get(name, MagicMock)(**options)
            if name in ENTERED.values():
                told = entered_as(about.kind, name) if about.kind is not None else UNKNOWN
                itself = told is about.kind or told is UNKNOWN
                made.return_value = self if itself else _result(told, self, about.kind, self, {})
            return made
        if about.kind is None:
            return Plain(about=About(), **options)
        return _attribute(self, about.kind, name, options)


class Turn:
    """The event loop's, as what waits for a server gives it one: polling would starve it else."""

    def __await__(self) -> Generator[Any, Any, None]:
        loop = running_loop()
        if isinstance(loop, asyncio.AbstractEventLoop):
            yield  # what asyncio.sleep(0) does
        elif loop is not None:
            from trio.lowlevel import checkpoint

            yield from checkpoint().__await__()  # noqa: ASYNC105


def _itself(self: Any) -> Generator[Any, Any, Any]:
    yield from Turn().__await__()
    return self


class Plain(Part, MagicMock):
    """Stands for what a plain call returns from: a method, a value that can be called."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        _check(self.__dict__["_lifekit"], args, kwargs)
        return super().__call__(*args, **kwargs)


class Entering(AsyncMock):
    """Stands for a method that Python itself calls, and awaits."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return _awaiting(_Awaited(super().__call__(*args, **kwargs), None))


class Iterating(MagicMock):
    """Stands for ``__aiter__``."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return _one_by_one(super().__call__(*args, **kwargs))


async def _one_by_one(items: Any) -> AsyncIterator[Any]:
    if callable(getattr(items, "__aiter__", None)):
        items = aiter(items)
    elif not hasattr(items, "__anext__"):  # which is all that unittest.mock's own iterator has
        items = iter(items)
    while True:
        await Turn()
        try:
            item = await anext(items) if hasattr(items, "__anext__") else next(items)
        except (StopAsyncIteration, StopIteration):
            return
        yield item


class Deferred(Part, AsyncMock):
    """Stands for a method whose value comes by await, ``async with`` or ``async for``."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        about: About = self.__dict__["_lifekit"]
        _check(about, args, kwargs)
        coming: Coroutine[Any, Any, Any] = super().__call__(*args, **kwargs)
        if not about.gives.uses:
            return _awaiting(_Awaited(coming, about.owner))
        return _coming(about.gives.uses, about.gives.fluent)(coming, about.owner)


_MAGIC: dict[str, type[MagicMock | AsyncMock]] = {
    "__aenter__": Entering,
    "__aexit__": AsyncMock,
    "__anext__": Entering,
    "__aiter__": Iterating,
}
_CONSTANT = (str, bytes, int, float, Enum)


def _check(about: About, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if about.called is None:
        return
    try:
        signature = signature_of(about.called)
    except ValueError:  # a builtin that does not say
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{_named(about.called)}(): {error}") from None


def _result(
    annotation: object, owner: Any, kind: type | None, mocked: Any, options: dict[str, Any]
) -> Any:
    of = kind or (owner.__dict__["_lifekit"].kind if owner is not None else None)
    made = class_of(annotation, of or object)
    if made is None:
        return None
    if made is ITSELF:
        return mocked if owner is None else owner
    if made is UNKNOWN or not isinstance(made, type):
        return Plain(about=About(), **options)
    return _value(made, options)


def _value(kind: type, options: dict[str, Any]) -> Any:
    called = any("__call__" in vars(base) for base in kind.__mro__)
    if called:
        function: Any = inspect.getattr_static(kind, "__call__")
        about = About(kind, None, types.MethodType(function, kind), _gives(function, kind))
        mocked = _class_for(function, about.gives)(about=about, spec_set=_names(kind), **options)
    else:
        mocked = Part(about=About(kind), spec_set=_names(kind), **options)
    mocked.__class__ = kind
    return mocked


def _class_for(function: Any, gives: Gives) -> Any:
    return Deferred if gives.uses or inspect.iscoroutinefunction(function) else Plain


@functools.cache
def _names(kind: type) -> list[str]:
    """Return the names of the attributes that an instance has, as far as its class tells."""
    names = set(dir(kind))
    for base in kind.__mro__:
        names.update(annotations_of(base))
        made: Any = inspect.unwrap(vars(base).get("__init__"))  # type: ignore[arg-type]
        if inspect.isfunction(made):
            lines = dis.get_instructions(made)
            names.update(each.argval for each in lines if each.opname == "STORE_ATTR")
    return sorted(names)


def _attribute(mocked: Any, kind: type, name: str, options: dict[str, Any]) -> Any:
    raw: Any = inspect.getattr_static(kind, name, None)
    if isinstance(raw, property | functools.cached_property):
        getter = raw.fget if isinstance(raw, property) else raw.func
        return _result(return_of(getter, kind), mocked, kind, mocked, options)
    if isinstance(raw, staticmethod | classmethod):
        called = getattr(kind, name)
        function: Any = cast("Any", raw).__func__
    elif inspect.isroutine(raw) and callable(raw):
        function, called = raw, types.MethodType(raw, kind)
    else:
        return _result(_annotated(kind, name), mocked, kind, mocked, options)
    about = About(None, mocked, called, _gives(function, kind))
    method = _class_for(function, about.gives)(about=about, spec_set=called)
    mocked.attach_mock(method, name)  # made with a parent it would take off the first parameter
    return method


def _annotated(kind: type, name: str) -> object:
    for base in kind.__mro__:
        if name in (told := annotations_of(base)):
            return resolve_if_possible(told[name], vars(sys.modules[base.__module__]), base)
    return UNKNOWN


def _named(thing: Any) -> str:
    if thing is None:
        return "an unknown type"
    name = getattr(thing, "__qualname__", repr(thing))
    return f"{getattr(thing, '__module__', None)}.{name}"


class _Coming:
    """What a call returned whose value is still to come; it need not be waited for."""

    def __init__(self, coming: Coroutine[Any, Any, Any], owner: Any) -> None:
        self._coming, self._owner = coming, owner

    def __del__(self) -> None:
        self._coming.close()


class _Awaited(_Coming, Coroutine[Any, Any, Any]):
    def __await__(self) -> Generator[Any, Any, Any]:
        # A generator, so that what waits keeps this alive: __del__ would close what it waits for.
        yield from Turn().__await__()
        return (yield from self._coming.__await__())

    @functools.cached_property
    def _steps(self) -> Generator[Any, Any, Any]:
        return self.__await__()

    def send(self, value: Any, /) -> Any:
        return self._steps.send(value)

    def throw(self, *error: Any) -> Any:
        return self._steps.throw(*error)

    def close(self) -> None:
        self._steps.close()
        self._coming.close()


async def _awaiting(coming: _Awaited) -> Any:
    return await coming  # as a coroutine it is missed, by a warning, where nobody awaits it


class _Entered(_Coming):
    async def __aenter__(self) -> Any:
        await Turn()
        return await self._coming

    async def __aexit__(self, *error: object) -> None: ...


class _EnteredSync(_Coming):
    def __enter__(self) -> Any:
        try:
            self._coming.send(None)
        except StopIteration as done:
            return done.value

    def __exit__(self, *error: object) -> None: ...


class _Iterated(_Coming):
    async def __aiter__(self) -> AsyncIterator[Any]:
        async for item in _one_by_one(await self._coming):
            yield item


class _Fluent(_Coming):
    # Where a call may return a value or an awaitable, some return their own object, to be called on:
    # pipe.set("a", 1).incr("b").
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self._owner is None:
            raise AttributeError(name)
        return getattr(self._owner, name)


USES: dict[str, type[_Coming]] = {
    "__await__": _Awaited,
    "__aenter__": _Entered,
    "__enter__": _EnteredSync,
    "__aiter__": _Iterated,
}


@functools.cache
def _coming(uses: tuple[str, ...], fluent: bool) -> type[_Coming]:
    bases = tuple(USES[use] for use in uses) + ((_Fluent,) if fluent else ())
    return type("MockedResult", bases, {})
