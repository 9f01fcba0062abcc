"""Test mode: clients that run the lifespan, mocks, sandboxes in which nothing lasts, and seeds."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from lifekit._core.block import Sandboxing
from lifekit._core.block import sandboxing as _current
from lifekit._core.errors import DeclarationError

from ._app import isolation
from ._client import client, sync_client
from ._fake_redis import fake_redis
from ._mock import mock

__all__ = ["Sandboxing", "client", "fake_redis", "mock", "sandboxing", "seed", "sync_client"]

F = TypeVar("F", bound=Callable[..., Any])


def seed(*, scope: Literal["session", "module", "class"]) -> Callable[[F], F]:
    """Make a pytest fixture of the decorated function, which puts in what several tests need.

    It runs once, in a sandbox of its own around the tests' sandboxes, and each test that asks for it by
    its name finds what it made. The fixture's value is what the function returns, or yields.

    Args:
        scope: How long what it made is there: for the class, the module or the run. The event loop and
            the application have to last as long.

    The function may be async or not, and takes fixtures of that scope, and ``lifespan``: the running
    `Lifespan`.

    Raises:
        DeclarationError: There is no such scope.
    """
    if scope not in ("session", "module", "class"):
        raise DeclarationError(
            f"a seed's scope is session, module or class, not {scope!r}. What one test needs is put in "
            "by a fixture of its own."
        )

    def decorate(function: F) -> F:
        from . import _seeds  # here, for it imports pytest

        made: Any = _seeds.fixture(function, scope)
        return made  # type: ignore[no-any-return]

    return decorate


@contextmanager
def sandboxing() -> Generator[Sandboxing]:
    """Let lifespans that are opened inside ``with`` open their values sandboxed.

    ``as`` gives an object whose ``lifespans`` are those that run.
    """
    outer, made = _current.get(), Sandboxing(isolation)
    _current.set(made)
    try:
        yield made
    finally:
        if _current.get() is made:  # else this is another context, where there is nothing to undo
            _current.set(outer)
