"""dependency-injector: a container of providers, wired into this module.

https://python-dependency-injector.ets-labs.org/examples/fastapi.html
"""

import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from dependency_injector import containers, providers
from dependency_injector.wiring import Provide, inject
from fastapi import Depends, FastAPI
from starlette.responses import PlainTextResponse

from .work import Log, Plan, Pool, Repo, Service, open_pool


class Container(containers.DeclarativeContainer):
    """What the application is made of."""

    log: Any = providers.Dependency()
    pool: Any = providers.Resource(open_pool, log)
    repo: Any = providers.Factory(Repo, pool)
    service: Any = providers.Factory(Service, repo)


@inject
async def root_of_one(
    pool: Annotated[Pool, Depends(Provide[Container.pool])],
) -> PlainTextResponse:
    """Ask for the pool."""
    return PlainTextResponse(pool.name)


@inject
async def root_of_chain(
    service: Annotated[Service, Depends(Provide[Container.service])],
) -> PlainTextResponse:
    """Ask for the service."""
    return PlainTextResponse(service.repo.pool.name)


def _application(log: Log) -> FastAPI:
    container: Any = Container(log=log)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        container.wire(modules=[sys.modules[__name__]])
        await container.init_resources()
        yield
        await container.shutdown_resources()
        container.unwire()

    return FastAPI(lifespan=lifespan)


def one(log: Log) -> FastAPI:
    """Ask for the pool."""
    app = _application(log)
    app.get("/")(root_of_one)
    return app


def chain(log: Log) -> FastAPI:
    """Ask for the service."""
    app = _application(log)
    app.get("/")(root_of_chain)
    return app


@asynccontextmanager
async def graph(plan: Plan) -> AsyncGenerator[None]:
    """Provide all, and initialize them."""
    container: Any = containers.DynamicContainer()
    resources: dict[str, Any] = {}
    for node in plan.nodes:
        needs = [resources[need.name] for need in node.needs]
        resources[node.name] = providers.Resource(plan.factory(node), *needs)
        setattr(container, node.name, resources[node.name])
    await container.init_resources()
    yield
    await container.shutdown_resources()
