"""Websockets in async tests: what the application and the client see, and what is left afterwards."""

# No `from __future__ import annotations`: FastAPI resolves annotations in the module.

from collections.abc import Callable
from typing import Annotated, Any

import anyio
import httpx
import pytest
from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect
from starlette.responses import PlainTextResponse

from lifekit import LifekitError, Registry
from lifekit.testing import _websocket, client

from ..leaks import tasks_alive
from ..pages import DOCS, blocks

pytest.importorskip("httpx2.websockets", reason="older releases of httpx2 have none")
from httpx2.websockets import WebSocketDisconnect as Closed
from httpx2.websockets import WebSocketUpgradeError

pytestmark = pytest.mark.anyio
Endpoint = Callable[..., Any]

registry = Registry("websockets")


@registry.resource
def greeting() -> str:
    return "hello"


def serving(endpoint: Endpoint) -> FastAPI:
    """Return an application that serves that at /ws."""
    app = FastAPI(lifespan=registry.lifespan)
    app.websocket("/ws")(endpoint)
    return app


class BoomError(Exception):
    """What applications here fail with."""


async def test_both_sides_see_what_they_would_over_a_network() -> None:
    async def talk(socket: WebSocket, greeting: Annotated[str, Depends(greeting)]) -> None:
        await socket.accept(subprotocol="v2", headers=[(b"x-room", b"blue")])
        await socket.send_json(
            {
                "asked": [greeting, socket.url.path, socket.query_params["q"], socket.cookies["taste"]],
                "scheme": socket.url.scheme,
                "subprotocols": socket.scope["subprotocols"],
                "state": socket.state.greeting,
            }
        )
        await socket.send_text(await socket.receive_text())
        await socket.send_bytes(await socket.receive_bytes())
        await socket.close(4001, "enough")

    cookies = {"taste": "bitter"}
    with registry.override(greeting, "hi"):
        async with (
            client(serving(talk), cookies=cookies) as http,
            http.websocket("/ws?q=1", subprotocols=["v1", "v2"]) as socket,
        ):
            assert await socket.receive_json() == {
                "asked": ["hi", "/ws", "1", "bitter"],
                "scheme": "ws",
                "subprotocols": ["v1", "v2"],
                "state": "hi",
            }
            assert socket.subprotocol == "v2"
            assert socket.response is not None
            assert socket.response.headers["x-room"] == "blue"
            await (await socket.ping()).wait()
            await socket.send_text("é" * 10_000)
            assert await socket.receive_text() == "é" * 10_000
            await socket.send_bytes(b"\0\1")
            assert await socket.receive_bytes() == b"\0\1"
            with pytest.raises(Closed) as closed:
                await socket.receive_text()
            assert (closed.value.code, closed.value.reason) == (4001, "enough")


async def refuses(socket: WebSocket) -> None:
    await socket.close(1008)


async def denies(socket: WebSocket) -> None:
    await socket.send_denial_response(PlainTextResponse("not you", 401, {"x-why": "age"}))


async def says_nothing(socket: WebSocket) -> None: ...


@pytest.mark.parametrize(
    ("endpoint", "status", "text"),
    [(refuses, 403, ""), (denies, 401, "not you"), (says_nothing, 500, "")],
)
async def test_a_refusal_is_the_response_that_a_server_gives(
    endpoint: Endpoint, status: int, text: str
) -> None:
    async with client(serving(endpoint)) as http:
        with pytest.raises(WebSocketUpgradeError) as refused:
            async with http.websocket("ws://test/ws"):
                pass
        assert (refused.value.response.status_code, refused.value.response.text) == (status, text)


@pytest.mark.parametrize("accepted", [False, True])
async def test_an_error_of_the_application_comes_up_in_the_test(accepted: bool) -> None:
    async def fail(socket: WebSocket) -> None:
        if accepted:
            await socket.accept()
        raise BoomError

    async with client(serving(fail)) as http:
        with pytest.raises(BoomError):
            async with http.websocket("/ws") as socket:
                await socket.receive_text()
    async with client(serving(fail), raise_app_exceptions=False) as http:
        with pytest.raises(ExceptionGroup if accepted else WebSocketUpgradeError) as seen:
            async with http.websocket("/ws") as socket:
                await socket.receive_text()
    if isinstance(seen.value, ExceptionGroup):
        assert [each.code for each in seen.value.exceptions if isinstance(each, Closed)] == [1011]


async def test_the_application_is_waited_for_when_the_client_leaves() -> None:
    log: list[object] = []

    async def listen(socket: WebSocket) -> None:
        await socket.accept()
        try:
            await socket.receive_text()
        except WebSocketDisconnect as gone:
            await anyio.lowlevel.checkpoint()
            log.append(gone.code)
            raise

    async with client(serving(listen)) as http:
        async with http.websocket("/ws"):
            pass
        assert log == [1000]
        async with http.websocket("/ws") as socket:
            await socket.close(4002)
        assert log == [1000, 4002]


async def test_tasks_of_the_application_may_end_as_their_client_leaves() -> None:
    """Those of a task group raise it in a group."""
    log: list[str] = []

    async def tick(socket: WebSocket) -> None:
        while True:
            await socket.send_text("tick")

    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(tick, socket)
                await socket.receive_text()
        except* WebSocketDisconnect:
            log.append("gone")
            raise

    async with client(serving(talk)) as http, http.websocket("/ws") as socket:
        assert await socket.receive_text() == "tick"
    assert log == ["gone"]


async def test_one_that_sends_for_ever_gives_others_turns_and_ends_with_its_client() -> None:
    log: list[str] = []

    async def count(socket: WebSocket) -> None:
        await socket.accept()
        try:
            while True:
                await socket.send_text("tick")
        finally:
            log.append("ended")

    async with client(serving(count)) as http, http.websocket("/ws") as socket:
        assert [await socket.receive_text() for _ in range(3)] == ["tick"] * 3
        assert log == []
    assert log == ["ended"]


async def test_one_that_does_not_listen_is_cancelled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the session was forgotten: then the client's end is its own."""
    monkeypatch.setattr(_websocket, "PATIENCE", 0)
    log: list[str] = []
    before = tasks_alive()

    async def sleep(socket: WebSocket) -> None:
        await socket.accept()
        try:
            await anyio.sleep_forever()
        finally:
            log.append("cancelled")

    async with client(serving(sleep)) as http:
        async with http.websocket("/ws"):
            pass
        assert log == ["cancelled"]
        request = http.build_request("GET", "ws://test/ws")
        await http.send(request, stream=True)
    assert log == ["cancelled"] * 2
    assert tasks_alive() == before


async def test_a_test_that_is_cancelled_leaves_nothing() -> None:
    before = tasks_alive()

    async def listen(socket: WebSocket) -> None:
        await socket.accept()
        await socket.receive_text()

    async with client(serving(listen)) as http:
        with anyio.CancelScope() as scope:
            async with http.websocket("/ws") as socket:
                scope.cancel()
                await socket.receive_text()
        assert scope.cancelled_caught
        never = anyio.CancelScope()
        with never:
            never.cancel()
            async with http.websocket("/ws"):
                pass
    assert tasks_alive() == before


async def test_httpx_has_none_and_says_who_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lifekit.testing._client._httpx", lambda: httpx)
    async with client(serving(refuses)) as http:
        with pytest.raises(LifekitError, match=r"pip install 'httpx2\[ws\]'"):
            http.websocket("/ws")


async def test_the_sample_of_the_page_runs() -> None:
    page = (DOCS / "testing.md").read_text("utf-8")
    (sample,) = (code for _, code in blocks(page, "python") if "check_a_websocket" in code)
    namespace: dict[str, Any] = {}
    exec(compile(sample, "testing.md", "exec"), namespace)
    await namespace["check_a_websocket"]()
