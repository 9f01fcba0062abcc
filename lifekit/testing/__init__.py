"""Test mode: clients that run the lifespan, mocks, and sandboxes in which nothing lasts."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from lifekit._sandbox import Sandboxing
from lifekit._sandbox import sandboxing as _current

from ._client import client, sync_client
from ._fake_redis import fake_redis
from ._mock import mock

__all__ = ["Sandboxing", "client", "fake_redis", "mock", "sandboxing", "sync_client"]


@contextmanager
def sandboxing() -> Generator[Sandboxing]:
    """Let lifespans that are opened inside ``with`` open their values sandboxed.

    ``as`` gives an object whose ``lifespans`` are those that run.
    """
    outer, made = _current.get(), Sandboxing()
    _current.set(made)
    try:
        yield made
    finally:
        if _current.get() is made:  # else this is another context, where there is nothing to undo
            _current.set(outer)
