"""dishka: a provider with scopes, a container, and `FromDishka`.

https://dishka.readthedocs.io/en/stable/integrations/fastapi.html
"""

from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import asynccontextmanager

from dishka import AsyncContainer, Provider, Scope, make_async_container
from dishka.integrations.fastapi import FromDishka, inject, setup_dishka
from fastapi import FastAPI
from starlette.responses import PlainTextResponse

from .work import Log, Plan, Pool, Repo, Service, opened_pool


def _application(log: Log) -> tuple[FastAPI, AsyncContainer]:
    async def pool() -> AsyncIterable[Pool]:
        async with opened_pool(log) as pool:
            yield pool

    provider = Provider()
    provider.provide(pool, scope=Scope.APP)
    provider.provide(Repo, scope=Scope.REQUEST)
    provider.provide(Service, scope=Scope.REQUEST)
    container = make_async_container(provider)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        await container.get(Pool)
        yield
        await container.close()

    return FastAPI(lifespan=lifespan), container


def one(log: Log) -> FastAPI:
    """Ask for the pool."""

    @inject
    async def root(pool: FromDishka[Pool]) -> PlainTextResponse:
        return PlainTextResponse(pool.name)

    app, container = _application(log)
    app.get("/")(root)
    setup_dishka(container, app)
    return app


def chain(log: Log) -> FastAPI:
    """Ask for the service."""

    @inject
    async def root(service: FromDishka[Service]) -> PlainTextResponse:
        return PlainTextResponse(service.repo.pool.name)

    app, container = _application(log)
    app.get("/")(root)
    setup_dishka(container, app)
    return app


@asynccontextmanager
async def graph(plan: Plan) -> AsyncGenerator[None]:
    """Provide all, and get those that need all the others."""
    provider = Provider(scope=Scope.APP)
    for node in plan.nodes:
        provider.provide(plan.factory(node))
    container = make_async_container(provider)
    for node in plan.last:
        await container.get(node.kind)
    yield
    await container.close()
