"""What a factory may be: what it may return, and whether it takes its needs."""

from __future__ import annotations

import inspect
from collections import abc
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, TypeVar

T = TypeVar("T")

Manager = AbstractAsyncContextManager[T, Any] | AbstractContextManager[T, Any]
Entered = Manager[T] | abc.Coroutine[Any, Any, Manager[T]]
Produced = abc.Coroutine[Any, Any, T] | abc.AsyncIterator[T] | abc.Iterator[T]
"""What a factory may return, beside the value itself."""


def misfit(factory: Callable[..., Any], needs: int) -> str | None:
    """Return why *factory* can't be called with so many values, None if it can."""
    try:
        inspect.signature(factory).bind(*range(needs))
    except ValueError:  # a builtin that does not say
        return None
    except TypeError as error:
        return str(error)
    return None
