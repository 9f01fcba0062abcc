"""Where a gateway runs: in the application's event loop, or in that of a thread of its own.

It begins in the application's, which costs least. A client that blocks its thread while it waits would
wait forever for a gateway in that same thread: before the first one comes, everything moves into a
thread, sockets, timers and all. It never moves back. While that thread has nothing to do, another one
may do something in its place, which is quicker than to wake it and to wait for it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Protocol, TypeVar, TypeVarTuple

import anyio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _Moves(Protocol):
    """What hangs on the event loop, and is moved from one to another."""

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hang on it."""

    def detach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let go of it."""


class Idleness(selectors.DefaultSelector):
    """What a place's thread waits with; while it waits, another thread may have the place."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = threading.Lock()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait, and let go of the place meanwhile, unless there is something to do already."""
        if timeout == 0:
            return super().select(timeout)
        self.taken.release()
        try:
            found = super().select(timeout)
        finally:
            self.taken.acquire()
        # Who had the place since may have done that already, and closed what it came from.
        registered = self.get_map()
        return [(key, mask) for key, mask in found if registered.get(key.fd) is key]

    def is_idle(self) -> bool:
        """Return whether nothing has come; calls from other threads come by a socket, too."""
        return not super().select(0)


class Place:
    """The event loop in which all of a lifespan's gateways run; all that they do is done there."""

    def __init__(self) -> None:
        """Begin in the running loop, where that is asyncio's and knows sockets; Windows' does not."""
        self._thread_id = threading.get_ident()
        self._thread: threading.Thread | None = None
        self._selector: Idleness | None = None
        self._hanging: set[_Moves] = set()
        try:
            self.loop = asyncio.get_running_loop()
        except RuntimeError:
            self.move_into_thread()
        else:
            if not _knows_sockets(self.loop):
                self.move_into_thread()

    @property
    def is_here(self) -> bool:
        """Whether this code runs in its thread."""
        return threading.get_ident() == self._thread_id

    @property
    def has_thread(self) -> bool:
        """Whether that is a thread of its own."""
        return self._thread is not None

    def post(self, call: Callable[[*Ts], object], *args: *Ts) -> None:
        """Have something called there: at once where this is the place."""
        if self.is_here:
            call(*args)
        else:
            self.loop.call_soon_threadsafe(call, *args)

    def at_once(self, call: Callable[[], T | None]) -> T | None:
        """Call something that does not wait: here, or in place of a thread that has nothing to do.

        Return None where it has something to do.
        """
        if self.is_here:
            return call()
        selector = self._selector
        if selector is None or not selector.taken.acquire(blocking=False):
            return None
        try:
            return call() if selector.is_idle() else None
        finally:
            selector.taken.release()

    def do(self, call: Callable[[*Ts], object], *args: *Ts) -> None:
        """Have something done that does not wait: at once, where the thread has nothing to do."""

        def done() -> bool:
            call(*args)
            return True

        if self.at_once(done) is None:
            self.loop.call_soon_threadsafe(call, *args)

    async def run(self, call: Callable[[Callable[[T], None]], object]) -> T:
        """Have something called there, and wait for what it gives to its argument."""
        if self.is_here:
            return await _given(call)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # trio's
            waiting: concurrent.futures.Future[T] = concurrent.futures.Future()
            self.loop.call_soon_threadsafe(call, waiting.set_result)
            return await anyio.to_thread.run_sync(waiting.result)
        given: asyncio.Future[T] = loop.create_future()

        def give(value: T) -> None:
            if not given.done():
                given.set_result(value)

        def give_from_there(value: T) -> None:
            loop.call_soon_threadsafe(give, value)

        self.loop.call_soon_threadsafe(call, give_from_there)
        return await given

    def hang(self, moves: _Moves) -> None:
        """Let *moves* hang on the loop, whichever that is."""
        self._hanging.add(moves)
        self.post(self._attach, moves)

    def drop(self, moves: _Moves) -> None:
        """Let it go."""
        if moves in self._hanging:
            self._hanging.remove(moves)
            moves.detach(self.loop)

    def later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call something after some seconds, unless the timer is cancelled."""
        timer = Timer(self, self.loop.time() + seconds, call)
        self.hang(timer)
        return timer

    def move_into_thread(self) -> None:
        """Let a thread of its own be the place, from now on. To be called at the place."""
        if self._thread is not None:
            return
        assert self.is_here
        for each in self._hanging:
            each.detach(self.loop)
        selector = Idleness()
        with selector.taken:
            self.loop, self._selector = asyncio.SelectorEventLoop(selector), selector
            self._thread = threading.Thread(
                target=self._run, args=(selector.taken,), name="lifekit-gateway", daemon=True
            )
            self._thread.start()
            assert self._thread.ident is not None
            self._thread_id = self._thread.ident
            self.loop.call_soon_threadsafe(self._attach_all)

    def _attach(self, moves: _Moves) -> None:
        if moves in self._hanging:
            moves.attach(self.loop)

    def _attach_all(self) -> None:
        for each in list(self._hanging):
            each.attach(self.loop)

    def _run(self, taken: threading.Lock) -> None:
        with taken, contextlib.closing(self.loop):
            asyncio.set_event_loop(self.loop)
            self.loop.run_forever()

    def end_thread(self) -> None:
        """End the thread, if there is one. Everything is dropped before."""
        if self._thread is not None:
            self.loop.call_soon_threadsafe(self.loop.call_soon, self.loop.stop)
            self._thread.join()


async def _given(call: Callable[[Callable[[T], None]], object]) -> T:
    at_once: list[T] = []
    given: asyncio.Future[None] | None = None

    def give(value: T) -> None:
        at_once.append(value)
        if given is not None and not given.done():
            given.set_result(None)

    call(give)
    if not at_once:
        given = asyncio.get_running_loop().create_future()
        await given
    return at_once[0]


def _knows_sockets(loop: asyncio.AbstractEventLoop) -> bool:
    one, other = socket.socketpair()
    with one, other:
        try:
            loop.add_reader(one, int)
        except NotImplementedError:
            return False
        loop.remove_reader(one)
    return True


class Timer:
    """What a place calls later."""

    def __init__(self, place: Place, when: float, call: Callable[[], None]) -> None:
        self._place, self._when, self._call = place, when, call
        self._handle: asyncio.TimerHandle | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Be called by that loop. All have the same clock."""
        self._handle = loop.call_at(self._when, self._ring)

    def detach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Not be called by it."""
        if self._handle is not None:
            self._handle.cancel()

    def _ring(self) -> None:
        self.cancel()
        self._call()

    def cancel(self) -> None:
        """Forget it."""
        self._place.drop(self)
