"""What signal handlers raise while something closes: held back until it is closed."""

from __future__ import annotations

import asyncio
import importlib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

# The second Ctrl-C raises KeyboardInterrupt wherever the main thread is, and so ends the event loop
# under whatever closes; a handler of SIGTERM that calls sys.exit() does the same.
_signal: Any = importlib.import_module("_signal")  # a tenth of the time: no handler becomes an enum
getsignal: Callable[[int], Any] = _signal.getsignal
set_handler: Callable[[int, Any], Any] = _signal.signal
SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Those that ask for the end of a process."""
_holders: dict[object, Callable[[BaseException], bool]] = {}
_before: dict[int, Callable[[int, FrameType | None], Any]] = {}


def hold(holder: object, raised: Callable[[BaseException], bool]) -> None:
    """Pass what the process's signal handlers raise to *raised*, until *holder* lets it go.

    The handlers are called as ever. In another thread than the main one, where none runs, do nothing.
    *raised* is called amid whatever runs just then; where it returns False, the error is raised there.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return
    if not _holders:
        for number in SIGNALS:
            handler = getsignal(number)
            if callable(handler):
                _before[number] = handler
                set_handler(number, _handle)
    _holders[holder] = raised


def let_go(holder: object) -> None:
    """Put back the handlers that *holder* was the last to hold, but for one that was changed since."""
    if _holders.pop(holder, None) is None or _holders:
        return
    for number, handler in _before.items():
        if getsignal(number) is _handle:
            set_handler(number, still_wanted(handler))


def still_wanted(handler: Any) -> Any:
    """Return a handler that was found before, or the default one where what it served is over."""
    # When its task has ended, asyncio's Runner takes its handler away only where it finds it.
    runner = getattr(getattr(handler, "func", None), "__self__", None)
    ended = isinstance(runner, asyncio.Runner) and handler.keywords["main_task"].done()
    return signal.default_int_handler if ended else handler


def _handle(number: int, frame: FrameType | None) -> None:
    try:
        _before[number](number, frame)
    except BaseException as error:
        held = [raised(error) for raised in _holders.values()]
        if not held or not all(held):  # who saved this handler may put it back when nobody holds
            raise
