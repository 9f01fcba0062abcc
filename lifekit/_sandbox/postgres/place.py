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
import ssl
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar, TypeVarTuple

import anyio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_AT_ONCE = 256 * 1024
"""Bytes that are read from a socket at once."""


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


class Wire:
    """A connected socket at a place."""

    def __init__(
        self,
        place: Place,
        connected: socket.socket,
        received: Callable[[bytes], object],
        lost: Callable[[], object],
    ) -> None:
        """*received* gets what comes; *lost* is called once when the other side has ended it."""
        self._place, self._socket = place, connected
        self.received, self.lost = received, lost
        self._unsent = bytearray()
        self._is_closing = self._is_closed = False
        self._tls: _Tls | None = None
        connected.setblocking(False)
        place.hang(self)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Be read and written by that loop."""
        # uvloop calls once for the last bytes and the end that comes with them.
        calls_again = isinstance(loop, asyncio.SelectorEventLoop)
        loop.add_reader(self._socket, self._read if calls_again else self.read)
        if self._unsent:
            loop.add_writer(self._socket, self._send)

    def detach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Be let alone by it."""
        loop.remove_reader(self._socket)
        loop.remove_writer(self._socket)

    def read(self) -> None:
        """Take all that has arrived."""
        while not self._is_closed and self._read():
            pass

    def _read(self) -> bool:
        # Whether there may be more.
        try:
            data = self._socket.recv(_AT_ONCE)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            data = b""
        if not data:
            self._end()
            return False
        if self._tls is not None:
            data = self._tls.decrypt(data)
        if data:
            self.received(data)
        return True

    def write(self, data: bytes) -> None:
        """Send."""
        if self._is_closing:
            return
        self.write_raw(data if self._tls is None else self._tls.encrypt(data))

    def write_raw(self, data: bytes) -> None:
        """Send what is encrypted already, or need not be."""
        if self._unsent:
            self._unsent += data
            return
        try:
            sent = self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            return  # reading tells that it is lost
        if sent < len(data):
            self._unsent += data[sent:]
            self._place.post(self._wait_to_send)

    def _wait_to_send(self) -> None:
        if self._unsent and not self._is_closed:
            self._place.loop.add_writer(self._socket, self._send)

    def _send(self) -> None:
        try:
            del self._unsent[: self._socket.send(self._unsent)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._unsent.clear()
        if not self._unsent:
            self._place.loop.remove_writer(self._socket)
            if self._is_closing:
                self._close()

    async def start_tls(self, context: ssl.SSLContext, host: str | None) -> None:
        """Encrypt what is sent from now on.

        Raises:
            OSError: The handshake failed; `ssl.SSLError` is one.
        """

        def begin(ended: Callable[[OSError | None], None]) -> None:
            self._tls = _Tls(context, host, self.write_raw, ended)
            self._tls.go_on()

        if (error := await self._place.run(begin)) is not None:
            raise error

    def _end(self) -> None:
        self._close()
        if self._tls is not None:
            self._tls.fail(ConnectionResetError("the server ended the connection"))
        self.lost()

    def close(self) -> None:
        """Send what is left, and end."""
        self._is_closing = True
        if not self._unsent:
            self._close()

    def abort(self) -> None:
        """End at once."""
        self._is_closing = True
        self._close()

    def _close(self) -> None:
        if not self._is_closed:
            self._is_closing = self._is_closed = True
            self._place.drop(self)
            self._socket.close()


class _Tls:
    """The encryption of one wire."""

    def __init__(
        self,
        context: ssl.SSLContext,
        host: str | None,
        send: Callable[[bytes], None],
        ended: Callable[[OSError | None], None],
    ) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=host)
        self._send, self._ended = send, ended
        self._is_ready = self._has_failed = False

    def go_on(self) -> None:
        """Do what can be done of the handshake."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
        except OSError as error:
            self._flush()
            self.fail(error)
        else:
            self._is_ready = True
            self._flush()
            self._ended(None)

    def fail(self, error: OSError) -> None:
        """Note that it came to nothing."""
        if not (self._is_ready or self._has_failed):
            self._has_failed = True
            self._ended(error)

    def _flush(self) -> None:
        if data := self._out.read():
            self._send(data)

    def encrypt(self, data: bytes) -> bytes:
        """Return what is to be sent."""
        self._tls.write(data)
        return self._out.read()

    def decrypt(self, data: bytes) -> bytes:
        """Return what of *data* is the other side's."""
        self._in.write(data)
        if self._has_failed:
            return b""
        if not self._is_ready:
            self.go_on()
            if not self._is_ready:
                return b""
        found: list[bytes] = []
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            while part := self._tls.read(_AT_ONCE):
                found.append(part)
        self._flush()
        return b"".join(found)


class Listener:
    """A listening socket at a place."""

    def __init__(
        self, place: Place, listening: socket.socket, accepted: Callable[[socket.socket], object]
    ) -> None:
        self._place, self._socket, self._accepted = place, listening, accepted
        listening.setblocking(False)
        place.hang(self)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Accept in that loop."""
        loop.add_reader(self._socket, self.accept)

    def detach(self, loop: asyncio.AbstractEventLoop) -> None:
        """No more in that one."""
        loop.remove_reader(self._socket)

    def accept(self) -> None:
        """Take who has come."""
        while True:
            try:
                connected, _ = self._socket.accept()
            except OSError:
                return
            self._accepted(connected)

    def close(self) -> None:
        """Listen no more."""
        self._place.drop(self)
        self._socket.close()


async def reach(host: str, port: int) -> socket.socket:
    """Connect to a server, in the running loop; *host* may be the folder of a unix socket.

    Raises:
        OSError: It is not there.
    """
    loop = asyncio.get_running_loop()
    if host.startswith("/"):
        path = f"{host}/.s.PGSQL.{port}"
        return await _connected(socket.socket(socket.AF_UNIX), path)
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failed: list[OSError] = []
    for family, kind, number, _, address in found:
        try:
            connected = await _connected(socket.socket(family, kind, number), address)
        except OSError as error:
            failed.append(error)
        else:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connected
    raise failed[0] if failed else OSError(f"{host} has no address")


async def _connected(made: socket.socket, address: Any) -> socket.socket:
    made.setblocking(False)
    try:
        connecting: Awaitable[None] = asyncio.get_running_loop().sock_connect(made, address)
        await connecting
    except BaseException:
        made.close()
        raise
    return made
