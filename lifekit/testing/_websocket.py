"""Websockets to an ASGI application without a network, for httpx2's ``client.websocket(url)``.

That speaks frames over a stream, which the response to its request for an upgrade carries. The server's
end is here: frames on one side, ASGI's messages on the other. httpx2's own transport of this kind keeps
the application's errors to itself, and must be left in the task that entered it.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import AsyncIterator, MutableMapping
from contextlib import AsyncExitStack
from types import ModuleType
from typing import Any, cast

import anyio
from anyio.lowlevel import checkpoint

from lifekit._util.asgi import ASGIApp
from lifekit._util.loops import sit_out, spawn

Message = MutableMapping[str, Any]

PATIENCE = 5.0
"""Seconds for which an application may go on when its client has gone, before it is cancelled."""


class ClientGoneError(OSError):
    """Raised where the application sends something to a client that has gone, as servers do."""


class Line:
    """What one end has sent, and the other has yet to take."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._more = anyio.Event()

    def put(self, item: Any) -> None:
        """Append it."""
        self._items.append(item)
        self._more.set()

    async def take(self) -> Any:
        """Return the next; wait for it."""
        await checkpoint()
        while not self._items:
            if self._more.is_set():
                self._more = anyio.Event()
            await self._more.wait()
        return self._items.popleft()


class Served:
    """An application that serves one websocket, in a task of its own."""

    def __init__(self, app: ASGIApp, scope: Message, *, raises: bool) -> None:
        from wsproto.connection import Connection, ConnectionType

        self._app, self._scope, self._raises = app, scope, raises
        self._frames = Connection(ConnectionType.SERVER)
        self._received, self._sent, self._bytes = Line(), Line(), Line()
        self._parts: list[Any] = []
        self._ended = anyio.Event()
        self._cancelling = anyio.CancelScope()
        self._error: BaseException | None = None
        self._accepted = self._gone = self._closed = False

    @property
    def ended(self) -> bool:
        """Whether the application is through with it."""
        return self._ended.is_set()

    async def start(self) -> Message:
        """Return what the application answers first."""
        self._received.put({"type": "websocket.connect"})
        self._task: object = spawn(self._run(), "lifekit websocket", self._end)
        try:
            answer: Message = await self._sent.take()
        except BaseException:
            await self.stop()
            raise
        self._accepted = answer["type"] == "websocket.accept"
        return answer

    async def denial(self) -> bytes:
        """Return the body of a response that it gives instead of a websocket."""
        body, more = b"", True
        while more:
            message = await self._sent.take()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        return body

    async def stop(self) -> None:
        """Wait for the application's end, now that the client has gone, and raise what it raised."""
        self._leave(1006, "")
        try:
            with anyio.move_on_after(PATIENCE):
                await self._ended.wait()
        finally:
            if not self._ended.is_set():
                self._cancel()
            interrupt = await sit_out(self._ended)
        if interrupt is not None:
            raise interrupt
        if self._error is not None and self._raises:
            raise self._error

    # -- the client's side: what httpx2 calls a network stream ----------------------------------

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        """Return the application's next frame; none when it has ended."""
        data: bytes = await self._bytes.take()
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Give the client's frames to the application, as messages."""
        from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage

        self._frames.receive_data(buffer)
        for event in self._frames.events():
            if isinstance(event, Ping):
                self._bytes.put(self._frames.send(event.response()))
            elif isinstance(event, CloseConnection):
                self._leave(int(event.code), event.reason or "")
            elif isinstance(event, TextMessage):
                self._message(event, {"text": "".join([*self._parts, event.data])})
            elif isinstance(event, BytesMessage):
                self._message(event, {"bytes": b"".join([*self._parts, event.data])})
        await checkpoint()

    async def aclose(self) -> None:
        """Nothing: the response's end is that of the application."""
        await checkpoint()

    def _message(self, event: Any, whole: dict[str, Any]) -> None:
        if event.message_finished:
            self._received.put({"type": "websocket.receive", **whole})
        self._parts = [] if event.message_finished else [*self._parts, event.data]

    def _leave(self, code: int, reason: str) -> None:
        if not self._gone:
            self._gone = True
            self._received.put({"type": "websocket.disconnect", "code": code, "reason": reason})

    # -- the application's side ------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            with self._cancelling:
                await self._app(self._scope, self._received.take, self._send)
        except GeneratorExit:  # the loop was closed under it
            raise
        except anyio.get_cancelled_exc_class():
            pass
        except BaseException as error:
            if not (self._gone and _is_of_a_client_gone(error)):
                self._error = error
        finally:
            self._end()

    def _end(self) -> None:
        if self._accepted and not self._closed:
            self._close(1000 if self._error is None else 1011, "")
        self._bytes.put(b"")
        self._sent.put({"type": "lifekit.ended"})
        self._ended.set()

    async def _send(self, message: Message) -> None:
        if self._gone:
            raise ClientGoneError("the client of this websocket has gone")
        if not self._accepted:
            self._accepted = message["type"] == "websocket.accept"
            self._sent.put(message)
        elif message["type"] == "websocket.close":
            self._close(message.get("code", 1000), message.get("reason") or "")
        else:
            self._put_frame(message)
        await checkpoint()  # a client that reads slowly would make it wait

    def _put_frame(self, message: Message) -> None:
        from wsproto.events import BytesMessage, TextMessage

        text = message.get("text")
        event = TextMessage(text) if text is not None else BytesMessage(message.get("bytes", b""))
        self._bytes.put(self._frames.send(event))

    def _close(self, code: int, reason: str) -> None:
        from wsproto.events import CloseConnection
        from wsproto.utilities import LocalProtocolError

        self._closed = True
        try:
            self._bytes.put(self._frames.send(CloseConnection(code, reason)))
        except LocalProtocolError:  # the client closed it first
            return
        self._leave(code, reason)

    def _cancel(self) -> None:
        # Once, as asyncio's own tools do: an AnyIO scope would cancel the cleaning up over and over.
        if isinstance(self._task, asyncio.Task):
            self._task.cancel()  # pyright: ignore[reportUnknownMemberType]
        else:
            self._cancelling.cancel()


def _is_of_a_client_gone(error: BaseException) -> bool:
    from starlette.websockets import WebSocketDisconnect

    if isinstance(error, BaseExceptionGroup):
        parts: tuple[BaseException, ...] = error.exceptions  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return all(map(_is_of_a_client_gone, parts))
    return isinstance(error, WebSocketDisconnect | ClientGoneError)


@functools.cache
def transport_for(httpx: ModuleType) -> Any:
    """Return the `ASGITransport` of httpx2 or httpx, with websockets."""

    class Ending(httpx.AsyncByteStream):  # type: ignore[name-defined,misc]
        """The body of a response that is a websocket: its end is the application's."""

        def __init__(self, served: Served) -> None:
            self._served = served

        async def __aiter__(self) -> AsyncIterator[bytes]:
            return
            yield b""

        async def aclose(self) -> None:
            await self._served.stop()

    class Transport(httpx.ASGITransport):  # type: ignore[name-defined,misc]
        """Sends requests to an ASGI application, those for a websocket as well."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)  # pyright: ignore[reportUnknownMemberType]
            self._served: list[Served] = []

        async def aclose(self) -> None:
            async with AsyncExitStack() as stack:
                for served in self._served:
                    if not served.ended:
                        stack.push_async_callback(served.stop)

        async def handle_async_request(self, request: Any) -> Any:
            upgrade = request.headers.get("upgrade", "").lower()
            if request.url.scheme not in ("ws", "wss") and upgrade != "websocket":
                inherited = cast("Any", super())  # pyright: ignore[reportUnnecessaryCast]
                return await inherited.handle_async_request(request)
            served = Served(self.app, self._scope_of(request), raises=self.raise_app_exceptions)
            self._served = [*(each for each in self._served if not each.ended), served]
            answer = await served.start()
            kind, headers = answer["type"], answer.get("headers", [])
            if kind == "websocket.accept":
                if (subprotocol := answer.get("subprotocol")) is not None:
                    headers = [*headers, (b"sec-websocket-protocol", subprotocol.encode())]
                extensions = {"network_stream": served}
                return httpx.Response(
                    101, headers=headers, stream=Ending(served), extensions=extensions
                )
            status, body = 500, b""
            if kind == "websocket.http.response.start":
                status, body = answer["status"], await served.denial()
            elif kind == "websocket.close":
                status = 403
            await served.stop()
            return httpx.Response(status, headers=headers, content=body)

        def _scope_of(self, request: Any) -> Message:
            url, headers = request.url, request.headers
            subprotocols = headers.get("sec-websocket-protocol", "").split(",")
            return {
                "type": "websocket",
                "asgi": {"version": "3.0", "spec_version": "2.4"},
                "http_version": "1.1",
                "scheme": "wss" if url.scheme in ("https", "wss") else "ws",
                "path": url.path,
                "raw_path": url.raw_path.split(b"?")[0],
                "query_string": url.query,
                "root_path": self.root_path,
                "headers": [(name.lower(), value) for name, value in headers.raw],
                "client": self.client,
                "server": (url.host, url.port),
                "subprotocols": [each.strip() for each in subprotocols if each.strip()],
                "extensions": {"websocket.http.response": {}},
            }

    return Transport
