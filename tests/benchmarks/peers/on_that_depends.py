"""that-depends: a container of providers, each of which is a dependency of FastAPI's.

https://that-depends.modern-python.org/integrations/fastapi/
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from itertools import count
from types import new_class
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from starlette.responses import PlainTextResponse
from that_depends import BaseContainer, providers

from .work import Log, Plan, Pool, Repo, Service, open_pool

numbers = count(1)


def _application(log: Log) -> tuple[FastAPI, Any]:
    class Container(BaseContainer):
        alias = f"application {next(numbers)}"  # two of one name would warn
        pool = providers.Resource(open_pool, log)
        repo = providers.Factory(Repo, pool.cast)
        service = providers.Factory(Service, repo.cast)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        await Container.init_resources()
        yield
        await Container.tear_down()

    return FastAPI(lifespan=lifespan), Container


def one(log: Log) -> FastAPI:
    """Ask for the pool."""
    app, container = _application(log)

    async def root(pool: Annotated[Pool, Depends(container.pool)]) -> PlainTextResponse:
        return PlainTextResponse(pool.name)

    app.get("/")(root)
    return app


def chain(log: Log) -> FastAPI:
    """Ask for the service."""
    app, container = _application(log)

    async def root(service: Annotated[Service, Depends(container.service)]) -> PlainTextResponse:
        return PlainTextResponse(service.repo.pool.name)

    app.get("/")(root)
    return app


@asynccontextmanager
async def graph(plan: Plan) -> AsyncGenerator[None]:
    """Provide all, and initialize them."""
    resources: dict[str, Any] = {}
    for node in plan.nodes:
        needs = [resources[need.name].cast for need in node.needs]
        resources[node.name] = providers.Resource(plan.factory(node), *needs)
    body = {"alias": f"graph {next(numbers)}", **resources}
    container: Any = new_class("Container", (BaseContainer,), exec_body=lambda made: made.update(body))
    await container.init_resources()
    yield
    await container.tear_down()
