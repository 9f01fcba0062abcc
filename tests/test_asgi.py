"""Inside applications: how requests reach values, which lifespan they mean, and what errors say."""

# No `from __future__ import annotations`: FastAPI could not resolve Depends(<a local name>) then.

import asyncio
import contextvars
import gc
import importlib
import json
import os
import re
import sys
import threading
import traceback
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any, Literal, cast

import anyio
import anyio.to_thread
import httpx
import httpx2
import pytest
from anyio import create_task_group, fail_after
from anyio.lowlevel import checkpoint
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse
from starlette.applications import Starlette
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse
from starlette.routing import Route, Router
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lifekit import DeclarationError, NotOpenError, Registry, Resource, StartupError, WrongLoopError
from lifekit._util.loops import running_loop
from lifekit.asgi import combine

pytestmark = pytest.mark.anyio

each_backend = pytest.mark.parametrize("backend", ["asyncio", "trio"])
Backend = Literal["asyncio", "trio"]


class Shop:
    """A value with a number of its own."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.is_open = True

    def close(self) -> None:
        self.is_open = False


def numbered(name: str = "shop") -> tuple[Registry, Resource[Shop]]:
    """A registry whose one resource has number 1 in its first lifespan, 2 in the next."""
    registry = Registry(f"registry of {name}")
    made: list[Shop] = []

    @registry.resource(name=name)
    def shop() -> Shop:
        made.append(Shop(len(made) + 1))
        return made[-1]

    return registry, shop


class Client:
    """Sends requests to an application in the running event loop."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        transport = httpx2.ASGITransport(app)
        self._client = httpx2.AsyncClient(transport=transport, base_url="http://test")

    async def get(self, path: str) -> Any:
        """Return the JSON that a GET is answered with; what the application raises, it raises."""
        response = await self._client.get(path)
        assert response.status_code == 200, response.text
        return response.json()

    async def socket(self, path: str) -> Any:
        """Return the JSON that a websocket first sends."""
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope: Scope = {"type": "websocket", "path": path, "query_string": b"", "headers": []}
        await self.app(scope, receive, send)
        return json.loads(sent[1]["text"])


@asynccontextmanager
async def serving(app: ASGIApp) -> AsyncGenerator[Client]:
    """Run the application's lifespan as a server does; each request gets a copy of its state."""
    state: dict[str, Any] = {}
    to_app, messages = anyio.create_memory_object_stream[Message](1)
    answers, from_app = anyio.create_memory_object_stream[Message](1)

    async def run() -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": state}
        await app(scope, messages.receive, answers.send)

    async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": state.copy()}, receive, send)

    async with to_app, messages, answers, from_app, create_task_group() as tasks:
        tasks.start_soon(run)
        await to_app.send({"type": "lifespan.startup"})
        assert (await from_app.receive())["type"] == "lifespan.startup.complete"
        yield Client(with_state)
        await to_app.send({"type": "lifespan.shutdown"})
        assert (await from_app.receive())["type"] == "lifespan.shutdown.complete"


HTTP_WAYS = ("/depends", "/depends-sync", "/get", "/get-sync", "/streamed")
STATE_WAYS = ("/state", "/state-sync")


def add_ways(app: FastAPI | APIRouter, shop: Resource[Shop]) -> None:
    """Add routes that answer with the shop's number; each reaches the shop in another way."""

    @app.get("/depends")
    async def depends(value: Annotated[Shop, Depends(shop)]) -> int:
        return value.number

    @app.get("/depends-sync")
    def depends_sync(value: Annotated[Shop, Depends(shop)]) -> int:
        return value.number

    @app.get("/state")
    async def state(request: Request) -> int:
        value: Shop = getattr(request.state, shop.name)
        return value.number

    @app.get("/state-sync")
    def state_sync(request: Request) -> int:
        value: Shop = getattr(request.state, shop.name)
        return value.number

    @app.get("/get")
    async def get() -> int:
        return shop.get().number

    @app.get("/get-sync")
    def get_sync() -> int:
        return shop.get().number

    @app.get("/streamed")
    async def streamed() -> StreamingResponse:
        def body() -> Iterator[str]:
            yield str(shop.get().number)

        return StreamingResponse(body())

    @app.websocket("/socket")
    async def socket(websocket: WebSocket, value: Annotated[Shop, Depends(shop)]) -> None:
        await websocket.accept()
        by_name: Shop = getattr(websocket.state, shop.name)
        await websocket.send_json([value.number, by_name.number, shop.get().number])
        await websocket.close()


def api(registry: Registry, shop: Resource[Shop]) -> FastAPI:
    app = FastAPI(lifespan=registry.lifespan)
    add_ways(app, shop)
    return app


async def numbers(client: Client, prefix: str = "") -> set[int]:
    """Return the numbers of the shops that requests find, in all the ways."""
    found = {path: await client.get(prefix + path) for path in (*HTTP_WAYS, *STATE_WAYS)}
    for index, number in enumerate(await client.socket(f"{prefix}/socket")):
        found[f"/socket {index}"] = number
    return set(found.values())


# -- reaching a value ------------------------------------------------------------------------------


async def test_requests_reach_a_value_by_depends_by_state_and_by_get() -> None:
    """In async and in sync routes, in streamed bodies and in websockets."""
    async with serving(api(*numbered())) as client:
        assert await numbers(client) == {1}


@each_backend
def test_the_test_client_reaches_it_as_well(backend: Backend) -> None:
    """Also its websockets, for which it has a task of their own."""
    with TestClient(api(*numbered()), backend=backend) as client:
        assert {client.get(path).json() for path in (*HTTP_WAYS, *STATE_WAYS)} == {1}
        with client.websocket_connect("/socket") as socket:
            assert socket.receive_json() == [1, 1, 1]


async def test_starlette_routes_reach_a_value() -> None:
    """There a handle is called with the request."""
    registry, shop = numbered()

    async def async_route(request: Request) -> JSONResponse:
        values = [await shop(request), request.state.shop, shop.get()]
        return JSONResponse([value.number for value in values])

    def sync_route(request: Request) -> JSONResponse:
        return JSONResponse([request.state.shop.number, shop.get().number])

    routes = [Route("/async", async_route), Route("/sync", sync_route)]
    async with serving(Starlette(lifespan=registry.lifespan, routes=routes)) as client:
        assert await client.get("/async") == [1, 1, 1]
        assert await client.get("/sync") == [1, 1]


async def test_depends_never_hops_to_a_worker_thread() -> None:
    """A request is answered while every worker thread is taken."""
    async with serving(api(*numbered())) as client:
        limiter = anyio.to_thread.current_default_thread_limiter()
        limiter.total_tokens = 1
        await limiter.acquire_on_behalf_of(client)
        with fail_after(60):
            assert await client.get("/depends") == 1
            assert await client.socket("/socket") == [1, 1, 1]
        limiter.release_on_behalf_of(client)


async def test_background_tasks_reach_a_value() -> None:
    """Both the async ones and those in worker threads."""
    registry, shop = numbered()
    app = FastAPI(lifespan=registry.lifespan)
    found: list[Shop] = []

    async def in_the_loop() -> None:
        found.append(shop.get())

    def in_a_thread() -> None:
        found.append(shop.get())

    @app.get("/")
    async def route(background: BackgroundTasks) -> None:
        background.add_task(in_the_loop)
        background.add_task(in_a_thread)

    async with serving(app) as client:
        await client.get("/")
        assert [value.number for value in found] == [1, 1]


async def test_a_handle_is_an_ordinary_dependency_of_other_dependencies() -> None:
    """Also of one that yields, whose end still has the value."""
    registry, shop = numbered()
    app = FastAPI(lifespan=registry.lifespan)
    at_the_end: list[Shop] = []

    async def discount(value: Annotated[Shop, Depends(shop)]) -> AsyncIterator[int]:
        yield value.number * 10
        at_the_end.append(shop.get())

    @app.get("/")
    async def route(amount: Annotated[int, Depends(discount)]) -> int:
        return amount

    async with serving(app) as client:
        assert await client.get("/") == 10
        assert [value.number for value in at_the_end] == [1]


async def test_the_schema_shows_no_parameter_for_a_handle() -> None:
    """Nor a body, nor an answer for what could not be validated."""
    app = api(*numbered())
    operation = app.openapi()["paths"]["/depends"]["get"]
    assert operation.keys() == {"summary", "operationId", "responses"}
    assert operation["responses"].keys() == {"200"}


async def test_a_dependency_override_takes_the_place_of_a_handle() -> None:
    """FastAPI's own, with or without a lifespan."""
    registry, shop = numbered()
    app = api(registry, shop)
    app.dependency_overrides[shop] = lambda: Shop(99)
    assert await Client(app).get("/depends") == 99
    async with serving(app) as client:
        assert await client.get("/depends-sync") == 99
        assert await client.get("/get") == 1
        app.dependency_overrides.clear()
        assert await client.get("/depends-sync") == 1


async def test_a_mounted_application_uses_the_lifespan_of_its_parent() -> None:
    """Its own would never run."""
    registry, shop = numbered()
    app, mounted = FastAPI(lifespan=registry.lifespan), FastAPI()
    add_ways(mounted, shop)
    app.mount("/mounted", mounted)
    async with serving(app) as client:
        assert await numbers(client, "/mounted") == {1}


# -- a lifespan entered by hand --------------------------------------------------------------------

BY_HAND = pytest.mark.parametrize("path", HTTP_WAYS)


@BY_HAND
async def test_a_lifespan_entered_by_hand_serves_a_transport_without_state(path: str) -> None:
    """As around httpx's ASGITransport, which knows of no lifespan."""
    app = api(*numbered())
    async with app.router.lifespan_context(app):
        assert await Client(app).get(path) == 1


@BY_HAND
async def test_it_serves_requests_of_tasks_that_know_nothing_of_it(path: str) -> None:
    """As when a fixture enters it in a task of its own."""
    app = api(*numbered())
    async with entered_elsewhere(lambda: app.router.lifespan_context(app)):
        assert await Client(app).get(path) == 1


async def test_a_registrys_lifespan_serves_an_application_that_was_given_none() -> None:
    """A worker's `async with registry.lifespan()`, entered in another task than requests run in."""
    registry, shop = numbered()
    app = FastAPI()
    add_ways(app, shop)
    async with entered_elsewhere(registry.lifespan):
        assert {await Client(app).get(path) for path in HTTP_WAYS} == {1}


@asynccontextmanager
async def entered_elsewhere(lifespan: Callable[[], Any]) -> AsyncGenerator[None]:
    """Enter and leave a lifespan in a task of its own, hence in a context of its own."""
    done = anyio.Event()

    async def hold(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with lifespan():
            task_status.started()
            await done.wait()

    async with create_task_group() as tasks:
        await tasks.start(hold)
        yield
        done.set()


# -- several lifespans in one event loop -----------------------------------------------------------


@pytest.mark.parametrize("apps", ["two applications", "one application"])
async def test_with_two_lifespans_of_one_registry_each_request_finds_its_own(apps: str) -> None:
    """Whichever was opened last."""
    registry, shop = numbered()
    first = api(registry, shop)
    second = first if apps == "one application" else api(registry, shop)
    async with serving(first) as one:
        async with serving(second) as two:
            assert await numbers(one) == {1}
            assert await numbers(two) == {2}
            assert await numbers(one) == {1}
        assert await numbers(one) == {1}


async def test_requests_at_the_same_time_find_each_their_own() -> None:
    """Both are in flight before either asks."""
    registry, shop = numbered()
    app = FastAPI(lifespan=registry.lifespan)
    arrived = 0
    all_arrived = anyio.Event()

    @app.get("/")
    async def route() -> list[int]:
        nonlocal arrived
        arrived += 1
        if arrived == 4:
            all_arrived.set()
        await all_arrived.wait()
        return [shop.get().number, (await anyio.to_thread.run_sync(shop.get)).number]

    found: list[tuple[int, Any]] = []

    async def ask(number: int, client: Client) -> None:
        found.append((number, await client.get("/")))

    async with serving(app) as one, serving(app) as two:
        with fail_after(60):
            async with create_task_group() as tasks:
                for number, client in (1, one), (2, two), (1, one), (2, two):
                    tasks.start_soon(ask, number, client)
    assert sorted(found) == [(1, [1, 1]), (1, [1, 1]), (2, [2, 2]), (2, [2, 2])]


async def test_a_request_finds_its_own_lifespan_inside_another_of_its_caller() -> None:
    """A test's own `async with registry.lifespan()` does not get in between."""
    registry, shop = numbered()
    async with serving(api(registry, shop)) as client, registry.lifespan() as mine:
        assert mine[shop].number == 2
        assert await numbers(client) == {1}
        assert shop.get().number == 2


async def test_code_inside_async_with_finds_the_innermost_lifespan() -> None:
    """In the loop and in worker threads."""
    registry, shop = numbered()

    async def found() -> set[Shop]:
        return {shop.get(), await anyio.to_thread.run_sync(shop.get)}

    async with registry.lifespan() as outer:
        assert await found() == {outer[shop]}
        async with registry.lifespan() as inner:
            assert await found() == {inner[shop]}
        assert await found() == {outer[shop]}
    with pytest.raises(NotOpenError):
        shop.get()


async def test_a_task_keeps_the_lifespan_that_it_was_started_in() -> None:
    """Another one, opened later beside it, is none of its business."""
    registry, shop = numbered()
    opened, asked = anyio.Event(), anyio.Event()
    found: list[Shop] = []

    async def ask_later() -> None:
        await opened.wait()
        found.append(shop.get())
        asked.set()

    async with registry.lifespan() as outer, create_task_group() as tasks:
        tasks.start_soon(ask_later)
        async with registry.lifespan():
            opened.set()
            await asked.wait()
        assert found == [outer[shop]]


async def test_code_in_no_lifespan_finds_the_one_that_was_opened_last() -> None:
    """Once that is over, the one before."""
    registry, shop = numbered()
    async with entered_elsewhere(registry.lifespan):
        async with entered_elsewhere(registry.lifespan):
            assert shop.get().number == 2
        assert shop.get().number == 1


async def test_nothing_keeps_a_lifespan_that_is_over() -> None:
    """Neither the registry nor the context that it was entered in."""
    registry, _ = numbered()
    lifespan = registry.lifespan()
    async with lifespan:
        pass
    over = weakref.ref(lifespan)
    del lifespan
    await checkpoint()
    gc.collect()
    assert over() is None


async def test_an_application_can_be_served_again() -> None:
    """Each time with new values."""
    app = api(*numbered())
    for number in 1, 2, 3:
        async with serving(app) as client:
            assert await numbers(client) == {number}


# -- an application whose middleware is built anew -------------------------------------------------


def set_to_none(app: FastAPI) -> None:
    app.middleware_stack = None


def build_again(app: FastAPI) -> None:
    app.middleware_stack = app.build_middleware_stack()


def instrument_and_take_back(app: FastAPI) -> None:
    """As OpenTelemetry's instrumentor: it puts back what it found before the start."""
    app.build_middleware_stack = app.state.found  # type: ignore[method-assign]
    app.middleware_stack = app.build_middleware_stack()


def wrap(app: FastAPI) -> None:
    stack = app.middleware_stack
    assert stack is not None
    app.middleware_stack = lambda scope, receive, send: stack(scope, receive, send)


class Failure(Exception):
    """What a route raises for an exception handler."""


def everywhere(registry: Registry, shop: Resource[Shop], *more: Callable[[Any], Any]) -> FastAPI:
    """An application that notes the shops that its middleware and its handlers find."""
    app = FastAPI(lifespan=combine(registry.lifespan, *more))
    add_ways(app, shop)
    app.state.found = app.build_middleware_stack
    app.state.seen = []

    def note(request: Request) -> None:
        app.state.seen += [shop.get().number, request.state.shop.number]

    @app.middleware("http")
    async def around(request: Request, call_next: Any) -> Any:
        note(request)
        return await call_next(request)

    @app.exception_handler(Failure)
    @app.exception_handler(Exception)
    async def handler(request: Request, error: Exception) -> JSONResponse:
        note(request)
        return JSONResponse(shop.get().number)

    @app.get("/fails")
    async def fails() -> None:
        raise Failure

    @app.get("/breaks")
    async def breaks() -> None:
        raise KeyError

    return app


# Starlette 0.46, on trio, leaves the body of a request to the garbage collector.
@pytest.mark.filterwarnings("ignore:Async generator 'starlette.requests:ResourceWarning")
@pytest.mark.parametrize("when", ["at the start", "while it serves"])
@pytest.mark.parametrize("rebuild", [set_to_none, build_again, instrument_and_take_back, wrap])
async def test_all_ways_agree_whatever_builds_the_middleware_anew(
    rebuild: Callable[[FastAPI], None], when: str
) -> None:
    """With two lifespans at once, and under an override, in middleware and handlers as well."""

    @asynccontextmanager
    async def old(app: FastAPI) -> AsyncGenerator[None]:
        if when == "at the start":
            rebuild(app)
        yield

    registry, shop = numbered()
    app = everywhere(registry, shop, old)
    async with serving(app) as one, serving(app) as two:
        if when == "while it serves":
            rebuild(app)
        for client, number in ((one, 1), (two, 2), (one, 1)):
            assert await numbers(client) == {number}
            assert await client.get("/fails") == number
            with pytest.raises(KeyError):
                await client.get("/breaks")
            assert set(app.state.seen) == {number}
            app.state.seen.clear()
        lifespan = registry.running[running_loop()][0]
        async with lifespan.override(shop, Shop(99)):
            assert await numbers(one) == {99}
            assert set(app.state.seen) == {99}


async def test_a_started_application_looks_as_it_did() -> None:
    """To code that looks at its class, its middleware, its attributes; also after many starts."""

    class App(FastAPI):
        """An application's own class."""

    registry, shop = numbered()
    app, other = App(lifespan=registry.lifespan), App(lifespan=registry.lifespan)
    add_ways(app, shop)
    build, attributes = app.build_middleware_stack, set(vars(app))
    assert app.user_middleware == []
    async with app.router.lifespan_context(app):
        app.add_middleware(GZipMiddleware)  # entering it by hand built nothing
    for _ in range(100):
        async with serving(app):
            pass
    async with serving(other), serving(app) as client:
        assert await client.get("/get") == 103
    assert isinstance(app, App)
    assert type(app) is type(other)
    assert repr(type(app)) == repr(App)
    assert len(type(app).mro()) == len(App.mro()) + 1
    assert app.build_middleware_stack == build
    assert [str(each.cls) for each in app.user_middleware] == [str(GZipMiddleware)]
    assert {each for each in set(vars(app)) - attributes if not each.startswith("_lifekit")} == set()


class Picky(FastAPI):
    """An application whose class wants to know something of each that derives from it."""

    def __init_subclass__(cls, *, team: str) -> None: ...


class Sealed(FastAPI):
    """An application that says which class it is of."""

    @property  # type: ignore[misc]
    def __class__(self) -> type[FastAPI]:  # type: ignore[override]
        return FastAPI


@pytest.mark.parametrize("kind", [Picky, Sealed])
async def test_an_application_whose_class_can_t_be_changed_starts_all_the_same(
    kind: type[FastAPI],
) -> None:
    """And its requests find their own lifespans."""
    registry, shop = numbered()
    app = kind(lifespan=registry.lifespan)
    add_ways(app, shop)
    async with serving(app) as one, serving(app) as two:
        assert await numbers(one) == {1}
        assert await numbers(two) == {2}


async def test_middleware_around_the_application_sees_what_a_request_left_in_its_state() -> None:
    """Under an override as well."""
    registry, shop = numbered()
    app = FastAPI(lifespan=registry.lifespan)
    left: list[str] = []

    @app.get("/")
    async def route(request: Request) -> int:
        request.state.user = "ann"
        number: int = request.state.shop.number
        return number

    async def around(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)
        if scope["type"] == "http":
            left.append(scope["state"]["user"])

    async with serving(around) as client:
        lifespan = registry.running[running_loop()][0]
        async with lifespan.override(shop, Shop(99)):
            assert await client.get("/") == 99
        assert await client.get("/") == 1
    assert left == ["ann", "ann"]


# -- several registries in one application ---------------------------------------------------------


def with_users(how: str) -> FastAPI:
    """An application with a shop, and with users whose registry and router come from a package."""
    registry, shop = numbered()
    users_registry, users = numbered("users")
    if how == "included":
        registry.include(users_registry)
        router = APIRouter(prefix="/users")
    else:
        router = APIRouter(prefix="/users", lifespan=users_registry.lifespan)
    add_ways(router, users)
    app = FastAPI(lifespan=registry.lifespan)
    add_ways(app, shop)
    app.include_router(router)
    return app


each_composition = pytest.mark.parametrize("how", ["included", "router"])


@each_composition
async def test_the_handles_of_a_packages_registry_work(how: str) -> None:
    """Included in the application's registry, or as the lifespan of its router."""
    async with serving(with_users(how)) as client:
        assert await numbers(client) == {1}
        assert await numbers(client, "/users") == {1}


@each_composition
async def test_with_two_lifespans_each_request_finds_its_own_of_every_registry(how: str) -> None:
    """That of the package as well."""
    app = with_users(how)
    async with serving(app) as one, serving(app) as two:
        assert await numbers(one) == {1}
        assert await numbers(two) == {2}
        assert await numbers(one, "/users") == {1}
        assert await numbers(two, "/users") == {2}


async def test_a_routers_lifespan_serves_an_application_without_one() -> None:
    """FastAPI merges it with its own."""
    registry, shop = numbered()
    router = APIRouter(lifespan=registry.lifespan)
    add_ways(router, shop)
    app = FastAPI()
    app.include_router(router)
    async with serving(app) as client:
        assert await numbers(client) == {1}


async def test_a_router_that_is_served_alone_reaches_values() -> None:
    """Starlette gives its lifespan no application."""
    registry, shop = numbered()

    async def async_route(request: Request) -> JSONResponse:
        return JSONResponse([(await shop(request)).number, shop.get().number])

    def sync_route(request: Request) -> JSONResponse:
        return JSONResponse([request.state.shop.number, shop.get().number])

    routes = [Route("/async", async_route), Route("/sync", sync_route)]
    async with serving(Router(routes, lifespan=registry.lifespan)) as client:
        assert await client.get("/async") == [1, 1]
        assert await client.get("/sync") == [1, 1]
        async with registry.lifespan():
            assert (await client.get("/async"))[0] == 1


def on_both(registry: Registry) -> FastAPI:
    app = FastAPI(lifespan=registry.lifespan)
    app.include_router(APIRouter(lifespan=registry.lifespan))
    return app


def on_a_router_included_twice(registry: Registry) -> FastAPI:
    app, router = FastAPI(), APIRouter(lifespan=registry.lifespan)
    app.include_router(router, prefix="/one")
    app.include_router(router, prefix="/two")
    return app


def on_a_router_in_a_router(registry: Registry) -> FastAPI:
    app, router = FastAPI(lifespan=registry.lifespan), APIRouter()
    router.include_router(APIRouter(lifespan=registry.lifespan))
    app.include_router(router)
    return app


def on_a_lifespan_of_ones_own_and_a_router(registry: Registry) -> FastAPI:
    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncGenerator[Any]:
        async with registry.lifespan() as state:
            yield state

    app = FastAPI(lifespan=own)
    app.include_router(APIRouter(lifespan=registry.lifespan))
    return app


def on_a_router_of_an_included_registry(registry: Registry) -> FastAPI:
    outer = Registry("outer")
    outer.include(registry)
    app = FastAPI(lifespan=outer.lifespan)
    app.include_router(APIRouter(lifespan=registry.lifespan))
    return app


@each_backend
@pytest.mark.parametrize(
    "made",
    [
        on_both,
        on_a_router_included_twice,
        on_a_router_in_a_router,
        on_a_lifespan_of_ones_own_and_a_router,
        on_a_router_of_an_included_registry,
    ],
)
def test_a_registry_that_one_start_would_open_twice_is_refused(
    made: Callable[[Registry], FastAPI], backend: Backend
) -> None:
    """What had opened is closed; the error names the resource, and the mend."""
    registry, shop = numbered()
    closed: list[str] = []

    @registry.resource(shop)
    def watched(shop: Shop) -> Iterator[int]:
        yield 1
        closed.append("once")

    client = TestClient(made(registry), backend=backend)
    with pytest.raises(DeclarationError, match="opened twice in one start") as caught, client:
        pytest.fail("it started")
    assert shop.location in str(caught.value)
    assert "APIRouter() without a lifespan" in str(caught.value)
    assert closed == ["once"]
    assert not registry.running


async def test_one_application_may_start_twice_at_once_by_hand_in_one_task() -> None:
    """Those are two starts, though FastAPI has merged the lifespan with a router's."""
    registry, _ = numbered()
    app, other = with_router(registry), with_router(registry)
    async with AsyncExitStack() as stack:
        for each in (app, app, other):
            await stack.enter_async_context(each.router.lifespan_context(each))
        await stack.enter_async_context(registry.lifespan())
        assert [len(each) for each in registry.running.values()] == [4]


async def test_it_may_start_again_where_it_was_entered_and_not_left() -> None:
    """What is over is no start, though its context still knows of it."""
    registry, shop = numbered()
    app = with_router(registry)
    for number in range(1, 9):
        stack = AsyncExitStack()
        await stack.enter_async_context(app.router.lifespan_context(app))
        assert shop.get().number == number
        async with create_task_group() as tasks:
            tasks.start_soon(stack.aclose)


async def test_a_lifespan_of_an_application_may_open_another_of_its_registry() -> None:
    """`async with registry.lifespan()` inside another is what it says."""
    registry, shop = numbered()

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncGenerator[Any]:
        async with registry.lifespan(app) as state, registry.lifespan() as inner:
            assert inner[shop].number == 2
            yield state

    app = FastAPI(lifespan=own)
    add_ways(app, shop)
    async with serving(app) as client:
        assert await client.get("/depends") == 1


# -- an old lifespan -------------------------------------------------------------------------------


def old_lifespan(shop: Resource[Shop], found: list[Shop]) -> Callable[[Any], Any]:
    """The lifespan that an application had before: it uses the shop at its start and its end."""

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncGenerator[dict[str, str]]:
        assert isinstance(app, FastAPI)
        value = shop.get()
        found.append(value)
        assert value.is_open
        yield {"greeting": "hello"}
        assert value.is_open
        found.append(value)

    return lifespan


async def test_an_old_lifespan_can_be_kept_as_a_resource() -> None:
    """It is entered after what it needs and left before."""
    registry, shop = numbered()
    app = api(registry, shop)
    found: list[Shop] = []
    old = old_lifespan(shop, found)

    @registry.resource(after=[shop])
    def legacy() -> Any:
        return old(app)

    @app.get("/greeting")
    async def greeting(request: Request) -> str:
        return str(request.state.legacy["greeting"])

    async with serving(app) as client:
        assert await client.get("/greeting") == "hello"
    assert [value.number for value in found] == [1, 1]


async def test_an_old_lifespan_can_stand_beside_a_registry() -> None:
    """Entered after it and left before it; requests see the state of both."""
    registry, shop = numbered()
    found: list[Shop] = []
    app = FastAPI(lifespan=combine(registry.lifespan, old_lifespan(shop, found)))
    add_ways(app, shop)

    @app.get("/greeting")
    async def greeting(request: Request) -> str:
        return str(request.state.greeting)

    async with serving(app) as client:
        assert await client.get("/greeting") == "hello"
        assert await numbers(client) == {1}
    assert [value.number for value in found] == [1, 1]
    assert not found[0].is_open


@each_backend
def test_combined_lifespans_may_not_yield_one_key_twice(backend: Backend) -> None:
    """The start fails, and both are left again."""
    registry, shop = numbered()
    seen: list[str | Shop] = []

    @asynccontextmanager
    async def other(_: Any) -> AsyncGenerator[dict[str, int]]:
        seen.append(shop.get())
        try:
            yield {"shop": 1, "basket": 2}
        finally:
            seen.append("left")

    app = FastAPI(lifespan=combine(registry.lifespan, other))
    client = TestClient(app, backend=backend)
    with pytest.raises(DeclarationError, match="yield shop: one would hide the other"), client:
        pytest.fail("it started")
    value, left = seen
    assert left == "left"
    assert isinstance(value, Shop)
    assert not value.is_open


# -- what errors say -------------------------------------------------------------------------------


def told(error: BaseException) -> str:
    """Return what a traceback shows of an error: its message and its notes."""
    return "".join(traceback.format_exception_only(error))


@each_backend
@pytest.mark.parametrize("path", ["/depends", "/get"])
def test_a_test_client_without_with_is_told_to_write_it(backend: Backend, path: str) -> None:
    """The error names the resource, its line, and the mend."""
    registry, shop = numbered()
    client = TestClient(api(registry, shop), backend=backend)
    with pytest.raises(NotOpenError) as caught:
        client.get(path)
    assert caught.value.resource == "shop"
    assert shop.location in str(caught.value)
    assert "`with TestClient(app) as client" in str(caught.value)
    if path == "/depends":  # here the request itself says what sent it
        assert "This request came through a TestClient" in told(caught.value)


def test_the_test_client_left_again_is_as_none() -> None:
    """Its lifespan is over, whatever state it still hands to requests."""
    client = TestClient(api(*numbered()))
    with client:
        assert client.get("/depends").json() == 1
    for path in "/depends", "/get":
        with pytest.raises(NotOpenError):
            client.get(path)


@pytest.mark.parametrize("library", [httpx2, httpx])
@pytest.mark.parametrize("path", ["/depends", "/get"])
async def test_a_transport_without_lifespan_is_told_to_open_one(library: ModuleType, path: str) -> None:
    """ASGITransport never runs one."""
    transport = library.ASGITransport(api(*numbered()))
    async with library.AsyncClient(transport=transport, base_url="http://test") as client:
        with pytest.raises(NotOpenError, match=r"async with registry\.lifespan") as caught:
            await client.get(path)
    assert "ASGITransport, which never runs one" in str(caught.value)
    if path == "/depends":
        assert "This request carries no lifespan state: " in told(caught.value)


async def test_an_application_with_another_lifespan_is_told_of_the_registrys() -> None:
    """It was forgotten, or belongs to another registry."""
    _, shop = numbered()
    other, _ = numbered("other")
    async with serving(api(other, shop)) as client:
        with pytest.raises(NotOpenError, match=r"FastAPI\(lifespan=registry\.lifespan\)") as caught:
            await client.get("/depends")
    assert "started with another lifespan" in told(caught.value)


@pytest.mark.parametrize("in_a_loop", [False, True])
def test_use_at_import_time_is_told_to_use_a_function(
    in_a_loop: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a server imports the application in its event loop, as uvicorn does."""
    _, shop = numbered()
    monkeypatch.setitem(sys.modules, "shop_of_the_test", cast("ModuleType", SimpleNamespace(shop=shop)))
    monkeypatch.syspath_prepend(str(tmp_path))  # pyright: ignore[reportUnknownMemberType]
    name = f"asks_when_imported_{in_a_loop}"
    (tmp_path / f"{name}.py").write_text("from shop_of_the_test import shop\nshop.get()\n")

    async def import_it() -> None:
        importlib.import_module(name)

    with pytest.raises(NotOpenError, match="At import time there are no values yet"):
        asyncio.run(import_it()) if in_a_loop else importlib.import_module(name)


def test_a_script_outside_of_any_lifespan_is_told_to_run_one() -> None:
    """No import is going on."""
    _, shop = numbered()
    with pytest.raises(
        NotOpenError, match=r"async with registry\.lifespan\(\):.*asyncio\.run"
    ) as caught:
        shop.get()
    assert "import time" not in str(caught.value)


def in_a_thread(ask: Callable[[], Shop]) -> Shop | NotOpenError:
    """Return what is answered in a thread that has no context; there is no loop in it, either."""
    found: list[Shop | NotOpenError] = []

    def run() -> None:
        try:
            found.append(ask())
        except NotOpenError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


async def test_a_thread_without_a_context_finds_the_one_lifespan_of_the_process() -> None:
    """As it is at the time: overridden, and the innermost one of its loop."""
    registry, shop = numbered()
    assert "no lifespan of the registry runs in this process" in str(in_a_thread(shop.get))
    async with registry.lifespan() as lifespan:
        assert in_a_thread(shop.get) is lifespan[shop]
        async with lifespan.override(shop, Shop(99)) as patched:
            assert in_a_thread(shop.get) is patched[shop]
        async with registry.lifespan() as inner:
            assert in_a_thread(shop.get) is inner[shop]
        assert in_a_thread(shop.get) is lifespan[shop]
    assert isinstance(in_a_thread(shop.get), NotOpenError)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_run_in_executor_finds_a_lifespan_that_another_task_entered() -> None:
    """As the sync handlers of Litestar and of Quart do, which no thread of AnyIO's runs."""
    registry, shop = numbered()
    async with entered_elsewhere(registry.lifespan):
        found = await asyncio.get_running_loop().run_in_executor(None, shop.get)
        assert found is shop.get()


async def test_a_thread_is_told_of_the_lifespans_of_two_loops_and_how_to_say_which() -> None:
    """The context says it."""
    registry, shop = numbered()
    ended = threading.Event()

    def other_loop(opened: Callable[[], object]) -> None:
        async def main() -> None:
            async with registry.lifespan():
                opened()
                await anyio.to_thread.run_sync(ended.wait)

        anyio.run(main)

    opened = threading.Event()
    async with registry.lifespan() as mine:
        thread = threading.Thread(target=other_loop, args=[opened.set])
        thread.start()
        try:
            await anyio.to_thread.run_sync(opened.wait)
            error = str(in_a_thread(shop.get))
            with_context = partial(contextvars.copy_context().run, shop.get)
            assert in_a_thread(with_context) is mine[shop]
        finally:
            ended.set()
            thread.join()
    assert "open in 2 event loops" in error
    for way in "asyncio.to_thread", "anyio.to_thread.run_sync", "copy_context().run", "shop.get()":
        assert way in error


async def test_a_forked_process_does_not_get_the_values_of_its_parent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would share their sockets."""
    registry, shop = numbered()
    async with registry.lifespan():
        monkeypatch.setattr(os, "getpid", lambda: -1)
        assert isinstance(in_a_thread(shop.get), NotOpenError)
        assert isinstance(in_a_thread(partial(contextvars.copy_context().run, shop.get)), NotOpenError)


def with_router(registry: Registry) -> FastAPI:
    """An application whose lifespan FastAPI has merged with that of a router."""
    app = FastAPI(lifespan=registry.lifespan)
    app.include_router(APIRouter())
    return app


def without_router(registry: Registry) -> FastAPI:
    """An application whose lifespan is the registry's own."""
    return FastAPI(lifespan=registry.lifespan)


each_slot = pytest.mark.parametrize("made", [without_router, with_router])


@each_slot
@pytest.mark.parametrize("state", [None, {}], ids=["daphne", "uvicorn --lifespan off"])
async def test_a_server_that_ran_no_lifespan_is_named(
    state: dict[str, Any] | None, made: Callable[[Registry], FastAPI]
) -> None:
    """The application has one: it needs no other line."""
    registry, shop = numbered()
    app = made(registry)
    add_ways(app, shop)

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope if state is None else {**scope, "state": state}, receive, send)

    with pytest.raises(NotOpenError) as caught:
        await Client(served).get("/depends")
    [note] = caught.value.__notes__
    assert "--lifespan off, daphne" in note
    assert "FastAPI(lifespan=" not in note


@each_slot
@pytest.mark.parametrize("outer", ["none", "another"])
def test_a_mounted_application_is_told_that_its_lifespan_does_not_run(
    outer: str, made: Callable[[Registry], FastAPI]
) -> None:
    """Whatever the outermost one has: that is where it belongs."""
    registry, shop = numbered()
    mounted = made(registry)
    add_ways(mounted, shop)
    app = FastAPI() if outer == "none" else FastAPI(lifespan=numbered("other")[0].lifespan)
    app.mount("/mounted", mounted)
    with TestClient(app) as client, pytest.raises(NotOpenError) as caught:
        client.get("/mounted/depends")
    assert "the outermost application alone" in told(caught.value)
    assert "TestClient that ran no lifespan" not in told(caught.value)


async def test_another_event_loop_is_told_of_both_loops_and_of_the_line_that_opened_it() -> None:
    """In a thread that carries the context and in one that does not; by handle and by lifespan."""
    registry, shop = numbered()
    lifespan = registry.lifespan()
    caught: list[WrongLoopError] = []

    def ask_in_another_loop() -> None:
        async def ask() -> None:
            ways: list[Callable[[], Shop]] = [shop.get, lambda: lifespan[shop]]
            for way in ways:
                with pytest.raises(WrongLoopError) as error:
                    way()
                caught.append(error.value)

        asyncio.run(ask())

    async with lifespan:
        await anyio.to_thread.run_sync(ask_in_another_loop)
        thread = threading.Thread(target=ask_in_another_loop)
        thread.start()
        await anyio.to_thread.run_sync(thread.join)
    assert len(caught) == 4
    for error in caught:
        assert error.resource == "shop"
        assert re.match(r"tests/test_asgi\.py:\d+ in test_another_event_loop", error.opened_at)
        assert error.opened_at in str(error)
        loops = re.search(r"open(?:ed)? in (.+?),? by the lifespan at .+ runs in (.+?)\. ", str(error))
        assert loops is not None
        assert loops[1] != loops[2], "the names of both loops are the same"


async def test_a_request_in_another_event_loop_gets_no_value() -> None:
    """A TestClient without `with` has a loop of its own for each request."""
    registry, shop = numbered()
    client = TestClient(api(registry, shop))
    async with registry.lifespan():
        for path in "/depends", "/get":
            with pytest.raises(WrongLoopError):
                await anyio.to_thread.run_sync(client.get, path)


@each_backend
def test_a_failed_start_is_a_startup_error_out_of_the_test_client(backend: Backend) -> None:
    """It carries the cause; what had opened is closed."""
    registry, shop = numbered()
    opened: list[Shop] = []

    @registry.resource(shop)
    async def cache(shop: Shop) -> Shop:
        opened.append(shop)
        raise ConnectionError("no answer from redis://shop:hunter2@cache.example/0")

    client = TestClient(FastAPI(lifespan=registry.lifespan), backend=backend)
    with pytest.raises(StartupError) as caught, client:
        pytest.fail("it started")
    [(name, cause)] = caught.value.failures
    assert (name, type(cause)) == ("cache", ConnectionError)
    assert caught.value.opened == ("shop",)
    assert not opened[0].is_open
    assert "hunter2" not in str(caught.value)
