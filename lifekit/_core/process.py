"""A process whose whole work is one lifespan: what ends it, and with which exit status."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any, Self

import anyio
from anyio import CancelScope

from lifekit._util.interrupts import SIGNALS, getsignal, set_handler
from lifekit._util.loops import call_soon, running_loop

from .errors import LifekitError
from .lifespan import Lifespan
from .stand_in import redact_error

STOPPED, FAILED, INTERRUPTED = 0, 1, 128 + signal.SIGINT
"""Exit statuses: it ended in order, it failed, Ctrl-C was pressed again."""


def run(make: Callable[[], Lifespan], main: Callable[[Lifespan], Awaitable[object]] | None) -> int:
    """Run *main* in a lifespan, or its workers until a signal; return the exit status."""
    if running_loop() is not None:
        raise LifekitError(
            "run() is called in an event loop, and begins one of its own. Open it in the one that "
            "runs: async with registry.lifespan() as lifespan."
        )
    try:
        return anyio.run(_live, make, main)
    except KeyboardInterrupt:
        return INTERRUPTED


async def _live(
    make: Callable[[], Lifespan], main: Callable[[Lifespan], Awaitable[object]] | None
) -> int:
    try:
        lifespan = make()
        with _Signals(lifespan) as signals:
            try:
                async with lifespan:
                    with signals.body():
                        await (anyio.sleep_forever() if main is None else main(lifespan))
            except LifekitError as error:
                if type(error) is not LifekitError or not signals.ended_start:
                    raise
    except Exception as error:
        failure = redact_error(error)
        if isinstance(failure.__context__, anyio.get_cancelled_exc_class()):
            failure.__suppress_context__ = True  # lifekit's own, which says nothing
        traceback.print_exception(failure, file=sys.stderr)
        return FAILED
    return STOPPED


class _Signals:
    """Handlers of SIGTERM and SIGINT by which a process ends in order."""

    def __init__(self, lifespan: Lifespan) -> None:
        self.came = 0
        self._lifespan = lifespan
        self._soon = call_soon()
        self._scope: CancelScope | None = None
        self._found: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other one can set any
            found = {number: getsignal(number) for number in SIGNALS}
            # Not what a shell has a process in its background ignore.
            self._found = {
                number: handler for number, handler in found.items() if handler != signal.SIG_IGN
            }
        for number in self._found:
            set_handler(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._found.items():
            set_handler(number, signal.SIG_DFL if handler is None else handler)

    def body(self) -> CancelScope:
        """Return the scope of what the first signal ends, when all is open."""
        self._scope = CancelScope()
        if self.came:
            self._scope.cancel()
        return self._scope

    @property
    def ended_start(self) -> bool:
        """Whether a signal came before all was open."""
        return self.came > 0 and self._scope is None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.came += 1
        if self.came == 1:
            self._soon(self._end)
        elif number == signal.SIGINT:  # whoever presses Ctrl-C again waits no longer for the body
            raise KeyboardInterrupt

    def _end(self) -> None:
        if self._scope is None:
            self._lifespan.stop("a signal came while it started")
        else:
            self._scope.cancel()
