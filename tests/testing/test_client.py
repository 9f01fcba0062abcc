"""Clients that run the lifespan: what starts, serves, stops, and is undone around a test's body."""

# No `from __future__ import annotations`: FastAPI could not resolve Depends(<a local name>) then.

import asyncio
import importlib
import signal
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import copy_context
from functools import partial
from typing import Annotated, Any, Literal

import anyio
import httpx
import httpx2
import pytest
from anyio.lowlevel import checkpoint
from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse
from starlette.applications import Starlette
from starlette.requests import Request as StarletteRequest
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from lifekit import (
    Driver,
    LifekitError,
    NotOpenError,
    Registry,
    SandboxError,
    SandboxEscapedError,
    ShutdownError,
    StartupError,
)
from lifekit._core.block import refuse_stragglers
from lifekit._util.loops import running_loop
from lifekit.asgi import ASGIApp, combine
from lifekit.drivers import Sandbox, register
from lifekit.testing import client, sandboxing, sync_client
from lifekit.testing._app import running
from lifekit.testing._client import client_of

from ..leaks import tasks_alive

pytestmark = pytest.mark.anyio

each_backend = pytest.mark.parametrize("backend", ["asyncio", "trio"])
Backend = Literal["asyncio", "trio"]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class BoomError(Exception):
    """What the applications here fail with."""


class Bang(BaseException):
    """What is not for `except Exception`."""


def logging_app(log: list[str], fails: str = "", failure: BaseException | None = None) -> Starlette:
    """An application that logs its start, its requests and its stop, and may fail at one of them."""

    def happen(what: str) -> None:
        log.append(what)
        if what == fails:
            raise failure or BoomError(what)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[dict[str, Any]]:
        await checkpoint()
        happen("startup")
        yield {"numbers": [1, 2]}
        await checkpoint()
        happen("shutdown")

    async def numbers(request: StarletteRequest) -> JSONResponse:
        happen("request")
        return JSONResponse(request.scope["state"])

    return Starlette(routes=[Route("/", numbers)], lifespan=lifespan)


@asynccontextmanager
async def in_thread(app: ASGIApp, **options: Any) -> AsyncGenerator[TestClient]:
    """Enter and leave `sync_client` as if it were async: its loop is in another thread anyway."""
    with sync_client(app, **options) as http:
        yield http


async def post(http: TestClient | httpx2.AsyncClient, path: str) -> None:
    """Send a request by either client."""
    answer: Any = http.post(path)
    if isinstance(http, httpx2.AsyncClient):
        await answer


both = pytest.mark.parametrize("open_client", [client, in_thread], ids=["client", "sync_client"])
OpenClient = Callable[..., Any]

# -- the lifespan runs -----------------------------------------------------------------------------


async def test_the_application_starts_serves_and_stops() -> None:
    log: list[str] = []
    async with client(logging_app(log)) as http:
        assert log == ["startup"]
        assert isinstance(http, httpx2.AsyncClient)
        assert str(http.base_url) == "http://test"
        assert (await http.get("/")).json() == {"numbers": [1, 2]}
    assert log == ["startup", "request", "shutdown"]


async def test_each_request_has_its_own_shallow_copy_of_the_state() -> None:
    seen: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            scope["state"]["shared"] = []
            await send({"type": "lifespan.startup.complete"})
            await receive()
            return await send({"type": "lifespan.shutdown.complete"})
        seen.append(scope["state"])
        assert scope["state"].keys() == {"shared"}
        scope["state"]["own"] = 1
        await send({"type": "http.response.start", "status": 204})
        return await send({"type": "http.response.body"})

    async with client(app) as http:
        await http.get("/")
        await http.get("/")
    with sync_client(app) as sync:
        sync.get("/")
        sync.get("/")
    assert seen[0] is not seen[1]
    assert seen[0]["shared"] is seen[1]["shared"]
    assert seen[2] is not seen[3]
    assert seen[2]["shared"] is seen[3]["shared"]
    assert seen[0]["shared"] is not seen[2]["shared"]


@pytest.mark.parametrize("shutdown", ["", "shutdown"], ids=["stops", "fails-to-stop"])
@pytest.mark.parametrize("body", [None, BoomError("body"), Bang("body")], ids=["ok", "fails", "bang"])
@pytest.mark.parametrize("startup", ["", "startup"], ids=["starts", "fails-to-start"])
@both
async def test_whatever_fails_the_lifespan_runs_to_its_end_and_the_test_sees_the_first_failure(
    open_client: OpenClient, startup: str, body: BaseException | None, shutdown: str
) -> None:
    log: list[str] = []
    raised: BaseException | None = None
    before = tasks_alive()
    try:
        async with open_client(logging_app(log, startup or shutdown)):
            log.append("body")
            if body is not None:
                raise body
    except (BoomError, Bang) as error:
        raised = error
    await checkpoint()
    assert tasks_alive() == before
    if startup:
        assert log == ["startup"]
        assert str(raised) == "startup"
        return
    assert log == ["startup", "body", "shutdown"]
    if body is None:
        assert str(raised or "") == shutdown
    else:
        assert raised is body
        notes = "".join(getattr(body, "__notes__", ()))
        assert ("did not stop cleanly: BoomError: shutdown" in notes) == bool(shutdown)
        body.__notes__ = []


@pytest.mark.parametrize("place", ["startup", "shutdown"])
@pytest.mark.parametrize("kind", [Bang, SystemExit, KeyboardInterrupt])
@both
async def test_what_is_no_exception_comes_through_as_it_is(
    open_client: OpenClient, kind: type[BaseException], place: str
) -> None:
    failure = kind(place)
    with pytest.raises(kind) as caught:
        async with open_client(logging_app([], place, failure)):
            assert place == "shutdown"
            raise BoomError("less than that")
    assert caught.value is failure


@both
async def test_lifekits_own_errors_are_raised_where_the_test_is(open_client: OpenClient) -> None:
    registry = Registry()
    order: list[str] = []

    @registry.resource
    async def first() -> AsyncGenerator[int]:
        yield 1
        order.append("first closed")
        raise BoomError("at its closing")

    app = FastAPI(lifespan=registry.lifespan)
    with pytest.raises(ShutdownError, match="at its closing"):
        async with open_client(app):
            order.append("body")
    assert order == ["body", "first closed"]

    @registry.resource(first)
    def second(first: int) -> None:
        raise BoomError("at its opening")

    with pytest.raises(StartupError) as caught:
        async with open_client(app):
            raise AssertionError("it can't have started")
    assert caught.value.failures[0][0] == "second"
    assert caught.value.opened == ("first",)


# -- every ASGI application ------------------------------------------------------------------------


def raw(start: str, stop: str = "lifespan.shutdown.complete", **more: Any) -> ASGIApp:
    """An application by hand, which says these things and asks on for ever."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": start if message["type"] == "lifespan.startup" else stop, **more})
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    return app


@both
async def test_an_application_that_only_says_that_it_failed_fails_the_test(
    open_client: OpenClient,
) -> None:
    refuses = raw("lifespan.startup.failed", message="no disk, password=hunter2")
    with pytest.raises(StartupError, match="did not start: no disk") as caught:
        async with open_client(refuses):
            raise AssertionError("it can't have started")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(StartupError, match="did not start"):
        async with open_client(raw("lifespan.startup.failed")):
            raise AssertionError("it can't have started")
    with pytest.raises(ShutdownError, match="did not stop cleanly: disk gone"):
        async with open_client(
            raw("lifespan.startup.complete", "lifespan.shutdown.failed", message="disk gone")
        ):
            pass


@both
async def test_an_application_that_asks_on_after_its_shutdown_is_ended(open_client: OpenClient) -> None:
    before = tasks_alive()
    async with open_client(raw("lifespan.startup.complete")):
        pass
    await checkpoint()
    assert tasks_alive() == before


@both
async def test_an_application_may_take_its_time_between_saying_that_it_failed_and_raising(
    open_client: OpenClient,
) -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "see below"})
        await anyio.wait_all_tasks_blocked()
        raise BoomError("the cause")

    with pytest.raises(BoomError, match="the cause"):
        async with open_client(app):
            raise AssertionError("it can't have started")


async def no_lifespan(scope: Any, receive: Receive, send: Send) -> None:
    """An application that knows requests only."""
    assert scope["type"] == "http", f"no {scope['type']} here"
    await send({"type": "http.response.start", "status": 204})
    await send({"type": "http.response.body"})


async def ignores_lifespan(scope: Any, receive: Receive, send: Send) -> None:
    """An application that returns from what it does not know."""
    if scope["type"] == "http":
        await no_lifespan(scope, receive, send)


@pytest.mark.parametrize("app", [no_lifespan, ignores_lifespan])
async def test_an_application_without_a_lifespan_is_served_as_it_is(app: ASGIApp) -> None:
    async with client(app) as http:
        assert (await http.get("/")).status_code == 204
    with sync_client(app) as sync:
        assert sync.get("/").status_code == 204


@both
async def test_an_application_that_raises_once_it_was_told_to_start_has_failed(
    open_client: OpenClient,
) -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        raise BoomError("no lifespan")

    with pytest.raises(BoomError):
        async with open_client(app):
            raise AssertionError("it can't have started")


@both
async def test_what_is_no_application_is_refused(open_client: OpenClient) -> None:
    with pytest.raises(TypeError, match=r"ASGI application is expected, not 'shop\.main:app'"):
        async with open_client("shop.main:app"):
            raise AssertionError("it can't have started")


async def test_a_lifespan_that_dies_while_it_is_in_use_fails_the_test_at_its_end() -> None:
    crash, left = anyio.Event(), anyio.Event()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async def worker() -> None:
            await crash.wait()
            raise BoomError("the worker")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker)
            try:
                yield
            finally:
                left.set()

    with pytest.raises(ExceptionGroup) as caught:
        async with client(FastAPI(lifespan=lifespan)) as http:
            crash.set()
            assert (await http.get("/")).status_code == 404
            await left.wait()
    assert caught.group_contains(BoomError)
    assert "ended with this while it was in use" in caught.value.__notes__[0]


# -- cancellation ----------------------------------------------------------------------------------


def parking_app(log: list[str], place: str, parked: anyio.Event, go_on: anyio.Event) -> Starlette:
    """An application that parks while it starts or stops."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        try:
            if place == "startup":
                parked.set()
                await anyio.sleep_forever()
            log.append("started")
            yield
            if place == "shutdown":
                parked.set()
                await go_on.wait()
            log.append("stopped")
        finally:
            log.append("left")

    return Starlette(lifespan=lifespan)


async def test_a_cancelled_start_is_given_up_and_leaves_nothing_running() -> None:
    log: list[str] = []
    parked = anyio.Event()
    before = tasks_alive()
    app = parking_app(log, "startup", parked, anyio.Event())
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:

            async def cancel() -> None:
                await parked.wait()
                scope.cancel()

            tasks.start_soon(cancel)
            async with client(app):
                raise AssertionError("it can't have started")
    assert scope.cancelled_caught
    assert log == ["left"]
    await checkpoint()
    assert tasks_alive() == before


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_cancelled_start_on_asyncio_may_await_while_it_cleans_up() -> None:
    """There a cancellation comes once, and code relies on that."""
    log: list[str] = []
    parked = anyio.Event()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        try:
            parked.set()
            await anyio.sleep_forever()
            yield
        finally:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            log.append("cleaned up")

    async def use() -> None:
        async with client(FastAPI(lifespan=lifespan)):
            raise AssertionError("it can't have started")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(use)
        await parked.wait()
        tasks.cancel_scope.cancel()
    assert log == ["cleaned up"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("steps", [0, 1], ids=["before-its-first-step", "later"])
async def test_a_lifespan_whose_task_somebody_else_cancels_is_not_taken_for_none(steps: int) -> None:
    async def cancel() -> None:
        while True:
            for task in asyncio.all_tasks():
                if task.get_name() == "lifekit application":
                    for _ in range(steps):
                        await asyncio.sleep(0)
                    task.cancel()
                    return
            await asyncio.sleep(0)

    log: list[str] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cancel)
        with pytest.raises(LifekitError, match="was cancelled"):
            async with client(parking_app(log, "startup", anyio.Event(), anyio.Event())):
                raise AssertionError("it can't have started")
    assert log == ["left"] * steps


async def test_a_cancelled_body_still_shuts_down() -> None:
    log: list[str] = []
    with anyio.CancelScope() as scope:
        async with client(logging_app(log)):
            scope.cancel()
            await checkpoint()
    assert scope.cancelled_caught
    assert log == ["startup", "shutdown"]


async def test_a_shutdown_completes_though_its_waiter_is_cancelled() -> None:
    log: list[str] = []
    parked, go_on = anyio.Event(), anyio.Event()
    scope = anyio.CancelScope()

    async def use(scope: anyio.CancelScope) -> None:
        with scope:
            async with client(parking_app(log, "shutdown", parked, go_on)):
                pass
            await checkpoint()
            raise AssertionError("the cancellation is delivered")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(use, scope)
        await parked.wait()
        scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert log == ["started"]
        go_on.set()
    assert log == ["started", "stopped", "left"]
    assert scope.cancelled_caught


@pytest.mark.parametrize("place", ["startup", "body", "shutdown"])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_asyncios_own_cancellations_are_no_different(place: str) -> None:
    log: list[str] = []
    parked, go_on = anyio.Event(), anyio.Event()

    async def use() -> None:
        async with client(parking_app(log, place, parked, go_on)):
            if place == "body":
                parked.set()
                await anyio.sleep_forever()

    before = tasks_alive()
    task = asyncio.create_task(use())
    await parked.wait()
    for _ in range(3 if place == "shutdown" else 1):
        task.cancel()
        await anyio.wait_all_tasks_blocked()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == (["left"] if place == "startup" else ["started", "stopped", "left"])
    assert tasks_alive() == before


# -- tasks, contexts, several at once --------------------------------------------------------------


@pytest.mark.parametrize("sandbox", [False, True], ids=["plain", "sandboxed"])
async def test_it_is_entered_in_one_task_and_left_in_another(sandbox: bool) -> None:
    """As fixtures are, of pytest plugins that set up and tear down in tasks of their own."""
    registry = Registry()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with anyio.create_task_group() as tasks, registry.lifespan():
            tasks.start_soon(anyio.sleep_forever)
            yield
            tasks.cancel_scope.cancel()

    made = client(FastAPI(lifespan=lifespan), sandbox=sandbox)

    async def enter() -> None:
        http = await made.__aenter__()
        assert (await http.get("/")).status_code == 404

    async def leave() -> None:
        await made.__aexit__(None, None, None)

    for step in (enter, leave):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(step)
    assert not registry.running


def shop_app() -> tuple[FastAPI, Registry, Any]:
    """An application whose one resource is a list, fresh in each lifespan."""
    registry = Registry("shop")

    @registry.resource
    def things() -> list[str]:
        return []

    app = FastAPI(lifespan=registry.lifespan)

    @app.post("/{thing}")
    def add(thing: str, value: Annotated[list[str], Depends(things)]) -> list[str]:
        value.append(thing)
        return value

    return app, registry, things


async def test_clients_of_one_application_nest_and_each_has_its_own_lifespan() -> None:
    app, registry, things = shop_app()
    async with client(app) as outer, client(app) as inner:
        assert (await outer.post("/a")).json() == ["a"]
        assert (await inner.post("/b")).json() == ["b"]
        assert (await outer.post("/c")).json() == ["a", "c"]
        assert things.get() == ["b"]
    assert not registry.running


async def test_clients_run_at_once() -> None:
    app, _, _ = shop_app()
    met = [anyio.Event(), anyio.Event()]

    async def use(own: int) -> None:
        async with client(app) as http:
            met[own].set()
            await met[1 - own].wait()
            assert (await http.post(f"/{own}")).json() == [str(own)]

    async with anyio.create_task_group() as tasks:
        for own in (0, 1):
            tasks.start_soon(use, own)


async def test_one_running_application_has_any_number_of_clients() -> None:
    app, registry, _ = shop_app()
    async with running(app) as served:
        (lifespan,) = served.lifespans
        assert lifespan.registry is registry
        for seen in (["x"], ["x", "x"]):
            async with client_of(served, headers={"host": "elsewhere"}) as http:
                assert (await http.post("/x")).json() == seen
    assert served.lifespans == []


async def test_an_override_around_the_client_reaches_the_application() -> None:
    app, registry, things = shop_app()
    mine: list[str] = []
    with registry.override(things, mine):
        async with client(app) as http:
            await http.post("/async")
    assert mine == ["async"]


@each_backend
def test_an_override_around_the_sync_client_reaches_the_application(backend: Backend) -> None:
    app, registry, things = shop_app()
    mine: list[str] = []
    with registry.override(things, mine), sync_client(app, backend=backend) as http:
        http.post("/sync")
    assert mine == ["sync"]


async def test_a_running_lifespan_is_overridden_under_the_same_client() -> None:
    app, _, things = shop_app()
    async with running(app) as served, client_of(served) as http:
        (lifespan,) = served.lifespans
        async with lifespan.override(things, ["fake"]):
            assert (await http.post("/x")).json() == ["fake", "x"]
        assert (await http.post("/x")).json() == ["x"]


# -- what the underlying clients can do ------------------------------------------------------------


async def test_options_reach_the_client_and_its_transport() -> None:
    app = FastAPI()

    @app.get("/boom")
    def boom() -> None:
        raise BoomError

    @app.get("/told")
    def told(request: Request) -> dict[str, Any]:
        assert request.client is not None
        kept = {
            "cookie": request.cookies,
            "x": request.headers["x"],
            "root": request.scope["root_path"],
        }
        return {**kept, "host": request.url.hostname, "client": request.client.host}

    options: dict[str, Any] = {"headers": {"x": "y"}, "cookies": {"a": "b"}}
    async with client(
        app, base_url="http://shop", root_path="/root", client=("10.0.0.1", 1), **options
    ) as http:
        told_it = (await http.get("/told")).json()
        with pytest.raises(BoomError):
            await http.get("/boom")
    expected = {"cookie": {"a": "b"}, "x": "y", "root": "/root", "host": "shop", "client": "10.0.0.1"}
    assert told_it == expected
    async with client(app, raise_app_exceptions=False) as http:
        assert (await http.get("/boom")).status_code == 500
    with sync_client(app, raise_server_exceptions=False, base_url="http://shop", **options) as sync:
        assert sync.get("/told").json() == {**expected, "root": "", "client": "testclient"}
        assert sync.get("/boom").status_code == 500


class Endless(StreamingResponse):
    """A response without end, which logs its own; no generator, which trio wants somebody to close."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(self)
        self.log = log

    def __aiter__(self) -> "Endless":
        return self

    async def __anext__(self) -> str:
        await checkpoint()
        return "chunk\n"

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self.log.append("cut off")


def rich_app(log: list[str]) -> FastAPI:
    """An application with a websocket and a response that never ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, Any]]:
        yield {"things": []}
        log.append("stopped")

    app = FastAPI(lifespan=lifespan)

    @app.websocket("/socket")
    async def socket(ws: WebSocket) -> None:
        await ws.accept()
        ws.state.things.append(await ws.receive_text())
        await ws.send_json(ws.state.things)
        await ws.close()

    @app.get("/stream")
    async def stream() -> Endless:
        return Endless(log)

    return app


@each_backend
def test_the_sync_client_is_starlettes_with_websockets_and_streams(backend: Backend) -> None:
    log: list[str] = []
    app = rich_app(log)
    with sync_client(app, backend=backend) as http:
        assert type(http) is TestClient
        assert http.app is app
        assert http.portal is not None
        assert type(http.portal.call(running_loop)).__module__.partition(".")[0] == backend
        with http.websocket_connect("/socket") as socket:
            socket.send_text("x")
            assert socket.receive_json() == ["x"]
        with http.stream("GET", "/stream") as response:
            assert next(response.iter_lines()) == "chunk"
        assert log == ["cut off"]
        # Left open, for the client to cut off before the application stops.
        response = http.send(http.build_request("GET", "/stream"), stream=True)
        lines = response.iter_lines()
        assert next(lines) == "chunk"
        assert log == ["cut off"]
    assert log == ["cut off", "cut off", "stopped"]


def test_the_sync_client_runs_on_uvloop_when_asked() -> None:
    with sync_client(FastAPI(), backend_options={"use_uvloop": True}) as http:
        assert http.portal is not None
        assert "uvloop" in type(http.portal.call(asyncio.get_running_loop)).__module__


# -- sandboxed -------------------------------------------------------------------------------------


class Table:
    """A value that lifekit knows how to sandbox: its rows."""

    def __init__(self, log: list[str]) -> None:
        self.rows: list[str] = []
        self.log = log

    def write(self, row: str) -> None:
        refuse_stragglers("a table")
        self.rows.append(row)


class TableSandbox(Sandbox):
    """Forgets what was written since it began; fails if there was a row named stray."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.before: list[str] = []

    async def begin(self) -> None:
        await checkpoint()
        self.before = self.table.rows.copy()
        self.table.log.append("begin")

    async def end(self) -> None:
        await checkpoint()
        self.table.log.append(f"end {self.table.rows}")
        stray = "stray" in self.table.rows
        self.table.rows[:] = self.before
        if stray:
            raise SandboxEscapedError("a stray")

    async def close(self) -> None:
        self.table.log.append(f"close {self.table.rows}")


class TableDriver(Driver[Table]):
    """What lifekit knows of tables."""

    def sandbox(self, value: Table) -> TableSandbox:
        return TableSandbox(value)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to tables, for which there is a driver in this test alone."""
    monkeypatch.setattr("lifekit._core.drivers._registered", {})
    register(Table, TableDriver())
    return []


def table_app(log: list[str], *, own_lifespan: bool = False) -> FastAPI:
    """An application that writes rows while it starts, serves and stops."""
    registry = Registry()

    @registry.resource
    def table() -> Table:
        return Table(log)

    @asynccontextmanager
    async def writing(app: FastAPI) -> AsyncGenerator[None]:
        table.get().write("start")
        yield
        table.get().write("stop")
        log.append("stopping")

    @asynccontextmanager
    async def stateless(app: FastAPI) -> AsyncGenerator[None]:
        async with registry.lifespan(), writing(app):
            yield

    app = FastAPI(lifespan=stateless if own_lifespan else combine(registry.lifespan, writing))
    late: list[Any] = []

    @app.post("/{row}")
    async def write(row: str, table: Annotated[Table, Depends(table)]) -> list[str]:
        table.write(row)
        return table.rows

    @app.get("/later")
    async def later(table: Annotated[Table, Depends(table)]) -> None:
        late.append(partial(copy_context().run, table.write, "late"))

    app.state.late = late
    return app


STORY = ["begin", "end ['start', 'x']", "stopping", "close ['start', 'stop']"]


@pytest.mark.parametrize("own_lifespan", [False, True], ids=["state", "no-state"])
async def test_what_the_body_did_is_undone_and_what_the_lifespan_did_is_not(
    log: list[str], own_lifespan: bool
) -> None:
    app = table_app(log, own_lifespan=own_lifespan)
    async with client(app, sandbox=True) as http:
        assert (await http.post("/x")).json() == ["start", "x"]
    assert log == STORY
    with sync_client(app, sandbox=True) as sync:
        assert sync.post("/x").json() == ["start", "x"]
    assert log == STORY * 2


async def test_without_a_sandbox_nothing_is_undone(log: list[str]) -> None:
    async with client(table_app(log)) as http:
        await http.post("/x")
    with sync_client(table_app(log)) as sync:
        sync.post("/x")
    assert log == ["stopping", "stopping"]


@each_backend
@pytest.mark.parametrize("kind", [AssertionError, KeyboardInterrupt])
def test_a_sync_body_that_raises_is_undone_and_shuts_down(
    log: list[str], backend: Backend, kind: type[BaseException]
) -> None:
    with (
        pytest.raises(kind, match="body"),
        sync_client(table_app(log), sandbox=True, backend=backend) as http,
    ):
        http.post("/x")
        raise kind("body")
    assert log == STORY


def interrupt() -> None:
    """Press Ctrl-C, whatever the main thread waits for."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@each_backend
def test_ctrl_c_while_a_request_hangs_is_undone_and_shuts_down(
    log: list[str], backend: Backend
) -> None:
    before = set(threading.enumerate())
    app = table_app(log)
    app.add_api_route("/hang", hang)
    with (
        pytest.raises(KeyboardInterrupt),
        sync_client(app, sandbox=True, backend=backend) as http,
    ):
        http.post("/x")
        http.get("/hang")
    assert log == STORY
    assert set(threading.enumerate()) <= before


async def hang() -> None:
    """Interrupt whoever asked, and never answer."""
    interrupt()
    await anyio.sleep_forever()


@each_backend
def test_ctrl_c_while_it_starts_gives_the_start_up(backend: Backend) -> None:
    before = set(threading.enumerate())
    log: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        try:
            await hang()
            yield
        finally:
            log.append("left")

    with pytest.raises(KeyboardInterrupt), sync_client(FastAPI(lifespan=lifespan), backend=backend):
        raise AssertionError("it can't have started")
    assert log == ["left"]
    assert set(threading.enumerate()) <= before


async def test_a_cancelled_body_is_undone_and_shuts_down(log: list[str]) -> None:
    with anyio.CancelScope() as scope:
        async with client(table_app(log), sandbox=True) as http:
            await http.post("/x")
            scope.cancel()
            await checkpoint()
    assert scope.cancelled_caught
    assert log == STORY


@both
async def test_a_sandbox_that_something_escaped_from_fails_the_test_and_shuts_down(
    log: list[str], open_client: OpenClient
) -> None:
    with pytest.raises(SandboxEscapedError, match="a stray"):
        async with open_client(table_app(log), sandbox=True) as http:
            await post(http, "/stray")
    with pytest.raises(BoomError) as caught:
        async with open_client(table_app(log), sandbox=True) as http:
            await post(http, "/stray")
            raise BoomError
    assert "a stray" in caught.value.__notes__[0]
    assert log == ["begin", "end ['start', 'stray']", *STORY[2:]] * 2


async def test_a_straggler_is_refused_after_its_test(log: list[str]) -> None:
    """Code that was started in the sandbox, by a request, and goes on when that has ended."""
    app = table_app(log)
    async with client(app, sandbox=True) as http:
        await http.get("/later")
    with sync_client(app, sandbox=True) as sync:
        sync.get("/later")
    for write in app.state.late:
        with pytest.raises(
            SandboxEscapedError, match=r"sandbox at .*test_client\.py:\d+ in test_a_str"
        ):
            write()


async def test_two_sandboxes_of_one_running_application_follow_each_other(log: list[str]) -> None:
    async with running(table_app(log), sandboxed=True) as served:
        for _ in range(2):
            async with served.sandbox(), client_of(served) as http:
                assert (await http.post("/x")).json() == ["start", "x"]
    assert log == [*STORY[:2], *STORY]


async def test_the_body_itself_opens_nothing_sandboxed(log: list[str]) -> None:
    registry = Registry()
    registry.resource(name="table")(lambda: Table(log))
    async with client(table_app(log), sandbox=True), registry.lifespan() as own:
        assert not own.sandboxed


async def test_a_sandbox_around_the_client_is_its_callers(log: list[str]) -> None:
    with sandboxing() as opened:
        async with client(table_app(log)) as http:
            (lifespan,) = opened.lifespans
            async with lifespan.sandbox():
                await http.post("/x")
    assert log == STORY


@both
async def test_an_application_that_opens_nothing_of_lifekits_has_no_sandbox(
    open_client: OpenClient,
) -> None:
    log: list[str] = []
    with pytest.raises(SandboxError, match=r"opened no lifespan of lifekit's.*FastAPI\(lifespan="):
        async with open_client(logging_app(log), sandbox=True):
            raise AssertionError("it can't have begun")
    assert log == ["startup", "shutdown"]
    with pytest.raises(SandboxError, match="it raised AssertionError: no lifespan here") as caught:
        async with open_client(no_lifespan, sandbox=True):
            raise AssertionError("it can't have begun")
    assert isinstance(caught.value.__cause__, AssertionError)


# -- without lifekit -------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [httpx, httpx2])
async def test_httpx_alone_runs_no_lifespan(library: Any) -> None:
    app, _, _ = shop_app()
    with pytest.raises(TypeError, match="unexpected keyword argument 'app'"):
        library.AsyncClient(app=app)
    async with library.AsyncClient(
        transport=library.ASGITransport(app), base_url="http://test"
    ) as http:
        with pytest.raises(NotOpenError):
            await http.post("/x")
    async with client(app) as cured:
        assert (await cured.post("/x")).json() == ["x"]


# -- what is installed -----------------------------------------------------------------------------


async def test_httpx_stands_in_for_httpx2_and_without_both_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.import_module
    missing = {"httpx2"}

    def import_module(name: str, package: str | None = None) -> Any:
        if name in missing:
            raise ModuleNotFoundError(name=name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    async with client(FastAPI()) as http:
        assert isinstance(http, httpx.AsyncClient)
        assert (await http.get("/openapi.json")).status_code == 200
    missing.add("httpx")
    for opened in (client(FastAPI()), in_thread(FastAPI())):
        with pytest.raises(LifekitError, match=r"pip install 'lifekit\[httpx2\]'"):
            async with opened:
                raise AssertionError("there is no client")
