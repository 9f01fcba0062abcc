"""asyncpg joined to a gateway in memory: no socket lies between, and no turn of the event loop.

asyncpg is given an event loop, by its public argument ``loop=``, that is the running one in all but
this: connections that it asks for are made to the gateway. So where it connects, how it logs in and
how it encrypts stay asyncpg's own business. Learned from `connect_utils.py` of asyncpg 0.30 to 0.32.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from lifekit._core.block import refuse_stragglers

from .gateway import Gateway, Server
from .virtual import VirtualConnection
from .wires import reach

_OF_NOBODY = (b"X", b"\0")
"""How a Terminate begins, and what comes before the login: a pool's housekeeping, as a cancellation."""


class JoinedTransport(asyncio.Transport):
    """What asyncpg writes to: a virtual connection."""

    client: VirtualConnection

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        gateway: Gateway,
        protocol: asyncio.BaseProtocol,
        connected: socket.socket,
        *,
        is_nobodys: bool,
    ) -> None:
        """*connected* is the one to the server; if it *is_nobodys*, no pool refuses who is too late."""
        super().__init__({"socket": connected})
        self._loop, self._protocol = loop, protocol
        self._is_nobodys = is_nobodys
        self.gateway, self._place = gateway, gateway.place
        self._is_closing = self._is_paused = self._writes = False
        self._pending: deque[bytes] = deque()  # what came while it is paused, or writes
        self._is_called = False

    # -- from asyncpg --------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview[int]) -> None:
        """Send to the gateway."""
        if self._is_closing:
            return
        sent = data if type(data) is bytes else bytes(data)
        if self._is_nobodys and sent[:1] not in _OF_NOBODY:
            refuse_stragglers("a connection of asyncpg")  # who calls has a context, no socket has one
        place = self._place
        if not place.is_here:
            place.do(self._write, sent)
            return
        self._writes = True  # asyncpg does not expect an answer before this returns
        self._write(sent)
        self._writes = False

    def _write(self, data: bytes) -> None:
        self.client.receive(data)
        self.gateway.hub.flush()

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview[int]]) -> None:
        """Send several."""
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        """End the connection."""
        if not self._is_closing:
            self._is_closing = True
            self._place.post(self._close)
            self._loop.call_soon(self._protocol.connection_lost, None)

    def _close(self) -> None:
        self.client.close()
        self.gateway.hub.flush()

    abort = close

    def is_closing(self) -> bool:
        """Whether it is closed."""
        return self._is_closing

    def pause_reading(self) -> None:
        """Let what comes wait."""
        self._is_paused = True

    def resume_reading(self) -> None:
        """Give what has come."""
        self._is_paused = False
        self._give()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Give what comes to another one."""
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return to whom it gives."""
        return self._protocol

    def get_write_buffer_size(self) -> int:
        """Return 0: nothing waits here."""
        return 0

    # -- to asyncpg ----------------------------------------------------------------------------------

    def answer(self, data: bytes) -> None:
        """Take what the gateway sends, in the gateway's place."""
        if self._place.has_thread:
            self._loop.call_soon_threadsafe(self._take, data)
        elif self._writes or self._pending or self._is_paused:
            self._take(data)
        else:
            self._protocol.data_received(data)  # type: ignore[attr-defined]

    def _take(self, data: bytes) -> None:
        self._pending.append(data)
        if not self._is_called:
            self._is_called = True
            self._loop.call_soon(self._give_called)

    def _give_called(self) -> None:
        self._is_called = False
        self._give()

    def _give(self) -> None:
        # Piece by piece, as from a socket: asyncpg pauses in the midst of a COPY.
        while self._pending and not (self._is_paused or self._is_closing):
            self._protocol.data_received(self._pending.popleft())  # type: ignore[attr-defined]

    def end(self) -> None:
        """Take note that the gateway ends the connection."""
        self._loop.call_soon_threadsafe(self._ended)

    def _ended(self) -> None:
        if not self._is_closing:
            self._is_paused = False
            self._give()
            self._is_closing = True
            self._protocol.connection_lost(None)


class _Socket:
    """How the gateway reaches asyncpg."""

    def __init__(self, transport: JoinedTransport) -> None:
        self.write = transport.answer
        self.close = transport.end


class JoinedLoop:
    """The running event loop, but that connections to PostgreSQL are made to gateways."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, gateway: Gateway, *, is_nobodys: bool = False
    ) -> None:
        self._loop, self._gateway, self._is_nobodys = loop, gateway, is_nobodys

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def __eq__(self, other: object) -> bool:
        return other is self or other is self._loop

    def __hash__(self) -> int:
        return hash(self._loop)

    async def create_unix_connection(self, factory: Callable[[], Any], path: str) -> tuple[Any, Any]:
        """Connect to a server by its unix socket."""
        folder, _, port = path.rpartition("/.s.PGSQL.")
        return await self._join(factory, folder, int(port))

    async def create_connection(
        self,
        factory: Callable[[], Any],
        host: str,
        port: int,
        *,
        ssl: ssl.SSLContext | None = None,
    ) -> tuple[Any, Any]:
        """Connect to a server; *ssl* encrypts from the first byte on."""
        return await self._join(factory, host, port, ssl)

    async def _join(
        self,
        factory: Callable[[], Any],
        host: str,
        port: int,
        encrypted: ssl.SSLContext | None = None,
    ) -> tuple[Any, Any]:
        gateway = self._gateway
        server = gateway.behind(host, port) or Server(host, port)
        connected = await reach(server.host, server.port)
        protocol = factory()
        nobodys = self._is_nobodys
        transport = JoinedTransport(self._loop, gateway, protocol, connected, is_nobodys=nobodys)

        def join(joined: Callable[[VirtualConnection], None]) -> None:
            joined(gateway.join(_Socket(transport), connected, server))

        transport.client = await gateway.place.run(join)
        await gateway.encrypt_as_named(transport.client)
        if encrypted is not None:
            await self.start_tls(transport, protocol, encrypted, server_hostname=host)
        protocol.connection_made(transport)
        return transport, protocol

    async def start_tls(
        self,
        transport: JoinedTransport,
        protocol: Any,
        context: ssl.SSLContext,
        *,
        server_hostname: str | None = None,
    ) -> JoinedTransport:
        """Encrypt what goes to the server."""
        await transport.gateway.start_tls(transport.client, context, server_hostname)
        return transport
