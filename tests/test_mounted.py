"""`lifespan_of`, and the notice of a mounted application whose lifespan nobody runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from lifekit import CrashError, Registry, ShutdownError, StartupError
from lifekit.asgi import health, lifespan_of
from lifekit.testing import client

pytestmark = pytest.mark.anyio


class Shop:
    """An application with another one mounted in it, and what happened."""

    def __init__(self, **options: Any) -> None:
        self.lines: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.registry = Registry("shop", **options)
        self.inner: Any = FastAPI(title="tools", lifespan=self.lifespan)

        @self.registry.resource
        def tools() -> Any:
            return lifespan_of(self.inner)

        self.tools = tools

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncGenerator[dict[str, str]]:
        async with anyio.create_task_group() as tasks:
            if "open" in self.fails:
                raise self.fails["open"]
            if "crash" in self.fails:
                tasks.start_soon(self._crash)
            self.lines.append("opened")
            yield {"tool": "hammer"}
            tasks.cancel_scope.cancel()
            self.lines.append("closed")
        if "close" in self.fails:
            raise self.fails["close"]

    async def _crash(self) -> None:
        raise self.fails["crash"]


async def test_a_mounted_application_lives_as_long_as_the_lifespan_and_gives_its_state() -> None:
    shop = Shop()
    async with shop.registry.lifespan() as lifespan:
        assert lifespan[shop.tools] == {"tool": "hammer"}
        assert shop.lines == ["opened"]
    assert shop.lines == ["opened", "closed"]


async def test_it_may_be_left_in_another_task() -> None:
    shop = Shop()
    lifespan = shop.registry.lifespan()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lifespan.__aenter__)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lifespan.__aexit__, None, None, None)
    assert shop.lines == ["opened", "closed"]


async def test_what_it_raises_while_it_starts_is_the_cause_itself() -> None:
    shop = Shop()
    shop.fails["open"] = ConnectionRefusedError("no way to postgresql://shop:hunter2@db/shop")
    with pytest.raises(StartupError) as caught:
        async with shop.registry.lifespan():
            pytest.fail("it did not start")
    ((name, error),) = caught.value.failures
    assert (name, type(error)) == ("tools", ExceptionGroup)  # Starlette's own task group
    assert "hunter2" not in str(caught.value)


def _saying(
    *messages: str, raises: BaseException | None = None, asks: bool = True, hangs: bool = False
) -> Any:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        for message in messages:
            if asks:
                await receive()
            await send({"type": f"lifespan.{message}", "message": "no luck"})
        if raises is not None:
            raise raises
        if hangs:
            await anyio.sleep_forever()

    return application


@pytest.mark.parametrize(
    ("application", "error", "text"),
    [
        (_saying("startup.failed"), StartupError, "'application' did not start: no luck"),
        (_saying("startup.failed", hangs=True), StartupError, "'application' did not start: no luck"),
        (_saying("startup.failed", raises=ValueError("why")), StartupError, "ValueError: why"),
        (_saying(raises=ValueError("why")), StartupError, "has no lifespan: .* it raised ValueError"),
        (_saying(), StartupError, "has no lifespan: called for one, it ended"),
        (
            _saying("startup.complete", "shutdown.failed"),
            ShutdownError,
            "'application' did not stop cleanly: no luck",
        ),
    ],
)
async def test_what_it_says_or_leaves_unsaid_is_an_error(
    application: Any, error: type[Exception], text: str
) -> None:
    shop = Shop()
    shop.inner = application
    with pytest.raises(error, match=text):
        async with shop.registry.lifespan():
            pass


@pytest.mark.parametrize("messages", [[], ["startup.complete"]])
async def test_what_ends_the_process_is_raised_as_it_is(messages: list[str]) -> None:
    shop, leaves = Shop(), SystemExit("no licence")
    shop.inner = _saying(*messages, raises=leaves)
    with pytest.raises(SystemExit) as raised:
        async with shop.registry.lifespan():
            await anyio.sleep_forever()
    assert raised.value is leaves


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_one_that_is_cancelled_before_it_is_up_is_an_error_by_name(
    anyio_backend: object,
) -> None:
    shop = Shop()
    shop.inner = _saying(raises=asyncio.CancelledError())
    with pytest.raises(StartupError, match="'application' has no lifespan: called for one, it ended"):
        async with shop.registry.lifespan():
            pytest.fail("it did not start")


async def test_a_failed_closing_is_a_failed_closing() -> None:
    shop = Shop()
    shop.fails["close"] = ValueError("no luck")
    with pytest.raises(ShutdownError, match="no luck"):
        async with shop.registry.lifespan():
            pass
    assert shop.lines == ["opened", "closed"]


async def test_its_crash_ends_the_lifespan() -> None:
    shop = Shop()
    shop.fails["crash"] = ValueError("no luck")
    with pytest.raises(CrashError, match="no luck"):
        async with shop.registry.lifespan():
            await anyio.sleep_forever()


async def test_one_that_hangs_is_cut_off_at_its_deadline() -> None:
    async def hangs(scope: Any, receive: Callable[[], Any], send: Any) -> None:
        await receive()
        await anyio.sleep_forever()

    shop = Shop(start_timeout=0.05)
    shop.inner = hangs
    with pytest.raises(StartupError, match=r"tools .* open took longer than 0\.05 s"):
        async with shop.registry.lifespan():
            pytest.fail("it did not start")


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.message for each in caplog.records if each.levelno >= logging.WARNING]


async def _hello(request: Any) -> PlainTextResponse:
    return PlainTextResponse("hello")


async def test_a_mounted_lifespan_that_nobody_runs_is_told_by_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shop, registry = Shop(), Registry("outer")
    app = FastAPI(lifespan=registry.lifespan)
    app.mount("/health", health(registry))
    app.mount("/plain", Starlette(routes=[Route("/", _hello)]))
    app.mount("/v1", Starlette(routes=[Mount("/tools", app=shop.inner)]))
    async with client(app) as web:
        assert (await web.get("/plain/")).text == "hello"
    (warning,) = _warnings(caplog)
    assert "outer: 'tools', mounted at /v1/tools, has a lifespan that nobody runs" in warning
    assert "lifespan_of(app)" in warning


async def test_one_that_a_resource_runs_is_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    shop = Shop()
    app = FastAPI(lifespan=shop.registry.lifespan)
    app.mount("/tools", shop.inner)
    async with client(app):
        assert shop.lines == ["opened"]
    assert not _warnings(caplog)


async def test_one_whose_registry_the_outer_one_opens_is_not_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = Registry("shop")
    app = FastAPI(lifespan=registry.lifespan)
    app.mount("/v1", FastAPI(lifespan=registry.lifespan))
    async with client(app):
        pass
    assert not _warnings(caplog)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_tools_of_fastmcp_answer_under_a_mounted_application() -> None:
    server = pytest.importorskip("mcp.server", reason="mcp is not installed: pip install mcp")
    try:
        mcp: Any = server.MCPServer("tools")
    except AttributeError:  # before 2.0
        mcp = pytest.importorskip("mcp.server.fastmcp").FastMCP("tools")
    inner = mcp.streamable_http_app()
    registry = Registry("shop")

    @registry.resource
    def tools() -> Any:
        return lifespan_of(inner)

    app = FastAPI(lifespan=registry.lifespan)
    app.mount("/", inner)
    question = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-03-26",
            "capabilities": {},
            "clientInfo": {"name": "test", "version": "1"},
        },
    }
    accepts = {"accept": "application/json, text/event-stream"}
    async with client(app, base_url="http://127.0.0.1:8000") as web:
        answer = await web.post("/mcp", json=question, headers=accepts)
    assert answer.status_code == 200, answer.text
    assert '"serverInfo"' in answer.text


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_example_runs_what_it_mounts(caplog: pytest.LogCaptureFixture) -> None:
    from how_to import mounted

    async with mounted.registry.lifespan() as lifespan:
        assert lifespan[mounted.tools] == {"tool": "hammer"}
    async with client(mounted.app) as web:
        assert (await web.get("/tools/docs")).status_code == 200
    assert not _warnings(caplog)
