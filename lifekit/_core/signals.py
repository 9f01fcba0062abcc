"""What the process is told by signals, heard before its server acts on it; and how to tell the server.

A handler of lifekit's is chained in front of the one that is there: it is called first, and calls the
other one. What listens by a wakeup fd, as event loops do, is written to before either. Hypercorn's
workers are told by an event of multiprocessing, which they ask ten times a second: that is chained too.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from lifekit._util.call_sites import suspended_frames
from lifekit._util.interrupts import SIGNALS, getsignal, set_handler, still_wanted

Handler = Callable[[int, FrameType | None], Any]

_listeners: dict[object, Callable[[str], None]] = {}
_delays: dict[object, float] = {}
_chained: list[tuple[int, Handler, Handler]] = []
"""Signals, our handlers, and those that they were chained in front of."""
_event: Any = None


class _Delay:
    """For how long SIGTERM is held before the server hears of it, as long as somebody listens.

    A thread waits, for it is the same in every loop; it does nothing but send the signal again. It is
    begun before any signal comes: in a handler that could wait for a lock that the code under it holds.
    """

    def __init__(self) -> None:
        self.held = 0
        self.is_over = self._has_begun = False
        self._thread: threading.Thread | None = None
        self._bell = SimpleQueue[None]()  # whose put() may be called amid itself

    def prepare(self) -> None:
        """Begin the thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait, name="lifekit drain_delay", daemon=True)
            self._thread.start()

    def holds(self) -> bool:
        """Return whether the server is not to hear of the stop yet; at first, begin."""
        if self._thread is None or self.is_over:
            return False
        if not self._has_begun:
            self._has_begun = True
            self._bell.put(None)
        return True

    def _wait(self) -> None:
        self._bell.get()
        with suppress(Empty):
            self._bell.get(timeout=max(_delays.values(), default=0.0))
            return  # nobody listens any more
        self.is_over = True
        for _ in range(self.held):
            os.kill(os.getpid(), signal.SIGTERM)

    def cancel(self) -> None:
        """Let go of a signal that nobody is to hear any more."""
        if self._thread is not None:
            self._has_begun = True
            self._bell.put(None)
            self._bell.put(None)
            self._thread.join()


_delay = _Delay()


def listen(listener: object, told: Callable[[str], None], delay: float = 0.0) -> None:
    """Call *told* with the name of SIGTERM or SIGINT, amid anything, until *listener* is forgotten.

    Where the server has a handler of SIGTERM, or is Hypercorn with workers, it hears of that *delay*
    seconds later. SIGINT is not delayed, nor what a server's event loop hears by its wakeup fd.
    Where no handler is there none is added, and in another thread than the main one none runs.
    """
    global _event, _delay
    if threading.get_ident() != threading.main_thread().ident:
        return
    for lost in [each for each in _listeners if _is_lost(each)]:
        forget(lost)
    ours = [handler for _, handler, _ in _chained]
    for number in SIGNALS:
        found = getsignal(number)
        if callable(found) and found not in ours:  # else a server has come since
            handler = _in_front_of(found)
            _chained.append((number, handler, found))
            set_handler(number, handler)
    if not _listeners:
        _delay = _Delay()
        if (event := _event_of_hypercorn()) is not None and "is_set" not in vars(event):
            _event = event
            event.is_set = _asked_in_front_of(event.is_set)
    _listeners[listener], _delays[listener] = told, delay
    if delay:
        _delay.prepare()


def forget(listener: object) -> None:
    """Put back what was found, but for what was changed since, when nobody listens any more."""
    global _event
    _delays.pop(listener, None)
    if _listeners.pop(listener, None) is None or _listeners:
        return
    _delay.cancel()
    for number, ours, found in reversed(_chained):
        if getsignal(number) is ours:
            set_handler(number, still_wanted(found))
    _chained.clear()
    if _event is not None:
        del _event.is_set
        _event = None
    if not _delay.is_over:
        for _ in range(_delay.held):  # which the server has not heard
            signal.raise_signal(signal.SIGTERM)


def _is_lost(listener: object) -> bool:
    # Its event loop was closed under it.
    loop = getattr(listener, "loop", None)
    return isinstance(loop, asyncio.AbstractEventLoop) and loop.is_closed()


def _tell(reason: str) -> None:
    for told in [*_listeners.values()]:
        told(reason)


def _in_front_of(found: Any) -> Handler:
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> object:
        if os.getpid() == process:  # a fork inherits it
            _tell(signal.Signals(number).name)
            if number == signal.SIGTERM and _delay.holds():
                _delay.held += 1  # all that come meanwhile are passed on
                return None
        return found(number, frame)

    if hasattr(found, "__self__"):  # by which sse-starlette finds uvicorn's server
        handle.__self__ = found.__self__  # type: ignore[attr-defined]
    return handle


def _asked_in_front_of(is_set: Callable[[], bool]) -> Callable[[], bool]:
    def asked() -> bool:
        if found := is_set():
            _tell("Hypercorn's shutdown event")
        return found and not _delay.holds()

    return asked


def _event_of_hypercorn() -> Any:
    processes: Any = sys.modules.get("multiprocessing.process")
    if processes is None or "hypercorn" not in sys.modules:
        return None
    return getattr(processes.current_process(), "_kwargs", {}).get("shutdown_event")


# -- telling the server ------------------------------------------------------------------------------

_LIFESPANS = {
    ("uvicorn.lifespan.on", "main"),
    ("hypercorn.asyncio.lifespan", "handle_lifespan"),
    ("hypercorn.trio.lifespan", "handle_lifespan"),
    ("granian.asgi", "handle"),
    ("starlette.routing", "lifespan"),  # of a server that lifekit does not know
}
"""The code in which servers run the lifespan of an application."""


def is_served(frame: FrameType | None) -> bool:
    """Return whether a server, or what stands in for one, runs the lifespan that begins in *frame*."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "lifekit.testing._app":  # no process is to end by it
            return False
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) in _LIFESPANS:
            return True
        frame = frame.f_back
    return False


def stop_server() -> bool:
    """Tell the server to stop, as whoever runs it would; return whether it can be told."""
    if threading.get_ident() != threading.main_thread().ident:
        return _stop_uvicorn()
    if (event := _event_of_hypercorn()) is not None:
        event.set()
        return True
    if callable(getsignal(signal.SIGTERM)):
        signal.raise_signal(signal.SIGTERM)
        return True
    if "hypercorn.trio" in sys.modules and "hypercorn.trio.run" in sys.modules:
        return _interrupt()
    return False


def _stop_uvicorn() -> bool:
    # In another thread it hears of no signal. Who runs it there sets this attribute.
    if "uvicorn.server" not in sys.modules or asyncio._get_running_loop() is None:
        return False
    for task in asyncio.all_tasks():
        for frame in suspended_frames(task.get_coro()):
            if frame.f_globals.get("__name__") == "uvicorn.server":
                frame.f_locals["self"].should_exit = True
                return True
    return False


def _interrupt() -> bool:
    # Hypercorn on trio without workers has no handler of SIGTERM, and ends in order at SIGINT.
    if not callable(getsignal(signal.SIGINT)):
        return False
    signal.raise_signal(signal.SIGINT)
    return True
