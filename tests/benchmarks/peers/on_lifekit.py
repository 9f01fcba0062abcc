"""lifekit: a registry, its lifespan, and `Depends(handle)`."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI
from starlette.responses import PlainTextResponse

from lifekit import Registry, Resource

from .work import Log, Plan, Pool, Repo, Service, open_pool


def _registry(log: Log) -> tuple[Registry, Resource[Pool]]:
    registry = Registry("peers")

    @registry.resource
    def pool() -> AsyncGenerator[Pool, None]:
        return open_pool(log)

    return registry, pool


def one(log: Log) -> FastAPI:
    """Ask for the pool."""
    registry, pool = _registry(log)

    async def root(pool: Annotated[Pool, Depends(pool)]) -> PlainTextResponse:
        return PlainTextResponse(pool.name)

    app = FastAPI(lifespan=registry.lifespan)
    app.get("/")(root)
    return app


def chain(log: Log) -> FastAPI:
    """Ask for the service; what a request has of its own is FastAPI's."""
    registry, pool = _registry(log)

    async def get_repo(pool: Annotated[Pool, Depends(pool)]) -> Repo:
        return Repo(pool)

    async def get_service(repo: Annotated[Repo, Depends(get_repo)]) -> Service:
        return Service(repo)

    async def root(service: Annotated[Service, Depends(get_service)]) -> PlainTextResponse:
        return PlainTextResponse(service.repo.pool.name)

    app = FastAPI(lifespan=registry.lifespan)
    app.get("/")(root)
    return app


@asynccontextmanager
async def graph(plan: Plan) -> AsyncGenerator[None]:
    """Declare all, and run the lifespan."""
    registry = Registry("peers")
    handles: dict[str, Resource[object]] = {}
    for node in plan.nodes:
        needs = [handles[need.name] for need in node.needs]
        handles[node.name] = registry.resource(*needs, name=node.name)(plan.factory(node))
    async with registry.lifespan():
        yield
