"""What a factory may be: what it may return, and whether it takes its needs."""

from __future__ import annotations

import inspect
import sys
from collections import abc
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from contextlib import (
        _AsyncGeneratorContextManager,  # pyright: ignore[reportPrivateUsage]
        _GeneratorContextManager,  # pyright: ignore[reportPrivateUsage]
    )

T = TypeVar("T")

Manager = AbstractAsyncContextManager[T, Any] | AbstractContextManager[T, Any]
if TYPE_CHECKING:  # of what an async function returns, only what contextlib made is entered
    Made = _AsyncGeneratorContextManager[T, Any] | _GeneratorContextManager[T, Any, Any]
    Entered = Manager[T] | abc.Coroutine[Any, Any, Made[T]]
else:
    Entered = Manager[T]
Produced = abc.Coroutine[Any, Any, T] | abc.AsyncIterator[T] | abc.Iterator[T]
"""What a factory may return, beside the value itself."""


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature, whose annotations may name what is imported for type checkers only."""
    if sys.version_info >= (3, 14):
        from annotationlib import Format  # it evaluates annotations when they are asked for

        return inspect.signature(function, annotation_format=Format.FORWARDREF)
    return inspect.signature(function)


def misfit(factory: Callable[..., Any], needs: int) -> str | None:
    """Return why *factory* can't be called with so many values, None if it can."""
    try:
        signature_of(factory).bind(*range(needs))
    except ValueError:  # a builtin that does not say
        return None
    except TypeError as error:
        return str(error)
    return None
