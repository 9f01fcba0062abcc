"""FastAPI as its documentation shows it: `Depends`, a lifespan with state, an `AsyncExitStack`."""

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from starlette.responses import PlainTextResponse

from .work import Log, Plan, Pool, Repo, Service, opened_pool


async def get_pool(request: Request) -> Pool:
    """Return the application's pool."""
    pool: Pool = request.state.pool
    return pool


async def get_repo(pool: Annotated[Pool, Depends(get_pool)]) -> Repo:
    """Return what a request has of its own."""
    return Repo(pool)


async def get_service(repo: Annotated[Repo, Depends(get_repo)]) -> Service:
    """Return what a route asks for."""
    return Service(repo)


def _application(log: Log) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, Any]]:
        async with opened_pool(log) as pool:
            yield {"pool": pool}

    return FastAPI(lifespan=lifespan)


def one(log: Log) -> FastAPI:
    """Ask for the pool."""

    async def root(pool: Annotated[Pool, Depends(get_pool)]) -> PlainTextResponse:
        return PlainTextResponse(pool.name)

    app = _application(log)
    app.get("/")(root)
    return app


def chain(log: Log) -> FastAPI:
    """Ask for the service."""

    async def root(service: Annotated[Service, Depends(get_service)]) -> PlainTextResponse:
        return PlainTextResponse(service.repo.pool.name)

    app = _application(log)
    app.get("/")(root)
    return app


@asynccontextmanager
async def graph(plan: Plan) -> AsyncGenerator[None]:
    """Enter one context manager after another."""
    values: dict[str, object] = {}
    async with AsyncExitStack() as stack:
        for node in plan.nodes:
            manager = asynccontextmanager(plan.factory(node))
            needs = [values[need.name] for need in node.needs]
            values[node.name] = await stack.enter_async_context(manager(*needs))
        yield
