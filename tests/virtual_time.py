"""Event loops whose clock jumps: where nothing can run, the next timer is due at once."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import trio
from trio.testing import MockClock


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.skipped = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is not None and timeout > 0:
            self.skipped += timeout
            timeout = 0
        return super().select(timeout)


class JumpingLoop(asyncio.SelectorEventLoop):
    """An asyncio loop that never waits for a timer."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return super().time() + self._jumping.skipped


def run(main: Callable[[], Awaitable[None]], backend: str) -> None:
    """Run *main* on *backend* in virtual time."""
    if backend == "trio":  # AnyIO 4.7 passes no clock on
        trio.run(main, clock=MockClock(autojump_threshold=0))
    else:
        anyio.run(main, backend=backend, backend_options={"loop_factory": JumpingLoop})
