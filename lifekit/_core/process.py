"""A process whose whole work is one lifespan: what ends it, and with which exit status."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from types import FrameType

import anyio

from lifekit._util.interrupts import SIGNALS, getsignal, set_handler
from lifekit._util.loops import call_soon

from .errors import LifekitError
from .lifespan import Lifespan
from .stand_in import redact_error

STOPPED, FAILED, INTERRUPTED = 0, 1, 128 + signal.SIGINT
"""Exit statuses: it ended in order, it failed, Ctrl-C was pressed again."""


def run(make: Callable[[], Lifespan], main: Callable[[Lifespan], Awaitable[object]] | None) -> int:
    """Run *main* in a lifespan, or its workers until a signal; return the exit status."""
    try:
        return anyio.run(_live, make, main)
    except KeyboardInterrupt:
        return INTERRUPTED


async def _live(
    make: Callable[[], Lifespan], main: Callable[[Lifespan], Awaitable[object]] | None
) -> int:
    try:
        lifespan = make()
        with _stopped_by_signals(lifespan) as signals:
            try:
                async with lifespan:
                    await (anyio.sleep_forever() if main is None else main(lifespan))
            except LifekitError as error:
                if type(error) is not LifekitError or not signals:
                    raise  # else a signal came while it started
    except Exception as error:
        failure = redact_error(error)
        if isinstance(failure.__context__, anyio.get_cancelled_exc_class()):
            failure.__suppress_context__ = True  # lifekit's own, which says nothing
        traceback.print_exception(failure, file=sys.stderr)
        return FAILED
    return STOPPED


@contextmanager
def _stopped_by_signals(lifespan: Lifespan) -> Generator[list[int]]:
    """Stop the lifespan at the first signal; yield those that have come."""
    came: list[int] = []
    soon = call_soon()

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:
            soon(lambda: lifespan.stop(f"{signal.Signals(number).name} came"))
        elif number == signal.SIGINT:  # whoever presses Ctrl-C again waits no longer for the body
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield came  # no handler can be set here, and none would be called
        return
    found = {number: getsignal(number) for number in SIGNALS}
    changed = [number for number in SIGNALS if found[number] not in (signal.SIG_IGN, None)]
    for number in changed:  # not what a shell has a process in its background ignore
        set_handler(number, handle)
    try:
        yield came
    finally:
        for number in changed:
            set_handler(number, found[number])
