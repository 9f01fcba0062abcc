"""One application on each library: two clients, and a service that is built from both.

Each is assembled as the library's own documentation does it for FastAPI.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import svcs
import wireup
import wireup.integration.fastapi
from dependency_injector import containers
from dependency_injector import providers as di
from dependency_injector.ext.starlette import Lifespan
from dishka import Provider, Scope, make_async_container
from fastapi import FastAPI
from that_depends import BaseContainer
from that_depends import providers as that

from lifekit import Registry


class Db:
    """One client."""


class Cache:
    """Another one, which needs nothing of the first."""


@dataclass(eq=False)
class Links:
    """What the application works with."""

    db: Db
    cache: Cache


@dataclass
class World:
    """What is to go wrong, and what happened."""

    meets: bool = False
    fails_to_open: str = ""
    fails_to_close: tuple[str, ...] = ()
    waits_in_closing: str = ""
    events: list[str] = field(default_factory=list[str])
    both_opening: asyncio.Barrier = field(default_factory=lambda: asyncio.Barrier(2))
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def opened(self, name: str) -> AsyncGenerator[None]:
        await self.open(name)
        try:
            yield
        finally:
            await self.close(name)

    async def open(self, name: str) -> None:
        if self.meets and name != "links":
            meeting = asyncio.create_task(self.both_opening.wait())
            for _ in range(100):  # turns of the event loop, in which the other may begin
                await asyncio.sleep(0)
            if not meeting.done():
                meeting.cancel()
            with suppress(asyncio.CancelledError, asyncio.BrokenBarrierError):
                await meeting
                self.events.append("both are opening")
        if name == self.fails_to_open:
            raise ConnectionError(f"{name} can't be opened")
        self.events.append(f"{name} opened")

    async def close(self, name: str) -> None:
        if name == self.waits_in_closing:
            self.closing.set()
            await self.released.wait()
        await asyncio.sleep(0)
        if name in self.fails_to_close:
            raise ConnectionError(f"{name} can't be closed")
        self.events.append(f"{name} closed")


class Running(NamedTuple):
    """The application while it runs."""

    links: Callable[[], Awaitable[Links]]
    override: Callable[[Cache], AbstractAsyncContextManager[object]]


numbers = count(1)
Start = Callable[[], AbstractAsyncContextManager[Running]]


class Factories:
    """How each of the three is opened and closed."""

    def __init__(self, world: World) -> None:
        async def db() -> AsyncGenerator[Db, None]:
            async with world.opened("db"):
                yield Db()

        async def cache() -> AsyncGenerator[Cache, None]:
            async with world.opened("cache"):
                yield Cache()

        async def links(db: Db, cache: Cache) -> AsyncGenerator[Links, None]:
            async with world.opened("links"):
                yield Links(db, cache)

        self.db, self.cache, self.links = db, cache, links


@asynccontextmanager
async def nothing(_: Cache) -> AsyncGenerator[None]:
    """No override reaches what was built: none is offered."""
    yield


def by_hand(world: World) -> Start:
    """FastAPI's own lifespan with an `AsyncExitStack`."""
    make = Factories(world)

    @asynccontextmanager
    async def lifespan() -> AsyncGenerator[Running]:
        async with AsyncExitStack() as stack:
            db = await stack.enter_async_context(asynccontextmanager(make.db)())
            cache = await stack.enter_async_context(asynccontextmanager(make.cache)())
            links = await stack.enter_async_context(asynccontextmanager(make.links)(db, cache))

            async def get() -> Links:
                return links

            yield Running(get, nothing)

    return lifespan


def on_svcs(world: World) -> Start:
    """What lives as long as the application is a value of its registry."""

    @svcs.fastapi.lifespan
    async def lifespan(_: FastAPI, registry: Any) -> AsyncGenerator[dict[str, object], None]:
        await world.open("db")
        db = Db()
        registry.register_value(Db, db, on_registry_close=partial(world.close, "db"))
        await world.open("cache")
        cache = Cache()
        registry.register_value(Cache, cache, on_registry_close=partial(world.close, "cache"))
        await world.open("links")
        links = Links(db, cache)
        registry.register_value(Links, links, on_registry_close=partial(world.close, "links"))
        yield {}

    @asynccontextmanager
    async def start() -> AsyncGenerator[Running]:
        async with lifespan(FastAPI()):

            async def get() -> Links:
                async with svcs.Container(lifespan.registry) as container:
                    return await container.aget(Links)

            @asynccontextmanager
            async def override(cache: Cache) -> AsyncGenerator[None]:
                registry: Any = lifespan.registry
                registry.register_value(Cache, cache)
                yield

            yield Running(get, override)

    return start


def on_dishka(world: World) -> Start:
    """A container whose objects have the scope of the application."""
    make = Factories(world)
    provider = Provider(scope=Scope.APP)
    for factory in (make.db, make.cache, make.links):
        provider.provide(factory)
    container = make_async_container(provider)

    async def get() -> Links:
        return await container.get(Links)

    @asynccontextmanager
    async def start() -> AsyncGenerator[Running]:
        try:
            await get()
            yield Running(get, nothing)
        finally:
            await container.close()

    return start


def on_wireup(world: World) -> Start:
    """A container that its integration closes after the application's own lifespan."""
    make = Factories(world)
    injectables = [wireup.injectable(each) for each in (make.db, make.cache, make.links)]
    container = wireup.create_async_container(injectables=injectables)

    async def get() -> Links:
        return await container.get(Links)

    @asynccontextmanager
    async def override(cache: Cache) -> AsyncGenerator[None]:
        with container.override({Cache: cache}):
            yield

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        await get()
        yield

    @asynccontextmanager
    async def start() -> AsyncGenerator[Running]:
        app = FastAPI(lifespan=lifespan)
        wireup.integration.fastapi.setup(container, app)
        async with app.router.lifespan_context(app):
            yield Running(get, override)

    return start


def on_dependency_injector(world: World) -> Start:
    """A container of resources, which its Starlette extension opens and closes."""
    make = Factories(world)

    class Container(containers.DeclarativeContainer):
        db: Any = di.Resource(make.db)
        cache: Any = di.Resource(make.cache)
        links: Any = di.Resource(make.links, db, cache)

    container = Container()

    async def get() -> Links:
        links: Links = await container.links()
        return links

    @asynccontextmanager
    async def override(cache: Cache) -> AsyncGenerator[None]:
        with container.cache.override(cache):
            yield

    @asynccontextmanager
    async def start() -> AsyncGenerator[Running]:
        async with Lifespan(container)(None):
            yield Running(get, override)

    return start


def on_that_depends(world: World) -> Start:
    """A container of resources, torn down in `finally`."""
    make = Factories(world)

    class Container(BaseContainer):
        alias = f"container {next(numbers)}"  # two of one name would warn
        db = that.Resource(make.db)
        cache = that.Resource(make.cache)
        links = that.Resource(make.links, db.cast, cache.cast)

    @asynccontextmanager
    async def override(cache: Cache) -> AsyncGenerator[None]:
        await Container.cache.override(cache, tear_down_children=True)
        yield
        await Container.cache.reset_override(tear_down_children=True)

    @asynccontextmanager
    async def start() -> AsyncGenerator[Running]:
        try:
            await Container.init_resources()
            yield Running(Container.links.resolve, override)
        finally:
            await Container.tear_down()

    return start


def on_lifekit(world: World) -> Start:
    """A registry, and its lifespan."""
    make = Factories(world)
    registry = Registry()
    db = registry.resource(make.db)
    cache = registry.resource(make.cache)
    links = registry.resource(db, cache)(make.links)

    async def get() -> Links:
        return links.get()

    @asynccontextmanager
    async def start() -> AsyncGenerator[Running]:
        async with registry.lifespan() as lifespan:
            yield Running(get, partial(lifespan.override, cache))

    return start


PEERS: dict[str, Callable[[World], Start]] = {
    "by hand": by_hand,
    "svcs": on_svcs,
    "dishka": on_dishka,
    "wireup": on_wireup,
    "dependency-injector": on_dependency_injector,
    "that-depends": on_that_depends,
    "lifekit": on_lifekit,
}
