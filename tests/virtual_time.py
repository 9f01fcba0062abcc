"""Event loops whose clock jumps: when nothing can run, the next timer is due at once."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import trio
from trio.testing import MockClock

from .leaks import tasks_alive


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
    """An asyncio loop that never waits for a timer, and whose clock stands still while code runs."""

    def __init__(self) -> None:
        self.jumping = _JumpingSelector()
        super().__init__(self.jumping)

    def time(self) -> float:
        return 1000.0 + self.jumping.skipped


def run(main: Callable[[], Awaitable[None]], backend: str) -> None:
    """Run *main* on *backend* in virtual time."""
    if backend == "trio":  # AnyIO 4.7 passes no clock on
        trio.run(main, clock=MockClock(autojump_threshold=0))
    else:
        anyio.run(main, backend=backend, backend_options={"loop_factory": JumpingLoop})


def in_time(main: Callable[[], Awaitable[None]], backend: str) -> None:
    """Run *main*, after which no task may be left."""

    async def alone() -> None:
        before = tasks_alive()
        await main()
        assert tasks_alive() == before

    run(alone, backend)


def block(seconds: float) -> None:
    """Keep the loop that runs here from everything else for *seconds* of its time."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        trio.lowlevel.current_clock().jump(seconds)  # type: ignore[attr-defined]
    else:
        assert isinstance(loop, JumpingLoop)
        loop.jumping.skipped += seconds


def pass_time(seconds: float) -> None:
    """Let the clock of the running asyncio loop, which can't be uvloop's, jump."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, asyncio.BaseEventLoop)
    now = loop.time
    loop.time = lambda: now() + seconds  # type: ignore[method-assign]
