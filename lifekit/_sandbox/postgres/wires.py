"""The sockets of a gateway, which its place reads and writes: connected ones and listening ones."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from .place import Place

_AT_ONCE = 256 * 1024
"""Bytes that are read from a socket at once."""


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
