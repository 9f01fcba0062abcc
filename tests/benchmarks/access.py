"""Reaching an open value: from a request, and with `Resource.get`."""

# Not `from __future__ import annotations`: FastAPI evaluates them, and some name what is local.

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from contextlib import asynccontextmanager
from contextvars import copy_context
from functools import partial
from time import perf_counter
from typing import Annotated, Any

from lifekit import Registry, asgi

from .measure import Row, best_ratio, interleave, on, paired_ratio


class Value:
    """What is reached."""


# -- in a request --------------------------------------------------------------------------------

Message = MutableMapping[str, Any]

SCOPE: dict[str, Any] = {
    "type": "http",
    "asgi": {"version": "3.0", "spec_version": "2.3"},
    "http_version": "1.1",
    "method": "GET",
    "scheme": "http",
    "path": "/",
    "raw_path": b"/",
    "query_string": b"",
    "root_path": "",
    "headers": [(b"host", b"test")],
    "client": ("127.0.0.1", 40000),
    "server": ("127.0.0.1", 8000),
}


@asynccontextmanager
async def served(app: Any) -> AsyncGenerator[dict[str, Any]]:
    """Run an application's lifespan as a server does, and yield the state that it filled."""
    state: dict[str, Any] = {}
    to_app: asyncio.Queue[Message] = asyncio.Queue()
    from_app: asyncio.Queue[Message] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": SCOPE["asgi"], "state": state}
    running = asyncio.create_task(app(scope, to_app.get, from_app.put))
    to_app.put_nowait({"type": "lifespan.startup"})
    assert (await from_app.get())["type"] == "lifespan.startup.complete"
    yield state
    to_app.put_nowait({"type": "lifespan.shutdown"})
    assert (await from_app.get())["type"] == "lifespan.shutdown.complete"
    await running


async def request_seconds(app: Any, state: dict[str, Any], times: int) -> float:
    """Return the seconds of one request of *times*, called the way a server calls."""

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        assert message.get("status", 200) == 200, message

    began = perf_counter()
    for _ in range(times):
        await app({**SCOPE, "state": state.copy()}, receive, send)
    return (perf_counter() - began) / times


def request(*, rounds: int = 400, times: int = 50) -> list[Row]:
    """Compare ``Depends(handle)`` with a dependency that returns ``request.state.plain``."""
    # Imported here: a bigger heap would slow every garbage collection of the other benchmarks.
    from fastapi import Depends, FastAPI, Request
    from starlette.responses import PlainTextResponse, Response

    registry = Registry("requests")

    @registry.resource
    def value() -> Value:
        return Value()

    async def by_hand(request: Request) -> Value:
        found: Value = request.state.plain
        return found

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, Any]]:
        yield {"plain": Value()}

    # Answers with a finished response, which leaves the dependency the greatest share.
    async def with_floor(found: Annotated[Value, Depends(by_hand)]) -> Response:
        assert type(found) is Value
        return PlainTextResponse("ok")

    async def with_ours(found: Annotated[Value, Depends(value)]) -> Response:
        assert type(found) is Value
        return PlainTextResponse("ok")

    floor_app, our_app = FastAPI(lifespan=lifespan), FastAPI(lifespan=registry.lifespan)
    floor_app.get("/", response_model=None)(with_floor)
    our_app.get("/", response_model=None)(with_ours)

    async def measured() -> list[Row]:
        async with served(floor_app) as floor_state, served(our_app) as our_state:
            floor, ours = await interleave(
                rounds,
                partial(request_seconds, floor_app, floor_state, times),
                partial(request_seconds, our_app, our_state, times),
            )
        # In pairs: rounds of some 5 ms, of which there are many, and a bar too near for luck.
        ratio = paired_ratio(floor, ours)
        what = "request with Depends(handle): one that returns request.state.x"
        return [Row(what, min(floor), min(ours), ratio, "us", most=1.05)]

    return on("asyncio", measured)


def supervised(*, rounds: int = 400, times: int = 50) -> list[Row]:
    """Compare a request where signals, health and a renewal are watched with one where they are not."""
    from fastapi import Depends, FastAPI
    from starlette.responses import PlainTextResponse, Response

    def application(*, watched: bool) -> FastAPI:
        registry = Registry("supervised", signals=watched)

        @registry.resource(renew_every=3600.0 if watched else None)
        def value() -> Value:
            return Value()

        app = FastAPI(lifespan=registry.lifespan)

        @app.get("/", response_model=None)
        async def root(found: Annotated[Value, Depends(value)]) -> Response:
            return PlainTextResponse("ok")

        if watched:
            app.mount("/health", asgi.health(registry))
        return app

    async def measured() -> list[Row]:
        floor_app, our_app = application(watched=False), application(watched=True)
        async with served(floor_app) as floor_state, served(our_app) as our_state:
            floor, ours = await interleave(
                rounds,
                partial(request_seconds, floor_app, floor_state, times),
                partial(request_seconds, our_app, our_state, times),
            )
        ratio = paired_ratio(floor, ours)
        what = "request with health, notice and renewal: one without"
        return [Row(what, min(floor), min(ours), ratio, "us", most=1.02)]

    return on("asyncio", measured)


# -- with get ------------------------------------------------------------------------------------


def get(*, rounds: int = 200, times: int = 10_000) -> list[Row]:
    """Compare ``handle.get()`` with an attribute."""
    registry = Registry("gets")

    @registry.resource
    def value() -> Value:
        return Value()

    class Holder:
        def __init__(self) -> None:
            self.value = Value()

    holder = Holder()

    def attribute_seconds() -> float:
        began = perf_counter()
        for _ in range(times):
            holder.value  # noqa: B018  # pyright: ignore[reportUnusedExpression]
        return (perf_counter() - began) / times

    def get_seconds() -> float:
        began = perf_counter()
        for _ in range(times):
            value.get()
        return (perf_counter() - began) / times

    async def attribute() -> float:
        return attribute_seconds()

    async def inside() -> float:
        return get_seconds()

    async def measured() -> list[Row]:
        outer = copy_context()

        async def outside() -> float:
            return outer.run(get_seconds)

        async with registry.lifespan():
            floor, ours, ours_outside = await interleave(rounds, attribute, inside, outside)
        # The least: a loop of some milliseconds finds the host undisturbed in some of its rounds.
        return [
            Row(what, min(floor), min(mine), best_ratio(floor, mine), "us", most_more=bar)
            for what, mine, bar in (
                ("handle.get(): an attribute", ours, 0.5e-6),
                ("handle.get() in a task older than the lifespan", ours_outside, float("inf")),
            )
        ]

    return on("asyncio", measured)


# -- through a pool that is watched ----------------------------------------------------------------


def acquire(*, rounds: int = 100, times: int = 50) -> list[Row]:
    """Compare a query through a pool in a lifespan with one through a pool that nobody watches."""
    import asyncpg

    from lifekit import embedded

    async def queries(pool: Any) -> float:
        began = perf_counter()
        for _ in range(times):
            async with pool.acquire() as connection:
                await connection.fetchval("SELECT 1")
        return (perf_counter() - began) / times

    async def measured() -> list[Row]:
        registry = Registry("acquires")
        async with embedded.postgres() as server:

            @registry.resource
            def db() -> Any:
                return asyncpg.create_pool(server.url, min_size=1)

            async with (
                registry.lifespan() as lifespan,
                asyncpg.create_pool(server.url, min_size=1) as bare,
            ):
                floor, ours = await interleave(
                    rounds, partial(queries, bare), partial(queries, lifespan[db])
                )
        what = "acquire, SELECT 1, release: in a pool nobody watches"
        return [Row(what, min(floor), min(ours), paired_ratio(floor, ours), "us", most=1.15)]

    return on("asyncio", measured)
