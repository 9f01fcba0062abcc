"""All that goes to PostgreSQL by way of lifekit, and the sockets that it goes over."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lifekit._core.drivers import Tls

from . import messages
from .hub import Begun, Hub
from .messages import ProtocolError, Startup
from .place import Place
from .real import Relay
from .virtual import Socket, VirtualConnection
from .wires import Listener, Wire, reach

PORT: Final = 5432
"""Of the unix sockets that lead to a gateway: their folders tell them apart."""


@dataclass(frozen=True)
class Server:
    """Where a real server is."""

    host: str
    """A name, an address, or the folder of a unix socket."""
    port: int
    tls: Tls | None = None


class _Upstream:
    """A connection to a server, for one client."""

    def __init__(
        self, gateway: Gateway, client: VirtualConnection, connected: socket.socket, server: Server
    ) -> None:
        self._gateway, self._hub, self._client, self.server = gateway, gateway.hub, client, server
        self._raw_reply: Callable[[bytes], None] | None = None
        self.wire = Wire(gateway.place, connected, self._raw, self._lost)
        self.relay = Relay(client, _identity(connected), self.wire.write, self.wire.close, self._cancel)

    def ask_for_tls(self, replied: Callable[[bytes], None]) -> None:
        """Send what asks for encryption; *replied* gets the byte that answers, or nothing."""
        self._raw_reply = replied
        self.wire.write(messages.SSL_REQUEST)

    def _raw(self, data: bytes) -> None:
        if self._raw_reply is not None:
            replied, self._raw_reply = self._raw_reply, None
            # More than one byte would be somebody who injects what is not encrypted.
            replied(data if len(data) == 1 else b"")
            self._hub.flush()
        else:
            self.wire.received = self._received
            self._received(data)

    def _received(self, data: bytes) -> None:
        try:
            self.relay.receive(data)
        except ProtocolError:
            self.wire.abort()
            self._lost()
        self._hub.flush()

    def _lost(self) -> None:
        if self._raw_reply is not None:
            self._raw_reply(b"")
        self._hub.lost(self._client, self.relay)
        self._hub.flush()

    def _cancel(self, key: bytes, ended: Callable[[], None]) -> None:
        async def reach_it() -> None:
            try:
                connected = await reach(self.server.host, self.server.port)
            except OSError:
                ended()
                return
            # PostgreSQL closes it when it has sent its signal.
            wire = Wire(self._gateway.place, connected, _nobody, ended)
            wire.write(messages.cancel_request(key))

        self._gateway.spawn(reach_it())


def _identity(connected: socket.socket) -> object:
    # The same for all names of one server's address.
    try:
        name = connected.getpeername()
    except OSError:  # it is lost already, which reading tells
        return object()
    if connected.family == socket.AF_UNIX:
        return os.path.realpath(name)
    host, port = name[:2]
    return "loopback" if host == "::1" or host.startswith("127.") else host, port


class Gateway:
    """All that goes to PostgreSQL by way of lifekit."""

    def __init__(self, place: Place) -> None:
        """Begin, at that place."""
        self.place, self.hub = place, Hub(self)
        self.explains: Callable[[int, int], tuple[str, bool]] = lambda waiting, holding: ("", False)
        """See `explain`."""
        self._upstreams: dict[VirtualConnection, _Upstream] = {}
        self._came_to: dict[VirtualConnection, Server] = {}
        self._wires: dict[VirtualConnection, Wire] = {}  # of clients that came by a socket
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners: list[Listener] = []
        self._folders: dict[Server, Path] = {}
        self._ports: dict[Server, int] = {}

    # -- clients -----------------------------------------------------------------------------------

    def folder(self, server: Server) -> str:
        """Return the folder of a unix socket that leads to a server. Nobody else may enter it."""
        if server not in self._folders:
            folder = self._folders[server] = Path(tempfile.mkdtemp(prefix="lifekit-"))
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(str(folder / f".s.PGSQL.{PORT}"))
            listening.listen(1024)
            self.place.post(self._listen, listening, server)
        return str(self._folders[server])

    def port(self, server: Server) -> int:
        """Return the port of this machine that leads to a server, which asks who comes as ever."""
        if server not in self._ports:
            listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
            self._ports[server] = listening.getsockname()[1]
            self.place.post(self._listen, listening, server)
        return self._ports[server]

    def behind(self, host: str, port: int) -> Server | None:
        """Return the server to which an address leads, where that is the gateway's own."""
        if host.startswith("/"):
            folders = list(self._folders.items())  # threads may add some meanwhile
            found = (server for server, folder in folders if f"{folder}" == host)
        else:
            ports = list(self._ports.items()) if host in ("127.0.0.1", "localhost") else []
            found = (server for server, own in ports if own == port)
        return next(found, None)

    def _listen(self, listening: socket.socket, server: Server) -> None:
        def accepted(connected: socket.socket) -> None:
            self._accepted(connected, server)

        self._listeners.append(Listener(self.place, listening, accepted))

    def _accepted(self, connected: socket.socket, server: Server) -> None:
        if connected.family == socket.AF_INET:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire = Wire(self.place, connected, _nobody, _nobody)
        client = self.hub.new_client(wire)
        self._wires[client], self._came_to[client] = wire, server

        def received(data: bytes) -> None:
            client.receive(data)
            self.hub.flush()

        def lost() -> None:
            client.close()
            self.hub.flush()

        wire.received, wire.lost = received, lost

    def join(self, client: Socket, connected: socket.socket, server: Server) -> VirtualConnection:
        """Take a client that is joined in memory, for which its server is reached already."""
        joined = self.hub.new_client(client)
        self._upstreams[joined] = _Upstream(self, joined, connected, server)
        return joined

    async def start_tls(
        self, client: VirtualConnection, context: ssl.SSLContext, host: str | None
    ) -> None:
        """Encrypt what goes to the server for a client that is joined in memory.

        Raises:
            OSError: The handshake failed.
        """
        await self._upstreams[client].wire.start_tls(context, host)

    # -- what the hub needs ----------------------------------------------------------------------------

    def encrypt(self, client: VirtualConnection) -> None:
        """Answer a client that asks for encryption."""
        upstream = self._upstreams.get(client)
        if upstream is None or upstream.server.tls is not None:
            client.send(b"N")  # nobody can listen on this machine; from here on it is encrypted
        else:
            upstream.ask_for_tls(lambda reply: client.send(reply) if reply else client.close())

    def connect(self, client: VirtualConnection, first: Startup) -> None:
        """Reach the server for a client that has said who it is."""
        upstream = self._upstreams.get(client)
        if upstream is not None:
            client.connected(upstream.relay, first)
        else:
            self.spawn(self._reach(client, first, self._came_to[client]))

    async def _reach(self, client: VirtualConnection, first: Startup, server: Server) -> None:
        try:
            connected = await reach(server.host, server.port)
            if client.closed:
                connected.close()
                return
            upstream = self._upstreams[client] = _Upstream(self, client, connected, server)
            await self._encrypted(upstream)
        except OSError as error:
            self.hub.unreachable(client, f"{server.host}:{server.port}: {error}")
            return
        client.connected(upstream.relay, first)
        self.hub.flush()

    async def encrypt_as_named(self, client: VirtualConnection) -> None:
        """Encrypt what goes to the server for a client that is joined, as its server is said to want.

        Raises:
            OSError: It can't be.
        """
        await self._encrypted(self._upstreams[client])

    async def _encrypted(self, upstream: _Upstream) -> None:
        tls = upstream.server.tls
        if tls is None:
            return
        reply = await self.place.run(upstream.ask_for_tls)
        if reply == b"S":
            await upstream.wire.start_tls(tls.context, tls.name or upstream.server.host)
        elif tls.is_required or not reply:
            raise OSError("server does not support SSL, but SSL was required")

    def gone(self, client: VirtualConnection) -> None:
        """Forget a client; its connection to the server is the hub's to close."""
        self._wires.pop(client, None)
        self._came_to.pop(client, None)
        upstream = self._upstreams.pop(client, None)
        if upstream is not None and client.relay is None:
            upstream.wire.close()  # it never said who it is

    def later(self, seconds: float, call: Callable[[], None]) -> Any:
        """Call something after some seconds."""
        return self.place.later(seconds, call)

    def explain(self, waiting: int, holding: int) -> tuple[str, bool]:
        """Return who has a client for which another one waits, and whether that wait can't end."""
        return self.explains(waiting, holding)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run something there; the end of the gateway cancels it."""
        self.place.post(self._spawn, coroutine)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self.place.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- blocks --------------------------------------------------------------------------------------

    async def begin(self) -> Begun:
        """Begin a block, or one inside of it; return whether that could be done."""
        begun = self.place.at_once(self._begin_at_once)
        return begun if begun is not None else await self.place.run(self._begin)

    def _begin_at_once(self) -> Begun | None:
        if not self.hub.can_begin:
            return None
        begun: list[Begun] = []
        self._begin(begun.append)
        return begun[0]

    def _begin(self, done: Callable[[Begun], None]) -> None:
        clients = len(self.hub.clients)
        for upstream in list(self._upstreams.values()):
            upstream.wire.read()
        self._read_all()  # what was sent before belongs before
        has_closed = len(self.hub.clients) < clients
        self.hub.begin(lambda begun: done(begun._replace(has_closed=has_closed)))

    async def end(self) -> list[str]:
        """Undo what was done in the block; return what went wrong."""
        return await self.place.run(self._end)

    def end_at_once(self) -> list[str] | None:
        """Do so where that takes no waiting; None where it does, or clients know of a schema."""
        return self.place.at_once(self._end_at_once)

    def _end_at_once(self) -> list[str] | None:
        self._read_all()
        if not self.hub.can_end or self.hub.schema_changed:
            return None
        wrong: list[list[str]] = []
        self.hub.end(wrong.append)
        return wrong[0]

    def _end(self, done: Callable[[list[str]], None]) -> None:
        self._read_all()  # what was sent inside belongs inside
        self.hub.end(done)

    def _read_all(self) -> None:
        for listener in self._listeners:
            listener.accept()
        for wire in list(self._wires.values()):
            wire.read()

    async def cut(self, number: int) -> None:
        """Cut off the client of a number."""

        def cut(done: Callable[[None], None]) -> None:
            if (client := self.hub.clients.get(number)) is not None:
                self.hub.cut_off(client)
                self.hub.flush()
            done(None)

        await self.place.run(cut)

    def cancel(self, number: int) -> None:
        """End what the client of a number does; in any thread."""

        def cancel() -> None:
            if (client := self.hub.clients.get(number)) is not None:
                self.hub.cancel_client(client)
                self.hub.flush()

        self.place.post(cancel)

    # -- its end -------------------------------------------------------------------------------------

    def close(self) -> None:
        """End all connections, and the thread if there is one."""
        self.place.post(self._close)
        self.place.end_thread()
        for folder in self._folders.values():
            shutil.rmtree(folder, ignore_errors=True)

    def _close(self) -> None:
        for listener in self._listeners:
            listener.close()
        self.hub.close()
        for task in list(self._tasks):
            task.cancel()


def _nobody(*args: object) -> None:
    """Nobody wants to know."""
