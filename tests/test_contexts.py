"""Context variables that a factory sets reach what is built from its value, and what uses it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from lifekit import Registry, testing

pytestmark = pytest.mark.anyio
tenant: ContextVar[str] = ContextVar("tenant", default="nobody")
trace: ContextVar[str] = ContextVar("trace", default="none")


def setting_sync(value: str) -> Callable[..., str]:
    def factory(*_: Any) -> str:
        tenant.set(value)
        return value

    return factory


def setting_async(value: str) -> Callable[..., Any]:
    async def factory(*_: Any) -> str:
        await anyio.lowlevel.checkpoint()
        tenant.set(value)
        return value

    return factory


def setting_for_its_time(value: str) -> Callable[..., Any]:
    async def factory(*_: Any) -> AsyncGenerator[str]:
        token = tenant.set(value)
        yield value
        tenant.reset(token)  # which only the context that it was set in may

    return factory


def setting_for_its_time_sync(value: str) -> Callable[..., Any]:
    def factory(*_: Any) -> Generator[str]:
        token = tenant.set(value)
        yield value
        tenant.reset(token)

    return factory


FACTORIES = [setting_sync, setting_async, setting_for_its_time, setting_for_its_time_sync]


@pytest.mark.parametrize("setting", FACTORIES)
async def test_dependents_and_the_body_find_what_a_factory_set(setting: Any) -> None:
    registry, seen = Registry(), dict[str, str]()
    first = registry.resource(name="first")(setting("first"))

    @registry.resource
    async def aside() -> AsyncGenerator[None]:
        seen["aside"] = tenant.get()
        yield

    @registry.resource(first)
    async def second(_: str) -> AsyncGenerator[None]:
        seen["second"] = tenant.get()
        trace.set("second")
        yield
        seen["second, closing"] = tenant.get()

    @registry.resource(after=[second])
    async def third() -> None:
        seen["third"] = f"{tenant.get()} {trace.get()}"

    async with registry.lifespan():
        seen["body"] = f"{tenant.get()} {trace.get()}"
    assert (tenant.get(), trace.get()) == ("nobody", "none")
    assert seen == {
        "aside": "nobody",
        "second": "first",
        "third": "first second",
        "body": "first second",
        "second, closing": "first",
    }


async def test_of_two_that_set_the_same_the_one_declared_last_holds() -> None:
    registry = Registry()
    one = registry.resource(name="one")(setting_async("one"))
    two = registry.resource(one, name="two")(setting_sync("two"))

    @registry.resource(two, one)
    def both(*_: str) -> str:
        return tenant.get()

    async with registry.lifespan() as lifespan:
        assert tenant.get() == "two"
        assert lifespan[both] == "one"


async def test_what_the_caller_has_set_reaches_all_factories() -> None:
    registry = Registry()
    seen = registry.resource(name="seen")(tenant.get)
    token = tenant.set("caller")
    async with registry.lifespan() as lifespan:
        assert lifespan[seen] == "caller"
    tenant.reset(token)


async def test_an_override_is_built_with_what_the_others_set() -> None:
    registry = Registry()
    first = registry.resource(name="first")(setting_async("first"))
    second = registry.resource(first, name="second")(lambda _: tenant.get())
    async with registry.lifespan() as lifespan:
        tenant.set("changed")
        async with lifespan.override(second, factory=tenant.get) as patched:
            assert patched[second] == "first"
        async with lifespan.override(first, factory=setting_sync("patched")) as patched:
            assert (patched[second], tenant.get()) == ("patched", "patched")
        assert tenant.get() == "changed"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("times", [1, 3])
async def test_requests_find_what_factories_set_and_leave_nothing_behind(times: int) -> None:
    registry = Registry()
    first = registry.resource(name="first")(setting_async("first"))
    app = Starlette(lifespan=registry.lifespan)

    async def show(request: Request) -> PlainTextResponse:
        return PlainTextResponse(tenant.get())

    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(tenant.get())

    app.router.routes += [Route("/", show), WebSocketRoute("/talk", talk)]
    with TestClient(app) as client:
        for _ in range(times):
            assert client.get("/").text == "first"
            with client.websocket_connect("/talk") as socket:
                assert socket.receive_text() == "first"
    async with testing.client(app) as async_client:
        lifespan = registry.running[asyncio.get_running_loop()][0]
        async with lifespan.override(first, factory=setting_sync("patched")):
            assert (await async_client.get("/")).text == "patched"
        assert (await async_client.get("/")).text == "first"
    assert tenant.get() == "nobody"
