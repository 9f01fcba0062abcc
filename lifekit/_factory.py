"""What a factory says of itself: whether it takes its needs, and the type of its value."""

from __future__ import annotations

import inspect
import types
import typing
from collections import abc
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from typing import Any, TypeVar, cast

T = TypeVar("T")

Manager = AbstractAsyncContextManager[T, Any] | AbstractContextManager[T, Any]
Entered = Manager[T] | abc.Coroutine[Any, Any, Manager[T]]
Produced = abc.Coroutine[Any, Any, T] | abc.AsyncIterator[T] | abc.Iterator[T]
"""What a factory may return, beside the value itself."""

_AWAITED: set[object] = {abc.Awaitable, abc.Coroutine}
_YIELDING: set[object] = {abc.AsyncGenerator, abc.AsyncIterator, abc.Generator, abc.Iterator}
_ENTERED: set[object] = {AbstractAsyncContextManager, AbstractContextManager}


def misfit(factory: Callable[..., Any], needs: int) -> str | None:
    """Return why *factory* can't be called with so many values, None if it can."""
    try:
        inspect.signature(factory).bind(*range(needs))
    except ValueError:  # a builtin that does not say
        return None
    except TypeError as error:
        return str(error)
    return None


def value_type(factory: Callable[..., Any]) -> type | None:
    """Return the class of the value that *factory* says it makes; None where that is no one class."""
    annotation = factory if isinstance(factory, type) else _returned(factory)
    origin: object = typing.get_origin(annotation)
    while origin in _AWAITED | _YIELDING | _ENTERED:
        arguments = typing.get_args(annotation)
        annotation = arguments[-1 if origin is abc.Coroutine else 0]
        if origin in _YIELDING:  # what is yielded is the value, whatever it is
            return _class(annotation)
        origin = typing.get_origin(annotation)
    kind = _class(annotation)
    for enter in ("__aenter__", "__enter__"):
        if kind is not None and hasattr(kind, enter):
            return _class(_returned(getattr(kind, enter))) or kind
    return kind


def _returned(function: Callable[..., Any]) -> object:
    with suppress(Exception):  # a name that only type checkers can resolve
        return typing.get_type_hints(inspect.unwrap(function)).get("return")
    return None


def _class(annotation: object) -> type | None:
    annotation = typing.get_origin(annotation) or annotation
    if annotation in (type(None), types.UnionType, Any) or not isinstance(annotation, type):
        return None
    kind = cast("Any", annotation)
    checkable = not getattr(kind, "_is_protocol", False) or getattr(kind, "_is_runtime_protocol", False)
    return annotation if checkable else None
