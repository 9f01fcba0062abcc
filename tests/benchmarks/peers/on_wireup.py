"""wireup: injectables, a container, and `Injected`.

https://maldoinc.github.io/wireup/latest/integrations/fastapi/ with the route class that its
page on injection in routes advises for speed.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import wireup
import wireup.integration.fastapi
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.responses import PlainTextResponse
from wireup import AsyncContainer, Injected, injectable
from wireup.integration.fastapi import WireupRoute

from .work import Log, Plan, Pool, Repo, Service, opened_pool


def _application(log: Log) -> tuple[FastAPI, AsyncContainer]:
    @injectable
    async def pool() -> AsyncIterator[Pool]:
        async with opened_pool(log) as pool:
            yield pool

    @injectable(lifetime="scoped")
    def repo(pool: Pool) -> Repo:
        return Repo(pool)

    @injectable(lifetime="scoped")
    def service(repo: Repo) -> Service:
        return Service(repo)

    container = wireup.create_async_container(injectables=[pool, repo, service])

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        await container.get(Pool)
        yield

    return FastAPI(lifespan=lifespan), container


def one(log: Log, route_class: type[APIRoute] = WireupRoute) -> FastAPI:
    """Ask for the pool."""

    async def root(pool: Injected[Pool]) -> PlainTextResponse:
        return PlainTextResponse(pool.name)

    app, container = _application(log)
    app.router.route_class = route_class
    app.get("/")(root)
    wireup.integration.fastapi.setup(container, app)
    return app


def chain(log: Log, route_class: type[APIRoute] = WireupRoute) -> FastAPI:
    """Ask for the service."""

    async def root(service: Injected[Service]) -> PlainTextResponse:
        return PlainTextResponse(service.repo.pool.name)

    app, container = _application(log)
    app.router.route_class = route_class
    app.get("/")(root)
    wireup.integration.fastapi.setup(container, app)
    return app


@asynccontextmanager
async def graph(plan: Plan) -> AsyncGenerator[None]:
    """Declare all, and get those that need all the others."""
    injectables = [injectable(plan.factory(node)) for node in plan.nodes]
    container = wireup.create_async_container(injectables=injectables)
    for node in plan.last:
        await container.get(node.kind)
    yield
    await container.close()
